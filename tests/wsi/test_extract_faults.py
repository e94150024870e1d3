"""Bad slides, killed processes, full disks: each has its own clear line, the others finish, no half file stays."""

import csv
import json
import os
import signal
import threading
import time

import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import FEATURES, TINY, digests, events, extract, leftovers, make_bad_slides, make_slides
from slide_files import blank, make_not_a_slide, make_pyramid

from ssmamba_models.data.features import read_slide_features
from ssmamba_models.locks import Locks
from ssmamba_models.wsi import decode_processes, local_engine, slide_run, turns
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import OutputError, PrepareTask
from ssmamba_models.wsi.dry_run import dry_run
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.job import Job
from ssmamba_models.wsi.slide_list import SlideFile, find_slides
from ssmamba_models.wsi.status import read_summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]

REASONS = {
    "no_mpp": "--mpp-override",
    "truncated": "is truncated",
    "zero_bytes": "empty (0 bytes)",
    "no_slide": "is not a slide",
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_bad_slides(tmp_path_factory.mktemp("faults") / "slides")


@pytest.fixture(scope="module")
def ended(slides, tmp_path_factory):
    """The job of all bad slides, and its result; not to be written in."""
    out = tmp_path_factory.mktemp("job") / "job"
    return out, extract(slides, out, max_bad_tiles=0.2)


class TestBadSlides:
    def test_each_has_its_line_and_the_others_finish(self, ended):
        out, result = ended
        assert sorted(result.done) == ["good", "one_bad_tile"]
        assert result.no_tissue == ["blank"]
        assert sorted(result.failed) == sorted(REASONS)
        rows = read_summary(out / "summary.csv")
        for name, text in REASONS.items():
            assert text in result.failed[name]
            assert (rows[name]["status"], rows[name]["reason"]) == ("failed", result.failed[name])
        assert (rows["blank"]["status"], rows["blank"]["tiles"]) == ("no tissue", "0")
        assert leftovers(out) == []

    def test_bad_tiles_are_left_out_and_counted(self, ended):
        out, _ = ended
        good = read_slide_features(out / FEATURES / "good.h5")
        spoiled = read_slide_features(out / FEATURES / "one_bad_tile.h5")
        bad = int(read_summary(out / "summary.csv")["one_bad_tile"]["bad_tiles"])
        assert bad > 0
        assert len(spoiled.coords) == spoiled.attributes["tiles_in_grid"] - bad
        kept = {tuple(place): row for place, row in zip(good.coords.tolist(), good.features)}
        # What can be read has the features that it has in a slide without faults, to the last bit.
        assert all((kept[tuple(place)] == row).all() for place, row in zip(spoiled.coords.tolist(), spoiled.features))

    def test_too_many_bad_tiles_fail_the_slide(self, slides, tmp_path):
        result = extract(slides / "one_bad_tile.tif", tmp_path / "job", max_bad_tiles=0.01)
        assert "cannot be read, more than --max-bad-tiles 0.01 allows" in result.failed["one_bad_tile"]
        assert list((tmp_path / "job").rglob("*.h5")) == []
        assert leftovers(tmp_path / "job") == []

    def test_failed_slides_wait_for_retry_failed(self, slides, tmp_path):
        out, table = tmp_path / "job", tmp_path / "mpp.csv"
        path = slides / "no_mpp.tif"
        assert extract(path, out).failed
        assert [extract(path, out, retry_failed=retry).new for retry in (False, True)] == [0, 1]
        # The cure that the reason names is all that it takes.
        table.write_text("slide,mpp\nno_mpp,0.5\n")
        result = extract(path, out, mpp_csv=str(table))
        assert (result.new, result.done) == (1, ["no_mpp"])
        assert read_summary(out / "summary.csv")["no_mpp"]["mpp_source"] == "override"

    def test_a_blank_slide_is_not_looked_at_twice(self, slides, tmp_path):
        extract(slides / "blank.tif", tmp_path / "job")
        result = extract(slides / "blank.tif", tmp_path / "job")
        assert (result.new, result.no_tissue, result.failed) == (0, ["blank"], {})

    def test_a_blank_slide_is_looked_at_again_at_another_mpp(self, slides, tmp_path):
        new = [extract(slides / "blank.tif", tmp_path / "job", mpp_override=mpp).new for mpp in (None, 0.7, 0.7, None)]
        assert new == [1, 1, 0, 0]

    def test_a_dry_run_says_the_same(self, slides, tmp_path):
        run = dry_run(slides, tmp_path / "job", ExtractPlan(**TINY), progress=False)
        failed = {slide.name: slide.reason for slide in run.slides if slide.status == "failed"}
        assert sorted(failed) == sorted(REASONS)
        assert [slide.name for slide in run.slides if slide.status == "no tissue"] == ["blank"]

    def test_a_dry_run_leaves_out_what_the_job_would(self, slides, tmp_path):
        path, out = slides / "no_mpp.tif", tmp_path / "job"
        extract([path, slides / "blank.tif"], out)
        for mpp, status, tiles in ((None, "failed", False), (0.5, "pending", True)):
            run = dry_run(path, out, ExtractPlan(**TINY, mpp_override=mpp), progress=False)
            assert (run.slides[0].status, run.tiles > 0) == (status, tiles)
        run = dry_run([path, slides / "blank.tif"], out, ExtractPlan(**TINY), progress=False)
        assert [slide.status for slide in run.slides] == ["no tissue", "failed"]
        assert "--retry-failed tries it again: " in run.slides[1].reason

    def test_a_fault_of_a_library_stops_only_its_slide(self, tmp_path, monkeypatch):
        slides = make_slides(tmp_path / "slides", "ab")
        real = decode_processes.Decoder.perform

        def stumble(self, task):
            if task.slide.name == "a":
                raise KeyError("no such\nlevel")
            return real(self, task)

        monkeypatch.setattr(decode_processes.Decoder, "perform", stumble)
        result = extract(slides, tmp_path / "job")
        assert (result.done, result.failed) == (["b"], {"a": "KeyError: 'no such\\nlevel'"})

    def test_features_that_are_not_finite_fail_the_slide(self, tmp_path, monkeypatch):
        slides = make_slides(tmp_path / "slides", "a")
        real = local_engine.TileEncoder.finish

        def spoil(started):
            features, grid = real(started)
            features[1, 3] = float("nan")
            return features, grid

        monkeypatch.setattr(local_engine.TileEncoder, "finish", staticmethod(spoil))
        assert "not finite" in extract(slides, tmp_path / "job").failed["a"]


class TestReplacedSlides:
    """A slide whose file is another one than when it was done, and ends without output now."""

    def test_the_features_of_the_old_file_go(self, tmp_path):
        slides, out = make_slides(tmp_path / "slides"), tmp_path / "job"
        extract(slides, out)
        make_not_a_slide(slides / "a.tif")
        make_pyramid(slides / "b.tif", (1600, 1200), mpp=0.5, content=blank)
        result = extract(slides, out)
        assert (list(result.failed), result.no_tissue, result.done) == (["a"], ["b"], ["c"])
        assert [path.name for path in (out / FEATURES).iterdir()] == ["c.h5"]

    def test_the_features_of_a_slide_that_is_out_of_reach_stay(self, tmp_path, monkeypatch):
        slides, out = make_slides(tmp_path / "slides", "a"), tmp_path / "job"
        extract(slides, out)
        before, real = digests(out), Job.open

        def lose_the_disk(job, begun_with):
            (slides / "a.tif").unlink()
            return real(job, begun_with)

        monkeypatch.setattr(Job, "open", lose_the_disk)
        assert list(extract(slides, out).failed) == ["a"]
        assert digests(out) == before


class TestOwnersElsewhere:
    """Slides in the hands of processes on other machines, when this one has nothing else to do."""

    @pytest.fixture(autouse=True)
    def short_patience(self, monkeypatch):
        monkeypatch.setattr(Locks.__init__, "__defaults__", (0.5, 1.5))

    @staticmethod
    def held_elsewhere(out):
        """A lock of slide "a" that another machine's process made just now."""
        (out / ".locks").mkdir(parents=True)
        lock = out / ".locks" / "a.0.lock"
        lock.write_text(json.dumps({"machine": "node7 pid:[1]", "pid": 42, "started": "1", "time": 0, "token": "a"}))
        return lock

    def test_one_that_died_is_waited_for_and_its_slide_done(self, tmp_path):
        slides, out = make_slides(tmp_path / "slides", "ab"), tmp_path / "job"
        self.held_elsewhere(out)
        with pytest.warns(UserWarning, match=r"1 of 2 slides are held by .*'a' by process 42 on node7\); waiting 2 s"):
            result = extract(slides, out)
        assert (result.done, result.unfinished, result.new) == (["a", "b"], [], 2)
        assert leftovers(out) == []

    def test_one_that_lives_keeps_its_slide(self, tmp_path):
        slides, out = make_slides(tmp_path / "slides", "ab"), tmp_path / "job"
        lock, stop = self.held_elsewhere(out), threading.Event()

        def beat():
            while not stop.wait(0.1):
                os.utime(lock)

        heart = threading.Thread(target=beat)
        heart.start()
        try:
            with pytest.warns(UserWarning, match="for a sign of life"):
                result = extract(slides, out)
        finally:
            stop.set()
            heart.join()
        assert (result.done, result.unfinished) == (["b"], ["a"])


class TestKilledDecoders:
    @pytest.fixture
    def slides(self, tmp_path):
        return make_slides(tmp_path / "slides", "ab")

    @pytest.mark.parametrize("cores", [1, 2], ids=["in turn", "ahead"])
    def test_one_death_costs_nothing(self, slides, tmp_path, monkeypatch, cores):
        monkeypatch.setattr(turns, "count_physical_cores", lambda: cores)
        expected = extract(slides, tmp_path / "whole")
        deaths, real = [], local_engine.TileEncoder.start
        pools = []
        monkeypatch.setattr(local_engine.TileEncoder, "start", self._killing(deaths, pools, real, after=3))
        self._watch(monkeypatch, pools)
        result = extract(slides, tmp_path / "job", workers=1)
        assert len(deaths) == 1
        assert (result.failed, result.done) == ({}, expected.done)
        assert digests(tmp_path / "job") == digests(tmp_path / "whole")
        assert leftovers(tmp_path / "job") == []

    @staticmethod
    def _watch(monkeypatch, pools):
        real = Decoders.__init__

        def watch(self, workers):
            real(self, workers)
            pools.append(self)

        monkeypatch.setattr(Decoders, "__init__", watch)

    @staticmethod
    def _killing(deaths, pools, real, after):
        calls = []

        def start(self, pixels):
            calls.append(1)
            if len(calls) == after:
                for pid in pools[-1].pids:
                    os.kill(pid, signal.SIGKILL)
                    deaths.append(pid)
            return real(self, pixels)

        return start

    def test_a_slide_that_kills_its_reader_fails_and_says_so(self, slides, tmp_path, monkeypatch):
        # The process starts, and is killed when it is asked for slide "a": as one that runs out of memory there.
        poison = (
            "from ssmamba_models.wsi import decoding\n"
            "import os, signal\n"
            "real = decoding.Decoder.perform\n"
            "def perform(self, task):\n"
            "    if task.slide.name == 'a': os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(self, task)\n"
            "decoding.Decoder.perform = perform\n"
        )
        start = decode_processes._START.replace("serve()", poison.replace("{", "{{") + "serve()")
        monkeypatch.setattr(decode_processes, "_START", start)
        result = extract(slides, tmp_path / "job", workers=1)
        assert result.done == ["b"]
        assert "killed by SIGKILL; memory may be short" in result.failed["a"]
        assert read_summary(tmp_path / "job" / "summary.csv")["a"]["reason"] == result.failed["a"]

    def test_closing_ends_all_processes_at_once(self, slides):
        decoders = Decoders(2)
        task = PrepareTask(find_slides(slides)[0], 1.0, 64, 0, 0.25)
        first = decoders.submit(task)
        waiting = [decoders.submit(task) for _ in range(20)]
        assert len(first.result().coords) > 10
        pids = decoders.pids
        start = time.monotonic()
        decoders.close()
        assert time.monotonic() - start < 10
        assert len(pids) > 0
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert all(future.done() for future in waiting)

    def test_those_started_early_perform_the_first_tasks(self, slides):
        task = PrepareTask(find_slides(slides)[0], 1.0, 64, 0, 0.25)
        with Decoders(2) as decoders:
            decoders.start()
            early = decoders.pids
            decoders.start()
            assert len(early) == 2
            assert [len(decoders.submit(task).result().coords) for _ in range(4)][-1] > 10
            assert decoders.pids == early

    def test_those_that_died_while_nothing_was_asked_are_replaced(self, slides):
        with Decoders(2) as decoders:
            decoders.start()
            early = decoders.pids
            for pid in early:
                os.kill(pid, signal.SIGKILL)
            while decoders.pids:
                time.sleep(0.01)
            task = PrepareTask(find_slides(slides)[0], 1.0, 64, 0, 0.25)
            assert len(decoders.submit(task).result().coords) > 10
            assert len(decoders.pids) == 1
            assert not set(early) & set(decoders.pids)

    def test_they_do_without_torch(self, slides):
        if not os.path.exists("/proc/self/maps"):
            pytest.skip("needs /proc")
        with Decoders(1) as decoders:
            decoders.submit(PrepareTask(find_slides(slides)[0], 1.0, 64, 0, 0.25)).result()
            with open(f"/proc/{decoders.pids[0]}/maps") as maps:
                assert "libtorch" not in maps.read()


class TestFullDisk:
    def test_of_features(self, tmp_path, monkeypatch):
        slides, out = make_slides(tmp_path / "slides"), tmp_path / "job"
        whole = extract(slides, tmp_path / "whole")
        real, calls = slide_run.SlideFeatureWriter.append, []

        def full(self, *arrays):
            calls.append(1)
            # A whole slide and a bit: HDF5 tells the system's number in its text.
            if len(calls) == 10:
                raise OSError(
                    "Can't write data (file write failed: errno = 28, error message = 'No space left on device')"
                )
            return real(self, *arrays)

        monkeypatch.setattr(slide_run.SlideFeatureWriter, "append", full)
        with pytest.raises(OutputError, match=r"the disk is full\); files that were finished are whole: make room"):
            extract(slides, out)
        assert events(out, "done") == ["a"]
        assert [path.name for path in out.rglob("*.h5")] == ["a.h5"]
        assert leftovers(out) == []
        monkeypatch.undo()
        assert extract(slides, out).done == whole.done
        assert digests(out) == digests(tmp_path / "whole")

    @pytest.mark.parametrize(("limit", "grid", "where"), [(6_000, False, "thumbnails"), (256_000, True, "a.h5")])
    def test_by_the_system_itself(self, tmp_path, limit, grid, where):
        """A limit to the size of files stops HDF5 as a full disk does: in the middle of a write."""
        resource = pytest.importorskip("resource")
        slides, out = make_slides(tmp_path / "slides", "a"), tmp_path / "job"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OutputError, match=f"cannot write .*{where}"):
                extract(slides, out, grid=grid)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(out.rglob("*.h5")) == []
        assert leftovers(out) == []
        assert extract(slides, out, grid=grid).done == ["a"]

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        slides, out = make_slides(tmp_path / "slides", "a"), tmp_path / "job"
        out.mkdir()
        (out / "thumbnails").write_text("a file where the folder should be")
        with pytest.raises(OutputError, match="cannot write"):
            extract(slides, out)


