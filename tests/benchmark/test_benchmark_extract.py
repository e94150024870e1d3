"""`benchmark extract` on a tiny model: the rows, the synthetic slide, the memory, and what is refused."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ssmamba_models.benchmark import extract as benchmark
from ssmamba_models.benchmark.extract import ExtractBenchmark, format_extract, run_extract, write_synthetic_slide

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
tifffile = pytest.importorskip("tifffile", reason="slides need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"model": "test_ssmamba", "tiles": 40, "tile_size": 64, "batch_size": 8, "workers": 0, "rounds": 2, "threads": 1}


@pytest.fixture(scope="module")
def report():
    before, benchmark._LEAST_ALONE = benchmark._LEAST_ALONE, 0.1
    yield run_extract(ExtractBenchmark(**TINY))
    benchmark._LEAST_ALONE = before


def test_rows_and_summary(report):
    rows, summary = report["results"], report["summary"]
    assert [row["tiles"] for row in rows] == [49, 49]  # a square of at least 40
    for row in rows:
        assert row["share"] == pytest.approx(row["tiles_per_s"] / row["alone_per_s"])
        assert 0 < row["wait_share"] < 1
    assert summary["share"] == pytest.approx(np.mean([row["share"] for row in rows]))
    if summary["peak_mib"] is not None:
        assert summary["peak_mib"] == max(row["peak_mib"] for row in rows) > 50
        assert summary["added_mib"] < 1000


def test_report_is_json_and_the_table_fits(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = format_extract(report)
    assert f"end to end {report['summary']['share']:.0%} of the model alone" in table
    assert max(map(len, table.splitlines())) <= 120


@pytest.mark.skipif(benchmark.memory_mib() is None, reason="this system does not tell the memory of processes")
def test_memory_is_of_this_process_and_its_children():
    before, peak_before = benchmark.memory_mib(), benchmark.memory_mib("VmHWM")
    hold = "import sys; held = bytearray(b'1') * 2**28; del held; print('.', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        now, peak = benchmark.memory_mib(), benchmark.memory_mib("VmHWM")
        child.stdin.close()
    assert 2 < now - before < 200
    assert peak - peak_before > 256


def test_a_system_that_tells_no_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "_resident", lambda pid, kind: None)
    assert benchmark.memory_mib() is None
    report = run_extract(ExtractBenchmark(**{**TINY, "rounds": 1}))
    assert report["results"][0]["peak_mib"] is report["summary"]["added_mib"] is None
    assert " - " in format_extract(report) or "  -\n" in format_extract(report)


@pytest.mark.skipif(benchmark.memory_mib() is None, reason="this system does not tell the memory of processes")
def test_children_are_found_without_lists_of_them():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = benchmark._children(os.getpid()), benchmark._children_among_all(os.getpid())
        child.stdin.close()
    assert child.pid in found[0]
    assert child.pid in found[1]


def test_the_synthetic_slide_is_a_pyramid_of_tissue(tmp_path):
    size = write_synthetic_slide(tmp_path / "a.tif", 1500**2)
    assert size == (1500, 1500)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert [page.shape for page in file.pages] == [(1500, 1500, 3), (375, 375, 3)]
        image = file.pages[0].asarray()
    assert abs(image.mean(axis=(0, 1)) - (200, 120, 170)).max() < 5
    assert len({image[y : y + 512, :512].tobytes() for y in (0, 512)}) == 2


def test_from_the_command_line(ssmamba, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_LEAST_ALONE", 0.1)
    out = tmp_path / "extract.json"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in {**TINY, "rounds": 1, "tiles": 36}.items()]
    result = ssmamba("benchmark", "extract", *options, "--json", out)
    assert result.exit_code == 0, result.output
    assert "end to end" in result.stdout
    assert json.loads(out.read_text())["results"][0]["tiles"] == 36


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "test_ssmambo"}, "did you mean test_ssmamba"),
        ({"tiles": 0}, "tiles must be at least 1, got 0"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"workers": -1}, "workers is -1"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_extract(ExtractBenchmark(**{**TINY, **changes}))
