"""Tables and files."""

import json

import pytest

from ssmamba_models.benchmark.bandwidth import copy_bandwidth
from ssmamba_models.benchmark.machine import describe_machine, machine_line, require_device
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
    machine = describe_machine()
    assert {"date", "cpu", "simd", "cores", "threads", "load_average", "gpu", "torch", "timm"} <= set(machine)
    assert machine["gpu"] is None
    assert machine["torch"] in machine_line(machine)
    json.dumps(machine)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "nonsense"])
def test_devices_that_cannot_be_measured(name):
    with pytest.raises(ValueError, match=f"device '{name}'"):
        require_device(name)


def test_copy_bandwidth_is_positive():
    assert copy_bandwidth("cpu", size=2**16) > 0
