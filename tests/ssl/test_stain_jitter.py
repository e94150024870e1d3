"""Stain jitter: what each part does to a pixel, that it is seeded, and what is refused."""

import math

import numpy as np
import pytest
import torch

from ssmamba_models.data.synthetic import synthetic_he
from ssmamba_models.ssl.stain_jitter import StainJitter

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)


def tissue(seed=0, size=32):
    """Neither so light nor so dark that a little more would leave the range."""
    pixels = torch.from_numpy(np.asarray(synthetic_he(size, seed=seed)) / 255.0).permute(2, 0, 1).float()
    return 0.2 + 0.5 * pixels


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def densities(pixels):
    """(3, H, W) -> (H W, 3): of haematoxylin, eosin and the residual at each pixel, in float64."""
    optical = -np.log(pixels.double().numpy().reshape(3, -1).T)
    return optical @ np.linalg.inv(STAINS)


def test_each_stain_is_scaled_and_shifted_by_one_number():
    pixels = tissue()
    for seed in range(5):
        changed = StainJitter(stain=0.3)(pixels, seeded(seed))
        inside = ((changed > 0) & (changed < 1)).all(0).flatten().numpy()  # elsewhere the range cuts
        before, after = densities(pixels)[inside], densities(changed.clamp(1e-6, 1))[inside]
        for stain in range(3):
            scale, shift = np.polyfit(before[:, stain], after[:, stain], 1)
            assert 0.7 <= scale <= 1.3
            assert abs(shift) <= 0.06 + 1e-3
            np.testing.assert_allclose(after[:, stain], scale * before[:, stain] + shift, atol=1e-3)


def test_colours_change_by_factors_within_their_range():
    """A grey image has no saturation and, being flat, no contrast: brightness alone is left."""
    flat = torch.full((3, 4, 4), 0.4)
    factors = [StainJitter(jitter=0.25)(flat, seeded(seed)).mean().item() / 0.4 for seed in range(100)]
    assert 0.75 <= min(factors) < 0.8
    assert 1.2 < max(factors) <= 1.25
    pixels = tissue().clamp(0.3, 0.6)
    brightness, contrast, saturation = (1 + 0.25 * (2 * torch.rand(3, generator=seeded(1)) - 1)).tolist()
    gray = torch.tensor([0.299, 0.587, 0.114])
    expected = pixels * brightness
    mean = (expected * gray[:, None, None]).sum(0).mean()
    expected = (expected - mean) * contrast + mean
    level = (expected * gray[:, None, None]).sum(0)
    torch.testing.assert_close(
        StainJitter(jitter=0.25)(pixels, seeded(1)), ((expected - level) * saturation + level).clamp(0, 1)
    )


def test_grey_images_occur_as_often_as_asked():
    pixels = tissue(size=16)
    gray = [torch.equal(*StainJitter(gray=0.3)(pixels, seeded(seed))[:2]) for seed in range(300)]
    assert 0.2 < np.mean(gray) < 0.4
    level = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    torch.testing.assert_close(StainJitter(gray=1.0)(pixels, seeded(0)), level.expand(3, -1, -1))


def test_the_generator_alone_decides_and_the_range_stays():
    jitter = StainJitter(stain=0.9, jitter=0.9, gray=0.2)
    for seed in range(20):
        once, again = (jitter(tissue(seed), seeded(seed)) for _ in range(2))
        assert torch.equal(once, again)
        assert once.min() >= 0
        assert once.max() <= 1
    assert not torch.equal(jitter(tissue(), seeded(1)), jitter(tissue(), seeded(2)))


def test_without_arguments_nothing_changes_and_nothing_is_drawn():
    pixels, generator = tissue(), seeded(0)
    state = generator.get_state()
    assert torch.equal(StainJitter()(pixels, generator), pixels)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("name", ["stain", "jitter", "gray"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        StainJitter(**{name: value})
