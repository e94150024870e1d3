"""Tiles cut from slides: their pixels, their places, and jobs that are stopped, spoilt or told something else."""

import csv
import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import FEATURES, TILE, cut, digests, events, extract, leftovers, make_bad_slides, make_slides
from job_server import Jobs
from slide_files import corrupt_tile, make_pyramid, waves

from ssmamba_models.data.features import read_slide_features
from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.spatial_tiles import read_spatial_tiles
from ssmamba_models.locks import JOB_LOCK, Locks
from ssmamba_models.wsi import job_folder, tile_run
from ssmamba_models.wsi.decoding import OutputError
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.status import read_summary
from ssmamba_models.wsi.tile_job import TileJob
from ssmamba_models.wsi.tile_slides import TilePlan, count_slide_tiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]

OUTPUTS = ("*.png", "*.jpg", "*.json", "manifest.csv")


def record(out, name):
    return json.loads((out / name / "slide.json").read_text())


def manifest(out):
    with open(out / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def bytes_of(out):
    return digests(out, OUTPUTS)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("tile") / "slides")


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """A job of three slides; not to be written in."""
    out = tmp_path_factory.mktemp("whole") / "job"
    assert cut(slides, out).done == ["a", "b", "c"]
    return out


class TestTiles:
    def assert_tiles_are_regions(self, out, name, path, mpp, size, step):
        """Every tile listed is what the reader gives for its place, and there is no other file."""
        rows = [row for row in manifest(out) if row["slide"] == name]
        assert {Path(row["path"]).name for row in rows} == {p.name for p in (out / name).iterdir()} - {"slide.json"}
        corners = {tuple(tile[:2]): tuple(tile[2:]) for tile in record(out, name)["tiles"]}
        assert len(corners) == len(rows) > 0
        with open_slide(path) as slide:
            for row in rows:
                x, y = int(row["x"]), int(row["y"])
                assert row["path"] == f"{name}/{x}_{y}.png"
                assert corners[x, y] == tuple(int(np.rint(at * step * mpp / slide.mpp)) for at in (x, y))
                expected = slide.read_region(*corners[x, y], size, size, mpp)
                np.testing.assert_array_equal(np.asarray(Image.open(out / row["path"])), expected)

    def test_pixels_are_those_of_the_reader(self, slides, whole):
        for name in "abc":
            self.assert_tiles_are_regions(whole, name, slides / f"{name}.tif", 1.0, TILE, TILE)
        assert leftovers(whole) == []

    def test_with_overlap_places_are_steps_of_the_grid(self, tmp_path):
        # 0.7 um/px is no level's: every tile is resampled, and its corner rounded.
        path = make_pyramid(tmp_path / "w.tif", (500, 400), mpp=0.5, content=waves)
        cut(path, tmp_path / "job", mpp=0.7, overlap=24, min_tissue=0)
        self.assert_tiles_are_regions(tmp_path / "job", "w", path, 0.7, TILE, TILE - 24)
        x, y = (np.array([int(row[name]) for row in manifest(tmp_path / "job")]) for name in "xy")
        assert (x.min(), y.min()) == (0, 0)
        assert (set(x), set(y)) == (set(range(x.max() + 1)), set(range(y.max() + 1)))
        assert len(x) == (x.max() + 1) * (y.max() + 1)

    def test_a_real_slide(self, data_root, tmp_path):
        path = data_root / "slides" / "cmu-1-small-region.svs"
        if not path.exists():
            pytest.skip(f"{path} is not there")
        cut(path, tmp_path / "job", tile_size=224)
        self.assert_tiles_are_regions(tmp_path / "job", "cmu-1-small-region", path, 1.0, 224, 224)

    def test_tiles_lie_where_those_of_extract_do(self, slides, whole, tmp_path):
        extract(slides / "a.tif", tmp_path / "job")
        read = read_slide_features(tmp_path / "job" / FEATURES / "a.h5")
        assert [tile[2:] for tile in record(whole, "a")["tiles"]] == read.coords.tolist()
        told = record(whole, "a")
        for key in ("level0_mpp", "target_mpp", "patch_size", "patch_size_level0", "level0_width", "overlap"):
            assert told[key] == read.coords_attributes[key]

    def test_jpeg(self, slides, whole, tmp_path):
        sizes = []
        for quality in (None, 60):
            out = tmp_path / f"job{quality}"
            cut(slides / "a.tif", out, format="jpeg", quality=quality)
            assert list(out.rglob("*.png")) == []
            for row in manifest(out):
                tile = Image.open(out / row["path"])
                assert (tile.format, tile.mode, tile.size) == ("JPEG", "RGB", (TILE, TILE))
                exact = np.asarray(Image.open((whole / row["path"]).with_suffix(".png")), int)
                assert np.abs(np.asarray(tile, int) - exact).mean() < (2 if quality is None else 8)
            sizes.append(sum(path.stat().st_size for path in out.rglob("*.jpg")))
        assert sizes[0] > sizes[1] > 0

    def test_the_manifest_is_read_as_tiles_with_places(self, whole):
        tiles = read_spatial_tiles(whole)
        assert set(tiles.slides) == set("abc")
        assert tiles.paths == read_tiles(whole).paths
        assert tiles.labels is tiles.groups is tiles.splits is None
        for path, slide, x, y in zip(tiles.paths, tiles.slides, tiles.x, tiles.y):
            assert path == f"{slide}/{x}_{y}.png"

    def test_summary(self, whole):
        row = read_summary(whole / "summary.csv")["a"]
        assert (row["status"], row["tiles"], row["mpp"]) == ("done", str(len(record(whole, "a")["tiles"])), "0.5")

    def test_processes_give_the_same_bytes(self, slides, whole, tmp_path):
        cut(slides, tmp_path / "job", workers=2)
        assert bytes_of(tmp_path / "job") == bytes_of(whole)

    def test_a_dry_run_counts_what_the_job_cuts(self, slides, whole, tmp_path):
        plan = TilePlan(mpp=1.0, tile_size=TILE, workers=0)
        planned = count_slide_tiles(slides, tmp_path / "job", plan, progress=False)
        assert [(slide.name, slide.status) for slide in planned] == [(name, "pending") for name in "abc"]
        assert [slide.tiles for slide in planned] == [len(record(whole, name)["tiles"]) for name in "abc"]
        assert not (tmp_path / "job").exists()
        again = count_slide_tiles(slides, whole, plan, progress=False)
        assert [(slide.status, slide.tiles) for slide in again] == [("done", slide.tiles) for slide in planned]


