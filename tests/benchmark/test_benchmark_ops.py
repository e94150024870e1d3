"""`benchmark ops` on tiny shapes: who appears, what is said of them, what is refused."""

import json
import os

import pytest
import torch

from ssmamba_models import ops
from ssmamba_models.benchmark import op_contenders
from ssmamba_models.benchmark.bandwidth import COPY_BYTES
from ssmamba_models.benchmark.defaults import OPS
from ssmamba_models.benchmark.op_cases import CASES, OpCase, make_inputs
from ssmamba_models.benchmark.op_contenders import CONV1D, PASSES, REFERENCE, contenders_for, make_call
from ssmamba_models.benchmark.ops import OpsPlan, format_ops, run_ops

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = (
    OpCase("directional_scan", (1, 3, 4, 8), 1),
    OpCase("selective_scan", (1, 8, 6), 2),
    OpCase("causal_conv1d", (1, 8, 6), 4),
)


def available():
    report = ops.backends()["backends"]
    return {n for n, b in report.items() if b["available"] and {"cpu", "any"} & set(b["devices"])}


@pytest.fixture(scope="module", autouse=True)
def _short_copies():
    """Copy a megabyte, not 128, to find the bandwidth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COPY_BYTES, "cpu", 2**20)
        yield


@pytest.fixture(scope="module")
def report():
    return run_ops(OpsPlan(rounds=2, cases=TINY, passes=PASSES, threads=1))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.op)
@pytest.mark.parametrize("which", PASSES)
def test_every_backend_is_measured_and_exact(report, case, which):
    rows = {r["backend"]: r for r in report["results"] if (r["op"], r["pass"]) == (case.op, which)}
    assert set(rows) == available() | {REFERENCE} | ({CONV1D} if case.op == "causal_conv1d" else set())
    assert rows[REFERENCE]["times_faster_than_reference"] == 1.0
    for row in rows.values():
        assert row["reason"] is None
        assert row["max_relative_error"] < 1e-5
        assert row["rounds"] == len(row["samples_ms"]) == 2
        assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
        assert row["time_over_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        assert (row["times_faster_than_conv1d"] is None) == (case.op != "causal_conv1d")


def test_report_is_json_and_names_the_machine(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["machine"]["threads"] == report["settings"]["threads"] == 1


def test_table_has_every_row_and_fits_a_page(report):
    lines = format_ops(report).splitlines()
    assert max(map(len, lines)) <= 110
    assert all(case.label in lines for case in TINY)
    measured = [line for line in lines if line.startswith(PASSES)]
    assert len(measured) == len(report["results"])


def test_the_variable_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("SSMAMBA_BACKEND", "torch")
    run_ops(OpsPlan(ops=["causal_conv1d"], cases=TINY, rounds=1))
    assert os.environ["SSMAMBA_BACKEND"] == "torch"


def test_only_what_is_asked_for(monkeypatch):
    report = run_ops(OpsPlan(ops=["causal_conv1d"], backends=["torch"], cases=TINY, rounds=1))
    assert {r["op"] for r in report["results"]} == {"causal_conv1d"}
    assert {r["backend"] for r in report["results"]} == {REFERENCE, "torch", CONV1D}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_measured_against_the_same_rounded_inputs(dtype):
    report = run_ops(OpsPlan(dtype=dtype, cases=TINY[:2], rounds=1, passes=["forward"]))
    assert all(row["max_relative_error"] < 1e-2 for row in report["results"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (OpsPlan(ops=["fast_scan"]), "operator 'fast_scan' is unknown; expected one of directional_scan"),
        (OpsPlan(backends=["abacus"]), "backend 'abacus' is unknown; expected one of reference"),
        (OpsPlan(dtype="int8"), "dtype 'int8' is unknown"),
        (OpsPlan(passes=["sideways"]), "pass 'sideways' is unknown"),
        (OpsPlan(rounds=0), "rounds must be at least 1"),
        (OpsPlan(threads=0, cases=()), "threads must be at least 1"),
        (OpsPlan(device="cuda:99"), "device 'cuda:99'"),
    ],
)
def test_bad_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        run_ops(plan)


def test_a_missing_backend_is_named_with_its_reason_and_cure(monkeypatch):
    gone = {"available": False, "devices": ["cpu"], "reason": "it was not built", "cure": "reinstall"}
    monkeypatch.setattr(ops, "backends", lambda: {"backends": {"c": gone}})
    report = run_ops(OpsPlan(cases=TINY[2:], rounds=1, passes=["forward"]))
    assert report["not_run"] == {"c": "it was not built. reinstall"}
    assert "c not run: it was not built. reinstall" in format_ops(report)
    with pytest.raises(ValueError, match="backend 'c' cannot run on cpu: it was not built"):
        run_ops(OpsPlan(backends=["c"]))


def test_wrong_and_failing_contenders_are_shown_as_such(monkeypatch):
    def fails(**inputs):
        raise NotImplementedError("no such kernel")

    def wrong(x, **rest):
        return 2 * torch.nn.functional.silu(x)

    def not_finite(x, **rest):
        return x / 0.0

    def measure(function):
        monkeypatch.setattr(ops, "causal_conv1d", function)
        plan = OpsPlan(backends=["torch"], cases=TINY[2:], rounds=1, passes=["forward"])
        report = run_ops(plan)
        format_ops(report)
        return report["results"][1]

    assert measure(fails)["reason"] == "no such kernel"
    assert measure(not_finite)["reason"] == "its result is not finite"
    assert measure(wrong)["max_relative_error"] > 0.1


@pytest.mark.parametrize("op", OPS)
def test_default_cases_cover_every_operator(op):
    for device in ("cpu", "cuda"):
        assert op in {case.op for case in CASES[device]}


def test_least_bytes_count_each_element_once():
    inputs = make_inputs(OpCase("directional_scan", (2, 3, 5, 8), 1), torch.bfloat16, "cpu")
    u, b = 2 * 3 * 5 * 8, 2 * 3 * 5 * 4
    assert inputs.least_bytes("forward") == 2 * (3 * u + 2 * b)
    assert inputs.least_bytes("backward") == 2 * (2 * (2 * u + 2 * b) + u)
    assert inputs.least_bytes("forward+backward") == inputs.least_bytes("forward") + inputs.least_bytes("backward")


def test_the_reference_may_run_alone_but_only_where_threads_matter(monkeypatch):
    naive = contenders_for("selective_scan", [])[0]
    chosen = op_contenders.faster_reference(naive, TINY[1], torch.float32, torch.device("cpu"))
    assert chosen.threads in (1, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert op_contenders.faster_reference(naive, TINY[1], torch.float32, torch.device("cpu")) is naive


def test_passes_agree_with_each_other():
    inputs = make_inputs(TINY[1], torch.float32, "cpu")
    naive = contenders_for("selective_scan", [])[0]
    y, *gradients = make_call(naive, inputs, "forward+backward")()
    torch.testing.assert_close(make_call(naive, inputs, "forward")()[0], y)
    torch.testing.assert_close(make_call(naive, inputs, "backward")(), tuple(gradients))
