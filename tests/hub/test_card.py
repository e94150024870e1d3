"""Model cards: what is known is there, what is not is said to be unknown, and a machine can read it."""

import errno
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from run_folders import write_run

from ssmamba_models.hub import CardInfo, publish
from ssmamba_models.hub.run_record import read_run

pytestmark = pytest.mark.usefixtures("one_thread")


def card_of(source, folder, **info):
    publish(source, "lab/model", info=CardInfo(**info), dry_run=folder)
    return (folder / "README.md").read_text()


def rows(card):
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))


def test_what_the_run_says_is_in_the_card(run, tmp_path):
    card = card_of(run, tmp_path / "out")
    found = rows(card)
    assert found["epochs"] == "2"
    assert found["steps"] == "4"
    assert found["images looked at, repetitions counted"] == "16"
    assert found["time"] == "30 min"
    assert found["method"].startswith("MAMIM")
    assert found["input"] == "RGB, 64 x 64 px"
    assert "| loss | 1.25 |" in card
    assert "lr: 0.001" in card
    assert "independent implementation" in card


def test_what_is_not_known_is_said_to_be_unknown(run, tmp_path):
    found = rows(card_of(run, tmp_path / "out"))
    for name in ("training data", "licence of the data", "hardware", "magnification", "licence of the weights"):
        assert found[name] == "unknown"


def test_a_file_without_a_run_knows_little(run, tmp_path):
    (tmp_path / "m.safetensors").write_bytes((run / "weights.safetensors").read_bytes())
    card = card_of(tmp_path / "m.safetensors", tmp_path / "out")
    assert rows(card)["time"] == "unknown"
    assert "Hyper-parameters" not in card
    assert "None were stated." in card


def test_what_the_publisher_says_is_in_the_card(run, tmp_path):
    info = {
        "license": "cc-by-4.0",
        "training_data": "LC25000,\ntrain | split",
        "data_license": "CC BY 4.0",
        "target_mpp": 0.5,
        "hardware": "one GPU",
        "results": "Macro-F1 0.93 on held-out groups.",
        "limits": "Two organs alone.",
        "description": "An encoder for tests.",
    }
    card = card_of(run, tmp_path / "out", **info)
    found = rows(card)
    assert found["training data"] == r"LC25000, train \| split"
    assert found["magnification"] == "0.5 microns per pixel"
    for key in ("data_license", "hardware", "results", "limits", "description"):
        assert info[key] in card
    assert "None were stated" not in card
    assert "Not a medical device" in card


def test_the_first_line_of_code_imports_the_package(run, tmp_path):
    code = re.search(r"```python\n(.*?)```", card_of(run, tmp_path / "out"), re.DOTALL)[1]
    assert code.startswith("import ssmamba_models")
    assert 'timm.create_model("hf-hub:lab/model", pretrained=True)' in code
    compile(code, "card", "exec")


@pytest.mark.parametrize(("classes", "pipeline"), [(0, "image-feature-extraction"), (3, "image-classification")])
def test_the_front_matter(tmp_path, classes, pipeline):
    run = write_run(tmp_path / "run", num_classes=classes)
    data = ModelCard(card_of(run, tmp_path / "out", license="mit")).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "mit", pipeline)
    assert {"timm", "pathology"} <= set(data.tags)


def test_no_folder_of_the_publisher_is_told(run, tmp_path):
    card = card_of(run, tmp_path / "out")
    assert "/home/someone" not in card
    assert "cuda:3" not in card
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])["data"] == "tiles"


def test_a_config_that_the_machine_does_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(PermissionError):
        read_run(run / "weights.safetensors")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", ""),
        ("a: &a [*a]", r".*refers to itself"),
        # Each list is twice the one before.
        ("- &a0 [1]\n" + "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), r".*100000 values"),
    ],
)
def test_a_config_that_is_no_yaml_is_named(tmp_path, text, reason):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"the run's .*config\.yaml' is not YAML{reason}"):
        read_run(run / "weights.safetensors")
