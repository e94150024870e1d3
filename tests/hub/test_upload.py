"""`ssmamba publish` to a Hub, by the real client: one commit, or nothing."""

import json

import pytest
from fake_hub import READER, WRITER
from hub_client import RemoteError

PUBLISH = """
from ssmamba_models.hub import CardInfo, publish
done = publish({run!r}, {name!r}, info=CardInfo(training_data="synthetic"), **{options!r})
value = [done.place, done.name, done.sha256]
"""


def send(client, run, name, token=WRITER, **options):
    return client(PUBLISH.format(run=str(run), name=name, options=options), token)


def test_one_commit_holds_everything(hub, client, run):
    place, name, sha256 = send(client, run, "lab/new")
    repo = hub.repos["lab/new"]
    assert sorted(repo.files()) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert repo.messages[1:] == ["Publish weights with ssmamba publish"]
    assert place == f"{hub.endpoint}/lab/new/commit/{repo.branches['main']}"
    assert json.loads(repo.files()["config.json"])["domain"]["sha256"] == sha256
    assert not repo.private
    assert name == "hf-hub:lab/new"
    code = f'value = timm.create_model("{name}", pretrained=True)(torch.zeros(1, 3, 64, 64)).shape[1]'
    assert client(code) == 48


def test_the_command_line(hub, client, run):
    code = f"""
from click.testing import CliRunner
from ssmamba_models.cli.main import main
result = CliRunner().invoke(main, ["publish", {str(run)!r}, "--repo-id", "lab/cli", "--token", {WRITER!r}, "--private"])
value = [result.exit_code, result.stdout]
"""
    exit_code, out = client(code)
    assert exit_code == 0
    assert f"{hub.endpoint}/lab/cli/commit/" in out
    assert 'timm.create_model("hf-hub:lab/cli", pretrained=True)' in out
    assert WRITER not in out
    assert hub.repos["lab/cli"].private


def test_a_revision_leaves_main_alone(hub, client, run):
    send(client, run, "lab/branched")
    before = dict(hub.repos["lab/branched"].branches)
    for _ in range(2):  # made, then there
        place, name, _ = send(client, run, "lab/branched", revision="v2", dtype="bfloat16")
    after = hub.repos["lab/branched"].branches
    assert after["main"] == before["main"]
    assert place.endswith(after["v2"])
    assert client(f'value = timm.create_model("{name}", pretrained=True).num_features') == 48


def test_publishing_again_is_another_commit(hub, client, run):
    first = send(client, run, "lab/twice")[0]
    second = send(client, run, "lab/twice", dtype="bfloat16")[0]
    assert first != second
    assert len(hub.repos["lab/twice"].messages) == 3


class TestFailures:
    def refused(self, client, run, name, match, token=WRITER, kind="OSError", **options):
        with pytest.raises(RemoteError, match=match) as error:
            send(client, run, name, token, **options)
        assert kind in error.value.kinds

    def test_no_token_and_one_that_may_not_write(self, hub, client, run):
        for token in (None, READER, "hf_outdated"):
            match = "does not let you write 'lab/denied': log in with a token that may write.*HF_TOKEN or --token"
            self.refused(client, run, "lab/denied", match, token)
        assert "lab/denied" not in hub.repos

    @pytest.mark.parametrize(
        ("method", "start"),
        [("PUT", "/upload/"), ("POST", "/api/models/lab/half/commit"), ("POST", "/api/models/lab/half/preupload")],
    )
    def test_an_upload_that_breaks_off_publishes_nothing(self, hub, client, run, method, start):
        hub.repos.pop("lab/half", None)
        hub.objects = {oid: content for oid, content in hub.objects.items() if len(content) < 1000}
        hub.refuse[method, start] = 400
        self.refused(client, run, "lab/half", "upload to 'lab/half' on http.*did not end.*nothing of it is published")
        assert sorted(hub.repos["lab/half"].files()) == [".gitattributes"]
        hub.refuse.clear()
        send(client, run, "lab/half")
        assert "model.safetensors" in hub.repos["lab/half"].files()

    def test_offline(self, offline, run):
        self.refused(offline, run, "lab/offline", "HF_HUB_OFFLINE is set: nothing can be uploaded.*--dry-run")

    def test_private_weights_do_not_go_to_a_public_repository(self, hub, client, run):
        send(client, run, "lab/public")
        files = dict(hub.repos["lab/public"].files())
        match = "'lab/public' is there and public.*leave --private out"
        self.refused(client, run, "lab/public", match, kind="ValueError", private=True, dtype="bfloat16")
        assert hub.repos["lab/public"].files() == files

    @pytest.mark.parametrize("name", ["model", "a/b/c", "lab/", "/model", "lab/mo del", ""])
    def test_repository_names(self, client, run, name):
        self.refused(client, run, name, "is not ORG/NAME|Repo id must", kind="ValueError")
