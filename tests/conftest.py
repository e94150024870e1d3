"""Fixtures for all tests: real data where it is, small folders of tiles, and the command line."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: two test processes, each on all cores, get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from click.testing import CliRunner

from ssmamba_models.data.synthetic import write_synthetic_tiles


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data: SSMAMBA_DATA, or ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("SSMAMBA_DATA") or beside)
    if not root.is_dir():
        pytest.skip(f"no real data in {root}; set SSMAMBA_DATA")
    return root


@pytest.fixture(scope="session")
def labelled_tiles(tmp_path_factory) -> Path:
    """Nine synthetic tiles of 64 px in three class folders; not to be written in."""
    return write_synthetic_tiles(tmp_path_factory.mktemp("labelled"), tiles_per_kind=3, size=64)


@pytest.fixture
def make_unlistable(monkeypatch):
    """A function: from its call on, folders of the name cannot be listed. (Permissions alone do not stop root.)"""
    scandir = os.scandir

    def make(name):
        def refuse(path):
            if os.fspath(path).endswith(name):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return make


@pytest.fixture
def one_thread(monkeypatch):
    """Compute on one thread, in child processes too.

    Tiny models gain nothing from more, and lose a hundredfold on a machine whose cores are busy.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ssmamba():
    """Run `ssmamba ARGUMENT...` in this process; returns click's result."""
    from ssmamba_models.cli.main import main

    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])
