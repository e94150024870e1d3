"""Weights from the Hub, by the real client: what works, and what each failure is told."""

import json

import pytest
from fake_hub import READER, WRITER
from hub_client import HubClient, RemoteError
from run_folders import write_run
from safetensors import safe_open

from ssmamba_models.hub import publish

TIMM = 'value = timm.create_model("hf-hub:{0}", pretrained=True).stem.conv1.weight.sum().item()'
OURS = 'value = ssmamba_models.create_model("hf-hub:{0}", pretrained=True).stem.conv1.weight.sum().item()'
ENCODER = """
from ssmamba_models.engine.encoder import load_encoder
value = load_encoder("hf-hub:{0}", pretrained=True).model.stem.conv1.weight.sum().item()
"""
EVERY_WAY = pytest.mark.parametrize("way", [TIMM, OURS, ENCODER], ids=["timm", "ours", "encoder"])
# The client waits longer and longer between its attempts; a test need not.
IMPATIENT = "import time; time.sleep = lambda seconds: None\n"


def total(bundle, tmp_path):
    path = tmp_path / "published.safetensors"
    path.write_bytes(bundle["model.safetensors"])
    with safe_open(path, "pt") as file:
        return file.get_tensor("stem.conv1.weight").sum().item()


@EVERY_WAY
def test_the_weights_arrive(hub, client, bundle, tmp_path, way):
    hub.add("lab/whole", bundle)
    assert client(way.format("lab/whole")) == pytest.approx(total(bundle, tmp_path))


def test_the_configuration_arrives(hub, client, bundle):
    hub.add("lab/configured", bundle)
    code = """
model = timm.create_model("hf-hub:lab/configured", pretrained=True)
value = [model.pretrained_cfg["input_size"], model.num_classes, len(list(model.parameters()))]
features = timm.create_model("hf-hub:lab/configured", pretrained=True, features_only=True)
value += [len(features(torch.zeros(1, 3, 64, 64)))]
value += [list(timm.create_model("hf-hub:lab/configured", pretrained=True, in_chans=c, num_classes=5)(
    torch.zeros(1, c, 64, 64)).shape) for c in (1, 4)]
"""
    size, classes, parameters, maps, *logits = client(code)
    assert (size, classes, maps, logits) == ([3, 64, 64], 0, 4, [[1, 5], [1, 5]])
    assert parameters > 0


def test_the_command_line(hub, client, bundle, labelled_tiles, tmp_path):
    pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    hub.add("lab/command", bundle)
    code = """
from click.testing import CliRunner
from ssmamba_models.cli.main import main
arguments = {0!r}.split() + ["--model", "hf-hub:lab/{1}", "--pretrained", "--workers", "0", "--quiet"]
result = CliRunner().invoke(main, arguments)
value = [result.exit_code, result.stderr]
"""
    arguments = f"embed {labelled_tiles} --out {tmp_path / 'f.h5'}"
    assert client(code.format(arguments, "command")) == [0, ""]
    exit_code, message = client(code.format(arguments, "missing") + "\n")
    assert exit_code == 2
    assert message.startswith("Error: ")


def test_the_cache_is_used_and_needs_no_network(hub, client, offline, bundle, tmp_path):
    hub.add("lab/cached", bundle)
    client(OURS.format("lab/cached"))
    before = len(hub.seen("GET", "/cdn/"))
    assert client(OURS.format("lab/cached")) == pytest.approx(total(bundle, tmp_path))
    assert len(hub.seen("GET", "/cdn/")) == before
    asked = len(hub.requests)
    for way in (TIMM, OURS, ENCODER):
        assert offline(way.format("lab/cached")) == pytest.approx(total(bundle, tmp_path))
    assert len(hub.requests) == asked


def test_revisions(hub, client, bundle, tmp_path):
    repo = hub.add("lab/revised", bundle)
    first = repo.branches["main"]
    publish(write_run(tmp_path / "other", seed=8), "lab/revised", dry_run=tmp_path / "new")
    newer = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    hub.objects.update({json.loads(newer["config.json"])["domain"]["sha256"]: newer["model.safetensors"]})
    repo.branches["v2"] = first
    repo.commit(newer, "v2")
    old, new = total(bundle, tmp_path), total(newer, tmp_path)
    assert old != pytest.approx(new)
    for way in (TIMM, OURS, ENCODER):
        found = [client(way.format(f"lab/revised{at}")) for at in ("", "@main", f"@{first}", "@v2")]
        assert found == pytest.approx([old, old, old, new])


