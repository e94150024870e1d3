"""Files that are no whole slides: each is refused when it is opened, by name, with its cure."""

import numpy as np
import pytest
from PIL import Image
from slide_files import make_empty_file, make_not_a_slide, make_pyramid, tifffile, truncate, waves

from ssmamba_models.wsi.errors import (
    EmptySlideError,
    MissingMppError,
    NotASlideError,
    SlideError,
    TruncatedSlideError,
    UnsupportedSlideError,
)
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.truncation import check_not_truncated, is_tiff

ALL = pytest.mark.parametrize("backend", [None, "openslide", "tifffile", "pil"])


@ALL
def test_zero_bytes(tmp_path, backend):
    with pytest.raises(EmptySlideError, match=r"a\.svs' is empty \(0 bytes\); copy"):
        open_slide(make_empty_file(tmp_path / "a.svs"), backend=backend)


@ALL
def test_no_image(tmp_path, backend):
    with pytest.raises(NotASlideError, match=r"a\.svs"):
        open_slide(make_not_a_slide(tmp_path / "a.svs"), backend=backend)


@ALL
def test_noise(tmp_path, backend):
    path = tmp_path / "a.tif"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(NotASlideError, match=r"a\.tif"):
        open_slide(path, backend=backend)


def test_a_directory_full_of_nonsense(tmp_path):
    """A TIFF's head, then noise: refused, whatever the noise says."""
    rng = np.random.default_rng(1)
    for head in (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II+\0\x08\0\0\0\x10" + bytes(7)):
        for _ in range(30):
            path = tmp_path / "a.tif"
            path.write_bytes(head + bytes([12, 0]) + rng.bytes(3000))
            with pytest.raises(SlideError, match=r"a\.tif"):
                open_slide(path)


def test_missing_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_slide(tmp_path / "a.svs")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_slide(tmp_path)


def test_unknown_backend(tmp_path):
    with pytest.raises(ValueError, match="'cucim' is unknown; choose one of openslide, tifffile, pil"):
        open_slide(tmp_path / "a.svs", backend="cucim")


class TestTruncated:
    VARIANTS = (
        {},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"bigtiff": True, "byteorder": ">"},
        {"compression": None},
        {"compression": "jpeg"},
    )

    @pytest.mark.parametrize("options", VARIANTS, ids=str)
    def test_anywhere(self, tmp_path, options):
        path = make_pyramid(tmp_path / "a.tif", (900, 700), 0.5, content=waves, **options)
        whole = path.read_bytes()
        with open_slide(path):
            pass
        for share in (0.02, 0.2, 0.5, 0.8, 0.97, 0.9999):
            path.write_bytes(whole)
            with pytest.raises(TruncatedSlideError, match=r"a\.tif' is truncated: it has [\d,]+ bytes.*copy"):
                open_slide(truncate(path, share))

    def test_the_last_byte(self, tmp_path):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", metadata=None)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(TruncatedSlideError):
            open_slide(path, 0.5)

    @pytest.mark.parametrize("name", ["cmu-1-small-region.svs", "OS-1-detail.ome.tif"])
    def test_real(self, data_root, tmp_path, name):
        whole = (data_root / "slides" / name).read_bytes()
        for share in (0.001, 0.1, 0.5, 0.9, 0.999):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(TruncatedSlideError):
                open_slide(tmp_path / name)

    def test_sub_directories(self, tmp_path):
        path = tmp_path / "a.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as writer:
            writer.write(np.zeros((64, 64, 3), np.uint8), photometric="rgb", subifds=1)
            writer.write(np.zeros((32, 32, 3), np.uint8), photometric="rgb", subfiletype=1)
        check_not_truncated(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(TruncatedSlideError):
            check_not_truncated(path)

    def test_missing_tiles_are_not_missing_bytes(self, tmp_path):
        path = make_pyramid(tmp_path / "a.tif", (900, 700), 0.5, missing={(0, 1), (2, 3)})
        with tifffile.TiffFile(path) as file:
            assert file.pages[0].databytecounts.count(0) == 2
        check_not_truncated(path)
        with pytest.raises(TruncatedSlideError):
            check_not_truncated(truncate(path, 0.9))

    @pytest.mark.parametrize(("suffix", "save"), [(".png", {}), (".jpg", {}), (".bmp", {})])
    def test_pictures(self, tmp_path, suffix, save):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)).save(path, **save)
        with pytest.raises(TruncatedSlideError, match="cut short"):
            open_slide(truncate(path), 0.5)

    def test_a_circle_of_directories_ends(self, tmp_path):
        path = make_pyramid(tmp_path / "a.tif", (300, 300), 0.5, levels=(1,))
        with tifffile.TiffFile(path) as file:
            first = file.pages[0].offset
        data = bytearray(path.read_bytes())
        count = int.from_bytes(data[first : first + 2], "little")
        start = first + 2 + 12 * count
        data[start : start + 4] = first.to_bytes(4, "little")
        path.write_bytes(data)
        check_not_truncated(path)
        with pytest.raises(TruncatedSlideError):
            check_not_truncated(truncate(path, 0.9))


