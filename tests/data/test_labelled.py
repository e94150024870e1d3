"""Reading labelled tiles, and dividing them so that no group is on both sides."""

from collections import Counter
from itertools import pairwise

import pytest

from ssmamba_models.data.labelled import LabelledTiles, group_fraction, group_split, read_tiles


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def manifest(root, *lines, encoding="utf-8"):
    (root / "manifest.csv").write_bytes("\n".join([*lines, ""]).encode(encoding))


def grouped(counts, tiles_per_group=2, splits=None):
    """Tiles of {class: number of groups} in memory."""
    rows = [
        (f"{label}/{group}_{tile}.png", label, f"{label}{group}")
        for label, groups in counts.items()
        for group in range(groups)
        for tile in range(tiles_per_group)
    ]
    paths, labels, groups = zip(*rows)
    return LabelledTiles("root", paths, labels, groups, splits)


class TestFolders:
    def test_class_folders(self, tmp_path):
        touch(tmp_path, "tumour/case 1/a.PNG", "Größe 组织/b.Jpeg", "tumour/notes.txt")
        tiles = read_tiles(tmp_path)
        assert dict(zip(tiles.paths, tiles.labels)) == {
            "tumour/case 1/a.PNG": "tumour",
            "Größe 组织/b.Jpeg": "Größe 组织",
        }
        assert tiles.classes == ("Größe 组织", "tumour")
        assert tiles.groups is None
        assert tiles.splits is None

    def test_without_classes(self, tmp_path):
        touch(tmp_path, "a.png", "sub/b.png")
        tiles = read_tiles(tmp_path)
        assert (tiles.labels, tiles.classes, len(tiles)) == (None, (), 2)

    def test_split_folders(self, tmp_path):
        touch(tmp_path, "train/x/a.png", "train/y/b.png", "Valid/x/case/c.png", "test/y/d.png")
        tiles = read_tiles(tmp_path)
        assert tiles.paths == ("Valid/x/case/c.png", "test/y/d.png", "train/x/a.png", "train/y/b.png")
        assert tiles.splits == ("val", "test", "train", "train")
        assert tiles.labels == ("x", "y", "x", "y")

    def test_split_folders_without_classes(self, tmp_path):
        touch(tmp_path, "train/a.png", "val/b.png")
        tiles = read_tiles(tmp_path)
        assert (tiles.labels, tiles.splits) == (None, ("train", "val"))

    def test_a_class_that_is_called_train_among_others_is_a_class(self, tmp_path):
        touch(tmp_path, "train/a.png", "plane/b.png")
        assert read_tiles(tmp_path).classes == ("plane", "train")

    def test_two_splits_without_train_are_no_classes(self, tmp_path):
        touch(tmp_path, "val/x/a.png", "val/y/b.png", "test/x/c.png")
        tiles = read_tiles(tmp_path)
        assert (tiles.labels, tiles.splits) == (("x", "x", "y"), ("test", "val", "val"))
        with pytest.raises(ValueError, match="is of split 'train'; there is: test, val"):
            group_split(tiles)

    def test_classes_called_test_and_val(self, tmp_path):
        touch(tmp_path, "val/a.png", "test/c.png")
        assert read_tiles(tmp_path).classes == ("test", "val")

    @pytest.mark.parametrize("stray", ["thumbnails/a.png", "overview.png"])
    def test_tiles_beside_splits_do_not_turn_the_splits_into_classes(self, tmp_path, stray):
        touch(tmp_path, "train/x/a.png", "val/x/b.png", stray)
        with pytest.raises(ValueError, match=rf"folders of splits and, beside them, '{stray.split('/')[0]}'.*manifest"):
            read_tiles(tmp_path)
        (tmp_path / stray.split("/")[0]).rename(tmp_path / f".{stray.split('/')[0]}")
        assert read_tiles(tmp_path).splits == ("train", "val")

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_tiles(tmp_path / "nowhere")