class TestBadSlides:
    def test_each_has_its_line_and_the_others_finish(self, tmp_path):
        slides, out = make_bad_slides(tmp_path / "slides"), tmp_path / "job"
        result = cut(slides, out, max_bad_tiles=0.2)
        assert sorted(result.done) == ["good", "one_bad_tile"]
        assert result.no_tissue == ["blank"]
        assert sorted(result.failed) == ["no_mpp", "no_slide", "truncated", "zero_bytes"]
        rows = read_summary(out / "summary.csv")
        assert {name: rows[name]["reason"] for name in result.failed} == result.failed
        assert leftovers(out) == []
        assert {row["slide"] for row in manifest(out)} == {"good", "one_bad_tile"}
        # Bad tiles are left out and counted; the others are those of the same slide without the fault.
        bad = int(rows["one_bad_tile"]["bad_tiles"])
        good, spoilt = ({p.name: p.read_bytes() for p in (out / name).glob("*.png")} for name in sorted(result.done))
        assert len(good) - len(spoilt) == bad > 0
        assert spoilt.items() < good.items()

    def test_too_many_bad_tiles_fail_the_slide(self, tmp_path):
        path = make_pyramid(tmp_path / "a.tif", (640, 640), mpp=0.5, content=waves)
        corrupt_tile(path, 4)
        result = cut(path, tmp_path / "job", min_tissue=0)
        assert "cannot be read, more than --max-bad-tiles 0.05 allows" in result.failed["a"]
        assert sorted(os.listdir(tmp_path / "job")) == ["config.yaml", "manifest.csv", "status.jsonl", "summary.csv"]
        assert manifest(tmp_path / "job") == []

    def test_a_slide_of_bad_tiles_alone(self, tmp_path):
        path = make_pyramid(tmp_path / "a.tif", (256, 256), mpp=0.5, levels=(1, 4), content=waves)
        corrupt_tile(path, 0)
        result = cut(path, tmp_path / "job", min_tissue=0, max_bad_tiles=1)
        assert "none of its 4 tiles can be read" in result.failed["a"]
        assert leftovers(tmp_path / "job") == []

    def test_failed_slides_wait_for_retry_failed(self, tmp_path):
        path = make_pyramid(tmp_path / "a.tif", (640, 640), content=waves)
        assert "--mpp-override" in cut(path, tmp_path / "job", min_tissue=0).failed["a"]
        assert [cut(path, tmp_path / "job", min_tissue=0, retry_failed=retry).new for retry in (False, True)] == [0, 1]
        result = cut(path, tmp_path / "job", min_tissue=0, mpp_override=0.5)  # the cure that the reason names
        assert (result.new, result.done, result.enlarged) == (1, ["a"], [])
        assert record(tmp_path / "job", "a")["mpp_source"] == "override"

    def test_what_lies_in_a_slides_place_stays(self, slides, whole, tmp_path):
        out = tmp_path / "job"
        cut(slides / "b.tif", out)
        (out / "a").mkdir()
        (out / "a" / "notes.txt").write_text("mine")
        result = cut(slides, out)
        assert "holds something else; move it away" in result.failed["a"]
        assert (result.done, os.listdir(out / "a")) == (["b", "c"], ["notes.txt"])

    @pytest.mark.parametrize("name", ["manifest.csv.tif", ".a.tif", " a.tif"])
    def test_names_that_a_job_cannot_have(self, tmp_path, name):
        path = make_pyramid(tmp_path / name, (256, 256), mpp=0.5)
        with pytest.raises(ValueError, match="rename it"):
            cut(path, tmp_path / "job")
        assert not (tmp_path / "job").exists()

    @pytest.mark.parametrize("name", ["config", "summary", "x.01234567", 'a, b\n"c"'])
    def test_odd_names(self, tmp_path, name):
        make_pyramid(tmp_path / f"{name}.tif", (256, 256), mpp=0.5, content=waves)
        for _ in range(2):
            assert cut(tmp_path / f"{name}.tif", tmp_path / "job", min_tissue=0).done == [name]
        assert set(read_spatial_tiles(tmp_path / "job").slides) == {name}


