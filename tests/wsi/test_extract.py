"""Extraction on this machine: the job folder, the same bytes however it is run, resuming, refusing to mix."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import FEATURES, TILE, TINY, cut, digests, disc, events, extract, leftovers, make_slides
from slide_files import blank, make_pyramid

from ssmamba_models.data.feature_check import check_slide_features
from ssmamba_models.data.features import read_slide_features
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.locks import Locks
from ssmamba_models.wsi import local_engine, turns
from ssmamba_models.wsi.decode_processes import Decoders
from ssmamba_models.wsi.decoding import Decoder, ReadTask
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.status import read_summary
from ssmamba_models.wsi.tile_encoder import TileEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("extract") / "slides")


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """A job that ran through; not to be written in."""
    out = tmp_path_factory.mktemp("whole") / "job"
    extract(slides, out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """The same, to be spoiled at will."""
    return shutil.copytree(whole, tmp_path / "job")


class TestOutputs:
    def test_the_folder(self, whole):
        assert sorted(path.name for path in whole.iterdir()) == sorted(
            ["thumbnails", "contours", FEATURES.partition("/")[0], "summary.csv", "status.jsonl", "config.yaml"]
        )
        assert sorted(path.name for path in (whole / FEATURES).iterdir()) == ["a.h5", "b.h5", "c.h5"]
        assert sorted(path.name for path in (whole / "thumbnails").iterdir()) == ["a.png", "b.png", "c.png"]
        assert len(list((whole / "contours").glob("*.geojson"))) == 3
        assert leftovers(whole) == []

    def test_features_are_those_of_the_tiles(self, slides, whole):
        read = read_slide_features(whole / FEATURES / "a.h5")
        encoder = load_encoder("test_ssmamba", img_size=TILE)
        with open_slide(slides / "a.tif") as slide:
            tiles = [slide.read_region(x, y, TILE, TILE, 1.0) for x, y in read.coords]
        mean, std = (np.array(encoder.data_config[key], np.float32) for key in ("mean", "std"))
        images = torch.from_numpy(((np.stack(tiles) / np.float32(255) - mean) / std).astype(np.float32))
        expected = encoder.embed(images.permute(0, 3, 1, 2))
        assert len(tiles) > 20
        np.testing.assert_allclose(read.features, expected.numpy(), atol=1e-5)

    def test_files_pass_the_check_and_tell_their_origin(self, whole):
        path = whole / FEATURES / "a.h5"
        read = read_slide_features(path)
        assert check_slide_features(path) == []
        assert (read.patch_size, read.patch_size_level0, read.target_mpp, read.level0_mpp) == (TILE, 2 * TILE, 1.0, 0.5)
        assert (read.level0_width, read.level0_height, read.name) == (1600, 1200, "a")
        assert read.attributes["model"] == "test_ssmamba"
        assert len(read.attributes["weights_sha256"]) == len(read.attributes["configuration_hash"]) == 64
        assert read.attributes["crop_pct"] == 1.0
        assert read.attributes["tiles_in_grid"] == len(read.coords)

    def test_summary(self, whole):
        rows = read_summary(whole / "summary.csv")
        assert list(rows) == ["a", "b", "c"]
        row = rows["a"]
        tiles = len(read_slide_features(whole / FEATURES / "a.h5").coords)
        assert (row["status"], row["tiles"], row["bad_tiles"]) == ("done", str(tiles), "0")
        assert (float(row["mpp"]), row["mpp_source"], float(row["mpp_error"])) == (0.5, "openslide.mpp-x", 0)
        assert 0.1 < float(row["tissue_share"]) < 0.9
        assert float(row["seconds"]) > 0

    def test_float16_and_token_maps(self, slides, whole, tmp_path):
        extract(slides / "a.tif", tmp_path / "job", dtype="float16", grid=True)
        single = read_slide_features(whole / FEATURES / "a.h5")
        read = read_slide_features(tmp_path / "job" / FEATURES / "a.h5", grid=True)
        assert read.features.dtype == read.grid.dtype == np.float16
        np.testing.assert_allclose(read.features, single.features, rtol=2e-3, atol=2e-3)
        assert read.grid.shape[0] == len(read.features)
        assert read.grid.ndim == 4
        encoder = load_encoder("test_ssmamba", img_size=TILE)
        pooled = encoder.model.forward_head(torch.from_numpy(read.grid.astype(np.float32)))
        np.testing.assert_allclose(pooled, single.features, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("model", ["test_ssmamba", "test_vit", "test_resnet"])
    @pytest.mark.parametrize("pool", ["model", "mean_std", "mean_std_last2"])
    def test_features_do_not_depend_on_token_maps(self, model, pool):
        encoder = load_encoder(model, pool=pool)
        side = encoder.data_config["input_size"][1]
        pixels = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
        plain, grid = TileEncoder(encoder), TileEncoder(encoder, grid=True)
        features, maps = grid.finish(grid.start(pixels))
        np.testing.assert_array_equal(features, plain.finish(plain.start(pixels))[0])
        assert maps.shape == (2, *grid.grid_shape)
        assert maps.shape[1] == maps.shape[2] > 1

    def test_a_model_that_refuses_its_maps_is_named_with_a_cure_that_helps(self):
        """Hiera refuses to normalise intermediate maps."""
        with pytest.raises(ValueError, match=r"^Hiera does not give its last 1 maps .*; leave --grid out$"):
            TileEncoder(load_encoder("hiera_tiny_224"), grid=True)

    def test_the_deviation_beside_the_mean(self, slides, whole, tmp_path):
        extract(slides / "a.tif", tmp_path / "job", pool="mean_std")
        single = read_slide_features(whole / FEATURES / "a.h5")
        read = read_slide_features(tmp_path / "job" / FEATURES / "a.h5")
        assert read.attributes["pool"] == "mean_std"
        assert "pool" not in single.attributes
        assert read.features.shape[1] == 2 * single.features.shape[1]
        assert extract(slides / "a.tif", tmp_path / "job", pool="mean_std").new == 0

    def test_tiles_of_another_size_are_resized_whole(self, slides, tmp_path):
        extract(slides / "a.tif", tmp_path / "job", tile_size=96)
        read = read_slide_features(next((tmp_path / "job").rglob("a.h5")))
        assert read.patch_size == 96
        assert read.attributes["input_size"] == [3, TILE, TILE]
        assert np.isfinite(read.features).all()

    @pytest.mark.parametrize(
        ("levels", "size"), [((1, 4), (800, 600)), ((1, 2, 8), (1024, 768)), ((1, 2, 5), (640, 480))]
    )
    def test_a_thumbnail_is_a_level_as_it_is_where_that_is_large_enough(self, tmp_path, levels, size):
        make_pyramid(tmp_path / "a.tif", (3200, 2400), mpp=0.5, levels=levels, content=disc)
        extract(tmp_path / "a.tif", tmp_path / "job")
        with Image.open(tmp_path / "job" / "thumbnails" / "a.png") as picture:
            assert picture.size == size

    def test_a_real_slide(self, data_root, tmp_path):
        path = data_root / "slides" / "cmu-1-small-region.svs"
        result = extract(path, tmp_path / "job", mpp=2.0, workers=1)
        read = read_slide_features(result.features / "cmu-1-small-region.h5")
        assert result.done == ["cmu-1-small-region"]
        assert read.level0_mpp == pytest.approx(0.499)
        assert read.patch_size_level0 == pytest.approx(TILE * 2.0 / 0.499)
        assert len(read.coords) > 30


class TestSameBytes:
    def test_whatever_the_processes(self, slides, whole, tmp_path):
        extract(slides, tmp_path / "job", workers=2)
        assert digests(tmp_path / "job") == digests(whole)

    def test_whatever_the_neighbours(self, slides, whole, tmp_path):
        extract(slides / "b.tif", tmp_path / "job")
        assert digests(tmp_path / "job") == {
            name: value for name, value in digests(whole).items() if Path(name).stem == "b"
        }

    def test_whatever_the_shards(self, slides, whole, tmp_path):
        out = tmp_path / "job"
        second = extract(slides, out, shard=(2, 2))
        assert second.new == 3  # the first shard does nothing, so the second helps it
        assert events(out, "started") == ["b", "a", "c"]
        assert extract(slides, out, shard=(1, 2)).new == 0
        assert digests(out) == digests(whole)

    def test_whatever_is_there_already(self, slides, whole, copy):
        (copy / FEATURES / "a.h5").unlink()
        data = (copy / FEATURES / "c.h5").read_bytes()
        (copy / FEATURES / "c.h5").write_bytes(data[: len(data) // 2])
        assert extract(slides, copy).new == 2
        assert digests(copy) == digests(whole)


class TestTurns:
    """On a CPU whose cores the model takes all, tiles are read while it waits, unless that takes long."""

    @pytest.fixture
    def reads(self, monkeypatch):
        """For each batch that the model takes, how many chunks of tiles are still read or waited for."""
        chunks, unread = [], []
        submit, start = Decoders.submit, TileEncoder.start

        def watch_submit(decoders, task):
            future = submit(decoders, task)
            if isinstance(task, ReadTask):
                chunks.append(future)
            return future

        def watch_start(encoder, pixels):
            # Slow enough for reading to begin meanwhile, if it is to.
            time.sleep(0.02)
            unread.append(len(chunks) - sum(future in taken or future.done() for future in chunks))
            taken.update(chunks[: len(chunks) - unread[-1]])
            return start(encoder, pixels)

        taken = set()
        monkeypatch.setattr(Decoders, "submit", watch_submit)
        monkeypatch.setattr(TileEncoder, "start", watch_start)
        return unread

    @pytest.fixture
    def all_cores(self, monkeypatch):
        monkeypatch.setattr(turns, "count_physical_cores", lambda: 1)

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_the_same_bytes_in_turn(self, slides, whole, tmp_path, all_cores, workers):
        extract(slides, tmp_path / "job", workers=workers)
        assert digests(tmp_path / "job") == digests(whole)

    def test_nothing_is_read_while_the_model_computes(self, slides, tmp_path, monkeypatch, all_cores, reads):
        monkeypatch.setattr(turns, "_LONG_READING", 1.0)  # this model is faster than any reading
        extract(slides, tmp_path / "job", workers=1)
        assert len(reads) > 10
        assert set(reads) == {0}

    def test_tiles_come_before_the_tissue_of_later_slides(self, slides, tmp_path, monkeypatch, all_cores):
        tasks, perform = [], Decoder.perform

        def watch(decoder, task):
            tasks.append((type(task).__name__, task.slide.name))
            return perform(decoder, task)

        monkeypatch.setattr(Decoder, "perform", watch)
        extract(slides, tmp_path / "job")
        first = tasks[0][1]
        assert tasks[:2] == [("PrepareTask", first), ("ReadTask", first)]
        assert sorted(name for kind, name in tasks if kind == "PrepareTask") == ["a", "b", "c"]

    @pytest.fixture
    def clock(self, monkeypatch):
        """Time as `clock.sleep` makes it: a busy machine's would be another."""
        now = [0.0]
        monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
        return SimpleNamespace(sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))

    def test_one_long_wait_does_not_end_the_turns(self, clock):
        taking = turns.Turns(torch.device("cpu"))
        taking.kept = True
        for seconds in (0.2, 0, 0, 0, 0, 0.2, 0, 0):
            self._batch(clock, taking, reading=seconds)
        assert taking.kept
        for _ in range(16):
            self._batch(clock, taking, reading=0.01)
        assert not taking.kept

    def test_small_batches_that_are_read_together_are_one_turn(self, clock):
        """A slide's last few tiles come with the next slide's batch: what that takes is not theirs alone."""
        taking = turns.Turns(torch.device("cpu"))
        taking.kept = True
        for _ in range(8):
            self._batch(clock, taking, reading=0.01)
            with taking.computing():
                clock.sleep(0.1)
        assert taking.kept

    def test_slides_without_tissue_are_prepared_two_at_a_time(self, tmp_path, monkeypatch):
        (tmp_path / "slides").mkdir()
        for name in "abcdef":
            make_pyramid(tmp_path / "slides" / f"{name}.tif", (1600, 1200), mpp=0.5, content=blank)
        pending, most, submit = [], [], Decoders.submit

        def watch(decoders, task):
            future = submit(decoders, task)
            pending.append(future)
            most.append(sum(not other.done() for other in pending))
            return future

        perform = Decoder.perform
        monkeypatch.setattr(Decoder, "perform", lambda decoder, task: (time.sleep(0.1), perform(decoder, task))[1])
        monkeypatch.setattr(Decoders, "submit", watch)
        extract(tmp_path / "slides", tmp_path / "job")
        assert len(most) == 6
        assert sorted(most)[-4:] == [2, 2, 2, 2]

    @staticmethod
    def _batch(clock, taking, reading):
        with taking.reading():
            clock.sleep(reading)
        with taking.computing():
            clock.sleep(0.01)

    def test_cores_that_the_model_leaves_read_ahead(self, slides, tmp_path, monkeypatch, reads):
        monkeypatch.setattr(turns, "count_physical_cores", lambda: 2)
        self._read_slowly(monkeypatch)
        extract(slides, tmp_path / "job")
        assert max(reads[:3]) > 0

    def test_slow_reading_goes_on_ahead(self, slides, whole, tmp_path, monkeypatch, all_cores, reads):
        self._read_slowly(monkeypatch)
        extract(slides, tmp_path / "job")
        assert reads[:5] == [0, 0, 0, 0, 0]
        assert max(reads[5:]) > 0
        assert digests(tmp_path / "job") == digests(whole)

    @staticmethod
    def _read_slowly(monkeypatch):
        perform = Decoder.perform

        def slowly(decoder, task):
            time.sleep(0.1 if isinstance(task, ReadTask) else 0)
            return perform(decoder, task)

        monkeypatch.setattr(Decoder, "perform", slowly)