class TestManifest:
    @pytest.fixture
    def root(self, tmp_path):
        touch(tmp_path, "a.png", "sub folder/b.JPG", "组织, β.png", "not_listed.png")
        return tmp_path

    def test_columns(self, root):
        manifest(root, "md5,path,Label,group,split", "0,sub folder/b.JPG,x,g1,train", '1,"组织, β.png",y,g2,validation')
        tiles = read_tiles(root)
        assert tiles == LabelledTiles(
            root, ("sub folder/b.JPG", "组织, β.png"), ("x", "y"), ("g1", "g2"), ("train", "val")
        )

    def test_class_is_a_name_for_label_and_rows_are_sorted(self, root):
        manifest(root, "path,class", "sub folder/b.JPG,x", "a.png,y")
        tiles = read_tiles(root)
        assert (tiles.paths, tiles.labels) == (("a.png", "sub folder/b.JPG"), ("y", "x"))
        assert tiles.groups is tiles.splits is None

    def test_label_goes_before_class(self, root):
        manifest(root, "path,class,label", "a.png,c,l")
        assert read_tiles(root).labels == ("l",)

    def test_without_labels(self, root):
        manifest(root, "path", "a.png")
        assert read_tiles(root).labels is None

    def test_as_excel_and_windows_write_it(self, root):
        manifest(root, "path,label\r", ".\\sub folder\\b.JPG,x\r", ",\r", encoding="utf-8-sig")
        assert read_tiles(root).paths == ("sub folder/b.JPG",)

    def test_absolute_paths_into_the_folder(self, root):
        manifest(root, "path,label", f"{root}/a.png,x", f"{root}/sub folder/../a.png/../sub folder/b.JPG,x")
        assert read_tiles(root).paths == ("a.png", "sub folder/b.JPG")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (("file,label", "a.png,x"), r"no column 'path' \(its columns: file, label\)"),
            (("path;label", "a.png;x"), r"no column 'path'.*separated by commas"),
            (("path,label", "a.png, "), r"line 2: the label is empty"),
            (("path,label,group", "a.png,x,"), r"line 2: the group is empty"),
            (("path,label", "a.png,x", "./a.png,x"), r"lists 'a.png' twice"),
            (("path,label", "../a.png,x"), r"line 2: '../a.png' leads out of the folder"),
            (("path,label", "/a.png,x"), r"line 2: '/a.png' leads out of the folder"),
            (("path,label", "sub folder/../../a.png,x"), r"leads out of the folder"),
            (("path,label", "a.png"), r"line 2: 1 fields, but the header has 2"),
            (("path,label", 'a.png,"x'), r"not CSV \(line"),
            (("path,label",), r"has no rows"),
            ((), r"has no rows"),
        ],
    )
    def test_bad_lines(self, root, lines, message):
        manifest(root, *lines)
        with pytest.raises(ValueError, match=message):
            read_tiles(root)

    def test_files_that_are_not_there(self, root):
        manifest(root, "path,label", "a.png,x", "gone.png,x")
        with pytest.raises(FileNotFoundError, match=r"1 of the 2 tiles.*first: 'gone.png'"):
            read_tiles(root)

    def test_not_utf8(self, root):
        manifest(root, "path,label", "Größe.png,x", encoding="latin-1")
        with pytest.raises(ValueError, match=r"not UTF-8.*save it as CSV UTF-8"):
            read_tiles(root)

    def test_a_group_in_two_splits_is_named(self, root):
        manifest(root, "path,label,group,split", "a.png,x,case7,train", "sub folder/b.JPG,x,case7,val")
        with pytest.raises(ValueError, match=r"group 'case7' is in two splits, 'train' and 'val'"):
            read_tiles(root)


class TestSelect:
    def test_split_and_classes(self):
        tiles = grouped({"a": 2, "b": 1, "c": 1}, splits=("train",) * 5 + ("val",) * 3)
        chosen = tiles.select("train", ["a", "b"])
        assert chosen.labels == ("a",) * 4 + ("b",)
        assert set(chosen.splits) == {"train"}
        assert tiles.select().paths == tiles.paths

    def test_what_is_not_there_is_answered_by_what_is(self):
        tiles = grouped({"a": 1, "b": 1})
        with pytest.raises(ValueError, match=r"class 'z'; there is: a, b"):
            tiles.select(classes=["a", "z"])
        with pytest.raises(ValueError, match=r"split 'val'; there is: none"):
            tiles.select("val")

    def test_nothing_left(self):
        with pytest.raises(ValueError, match=r"no tile is left of the 4"):
            grouped({"a": 1, "b": 1}).select(classes=[])

    def test_subset_keeps_the_order_given(self):
        tiles = grouped({"a": 2}).subset([3, 0])
        assert (tiles.paths, tiles.groups) == (("a/1_1.png", "a/0_0.png"), ("a1", "a0"))

    def test_sha256_follows_the_list(self):
        tiles = grouped({"a": 2})
        assert tiles.sha256() == grouped({"a": 2}).sha256()
        assert tiles.sha256() != tiles.subset([0, 1, 2]).sha256()