class TestGoingOn:
    def test_what_is_done_stays(self, slides, whole, tmp_path):
        cut(slides / "a.tif", tmp_path / "job")
        before = (tmp_path / "job/a/slide.json").stat()
        result = cut(slides, tmp_path / "job")
        assert (result.new, result.done) == (2, ["a", "b", "c"])
        after = (tmp_path / "job/a/slide.json").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert bytes_of(tmp_path / "job") == bytes_of(whole)
        # A part of the slides leaves the others in the manifest.
        assert cut(slides / "c.tif", tmp_path / "job").new == 0
        assert bytes_of(tmp_path / "job") == bytes_of(whole)

    def test_a_lost_tile_and_a_lost_log(self, slides, whole, tmp_path):
        out = tmp_path / "job"
        cut(slides, out)
        next((out / "b").glob("*.png")).unlink()
        (out / "status.jsonl").unlink()
        assert cut(slides, out).new == 1
        assert bytes_of(out) == bytes_of(whole)
        assert leftovers(out) == []

    def test_a_changed_slide_is_cut_again(self, tmp_path):
        path, out = tmp_path / "a.tif", tmp_path / "job"
        make_pyramid(path, (640, 640), mpp=0.5, content=waves)
        many = cut(path, out, min_tissue=0).tiles
        make_pyramid(path, (256, 384), mpp=0.5, content=waves)
        few = cut(path, out, min_tissue=0).tiles
        assert many > few == len(list((out / "a").glob("*.png"))) == len(manifest(out))
        assert leftovers(out) == []

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tile_size": 32}, "tile_size was 64, now 32"),
            ({"mpp": 2.0}, "mpp was 1.0, now 2.0"),
            ({"overlap": 8}, "overlap was 0, now 8"),
            ({"min_tissue": 0.5}, "min_tissue was 0.25, now 0.5"),
            ({"format": "jpeg"}, "image_format was 'png', now 'jpeg'; quality was None, now 95"),
        ],
    )
    def test_a_job_does_not_mix_tiles(self, slides, whole, changes, message):
        before = bytes_of(whole)
        with pytest.raises(ValueError, match=f"{message}.*a job does not mix tiles"):
            cut(slides, whole, **changes)
        assert bytes_of(whole) == before

    def test_another_mpp_of_a_slide_that_is_done(self, slides, whole):
        with pytest.raises(ValueError, match=r"was cut at 0.5 um per level-0 pixel, now 0.25 is given"):
            cut(slides, whole, mpp_override=0.25)

    def test_folders_of_something_else(self, slides, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="holds other files than a job's"):
            cut(slides, tmp_path / "other")
        with pytest.raises(FileNotFoundError, match="mkdir -p"):
            cut(slides, tmp_path / "no" / "job")
        assert os.listdir(tmp_path / "other") == ["notes.txt"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    def test_a_stop_leaves_no_half_slide(self, slides, whole, tmp_path, monkeypatch, error):
        """Ctrl-C, and a full disk, in the middle of the second slide."""
        out, real, calls = tmp_path / "job", Path.write_bytes, []
        after = len(record(whole, "a")["tiles"]) + 5

        def stop(self, data):
            calls.append(1)
            if len(calls) == after:
                raise error
            return real(self, data)

        monkeypatch.setattr(Path, "write_bytes", stop)
        full = pytest.raises(OutputError, match=r"the disk is full.*make room")
        with full if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
            cut(slides, out)
        monkeypatch.undo()
        assert leftovers(out) == []
        assert events(out, "done") == ["a"]
        assert not (out / "b").exists()
        assert {row["slide"] for row in manifest(out)} <= {"a"}
        cut(slides, out)
        assert bytes_of(out) == bytes_of(whole)

    def test_the_manifest_follows_the_slides(self, slides, tmp_path, monkeypatch):
        out, real, seen = tmp_path / "job", tile_run.TileRun.take, []

        def look(self, rows, cuts):
            if rows.start == 0:
                seen.append({row["slide"] for row in manifest(out)})
            real(self, rows, cuts)

        monkeypatch.setattr(tile_run.TileRun, "take", look)
        monkeypatch.setattr("ssmamba_models.wsi.job_run._TABLE_SHARE", 1e9)
        cut(slides, out)
        assert seen == [set(), {"a"}, {"a", "b"}]

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the jobs are forks")
    def test_kills(self, slides, whole, tmp_path):
        """kill -9 at places from the first to the last file: the job that goes on ends with the same bytes."""
        jobs = Jobs()
        try:
            jobs.start_cutting(slides, tmp_path / "unbroken")
            assert jobs.wait() == 0
            touches = jobs.said["touches"]
            assert bytes_of(tmp_path / "unbroken") == bytes_of(whole)
            out, killed = tmp_path / "job", 0
            # Late first, as each run has less to do.
            for share in (0.3, 0.3, 0.2, 0.05, 0.02):
                jobs.start_cutting(slides, out, kill_at=max(1, int(share * touches)))
                killed += jobs.wait() == -signal.SIGKILL
            assert killed >= 3
            jobs.start_cutting(slides, out)
            assert jobs.wait() == 0
        finally:
            jobs.close()
        assert bytes_of(out) == bytes_of(whole)
        assert leftovers(out) == []
        assert sorted(events(out, "done")) == ["a", "b", "c"]


class TestTurns:
    """Processes take turns to write the job's own files."""

    @pytest.fixture(autouse=True)
    def short_turns(self, monkeypatch):
        monkeypatch.setattr(job_folder, "_JOB_TIMEOUT", 0.6)

    def test_many_short_turns_of_others_are_waited_for(self, slides, tmp_path):
        out = tmp_path / "job"
        with Locks(out / ".locks") as others:
            out.mkdir()
            lock = others.acquire(JOB_LOCK)

            def take_turns():
                said = json.loads(lock.text)
                for turn in range(8):
                    time.sleep(0.25)
                    part = out / "turn"
                    part.write_text(json.dumps({**said, "token": str(turn)}))
                    part.replace(lock.path)
                lock.path.unlink()

            turns = threading.Thread(target=take_turns)
            turns.start()
            assert cut(slides / "a.tif", out).done == ["a"]
            turns.join()

    def test_a_turn_without_an_end_is_told(self, slides, tmp_path):
        (tmp_path / "job").mkdir()
        with Locks(tmp_path / "job" / ".locks") as others:
            others.acquire(JOB_LOCK)
            with pytest.raises(OutputError, match="is its disk stuck"):
                cut(slides / "a.tif", tmp_path / "job")

    def test_a_job_begins_while_another_process_writes_its_tables(self, slides, tmp_path, monkeypatch):
        out, real, held = tmp_path / "job", tile_run.TileRun.take, []
        others, look = Locks(out / ".locks"), TileJob.find_done

        def hold(job, slide):
            held.append(held or others.acquire(JOB_LOCK))
            return look(job, slide)

        def let_go(run, rows, cuts):
            others.close()
            real(run, rows, cuts)

        monkeypatch.setattr(TileJob, "find_done", hold)
        monkeypatch.setattr(tile_run.TileRun, "take", let_go)
        assert cut(slides / "a.tif", out).done == ["a"]
        assert held[0] is not None


class TestLabels:
    TABLE = "slide,label,patient,split\na.tif,tumour,p1,train\nb,normal,p2,val\nc,tumour,p1,train\nd,normal,p9,test\n"

    def write(self, tmp_path, text):
        (tmp_path / "labels.csv").write_text(text)
        return str(tmp_path / "labels.csv")

    def test_they_fill_columns(self, slides, tmp_path):
        out = tmp_path / "job"
        cut(slides, out, labels=self.write(tmp_path, self.TABLE))
        tiles = read_spatial_tiles(out)
        facts = set(zip(tiles.slides, tiles.labels, tiles.groups, tiles.splits))
        assert facts == {("a", "tumour", "p1", "train"), ("b", "normal", "p2", "val"), ("c", "tumour", "p1", "train")}
        assert read_tiles(out).labels == tiles.labels

    def test_without_patients_and_splits_a_slide_is_a_group(self, slides, tmp_path):
        cut(slides, tmp_path / "job", labels=self.write(tmp_path, "slide,label\na,x\nb,x\nc,y\n"))
        tiles = read_tiles(tmp_path / "job")
        assert {(path[0], label, group) for path, label, group in zip(tiles.paths, tiles.labels, tiles.groups)} == {
            ("a", "x", "a"),
            ("b", "x", "b"),
            ("c", "y", "c"),
        }
        assert tiles.splits is None

    def test_a_job_keeps_them_until_it_is_given_others(self, slides, tmp_path):
        out = tmp_path / "job"
        cut(slides, out)
        assert cut(slides, out, labels=self.write(tmp_path, self.TABLE)).new == 0
        labelled = (out / "manifest.csv").read_bytes()
        (tmp_path / "labels.csv").unlink()
        cut(slides, out)
        assert (out / "manifest.csv").read_bytes() == labelled
        cut(slides, out, labels=self.write(tmp_path, "slide,label\na,x\nb,y\nc,z\n"))
        assert {(row["slide"], row["label"]) for row in manifest(out)} == {("a", "x"), ("b", "y"), ("c", "z")}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("slide,label\na,x\nb,y\n", r"has no line for 1 of the 3 slides \('c'\)"),
            ("slide,label\na,x\nb,y\nd,z\n", r"no line for .* \('c'\); what it names and is not here: 'd'"),
            ("slide,label\na,x\nb,y\nc,z\na.tif,x\n", "names the slide 'a.tif' twice"),
            ("slide,label\na,x\nb,\nc,z\n", "line 3: the label is empty"),
            ("slide,patient\na,x\n", "no column 'label'"),
            ("slide,label,patient,split\na,x,p,train\nb,y,p,val\nc,y,q,val\n", "the patient 'p' is in two splits"),
        ],
    )
    def test_bad_tables(self, slides, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            cut(slides, tmp_path / "job", labels=self.write(tmp_path, text))
        assert not (tmp_path / "job").exists()

    def test_slides_of_earlier_runs_need_a_label_too(self, slides, tmp_path):
        out = tmp_path / "job"
        cut(slides / "a.tif", out)
        before = bytes_of(out)
        with pytest.raises(ValueError, match=r"no line for 1 of the 2 slides \('a'\)"):
            cut(slides / "b.tif", out, labels=self.write(tmp_path, "slide,label\nb,x\n"))
        assert bytes_of(out) == before

    def test_slides_that_others_have_begun_need_a_label_too(self, slides, tmp_path, monkeypatch):
        out, real, table = tmp_path / "job", tile_run.TileRun.take, self.write(tmp_path, "slide,label\nb,x\n")

        def meanwhile(run, rows, cuts):
            with pytest.raises(ValueError, match=r"no line for 1 of the 2 slides \('a'\)"):
                cut(slides / "b.tif", out, labels=table)
            real(run, rows, cuts)

        monkeypatch.setattr(tile_run.TileRun, "take", meanwhile)
        assert cut(slides / "a.tif", out).done == ["a"]
        assert {row["slide"] for row in manifest(out)} == {"a"}

    def test_a_table_of_others_without_a_slide_stops_no_job(self, slides, tmp_path, monkeypatch):
        out, real = tmp_path / "job", TileJob.find_done
        table = self.write(tmp_path, "slide,label\nb,x\n")

        def meanwhile(job, slide):
            """Before slide "a" begins, another process gives the job labels and does its slide."""
            monkeypatch.setattr(TileJob, "find_done", real)
            assert cut(slides / "b.tif", out, labels=table).done == ["b"]
            return real(job, slide)

        monkeypatch.setattr(TileJob, "find_done", meanwhile)
        with pytest.warns(UserWarning, match=r"manifest.csv' stays as it was: .* no line for 1 of the 2 slides"):
            assert cut(slides / "a.tif", out).done == ["a"]
        assert {row["slide"] for row in manifest(out)} == {"b"}
        cut(slides / "a.tif", out, labels=self.write(tmp_path, "slide,label\na,x\nb,x\n"))
        assert {row["slide"] for row in manifest(out)} == {"a", "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "webp"}, "expected one of png, jpeg"),
        ({"quality": 90}, "give it with jpeg only"),
        ({"format": "jpeg", "quality": 0}, "expected 1 to 100"),
        ({"overlap": 224}, "smaller than the tile size"),
        ({"mpp": 0}, "mpp"),
        ({"min_tissue": 2}, "min_tissue"),
        ({"workers": -1}, "workers"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(ValueError, match=message):
        TilePlan(**changes)
