"""`ssmamba doctor`: finds what is broken, even where torch or timm does not import, and names the cure."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from ssmamba_models.cli.checks import hub, kernels, machine, packages
from ssmamba_models.cli.checks.probe import Probe, finish_probe, start_probe


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def report():
    code = "from ssmamba_models.cli.main import main; main()"
    run = subprocess.run([sys.executable, "-c", code, "doctor", "--json", "-"], capture_output=True, text=True)
    return run.returncode, json.loads(run.stdout)


class TestTheCommand:
    def test_this_installation_is_sound(self, report):
        returncode, facts = report
        broken = [finding for finding in facts["findings"] if finding["status"] == "problem"]
        assert (returncode, facts["problems"], broken) == (0, 0, [])

    def test_it_looks_at_everything(self, report):
        names = {(finding["subject"], finding["name"]) for finding in report[1]["findings"]}
        assert {
            ("packages", "python"),
            ("packages", "torch"),
            ("packages", "timm"),
            ("packages", "torch + torchvision"),
            ("packages", "h5py"),
            ("packages", "triton"),
            ("machine", "processor"),
            ("machine", "threads"),
            ("machine", "devices"),
            ("kernels", "directional_scan"),
            ("hub", "cache"),
            ("hub", "token"),
        } <= names

    def test_every_problem_and_warning_has_a_cure(self, report):
        for finding in report[1]["findings"]:
            assert finding["status"] == "ok" or finding["cure"], finding


@pytest.fixture
def doctor_beside(tmp_path, monkeypatch):
    """Run `ssmamba doctor` where a package is a file of this code; returns what it printed."""

    def doctor_beside(package, text):
        (tmp_path / f"{package}.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        code = "from ssmamba_models.cli.main import main; main()"
        run = subprocess.run(
            [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert run.returncode == 1, run.stderr
        return run.stdout

    return doctor_beside


def test_a_broken_torchvision_is_named_and_the_doctor_survives(doctor_beside):
    error = "raise RuntimeError('operator torchvision::nms does not exist')"
    lines = doctor_beside("torchvision", error).splitlines()
    (at,) = [index for index, line in enumerate(lines) if "torchvision::nms does not exist" in line]
    assert "problem" in lines[at]
    assert "--force-reinstall torch torchvision" in lines[at + 1]
    assert any("timm" in line and "after torchvision failed" in line for line in lines)


def test_a_torch_that_does_not_load_is_named(doctor_beside):
    out = doctor_beside("torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    assert "libtorch_cpu.so" in out
    assert "unknown, because torch failed" in out


class TestPackages:
    def judge(self, core, optional=(), failure=""):
        probes = Probe(list(core), failure), Probe(list(optional), failure)
        return by_name(packages.check_packages(*probes))

    def good(self, **versions):
        return [{"name": name, "version": versions.get(name, "9.9.9")} for name in packages.CORE]

    def test_missing(self):
        core = [fact for fact in self.good() if fact["name"] != "timm"]
        core.append({"name": "timm", "missing": True, "error": "No module named 'timm'"})
        found = self.judge(core)["timm"]
        assert (found.status, found.cure) == ("problem", "pip install timm")

    def test_too_old(self):
        found = self.judge(self.good(timm="1.0.9", torch="2.6.0+cpu"))
        assert (found["timm"].status, found["torch"].status) == ("problem", "ok")
        assert 'pip install --upgrade "timm>=1.0.26"' in found["timm"].cure

    def test_a_crash_is_put_at_the_package_that_crashed(self):
        before = self.good()[: packages.CORE.index("torch")]
        found = self.judge(before, failure="crashed with signal 11")
        assert found["numpy"].status == "ok"
        assert found["torch"].text == "crashed with signal 11"
        assert "after torch failed" in found["timm"].text

    def test_a_missing_optional_package_is_no_fault(self):
        optional = [{"name": "h5py", "missing": True, "error": "No module named 'h5py'"}]
        found = self.judge(self.good(), optional)["h5py"]
        assert (found.status, found.cure) == ("ok", 'pip install "ssmamba-models[wsi]"')

    def test_a_broken_optional_package_is_a_warning(self):
        error = "OSError: libopenslide.so.1: cannot open shared object file"
        found = self.judge(self.good(), [{"name": "openslide", "missing": False, "error": error}])
        assert found["openslide"].status == "warning"
        assert "libopenslide" in found["openslide"].text

    @pytest.mark.parametrize(
        ("torch", "vision", "pin", "status"),
        [
            ("2.6.0+cpu", "0.21.0+cpu", "torch==2.6.0", "ok"),
            ("2.6.0", "0.21.0+cpu", "torch==2.6.0", "ok"),
            ("2.7.0", "0.21.0", "torch==2.6.0", "problem"),
            ("2.6.0+cpu", "0.21.0+cu124", "torch==2.6.0", "problem"),
        ],
    )
    def test_torch_and_torchvision_as_a_pair(self, monkeypatch, torch, vision, pin, status):
        versions = {"torch": torch, "torchvision": vision}
        monkeypatch.setattr(packages, "_installed_version", lambda name: versions.get(name, ""))
        monkeypatch.setattr(packages, "_requirements", lambda name: ["numpy", pin])
        found = self.judge(self.good())["torch + torchvision"]
        assert found.status == status
        assert status == "ok" or "install both from one place" in found.cure

    def test_the_minimum_is_that_of_setup_cfg(self):
        text = (Path(__file__).parents[2] / "setup.cfg").read_text()
        for name, numbers in packages.MINIMUM.items():
            assert f"{name}>={'.'.join(map(str, numbers))}" in text


KERNELS = {
    "forced": None,
    "backends": {
        "torch": {"available": True, "devices": ["cpu", "cuda"], "reason": "", "cure": ""},
        "c": {"available": False, "devices": ["cpu"], "reason": "not compiled", "cure": "install gcc"},
        "triton": {"available": False, "devices": ["cuda"], "reason": "no triton", "cure": "install it"},
    },
    "operators": {"directional_scan": {"cpu": "torch", "cuda": "triton"}},
}
TORCH_FACTS = {"threads": 1, "built_for": "", "devices": [], "bf16": False}


class TestKernels:
    @pytest.fixture(autouse=True)
    def no_gpu_device(self, monkeypatch):
        monkeypatch.setattr(machine.os.path, "exists", lambda path: False)

    def judge(self, devices=(), **changes):
        facts = {"backends": {**KERNELS, **changes}, "torch": {**TORCH_FACTS, "devices": devices}}
        return by_name(
            kernels.check_kernels(Probe([{"part": name, "facts": fact} for name, fact in facts.items()], ""))
        )

    def test_a_backend_is_a_warning_where_there_is_a_cure(self):
        found = self.judge(devices=["NVIDIA H200"])
        assert {name: found[name].status for name in ("torch", "c", "triton")} == {
            "torch": "ok",
            "c": "warning",
            "triton": "warning",
        }
        assert found["triton"].cure == "install it"

    def test_a_gpu_that_torch_cannot_use_leaves_its_backends_a_warning(self, monkeypatch):
        monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/nvidia0")
        assert self.judge()["triton"].status == "warning"

    def test_without_a_gpu_its_backends_are_missing_as_they_should_be(self):
        found = self.judge()
        assert {name: finding.status for name, finding in found.items()} == {
            "torch": "ok",
            "c": "warning",
            "triton": "ok",
            "directional_scan": "ok",
        }
        assert (found["c"].cure, found["triton"].cure) == ("install gcc", "")
        assert found["directional_scan"].text == "cpu: torch, cuda: triton"

    @pytest.mark.parametrize(("forced", "status"), [("torch", "warning"), ("c", "problem")])
    def test_forced(self, forced, status):
        found = self.judge(forced=forced)["forced"]
        assert found.status == status
        assert "unset SSMAMBA_BACKEND" in found.cure

    def test_an_operator_that_the_forced_backend_lacks(self):
        operators = {"causal_conv1d": {"cpu": "none: it cannot"}}
        found = self.judge(forced="torch", operators=operators)["causal_conv1d"]
        assert (found.status, found.cure) == ("problem", "unset SSMAMBA_BACKEND")

    def test_an_unknown_backend_is_named(self, monkeypatch):
        monkeypatch.setenv("SSMAMBA_BACKEND", "nonsense")
        (found,) = kernels.check_kernels(finish_probe(start_probe(kernels.BACKENDS)))
        assert found.status == "problem"
        assert "nonsense" in found.text
        assert found.cure == "unset SSMAMBA_BACKEND"

    @pytest.mark.parametrize(
        "probe", [Probe([], "ImportError: x"), Probe([{"part": "backends", "error": "ImportError: x"}], "")]
    )
    def test_no_answer(self, probe):
        (found,) = kernels.check_kernels(probe)
        assert found.status == "problem"
        assert "ImportError: x" in found.text


class TestMachine:
    def judge(self, **changes):
        fact = {"part": "torch", "facts": {**TORCH_FACTS, **changes}}
        return by_name(machine.check_machine(Probe([fact], "")))

    def test_more_threads_than_cores(self, monkeypatch):
        monkeypatch.setattr(machine, "count_cores", lambda: 2)
        found = self.judge(threads=64)["threads"]
        assert (found.status, found.cure) == ("warning", "export OMP_NUM_THREADS=2")

    def test_devices(self):
        found = self.judge(devices=["NVIDIA H200"], bf16=True)["devices"]
        assert found.text == "cpu, cuda: NVIDIA H200 (bfloat16)"

    def test_other_devices(self):
        assert self.judge(other="mps")["devices"].text == "cpu, mps"

    def test_little_shared_memory(self, monkeypatch):
        usage = namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
        monkeypatch.setattr(machine.os.path, "isdir", lambda path: True)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
        found = self.judge()["shared memory"]
        assert found.status == "warning"
        assert "--shm-size" in found.cure

    def test_torch_broken(self):
        found = by_name(machine.check_machine(Probe([], "ImportError: x")))["devices"]
        assert found.status == "problem"
        assert "ImportError: x" in found.text


class TestHub:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch, tmp_path):
        for name in (
            *("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"),
            *("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"),
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def test_a_folder_that_must_not_be_looked_into(self, monkeypatch):
        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", lambda path, **options: refuse(path))
        assert by_name(hub.check_hub())["cache"].status == "ok"

    def test_plain(self, tmp_path):
        found = by_name(hub.check_hub())
        assert str(tmp_path / "hf" / "hub") in found["cache"].text
        assert "will be made" in found["cache"].text
        assert found["token"].text.startswith("none")
        assert not (tmp_path / "hf").exists()

    @pytest.mark.parametrize("place", ["environment", "file"])
    def test_the_token_is_never_shown(self, monkeypatch, tmp_path, place):
        if place == "environment":
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
        else:
            (tmp_path / "hf").mkdir()
            (tmp_path / "hf" / "token").write_text("hf_secret")
        findings = hub.check_hub()
        assert by_name(findings)["token"].text.startswith("present")
        assert "secret" not in repr(findings)

    def test_offline(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert by_name(hub.check_hub())["offline"].status == "warning"

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("HF_HUB_OFFLINE", "true"),
            ("HF_HUB_OFFLINE", "0"),
            ("TRANSFORMERS_OFFLINE", "1"),
            ("HF_HUB_CACHE", "$HOME/one"),
            ("HUGGINGFACE_HUB_CACHE", "~/two"),
            ("HF_HOME", "$HOME/three"),
        ],
    )
    def test_the_client_reads_the_variables_alike(self, monkeypatch, tmp_path, variable, value):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv(variable, value)
        code = "from huggingface_hub.constants import HF_HUB_CACHE as c, HF_HUB_OFFLINE as o; print(c); print(o)"
        cache, offline = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        found = by_name(hub.check_hub())
        assert found["cache"].text.startswith(f"{cache} (")
        assert (found["offline"].status == "warning") == (offline == "True")

    def test_endpoint(self, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
        assert by_name(hub.check_hub())["endpoint"].status == "problem"

    def test_a_file_in_place_of_the_cache(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
        found = by_name(hub.check_hub())["cache"]
        assert found.status == "problem"
        assert "HF_HOME" in found.cure

    def test_a_cache_that_is_not_writable(self, monkeypatch):
        monkeypatch.setattr(hub.os, "access", lambda path, mode: False)
        assert "not writable" in by_name(hub.check_hub())["cache"].text


class TestProbe:
    def test_facts_among_other_output(self):
        probe = finish_probe(start_probe("print('noise'); report(a=1); report(b=sys.argv[1])", "x"))
        assert probe == Probe([{"a": 1}, {"b": "x"}], "")

    def test_a_crash_keeps_what_was_said_before(self):
        code = "import os; report(a=1); os.kill(os.getpid(), 9)"
        assert finish_probe(start_probe(code)) == Probe([{"a": 1}], "crashed with signal 9")

    def test_an_exception(self):
        assert finish_probe(start_probe("raise ValueError('why')")).failure == "ValueError: why"

    def test_one_that_hangs(self):
        probe = finish_probe(start_probe("report(a=1)\nimport time; time.sleep(60)"), timeout=1)
        assert probe == Probe([{"a": 1}], "no answer within 1 s")