class TestGroupSplit:
    def test_no_group_is_on_both_sides_and_every_class_is_on_each(self):
        tiles = grouped({"a": 20, "b": 5})
        train, val = group_split(tiles, 0.2, seed=3)
        assert sorted(train + val) == list(range(len(tiles)))
        assert not {tiles.groups[i] for i in train} & {tiles.groups[i] for i in val}
        assert Counter(tiles.labels[i] for i in val) == {"a": 8, "b": 2}

    def test_the_seed_decides_and_nothing_else(self):
        tiles = grouped({"a": 20, "b": 20})
        assert group_split(tiles, seed=1) == group_split(tiles, seed=1) != group_split(tiles, seed=2)
        alone = tiles.select(classes=["a"])
        held_out = {tiles.paths[i] for i in group_split(tiles, seed=1)[1] if tiles.labels[i] == "a"}
        assert {alone.paths[i] for i in group_split(alone, seed=1)[1]} == held_out

    def test_own_splits_are_used(self):
        tiles = grouped({"a": 1, "b": 2}, splits=("train", "val", "test", "train", "train", "val"))
        assert group_split(tiles) == ([0, 3, 4], [1, 5])

    def test_without_val_train_is_divided_and_test_left_alone(self):
        tiles = grouped({"a": 10}, splits=("train",) * 16 + ("test",) * 4)
        train, val = group_split(tiles, 0.25)
        assert sorted(train + val) == list(range(16))
        assert len(val) == 4

    def test_splits_of_other_names(self):
        tiles = grouped({"a": 2, "b": 1}, splits=("fold0", "fold0", "fold1", "fold1", "fold2", "fold2"))
        assert group_split(tiles, train_split="fold1", val_split="fold2") == ([2, 3], [4, 5])
        with pytest.raises(ValueError, match="split 'fold3'; there is: fold0, fold1, fold2"):
            group_split(tiles, train_split="fold0", val_split="fold3")
        with pytest.raises(ValueError, match="both 'fold0'"):
            group_split(tiles, train_split="fold0", val_split="fold0")
        with pytest.raises(ValueError, match="split 'fold0'; there is: none"):
            group_split(grouped({"a": 2}), train_split="fold0")

    def test_without_groups_each_tile_is_one(self):
        tiles = LabelledTiles("root", tuple("abcdefghij"), tuple("xxxxxyyyyy"))
        train, val = group_split(tiles, 0.4)
        assert sorted(tiles.labels[i] for i in val) == ["x", "x", "y", "y"]
        assert len(train) == 6

    def test_a_group_of_two_classes_stays_whole(self):
        tiles = LabelledTiles("root", tuple("abcdefgh"), tuple("xyxyxyxy"), tuple("11223344"))
        train, val = group_split(tiles, 0.25)
        assert len(val) == 2
        assert {tiles.groups[i] for i in val}.isdisjoint(tiles.groups[i] for i in train)

    def test_a_class_of_one_group_stays_in_train(self):
        tiles = grouped({"a": 4, "b": 1})
        train, val = group_split(tiles)
        assert "b" in {tiles.labels[i] for i in train}
        assert {tiles.labels[i] for i in val} == {"a"}

    @pytest.mark.parametrize(
        ("tiles", "fraction", "message"),
        [
            (grouped({"a": 2}), 1.0, "val_fraction is 1.0"),
            (grouped({"a": 1, "b": 1}), 0.2, "no class .* has two groups"),
            (grouped({"a": 1}, splits=("fold0", "fold1")), 0.2, "split 'train'; there is: fold0, fold1"),
        ],
    )
    def test_bad_input(self, tiles, fraction, message):
        with pytest.raises(ValueError, match=message):
            group_split(tiles, fraction)


class TestGroupFraction:
    def test_whole_groups_of_each_class(self):
        tiles = grouped({"a": 100, "b": 30, "c": 3}, tiles_per_group=3)
        chosen = tiles.subset(group_fraction(tiles, 0.1, seed=0))
        assert Counter(chosen.labels) == {"a": 30, "b": 9, "c": 3}
        assert set(Counter(chosen.groups).values()) == {3}

    def test_smaller_shares_are_parts_of_larger_ones(self):
        tiles = grouped({"a": 100, "b": 100})
        one, ten = (set(group_fraction(tiles, fraction, seed=5)) for fraction in (0.01, 0.1))
        assert one < ten
        assert set(group_fraction(tiles, 0.1, seed=6)) != ten

    def test_no_class_is_lost_among_groups_of_several(self):
        """Each group with tiles of "a" counts for a rarer class, whose drawn group may have none of "a"."""
        classes_of = ["ab"] * 4 + ["b"] * 2 + ["ac"] * 3 + ["c"] * 3
        rows = [(f"{group}{label}", label, str(group)) for group, held in enumerate(classes_of) for label in held]
        tiles = LabelledTiles("root", *zip(*rows))
        counts = Counter()
        for seed in range(30):
            shares = [group_fraction(tiles, fraction, seed) for fraction in (0.05, 0.25, 0.3, 0.42, 0.6, 1.0)]
            assert all(tiles.subset(share).classes == ("a", "b", "c") for share in shares)
            assert all(set(small) <= set(large) for small, large in pairwise(shares))
            counts[len(set(tiles.subset(shares[0]).groups))] += 1
        # One group of "b" and one of "c"; a third only where these have none of "a".
        assert counts.keys() == {2, 3}
        assert counts[2] > counts[3]

    def test_all(self):
        tiles = grouped({"a": 3, "b": 2})
        assert group_fraction(tiles, 1.0) == list(range(len(tiles)))

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
    def test_out_of_range(self, fraction):
        with pytest.raises(ValueError, match="expected above 0 and at most 1"):
            group_fraction(grouped({"a": 1}), fraction)


def test_real_manifest(data_root):
    tiles = read_tiles(data_root / "lc25000")
    assert len(tiles) == 11_207
    assert tiles.classes == ("colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc")
    train, val = group_split(tiles)
    assert (len(train), len(val)) == (9_511, 1_696)
    lung = tiles.subset(train).select(classes=["lung_aca", "lung_n", "lung_scc"])
    few = lung.subset(group_fraction(lung, 0.01))
    assert few.classes == lung.classes
    assert len(set(few.groups)) < 0.05 * len(set(lung.groups))
