"""Slide feature files: what is written is read back, whole or not at all, and the same bytes each time."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmamba_models.data.features import (
    open_slide_features,
    read_slide_features,
    write_slide_features,
)

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

GEOMETRY = {
    "patch_size": 224,
    "patch_size_level0": 448,
    "overlap": 0,
    "level0_mpp": 0.25,
    "target_mpp": 0.5,
    "level0_width": 9000,
    "level0_height": 7000,
    "name": "slide 组织",
}
PROVENANCE = {"model": "m", "mean": [0.5, 0.25], "versions": ["torch 2", "timm 1"], "seed": 3, "pretrained": True}


def make_rows(count=600, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, dim)).astype(np.float32), rng.integers(0, 7000, (count, 2))


def write(path, features, coords, batch=256, grid=None, **options):
    options = {"coords_attributes": GEOMETRY, "attributes": PROVENANCE, **options}
    grid_shape = None if grid is None else grid.shape[1:]
    with write_slide_features(path, features.shape[1], grid_shape=grid_shape, **options) as writer:
        for start in range(0, len(features), batch):
            rows = slice(start, start + batch)
            writer.append(features[rows], coords[rows], None if grid is None else grid[rows])
    return path


def test_round_trip(tmp_path):
    features, coords = make_rows()
    read = read_slide_features(write(tmp_path / "s.h5", features, coords))
    assert np.array_equal(read.features, features)
    assert np.array_equal(read.coords, coords)
    assert (read.features.dtype, read.coords.dtype) == (np.float32, np.int64)
    assert read.coords_attributes == GEOMETRY
    assert read.attributes == PROVENANCE
    assert read.grid is None
    assert {name: getattr(read, name) for name in GEOMETRY} == GEOMETRY
    assert np.allclose(read.tile_grid * 448, coords)
    assert os.listdir(tmp_path) == ["s.h5"]


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 600),
    dim=st.integers(1, 9),
    batch=st.integers(1, 600),
    grid=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    half=st.booleans(),
)
def test_any_shape_in_any_batches_gives_the_same_bytes(tmp_path_factory, count, dim, batch, grid, half):
    folder = tmp_path_factory.mktemp("shapes")
    features, coords = make_rows(count, dim)
    maps = None if grid is None else np.random.default_rng(1).random((count, *grid), dtype=np.float32)
    dtype = np.float16 if half else np.float32
    options = {"grid": maps, "dtype": np.dtype(dtype).name}
    whole = write(folder / "whole.h5", features, coords, batch=count, **options)
    parts = write(folder / "parts.h5", features, coords, batch=batch, **options)
    assert whole.read_bytes() == parts.read_bytes()
    read = read_slide_features(parts, grid=True)
    assert np.array_equal(read.features, features.astype(dtype))
    assert np.array_equal(read.coords, coords)
    assert maps is None or np.array_equal(read.grid, maps.astype(dtype))


def test_wide_token_maps_are_the_same_in_any_batches(tmp_path):
    features, coords = make_rows(40)
    grid = np.random.default_rng(1).random((40, 16, 16, 64), dtype=np.float32)  # 64 kB a tile: chunks of 16 tiles
    files = [write(tmp_path / f"{batch}.h5", features, coords, batch, grid) for batch in (7, 40)]
    assert files[0].read_bytes() == files[1].read_bytes()
    with open_slide_features(files[0]) as file:
        assert np.array_equal(file.grid[13:29], grid[13:29])


def test_batches_may_share_their_memory(tmp_path):
    features, coords = make_rows(10)
    memory = np.empty((1, 5), np.float32)
    with write_slide_features(tmp_path / "s.h5", 5, coords_attributes=GEOMETRY, attributes={}) as writer:
        for row, place in zip(features, coords):
            memory[:] = row
            writer.append(memory, place[None])
    assert np.array_equal(read_slide_features(tmp_path / "s.h5").features, features)


def test_lazy_reading(tmp_path):
    features, coords = make_rows()
    with open_slide_features(write(tmp_path / "s.h5", features, coords)) as file:
        assert (len(file), file.embed_dim, file.patch_size_level0) == (600, 5, 448)
        assert np.array_equal(file.features[250:300], features[250:300])
        assert np.array_equal(file.coords, coords)
        assert file.attributes == PROVENANCE
    with pytest.raises((ValueError, OSError)):
        file.features[0:1]


def test_without_features(tmp_path):
    path = write(tmp_path / "s.h5", *make_rows())
    read = read_slide_features(path, features=False)
    assert read.features is None
    assert len(read.coords) == 600


def test_whole_floats_are_read_as_ints(tmp_path):
    floats = {**GEOMETRY, "patch_size": 224.0, "patch_size_level0": 448.0, "overlap": 0.0, "level0_width": 9e3}
    read = read_slide_features(write(tmp_path / "s.h5", *make_rows(), coords_attributes=floats))
    assert read.coords_attributes == GEOMETRY
    assert all(type(getattr(read, name)) is int for name in ("patch_size", "patch_size_level0", "level0_width"))


def test_a_broken_patch_size_at_level_0_stays_exact(tmp_path):
    exact = {**GEOMETRY, "patch_size_level0": 443.5643564356436}
    read = read_slide_features(write(tmp_path / "s.h5", *make_rows(), coords_attributes=exact))
    assert read.patch_size_level0 == 443.5643564356436


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 224.5}, "patch_size is 224.5, expected a whole number"),
        ({"level0_mpp": 0}, "level0_mpp is 0, expected a number above 0"),
        ({"level0_mpp": float("nan")}, "level0_mpp is nan"),
        ({"target_mpp": "half"}, "target_mpp is 'half', expected a number"),
        ({"overlap": -1}, "overlap is -1, expected a number at least 0"),
        ({"overlap": 224}, "overlap of 224 px does not fit tiles of 224 px"),
        ({"name": ""}, "expected the slide's name"),
    ],
)
def test_impossible_geometry(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s.h5", *make_rows(), coords_attributes={**GEOMETRY, **change})
    assert os.listdir(tmp_path) == []


def test_missing_geometry_is_named(tmp_path):
    incomplete = {name: value for name, value in GEOMETRY.items() if name not in ("level0_mpp", "overlap")}
    with pytest.raises(ValueError, match="lack the attributes overlap, level0_mpp"):
        write(tmp_path / "s.h5", *make_rows(), coords_attributes=incomplete)


@pytest.mark.parametrize(
    ("features", "coords", "grid", "message"),
    [
        (np.zeros((2, 4), np.float32), np.zeros((2, 2), int), None, "do not fit"),
        (np.zeros((2, 5), np.float32), np.zeros((3, 2), int), None, "do not fit"),
        (np.zeros((2, 5), np.float32), np.zeros((2, 3), int), None, "do not fit"),
        (np.zeros((2, 5), np.float32), np.zeros((2, 2)), None, "coords are float64"),
        (np.zeros((2, 5), int), np.zeros((2, 2), int), None, "features are int64"),
        (np.zeros((2, 5), np.float32), np.zeros((2, 2), int), np.zeros((2, 1, 1, 5)), "not declared by grid_shape"),
    ],
)
def test_a_batch_that_does_not_fit(tmp_path, features, coords, grid, message):
    writing = write_slide_features(tmp_path / "s.h5", 5, coords_attributes=GEOMETRY, attributes={})
    with pytest.raises(ValueError, match=message), writing as writer:
        writer.append(features, coords, grid)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("grid", "message"), [(None, "missing"), (np.zeros((2, 2, 2, 5)), r"expected \(2, 3, 3, 5\)")])
def test_token_maps_that_do_not_fit(tmp_path, grid, message):
    writing = write_slide_features(tmp_path / "s.h5", 5, coords_attributes=GEOMETRY, attributes={}, grid_shape=(3, 3))
    with pytest.raises(ValueError, match=message), writing as writer:
        writer.append(np.zeros((2, 5), np.float32), np.zeros((2, 2), int), grid)


def test_features_beyond_float16(tmp_path):
    with pytest.raises(ValueError, match=r"exceed the range of float16.*float32"):
        write(tmp_path / "s.h5", np.full((2, 3), 1e5, np.float32), np.zeros((2, 2), int), dtype="float16")
    with pytest.raises(ValueError, match="choose float32 or float16"):
        write(tmp_path / "s.h5", *make_rows(), dtype="int8")


def test_an_attribute_that_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="the attribute 'bad' cannot be stored"):
        write(tmp_path / "s.h5", *make_rows(), attributes={"bad": {"a": 1}})
    with pytest.raises(ValueError, match=r"the attribute 'long' cannot be stored.*64 kB"):
        write(tmp_path / "s.h5", *make_rows(), attributes={"long": list(range(20_000))})
    assert os.listdir(tmp_path) == []


def test_nothing_appended(tmp_path):
    with pytest.raises(ValueError, match="no tile was appended"):
        write(tmp_path / "s.h5", np.zeros((0, 3), np.float32), np.zeros((0, 2), int))
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_kept(tmp_path):
    path = write(tmp_path / "s.h5", *make_rows())
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(path, *make_rows(seed=1))
    assert path.read_bytes() == before
    write(path, *make_rows(seed=1), overwrite=True)
    assert path.read_bytes() != before


def test_a_disk_that_garbles_is_noticed(tmp_path, monkeypatch):
    import ssmamba_models.data.features as module

    real = module._check_layout

    def garble(file, name):
        real(file, name)
        with open(file.filename, "rb+") as raw:
            raw.seek(-4, os.SEEK_END)
            raw.write(b"\xff\xff\xff\xff")

    monkeypatch.setattr(module, "_check_layout", garble)
    with pytest.raises(OSError, match="did not read back as written"):
        write(tmp_path / "s.h5", *make_rows(256))
    assert os.listdir(tmp_path) == []


class TestBadFiles:
    def edit(self, tmp_path, change):
        path = write(tmp_path / "s.h5", *make_rows(20))
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="ssmamba extract"):
            read_slide_features(tmp_path / "none.h5")

    def test_not_hdf5(self, tmp_path):
        (tmp_path / "s.h5").write_text("text")
        with pytest.raises(ValueError, match="not an HDF5 file"):
            read_slide_features(tmp_path / "s.h5")

    @pytest.mark.parametrize("keep", [0, 100, 2000, 0.5, 0.99])
    def test_cut_short(self, tmp_path, keep):
        path = write(tmp_path / "s.h5", *make_rows())
        size = path.stat().st_size
        os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
        with pytest.raises(ValueError, match="cut short"):
            read_slide_features(path)

    @pytest.mark.parametrize("name", ["features", "coords"])
    def test_missing_data_set(self, tmp_path, name):
        path = self.edit(tmp_path, lambda file: file.pop(name))
        with pytest.raises(ValueError, match=f"no data set '{name}'"):
            read_slide_features(path)

    def test_a_group_is_no_data_set(self, tmp_path):
        def change(file):
            del file["features"]
            file.create_group("features")

        with pytest.raises(ValueError, match="no data set 'features'"):
            read_slide_features(self.edit(tmp_path, change))

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("features", np.zeros((1, 20, 5), np.float32), "ssmamba convert"),
            ("features", np.zeros((20, 5), np.int32), "features are int32, expected float32"),
            ("features", np.zeros((20, 5)), "features are float64, expected float32"),
            ("features", np.zeros((19, 5), np.float32), r"19 features, but coords of shape \(20, 2\)"),
            ("features", np.zeros((0, 5), np.float32), "has no tile"),
            ("coords", np.zeros((20, 3), int), r"coords of shape \(20, 3\)"),
            ("coords", np.zeros((20, 2)), "coords are float64"),
            ("grid", np.zeros((19, 2, 2, 5), np.float32), r"grid has shape \(19, 2, 2, 5\)"),
            ("grid", np.zeros((20, 2, 2, 5), int), "grid are int64"),
        ],
    )
    def test_wrong_shapes_and_types(self, tmp_path, name, values, message):
        def change(file):
            if name in file:
                del file[name]
            file[name] = values

        with pytest.raises(ValueError, match=message):
            read_slide_features(self.edit(tmp_path, change))

    def test_missing_attribute(self, tmp_path):
        path = self.edit(tmp_path, lambda file: file["coords"].attrs.pop("level0_mpp"))
        with pytest.raises(ValueError, match=r"lack the attribute level0_mpp.*ssmamba convert"):
            read_slide_features(path)

    def test_a_tile_folder_file(self, tmp_path):
        from ssmamba_models.data.tile_files import write_features

        with write_features(tmp_path / "f.h5", 2, labelled=False, attributes={}) as writer:
            writer.append(np.zeros((1, 2), np.float32), ["a.png"])
        with pytest.raises(ValueError, match="tile-folder file of `ssmamba embed`"):
            read_slide_features(tmp_path / "f.h5")
