"""Folders of feature files: none is passed over because it cannot be listed, or is a link."""

import os

import pytest

from ssmamba_models.data.hdf5 import hdf5_files


@pytest.fixture
def folder(tmp_path):
    for name in ("mine/a.h5", "theirs/b.H5", "theirs/notes.txt", ".hidden/c.h5", "mine/.d.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_folder_that_cannot_be_listed(folder, make_unlistable):
    assert hdf5_files(folder) == [folder / "mine" / "a.h5", folder / "theirs" / "b.H5"]
    make_unlistable("theirs")
    with pytest.raises(OSError, match=r"theirs' cannot be searched \(Permission denied\)"):
        hdf5_files(folder)


def test_links_to_folders(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "e.h5").touch()
    os.symlink(other, folder / "linked")
    os.symlink(folder, other / "circle")
    assert [path.name for path in hdf5_files(folder)] == ["e.h5", "a.h5", "b.H5"]
