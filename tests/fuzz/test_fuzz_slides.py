"""Slides and tiles that are broken: pixels, or an error that names the file; never the end of the process."""

import numpy as np
import pytest
from hypothesis import given
from mutations import broken_bytes
from PIL import Image
from reading import budget

tifffile = pytest.importorskip("tifffile", reason="slides need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")
pytest.importorskip("h5py", reason="the process that reads needs the [wsi] extra")

SIZE = (150, 130)
RESOLUTION = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}


def picture():
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    return np.stack([x % 256, y % 256, (x + y) % 256], axis=2).astype(np.uint8)


def write_tiff(path, compression, tile=(64, 64), bigtiff=False, byteorder="<", **options):
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as writer:
        for step in (1, 4):
            level = np.ascontiguousarray(picture()[::step, ::step])
            kind = {"tile": tile} if tile else {"rowsperstrip": 16}
            more = {"subfiletype": int(step > 1), "metadata": None, "photometric": "rgb", **RESOLUTION, **options}
            writer.write(level, compression=compression, **kind, **more)


def make_sound(folder):
    """Name -> content of a sound slide of each kind."""
    write_tiff(folder / "deflate.tif", "deflate")
    write_tiff(folder / "jpeg.tif", "jpeg")
    write_tiff(folder / "lzw_big.tif", "lzw", bigtiff=True, byteorder=">")
    write_tiff(folder / "strips.tif", None, tile=None)
    write_tiff(folder / "aperio.svs", "jpeg", description="Aperio Image Library v1\n150x130 |AppMag = 20|MPP = 0.5")
    tifffile.imwrite(
        folder / "a.ome.tif",
        picture(),
        ome=True,
        tile=(64, 64),
        photometric="rgb",
        compression="deflate",
        metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "axes": "YXS"},
    )
    for suffix in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(picture()).save(folder / f"a.{suffix}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NAMES = ["deflate.tif", "jpeg.tif", "lzw_big.tif", "strips.tif", "aperio.svs", "a.ome.tif"]
NAMES += ["a.png", "a.jpg", "a.webp", "a.bmp"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_sound(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reader", ["read_slide", "read_slide_mpp", "read_image"])
def test_broken_bytes(readers, place, sound, name, reader):
    path = place / name
    path.write_bytes(sound[name])
    if reader == "read_slide":
        assert readers.check(reader, path)["how"] == "result"

    @budget(6)
    @given(broken_bytes(sound[name]))
    def check(content):
        path.write_bytes(content)
        readers.check(reader, path)

    check()
