"""Checkpoints are whole or not there, and only data."""

import errno
import os

import pytest
import torch

from ssmamba_models.engine.checkpoints import Checkpoints, save_weights
from ssmamba_models.engine.weights import read_weights


def state(step):
    return {"step": step, "values": torch.full((1000,), float(step))}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def silent(text):
    raise AssertionError(text)


def test_the_newest_are_kept(checkpoints):
    for step in (5, 90, 100_000_000, 7_000_000_000):
        checkpoints.save(step, state(step))
    assert [path.name for path in checkpoints.paths()] == ["step-100000000.pt", "step-7000000000.pt"]
    assert torch.equal(checkpoints.load(silent)["values"], torch.full((1000,), 7e9))


def test_none(checkpoints):
    assert checkpoints.load(silent) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "code"])
def test_a_damaged_one_is_passed_over(checkpoints, damage):
    checkpoints.save(1, state(1))
    newest = checkpoints.save(2, state(2))
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "flipped":
        content[content.find(torch.full((8,), 2.0).numpy().tobytes()) + 3] ^= 255
        newest.write_bytes(content)
    else:
        torch.save({"step": 2, "harm": os.system}, newest)
    told = []
    assert checkpoints.load(told.append)["step"] == 1
    assert len(told) == 1
    assert "step-00000002.pt' is damaged" in told[0]


def test_going_back_behind_a_damaged_one_never_loses_the_good(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(20, state(20)).write_bytes(b"damaged")
    checkpoints.save(12, state(12))
    assert [path.name for path in checkpoints.paths()] == ["step-00000012.pt"]


def test_what_the_machine_refuses_to_read_is_not_damaged(checkpoints, monkeypatch):
    for step in (1, 2):
        checkpoints.save(step, state(step))

    def refuse(*arguments, **named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", refuse)
    with pytest.raises(PermissionError):
        checkpoints.load(pytest.fail)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_machine_short_of_memory_is_no_damage(checkpoints, monkeypatch, error):
    """The run would go back, and in time remove the newest, which is whole."""
    for step in (1, 2):
        checkpoints.save(step, state(step))

    def refuse(*arguments, **named):
        raise error

    monkeypatch.setattr("torch.load", refuse)
    with pytest.raises(OSError, match=r"the memory is too short to read it: .*step-00000002"):
        checkpoints.load(pytest.fail)


def test_all_damaged(checkpoints):
    checkpoints.save(1, state(1)).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoints.load(lambda text: None)


def test_a_full_disk(checkpoints, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""
    checkpoints.save(1, state(1))

    def full(value, path):
        with open("/dev/full", "wb") as file:
            torch.serialization.save(value, file)

    monkeypatch.setattr("ssmamba_models.engine.checkpoints.torch.save", full)
    with pytest.raises(
        OSError, match=r"cannot write .*step-00000002\.pt.*No space left.*needs about 0 MB.*MB are free"
    ):
        checkpoints.save(2, state(2))
    assert os.listdir(checkpoints.folder) == ["step-00000001.pt"]
    assert checkpoints.load(silent)["step"] == 1


def test_leftovers_of_a_killed_process_are_removed(checkpoints):
    checkpoints.save(1, state(1))
    (checkpoints.folder / ".step-00000002.0badcafe.part.pt").write_bytes(b"half")
    checkpoints.clean()
    assert os.listdir(checkpoints.folder) == ["step-00000001.pt"]


def test_weights(tmp_path):
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    tensors = {"weight": weight.bfloat16(), "count": torch.tensor(3)}
    save_weights(tmp_path / "w.safetensors", tensors, {"model": "m"})
    read, metadata = read_weights(tmp_path / "w.safetensors")
    assert metadata == {"model": "m"}
    assert read["weight"].dtype == torch.float32
    assert torch.equal(read["weight"], weight.bfloat16().float())
    assert read["count"] == 3
    (tmp_path / "usual").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
