"""Mosaics: shares and arrangement are as asked, patients share no group, and files say what lies where."""

import csv
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssmamba_models.data.labelled import LabelledTiles, read_tiles
from ssmamba_models.data.mosaic_files import (
    draw_mosaic,
    remember_mosaics,
    write_mosaic_features,
    write_mosaic_tiles,
)
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics, draw_layout

KINDS = {
    "negative": MosaicKind({"a": None}),
    "positive": MosaicKind({"a": None, "b": (0.05, 0.1)}),
}


@pytest.fixture
def tiles(tmp_path):
    """12 groups of 3 tiles for each of the classes a and b; the colour tells the class, the shade the tile."""
    rows = []
    for label, channel in (("a", 0), ("b", 2)):
        for number in range(36):
            color = [0, 0, 0]
            color[channel] = 100 + number
            Image.new("RGB", (8, 8), tuple(color)).save(tmp_path / f"{label}{number}.png")
            rows.append((f"{label}{number}.png", label, f"{label}_{number // 3}"))
    with open(tmp_path / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "group"), *rows])
    return read_tiles(tmp_path)


def test_shares_patients_and_names(tiles):
    mosaics = assemble_mosaics(tiles, KINDS, patients=6, slides_per_patient=2, shape=(10, 12), seed=3)
    assert len(mosaics) == 12
    assert len({mosaic.name for mosaic in mosaics}) == 12
    groups = {}
    for mosaic in mosaics:
        labels = np.array(tiles.labels)[mosaic.tiles]
        share = (labels == "b").mean()
        assert share == 0 if mosaic.label == "negative" else 0.04 < share < 0.11
        groups.setdefault(mosaic.patient, set()).update(tiles.groups[index] for index in mosaic.tiles.flat)
    for patient, own in groups.items():
        assert not any(own & other for name, other in groups.items() if name != patient)
    assert {mosaic.label for mosaic in mosaics if mosaic.patient == "patient_001"} == {"positive"}


def test_seed_decides_all(tiles):
    first, again, other = (assemble_mosaics(tiles, KINDS, patients=4, seed=seed) for seed in (1, 1, 2))
    assert all((one.tiles == two.tiles).all() for one, two in zip(first, again))
    assert any((one.tiles != two.tiles).any() for one, two in zip(first, other))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(["scattered", "regions", "compact"]),
)
def test_counts_follow_the_shares_in_each_arrangement(height, width, first, second, arrangement):
    shares = {"x": first, "y": (1 - first) * second, "z": None}
    layout = draw_layout(MosaicKind(shares, arrangement), (height, width), np.random.default_rng(0))
    assert layout.shape == (height, width)
    for name in "xy":
        assert abs((layout == name).sum() - shares[name] * layout.size) <= 1


def test_regions_hang_together():
    shares = {"x": 0.5, "y": 0.5}

    def borders(arrangement):
        layout = draw_layout(MosaicKind(shares, arrangement), (20, 20), np.random.default_rng(0))
        return (layout[1:] != layout[:-1]).sum() + (layout[:, 1:] != layout[:, :-1]).sum()

    assert borders("regions") < borders("scattered") / 3


def test_a_compact_class_lies_around_a_point():
    kind = MosaicKind({"x": 0.2, "y": None}, "compact")
    for seed in range(10):
        layout = draw_layout(kind, (20, 20), np.random.default_rng(seed))
        inside, outside = np.argwhere(layout == "x"), np.argwhere(layout == "y")
        centre = inside.mean(0)
        assert np.abs(inside - centre).max() <= 16
        # About the mean of its cells there is nothing else.
        near = np.linalg.norm(outside - centre, axis=1).min()
        assert near > 3


def test_every_patient_has_every_label_of_few_tiles(tiles):
    mosaics = assemble_mosaics(
        tiles, KINDS, patients=4, slides_per_patient=4, shape=(10, 12), every_label=True, tiles_per_class=5
    )
    for patient in {mosaic.patient for mosaic in mosaics}:
        own = [mosaic for mosaic in mosaics if mosaic.patient == patient]
        assert sorted(mosaic.label for mosaic in own) == ["negative"] * 2 + ["positive"] * 2
        used = np.unique(np.concatenate([mosaic.tiles.reshape(-1) for mosaic in own]))
        assert sorted(tiles.labels[index] for index in used) == ["a"] * 5 + ["b"] * 5
    with pytest.raises(ValueError, match="tiles_per_class is 0"):
        assemble_mosaics(tiles, KINDS, patients=4, tiles_per_class=0)


