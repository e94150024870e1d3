"""The extraction example on its own slide, twice; the job array's script is at least a script."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("extract_slide", EXAMPLES / "extract_slide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["extract_slide.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        module.main()
        return capsys.readouterr().out

    run.module = module
    return run


def test_a_slide_that_it_draws_and_one_that_is_given(run, tmp_path):
    out = run("--model", "test_ssmamba", "--tile-size", 96)
    assert "level 0 at 0.5 um/px" in out
    tiles = int(out.split()[0])
    assert tiles > 50
    picture = Image.open(tmp_path / "extract_slide.png")
    assert picture.width == 900
    assert (tmp_path / "extract_job" / "thumbnails" / "drawn.png").exists()
    slide = run.module.draw_slide(tmp_path / "case.tif", side=448)
    given = run("--slide", slide, "--model", "test_ssmamba", "--tile-size", 96, "--mpp", 1, "--out", tmp_path / "mine")
    assert "features of case, each 96 px" in given


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_job_array_calls_the_command(tmp_path):
    """With an `ssmamba` that tells how it was called."""
    fake = tmp_path / "ssmamba"
    fake.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    fake.chmod(0o755)
    command = ["bash", str(EXAMPLES / "extract_slurm.sh"), "my slides", "job", "--retry-failed"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "6"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("extract|my slides|--out|job|--model|ssmamba_small|")
    assert "|--workers|6|" in done.stdout
    assert done.stdout.endswith("|--retry-failed|")
    alone = subprocess.run(command[:2], capture_output=True, text=True, env=environment)
    assert alone.returncode != 0
    assert "folder of slides" in alone.stderr
