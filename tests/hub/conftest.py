"""A Hub on loopback, processes that talk to it, and a run to publish."""

import pytest
from fake_hub import FakeHub
from hub_client import HubClient
from run_folders import write_run

from ssmamba_models.hub import CardInfo, publish


@pytest.fixture(scope="session")
def hub():
    server = FakeHub()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def healthy(request):
    """What a test spoiled of the Hub is whole again for the next."""
    yield
    if "hub" in request.fixturenames:
        server = request.getfixturevalue("hub")
        server.refuse.clear()
        server.cuts.clear()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """HF_HOME of the clients."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session")
def client(hub, home):
    process = HubClient(hub.endpoint, home)
    yield process
    process.close()


@pytest.fixture(scope="session")
def offline(hub, home):
    """With the same cache, and HF_HUB_OFFLINE."""
    process = HubClient(hub.endpoint, home, HF_HUB_OFFLINE="1")
    yield process
    process.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A pretraining of test_ssmamba at 64 px; not to be altered."""
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def bundle(run, tmp_path_factory):
    """What is published of it: name -> bytes."""
    info = CardInfo(license="apache-2.0", training_data="synthetic tiles", target_mpp=0.5)
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    publish(run, "lab/model", info=info, dry_run=folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
