"""HDF5 on a disk that is full: an error, where HDF5 alone takes the process with it."""

import gc
import os
import signal
import threading

import numpy as np
import pytest

from ssmamba_models.data.careful_file import create_hdf5
from ssmamba_models.data.convert import convert_features
from ssmamba_models.data.features import write_slide_features
from ssmamba_models.data.slide_vectors import SlideVectors, write_slide_vectors
from ssmamba_models.data.tile_files import write_features
from ssmamba_models.stopping import stopped_in_order, stops_wait

h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
resource = pytest.importorskip("resource", reason="the limit that stands for a full disk")

GEOMETRY = {"patch_size": 64, "patch_size_level0": 128, "overlap": 0, "level0_mpp": 0.5, "target_mpp": 1.0}
GEOMETRY |= {"level0_width": 1000, "level0_height": 1000, "name": "a"}
LIMIT = 300_000


@pytest.fixture
def small_disk():
    """No file may grow beyond LIMIT bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_what_hdf5_alone_would_write(tmp_path):
    values = np.random.default_rng(0).normal(size=(500, 64))
    with create_hdf5(tmp_path / "ours.h5") as (file, disk):
        file.create_dataset("values", data=values, chunks=(64, 64), track_times=False)
        disk.check()
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file.create_dataset("values", data=values, chunks=(64, 64), track_times=False)
    assert (tmp_path / "ours.h5").read_bytes() == (tmp_path / "theirs.h5").read_bytes()


def test_a_full_disk_is_an_error(tmp_path, small_disk):
    with pytest.raises(OSError, match="too large"), create_hdf5(tmp_path / "a.h5") as (file, _):
        file.create_dataset("values", data=np.zeros((1000, 1000)))
    del file
    gc.collect()  # this is where HDF5 took its leave
    assert (tmp_path / "a.h5").stat().st_size <= LIMIT


def test_features_notice_it_soon_and_leave_nothing(tmp_path, small_disk):
    batch, coords, written = np.zeros((256, 96), np.float32), np.zeros((256, 2), np.int64), []

    def write():
        with write_slide_features(tmp_path / "a.h5", 96, coords_attributes=GEOMETRY, attributes={}) as writer:
            for count in range(1000):
                writer.append(batch, coords)
                written.append(count)

    with pytest.raises(OSError, match="too large"):
        write()
    assert len(written) < 300  # of 100 kB each; HDF5 keeps some MB to itself
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "a.h5").write_text("mine")
    with pytest.raises(FileExistsError), create_hdf5(tmp_path / "a.h5"):
        pass
    assert (tmp_path / "a.h5").read_text() == "mine"


def test_features_of_tile_folders_notice_it_too(tmp_path, small_disk):
    batch, paths = np.zeros((256, 96), np.float32), [f"{number}.png" for number in range(256)]

    def write():
        with write_features(tmp_path / "a.h5", 96, labelled=False, attributes={}) as writer:
            for _ in range(300):
                writer.append(batch, paths)

    with pytest.raises(OSError, match="too large"):
        write()
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def stop_in_write(monkeypatch, number, sign):
    """Have the signal come in the `number`-th write of HDF5; says whether there was one so late."""
    from ssmamba_models.data.careful_file import CarefulFile

    seen, write = [], CarefulFile.write

    def writing(self, data):
        seen.append(len(data))
        if len(seen) == number:
            os.kill(os.getpid(), sign)
        return write(self, data)

    monkeypatch.setattr(CarefulFile, "write", writing)
    return lambda: len(seen) >= number


def write_tiles(path):
    batch, paths = np.ones((300, 2000), np.float32), [f"{number}.png" for number in range(300)]
    with write_features(path, 2000, labelled=False, attributes={"model": "m"}) as writer:
        for _ in range(3):
            writer.append(batch, paths)


def write_slide(path):
    batch, coords = np.ones((300, 2000), np.float32), np.zeros((300, 2), np.int64)
    with write_slide_features(path, 2000, coords_attributes=GEOMETRY, attributes={}) as writer:
        for _ in range(3):
            writer.append(batch, coords)


def write_vectors(path):
    write_slide_vectors(path, SlideVectors(("a", "b"), np.ones((2, 3000)), {"mean_pool": np.ones((2, 5))}))


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def convert(path):
    """What `write_slide` wrote, with token maps, in TRIDENT's layout."""
    source = path.parent.with_name("source") / "a.h5"
    if not source.exists():
        source.parent.mkdir()
        attributes = {"model": "m", "weights_sha256": "0" * 64}
        with write_slide_features(
            source, 500, coords_attributes=GEOMETRY, attributes=attributes, grid_shape=(2, 2)
        ) as writer:
            writer.append(np.ones((300, 500)), np.zeros((300, 2), np.int64), np.ones((300, 2, 2, 500)))
    done = convert_features(source, path.parent, source_layout="ssmamba", target_layout="trident")
    assert not done.failed


@pytest.mark.parametrize("write", [write_tiles, write_slide, write_vectors, convert])
@pytest.mark.parametrize(("sign", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stop_in_any_write_of_hdf5_is_heard_and_leaves_nothing(tmp_path, monkeypatch, write, sign, raised):
    out = tmp_path / "out"
    out.mkdir()
    write(out / "a.h5")
    (made,) = files(out)
    made.unlink()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number in range(1, 200):
            came = stop_in_write(monkeypatch, number, sign)
            try:
                with stopped_in_order():
                    write(out / "a.h5")
                stopped = False
            except raised:
                stopped = True
            monkeypatch.undo()
            if not came():
                break
            assert stopped, f"the stop in write {number} was lost"
            assert files(out) == []
    finally:
        signal.signal(signal.SIGINT, before)
    assert number > 5
    assert files(out) == [made]


def test_a_second_sigterm_does_not_disturb_the_cleaning_up(tmp_path):
    done = []

    def end():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(True)

    with pytest.raises(SystemExit) as stop, stopped_in_order():
        end()
    assert (stop.value.code, done) == (143, [True])


def test_a_stop_in_another_thread_than_the_main_one_changes_nothing():
    seen = []

    def run():
        with stopped_in_order(), stops_wait():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
