"""Feature files: what is written is read back, whole or not at all, and the same each time."""

import builtins
import os

import numpy as np
import pytest

from ssmamba_models.data.tile_files import read_features, write_features

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
PATHS = ["a/1.png", "a/2.png", "b/组织 3.png", "b/4.png"]
LABELS = ["a", "a", "b", "b"]


def write(path, labels=LABELS, **options):
    attributes = {"model": "m", "mean": (0.5, 0.5, 0.5), "crop_pct": 0.9, "seed": 0}
    with write_features(path, 3, labelled=labels is not None, attributes=attributes, **options) as writer:
        for rows in (slice(0, 1), slice(1, 4)):
            writer.append(FEATURES[rows], PATHS[rows], labels and labels[rows])
    return path


def nothing_but(folder, *names):
    assert sorted(os.listdir(folder)) == sorted(names)


def test_round_trip(tmp_path):
    read = read_features(write(tmp_path / "f.h5"))
    assert np.array_equal(read.features, FEATURES)
    assert read.features.dtype == np.float32
    assert (read.paths, read.labels) == (PATHS, LABELS)
    assert read.attributes == {"model": "m", "mean": [0.5, 0.5, 0.5], "crop_pct": 0.9, "seed": 0}
    nothing_but(tmp_path, "f.h5")


def test_without_labels(tmp_path):
    path = write(tmp_path / "f.h5", labels=None)
    assert read_features(path).labels is None
    with h5py.File(path) as file:
        assert sorted(file) == ["features", "paths"]
        assert h5py.check_string_dtype(file["paths"].dtype).encoding == "utf-8"


def test_two_writes_are_equal_to_the_byte(tmp_path):
    first, second = write(tmp_path / "1.h5"), write(tmp_path / "2.h5")
    assert first.read_bytes() == second.read_bytes()


def test_many_batches(tmp_path):
    rows = np.random.default_rng(0).random((700, 5), dtype=np.float32)
    with write_features(tmp_path / "f.h5", 5, labelled=False, attributes={}) as writer:
        for start in range(0, 700, 32):
            part = rows[start : start + 32]
            writer.append(part, [str(start + index) for index in range(len(part))])
    read = read_features(tmp_path / "f.h5")
    assert np.array_equal(read.features, rows)
    assert read.paths == [str(index) for index in range(700)]


def write_and_then(path, action, **options):
    with write_features(path, 3, labelled=False, attributes={}, **options) as writer:
        writer.append(FEATURES + 1, PATHS)
        action()


def fail(error):
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_run_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        write_and_then(tmp_path / "f.h5", lambda: fail(error))
    nothing_but(tmp_path)


def test_a_failing_run_leaves_an_existing_output_untouched(tmp_path):
    path = write(tmp_path / "f.h5")
    before = path.read_bytes()
    with pytest.raises(OSError, match="full"):
        write_and_then(path, lambda: fail(OSError("the disk is full")), overwrite=True)
    assert path.read_bytes() == before
    nothing_but(tmp_path, "f.h5")


def test_an_existing_output_needs_overwrite(tmp_path):
    path = write(tmp_path / "f.h5")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(path)
    assert read_features(write(path, labels=None, overwrite=True)).labels is None


def test_an_output_that_appears_during_the_run_is_kept(tmp_path):
    path = tmp_path / "f.h5"
    with pytest.raises(FileExistsError, match="appeared"):
        write_and_then(path, lambda: path.write_text("precious"))
    assert path.read_text() == "precious"
    nothing_but(tmp_path, "f.h5")


def test_the_file_obeys_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        assert write(tmp_path / "f.h5").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_nothing_appended_makes_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="no feature"),
        write_features(tmp_path / "f.h5", 3, labelled=False, attributes={}),
    ):
        pass
    nothing_but(tmp_path)


@pytest.mark.parametrize(
    ("features", "paths", "labels"),
    [
        (FEATURES[:, :2], PATHS, LABELS),
        (FEATURES, PATHS[:3], LABELS[:3]),
        (FEATURES, PATHS, LABELS[:3]),
        (FEATURES, PATHS, None),
    ],
)
def test_a_batch_that_does_not_fit(tmp_path, features, paths, labels):
    with (
        pytest.raises(ValueError, match="paths"),
        write_features(tmp_path / "f.h5", 3, labelled=True, attributes={}) as writer,
    ):
        writer.append(features, paths, labels)
    nothing_but(tmp_path)


class TestRead:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_features(tmp_path / "f.h5")

    def test_not_hdf5(self, tmp_path):
        (tmp_path / "f.h5").write_text("features,1,2,3")
        with pytest.raises(ValueError, match="not an HDF5 file"):
            read_features(tmp_path / "f.h5")

    def test_cut_short(self, tmp_path):
        path = write(tmp_path / "f.h5")
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="cut short"):
            read_features(path)

    @pytest.mark.parametrize("missing", ["features", "paths"])
    def test_missing_data_set(self, tmp_path, missing):
        path = write(tmp_path / "f.h5")
        with h5py.File(path, "a") as file:
            del file[missing]
        with pytest.raises(ValueError, match=f"no data set '{missing}'.*labels"):
            read_features(path)

    @pytest.mark.parametrize("column", ["paths", "labels"])
    def test_columns_of_another_length(self, tmp_path, column):
        path = write(tmp_path / "f.h5")
        with h5py.File(path, "a") as file:
            file[column].resize(3, axis=0)
        with pytest.raises(ValueError, match=f"4 features, but {column}"):
            read_features(path)

    def test_features_that_are_no_table(self, tmp_path):
        with h5py.File(tmp_path / "f.h5", "w") as file:
            file["features"], file["paths"] = np.zeros(4), PATHS
        with pytest.raises(ValueError, match=r"expected \(N, D\)"):
            read_features(tmp_path / "f.h5")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_h5py(name, *rest):
        if name == "h5py":
            raise ModuleNotFoundError("No module named 'h5py'", name="h5py")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_h5py)
    with pytest.raises(ImportError, match=r"pip install \"ssmamba-models\[wsi\]\""):
        write(tmp_path / "f.h5")
    with pytest.raises(ImportError, match=r"\[wsi\]"):
        read_features(tmp_path / "f.h5")
    nothing_but(tmp_path)
