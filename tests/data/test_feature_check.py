"""Checks of slide feature files: each fault is found and named, a whole file passes, memory stays bounded."""

import os
import tracemalloc

import numpy as np
import pytest

from ssmamba_models.data.feature_check import check_feature_files, check_slide_features
from ssmamba_models.data.features import write_slide_features

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

GEOMETRY = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "overlap": 0,
    "level0_mpp": 0.25,
    "target_mpp": 0.5,
    "level0_width": 100_000,
    "level0_height": 80_000,
    "name": "s",
}
PROVENANCE = {"model": "m", "weights_sha256": "0" * 64, "mean": [0.5, 0.5, 0.5]}


def make_rows(count=40, dim=4):
    coords = np.stack([np.arange(count) * 512, np.zeros(count, int)], axis=1)
    return np.random.default_rng(0).random((count, dim), dtype=np.float32), coords


def write(path, rows=None, geometry=(), provenance=(), drop=(), grid=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    features, coords = rows or make_rows()
    attributes = {name: value for name, value in {**PROVENANCE, **dict(provenance)}.items() if name not in drop}
    options = {"coords_attributes": {**GEOMETRY, **dict(geometry)}, "attributes": attributes}
    shape = None if grid is None else grid.shape[1:]
    with write_slide_features(path, features.shape[1], grid_shape=shape, **options) as writer:
        writer.append(features, coords, grid)
    return path


def kinds(path):
    return [problem.kind for problem in check_slide_features(path)]


def test_a_whole_file(tmp_path):
    assert check_slide_features(write(tmp_path / "s.h5")) == []


@pytest.mark.parametrize(
    ("kind", "row", "value", "message"),
    [
        ("nan", 7, np.nan, r"features of 2 of 40 tiles with NaN (first: row 7)"),
        ("infinite", 39, -np.inf, r"features of 1 of 40 tiles with infinite values (first: row 39)"),
        ("zero", 38, 0, r"features of 2 of 40 tiles that are all zero (first: row 38)"),
    ],
)
def test_values(tmp_path, kind, row, value, message):
    features, coords = make_rows()
    features[row : row + 2, slice(None) if kind == "zero" else 1] = value
    ((found, text),) = [(p.kind, p.message) for p in check_slide_features(write(tmp_path / "s.h5", (features, coords)))]
    assert (found, text) == (kind, message)


def test_token_maps(tmp_path):
    grid = np.zeros((40, 2, 2, 4), np.float32)
    assert kinds(write(tmp_path / "zero.h5", grid=grid)) == []
    grid[3, 1, 1, 2] = np.nan
    (problem,) = check_slide_features(write(tmp_path / "s.h5", grid=grid))
    assert problem.message == "token maps of 1 of 40 tiles with NaN (first: row 3)"


def test_duplicates_and_places_outside(tmp_path):
    features, coords = make_rows()
    coords[5] = coords[2]
    coords[9] = (100_000, 0)
    coords[10] = (0, -1)
    twice, outside = check_slide_features(write(tmp_path / "s.h5", (features, coords)))
    assert (twice.kind, twice.message) == ("duplicate", "1 of 40 tiles lie where another lies")
    assert outside.kind == "outside"
    assert "2 tiles start outside the slide of 100000 x 80000 px (first: row 9 at (100000, 0))" in outside.message


def test_a_geometry_that_contradicts_itself(tmp_path):
    (problem,) = check_slide_features(write(tmp_path / "s.h5", geometry={"patch_size_level0": 256}))
    assert problem.kind == "geometry"
    assert "are 512 px wide on level 0, not 256" in problem.message
    assert kinds(write(tmp_path / "rounded.h5", geometry={"patch_size_level0": 512.4})) == []


def test_missing_provenance(tmp_path):
    (problem,) = check_slide_features(write(tmp_path / "s.h5", drop=("model", "weights_sha256")))
    assert (problem.kind, problem.message) == ("provenance", "the file does not say model and weights_sha256")
    converted = write(tmp_path / "c.h5", provenance={"converted_from": "clam"}, drop=("weights_sha256",))
    assert kinds(converted) == []
    (problem,) = check_slide_features(
        write(tmp_path / "d.h5", provenance={"converted_from": "clam"}, drop=("model", "weights_sha256"))
    )
    assert problem.message == "the file does not say model"


@pytest.mark.parametrize("how", ["text", "cut", "foreign"])
def test_unreadable(tmp_path, how):
    path = write(tmp_path / "s.h5")
    if how == "text":
        path.write_text("text")
    elif how == "cut":
        os.truncate(path, 2500)
    else:
        with h5py.File(path, "a") as file:
            del file["coords"].attrs["level0_mpp"]
    assert kinds(path) == ["unreadable"]


def test_a_file_whose_rows_cannot_be_read(tmp_path):
    path = write(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        rows = file["features"][...]
        del file["features"]
        file.create_dataset("features", data=rows, chunks=(10, 4), fletcher32=True)
        place = file["features"].id.get_chunk_info(2).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(place)
        raw.write(b"\x01\x02\x03\x04")
    assert kinds(path) == ["unreadable"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_slide_features(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("provenance", "geometry", "message"),
    [
        ({"model": "other"}, {}, "model is 'other', but 'm' in 2 files of the folder"),
        ({"weights_sha256": "1" * 64}, {}, "weights_sha256 is '1111"),
        ({"mean": [0.1, 0.5, 0.5]}, {}, "mean is [0.1, 0.5, 0.5], but [0.5, 0.5, 0.5]"),
        ({}, {"overlap": 32}, "overlap is 32, but 0"),
        ({}, {"target_mpp": 1.0, "patch_size_level0": 1024}, "target_mpp is 1.0, but 0.5"),
    ],
)
def test_mixed_provenance_in_one_folder(tmp_path, provenance, geometry, message):
    paths = [
        write(tmp_path / "in/a.h5", provenance=provenance, geometry=geometry),
        *(write(tmp_path / f"in/{name}.h5") for name in "bc"),
        # Another folder may hold what it likes.
        write(tmp_path / "beside/a.h5", provenance=provenance, geometry=geometry),
    ]
    reports = {report.path: report.problems for report in check_feature_files(paths)}
    (problem,) = reports.pop(paths[0])
    assert problem.kind == "mixed"
    assert problem.message.startswith(message)
    assert list(reports.values()) == [[], [], []]


def test_mpp_that_differ_by_rounding_are_not_mixed(tmp_path):
    paths = [write(tmp_path / f"{mpp}.h5", geometry={"target_mpp": mpp}) for mpp in (0.5, 0.5001, 0.499)]
    assert all(report.problems == [] for report in check_feature_files(paths))


def test_an_unreadable_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "a.h5").write_text("text")
    reports = list(check_feature_files([tmp_path / "a.h5", write(tmp_path / "b.h5")]))
    assert [[problem.kind for problem in report.problems] for report in reports] == [["unreadable"], []]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "broken.h5").write_bytes(b"nothing")
    (alone,) = check_feature_files([tmp_path / "none" / "broken.h5"])
    assert [problem.kind for problem in alone.problems] == ["unreadable"]
    assert (reports[1].tiles, reports[1].embed_dim, reports[1].dtype) == (40, 4, "float32")


def test_memory_is_bounded(tmp_path):
    count, dim = 20_000, 512  # 40 MB
    coords = np.stack([np.arange(count) % 200 * 16, np.arange(count) // 200 * 16], axis=1)
    features = np.ones((2000, dim), np.float32)
    with write_slide_features(tmp_path / "s.h5", dim, coords_attributes=GEOMETRY, attributes=PROVENANCE) as writer:
        for start in range(0, count, 2000):
            writer.append(features, coords[start : start + 2000])
    tracemalloc.start()
    assert check_slide_features(tmp_path / "s.h5") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6