def test_reasons_stay_on_one_line_of_the_table(ended):
    out, _ = ended
    with open(out / "summary.csv", newline="") as file:
        assert all("\n" not in cell for row in csv.reader(file) for cell in row)


def test_a_slide_that_vanishes(tmp_path):
    file = SlideFile(str(tmp_path / "gone.tif"), "gone")
    with Decoders(0) as decoders, pytest.raises(FileNotFoundError, match="gone"):
        decoders.submit(PrepareTask(file, 1.0, 64, 0, 0.25)).result()


def test_tissue_that_fills_no_tile_is_told_from_none(tmp_path):
    make_slides(tmp_path / "s", "a")
    extract(tmp_path / "s", tmp_path / "job", min_tissue=1.0, tile_size=448)
    row = read_summary(tmp_path / "job" / "summary.csv")["a"]
    assert (row["status"], row["reason"]) == ("no tissue", "no tile has --min-tissue 1 of tissue")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tile_size": 20_000}, "tile_size is 20000 px, expected 1 to 16384"),
        ({"batch_size": 10**12}, "two batches of 1000000000000 tiles do not fit into memory"),
    ],
)
def test_more_than_memory_holds(tmp_path, settings, said):
    make_slides(tmp_path / "s", "a")
    with pytest.raises(ValueError, match=said):
        extract(tmp_path / "s", tmp_path / "job", **settings)


def test_a_slide_named_as_the_jobs_lock(tmp_path):
    make_pyramid(tmp_path / "-job-.tif", (300, 300), mpp=0.5)
    with pytest.raises(ValueError, match="name of the job's own lock; rename it"):
        extract(tmp_path / "-job-.tif", tmp_path / "job")