class TestResume:
    def test_nothing_is_done_twice(self, slides, copy):
        before = digests(copy, ("*",))
        result = extract(slides, copy)
        assert (result.new, sorted(result.done)) == (0, ["a", "b", "c"])
        assert digests(copy, ("*.h5", "*.yaml", "*.csv")) == {
            name: value for name, value in before.items() if name.endswith((".h5", ".yaml", ".csv"))
        }

    def test_a_file_whose_process_could_not_tell_is_told_of(self, slides, copy):
        (copy / "status.jsonl").write_text('{"slide": "a", "status": "started"}\n{"slide": "b", "sta')
        assert extract(slides, copy).new == 0
        assert sorted(event for line in (copy / "status.jsonl").open() if (event := line.count('"done"'))) == [1, 1, 1]
        row = read_summary(copy / "summary.csv")["a"]
        assert (row["status"], row["mpp"], row["bad_tiles"], row["seconds"]) == ("done", "0.5", "0", "")

    def test_rests_of_a_killed_process_go(self, slides, copy):
        (copy / FEATURES / "a.h5").unlink()
        rests = [
            copy / FEATURES / ".a.0123abcd.part.h5",
            copy / "thumbnails" / ".a.0123abcd.part.png",
            copy / "contours" / ".a.0123abcd.part.geojson",
            copy / ".summary.0123abcd.part.csv",
            copy / FEATURES / ".ssmamba-probe-0123abcd",
        ]
        for path in rests:
            path.write_text("half")
        extract(slides, copy)
        assert leftovers(copy) == []

    def test_a_slide_that_changed_is_done_again(self, slides, copy, tmp_path):
        shutil.copytree(slides, tmp_path / "slides")
        os.replace(tmp_path / "slides" / "b.tif", tmp_path / "slides" / "a.tif")
        assert extract(tmp_path / "slides", copy).new == 1
        assert read_slide_features(copy / FEATURES / "a.h5").level0_width == 1440

    def test_ctrl_c_leaves_whole_files_only(self, slides, tmp_path, monkeypatch, whole):
        out, real, calls = tmp_path / "job", local_engine.TileEncoder.start, []

        def interrupted(self, pixels):
            calls.append(len(pixels))
            if len(calls) == 9:
                raise KeyboardInterrupt
            return real(self, pixels)

        monkeypatch.setattr(local_engine.TileEncoder, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract(slides, out)
        assert leftovers(out) == []
        monkeypatch.undo()
        extract(slides, out)
        assert digests(out) == digests(whole)

    def test_sigterm_ends_in_order(self, slides, tmp_path, monkeypatch):
        monkeypatch.setattr(
            local_engine.TileEncoder, "start", lambda self, pixels: os.kill(os.getpid(), signal.SIGTERM)
        )
        with pytest.raises(SystemExit) as stop:
            extract(slides, tmp_path / "job")
        assert stop.value.code == 128 + signal.SIGTERM
        assert leftovers(tmp_path / "job") == []


class TestRefusing:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"model": "test_vit"}, "model was 'test_ssmamba', now 'test_vit'"),
            ({"seed": 1}, "weights_sha256 was"),
            ({"mpp": 0.75}, "mpp was 1.0, now 0.75"),
            ({"tile_size": 96}, "tile_size was 64, now 96"),
            ({"overlap": 8}, "overlap was 0, now 8"),
            ({"min_tissue": 0.5}, "min_tissue was 0.25, now 0.5"),
            ({"dtype": "float16"}, "dtype was 'float32', now 'float16'"),
            ({"grid": True}, "grid was False, now True"),
            ({"pool": "mean_std"}, "pool was .*, now 'mean_std'"),
            ({"precision": "bf16"}, "precision was 'float32', now 'bfloat16'"),
        ],
    )
    def test_a_job_does_not_mix(self, slides, whole, changes, named):
        before = digests(whole, ("*",))
        with pytest.raises(ValueError, match=named):
            extract(slides, whole, **changes)
        assert digests(whole, ("*",)) == before

    def test_a_job_of_another_kind_is_told(self, slides, whole, tmp_path):
        with pytest.raises(ValueError, match=r"not one that makes tiles \(its config.yaml has .*model.*\); choose"):
            cut(slides, whole)
        cut(slides / "a.tif", tmp_path / "tiles")
        with pytest.raises(ValueError, match=r"not one that makes features .*image_format, quality"):
            extract(slides / "a.tif", tmp_path / "tiles")

    def test_hashes_are_told_in_short(self, slides, whole):
        with pytest.raises(ValueError, match=r"weights_sha256 was '[0-9a-f]{12}\.\.\.', now '[0-9a-f]{12}\.\.\.'"):
            extract(slides, whole, seed=1)

    @pytest.mark.parametrize("option", [{"num_cpus": 4}, {"num_gpus": 1}, {"max_retries": 0}])
    def test_options_of_ray_without_ray(self, option):
        with pytest.raises(ValueError, match=r"only Ray's tasks have it; add --engine ray"):
            ExtractPlan(**option)
        ExtractPlan(**option, engine="ray")

    def test_another_mpp_of_a_slide_that_is_done(self, slides, copy):
        with pytest.raises(ValueError, match=r"a\.h5' was extracted at 0.5 um .* now 0.25 is"):
            extract(slides, copy, mpp_override=0.25)
        assert extract(slides, copy, mpp_override=0.5).new == 0

    def test_two_slides_of_one_name(self, slides, tmp_path):
        shutil.copytree(slides, tmp_path / "slides" / "first")
        shutil.copytree(slides, tmp_path / "slides" / "second")
        with pytest.raises(ValueError, match="two slides are called 'a'"):
            extract(tmp_path / "slides", tmp_path / "job")
        assert not (tmp_path / "job").exists()

    def test_folders_that_are_no_job(self, slides, whole, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").touch()
        with pytest.raises(FileExistsError, match="holds other files than a job's"):
            extract(slides, tmp_path / "mine")
        shutil.copytree(whole, tmp_path / "job")
        (tmp_path / "job" / "config.yaml").unlink()
        with pytest.raises(FileExistsError, match=r"feature files, but no config\.yaml"):
            extract(slides, tmp_path / "job")
        with pytest.raises(FileNotFoundError, match="create it"):
            extract(slides, tmp_path / "missing" / "job")
        with pytest.raises(ValueError, match="name the folder to write"):
            extract(slides, "")
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="is a file"):
            extract(slides, tmp_path / "file")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"overlap": 64}, "overlap must be 0 or more and smaller"),
            ({"mpp": 0}, "micrometres per pixel"),
            ({"mpp_override": -1}, "mpp_override"),
            ({"min_tissue": 1.5}, "min_tissue is 1.5"),
            ({"max_bad_tiles": -0.1}, "max_bad_tiles is -0.1"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"workers": -1}, "workers is -1"),
            ({"dtype": "int8"}, "dtype is 'int8'"),
            ({"engine": "spark"}, "engine is 'spark'"),
        ],
    )
    def test_plans(self, changes, message):
        with pytest.raises(ValueError, match=message):
            ExtractPlan(**{**TINY, **changes})


