"""MAMIM's views: what they show, where the high lies in the low, their masks, and what is refused."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssmamba_models.ssl.mamim_views import MamimViews

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def ramp(width=160, height=160):
    """An image whose red tells x and whose green tells y: every resize and turn of it is known."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8))


def draw(seed, image=None, **arguments):
    views = MamimViews(**({"img_size": 64, "cell_size": 16} | PLAIN | arguments))
    return views(image or ramp(), torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**32))
def test_theta_finds_the_high_view_in_the_low_view(seed):
    views = draw(seed)
    grid = F.affine_grid(views["theta"][None], [1, 3, 64, 64], align_corners=False)
    found = F.grid_sample(views["low"][None], grid, padding_mode="border", align_corners=False)[0]
    # Not at the border: the low view's outermost half pixel cannot be interpolated.
    error = (found - views["high"])[:2, 4:-4, 4:-4].abs().max()
    assert error < 0.02


@given(st.integers(0, 2**32))
def test_the_high_view_magnifies_within_the_range_asked_for(seed):
    scale = torch.linalg.matrix_norm(draw(seed)["theta"][:, :2], ord=2).item()
    assert 1 / 2.5 - 1e-5 <= scale <= 1 / 1.25 + 1e-5


def test_every_symmetry_of_the_square_occurs():
    turns = {tuple(draw(seed)["theta"][:, :2].sign().flatten().tolist()) for seed in range(200)}
    assert len(turns) == 8


def test_zoom_is_log_uniform():
    scales = [torch.linalg.matrix_norm(draw(seed)["theta"][:, :2], ord=2).log().item() for seed in range(300)]
    middle = -(math.log(1.25) + math.log(2.5)) / 2
    assert abs(np.median(scales) - middle) < 0.08


def test_small_tiles_are_not_enlarged_beyond_the_cap():
    # Low views of 50 px and more on a side, and 64 px of output: at most twofold means 32 px of tile and more.
    views = [draw(seed, ramp(70, 70), zoom=(4.0, 4.0)) for seed in range(20)]
    for view in views:
        red = view["high"][:2].reshape(2, -1)
        span = (red.max(1).values - red.min(1).values).max().item() * 69
        assert span > 32 - 1.5


@given(st.integers(0, 2**32), st.sampled_from([0.25, 0.5, 0.75]))
def test_masks_hide_their_share_and_are_independent(seed, ratio):
    views = draw(seed, mask_ratio=ratio)
    assert views["low_mask"].sum() == views["high_mask"].sum() == round(16 * ratio)
    assert views["low_mask"].shape == (4, 4)
    again = draw(seed, mask_ratio=ratio)
    assert torch.equal(views["low_mask"], again["low_mask"])


def test_masks_of_the_two_views_differ():
    assert sum(torch.equal(v["low_mask"], v["high_mask"]) for v in map(draw, range(30))) < 3


def test_the_generator_alone_decides():
    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    second = draw(7)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["low"], draw(8)["low"])


def test_views_are_normalised_and_may_come_from_any_shape():
    views = draw(0, ramp(200, 90), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert views["low"].shape == views["high"].shape == (3, 64, 64)
    torch.testing.assert_close(views["low"][2], torch.full((64, 64), (128 / 255 - 0.5) / 0.5))


def test_tissue_keeps_its_shape_on_oblong_tiles():
    low = draw(3, ramp(200, 100))["low"]
    per_pixel = [max((low[i].diff(dim=d).abs().mean().item()) for d in (0, 1)) for i in (0, 1)]
    # A pixel of the view is as many tile pixels wide as high; x runs over 200 of them, y over 100.
    assert per_pixel[1] / per_pixel[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 100}, "multiple of cell_size"),
        ({"img_size": 8}, "multiple of cell_size"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": 0.01}, "at least one masked"),
        ({"area": (0.9, 0.5)}, "area"),
        ({"area": (0.0, 1.0)}, "area"),
        ({"zoom": (0.5, 2.0)}, "zoom"),
        ({"max_upsampling": 0.5}, "max_upsampling"),
        ({"max_upsampling": math.nan}, "max_upsampling"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MamimViews(**({"img_size": 64, "cell_size": 16} | arguments))


@given(st.integers(0, 2**32))
def test_local_views_lie_in_the_low_view_and_have_the_share_asked_for(seed):
    views = draw(seed, local_crops=3, local_size=48, local_area=(0.1, 0.4))
    assert views["local"].shape == (3, 3, 48, 48)
    low = views["low"][:2].flatten(1)
    spans = (low.max(1).values - low.min(1).values).mean()
    for local in views["local"][:, :2].flatten(2):
        assert (local.min(1).values >= low.min(1).values - 0.02).all()
        assert (local.max(1).values <= low.max(1).values + 0.02).all()
        share = ((local.max(1).values - local.min(1).values).mean() / spans) ** 2
        assert 0.1 * 0.8 <= share <= 0.4 * 1.15  # the outermost pixels' centres lie inside


def test_local_views_differ_in_place_size_and_turn():
    local = draw(0, local_crops=20, local_size=32)["local"]
    means = local[:, :2].mean((2, 3))
    assert means.std(0).min() > 0.02
    both = local[:, :2].sum(1)  # rises along x and along y
    slopes = {(bool(view[0, 0] < view[0, -1]), bool(view[0, 0] < view[-1, 0])) for view in both}
    assert len(slopes) == 4


def test_without_local_views_there_are_none():
    assert "local" not in draw(0)


def test_stain_and_colour_change_no_place_and_no_mask():
    plain, colored = draw(3), draw(3, stain=0.3, jitter=0.2)
    for name in ("low_mask", "high_mask", "theta"):
        assert torch.equal(plain[name], colored[name])
    for name in ("low", "high"):
        assert (plain[name] - colored[name]).abs().mean() > 0.005


def test_each_view_has_a_stain_of_its_own():
    """Of a flat tile two views differ by their stain alone."""
    flat = Image.new("RGB", (96, 96), (180, 120, 160))
    views = draw(0, flat, stain=0.3, local_crops=2)
    colors = torch.stack([views["low"], views["high"], *views["local"][:, :, :64, :64]]).mean((2, 3))
    assert torch.pdist(colors).min() > 0.005
    assert torch.pdist(torch.stack([draw(0, flat)[name].mean((1, 2)) for name in ("low", "high")])) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stain": 1.0}, "stain is 1.0"),
        ({"jitter": -1.0}, "jitter is -1.0"),
        ({"gray": 2.0}, "gray is 2.0"),
        ({"local_crops": -1}, "local_crops is -1"),
        ({"local_size": 0}, "local_size is 0"),
        ({"local_area": (0.5, 0.2)}, "local_area is"),
        ({"local_area": (0.1, 1.5)}, "local_area is"),
    ],
)
def test_bad_colours_and_local_views_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(0, **arguments)