def test_a_private_repository_with_a_token(hub, client, bundle, tmp_path):
    hub.add("lab/private", bundle, private=True)
    for token in (READER, WRITER):
        assert client(OURS.format("lab/private"), token) == pytest.approx(total(bundle, tmp_path))
    downloads = hub.seen("GET", "/cdn/")
    assert not any("authorization" in {key.lower() for key in headers} for _, _, headers in downloads)


def test_registry_names_through_the_hub(hub, client, tmp_path):
    name = "ssmamba-models/ssmamba_tiny.mamim_lc25000"
    run = write_run(tmp_path / "run", model="ssmamba_tiny")
    publish(run, name, dry_run=tmp_path / "bundle", dtype="bfloat16")
    files = {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()}
    hub.add(name, files)
    # As where the packaged file is absent.
    code = """
model = timm.create_model("{0}", pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(file=None))
value = [model.stem.conv1.weight.sum().item(), str(next(model.parameters()).dtype)]
"""
    for asked in ("ssmamba_tiny", "ssmamba_tiny.mamim_lc25000"):
        value, dtype = client(code.format(asked))
        assert dtype == "torch.float32"
        assert value == pytest.approx(total(files, tmp_path), rel=1e-3)
    hub.repos[name].commit({"config.json": _with_hash(files, "0" * 64)})
    with pytest.raises(RemoteError, match="not those that were published"):
        client(code.format("ssmamba_tiny"))


def _with_hash(files, digest):
    config = json.loads(files["config.json"])
    config["domain"]["sha256"] = digest
    return json.dumps(config).encode()


class TestFailures:
    """Each names the repository and the cure, is an OSError, and exits with 2 on the command line."""

    def refused(self, client, way, name, match, token=None, before=""):
        with pytest.raises(RemoteError, match=match) as error:
            client(before + way.format(name), token)
        assert "OSError" in error.value.kinds
        return str(error.value)

    @pytest.mark.parametrize("way", [OURS, ENCODER], ids=["ours", "encoder"])
    def test_no_such_repository(self, hub, client, way):
        match = r"there is no repository 'lab/nowhere' on http://127.*or it is private.*hf auth login.*HF_TOKEN"
        self.refused(client, way, "lab/nowhere", match)
        self.refused(client, way, "lab/nowhere", match, READER)

    @pytest.mark.parametrize("way", [OURS, ENCODER], ids=["ours", "encoder"])
    def test_private_gated_and_refused_tokens(self, hub, client, bundle, way):
        hub.add("lab/secret", bundle, private=True)
        hub.add("lab/gated", bundle, gated=True)
        self.refused(client, way, "lab/secret", "no repository 'lab/secret'.*or it is private.*HF_TOKEN")
        self.refused(client, way, "lab/secret", "refuses the token for 'lab/secret'.*log in again", "hf_outdated")
        self.refused(client, way, "lab/gated", r"'lab/gated' is gated: ask for access on http\S+/lab/gated")

    @pytest.mark.parametrize("way", [OURS, ENCODER], ids=["ours", "encoder"])
    def test_no_such_revision(self, hub, client, bundle, way):
        hub.add("lab/one", bundle)
        self.refused(client, way, "lab/one@v9", "'lab/one' has no revision 'v9'; see http.*/commits/main")

    @pytest.mark.parametrize("way", [OURS, ENCODER], ids=["ours", "encoder"])
    def test_not_in_the_cache_and_offline(self, hub, offline, bundle, way):
        hub.add("lab/faraway", bundle)
        self.refused(offline, way, "lab/faraway", "'lab/faraway' is not in the cache, and HF_HUB_OFFLINE forbids")

    def test_a_hub_that_cannot_be_reached(self, tmp_path):
        client = HubClient("http://127.0.0.1:9", tmp_path)
        match = "'lab/any' is not in the cache, and http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT"
        self.refused(client, OURS, "lab/any", match, before=IMPATIENT)
        code = 'timm.create_model("ssmamba_tiny", pretrained=True, pretrained_cfg_overlay=dict(file=None))'
        match = "'ssmamba-models/ssmamba_tiny.mamim_lc25000' is not in the cache, and http"
        self.refused(client, code, "", match, before=IMPATIENT)
        client.close()

    @EVERY_WAY
    def test_a_wrong_hash_and_its_cure(self, hub, client, bundle, tmp_path, way):
        name = f"lab/corrupt-{abs(hash(way))}"
        hub.add(name, bundle)
        oid = json.loads(bundle["config.json"])["domain"]["sha256"]
        good = hub.objects[oid]
        hub.objects[oid] = good[:-1] + bytes([good[-1] ^ 1])
        match = f"of hf-hub:{name} are not those that were published: the SHA-256 of .*says {oid}; delete that file"
        try:
            message = self.refused(client, way, name, match)
        finally:
            hub.objects[oid] = good
        self.refused(client, way, name, match)  # the cache still holds it
        client(f"import os; os.remove({message.split(chr(39))[1]!r})")
        assert client(way.format(name)) == pytest.approx(total(bundle, tmp_path))

    def test_files_that_are_missing(self, hub, client, bundle):
        hub.add("lab/weightless", {"config.json": bundle["config.json"]})
        hub.add("lab/configless", {"model.safetensors": bundle["model.safetensors"]})
        self.refused(client, OURS, "lab/weightless", "repository 'lab/weightless' holds no model.safetensors")
        self.refused(client, OURS, "lab/configless", "repository 'lab/configless' holds no config.json")

    @pytest.mark.parametrize("content", [b"<html>", b"[1]", b"{}"])
    def test_a_configuration_that_is_none(self, hub, client, bundle, content):
        name = f"lab/strange-{len(content)}"
        hub.add(name, {**bundle, "config.json": content})
        self.refused(client, OURS, name, "is not JSON|describes no timm model")

    @pytest.mark.parametrize("name", ["a/b/c", "..", "lab/model@a@b", ""])
    def test_names_that_are_none(self, client, name):
        with pytest.raises(RemoteError, match="names no repository; expected ORG/NAME or ORG/NAME@REVISION") as error:
            client(OURS.format(name))
        assert "ValueError" in error.value.kinds

    def test_an_unknown_source(self, client):
        with pytest.raises(RemoteError, match="unknown source; expected hf-hub:ORG/NAME or local-dir:FOLDER"):
            client('ssmamba_models.create_model("s3:bucket")')