class TestOtherFormats:
    """The check speaks of TIFF files only; what else there is must pass it."""

    def test_mirax_and_its_folder(self, tmp_path):
        path = tmp_path / "a.mrxs"
        path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "Data0000.dat").write_bytes(bytes(100))
        check_not_truncated(path)
        assert not is_tiff(path)
        # No MIRAX slide, but not because of its length.
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert "is truncated" not in str(caught.value)

    def test_mirax_without_its_folder_is_not_its_preview(self, tmp_path):
        path = tmp_path / "a.mrxs"
        Image.new("RGB", (50, 50)).save(path, format="JPEG")
        with pytest.raises(NotASlideError, match=r"a\.mrxs' is not a slide.*data folder '.*a' is missing; copy that"):
            open_slide(path, 0.5)
        (tmp_path / "a").mkdir()
        with pytest.raises(NotASlideError, match=r"data folder '.*a' has no Slidedat\.ini; copy that folder again"):
            open_slide(path, 0.5)
        index = tmp_path / "a" / "Slidedat.ini"
        index.write_text("[HIERARCHICAL]\r\nINDEXFILE = Index.dat\r\n[DATAFILE]\r\nFILE_0 = Data0000.dat\r\n")
        (tmp_path / "a" / "Data0000.dat").write_bytes(bytes(100))
        with pytest.raises(NotASlideError, match=r"'Index\.dat', which '.*Slidedat\.ini' names, is missing; copy"):
            open_slide(path, 0.5)
        with open_slide(path, 0.5, backend="pil") as slide:
            assert slide.dimensions == (50, 50)

    @pytest.mark.parametrize("suffix", [".vms", ".vmu"])
    def test_hamamatsu_without_its_pictures(self, tmp_path, suffix):
        path = tmp_path / f"a{suffix}"
        path.write_text("[Virtual Microscope Specimen]\nImageFile=a.jpg\nImageFile(1,0)=a(1,0).jpg\nMapFile=map.jpg\n")
        Image.new("RGB", (50, 50)).save(tmp_path / "map.jpg")
        with pytest.raises(NotASlideError, match=r"'a\.jpg' and 1 more, which '.*a\.vm.' names, is missing; copy all"):
            open_slide(path, 0.5)

    def test_a_picture_called_dcm(self, tmp_path):
        path = tmp_path / "a.dcm"
        Image.new("RGB", (50, 50)).save(path, format="PNG")
        with pytest.raises(NotASlideError, match=r"a\.dcm' is not a slide.*all \.dcm files of its series"):
            open_slide(path, 0.5)

    def test_a_tiff_by_any_other_name(self, tmp_path):
        path = make_pyramid(tmp_path / "a.png", (300, 300), 0.5, content=waves)
        with open_slide(path) as slide:
            assert slide.backend == "openslide"

    def test_a_picture_called_svs(self, tmp_path):
        path = tmp_path / "a.svs"
        Image.new("RGB", (50, 50)).save(path, format="PNG")
        with pytest.raises(MissingMppError):
            open_slide(path)
        with open_slide(path, 0.5) as slide:
            assert slide.backend == "pil"


def test_a_picture_that_memory_does_not_hold_is_not_called_corrupt(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (50, 50)).save(path)

    def run_out(image):
        raise MemoryError

    monkeypatch.setattr("ssmamba_models.wsi.image_backend.to_rgb", run_out)
    with pytest.raises(UnsupportedSlideError, match=r"a\.png' is too large to be decoded whole \(MemoryError\)"):
        open_slide(path, 0.5)


def test_a_refused_slide_is_let_go(tmp_path, recwarn):
    """No file stays open, which would keep it from being deleted or exhaust a job of thousands."""
    import gc

    path = make_pyramid(tmp_path / "a.tif", (300, 300))
    for backend in ("openslide", "tifffile"):
        with pytest.raises(MissingMppError):
            open_slide(path, backend=backend)
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
