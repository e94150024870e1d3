"""The size of a pixel is stated by someone, or the slide is refused; it is never guessed."""

import numpy as np
import pytest
from PIL import Image
from slide_files import blank, make_pyramid, tifffile

from ssmamba_models.wsi.errors import MissingMppError, UnsupportedSlideError
from ssmamba_models.wsi.mpp import find_mpp, read_mpp_csv
from ssmamba_models.wsi.reader import open_slide

BACKENDS = pytest.mark.parametrize("backend", ["openslide", "tifffile"])


def make(path, **options):
    return make_pyramid(path, (300, 300), levels=(1,), content=blank, **options)


class TestFromTheFile:
    @BACKENDS
    @pytest.mark.parametrize(
        ("unit", "per_unit", "mpp"), [("CENTIMETER", 40_000, 0.25), ("INCH", 50_800, 0.5), ("INCH", 101_600, 0.25)]
    )
    def test_resolution_tags(self, tmp_path, backend, unit, per_unit, mpp):
        path = make(tmp_path / "s.tif", resolution=(per_unit, per_unit), resolutionunit=unit)
        with open_slide(path, backend=backend) as slide:
            assert slide.mpp == pytest.approx(mpp, rel=1e-6)
            assert slide.mpp_source in ("openslide.mpp-x", "tiff.XResolution")

    @BACKENDS
    @pytest.mark.parametrize(
        ("unit", "per_unit"),
        [("INCH", 72), ("INCH", 300), ("CENTIMETER", 28), ("NONE", 40_000), ("NONE", 1), ("CENTIMETER", 1e-3)],
    )
    def test_what_a_screen_or_a_ratio_says_is_no_mpp(self, tmp_path, backend, unit, per_unit):
        path = make(tmp_path / "case7.tif", resolution=(per_unit, per_unit), resolutionunit=unit)
        with pytest.raises(MissingMppError, match=r"case7\.tif.*--mpp-override.*--mpp-csv"):
            open_slide(path, backend=backend)

    @BACKENDS
    def test_nothing(self, tmp_path, backend):
        with pytest.raises(MissingMppError, match=r"case7\.tif' does not say how large its pixels are; give it"):
            open_slide(make(tmp_path / "case7.tif"), backend=backend)

    @BACKENDS
    def test_x_and_y_that_differ_by_rounding_are_averaged(self, tmp_path, backend):
        with open_slide(make(tmp_path / "s.tif", mpp=(0.25, 0.251)), backend=backend) as slide:
            assert slide.mpp == pytest.approx(0.2505, rel=1e-6)

    @BACKENDS
    def test_pixels_that_are_not_square_are_refused(self, tmp_path, backend):
        path = make(tmp_path / "s.tif", mpp=(0.25, 0.5))
        with pytest.raises(UnsupportedSlideError, match=r"not square \(0.25 x 0.5 um"):
            open_slide(path, backend=backend)
        with open_slide(path, 0.3, backend) as slide:
            assert slide.mpp == 0.3

    def test_aperio_description_where_openslide_does_not_read_it(self, tmp_path):
        path = make(tmp_path / "s.tif", description="Aperio Image|AppMag = 20|MPP = 0.4990|Left = 25")
        with open_slide(path, backend="tifffile") as slide:
            assert (slide.mpp, slide.mpp_source) == (0.499, "aperio.MPP")

    def test_objective_power_is_no_mpp(self, tmp_path):
        with pytest.raises(MissingMppError):
            open_slide(make(tmp_path / "s.tif", description="Aperio Image|AppMag = 20"), backend="tifffile")

    @pytest.mark.parametrize(
        ("size", "unit", "mpp"), [(0.25, "µm", 0.25), (250, "nm", 0.25), (0.0005, "mm", 0.5), (2500, "Å", 0.25)]
    )
    def test_ome(self, tmp_path, size, unit, mpp):
        metadata = {"axes": "YXS"} | {f"PhysicalSize{axis}": size for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
        path = tmp_path / "case.ome.tif"
        tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", metadata=metadata, ome=True)
        with open_slide(path) as slide:
            assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp), "ome.PhysicalSizeX")
            assert (slide.name, slide.backend) == ("case", "tifffile")

    def test_ome_in_pixels_says_nothing(self, tmp_path):
        metadata = {"axes": "YXS"} | {f"PhysicalSize{axis}": 1.0 for axis in "XY"}
        metadata |= {f"PhysicalSize{axis}Unit": "pixel" for axis in "XY"}
        path = tmp_path / "case.ome.tif"
        tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", metadata=metadata, ome=True)
        with pytest.raises(MissingMppError):
            open_slide(path)

    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    def test_pictures(self, tmp_path, suffix):
        image = Image.new("RGB", (100, 80), "white")
        image.save(tmp_path / f"fine{suffix}", dpi=(50_800, 50_800))
        with open_slide(tmp_path / f"fine{suffix}") as slide:
            assert (slide.mpp, slide.backend) == (pytest.approx(0.5, rel=1e-4), "pil")
        image.save(tmp_path / f"screen{suffix}", dpi=(72, 72))
        image.save(tmp_path / f"none{suffix}")
        for name in ("screen", "none"):
            with pytest.raises(MissingMppError, match=f"{name}.*--mpp-override"):
                open_slide(tmp_path / f"{name}{suffix}")

    def test_real_ome_slide(self, data_root):
        with open_slide(data_root / "slides" / "OS-1-detail.ome.tif") as slide:
            assert slide.mpp == pytest.approx(0.2271, abs=1e-5)
            assert (slide.name, slide.backend, slide.dimensions) == ("OS-1-detail", "tifffile", (1101, 1101))
            tile = slide.read_region(100, 100, 224, 224, 0.5)
        assert 60 < tile.mean() < 240


