"""A dry run: what a job would do, with nothing written and little kept."""

import numpy as np
import pytest

pytest.importorskip("h5py", reason="feature files need the [wsi] extra")
pytest.importorskip("openslide", reason="slides need the [wsi] extra")

from job_cases import TINY, digests, extract, make_slides

from ssmamba_models.wsi.decoding import Decoder
from ssmamba_models.wsi.dry_run import dry_run, measure_speed
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.status import read_summary

pytestmark = [
    pytest.mark.filterwarnings("ignore::ssmamba_models.engine.encoder.RandomWeightsWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("dry") / "slides")


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """A job that ran through; not to be written in."""
    out = tmp_path_factory.mktemp("whole") / "job"
    extract(slides, out)
    return out


def test_counts_what_is_to_do_and_writes_nothing(slides, whole, tmp_path):
    run = dry_run(slides, tmp_path / "job", ExtractPlan(**TINY), progress=False)
    rows = read_summary(whole / "summary.csv")
    assert {slide.name: str(slide.tiles) for slide in run.slides} == {name: row["tiles"] for name, row in rows.items()}
    assert run.tiles == sum(slide.tiles for slide in run.slides)
    assert run.seconds == pytest.approx(run.tiles / run.tiles_per_second)
    assert not (tmp_path / "job").exists()


def test_of_a_job_that_is_done(slides, whole):
    before = digests(whole, ("*",))
    run = dry_run(slides, whole, ExtractPlan(**TINY), progress=False)
    assert [slide.status for slide in run.slides] == ["done"] * 3
    assert run.tiles == run.seconds == 0
    assert digests(whole, ("*",)) == before


def test_keeps_no_places_of_tiles(slides, tmp_path, monkeypatch):
    answers, perform = [], Decoder.perform

    def watch(decoder, task):
        answers.append(perform(decoder, task))
        return answers[-1]

    monkeypatch.setattr(Decoder, "perform", watch)
    run = dry_run(slides, tmp_path / "job", ExtractPlan(**TINY), progress=False)
    # Those of thousands of slides fill the memory: all slides are asked for before the first is heard.
    assert sorted(answer.tiles for answer in answers) == sorted(slide.tiles for slide in run.slides)
    assert not any(isinstance(value, np.ndarray) for answer in answers for value in vars(answer).values())


class Slow:
    """An encoder that takes so many seconds for a batch, of a clock that it moves itself."""

    size = 8

    def __init__(self, monkeypatch, *seconds):
        self.now, self.seconds, self.batches = 0.0, list(seconds), 0
        monkeypatch.setattr("ssmamba_models.wsi.dry_run.time.perf_counter", lambda: self.now)

    def start(self, pixels):
        self.batches += 1
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]

    def finish(self, started):
        pass


@pytest.mark.parametrize(
    ("seconds", "batches", "speed"),
    [
        ((5, 0.1), 1 + 20, 4 / 0.1),  # after a batch to warm up, two seconds
        ((5, 1), 1 + 3, 4 / 1),  # three batches
        ((12, 10), 1 + 1, 4 / 10),  # too slow for three
        ((100,), 1, 4 / 100),  # or for one more
    ],
)
def test_timing_a_model_ends_however_slow_it_is(monkeypatch, seconds, batches, speed):
    encoder = Slow(monkeypatch, *seconds)
    assert measure_speed(encoder, 4) == pytest.approx(speed)
    assert encoder.batches == pytest.approx(batches, abs=1 if batches > 10 else 0)
