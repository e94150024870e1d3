"""Finding tiles, naming their classes, and reading every kind of image that a tile may be."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ssmamba_models.data.tiles import TileDataset, collate_tiles, find_tiles, read_tile

PINK = (220, 120, 170)


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), PINK)).save(path)
    return path


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class TestFindTiles:
    def test_every_suffix_in_any_case_sorted_with_forward_slashes(self, tmp_path):
        names = ["b.png", "a.JPG", "c.jpeg", "sub/d.tif", "sub/deep/e.TIFF", "f.bmp", "g.webp"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "notes.txt").touch()
        assert find_tiles(tmp_path).paths == tuple(sorted(names))

    def test_hidden_files_and_folders_are_skipped(self, tmp_path):
        for name in (".a.png", ".cache/b.png", "c.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert find_tiles(tmp_path).paths == ("c.png",)

    @pytest.mark.parametrize(
        "written",
        [
            ("config.yaml", "log.jsonl"),
            ("report.md", "report.json"),
            ("config.yaml", "status.jsonl", "thumbnails/x.png"),
        ],
    )
    def test_what_this_package_wrote_there_is_skipped(self, tmp_path, written):
        for name in ("a/t.png", "b/t.png", *(f"deep/out/{name}" for name in (*written, "plots/x.png"))):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert find_tiles(tmp_path).paths == ("a/t.png", "b/t.png")
        # Unless it is asked for by its name.
        assert "plots/x.png" in find_tiles(tmp_path / "deep" / "out").paths

    def test_class_folders_are_labels_at_any_depth(self, tmp_path):
        for name in ("tumour/case1/a.png", "normal/b.png"):
            save(tmp_path / name)
        found = find_tiles(tmp_path)
        assert dict(zip(found.paths, found.labels)) == {
            "tumour/case1/a.png": "tumour",
            "normal/b.png": "normal",
        }

    def test_one_tile_beside_the_class_folders_means_no_labels(self, tmp_path):
        for name in ("tumour/a.png", "normal/b.png", "stray.png"):
            save(tmp_path / name)
        assert find_tiles(tmp_path).labels is None

    def test_unicode_names(self, tmp_path):
        save(tmp_path / "Größe" / "组织 β.png")
        found = find_tiles(tmp_path)
        assert found.paths == ("Größe/组织 β.png",)
        assert found.labels == ("Größe",)

    def test_links_to_folders_are_followed_but_not_in_circles(self, tmp_path):
        save(tmp_path / "elsewhere" / "a.png")
        root = tmp_path / "root"
        root.mkdir()
        (root / "class").symlink_to(tmp_path / "elsewhere")
        (root / "circle").symlink_to(root)
        assert find_tiles(root).paths == ("class/a.png",)

    def test_links_give_no_tile_twice(self, tmp_path):
        save(tmp_path / "elsewhere" / "a.png")
        root = tmp_path / "root"
        for name in ("tumour/case1/b.png", "normal/c.png"):
            save(root / name)
        (root / "again").symlink_to(root / "tumour")
        (root / "stroma").symlink_to(tmp_path / "elsewhere")
        (root / "stroma2").symlink_to(tmp_path / "elsewhere")
        found = find_tiles(root)
        assert found.paths == ("normal/c.png", "stroma/a.png", "tumour/case1/b.png")
        assert found.labels == ("normal", "stroma", "tumour")

    def test_a_folder_that_cannot_be_listed(self, tmp_path, make_unlistable):
        for name in ("mine/a.png", "theirs/b.png"):
            save(tmp_path / name)
        make_unlistable("theirs")
        with pytest.raises(OSError, match=r"theirs' cannot be searched \(Permission denied\); have it made readable"):
            find_tiles(tmp_path)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
            find_tiles(tmp_path / "nowhere")

    def test_a_file_is_not_a_folder(self, tmp_path):
        with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
            find_tiles(save(tmp_path / "a.png"))

    def test_empty_folder_says_what_was_looked_for(self, tmp_path):
        with pytest.raises(ValueError, match=r"no tile found.*\.png"):
            find_tiles(tmp_path)


class TestRgb:
    """Each mode is written to a file and read back through the public reader."""

    def pixel(self, path):
        image = read_tile(path)
        assert image.mode == "RGB"
        return image.getpixel((2, 2))

    def test_rgb_is_untouched(self, tmp_path):
        assert self.pixel(save(tmp_path / "a.png")) == PINK

    @pytest.mark.parametrize("grey", [0, 77, 255])
    def test_grey(self, tmp_path, grey):
        assert self.pixel(save(tmp_path / "a.png", Image.new("L", (8, 8), grey))) == (grey,) * 3

    def test_one_bit(self, tmp_path):
        assert self.pixel(save(tmp_path / "a.png", Image.new("1", (8, 8), 1))) == (255,) * 3

    def test_transparent_pixels_are_white_glass(self, tmp_path):
        assert self.pixel(save(tmp_path / "a.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)))) == (255,) * 3

    def test_half_transparent_pixels_are_mixed_with_white(self, tmp_path):
        red, green, blue = self.pixel(save(tmp_path / "a.png", Image.new("RGBA", (8, 8), (0, 100, 255, 128))))
        assert (red, green, blue) == (127, 177, 255)

    def test_grey_with_alpha(self, tmp_path):
        assert self.pixel(save(tmp_path / "a.png", Image.new("LA", (8, 8), (10, 0)))) == (255,) * 3

    def test_palette(self, tmp_path):
        image = Image.new("RGB", (8, 8), PINK).quantize(4)
        assert self.pixel(save(tmp_path / "a.png", image)) == PINK

    def test_palette_with_transparency(self, tmp_path):
        image = Image.new("RGB", (8, 8), PINK).quantize(4)
        path = tmp_path / "a.png"
        image.save(path, transparency=image.getpixel((0, 0)))
        assert self.pixel(path) == (255,) * 3

    def test_rgb_with_a_transparent_colour(self, tmp_path):
        path = tmp_path / "a.png"
        Image.new("RGB", (8, 8), PINK).save(path, transparency=PINK)
        assert self.pixel(path) == (255,) * 3

    @pytest.mark.parametrize("suffix", ["jpg", "tif"])
    def test_cmyk(self, tmp_path, suffix):
        image = Image.new("RGB", (8, 8), PINK).convert("CMYK")
        assert np.allclose(self.pixel(save(tmp_path / f"a.{suffix}", image)), PINK, atol=3)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    @pytest.mark.parametrize(("value", "grey"), [(0, 0), (257 * 100, 100), (65535, 255)])
    def test_16_bit_grey_is_scaled_by_its_full_range(self, tmp_path, suffix, value, grey):
        image = Image.fromarray(np.full((8, 8), value, np.uint16))
        assert self.pixel(save(tmp_path / f"a.{suffix}", image)) == (grey,) * 3

    def test_floats_have_no_white(self, tmp_path):
        path = save(tmp_path / "a.tif", Image.fromarray(np.full((8, 8), 0.5, np.float32)))
        with pytest.raises(ValueError, match="no defined white"):
            read_tile(path)

    def test_32_bit_grey_beyond_16_bits_has_no_white(self, tmp_path):
        path = save(tmp_path / "a.tif", Image.fromarray(np.full((8, 8), 70000, np.int32)))
        with pytest.raises(ValueError, match="no defined white"):
            read_tile(path)


class TestUnreadable:
    """A tile that cannot be read comes back with a reason of one line, and never raises."""

    def reason(self, path):
        tile = TileDataset(find_tiles(path.parent), to_tensor)[0]
        assert tile.image is None
        assert "\n" not in tile.reason
        return tile.reason

    @pytest.mark.parametrize("error", [ValueError("too\nlong"), OSError("no"), MemoryError(), OverflowError("big")])
    def test_a_transform_that_cannot_take_the_image(self, tmp_path, error):
        def refuse(image):
            raise error

        save(tmp_path / "a.png", Image.new("RGB", (3, 5)))
        tile = TileDataset(find_tiles(tmp_path), refuse)[0]
        said = " ".join(str(error).split()) or "MemoryError"
        assert (tile.image, tile.reason) == (None, f"an image of 3 x 5 px cannot be transformed ({said})")

    def test_a_transform_that_is_broken_is_no_fault_of_the_tile(self, tmp_path):
        save(tmp_path / "a.png")
        with pytest.raises(TypeError):
            TileDataset(find_tiles(tmp_path), lambda: None)[0]

    def noise(self):
        return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
    def test_truncated(self, tmp_path, suffix):
        path = save(tmp_path / f"a.{suffix}", self.noise())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert self.reason(path)

    def test_truncation_is_named(self, tmp_path):
        path = save(tmp_path / "a.jpg", self.noise())
        path.write_bytes(path.read_bytes()[:-500])
        assert "truncated" in self.reason(path)

    def test_corrupt_jpeg(self, tmp_path):
        path = save(tmp_path / "a.jpg", self.noise())
        path.write_bytes(b"\xff\xd8\xff\xe0" + os.urandom(200))
        assert self.reason(path)

    def test_broken_png_chunk(self, tmp_path):
        path = save(tmp_path / "a.png", self.noise())
        data = bytearray(path.read_bytes())
        data[data.index(b"IDAT") + 40] ^= 0xFF
        path.write_bytes(data)
        assert self.reason(path)

    def test_not_an_image(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_text("hello")
        assert "not an image" in self.reason(path)

    def test_empty_file(self, tmp_path):
        path = tmp_path / "a.png"
        path.touch()
        assert self.reason(path) == "the file is empty"

    def test_broken_link(self, tmp_path):
        path = tmp_path / "a.png"
        path.symlink_to(tmp_path / "gone.png")
        assert self.reason(path) == "No such file or directory"

    def test_name_that_is_not_utf8(self, tmp_path):
        try:
            with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
                pass
        except OSError:
            pytest.skip("this file system takes UTF-8 names alone")
        path = next(tmp_path.iterdir())
        assert "not valid UTF-8" in self.reason(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_order_and_set_unreadable_tiles_apart(tmp_path, workers):
    for index in range(5):
        save(tmp_path / f"{index}.png", Image.new("RGB", (8, 8), (index,) * 3))
    (tmp_path / "1.png").write_text("no image")
    dataset = TileDataset(find_tiles(tmp_path), to_tensor)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate_tiles, num_workers=workers))
    assert [batch.indices for batch in batches] == [[0], [2, 3], [4]]
    assert [batch.images[:, 0, 0, 0].tolist() for batch in batches] == [[0], [2, 3], [4]]
    assert [index for batch in batches for index, _ in batch.unreadable] == [1]


def test_a_batch_without_a_readable_tile(tmp_path):
    (tmp_path / "a.png").touch()
    batch = collate_tiles([TileDataset(find_tiles(tmp_path), to_tensor)[0]])
    assert batch.images is None
    assert batch.unreadable == [(0, "the file is empty")]


def test_real_tiles(data_root):
    found = find_tiles(data_root / "lc25000")
    assert len(found) == 11207
    assert sorted(set(found.labels)) == ["colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"]
    assert read_tile(found.root / found.paths[0]).size == (224, 224)
