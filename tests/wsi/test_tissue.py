"""Tissue is found where it is, and nowhere on glass, ink and black borders."""

import numpy as np
import pytest
from slide_files import blank, corrupt_tile, make_pyramid, tissue

from ssmamba_models.wsi.grid import make_grid
from ssmamba_models.wsi.overview import Overview
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.tissue import tissue_mask

pytest.importorskip("scipy", reason="tissue masks need the [wsi] extra")

GLASS, PINK, PURPLE = (243, 242, 244), (225, 170, 205), (120, 70, 150)


def overview(image, mpp=8.0):
    return Overview(image, mpp / 0.5, mpp, np.zeros(image.shape[:2], bool))


def canvas(color=GLASS, noise=2.0, shape=(150, 200)):
    """A slide of one colour with a camera's noise."""
    noisy = np.array(color) + np.random.default_rng(0).normal(0, noise, (*shape, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def found(image):
    return tissue_mask(overview(image)).mask


@pytest.fixture(scope="module")
def disc(tmp_path_factory):
    """A slide of 2000 px with a pink disc of radius 700 px in its middle."""
    path = tmp_path_factory.mktemp("slides") / "disc.tif"
    return make_pyramid(path, (2000, 2000), 0.5, content=tissue)


def test_a_disc_of_tissue(disc):
    with open_slide(disc) as slide:
        mask = tissue_mask(slide)
        grid = make_grid(slide.dimensions, slide.mpp, 0.5, 200, mask=mask, min_tissue=0.25)
    assert (mask.mask.shape, mask.downsample) == ((125, 125), 16.0)
    area = mask.mask.sum() * mask.downsample**2
    assert area == pytest.approx(np.pi * 700**2, rel=0.05)
    centres = grid.coords + 100 - 1000
    assert (np.hypot(*centres.T) < 900).all()
    assert len(grid) == pytest.approx(area / 200**2, rel=0.25)


@pytest.mark.parametrize("color", [GLASS, (255, 255, 255), (235, 235, 225), (200, 200, 200), (0, 0, 0), (20, 20, 25)])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_blank_slide_has_none(color, noise):
    assert not found(canvas(color, noise)).any()


def test_a_blank_slide_from_a_file_has_no_tiles(tmp_path):
    with open_slide(make_pyramid(tmp_path / "s.tif", (1000, 1000), 0.5, content=blank)) as slide:
        assert len(make_grid(slide.dimensions, slide.mpp, 0.5, 224, mask=tissue_mask(slide))) == 0


@pytest.mark.parametrize("side", [16, 24, 40])
def test_a_field_of_view_smaller_than_dirt_and_holes_may_be(side):
    """128, 192 and 320 um."""
    assert found(canvas((220, 120, 170), shape=(side, side))).all()
    assert not found(canvas(shape=(side, side))).any()
    half = canvas(shape=(side, side))
    half[:, side // 2 :] = canvas((220, 120, 170), shape=(side, side))[:, side // 2 :]
    assert found(half).mean() == pytest.approx(0.5, abs=0.1)


def test_a_slide_without_glass_is_tissue_all_over():
    assert found(canvas(PINK)).all()
    two = canvas(PINK)
    two[:, 100:] = canvas(PURPLE)[:, 100:]
    assert found(two).all()


def test_pale_and_dark_tissue_on_one_slide():
    image = canvas()
    image[20:60, 20:80] = canvas(PINK)[20:60, 20:80]
    image[80:130, 100:180] = canvas(PURPLE)[80:130, 100:180]
    mask = found(image)
    assert mask[25:55, 25:75].all()
    assert mask[85:125, 105:175].all()
    assert mask.sum() == pytest.approx(40 * 60 + 50 * 80, rel=0.05)


@pytest.mark.parametrize(
    "ink",
    [(0, 0, 0), (25, 22, 28), (30, 160, 70), (20, 120, 110), (20, 40, 200)],
    ids=["black", "dark", "green", "teal", "blue"],
)
def test_ink_and_borders_are_no_tissue(ink):
    image = canvas()
    image[60:100, 60:120] = canvas(PINK)[60:100, 60:120]
    image[:, :12] = image[:10] = canvas(ink)[:1, :1]
    image[110:118, 20:180] = canvas(ink)[110:118, 20:180]
    mask = found(image)
    assert mask[65:95, 65:115].all()
    assert mask.sum() == pytest.approx(40 * 60, rel=0.1)


def test_dirt_goes_small_holes_close_and_large_ones_stay():
    image = canvas()
    image[20:130, 20:180] = canvas(PINK)[20:130, 20:180]
    image[40:44, 40:44] = canvas()[40:44, 40:44]
    image[60:100, 80:140] = canvas()[60:100, 80:140]
    image[5:8, 5:8] = canvas(PURPLE)[5:8, 5:8]
    mask = found(image)
    assert mask[40:44, 40:44].all()
    assert not mask[65:95, 85:135].any()
    assert not mask[:15, :15].any()


def test_the_same_tissue_at_another_resolution():
    coarse = canvas()
    coarse[30:110, 40:160] = canvas(PINK)[30:110, 40:160]
    fine = coarse.repeat(2, axis=0).repeat(2, axis=1)
    one, two = tissue_mask(overview(coarse)), tissue_mask(overview(fine, mpp=4.0))
    assert two.downsample == one.downsample / 2
    assert np.mean(two.mask[::2, ::2] != one.mask) < 0.01


def test_what_cannot_be_read_counts_as_tissue(tmp_path):
    """So that its tiles are tried and reported, not silently left out."""
    path = make_pyramid(tmp_path / "s.tif", (2048, 2048), 0.5, levels=(1,), content=blank)
    with open_slide(corrupt_tile(path, index=9)) as slide:
        mask = tissue_mask(slide)
        grid = make_grid(slide.dimensions, slide.mpp, 0.5, 256, mask=mask)
    assert mask.mask[16:32, 16:32].all()
    assert [256, 256] in grid.coords.tolist()
    assert len(grid) <= 4


def test_a_slide_that_cannot_be_read_at_all():
    nothing = np.ones((30, 40), bool)
    assert tissue_mask(Overview(np.full((30, 40, 3), 255, np.uint8), 16.0, 8.0, nothing)).mask.all()


def test_real_slide(data_root):
    with open_slide(data_root / "slides" / "cmu-1-small-region.svs") as slide:
        mask = tissue_mask(slide)
    # Skin in the middle; the corners are glass.
    assert 0.3 < mask.mask.mean() < 0.5
    assert mask.mask[100:150, 60:90].all()
    assert not mask.mask[:20, 100:].any()
    assert not mask.mask[80:, :25].any()
    # A strand of some 60 um on the left is tissue too.
    assert mask.mask[60:75, 20:40].any()
