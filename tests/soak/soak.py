"""Kill jobs at random moments, go on with them, and compare what they end with: python tests/soak/soak.py --help

`ssmamba extract`, `pretrain` and `slide-pretrain` take turns. Half of the kills come by the clock, half at a touch of a
file of the job, where a moment later or earlier makes a difference.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "wsi"))

import torch
from job_cases import digests, make_slides
from killable_jobs import count_touches
from safetensors.torch import load_file

from ssmamba_models.cli.main import main as ssmamba
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.synthetic_slides import write_synthetic_slides

# What a job that never ends is killed after; that is a failure.
_LONGEST = 600.0
_MOST_KILLS_OF_A_JOB = 6
_TRAINING = ["--workers", "0", "--device", "cpu", "--batch-size", "4", "--epochs", "3", "--quiet"]
_TRAINING += ["--set", "log_every=1", "--set", "checkpoint_steps=1"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A command that is killed.

    Attributes:
        name: of the sub-command.
        begin: its arguments, --out apart.
        go_on: what is added where it was killed before.
        result: what the folder of a finished job holds that an unbroken one must hold too.
    """

    name: str
    begin: list[str]
    go_on: list[str]
    result: Callable[[Path], object]


@dataclasses.dataclass
class Tally:
    """What happened to the jobs of one kind."""

    kind: str
    jobs: int = 0
    starts: int = 0
    by_clock: int = 0
    at_touch: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """Of both ways."""
        return self.by_clock + self.at_touch


def make_kinds(data: Path) -> list[Kind]:
    """Write the data, and say what runs on it."""
    data.mkdir()
    slides = make_slides(data / "slides")
    tiles = write_synthetic_tiles(data / "tiles", tiles_per_kind=4, size=64)
    write_synthetic_slides(data / "features", patients=6, tiles=12, feature_dim=6)
    sizes = ["--mpp", "1", "--tile-size", "64", "--img-size", "64"]
    extract = ["extract", str(slides), "--model", "test_ssmamba", *sizes, "--batch-size", "8", "--device", "cpu"]
    pretrain = ["pretrain", "--data", str(tiles), "--model", "test_ssmamba", "--img-size", "64", *_TRAINING]
    slide_pretrain = ["slide-pretrain", "--features", str(data / "features"), "--model", "test_gigassl", *_TRAINING]
    heads = ["--set", "method_args.hidden_dim=8", "--set", "method_args.out_dim=8"]
    return [
        Kind("extract", [*extract, "--workers", "0", "--shared-aug", "2", "--quiet"], [], digests),
        Kind("pretrain", pretrain, ["--resume"], lambda run: _training(run, "weights.safetensors")),
        Kind(
            "slide-pretrain", [*slide_pretrain, *heads], ["--resume"], lambda run: _training(run, "model.safetensors")
        ),
    ]


def _training(run: Path, weights: str) -> object:
    """Weights, curve and checkpoints of a run; times and what TensorBoard has differ from run to run."""
    tensors = {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in load_file(run / weights).items()
    }
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["loss"], line["lr"]) for line in lines if line.get("event") is None]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    return tensors, curve, checkpoints


