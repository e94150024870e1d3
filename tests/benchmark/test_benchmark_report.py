"""Tables and files."""

import json

import pytest

from ssmamba_models.benchmark import machine
from ssmamba_models.benchmark.bandwidth import copy_bandwidth
from ssmamba_models.benchmark.machine import describe_machine, machine_text, require_device
from ssmamba_models.benchmark.report import format_table, write_json


def test_columns_line_up_and_remarks_run_on():
    table = format_table(("name", "ms"), [("a", "1.0"), ("title that runs on",), ("bcdefg", "22.0")])
    assert table.splitlines() == ["name      ms", "a        1.0", "title that runs on", "bcdefg  22.0"]


def test_a_remark_after_full_cells_keeps_the_columns():
    table = format_table(("name", "px", "ms"), [("a", "224", "1.0"), ("b", "100", "not measured")])
    assert table.splitlines()[0].split() == ["name", "px", "ms"]


def test_json_replaces_the_old_file_whole(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("old")
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(out, {"x": float("nan")})
    assert out.read_text() == "old"
    write_json(out, {"x": 1.5})
    assert json.loads(out.read_text()) == {"x": 1.5}
    assert list(tmp_path.iterdir()) == [out]


def test_machine_names_what_was_measured():
    report = describe_machine()
    assert {"date", "cpu", "simd", "cores", "threads", "load_average", "gpu", "torch", "timm"} <= set(report)
    assert report["gpu"] is None
    assert report["torch"] in machine_text(report)
    json.dumps(report)


@pytest.mark.parametrize(
    ("flags", "names", "bf16"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16", "AVX2, AVX-512, AVX512-BF16, AMX-BF16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8", "AVX2, AVX-512, AVX512-VNNI, AMX-INT8", False),
        ("Features\t: fp asimd bf16", "NEON, BF16", True),
    ],
)
def test_instruction_sets_are_named(monkeypatch, flags, names, bf16):
    text = f"processor\t: 0\nmodel name\t: A CPU\n{flags}\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    report = describe_machine()
    assert (report["cpu"], report["bf16_hardware"]) == ("A CPU", bf16)
    assert f"A CPU ({names}), " in machine_text(report)
    assert ("is emulated" in machine_text(report, ["float32", "bfloat16"])) is not bf16
    assert "emulated" not in machine_text(report, ["float32"])


def test_a_system_that_does_not_tell_its_instructions(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(machine.Path, "read_text", missing)
    report = describe_machine()
    assert report["instruction_sets"] is report["bf16_hardware"] is None
    assert f"({report['simd']})" in machine_text(report, ["bfloat16"])
    assert "emulated" not in machine_text(report, ["bfloat16"])


@pytest.mark.parametrize(("load", "warned"), [(2.1, True), (2.0, False), (None, False)])
def test_a_machine_that_others_use_is_warned_of(load, warned):
    text = machine_text({**describe_machine(), "cores": 4, "load_average": load})
    assert ("warning: load average 2.1 at the start, on 4 cores" in text) is warned


def test_the_load_is_that_before_the_first_measurement(monkeypatch):
    before = describe_machine()["load_average"]
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    assert describe_machine()["load_average"] == before


@pytest.mark.parametrize("name", ["cuda:99", "meta", "nonsense"])
def test_devices_that_cannot_be_measured(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        require_device(name)


def test_copy_bandwidth_is_positive():
    assert copy_bandwidth("cpu", size=2**16) > 0
