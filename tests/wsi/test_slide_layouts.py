"""The layouts in which TIFF files and pictures store colours: read as the colours they are, or refused."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from slide_files import make_pyramid, pixels, tifffile, waves

from ssmamba_models.wsi.errors import UnsupportedSlideError
from ssmamba_models.wsi.reader import open_slide

SIZE, MPP = (700, 500), 0.5
RGB = pixels(waves, SIZE)


def write(path, data, **options):
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "metadata": None} | options
    tifffile.imwrite(path, data, **options)
    return path


def write_ome(path, data, axes, **options):
    metadata = {"axes": axes, "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
    tifffile.imwrite(path, data, metadata=metadata, ome=True, **options)
    return path


def check(path, expected, backend, x=301, y=203):
    with open_slide(path) as slide:
        assert (slide.backend, slide.dimensions, slide.mpp) == (backend, SIZE, pytest.approx(MPP))
        assert np.array_equal(slide.read_region(x, y, 150, 120, MPP), expected[y : y + 120, x : x + 150])


STORED = pytest.mark.parametrize(
    "stored",
    [{"tile": (128, 144)}, {"rowsperstrip": 32}, {}, {"tile": (256, 256), "compression": "lzw", "predictor": True}],
    ids=["tiles", "strips", "one strip", "lzw"],
)


class TestTiff:
    @STORED
    def test_rgb(self, tmp_path, stored):
        tiled = "tile" in stored
        path = write(tmp_path / "s.tif", RGB, photometric="rgb", **stored)
        check(path, RGB, "openslide" if tiled else "tifffile")

    @STORED
    @pytest.mark.parametrize("axes", ["YXS", "CYX"])
    def test_ome(self, tmp_path, stored, axes):
        data = RGB if axes == "YXS" else np.ascontiguousarray(RGB.transpose(2, 0, 1))
        path = write_ome(tmp_path / "s.ome.tif", data, axes, photometric="rgb" if axes == "YXS" else None, **stored)
        check(path, RGB, "tifffile")

    @STORED
    def test_planes_apart(self, tmp_path, stored):
        planes = np.ascontiguousarray(RGB.transpose(2, 0, 1))
        path = write(tmp_path / "s.tif", planes, photometric="rgb", planarconfig="separate", **stored)
        with open_slide(path, backend="tifffile") as slide:
            assert np.array_equal(slide.read_region(0, 0, *SIZE, MPP), RGB)

    @STORED
    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    def test_grey(self, tmp_path, stored, photometric):
        grey = RGB[:, :, 0]
        shown = grey if photometric == "minisblack" else 255 - grey
        path = write(tmp_path / "s.tif", grey, photometric=photometric, **stored)
        check(path, shown[:, :, None].repeat(3, axis=2), "openslide" if "tile" in stored else "tifffile")

    @pytest.mark.parametrize("backend", ["openslide", "tifffile"])
    def test_transparent_is_white(self, tmp_path, backend):
        rgba = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
        rgba[:100, :100, 3] = 0
        path = write(tmp_path / "s.tif", rgba, photometric="rgb", extrasamples=["unassalpha"], tile=(256, 256))
        with open_slide(path, backend=backend) as slide:
            assert np.array_equal(slide.read_region(300, 200, 100, 100, MPP), RGB[200:300, 300:400])
            assert (slide.read_region(0, 0, 100, 100, MPP) == 255).all()

    @pytest.mark.parametrize("stored", [{"tile": (256, 256)}, {}], ids=["openslide", "tifffile"])
    def test_half_transparent(self, tmp_path, stored):
        alpha = np.full((*RGB.shape[:2], 1), 128)
        expected = (RGB * 128.0 + 255 * 127) / 255
        for kind, share in (("unassalpha", 1), ("assocalpha", 128 / 255), ("unspecified", 128 / 255)):
            rgba = np.rint(np.dstack([RGB * share, alpha])).astype(np.uint8)
            path = write(tmp_path / f"{kind}.tif", rgba, photometric="rgb", extrasamples=[kind], **stored)
            with open_slide(path) as slide:
                assert slide.backend == ("openslide" if stored else "tifffile")
                np.testing.assert_allclose(slide.read_region(0, 0, *SIZE, MPP), expected, atol=2, err_msg=kind)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_are_scaled_by_their_full_range(self, tmp_path, channels):
        eight = RGB if channels == 3 else RGB[:, :, :1]
        path = write_ome(
            tmp_path / "s.ome.tif",
            np.squeeze(eight.astype(np.uint16) * 257),
            "YXS" if channels == 3 else "YX",
            photometric="rgb" if channels == 3 else "minisblack",
            tile=(128, 128),
        )
        check(path, np.broadcast_to(eight, RGB.shape), "tifffile")

    def test_jpeg(self, tmp_path):
        path = make_pyramid(tmp_path / "s.tif", SIZE, MPP, content=waves, compression="jpeg")
        with open_slide(path) as first, open_slide(path, backend="tifffile") as second:
            one, two = (slide.read_region(10, 20, 200, 200, MPP).astype(int) for slide in (first, second))
        assert np.abs(one - RGB[20:220, 10:210]).mean() < 8
        # Two decoders of one JPEG file differ by rounding, and by how they widen halved colours.
        assert np.abs(one - two).mean() < 2

    def test_ome_pyramid_in_sub_directories(self, tmp_path):
        path = tmp_path / "s.ome.tif"
        half = pixels(waves, SIZE, 2)
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "deflate"}
        with tifffile.TiffWriter(path, ome=True) as writer:
            metadata = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
            writer.write(RGB, subifds=1, metadata=metadata, **options)
            writer.write(half, subfiletype=1, **options)
        with open_slide(path) as slide:
            assert (slide.backend, slide.level_downsamples) == ("tifffile", (1.0, 2.0))
            assert np.array_equal(slide.read_region(200, 100, 128, 100, 2 * MPP), half[50:150, 100:228])

    def test_the_image_is_chosen_not_the_label(self, tmp_path):
        path = tmp_path / "s.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as writer:
            for data, mpp in ((RGB[:60, :50], 20.0), (RGB, MPP)):
                metadata = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                writer.write(data, photometric="rgb", metadata=metadata)
        check(path, RGB, "tifffile")

    @pytest.mark.parametrize(
        ("data", "axes", "message"),
        [
            (np.zeros((5, 64, 64), np.uint8), "CYX", "5 channels, expected RGB"),
            (np.zeros((3, 64, 64), np.uint16), "CYX", "16-bit channels are no RGB"),
            (np.zeros((4, 64, 64), np.uint8), "CYX", "four channels are no RGB"),
            (np.zeros((4, 64, 64), np.uint8), "ZYX", r"stacked \(axes ZYX"),
            (np.zeros((64, 64), np.float32), "YX", "float32, which has no defined white"),
        ],
    )
    def test_no_rgb_picture(self, tmp_path, data, axes, message):
        path = write_ome(tmp_path / "s.ome.tif", data, axes, photometric="minisblack")
        with pytest.raises(UnsupportedSlideError, match=rf"s\.ome\.tif' cannot be read as a slide.*{message}"):
            open_slide(path)


    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            (np.zeros((64, 64, 3), np.float32), {"photometric": "rgb"}, "float32, which has no defined white"),
            (np.zeros((3, 64, 64), np.uint8), {"photometric": "minisblack"}, "stacked"),
            (np.zeros((64, 64, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "5 channels"),
            (np.zeros((64, 64, 4), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "four channels"),
        ],
    )
    def test_no_rgb_picture_though_openslide_opens_it(self, tmp_path, data, options, message):
        path = write(tmp_path / "s.tif", data, tile=(16, 16), **options)
        with pytest.raises(UnsupportedSlideError, match=rf"s\.tif' cannot be read as a slide.*{message}"):
            open_slide(path)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_through_openslide(self, tmp_path, channels):
        eight = RGB if channels == 3 else RGB[:, :, :1]
        options = {"photometric": "rgb" if channels == 3 else "minisblack", "tile": (128, 128)}
        path = write(tmp_path / "s.tif", np.squeeze(eight.astype(np.uint16) * 257), **options)
        check(path, np.broadcast_to(eight, RGB.shape), "openslide")


class TestPictures:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
    def test_pixels(self, tmp_path, suffix):
        path = tmp_path / f"s{suffix}"
        Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == ".webp" else {}))
        with open_slide(path, mpp_override=MPP) as slide:
            assert (slide.backend, slide.dimensions, slide.level_downsamples) == ("pil", SIZE, (1.0,))
            assert np.array_equal(slide.read_region(30, 20, 224, 224, MPP), RGB[20:244, 30:254])
            beyond = slide.read_region(-20, 450, 100, 100, MPP)
        assert np.array_equal(beyond[:50, 20:], RGB[450:, :80])
        assert (beyond[50:] == 255).all()
        assert (beyond[:, :20] == 255).all()

    def test_transparent_and_grey(self, tmp_path):
        rgba = Image.fromarray(RGB).convert("RGBA")
        rgba.putalpha(0)
        rgba.save(tmp_path / "clear.png")
        with open_slide(tmp_path / "clear.png", MPP) as slide:
            assert (slide.read_region(0, 0, 50, 50, MPP) == 255).all()
        Image.fromarray(RGB[:, :, 0]).save(tmp_path / "grey.png")
        with open_slide(tmp_path / "grey.png", MPP) as slide:
            tile = slide.read_region(0, 0, 50, 50, MPP)
        assert np.array_equal(tile, RGB[:50, :50, :1].repeat(3, axis=2))

    def test_too_large_for_memory(self, tmp_path, monkeypatch):
        Image.fromarray(RGB).save(tmp_path / "s.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(UnsupportedSlideError, match=r"too large to be decoded whole.*tiled, pyramidal TIFF"):
            open_slide(tmp_path / "s.png", MPP)


MEMORY = """
import sys
from ssmamba_models.wsi.reader import open_slide

def peak():
    # Not getrusage: there a child starts with its parent's peak, and a whole test suite's is high.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) / 1024

slides = [open_slide(sys.argv[1], backend=name, cache_bytes=2**22) for name in ("tifffile", "openslide")]
for slide in slides:
    slide.read_region(0, 0, 224, 224, 0.5)
before = peak()
for slide in slides:
    slide.overview()
    for y in range(0, 6000, 1000):
        for x in range(0, 6000, 500):
            slide.read_region(x, y, 224, 224, 0.5)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_tiled_slide_is_never_held_whole(tmp_path):
    # 108 MB of pixels.
    path = make_pyramid(tmp_path / "s.tif", (6000, 6000), 0.5, levels=(1,), content=_flat)
    run = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    # Of an overview's piece (2048 px square) there are a few copies: RGBA, RGB, and what resizing needs.
    assert 4 < float(run.stdout) < 80


def _flat(xs, ys):
    return np.full((len(ys), len(xs), 3), 180, np.uint8)