@pytest.mark.parametrize(
    ("kinds", "patients", "message"),
    [
        ({"x": MosaicKind({"a": 0.5, "b": 0.6})}, 2, "add up to 1.1"),
        ({"x": MosaicKind({"a": 0.5})}, 2, "add up to 0.5"),
        ({"x": MosaicKind({"a": None, "b": None})}, 2, "only one class"),
        ({"x": MosaicKind({"c": None})}, 2, "no tile .* of class 'c'; there is: a, b"),
        ({"x": MosaicKind({"a": None})}, 13, "12 groups, fewer than the 13 patients"),
        ({"x": MosaicKind({"a": None}, "rings")}, 2, "'rings', expected 'scattered', 'regions' or 'compact'"),
    ],
)
def test_what_cannot_be(tiles, kinds, patients, message):
    with pytest.raises(ValueError, match=message):
        assemble_mosaics(tiles, kinds, patients=patients)


def test_without_groups_each_tile_is_its_own(tiles):
    bare = LabelledTiles(tiles.root, tiles.paths, tiles.labels)
    mosaics = assemble_mosaics(bare, {"x": MosaicKind({"a": None})}, patients=36, shape=(2, 2))
    assert all(len(np.unique(mosaic.tiles)) == 1 for mosaic in mosaics)


class TestGroupsOfSeveralClasses:
    def regrouped(self, tiles, groups):
        return dataclasses.replace(tiles, groups=tuple(groups))

    def owners(self, tiles, mosaics):
        """Group -> the patients whose mosaics show it."""
        owners = {}
        for mosaic in mosaics:
            for index in np.unique(mosaic.tiles):
                owners.setdefault(tiles.groups[index], set()).add(mosaic.patient)
        return owners

    def test_no_two_patients_share_one(self, tiles):
        mixed = self.regrouped(tiles, [group[2:] for group in tiles.groups])
        mosaics = assemble_mosaics(mixed, KINDS, patients=6, shape=(10, 12), every_label=True)
        owners = self.owners(mixed, mosaics)
        assert len(owners) == 12
        assert {len(patients) for patients in owners.values()} == {1}

    def test_groups_of_one_class_fill_up_what_they_leave(self, tiles):
        # Groups 0 to 5 have both classes, the others one.
        groups = [group[2:] if int(group[2:]) < 6 else group for group in tiles.groups]
        mixed = self.regrouped(tiles, groups)
        mosaics = assemble_mosaics(mixed, KINDS, patients=12, shape=(10, 12), every_label=True)
        assert {len(patients) for patients in self.owners(mixed, mosaics).values()} == {1}

    def test_a_patient_without_a_class_is_refused(self, tiles):
        labels, groups = zip(("a", "1"), ("b", "1"), ("a", "2"), ("c", "2"), ("b", "3"), ("c", "3"))
        mixed = LabelledTiles(tiles.root, tiles.paths[:6], labels, groups=groups)
        kinds = {"x": MosaicKind({"a": 0.3, "b": 0.3, "c": None})}
        with pytest.raises(ValueError, match=r"leave a patient without class 'b'.*2 patients.*; take fewer patients"):
            assemble_mosaics(mixed, kinds, patients=2)
        assert len(assemble_mosaics(mixed, kinds, patients=1)) == 2


def test_feature_files_and_labels(tiles, tmp_path):
    features = pytest.importorskip("ssmamba_models.data.features")
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    mosaics = assemble_mosaics(tiles, KINDS, patients=2, slides_per_patient=1, shape=(3, 5))
    values = np.arange(len(tiles) * 4, dtype=np.float32).reshape(-1, 4)
    labels = write_mosaic_features(mosaics, values, {"model": "m"}, tmp_path / "f", tile_size=100)
    with open(labels, newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["negative", "positive"]
    stored = features.read_slide_features(tmp_path / "f" / "mosaic_001_0.h5")
    assert stored.attributes["model"] == "m"
    for feature, (x, y) in zip(stored.features, stored.coords // 100):
        assert (feature == values[mosaics[1].tiles[y, x]]).all()


def test_tiles_and_picture(tiles, tmp_path):
    mosaics = assemble_mosaics(tiles, KINDS, patients=2, slides_per_patient=1, shape=(3, 5))
    splits = {"patient_000": "train", "patient_001": "val"}
    manifest = write_mosaic_tiles(mosaics, tiles, tmp_path / "t", splits)
    again = read_tiles(manifest.parent)
    assert len(again) == 30
    assert set(zip(again.groups, again.splits)) == set(splits.items())
    picture = np.asarray(draw_mosaic(mosaics[1], tiles, tile_size=4))
    with open(manifest, newline="") as file:
        for row in csv.DictReader(file):
            if row["slide"] == mosaics[1].name:
                tile = np.asarray(Image.open(manifest.parent / row["path"]))[0, 0]
                assert (picture[int(row["y"]) * 4, int(row["x"]) * 4] == tile).all()
                assert row["label"] == "ab"[int(tile[2] > 0)]


def test_a_folder_remembers_what_its_mosaics_are_made_of(tmp_path):
    for _ in range(2):
        remember_mosaics(tmp_path, {"tumour": "a", "cells": 12, "data": tmp_path})
    with pytest.raises(FileExistsError, match="made of something else; give another --out"):
        remember_mosaics(tmp_path, {"tumour": "b", "cells": 12, "data": tmp_path})
