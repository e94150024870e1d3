"""The colour histogram: shares of pixels, and hue, saturation and value as everyone computes them."""

import colorsys

import numpy as np
import torch
from PIL import Image

from ssmamba_models.evaluation.color_histogram import ColorHistogram, color_histogram_encoder, rgb_to_hsv


def test_hsv_equals_the_standard_librarys():
    colours = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    colours[..., :3, 0] = torch.tensor([[0.0, 1, 0.5]] * 3)  # black, white, grey
    found = rgb_to_hsv(colours).flatten(2)[0].T.numpy()
    expected = [colorsys.rgb_to_hsv(*colour) for colour in colours.flatten(2)[0].T.tolist()]
    assert np.allclose(found, expected, atol=1e-5)


def test_entries_are_shares_of_pixels():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = ColorHistogram(bins=8)(images).view(2, 6, 8)
    assert torch.allclose(found.sum(dim=-1), torch.ones(2, 6))
    red = torch.histc(images[1, 0], bins=8, min=0, max=1) / 256
    assert torch.allclose(found[1, 0], red)


def test_an_image_of_one_colour_fills_one_bin_per_channel():
    encoder = color_histogram_encoder(img_size=32)
    features = encoder.embed(encoder.transform(Image.new("RGB", (50, 40), (255, 0, 128)))[None])
    assert features.shape == (1, encoder.embed_dim) == (1, 96)
    assert features.view(6, 16).max(dim=1).values.tolist() == [1] * 6
    assert features.view(6, 16).argmax(dim=1).tolist()[:3] == [15, 0, 8]


def test_position_does_not_matter_and_colour_does():
    model = ColorHistogram()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(image), model(image.flip(2, 3)))
    assert not torch.allclose(model(image), model(image * 0.8))


def test_it_says_what_it_is():
    provenance = color_histogram_encoder().provenance()
    assert (provenance["model"], provenance["weights"]) == ("color_histogram", "none")
    assert provenance["input_size"] == (3, 224, 224)
