"""Synthetic H&E: reproducible, of any size, and in the colours of the stain."""

import numpy as np
import pytest

from ssmamba_models.data.synthetic import TISSUE_KINDS, synthetic_he, write_synthetic_tiles
from ssmamba_models.data.tiles import find_tiles


@pytest.mark.parametrize("kind", TISSUE_KINDS)
@pytest.mark.parametrize("size", [(16, 16), (33, 47), (300, 40), (224, 224)])
def test_any_size(kind, size):
    image = synthetic_he(size, kind=kind)
    assert (image.mode, image.size) == ("RGB", size)


@pytest.mark.parametrize("kind", TISSUE_KINDS)
def test_the_seed_decides(kind):
    first, again, other = (np.asarray(synthetic_he(96, seed, kind)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", TISSUE_KINDS)
def test_the_colours_are_those_of_the_stain(kind):
    red, green, blue = np.asarray(synthetic_he(256, 0, kind), dtype=float).reshape(-1, 3).T
    # Both stains absorb green most: tissue is pink to violet, never green.
    assert (green <= np.maximum(red, blue) + 12).mean() > 0.99
    nuclei = (red < 140) & (blue > red)
    assert 0.02 < nuclei.mean() < 0.75


def test_solid_tissue_is_bluer_than_stroma():
    solid, stroma = (np.asarray(synthetic_he(256, 0, kind), dtype=float) for kind in ("solid", "stroma"))
    assert solid[..., 0].mean() < stroma[..., 0].mean() - 30


def test_glands_have_glass_and_nuclei():
    light = np.asarray(synthetic_he(512, 0)).min(axis=-1)
    assert (light > 225).mean() > 0.05
    assert (light < 110).mean() > 0.05


def test_unknown_kind_and_impossible_size():
    with pytest.raises(ValueError, match="glands, stroma, solid"):
        synthetic_he(64, kind="bone")
    with pytest.raises(ValueError, match="use 16 px or more"):
        synthetic_he(8)


def test_a_folder_of_tiles_is_labelled(tmp_path):
    found = find_tiles(write_synthetic_tiles(tmp_path / "tiles", tiles_per_kind=2, size=32))
    assert len(found) == 2 * len(TISSUE_KINDS)
    assert set(found.labels) == set(TISSUE_KINDS)
