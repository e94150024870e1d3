"""What fuzzing found, each as its smallest example."""

import json

import pytest
import torch

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.slide_labels import read_slide_labels
from ssmamba_models.data.slide_vectors import read_slide_vectors
from ssmamba_models.data.spatial_tiles import read_spatial_tiles
from ssmamba_models.engine.config import load_config
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.mil_model import WEIGHTS, load_mil_model, save_mil_model
from ssmamba_models.engine.mil_predictions import read_predictions
from ssmamba_models.engine.weights import read_weights
from ssmamba_models.hub.run_record import read_run
from ssmamba_models.slide.aggregators import create_aggregator
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_weights import load_slide_encoder, save_slide_encoder
from ssmamba_models.wsi.status import StatusLog


@pytest.mark.parametrize(
    ("read", "header"),
    [
        (read_slide_labels, "slide,label,Label"),
        (lambda path: read_tiles(path.parent), "path,label,label"),
        (read_spatial_tiles, "path,slide,x,y,x"),
    ],
)
def test_a_column_that_is_there_twice(tmp_path, read, header):
    """The last one was taken, without a word."""
    path = tmp_path / "manifest.csv"
    path.write_text(f"{header}\n{','.join('a' for _ in header.split(','))}\n")
    with pytest.raises(ValueError, match=r"manifest\.csv' has two columns '(label|x)'"):
        read(path)


def test_a_character_that_no_name_can_hold(tmp_path):
    """Python 3.10 refused the table, later ones the first file name that was made of it."""
    path = tmp_path / "manifest.csv"
    path.write_text("path,label\na\0.png,x\n")
    with pytest.raises(ValueError, match=r"manifest\.csv'.*(NUL|CSV)"):
        read_tiles(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "a: !!timestamp x",
        "a: !!int a",
        "a: " + "[" * 2000,
        "a: &a {b: *a}",
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e, *e, *e, *e, *e]",
    ],
)
def test_what_is_no_configuration(tmp_path, text):
    """PyYAML raises ValueError, AttributeError and RecursionError, or gives what cannot be written out."""
    pytest.importorskip("yaml", reason="configurations need the [train] extra")
    from ssmamba_models.engine.mil_config import MilConfig

    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml' is not YAML"):
        load_config(MilConfig, path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tiles", b"0123"), ("fold", b"1e"), ("probability_x", b"nan"), ("probability_x", b"\xff")],
)
def test_predictions_that_are_none(tmp_path, name, content):
    row = {"slide": b"a", "patient": b"p", "fold": b"0", "label": b"x", "tiles": b"5", "probability_x": b"1"}
    path = tmp_path / "predictions.csv"
    values = {**row, name: content if name != "tiles" else b"five"}
    path.write_bytes(",".join(row).encode() + b"\n" + b",".join(values.values()) + b"\n")
    with pytest.raises(ValueError, match=r"predictions\.csv"):
        read_predictions(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregator": None},
        {"arguments": []},
        {"arguments": {"hidden_dim": "a"}},
        {"classes": []},
        {"classes": [1, 2]},
        {"provenance": {"feature_dim": "5"}},
        {"provenance": {}},
    ],
)
def test_an_aggregator_that_tells_nonsense(tmp_path, changes):
    from safetensors.torch import load_file, save_file

    path = tmp_path / WEIGHTS
    save_mil_model(path, create_aggregator("abmil", 5, 2), "abmil", {}, ("x", "y"), {"feature_dim": 5})
    facts = {"aggregator": "abmil", "arguments": {}, "classes": ["x", "y"], "provenance": {"feature_dim": 5}, **changes}
    save_file(load_file(path), path, {"ssmamba_mil": json.dumps(facts)})
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_mil_model(tmp_path)


@pytest.mark.parametrize("changes", [{"architecture": ["a"]}, {"arguments": {"feature_dim": True}}])
def test_a_slide_encoder_that_tells_nonsense(tmp_path, changes):
    save_slide_encoder(create_slide_encoder("test_gigassl", 5), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_slide_encoder(tmp_path)


def test_a_hub_folder_whose_transform_is_none(tmp_path):
    config = {"architecture": "test_ssmamba", "num_classes": 0, "pretrained_cfg": {"interpolation": "bic-bic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describes no input transform"):
        load_encoder(f"local-dir:{tmp_path}", device="cpu")


def test_a_pickle_that_is_cut(tmp_path):
    """torch seeks before the beginning of what looks like an archive, and the system's error names no file."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path)
    data = path.read_bytes()
    for end in (4, 60, len(data) - 30, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"a\.pth"):
            read_weights(path)


def test_vectors_whose_header_is_no_python(tmp_path):
    (tmp_path / "ids.txt").write_text("a\n")
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00('a',\n")
    with pytest.raises(ValueError, match=r"v\.npy' is no \.npy file"):
        read_slide_vectors(tmp_path / "v.npy", tmp_path / "ids.txt")


def test_logs_that_tell_nonsense(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    lines = [{"seconds": "a", "images": []}, {"seconds": 2.5, "images": 8}, {"event": "epoch", "loss": None, "x": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(tmp_path / "weights.safetensors")
    assert (record.seconds, record.images, record.last) == (2.5, 8, {"x": 1.0})
    (tmp_path / "status.jsonl").write_text('{"slide": ["a"], "status": "done"}\n{"slide": "b", "status": "done"}\n')
    assert list(StatusLog(tmp_path / "status.jsonl").latest()) == ["b"]


@pytest.mark.parametrize("kind", ["tiles", "vectors"])
def test_groups_where_data_sets_should_be(tmp_path, kind):
    h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    from ssmamba_models.data.tile_files import read_features

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        for name in ("features", "paths", "labels", "embeddings", "slides"):
            file.create_group(name)
    with pytest.raises(ValueError, match=r"a\.h5"):
        (read_features if kind == "tiles" else read_slide_vectors)(path)


def test_names_that_are_no_text(tmp_path):
    h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    from ssmamba_models.data.tile_files import read_features

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = torch.ones(1, 3).numpy()
        file.create_dataset("paths", data=[b"\xff"], dtype=h5py.string_dtype())
    with pytest.raises(ValueError, match=r"a\.h5' is damaged"):
        read_features(path)


def test_more_rows_than_any_memory_holds(tmp_path):
    """A data set says how long it is, and need not have been written."""
    h5py = pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
    from ssmamba_models.data.convert import convert_features

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", (2**40, 5), "f4", chunks=(256, 5))
        file.create_dataset("coords", (2**40, 2), "i8", chunks=(256, 2))
    summary = convert_features(tmp_path / "a.h5", tmp_path / "out", source_layout="clam", target_layout="ssmamba")
    assert [path.name for path, _ in summary.failed] == ["a.h5"]