AGAIN = """
from ssmamba_models.models.published import WeightsError
value = []
for attempt in range(4):
    try:
        value.append(ssmamba_models.create_model("hf-hub:{0}", pretrained=True).stem.conv1.weight.sum().item())
        break
    except WeightsError as error:
        assert "try again" in str(error)
"""


class TestInterruptedDownloads:
    def test_one_that_breaks_off_goes_on_where_it_stopped(self, hub, client, bundle, tmp_path):
        hub.add("lab/shaky", bundle)
        hub.cuts += [100_000, 50_000]
        before = len(hub.seen("GET", "/cdn/"))
        # Each chunk that arrived is kept; the client's own are of 10 MB. Older clients leave going on to the user.
        small = "import huggingface_hub; huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000\n"
        assert client(IMPATIENT + small + AGAIN.format("lab/shaky")) == pytest.approx([total(bundle, tmp_path)])
        headers = [{key.lower(): value for key, value in asked[2].items()} for asked in hub.seen("GET", "/cdn/")]
        first, *others = [asked.get("range") for asked in headers[before:]]
        assert first is None
        starts = [int(text.removeprefix("bytes=").rstrip("-")) for text in others]
        assert len(starts) == 2
        assert 0 < starts[0] <= 100_000 < starts[1] <= 150_000

    def test_one_that_never_ends_shows_nothing_half_and_works_later(self, hub, client, bundle, home, tmp_path):
        hub.add("lab/dead", bundle)
        hub.cuts += [0] * 20
        match = "download of model.safetensors from 'lab/dead' did not end.*try again"
        with pytest.raises(RemoteError, match=match) as error:
            client(IMPATIENT + OURS.format("lab/dead"))
        assert "OSError" in error.value.kinds
        assert not list((home / "hub" / "models--lab--dead" / "snapshots").rglob("model.safetensors"))
        hub.cuts.clear()
        assert client(OURS.format("lab/dead")) == pytest.approx(total(bundle, tmp_path))