class TestTwoProcesses:
    def test_a_slide_in_other_hands_is_left_alone(self, slides, tmp_path):
        out = tmp_path / "job"
        out.mkdir()
        (out / ".locks").mkdir()
        with Locks(out / ".locks") as others:
            lock = others.acquire("b")
            result = extract(slides, out)
            assert (sorted(result.done), result.unfinished) == (["a", "c"], ["b"])
            assert not (out / FEATURES / "b.h5").exists()
            assert lock.held
        assert extract(slides, out).new == 1

    def test_who_slept_so_long_that_it_lost_its_lock_writes_nothing(self, slides, tmp_path, monkeypatch):
        out, real, taken = tmp_path / "job", local_engine.TileEncoder.finish, []

        def steal(started):
            if not taken:
                path = out / ".locks" / "a.0.lock"
                said = json.loads(path.read_text())
                path.write_text(json.dumps({**said, "pid": 2**22 + 1, "started": "1"}))
                taken.append(Locks(out / ".locks").acquire("a"))
            return real(started)

        monkeypatch.setattr(local_engine.TileEncoder, "finish", staticmethod(steal))
        result = extract(slides / "a.tif", out)
        assert taken[0].held
        assert (result.done, result.unfinished) == ([], ["a"])
        assert list(out.rglob("*.h5")) == []
        taken[0].release()
