"""SGCL's views: the generator alone decides, and each crop shows its own corner."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssmamba_models.ssl.sgcl_views import SpatialGuidedMultiCrop


def quadrants(size=64):
    """A tile whose corners are red, green, blue and white."""
    colors = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], dtype=np.uint8)
    return Image.fromarray(colors.repeat(size // 2, 0).repeat(size // 2, 1))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_shapes_and_defaults():
    views = SpatialGuidedMultiCrop(224)(quadrants(256), seeded(0))
    shapes = {name: tuple(view.shape) for name, view in views.items()}
    assert shapes == {"image": (3, 224, 224), "crops": (4, 3, 96, 96)}
    assert {view.dtype for view in views.values()} == {torch.float32}


@pytest.mark.parametrize(("img_size", "crop_size"), [(64, 32), (96, 48), (224, 96), (256, 112), (32, 32)])
def test_crops_follow_the_global_view(img_size, crop_size):
    assert SpatialGuidedMultiCrop(img_size).crop_size == crop_size


def test_the_generator_alone_decides():
    views, image = SpatialGuidedMultiCrop(64), quadrants()
    torch.manual_seed(1)
    one = views(image, seeded(3))
    torch.manual_seed(2)
    again, other = views(image, seeded(3)), views(image, seeded(4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_each_crop_shows_its_corner():
    plain = SpatialGuidedMultiCrop(64, gray=0.0, jitter=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    for seed in range(20):
        crops = plain(quadrants(), seeded(seed))["crops"]
        colors = (crops * 255).round().flatten(2)
        assert torch.equal(colors.amin(2), colors.amax(2))  # nothing of another corner
        assert colors[..., 0].tolist() == [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 200]]


def test_a_tile_of_odd_sides_has_four_corners():
    views = SpatialGuidedMultiCrop(64)(Image.new("RGB", (7, 3)), seeded(0))
    assert views["crops"].isfinite().all()


def test_without_the_inner_invariance_there_are_no_crops():
    with_crops, without = (SpatialGuidedMultiCrop(64, inner=inner)(quadrants(), seeded(0)) for inner in (True, False))
    assert list(without) == ["image"]
    assert torch.equal(without["image"], with_crops["image"])


def test_gray_and_jitter_happen_as_often_as_asked():
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "inner": False}
    tile = Image.new("RGB", (32, 32), (180, 90, 140))

    def draw(**settings):
        views = SpatialGuidedMultiCrop(32, **plain, **settings)
        return torch.stack([views(tile, seeded(seed))["image"][:, 0, 0] for seed in range(200)])

    gray = draw(gray=0.2, jitter=0.0)
    assert 0.1 < (gray[:, 0] == gray[:, 1]).float().mean() < 0.3
    changed = draw(gray=0.0, jitter=0.4)
    assert changed.std(0).min() > 0.1
    assert len(draw(gray=0.0, jitter=0.0).unique(dim=0)) == 1


def test_half_of_the_views_are_mirrored():
    views = SpatialGuidedMultiCrop(64, gray=0.0, jitter=0.0, area=(1.0, 1.0), inner=False)
    red = [views(quadrants(), seeded(seed))["image"][0, 4] for seed in range(60)]
    mirrored = sum(bool(row[-8] > row[8]) for row in red)
    assert 15 < mirrored < 45


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"area": (0.0, 1.0)}, "area is"),
        ({"area": (0.5, 0.2)}, "area is"),
        ({"crop_area": (0.2, 1.1)}, "crop_area is"),
        ({"gray": 1.1}, "gray is 1.1"),
        ({"jitter": 0.6}, "jitter is 0.6, expected 0 to 0.5"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"crop_size": 0}, "crop_size is 0"),
        ({"img_size": 0}, "img_size is 0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SpatialGuidedMultiCrop(**{"img_size": 64, **changes})


def test_a_tile_without_corners():
    with pytest.raises(ValueError, match="1 x 64 px has no four corners"):
        SpatialGuidedMultiCrop(64)(Image.new("RGB", (1, 64)), seeded(0))
