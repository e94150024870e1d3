"""`ssmamba benchmark all --quick`: every benchmark in one report."""

import json
import shutil

import pytest

from ssmamba_models.benchmark import all_benchmarks as module
from ssmamba_models.benchmark.all_benchmarks import AllPlan, make_parts, markdown_all, run_all

for package in ("tifffile", "openslide", "h5py", "sklearn", "accelerate"):
    pytest.importorskip(package, reason="all benchmarks need all extras")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")
def test_quick(ssmamba, tmp_path):
    result = ssmamba("benchmark", "all", "--quick", "--threads", 1, "--json", tmp_path / "all.json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "all.json").read_text())
    assert list(report["parts"]) == list(make_parts(AllPlan()))
    assert {name: part.get("reason") for name, part in report["parts"].items() if "reason" in part} == {}
    assert {row["part"] for row in report["ratios"]} == set(report["parts"])
    assert all(row["ratio"] > 0 for row in report["ratios"] if not row["ratio_of"].startswith("time waited"))
    page = (tmp_path / "report.md").read_text()
    assert page == result.stdout.removesuffix("\n")
    assert report["machine"]["torch"] in page
    assert page.count("\n| ") == len(report["ratios"]) + 2
    assert "not measured" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "report.md"]


def test_one_that_cannot_run_does_not_stop_the_others(monkeypatch):
    parts = make_parts(AllPlan(quick=True))

    def missing(plan, progress):
        raise ImportError("needs tifffile")

    few = {
        "ops": module.Part("Operators", missing, None, str, lambda report: iter(())),
        "sgcl": module.Part("SGCL", lambda plan, progress: {"x": 1}, None, str, lambda report: iter([("a", "b", 2.0)])),
    }
    monkeypatch.setattr(module, "make_parts", lambda plan: few)
    report = run_all(AllPlan(quick=True))
    assert report["parts"]["ops"]["reason"] == "needs tifffile"
    assert report["ratios"] == [{"part": "sgcl", "what": "a", "ratio_of": "b", "ratio": 2.0}]
    assert "not measured: needs tifffile" in markdown_all(report)
    assert set(few) < set(parts)


def test_places_are_looked_at_before_the_run(ssmamba, tmp_path):
    for option in ("--json", "--out"):
        result = ssmamba("benchmark", "all", "--quick", option, tmp_path / "missing" / "x")
        assert result.exit_code == 2
        assert "does not exist" in result.stderr
        assert "==" not in result.stderr
