"""Which files of a folder are slides: not a job's pictures, not the parts of a slide, and none that cannot be seen."""

import os
import struct

import pytest

pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import cut, extract, make_slides

from ssmamba_models.wsi.slide_list import find_slides

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


def found(*places):
    return [os.path.basename(slide.path) for slide in find_slides(places)]


class TestJobsAmongTheSlides:
    def test_extraction_goes_on(self, tmp_path):
        pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
        slides = make_slides(tmp_path / "slides", "a")
        assert extract(slides, slides / "job").new == 1
        again = extract(slides, slides / "job")
        assert (again.done, again.new) == (["a"], 0)
        # As a shell gives SLIDES/*.
        assert extract(sorted(slides.iterdir()), slides / "job").new == 0

    def test_cutting_goes_on(self, tmp_path):
        slides = make_slides(tmp_path / "slides", "a")
        assert cut(slides, slides / "tiles").new == 1
        again = cut(slides, slides / "tiles")
        assert (again.done, again.new) == (["a"], 0)
        with pytest.raises(ValueError, match=r"no slide found in .*but not in job folders"):
            find_slides(slides / "tiles")

    def test_slides_beside_another_config(self, tmp_path):
        touch(tmp_path, "batch/a.svs", "batch/status.jsonl", "batch/summary.csv", "batch/thumbnails/b.png")
        (tmp_path / "batch" / "config.yaml").write_text("scanner: 3\n")
        assert found(tmp_path) == ["a.svs", "b.png"]


def element(tag, representation, value):
    value += b"\0" * (len(value) % 2)
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, representation)
    long = representation in (b"OB", b"SQ", b"UN")
    return head + struct.pack("<HL" if long else "<H", *([0] if long else []), len(value)) + value


def implicit(tag, value):
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value


def opened(tag, representation, content):
    """A sequence of one item, both of undefined length; that of a UN is stored without representations."""
    head = struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, representation, 0, 0xFFFFFFFF)
    item = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return head + item + content + ends


def dicom(path, series, syntax=b"1.2.840.10008.1.2.4.50"):
    """The head of a DICOM file, with sequences that name other series before its own."""
    other = b"9.9.9"
    meta = element(0x0002_0001, b"OB", b"\0\1") + element(0x0002_0010, b"UI", syntax)
    if syntax == b"1.2.840.10008.1.2":
        body = implicit(0x0008_0016, b"1.2.840.10008.5.1.4.1.1.77.1.6") + implicit(0x0020_000D, b"1.2.3")
        body += implicit(0x0020_000E, series)
    else:
        body = element(0x0008_0016, b"UI", b"1.2.840.10008.5.1.4.1.1.77.1.6")
        body += opened(0x0008_1115, b"SQ", element(0x0020_000E, b"UI", other))
        body += opened(0x0009_1001, b"UN", implicit(0x0020_000E, other))
        body += element(0x0010_0010, b"PN", b"A^B") + element(0x0020_000D, b"UI", b"1.2.3")
        body += element(0x0020_000E, b"UI", series)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + meta + body + element(0x0020_0011, b"IS", b"1"))


class TestSlidesOfSeveralFiles:
    def test_dicom_series(self, tmp_path):
        for name in ("DCM_0.dcm", "DCM_1.dcm", "DCM_2.DCM"):
            dicom(tmp_path / name, b"1.2.3.4")
        dicom(tmp_path / "E_0.dcm", b"1.2.3.5", b"1.2.840.10008.1.2")
        dicom(tmp_path / "E_1.dcm", b"1.2.3.5", b"1.2.840.10008.1.2")
        assert found(tmp_path) == ["DCM_0.dcm", "E_0.dcm"]
        # As a shell gives SLIDES/*.dcm.
        assert found(*sorted(tmp_path.iterdir(), reverse=True)) == ["DCM_0.dcm", "E_0.dcm"]

    def test_a_series_in_another_folder_is_another_slide(self, tmp_path):
        dicom(tmp_path / "one" / "a.dcm", b"1.2.3.4")
        dicom(tmp_path / "two" / "b.dcm", b"1.2.3.4")
        assert found(tmp_path) == ["a.dcm", "b.dcm"]

    def test_what_has_no_series_is_left_to_the_reader(self, tmp_path):
        dicom(tmp_path / "a.dcm", b"1.2.3.4")
        whole = (tmp_path / "a.dcm").read_bytes()
        for size in (0, 100, 140, 200, len(whole) - 30):
            (tmp_path / f"cut_{size}.dcm").write_bytes(whole[:size])
        (tmp_path / "none.dcm").write_text("this is no slide, " * 100)
        assert len(found(tmp_path)) == 7

    @pytest.mark.parametrize("suffix", [".vms", ".vmu"])
    def test_hamamatsu(self, tmp_path, suffix):
        touch(tmp_path, "a.jpg", "a(1,0).jpg", "a_map.jpg", "a_macro.jpg", "b.jpg", "deep/a.jpg")
        lines = ("[Virtual Microscope Specimen]", "NoLayers=1", "ImageFile=a.jpg", "ImageFile(1,0)=a(1,0).jpg")
        lines += ("MapFile=a_map.jpg", "MacroImage=a_macro.jpg", "AuthCode=b.jpg")
        (tmp_path / f"slide{suffix}").write_bytes("\r\n".join(lines).encode())
        assert found(tmp_path) == ["a.jpg", "b.jpg", f"slide{suffix}"]


class TestFolders:
    def test_links_are_followed_and_circles_end(self, tmp_path):
        touch(tmp_path, "slides/z/a.svs", "elsewhere/b.svs")
        os.symlink(tmp_path / "elsewhere", tmp_path / "slides" / "linked")
        os.symlink(tmp_path / "slides", tmp_path / "elsewhere" / "circle")
        os.symlink(tmp_path / "slides" / "z", tmp_path / "slides" / "again")
        slides = find_slides(tmp_path / "slides")
        assert [os.path.relpath(slide.path, tmp_path) for slide in slides] == ["slides/z/a.svs", "slides/linked/b.svs"]

    def test_one_that_cannot_be_listed(self, tmp_path, make_unlistable):
        touch(tmp_path, "mine/a.svs", "theirs/b.svs")
        make_unlistable("theirs")
        with pytest.raises(OSError, match=r"theirs' cannot be searched \(Permission denied\); have it made readable"):
            find_slides(tmp_path)
        assert found(tmp_path / "mine") == ["a.svs"]
