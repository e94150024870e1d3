"""`ssmamba convert` and `ssmamba check`: from the command line, with exit codes."""

import json
import os

import numpy as np
import pytest

from ssmamba_models.data.features import read_slide_features, write_slide_features

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")

GEOMETRY = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "overlap": 0,
    "level0_mpp": 0.25,
    "target_mpp": 0.5,
    "level0_width": 9000,
    "level0_height": 8000,
    "name": "s",
}


def write(path, model="m", value=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = {"model": model, "weights_sha256": "0" * 64}
    with write_slide_features(path, 3, coords_attributes=GEOMETRY, attributes=attributes) as writer:
        writer.append(np.full((4, 3), value, np.float32), np.arange(8).reshape(4, 2))
    return path


def write_foreign(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.ones((4, 3), np.float32), np.arange(8).reshape(4, 2)
        file["coords"].attrs.update({"patch_size": 256.0, "patch_size_level0": 512.0, "overlap": 0.0})


class TestConvert:
    def test_there_and_back(self, ssmamba, tmp_path):
        path = write(tmp_path / "job/features_m/s.h5")
        there = ssmamba("convert", tmp_path / "job", "--from", "ssmamba", "--to", "clam", "--out", tmp_path / "clam")
        assert there.exit_code == 0, there.output
        assert "1 of 1 files" in there.output
        back = ssmamba(
            "convert", tmp_path / "clam", "--from", "clam", "--to", "ssmamba", "--out", tmp_path / "back", "--quiet"
        )
        assert (back.exit_code, back.output) == (0, "")
        assert (tmp_path / "back/features_m/s.h5").read_bytes() == path.read_bytes()

    def test_a_table_says_what_files_do_not(self, ssmamba, tmp_path):
        for name in ("a", "b", "c"):
            write_foreign(tmp_path / f"features_uni/{name}.h5")
        (tmp_path / "mpp.csv").write_text(
            "slide, mpp, level0_width, level0_height, note\na.svs, 0.25, 9000, 8000, x\nb, 0.5, 700, 600,\n"
        )
        options = ("--from", "trident", "--to", "ssmamba", "--out", tmp_path / "out", "--mpp-csv", tmp_path / "mpp.csv")
        result = ssmamba("convert", tmp_path / "features_uni", *options)
        assert result.exit_code == 1
        assert "2 of 3 files" in result.output
        assert f"not converted: {tmp_path / 'features_uni/c.h5'}: " in result.output
        assert "does not say level0_mpp" in result.output
        a, b = (read_slide_features(tmp_path / f"out/{name}.h5") for name in "ab")
        assert (a.level0_mpp, a.level0_width, a.target_mpp) == (0.25, 9000, 0.5)
        assert (b.level0_mpp, b.level0_height, b.target_mpp) == (0.5, 600, 1.0)
        assert a.attributes["model"] == "uni"

    def test_options_say_what_files_do_not(self, ssmamba, tmp_path):
        write_foreign(tmp_path / "h5_files/a.h5")
        with h5py.File(tmp_path / "h5_files/a.h5", "a") as file:
            file["coords"].attrs.update({"patch_level": 0, "level_dim": (9000, 8000)})
            del file["coords"].attrs["patch_size_level0"]
        options = ("--from", "clam", "--to", "ssmamba", "--out", tmp_path / "out")
        given = ("--mpp-override", 0.25, "--overlap", 0, "--tile-size", 256, "--model", "uni")
        result = ssmamba("convert", tmp_path, *options, *given)
        assert result.exit_code == 0, result.output
        read = read_slide_features(tmp_path / "out/a.h5")
        assert (read.patch_size, read.patch_size_level0, read.target_mpp) == (256, 256, 0.25)
        assert (read.attributes["converted_from"], read.attributes["model"]) == ("clam", "uni")
        assert ssmamba("convert", tmp_path, *options, *given).exit_code == 1
        assert ssmamba("convert", tmp_path, *options, *given, "--overwrite").exit_code == 0

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("name,mpp\na,1\n", "expected slide and any of mpp"),
            ("slide,other\na,1\n", "expected slide and any of mpp"),
            ("slide,mpp\na,fast\n", "line 2: the attribute level0_mpp is 'fast', expected a number"),
            ("slide,mpp\n,1\n", "line 2: no slide is named"),
            ("slide,mpp\na.svs,1\na,2\n", "line 3: 'a' stands in two rows that differ"),
        ],
    )
    def test_bad_tables(self, ssmamba, tmp_path, table, message):
        write_foreign(tmp_path / "features_uni/a.h5")
        (tmp_path / "mpp.csv").write_text(table)
        options = ("--from", "trident", "--to", "ssmamba", "--out", tmp_path / "out", "--mpp-csv", tmp_path / "mpp.csv")
        result = ssmamba("convert", tmp_path / "features_uni", *options)
        assert result.exit_code == 2
        assert message in result.output
        assert not (tmp_path / "out").exists()

    def test_bad_input(self, ssmamba, tmp_path):
        result = ssmamba("convert", tmp_path / "none", "--from", "clam", "--to", "ssmamba", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert "Error: " in result.output
        assert not (tmp_path / "out").exists()


class TestCheck:
    def test_json_replaces_results_and_nothing_else(self, ssmamba, tmp_path):
        path = write(tmp_path / "a.h5")
        before = path.read_bytes()
        result = ssmamba("check", "--json", path, path)
        assert result.exit_code == 2
        assert "exists and is no JSON; it is left as it is: name another file" in result.stderr
        assert path.read_bytes() == before
        for _ in range(2):
            assert ssmamba("check", path, "--json", tmp_path / "report.json").exit_code == 0

    def test_a_name_that_is_not_utf8_does_not_end_the_list(self, ssmamba, tmp_path):
        os.rename(write(tmp_path / "a.h5"), os.fsencode(tmp_path) + b"/case\xe9.h5")
        write(tmp_path / "z.h5")
        result = ssmamba("check", tmp_path)
        assert result.exit_code == 0, result.output
        assert [line.split(":")[0].rpartition("/")[2] for line in result.stdout.splitlines()] == [
            "case\\udce9.h5", "z.h5",
        ]  # fmt: skip

    def test_all_is_well(self, ssmamba, tmp_path):
        write(tmp_path / "a.h5")
        write(tmp_path / "more/b.h5")
        result = ssmamba("check", tmp_path, tmp_path / "a.h5", "--json", tmp_path / "report.json")
        assert result.exit_code == 0, result.output
        first, second = result.output.splitlines()
        assert first == f"ok  {tmp_path / 'a.h5'}: 4 tiles x 3 float32, m, 256 px at 0.5 um/px"
        assert second.startswith(f"ok  {tmp_path / 'more/b.h5'}: ")
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["bad"] == 0
        assert [entry["path"] for entry in report["files"]] == [str(tmp_path / "a.h5"), str(tmp_path / "more/b.h5")]
        assert report["files"][0]["provenance"]["model"] == "m"

    def test_problems(self, ssmamba, tmp_path):
        for name in ("a", "b"):
            write(tmp_path / f"{name}.h5")
        write(tmp_path / "c.h5", model="other", value=np.nan)
        (tmp_path / "d.h5").write_text("text")
        result = ssmamba("check", tmp_path, "--quiet", "--json", tmp_path / "report.json")
        assert result.exit_code == 1
        assert result.output.count("BAD") == 2
        assert f"BAD {tmp_path / 'c.h5'}: nan: features of 4 of 4 tiles with NaN" in result.output
        assert "mixed: model is 'other', but 'm' in 2 files" in result.output
        assert "2 of 4 files have problems" in result.output
        assert "a.h5" not in result.output
        report = json.loads((tmp_path / "report.json").read_text())
        assert [[problem["kind"] for problem in entry["problems"]] for entry in report["files"]] == [
            [], [], ["nan", "mixed"], ["unreadable"],
        ]  # fmt: skip

    def test_bad_input(self, ssmamba, tmp_path):
        assert "does not exist" in ssmamba("check", tmp_path / "none.h5").output
        assert ssmamba("check", tmp_path / "none.h5").exit_code == 2
        assert ssmamba("check", tmp_path).exit_code == 2
        assert ssmamba("check").exit_code == 2
        write(tmp_path / "a.h5")
        result = ssmamba("check", tmp_path, "--json", tmp_path / "none" / "report.json")
        assert result.exit_code == 2
        assert "ok" not in result.output
