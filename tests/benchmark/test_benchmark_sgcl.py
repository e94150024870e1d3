"""`benchmark sgcl` on few vectors: the rows, the line to a million, the memory, and what is refused."""

import json

import pytest

from ssmamba_models.benchmark import sgcl as benchmark
from ssmamba_models.benchmark.sgcl import PIECES, SgclBenchmark, format_sgcl, run_sgcl

pytest.importorskip("sklearn", reason="k-means needs the [train] extra")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"vectors": 400, "embed_dim": 8, "batch_size": 4, "rounds": 1, "threads": 1, "memory": False, "device": "cpu"}


@pytest.fixture(scope="module")
def report():
    return run_sgcl(SgclBenchmark(**TINY))


def test_every_piece_has_a_row(report):
    assert {row["piece"]: row["per"] for row in report["results"]} == PIECES
    for row in report["results"]:
        assert row["seconds"] > 0
        assert row["quarter_seconds"] > 0
        assert row["million_seconds"] >= row["seconds"]
        assert row["peak_mib"] is row["million_mib"] is None
    assert report["held_mib"]["million"] == pytest.approx(1e6 * 4 * (5 * 128 + 8) / 2**20)
    assert report["held_mib"]["measured"] == pytest.approx(report["held_mib"]["million"] * 400 / 1e6)


def test_report_is_json_and_the_table_fits(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = format_sgcl(report)
    assert "hard negatives" in table
    assert "400 tiles, 128-d, features 8-d" in table
    assert max(map(len, table.splitlines())) <= 120


def test_a_million_lies_on_the_line_through_both_sizes():
    assert benchmark._for_a_million(100_000, 4.0, 1.0) == pytest.approx(40.0)
    assert benchmark._for_a_million(100_000, 4.0, 4.0) == 4.0
    assert benchmark._for_a_million(100_000, 4.0, 5.0) == 4.0


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    rows = run_sgcl(SgclBenchmark(**{**TINY, "vectors": 10_000, "embed_dim": 256, "memory": True}))["results"]
    peaks = {row["piece"]: row["peak_mib"] for row in rows}
    assert peaks["k-means"] > 5  # batches and centres
    assert peaks["bank update"] < 3


def test_from_the_command_line(ssmamba, tmp_path):
    out = tmp_path / "sgcl.json"
    options = ["--vectors", 200, "--embed-dim", 8, "--batch-size", 4, "--rounds", 1, "--no-memory", "--device", "cpu"]
    result = ssmamba("benchmark", "sgcl", *options, "--json", out)
    assert result.exit_code == 0, result.output
    assert "nearest entries" in result.stdout
    assert json.loads(out.read_text())["settings"]["vectors"] == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": 99}, "vectors must be at least 100, got 99"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"kmeans": "magic"}, "sklearn, faiss"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_sgcl(SgclBenchmark(**{**TINY, **changes}))
