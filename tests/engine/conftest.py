"""Runs that several tests of the engine look at."""

import pytest
import torch
from pretrain_cases import run_of


@pytest.fixture(scope="module")
def unbroken(labelled_tiles, tmp_path_factory):
    """A run of six steps, and what `pretrain` returned."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run_of(labelled_tiles, out, reconstruct_every=2)
    torch.set_num_threads(threads)
    return out, result
