"""Fuzzing: the budget, and the process in which broken files are read."""

import pytest
from reading import Readers


@pytest.fixture(scope="session")
def readers():
    """A process that reads files, and lives on where one of them kills its reader."""
    readers = Readers()
    yield readers
    readers.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the files of a module; each example writes over the last one's."""
    return tmp_path_factory.mktemp("fuzz")
