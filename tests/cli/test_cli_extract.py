"""`ssmamba extract`: what it prints, its exit codes, and what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ssmamba_models.locks import Locks
from ssmamba_models.wsi.slide_list import SlideFile, find_slides, parse_shard, shard_order
from ssmamba_models.wsi.status import read_summary

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")
tifffile = pytest.importorskip("tifffile", reason="slides need the [wsi] extra")

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = ("--model", "test_ssmamba", "--mpp", 1, "--tile-size", 64, "--img-size", 64, "--workers", 0)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """One slide of tissue all over."""
    folder = tmp_path_factory.mktemp("cli") / "slides"
    folder.mkdir()
    grain = np.random.default_rng(0).integers(-30, 30, (640, 640, 3))
    image = np.clip(np.array([200, 120, 170]) + grain, 0, 255).astype(np.uint8)
    tifffile.imwrite(
        folder / "case.tif", image, tile=(256, 256), photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3
    )
    return folder


def test_a_job(ssmamba, slides, tmp_path):
    result = ssmamba("extract", slides, "--out", tmp_path / "job", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "1 of 1 slides done -> " in result.stdout
    assert "25 tiles in " in result.stdout
    assert "Warning: features come from random weights" in result.stderr
    assert (tmp_path / "job/1mpp_64px_0px/features_test_ssmamba/case.h5").exists()
    check = ssmamba("check", tmp_path / "job/1mpp_64px_0px/features_test_ssmamba")
    assert check.exit_code == 0, check.output


def test_failed_slides_make_exit_code_1(ssmamba, slides, tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")
    arguments = ("extract", slides, tmp_path / "bad.svs", "--out", tmp_path / "job", *OPTIONS, "--quiet")
    result = ssmamba(*arguments)
    assert result.exit_code == 1
    assert "failed: bad: " in result.stderr
    assert "1 of 2 slides failed; try them again with --retry-failed" in result.stderr
    assert result.stdout == ""
    assert read_summary(tmp_path / "job/summary.csv")["case"]["status"] == "done"
    again = ssmamba(*arguments)
    assert again.exit_code == 1
    assert "failed: bad: " in again.stderr


def test_slides_in_other_hands_are_told_of_even_by_a_quiet_run(ssmamba, slides, tmp_path):
    (tmp_path / "job").mkdir()
    with Locks(tmp_path / "job" / ".locks") as others:
        others.acquire("case")
        result = ssmamba("extract", slides, "--out", tmp_path / "job", *OPTIONS, "--quiet")
    assert result.exit_code == 0, result.output
    assert "1 of 1 slides are in the hands of other processes: case; run the command again" in result.stderr


def test_slides_that_are_too_coarse_or_have_no_tile_are_told_of_even_by_a_quiet_run(ssmamba, slides, tmp_path):
    options = ("--quiet", "--model", "test_ssmamba", "--tile-size", 64, "--img-size", 64, "--workers", 0)
    result = ssmamba("extract", slides, "--out", tmp_path / "fine", "--mpp", 0.25, *options)
    assert result.exit_code == 0, result.output
    assert "1 of 1 slides are coarser than --mpp, and their tiles enlarged" in " ".join(result.stderr.split())
    result = ssmamba("extract", slides, "--out", tmp_path / "none", *options, "--mpp", 8, "--min-tissue", 1)
    assert result.exit_code == 0, result.output
    assert "not one tile: 1 of 1 slides have no tissue" in result.stderr
    assert "coarser" not in result.stderr


def test_dry_run(ssmamba, slides, tmp_path):
    result = ssmamba("extract", slides, "--out", tmp_path / "job", *OPTIONS, "--dry-run", "--quiet")
    assert result.exit_code == 0, result.output
    assert "case: pending, 25 tiles, level 0 at 0.5 um/px" in result.stdout
    assert "25 tiles to do, about 0:00:0" in result.stdout
    assert not (tmp_path / "job").exists()


def test_a_dry_run_of_a_bad_slide_has_exit_code_1(ssmamba, tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")
    result = ssmamba("extract", tmp_path / "bad.svs", "--out", tmp_path / "job", *OPTIONS, "--dry-run", "--quiet")
    assert result.exit_code == 1
    assert "bad: failed, " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--overlap", 64), "the overlap must be 0 or more and smaller than the tile size"),
        (("--mpp-override", 0), "mpp_override"),
        (("--mpp-csv", "missing.csv"), "missing.csv"),
        (("--shard", "0/2"), "the shards of 2 are 1/2 to 2/2"),
        (("--shard", "half"), "is not i/n"),
        (("--model", "test_ssmambo"), "did you mean test_ssmamba"),
        (("--out", "missing/job"), "create it (mkdir -p)"),
        (("--device", "cuda:99"), "device 'cuda:99'"),
    ],
)
def test_bad_input_has_exit_code_2(ssmamba, slides, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = ssmamba("extract", slides, "--out", tmp_path / "job", *OPTIONS, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "job").exists()


def test_no_slides(ssmamba, tmp_path):
    (tmp_path / "empty").mkdir()
    result = ssmamba("extract", tmp_path / "empty", "--out", tmp_path / "job", *OPTIONS)
    assert result.exit_code == 2
    assert "no slide found in" in result.output
    missing = ssmamba("extract", tmp_path / "none", "--out", tmp_path / "job", *OPTIONS)
    assert missing.exit_code == 2
    assert "does not exist; check its spelling" in missing.output


class TestSlideList:
    def test_folders_are_searched_and_files_are_taken_as_they_are(self, tmp_path):
        for name in ("b.svs", "a.TIF", "deep/c.ome.tif", ".hidden.svs", ".cache/d.svs", "notes.txt", "odd.xyz"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert [slide.name for slide in find_slides(tmp_path)] == ["a", "b", "c"]
        assert [slide.name for slide in find_slides([tmp_path / "odd.xyz", tmp_path / "b.svs"])] == ["b", "odd"]
        # The same file, named twice, is one slide.
        assert len(find_slides([tmp_path, tmp_path / "b.svs"])) == 3

    def test_mpp_of_single_slides_goes_before_that_of_all(self, tmp_path):
        for name in ("a.svs", "b.svs"):
            (tmp_path / name).touch()
        assert [slide.mpp for slide in find_slides(tmp_path, 0.5, {"b": 0.25})] == [0.5, 0.25]

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
    def test_a_name_that_is_no_text(self, tmp_path):
        path = os.path.join(os.fsencode(tmp_path), b"\xff.svs")
        open(path, "w").close()
        with pytest.raises(ValueError, match="is not valid UTF-8"):
            find_slides(tmp_path)

    def test_a_name_too_long_for_its_files(self, tmp_path):
        (tmp_path / f"{'l' * 232}.svs").touch()
        assert len(find_slides(tmp_path)) == 1
        (tmp_path / f"{'ü' * 117}.svs").touch()
        with pytest.raises(ValueError, match=r"is too long for files that are called after it.*rename"):
            find_slides(tmp_path)

    def test_a_table_of_other_slides(self, tmp_path):
        (tmp_path / "a.svs").touch()
        (tmp_path / "b.svs").touch()
        assert [slide.mpp for slide in find_slides(tmp_path, None, {"a.svs": 0.5, "x": 1.0})] == [0.5, None]
        with pytest.raises(ValueError, match="table of mpp names none of the slides: it has 'x'"):
            find_slides(tmp_path, None, {"x": 0.5})

    def test_each_shard_begins_with_its_own_share(self):
        slides = [SlideFile(name, name) for name in "abcdefg"]
        orders = [[slide.name for slide in shard_order(slides, (index, 3))] for index in (1, 2, 3)]
        assert [order[:2] for order in orders] == [["a", "d"], ["b", "e"], ["c", "f"]]
        assert all(sorted(order) == list("abcdefg") for order in orders)
        assert shard_order(slides, None) == slides

    @pytest.mark.parametrize(
        ("environment", "shard"),
        [
            ({}, None),
            ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, (1, 4)),
            ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (4, 4)),
            (
                {
                    "SLURM_ARRAY_TASK_ID": "6",
                    "SLURM_ARRAY_TASK_COUNT": "4",
                    "SLURM_ARRAY_TASK_MIN": "0",
                    "SLURM_ARRAY_TASK_STEP": "2",
                },
                (4, 4),
            ),
        ],
    )
    def test_the_shard_of_a_slurm_array(self, environment, shard):
        assert parse_shard(None, environment) == shard
        assert parse_shard("2/3", environment) == (2, 3)

    def test_an_array_that_is_none(self):
        with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_ID .*no numbers; give --shard"):
            parse_shard(None, {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "4"})


@pytest.mark.slow
def test_the_installed_command(slides, tmp_path):
    program = "from ssmamba_models.cli.main import main; main()"
    command = [sys.executable, "-c", program, "extract", str(slides), "--out", str(tmp_path / "job")]
    command += [*map(str, OPTIONS[:-1]), "1", "--grid", "--dtype", "float16"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "1 of 1 slides done" in done.stdout