class TestOverride:
    @BACKENDS
    def test_it_goes_before_the_file(self, tmp_path, backend):
        with open_slide(make(tmp_path / "s.tif", mpp=0.25), 0.31, backend) as slide:
            assert (slide.mpp, slide.mpp_source) == (0.31, "override")

    @pytest.mark.parametrize("mpp", [0, -1, float("nan"), float("inf"), 1e6])
    def test_impossible(self, tmp_path, mpp):
        with pytest.raises(ValueError, match=r"mpp_override is .*expected micrometres per pixel"):
            open_slide(make(tmp_path / "s.tif", mpp=0.25), mpp)


class TestCsv:
    def write(self, tmp_path, text):
        path = tmp_path / "mpp.csv"
        path.write_text(text, encoding="utf-8")
        return path

    def test_names_and_file_names(self, tmp_path):
        table = read_mpp_csv(self.write(tmp_path, "\ufeffslide, mpp ,note\na.svs,0.25,x\nb, 0.5,\nb,0.5,\n"))
        assert table == {"a.svs": 0.25, "b": 0.5}
        found = [find_mpp(table, name) for name in ("x/a.svs", "a.tif", "y/b.ome.tif", "c.svs")]
        assert found == [0.25, None, 0.5, None]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"mpp\.csv' has no rows"),
            ("a;b\nx;0.5\n", "no column mpp and no column slide"),
            ("slide,um\na,1\n", "no column mpp; expected a CSV whose first line is: slide,mpp"),
            ("slide,mpp\na,fine\n", "line 2: the mpp of 'a' is 'fine'"),
            ("slide,mpp\na,-1\n", "line 2: the mpp of 'a' is '-1'"),
            ("slide,mpp\na\n", "line 2: 1 fields, but the header has 2"),
            ("slide,mpp\na,\n", "line 2: the mpp of 'a' is ''"),
            ("slide,mpp\na,0,25\n", "line 2: 3 fields, but the header has 2"),
            ("slide,mpp\na,1,25\n", "line 2: 3 fields, but the header has 2"),
            ("slide,mpp\n,0.5\n", "line 2: no slide is named"),
            ("slide,mpp\na,0.5\na,0.25\n", "line 3: 'a' has two mpp, 0.5 and 0.25"),
        ],
    )
    def test_mistakes(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_mpp_csv(self.write(tmp_path, text))

    def test_no_table(self, tmp_path):
        path = tmp_path / "mpp.csv"
        path.write_bytes(b"slide,mpp\n\xe9,0.5\n")
        with pytest.raises(ValueError, match=r"mpp\.csv' is not UTF-8"):
            read_mpp_csv(path)
