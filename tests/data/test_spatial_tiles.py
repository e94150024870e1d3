"""A manifest of tiles that know where they lay: what is read, and what is refused and named."""

import shutil

import numpy as np
import pytest

from ssmamba_models.data.spatial_tiles import read_spatial_tiles


@pytest.fixture
def write(labelled_tiles, tmp_path):
    """Write a manifest of as many of nine tiles as there are rows; returns the folder."""
    names = sorted(path.relative_to(labelled_tiles).as_posix() for path in labelled_tiles.rglob("*.png"))
    shutil.copytree(labelled_tiles, tmp_path / "tiles")

    def write(rows, header="path,slide,x,y", name="manifest.csv"):
        lines = [header, *(f"{path},{row}" for path, row in zip(names, rows))]
        (tmp_path / "tiles" / name).write_text("\n".join(lines))
        return tmp_path / "tiles"

    return write


def test_places_follow_their_tiles(write):
    tiles = read_spatial_tiles(write(["b,2,0", "a,0,1", "a,1,1.0", "b,-3,0"]))
    assert tiles.slides == ("b", "a", "a", "b")
    assert tiles.x.tolist() == [2, 0, 1, -3]
    assert tiles.y.tolist() == [0, 1, 1, 0]
    assert tiles.labels is tiles.splits is None


def test_rows_in_any_order_are_sorted_by_path(write, tmp_path):
    folder = write(["a,0,0", "a,1,0", "a,2,0"])
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    tiles = read_spatial_tiles(folder)
    assert list(tiles.paths) == sorted(tiles.paths)
    assert tiles.x.tolist() == [0, 1, 2]


def test_other_columns_and_a_csv_of_another_name(write):
    rows = ["a,0,0,t,p1,train", "a,1,0,n,p1,train", "b,0,0,t,p2,val"]
    tiles = read_spatial_tiles(write(rows, "path,slide,X,y,label,group,split", "t.csv") / "t.csv")
    assert (tiles.labels, tiles.groups) == (("t", "n", "t"), ("p1", "p1", "p2"))
    assert tiles.splits == ("train", "train", "val")
    kept = tiles.select("train", ["n"])
    assert (kept.slides, kept.x.tolist(), kept.y.tolist(), kept.labels) == (("a",), [1], [0], ("n",))


def test_the_digest_knows_places(write):
    digests = {read_spatial_tiles(write([f"{slide},0,0", f"a,{x},1"])).sha256() for slide in "ab" for x in (1, 2)}
    assert len(digests) == 4


def test_a_slide_with_one_tile_is_allowed_and_named(write):
    assert read_spatial_tiles(write(["a,0,0", "a,1,0", "lone,7,7"])).single_tile_slides() == ("lone",)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,slide,x", ["a,0"], r"no column 'y' .*path,slide,x,y"),
        ("path,label", ["a"], "no column 'slide' and none 'x' and none 'y'"),
        ("path,slide,x,y", ["a,0,0", "a,1,zero"], "line 3: y is 'zero', expected a whole number in grid units"),
        ("path,slide,x,y", ["a,0.5,0"], r"line 2: x is '0\.5'"),
        ("path,slide,x,y", ["a,nan,0"], "x is 'nan'"),
        ("path,slide,x,y", ["a,1e12,0"], "x is '1e12'"),
        ("path,slide,x,y", ["a,,0"], "the x is empty"),
        ("path,slide,x,y", [",1,0"], "the slide is empty"),
        ("path,slide,x,y", ["a,0,0", "b,0,0", "a,0,0"], "lines 2 and 4: two tiles lie at x 0, y 0 of slide 'a'"),
    ],
)
def test_bad_rows_are_named(write, header, rows, message):
    with pytest.raises(ValueError, match=message):
        read_spatial_tiles(write(rows, header))


def test_errors_name_the_csv_whatever_it_is_called(write):
    folder = write(["a,0,0,p1,train", "a,1,0,p1,val"], "path,slide,x,y,group,split", "t.csv")
    with pytest.raises(ValueError, match=r"group 'p1' is in two splits.*move all of it to one split in '.*t\.csv'"):
        read_spatial_tiles(folder / "t.csv")


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        (["a,0,0", "a,256,0", "a,512,256"], "multiples of 256;"),
        (["a,100,7", "a,324,231", "b,5,5", "b,229,453"], "multiples of 224;"),
        (["a,0,0", "a,256,0", "lone,3,4"], "multiples of 256;"),
        (["a,0,0", "a,224,256", "b,1,1", "b,449,513"], "multiples of 224 in x and 256 in y;"),
    ],
)
def test_pixels_are_recognised(write, rows, step):
    with pytest.raises(ValueError, match=f"look like pixels: .*{step} expected grid units.*divide x and y by the step"):
        read_spatial_tiles(write(rows))


def test_pixels_without_a_common_step_are_recognised(write):
    with pytest.raises(ValueError, match="look like pixels: in no slide do two tiles lie within 8 units of each other"):
        read_spatial_tiles(write(["a,0,0", "a,225,7", "a,451,3", "b,11,12", "b,11,240", "lone,12,12"]))


@pytest.mark.parametrize("offset", range(0, 16, 5))
def test_one_pair_of_near_tiles_is_enough(write, offset):
    rows = [f"a,{offset},{offset}", f"a,{offset + 7},{offset + 7}", "a,501,33", "b,11,12", "b,300,241"]
    assert len(read_spatial_tiles(write(rows))) == 5


@pytest.mark.parametrize(
    "rows",
    [
        ["a,0,0", "a,1,0", "b,0,0", "b,64,128"],  # one slide's tiles are far apart
        ["a,5,5", "b,300,300"],  # nothing to compare
        ["a,0,0", "a,2,4", "a,4,8"],  # a grid with holes
        ["a,1000,1000", "a,1001,1000"],  # far from the corner
    ],
)
def test_grids_are_no_pixels(write, rows):
    assert len(read_spatial_tiles(write(rows))) == len(rows)


def test_what_is_missing(write, tmp_path, labelled_tiles):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_spatial_tiles(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.csv.*path,slide,x,y"):
        read_spatial_tiles(labelled_tiles)
    folder = write(["a,0,0"])
    (folder / "manifest.csv").write_text("path,slide,x,y\ngone.png,a,0,0\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_spatial_tiles(folder)


def test_mosaics_can_be_read(data_root, tmp_path):
    from ssmamba_models.data.labelled import LabelledTiles
    from ssmamba_models.data.mosaic_files import write_mosaic_tiles
    from ssmamba_models.data.mosaics import Mosaic

    files = sorted((data_root / "lc25000" / "colon_n").glob("*.jpeg"))[:6]
    paths = tuple(path.relative_to(data_root).as_posix() for path in files)
    mosaic = Mosaic("s1", "p1", "n", np.arange(6).reshape(2, 3))
    write_mosaic_tiles([mosaic], LabelledTiles(data_root, paths, ("n",) * 6), tmp_path / "out")
    tiles = read_spatial_tiles(tmp_path / "out")
    assert sorted(zip(tiles.x.tolist(), tiles.y.tolist())) == [(x, y) for x in range(3) for y in range(2)]
    assert set(tiles.slides) == {"s1"}
