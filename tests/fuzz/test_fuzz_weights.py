"""Weights, checkpoints, run folders and settings that are broken, or that somebody made to do harm."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken_bytes
from reading import budget
from safetensors.torch import save_file

for package in ("accelerate", "yaml", "h5py", "openslide", "tifffile"):
    pytest.importorskip(package, reason="the process that reads needs the [train] and [wsi] extras")

import timm  # noqa: E402

from ssmamba_models.engine.checkpoints import Checkpoints  # noqa: E402
from ssmamba_models.engine.mil_model import save_mil_model  # noqa: E402
from ssmamba_models.slide.aggregators import create_aggregator  # noqa: E402
from ssmamba_models.slide.pama_checkpoint import _published  # noqa: E402
from ssmamba_models.slide.slide_encoders import create_slide_encoder  # noqa: E402
from ssmamba_models.slide.slide_weights import save_slide_encoder  # noqa: E402

# What JSON and YAML may hold where something else is expected.
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def changed(draw, document):
    """A JSON document with a value anywhere in it replaced, or lost."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 2))):
        at = document
        while True:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if isinstance(at[key], (dict, list)) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del at[key]
            else:
                at[key] = draw(JSON)
            break
        if not document:
            break
    return document


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of sound files."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    model = timm.create_model("test_ssmamba", num_classes=0)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "encoder.safetensors", {"model": "test_ssmamba", "img_size": "64"})
    torch.save({"state_dict": state, "epoch": 3}, folder / "encoder.pth")
    torch.save({"state_dict": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(torch.ones(4, 3), folder / "clam.pt")
    (folder / "slide").mkdir()
    save_slide_encoder(create_slide_encoder("test_gigassl", 5), folder / "slide", {"method": "gigassl"})
    pama = create_slide_encoder("test_pama", 5, compat=True).state_dict()
    torch.save({"state_dict": {_published(name): value for name, value in pama.items()}}, folder / "pama.pth")
    facts = {"feature_dim": 5, "model": "m"}
    save_mil_model(folder / "mil.safetensors", create_aggregator("abmil", 5, 2), "abmil", {}, ("x", "y"), facts)
    (folder / "checkpoints").mkdir()
    for step in (1, 2):
        Checkpoints(folder / "checkpoints").save(step, {"step": step, "weights": torch.full((3,), float(step))})
    config = {
        "architecture": "test_ssmamba",
        "num_classes": 0,
        "num_features": 32,
        "pretrained_cfg": model.pretrained_cfg,
    }
    (folder / "hub").mkdir()
    (folder / "hub" / "config.json").write_text(json.dumps(config, default=str))
    save_file(state, folder / "hub" / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        ("read_encoder", "encoder.safetensors"),
        ("read_encoder", "encoder.pth"),
        ("read_encoder", "old.pth"),
        ("read_clam_tensor", "clam.pt"),
        ("read_mil_model", "mil.safetensors"),
        ("read_pama", "pama.pth"),
    ],
)
def test_broken_weights(readers, files, place, reader, name):
    path = place / name
    path.write_bytes((files / name).read_bytes())
    assert readers.check(reader, path)["how"] == "result"

    @budget(12)
    @given(broken_bytes((files / name).read_bytes()))
    def check(content):
        path.write_bytes(content)
        readers.check(reader, path)

    check()


def test_broken_checkpoints(readers, files, place):
    """Going on takes the one before, or says that there is none: never a state that nobody saved."""
    folder = place / "checkpoints"
    folder.mkdir()
    sound = {path.name: path.read_bytes() for path in (files / "checkpoints").iterdir()}
    newest = max(sound)

    @budget(15)
    @given(broken_bytes(sound[newest]))
    def check(content):
        for name, data in sound.items():
            (folder / name).write_bytes(content if name == newest else data)
        assert readers.read("read_checkpoints", folder / newest)["how"] == "result"

    check()


@pytest.mark.parametrize(("reader", "name"), [("read_slide_encoder", "slide"), ("read_hub_folder", "hub")])
def test_odd_descriptions(readers, files, place, reader, name):
    folder = place / name
    folder.mkdir()
    for path in (files / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    sound = config.read_text()
    assert readers.check(reader, config)["how"] == "result"

    @budget(15)
    @given(
        st.one_of(changed(json.loads(sound)).map(lambda new: json.dumps(new).encode()), broken_bytes(sound.encode()))
    )
    def check(content):
        config.write_bytes(content)
        readers.check(reader, config, name=name)

    check()


def test_odd_facts_of_an_aggregator(readers, files, place):
    path = place / "facts.safetensors"
    state = {name: value.contiguous() for name, value in create_aggregator("abmil", 5, 2).state_dict().items()}
    facts = {"aggregator": "abmil", "arguments": {}, "classes": ["x", "y"], "provenance": {"feature_dim": 5}}

    @budget(15)
    @given(changed(facts))
    def check(document):
        save_file(state, path, {"ssmamba_mil": json.dumps(document)})
        readers.check("read_mil_model", path)

    check()


def test_odd_facts_of_an_encoder(readers, files, place):
    path = place / "said.safetensors"
    state = {
        name: value.contiguous()
        for name, value in timm.create_model("test_ssmamba", num_classes=0).state_dict().items()
    }

    @budget(12)
    @given(st.dictionaries(st.sampled_from(["model", "img_size", "model_args", "classes"]), JSON, min_size=1))
    def check(said):
        save_file(state, path, {key: json.dumps(value) for key, value in said.items()})
        readers.check("read_encoder", path)

    check()


LOG = [{"step": step, "epoch": 1, "loss": 0.5, "seconds": 1.5, "images": 4 * step} for step in (1, 2, 3)]
LOG += [{"event": "epoch", "step": 3, "epoch": 1, "loss": 0.4}]


def test_odd_logs_of_runs(readers, place):
    (place / "weights.safetensors").touch()
    (place / "config.yaml").write_text("data: tiles\nepochs: 3\n")

    @budget(20)
    @given(
        st.lists(changed({"lines": LOG}), max_size=1),
        broken_bytes("".join(json.dumps(line) + "\n" for line in LOG).encode()),
    )
    def check(documents, content):
        lines = documents[0].get("lines") if documents else None
        if isinstance(lines, list):
            content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (place / "log.jsonl").write_bytes(content)
        assert readers.read("read_run_folder", place / "log.jsonl") == {"how": "result"}

    check()


def test_odd_status_logs(readers, place):
    events = [
        {"time": "", "slide": name, "status": "done", "tiles": 5, "mpp": 0.5, "bytes": 9, "pid": 1} for name in "ab"
    ]
    sound = "".join(json.dumps(event) + "\n" for event in events)

    @budget(20)
    @given(
        st.one_of(
            changed({"events": events}).map(
                lambda new: "".join(json.dumps(line) + "\n" for line in _list(new.get("events"))).encode()
            ),
            broken_bytes(sound.encode()),
        )
    )
    def check(content):
        (place / "status.jsonl").write_bytes(content)
        assert readers.read("read_status_log", place / "status.jsonl") == {"how": "result"}

    check()


def _list(value):
    return value if isinstance(value, list) else [value]


SETTINGS = {
    "read_pretrain_config": {
        "data": "tiles",
        "epochs": 3,
        "lr": 1e-4,
        "betas": [0.9, 0.95],
        "view_args": {"mask_ratio": 0.6},
    },
    "read_slide_pretrain_config": {"features": "f", "epochs": 3, "method_args": {"hidden_dim": 8}},
    "read_mil_config": {"features": "f", "labels": "l.csv", "folds": 3, "aggregator": "abmil", "aggregator_args": {}},
}
_YAML = st.sampled_from(
    [
        "a: &a [*a]",
        "x: &x {y: *x}",
        "? [1, 2]\n: 3",
        "2001-99-99",
        "1:30",
        "!!python/object/apply:os.system [ls]",
        "0x",
        "0b",
        "!!binary x",
        "!!timestamp x",
        "!!int a",
        "!!float a",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "<<: 3",
        "<<: [1]",
        "--- a\n--- b",
        "\ta: 1",
        "%YAML 9.9\n---\n",
        "'open",
        "{",
        "[" * 2000,
        "- - - - 1",
        "*unknown",
        "~",
        "a: 1\na: 2",
        "1_000",
        ".nan",
        "=",
    ]
)


@pytest.mark.parametrize("reader", sorted(SETTINGS))
def test_odd_settings(readers, place, reader):
    path = place / "config.yaml"
    sound = SETTINGS[reader]

    @st.composite
    def documents(draw):
        way = draw(st.integers(0, 3))
        if way == 0:
            return yaml.safe_dump(draw(changed(sound))).encode()
        if way == 1:
            return draw(broken_bytes(yaml.safe_dump(sound).encode()))
        key = draw(st.sampled_from(sorted(sound)))
        odd = draw(_YAML)
        rest = "".join(f"{name}: {json.dumps(value)}\n" for name, value in sound.items() if name != key)
        return f"{rest}{key}: {odd}\n".encode() if way == 2 else f"{rest}{odd}\n".encode()

    @budget(30)
    @given(documents())
    def check(content):
        path.write_bytes(content)
        found = readers.read(reader, path)
        # A value out of its range is named by its key; what is no YAML by the file.
        assert found["how"] in ("result", "error"), found
        if found["how"] == "error":
            assert {"ValueError", "OSError"} & set(found["types"]), f"{found['message']}\n{found['trace']}"
            assert "config.yaml" in found["message"] or any(
                key in found["message"] for key in (*sound, "expected", "unknown")
            )

    check()


class Harm:
    """What a pickle runs when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "reader", ["read_encoder", "read_clam_tensor", "read_pama", "read_checkpoints", "read_vectors"]
)
@pytest.mark.parametrize("way", ["torch", "old", "plain"])
def test_pickles_run_nothing(readers, tmp_path, reader, way):
    trap = tmp_path / "trap"
    content = {"state_dict": {"weight": torch.ones(2), "bias": Harm(trap)}}
    path = tmp_path / ("v.npy" if reader == "read_vectors" else "step-00000001.pt")
    (tmp_path / "ids.txt").write_text("a\n")
    if reader == "read_vectors":
        np.save(path, np.array([Harm(trap)], dtype=object), allow_pickle=True)
    elif way == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "torch")
    found = readers.check(reader, path, name=str(tmp_path))
    assert found["how"] == "error"
    assert not trap.exists()


def test_a_checkpoint_larger_than_memory(readers, tmp_path):
    """Zeros that were packed: a small file that says it is a large one."""
    path = tmp_path / "bomb.pth"
    torch.save({"weight": torch.zeros(10)}, path)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
    assert readers.check("read_encoder", packed)["how"] == "error"
