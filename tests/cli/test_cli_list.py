"""`ssmamba list`: our models, with sizes that a real model of that name has."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(result):
    assert result.exit_code == 0, result.output
    return {row["model"]: row for row in json.loads(result.stdout)}


def test_all_models(ssmamba):
    result = ssmamba("list")
    assert result.exit_code == 0
    for name in ("ssmamba_tiny", "ssmamba_small", "ssmamba_base"):
        assert name in result.stdout


def test_the_numbers_are_those_of_the_design(ssmamba):
    found = rows(ssmamba("list", "ssmamba_*", "--json", "-"))
    for name, millions, embed_dim in (
        ("ssmamba_tiny", 9.12, 384),
        ("ssmamba_small", 25.3, 512),
        ("ssmamba_base", 80.75, 768),
    ):
        assert found[name]["parameters"] / 1e6 == pytest.approx(millions, rel=0.005)
        assert found[name]["embed_dim"] == embed_dim


def test_gmacs_on_the_meta_device_are_those_of_a_real_run(ssmamba):
    listed = rows(ssmamba("list", "test_ssmamba", "--json", "-"))["test_ssmamba"]
    model = timm.create_model("test_ssmamba", num_classes=0).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    assert listed["gmacs"] == pytest.approx(counter.get_total_flops() / 2e9)
    assert listed["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_filter_is_a_part_of_the_name_or_a_pattern(ssmamba):
    assert list(rows(ssmamba("list", "tiny", "--json", "-"))) == ["ssmamba_tiny"]
    assert list(rows(ssmamba("list", "*_b?se", "--json", "-"))) == ["ssmamba_base"]


@pytest.mark.parametrize("pattern", ["TINY", "SSMamba_T*"])
def test_a_filter_is_of_either_case(ssmamba, pattern):
    assert list(rows(ssmamba("list", pattern, "--json", "-"))) == ["ssmamba_tiny"]


def test_a_filter_that_matches_nothing_names_what_there_is(ssmamba):
    result = ssmamba("list", "huge")
    assert result.exit_code == 2
    assert "no model matches 'huge'" in result.stderr
    assert "ssmamba_small" in result.stderr
