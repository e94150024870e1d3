"""`ssmamba benchmark` from the outside."""

import json

import pytest

from ssmamba_models.benchmark import op_cases, ops
from ssmamba_models.benchmark.op_cases import OpCase

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--peers", "test_convnext", "--sizes", "64", "--batch-size", "1", "--rounds", "1", "--no-memory"]


@pytest.fixture
def run(ssmamba):
    return lambda *arguments: ssmamba("benchmark", *arguments)


def test_models_prints_a_table_and_writes_json(run, tmp_path):
    out = tmp_path / "models.json"
    result = run("models", "--model", "test_ssmamba", *FAST, "--json", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("model")
    assert "timing test_ssmamba (optimized), test_ssmamba, test_convnext" in result.stderr
    assert [(row["model"], row["mode"]) for row in json.loads(out.read_text())["results"]] == [
        ("test_ssmamba", "optimized"),
        ("test_ssmamba", "eager"),
        ("test_convnext", "eager"),
    ]
    assert list(tmp_path.iterdir()) == [out]


def test_ops_prints_a_table_and_writes_json(run, tmp_path, monkeypatch):
    monkeypatch.setitem(ops.CASES, "cpu", (OpCase("causal_conv1d", (1, 4, 5), 3),))
    assert ops.CASES is op_cases.CASES
    out = tmp_path / "ops.json"
    result = run("ops", "--op", "causal_conv1d", "--backend", "torch", "--rounds", 1, "--json", out)
    assert result.exit_code == 0, result.output
    assert "causal_conv1d (1,4,5) W=3" in result.stdout
    assert {r["backend"] for r in json.loads(out.read_text())["results"]} == {"reference", "torch", "torch conv1d"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--op", "fast_scan"], "fast_scan"),
        (["ops", "--backend", "abacus"], "Error: backend 'abacus' is unknown"),
        (["ops", "--device", "cuda:99"], "Error: device 'cuda:99'"),
        (["models", "--peers", "test_vitt"], "Error: model 'test_vitt' is unknown"),
        (["models", "--sizes", "224,big"], "Error: --sizes: 'big' is not a whole number of pixels"),
        (["models", "--sizes", "-4"], "Error: size must be at least 1, got -4"),
        (["models", "--sizes", ""], "Error: no size to measure at"),
    ],
)
def test_bad_input_is_named(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_report_of_something_else_is_not_replaced(run, tmp_path):
    (tmp_path / "report.md").write_text("# Evaluation\n")
    result = run("all", "--quick", "--out", tmp_path)
    assert result.exit_code == 2
    assert "is no report of `ssmamba benchmark`; give another --out" in result.stderr
    assert (tmp_path / "report.md").read_text() == "# Evaluation\n"


def test_an_output_that_cannot_be_written_is_found_before_the_run(run, tmp_path):
    result = run("models", *FAST, "--json", tmp_path / "missing" / "out.json")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert "preparing" not in result.stderr
