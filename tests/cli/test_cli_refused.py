"""Every command that writes, where it may not: read-only folders, a full disk, another user's run.

Each says so in a line, ends with 2, and leaves what was there to the byte, and nothing half-written beside it.
"""

import contextlib
import hashlib
import shutil
import stat

import pytest
from fresh_process import run_command

for package in ("accelerate", "tensorboard", "h5py", "openslide", "tifffile", "sklearn", "matplotlib", "torchmil"):
    pytest.importorskip(package, reason="the commands need all extras")
pytest.importorskip("resource", reason="the limit that stands for a full disk")

from ssmamba_models.benchmark.extract import write_synthetic_slide  # noqa: E402
from ssmamba_models.data.synthetic_slides import write_synthetic_slides  # noqa: E402
from ssmamba_models.output import is_unfinished  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
]

TRAIN = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--quiet"]
SMALL = ["--model", "test_ssmamba", "--img-size", "64"]
CUT = ["--mpp", "0.5", "--tile-size", "64", "--workers", "0", "--quiet"]


@pytest.fixture(scope="module")
def inputs(labelled_tiles, tmp_path_factory):
    """Command -> its arguments, --out apart; and the runs that they need."""
    folder = tmp_path_factory.mktemp("inputs")
    write_synthetic_slide(folder / "slide.tif", 300 * 300)
    write_synthetic_slides(folder / "features", patients=12, tiles=12, feature_dim=6)
    features = str(folder / "features")
    slide_pretrain = ["slide-pretrain", "--features", features, "--model", "test_gigassl", *TRAIN]
    slide_pretrain += ["--set", "method_args.hidden_dim=8", "--set", "method_args.out_dim=8"]
    pretrain = ["pretrain", "--data", str(labelled_tiles), *SMALL, *TRAIN]
    for arguments, name in ((slide_pretrain, "encoder"), (pretrain, "run")):
        code, said = run_command([*arguments, "--out", str(folder / name)])
        assert code == 0, said
    labels = str(folder / "features" / "labels.csv")
    mil = ["mil", "train", "--features", features, "--labels", labels, "--aggregator", "abmil", "--folds", "2"]
    # Without workers: theirs would hand tiles over through files in memory, which the limit of a full disk counts too.
    evaluate = ["evaluate", "--data", str(labelled_tiles), "--model", "color_histogram", "--folds", "3"]
    evaluate += ["--workers", "0", "--device", "cpu", "--quiet"]
    return {
        "embed": ["embed", str(labelled_tiles), *SMALL, "--workers", "0", "--device", "cpu", "--quiet"],
        "extract": ["extract", str(folder / "slide.tif"), *SMALL, *CUT, "--device", "cpu"],
        "tile": ["tile", str(folder / "slide.tif"), *CUT],
        "pretrain": pretrain,
        "finetune": ["finetune", "--data", str(labelled_tiles), "--init", "none", *SMALL, *TRAIN],
        "slide-pretrain": slide_pretrain,
        "slide-embed": ["slide-embed", "--features", features, "--run", str(folder / "encoder"), "--quiet"],
        "evaluate": evaluate,
        "mil train": [*mil, "--epochs", "1", "--device", "cpu", "--quiet", "--no-plots"],
        "convert": ["convert", features, "--from", "ssmamba", "--to", "clam", "--quiet"],
        "publish": ["publish", str(folder / "run"), "--repo-id", "a/b"],
    }


COMMANDS = (
    "embed", "extract", "tile", "pretrain", "finetune", "slide-pretrain", "slide-embed", "evaluate", "mil train",
    "convert", "publish",
)  # fmt: skip
# These go on in a folder that is there.
GOING_ON = {"extract": [], "tile": [], "pretrain": ["--resume"], "finetune": ["--resume"], "mil train": ["--resume"]}
GOING_ON |= {"slide-pretrain": ["--resume"]}


def place_of(command, folder):
    """--out of a command: a file or a folder, or publish's --dry-run."""
    out = folder / {"embed": "f.h5", "slide-embed": "v.h5"}.get(command, "out")
    return ["--dry-run" if command == "publish" else "--out", str(out)]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def read_only(folder):
    """Nobody without root's rights may write in the folder, or what lies in it."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & 0o555)
    try:
        yield
    finally:
        for path in sorted(modes):
            path.chmod(modes[path])


def assert_refused(code, said):
    assert code == 2, said[-3000:]
    assert "Error: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder(inputs, tmp_path, command):
    folder = tmp_path / "locked"
    folder.mkdir()
    with read_only(folder):
        code, said = run_command([*inputs[command], *place_of(command, folder)], may_write_all=False)
    assert_refused(code, said)
    assert "locked" in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("limit", [0, 5000])
def test_a_full_disk(inputs, tmp_path, command, limit):
    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    code, said = run_command([*inputs[command], *place_of(command, folder)], limit=limit)
    # Some outputs are smaller than the larger limit.
    assert code in ((1, 2) if limit == 0 else (0, 1, 2)), said[-3000:]
    assert "Traceback" not in said
    assert code == 0 or "too large" in said or "disk" in said or "cannot write" in said, said
    assert (folder / "mine").read_text() == "mine"
    left = [path for path in folder.rglob("*") if is_unfinished(path)]
    assert left == []


@pytest.mark.parametrize("command", sorted(GOING_ON))
def test_another_users_run(inputs, tmp_path, command):
    folder, place = tmp_path / "theirs", place_of(command, tmp_path / "theirs")
    folder.mkdir()
    code, said = run_command([*inputs[command], *place])
    assert code == 0, said[-3000:]
    before = digests(folder)
    log = folder / "out" / "log.jsonl"
    with read_only(folder):
        code, said = run_command([*inputs[command], *GOING_ON[command], *place], may_write_all=False)
    assert_refused(code, said)
    assert "theirs" in said
    assert digests(folder) == before
    assert not log.exists() or log.read_text().endswith("\n")
    shutil.rmtree(folder)
