"""Bags: which slides a table of labels names, what is refused, and reading some of the tiles."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

from ssmamba_models.data.bags import check_same_provenance, feature_files, open_bag, read_bags
from ssmamba_models.data.features import write_slide_features
from ssmamba_models.data.synthetic_slides import write_synthetic_slides

GEOMETRY = {
    "patch_size": 224, "patch_size_level0": 448, "overlap": 0, "level0_mpp": 0.25, "target_mpp": 0.5,
    "level0_width": 9000, "level0_height": 9000,
}  # fmt: skip
PROVENANCE = {"model": "m", "weights_sha256": "abc", "mean": [0.5, 0.5, 0.5]}


def write_slide(folder, name, tiles=3, dim=4, attributes=None, dtype="float32", **geometry):
    coords_attributes = GEOMETRY | geometry | {"name": name}
    attributes = PROVENANCE | (attributes or {})
    path = folder / f"{name}.h5"
    with write_slide_features(
        path, dim, coords_attributes=coords_attributes, attributes=attributes, dtype=dtype
    ) as writer:
        places = np.arange(tiles)
        writer.append(np.repeat(places[:, None], dim, 1).astype(np.float32), np.stack((places * 448, places * 0), 1))
    return path


@pytest.fixture
def folder(tmp_path):
    """Slides a, b, c and d."""
    (tmp_path / "features").mkdir()
    for number, name in enumerate("abcd"):
        write_slide(tmp_path / "features", name, tiles=3 + number)
    return tmp_path / "features"


@pytest.fixture
def table(tmp_path):
    def write(*rows, header=("slide", "label", "patient")):
        path = tmp_path / "labels.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


def test_what_is_read(folder, table):
    bags = read_bags(folder, table(("c", "yes", "P2"), ("a", "no", "P1"), ("b", "yes", "P2")))
    assert [(bag.slide, bag.label, bag.patient, bag.split, bag.tiles) for bag in bags.bags] == [
        ("a", "no", "P1", None, 3),
        ("b", "yes", "P2", None, 4),
        ("c", "yes", "P2", None, 5),
    ]
    assert (bags.classes, bags.targets.tolist(), len(bags), bags.feature_dim) == (("no", "yes"), [0, 1, 1], 3, 4)
    assert (bags.unlabelled, bags.missing) == (("d",), ())
    assert bags.provenance["model"] == "m"
    assert bags.provenance["target_mpp"] == 0.5


def test_names_with_a_suffix_and_columns_that_are_not_there(folder, table):
    rows = (("a.svs", "no", "x"), ("b.ome.tif", "yes", "y"))
    bags = read_bags(folder, table(*rows, header=("Slide", "LABEL", "comment")))
    assert [(bag.slide, bag.patient) for bag in bags.bags] == [("a", "a"), ("b", "b")]


def test_splits(folder, table):
    rows = (("a", "no", "train"), ("b", "yes", "Test"))
    bags = read_bags(folder, table(*rows, header=("slide", "label", "split")))
    assert [bag.split for bag in bags.bags] == ["train", "test"]


def test_the_digest_tells_what_changed(folder, table):
    rows = [("a", "no", "P1"), ("b", "yes", "P2")]
    digests = {read_bags(folder, table(*rows)).sha256()}
    digests.add(read_bags(folder, table(*reversed(rows))).sha256())
    assert len(digests) == 1
    digests.add(read_bags(folder, table(rows[0], ("b", "yes", "P3"))).sha256())
    digests.add(read_bags(folder, table(rows[0], ("b", "perhaps", "P2"))).sha256())
    write_slide(folder, "e")
    digests.add(read_bags(folder, table(*rows, ("e", "yes", "P4"))).sha256())
    assert len(digests) == 4


@pytest.mark.parametrize("places", [None, np.array([1, 25])])
def test_a_block_that_is_damaged(tmp_path, places):
    import h5py

    path = write_slide(tmp_path, "s", tiles=40)
    with h5py.File(path, "a") as file:
        rows = file["features"][...]
        del file["features"]
        file.create_dataset("features", data=rows, chunks=(10, 4), fletcher32=True)
        start = file["features"].id.get_chunk_info(2).byte_offset
    with open(path, "r+b") as raw:
        raw.seek(start)
        raw.write(b"\x01\x02\x03\x04")
    bag, _ = open_bag(path)
    with pytest.raises(ValueError, match=r"s\.h5' is damaged"):
        bag.read(places)


def test_a_bag_of_shared_augmentation_that_is_damaged_or_gone(tmp_path):
    import h5py

    path = write_slide(tmp_path, "s", tiles=4)
    with h5py.File(path, "a") as file:
        group = file.create_group("bags")
        group["features"] = np.ones((2, 3, 4), np.float32)
        group.create_dataset("coords", data=np.zeros((2, 3, 2), np.int64), chunks=(1, 3, 2), fletcher32=True)
        start = group["coords"].id.get_chunk_info(1).byte_offset
    bag, _ = open_bag(path)
    assert bag.shared_bags == 2
    with open(path, "r+b") as raw:
        raw.seek(start)
        raw.write(b"\x01")
    assert bag.read_shared(0)[0].shape == (3, 4)
    with pytest.raises(ValueError, match=r"s\.h5' is damaged"):
        bag.read_shared(1)
    with h5py.File(path, "a") as file:
        del file["bags"]
    with pytest.raises(ValueError, match="has lost its bags"):
        bag.read_shared(0)


def test_some_of_the_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr("ssmamba_models.data.bags._READ_ROWS", 4)
    bag, _ = open_bag(write_slide(tmp_path, "s", tiles=19))
    for places in ([0], [3, 4], [0, 5, 6, 18], list(range(19))):
        features, coords = bag.read(np.array(places))
        assert features[:, 0].tolist() == places
        assert (coords[:, 0] // 448).tolist() == places
    features, coords = bag.read()
    assert (features.shape, coords.shape) == ((19, 4), (19, 2))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        (("slide", "class"), [("a", "x")], r"no column 'label' \(its columns: slide, class\)"),
        (("name", "label"), [("a", "x")], "no column 'slide'"),
        (("slide", "label"), [], "has no rows"),
        (("slide", "label"), [("a", "")], "line 2: the label is empty"),
        (("slide", "label", "patient"), [("a", "x", "1"), ("b", "y", "")], "line 3: the patient is empty"),
        (("slide", "label"), [("a", "x", "1")], "line 2: 3 fields, but the header has 2"),
        (("slide", "label"), [("a", "x"), ("a.svs", "y")], "names the slide 'a.svs' twice"),
        (("slide", "label"), [("a", "x"), ("b", "x")], "of class 'x'; two are needed"),
        (("slide", "label", "split"), [("a", "x", "dev")], "the split is 'dev', expected train, val or test"),
        (
            ("slide", "label", "patient", "split"),
            [("a", "x", "P", "train"), ("b", "y", "P", "test")],
            "patient 'P' is in two splits, 'train' and 'test'",
        ),
    ],
)
def test_a_table_that_cannot_be(folder, table, header, rows, words):
    with pytest.raises(ValueError, match=words):
        read_bags(folder, table(*rows, header=header))


def test_no_table(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels 'no\.csv' does not exist"):
        read_bags(folder, "no.csv")
    path = tmp_path / "latin.csv"
    path.write_bytes("slide,label\na,groß\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_bags(folder, path)


def test_a_slide_without_features(folder, table):
    labels = table(("a", "no", "1"), ("b", "yes", "2"), ("x", "yes", "3"), ("y", "no", "4"))
    with pytest.raises(FileNotFoundError, match=r"2 of the 4 slides .* no feature file .*'x', 'y'.*--skip-missing"):
        read_bags(folder, labels)
    bags = read_bags(folder, labels, skip_missing=True)
    assert ([bag.slide for bag in bags.bags], bags.missing) == (["a", "b"], ("x", "y"))
    with pytest.raises(FileNotFoundError, match="1 of the 1 slides"):
        read_bags(folder, table(("x", "yes", "3")), skip_missing=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attributes": {"model": "other"}}, "model is 'm' and 'other'"),
        ({"attributes": {"weights_sha256": "def"}}, "weights_sha256 is 'abc' and 'def'"),
        ({"attributes": {"mean": [0.4, 0.5, 0.5]}}, "mean is"),
        ({"attributes": {"dtype": "bfloat16"}}, "dtype is None and 'bfloat16'"),
        ({"target_mpp": 1.0}, "target_mpp is 0.5 and 1.0"),
        ({"patch_size": 256}, "patch_size is 224 and 256"),
        ({"overlap": 10}, "overlap is 0 and 10"),
        ({"dim": 5}, "feature_dim is 4 and 5"),
    ],
)
def test_features_of_different_provenance(folder, table, change, words):
    write_slide(folder, "e", **change)
    with pytest.raises(ValueError, match=f"the features of 'a' and 'e' do not belong together: {words}"):
        read_bags(folder, table(("a", "no", "1"), ("e", "yes", "2")))


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"level0_mpp": 0.5}, {"attributes": {"torch_version": "9"}}])
def test_what_may_differ(folder, table, change):
    write_slide(folder, "e", **change)
    assert len(read_bags(folder, table(("a", "no", "1"), ("e", "yes", "2")))) == 2


def test_the_wrong_folder(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*featurs' does not exist; give one of these: '.*features'"):
        feature_files(tmp_path / "featurs")
    with pytest.raises(FileNotFoundError, match=r"no feature file .* one of these: '.*features'"):
        feature_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="`ssmamba extract` makes one"):
        feature_files(tmp_path / "no" / "where")


def test_synthetic_slides(tmp_path):
    arguments = {"patients": 6, "tiles": 100, "feature_dim": 8, "shift": 9.0, "classes": ("n", "p", "q")}
    labels = write_synthetic_slides(tmp_path / "s", **arguments)
    bags = read_bags(tmp_path / "s", labels)
    assert bags.classes == ("n", "p", "q")
    assert len(set(bags.patients)) == 6
    assert len(bags) == 9
    for bag in bags.bags:
        features, coords = bag.read()
        assert 100 <= bag.tiles <= 150
        assert len(np.unique(coords, axis=0)) == bag.tiles
        share = (features.max(axis=1) > 5).mean()
        assert share == 0 if bag.label == "n" else 0.045 <= share <= 0.105
    again = write_synthetic_slides(tmp_path / "t", **arguments)
    name = f"{bags.bags[0].slide}.h5"
    assert (tmp_path / "s" / name).read_bytes() == (again.parent / name).read_bytes()


def test_a_model_that_states_less_of_its_features_takes_them():
    stated = {"model": "m", "target_mpp": 0.5}
    assert check_same_provenance({"the model's": stated, "a": {**stated, "dtype": "float32"}}) == stated


def test_a_slide_whose_name_is_not_utf8_is_refused_by_name(folder):
    path = os.path.join(os.fsencode(folder), b"case\xe9.h5")
    os.rename(folder / "a.h5", path)
    with pytest.raises(ValueError, match=r"case.*xe9\.h5' is not valid UTF-8; rename the file"):
        open_bag(os.fsdecode(path))