def start(arguments: list[str], out: Path, kill_at: int | None, log: Path) -> int:
    """Fork, and run a command in the child; the number of the process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        touches = count_touches(str(out), kill_at)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        ssmamba([*arguments, "--out", str(out)], standalone_mode=True)
    except SystemExit as error:
        code = error.code or 0
        with contextlib.suppress(OSError):
            log.with_suffix(".touches").write_text(str(touches[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, kill_after: float | None) -> tuple[int, bool]:
    """Wait for a process, or kill it after so many seconds; how it ended, and whether it hung."""
    begun = time.monotonic()
    limit, hung = (_LONGEST, True) if kill_after is None else (kill_after, False)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        if time.monotonic() - begun > limit:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return os.waitstatus_to_exitcode(status), hung
        time.sleep(0.002)


class Soak:
    """Kills jobs of one kind.

    Args:
        kind: what runs.
        folder: made; jobs that came out right are removed from it.
        dice: when to kill.
    """

    def __init__(self, kind: Kind, folder: Path, dice: random.Random):
        self.kind, self.folder, self.dice, self.tally = kind, folder, dice, Tally(kind.name)
        folder.mkdir()
        self.log = folder / "job.log"
        unbroken, begun = folder / "unbroken", time.monotonic()
        code, _ = wait(start(kind.begin, unbroken, None, self.log), None)
        if code:
            raise RuntimeError(f"{kind.name} ends with {code} where nobody kills it:\n{self.log.read_text()}")
        self.seconds, self.touches = time.monotonic() - begun, int(self.log.with_suffix(".touches").read_text())
        self.expected = kind.result(unbroken)

    def one_job(self, kills: int) -> None:
        """Begin a job, kill it so often, go on until it is whole, and look at it."""
        out = self.folder / f"job{self.tally.jobs}"
        begun = time.monotonic()
        self.tally.jobs += 1
        for _ in range(kills):
            if self._killed(out) is None:
                break
        code, hung = wait(start(self._arguments(out), out, None, self.log), None)
        self.tally.starts += 1
        self.tally.seconds += time.monotonic() - begun
        problem = self._problem(out, code, hung)
        if problem is None:
            shutil.rmtree(out)
        else:
            self.tally.failures.append(f"{out}: {problem}")

    def _arguments(self, out: Path) -> list[str]:
        return self.kind.begin + (self.kind.go_on if out.exists() else [])

    def _killed(self, out: Path) -> int | None:
        """Start and kill once; None where it ended with an error of its own."""
        by_clock = self.dice.random() < 0.5
        kill_at = None if by_clock else self.dice.randint(1, self.touches)
        pid = start(self._arguments(out), out, kill_at, self.log)
        code, _ = wait(pid, self.dice.uniform(0, self.seconds) if by_clock else _LONGEST)
        self.tally.starts += 1
        if code == -signal.SIGKILL:
            self.tally.by_clock += by_clock
            self.tally.at_touch += not by_clock
        return code if code in (0, -signal.SIGKILL) else None

    def _problem(self, out: Path, code: int, hung: bool) -> str | None:
        if hung:
            return f"did not end within {_LONGEST:g} s"
        if code:
            return f"ended with {code}: {self.log.read_text(errors='replace')[-2000:]}"
        left = [str(path.relative_to(out)) for path in out.rglob(".*")]
        if left:
            return f"left {left}"
        return None if self.kind.result(out) == self.expected else "differs from a job that was never killed"


def run(out: Path, kills: int, seed: int) -> list[Tally]:
    """Kill jobs of each kind in turn until there were so many kills."""
    out.mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    soaks = [Soak(kind, out / kind.name, dice) for kind in make_kinds(out / "data")]
    while sum(soak.tally.kills for soak in soaks) < kills:
        for soak in soaks:
            left = kills - sum(soak.tally.kills for soak in soaks)
            if left:
                soak.one_job(min(left, dice.randint(1, _MOST_KILLS_OF_A_JOB)))
        print(f"{sum(soak.tally.kills for soak in soaks)} of {kills} kills", file=sys.stderr, flush=True)
    return [soak.tally for soak in soaks]


def table(tallies: list[Tally]) -> str:
    """As Markdown."""
    rows = ["| job | jobs | starts | kills by the clock | kills at a file | other than unbroken | seconds |"]
    rows.append("|---|---:|---:|---:|---:|---:|---:|")
    for tally in tallies:
        numbers = (
            tally.jobs,
            tally.starts,
            tally.by_clock,
            tally.at_touch,
            len(tally.failures),
            f"{tally.seconds:.0f}",
        )
        rows.append(f"| {tally.kind} | {' | '.join(map(str, numbers))} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--out", type=Path, required=True, help="new folder; jobs that came out wrong stay there")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    arguments = parser.parse_args()
    tallies = run(arguments.out, arguments.kills, arguments.seed)
    print(table(tallies))
    failures = [failure for tally in tallies for failure in tally.failures]
    print("\n".join(failures) or "all jobs ended as unbroken ones do, and left nothing behind")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
