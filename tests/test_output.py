"""Outputs are checked before a run, and are whole or not there after it."""

import os
from pathlib import Path

import pytest

from ssmamba_models.output import check_output, is_unfinished, remove_unfinished, whole_file


def test_a_writable_place_is_left_as_it_was(tmp_path):
    assert check_output(tmp_path / "f.h5") == tmp_path / "f.h5"
    assert os.listdir(tmp_path) == []


def test_a_bare_name_means_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_file("f.txt") as part:
        part.write_text("x")
    assert os.listdir(tmp_path) == ["f.txt"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        check_output(tmp_path / "no" / "f.h5")


@pytest.mark.parametrize("inside", ["f.h5", "deep/f.h5"])
def test_a_file_where_a_folder_should_be(tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        check_output(tmp_path / "file" / inside)


def test_a_folder_where_a_file_should_be(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_output(tmp_path, overwrite=True)


def test_read_only_folder(tmp_path, monkeypatch):
    # root writes everywhere, so the refusal is played.
    def refuse(self, *rest, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(PermissionError, match=r"cannot write in the output's folder.*choose a writable"):
        check_output(tmp_path / "f.h5")


def test_the_part_keeps_the_suffix_and_hides(tmp_path):
    with whole_file(tmp_path / "f.png") as part:
        assert part.suffix == ".png"
        assert part.name.startswith(".")
        part.write_bytes(b"whole")
    assert (tmp_path / "f.png").read_bytes() == b"whole"


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def write_half():
        with whole_file(tmp_path / "f.png") as part:
            part.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert os.listdir(tmp_path) == []


def test_what_killed_processes_leave_is_removed_and_nothing_else(tmp_path):
    left = [".ssmamba-probe-0123abcd", ".a.0123abcd.part.png", ".a.0123abcd.part"]
    kept = [".hidden", "a.part", ".ssmamba-probe-mine"]
    for name in left + kept:
        (tmp_path / name).touch()
    assert [name for name in left + kept if is_unfinished(name)] == left
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
