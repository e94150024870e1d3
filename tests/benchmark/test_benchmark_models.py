"""`benchmark models` on timm's test models: rows, ratios, and what is refused."""

import json
from functools import partial

import pytest

from ssmamba_models.benchmark import model_step, models
from ssmamba_models.benchmark.memory import measure_peak_mib
from ssmamba_models.benchmark.model_step import ModelStep, StepSpec
from ssmamba_models.benchmark.models import ModelsPlan, format_models, run_models
from ssmamba_models.cli import benchmark as cli_benchmark
from ssmamba_models.cli import main as cli_main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"model": "test_ssmamba", "peers": ("test_vit", "test_convnext"), "rounds": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def report():
    return run_models(ModelsPlan(**TINY, sizes=(64, 72), memory=False, threads=1))


def rows_of(report, **wanted):
    return [row for row in report["results"] if all(row[key] == value for key, value in wanted.items())]


def test_every_model_has_a_row_at_every_size(report):
    assert [(r["size"], r["model"]) for r in report["results"]] == [
        (size, name) for size in (64, 72) for name in ("test_ssmamba", "test_vit", "test_convnext")
    ]


def test_rows_hold_what_they_promise(report):
    for row in rows_of(report, size=64):
        assert row["reason"] is None
        assert row["images_per_s"] == pytest.approx(2000 / row["median_ms"])
        assert row["ns_per_pixel"] == pytest.approx(row["median_ms"] * 1e6 / (2 * 64 * 64))
        assert 0 < row["parameters_m"] < 1
        assert row["gmacs"] > 0
        assert row["peak_mib"] is None
        assert (row["ours_over_peer"] is None) == (row["model"] == "test_ssmamba")


def test_a_peer_that_cannot_take_a_size_is_reported(report):
    (vit,) = rows_of(report, size=72, model="test_vit")
    assert "divisible by patch size" in vit["reason"]
    assert "images_per_s" not in vit
    line = next(line for line in format_models(report).splitlines() if "not measured" in line)
    assert "test_vit" in line
    assert "72" in line


def test_report_is_json_and_the_table_fits(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["settings"]["threads"] == report["machine"]["threads"] == 1
    assert max(map(len, format_models(report).splitlines())) <= 110


def test_training_steps_move_the_weights():
    step = ModelStep(StepSpec("test_ssmamba", 64, 2, train=True))
    before = [p.detach().clone() for p in step.model.parameters()]
    step()
    assert any((p != old).any() for p, old in zip(step.model.parameters(), before))


def test_the_allocator_is_the_systems_unless_told(ssmamba, monkeypatch):
    kept = []

    def keep(place):
        kept.append(place)
        return True

    for module in (cli_main, cli_benchmark, models):
        monkeypatch.setattr(module, "keep_large_blocks", partial(keep, module.__name__))
    monkeypatch.setattr(models, "large_blocks_kept", lambda: bool(kept))
    few = ("benchmark", "models", "--model", "test_ssmamba", "--peers", "", "--sizes", 32, "--batch-size", 1)
    few = (*few, "--rounds", 1, "--threads", 1)
    result = ssmamba(*few)
    assert result.exit_code == 0, result.output
    assert kept == []
    assert "malloc as it comes" in result.stdout
    result = ssmamba(*few, "--allocator", "kept")
    assert result.exit_code == 0, result.output
    assert kept == [models.__name__]
    assert "large blocks kept" in result.stdout
    assert ssmamba("list").exit_code == 0
    assert kept[1:] == [cli_main.__name__]


def test_blocks_that_cannot_be_kept_are_not_said_to_be(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with pytest.raises(ValueError, match=r"--allocator kept: .*GLIBC_TUNABLES .*use --allocator system"):
        run_models(ModelsPlan(**TINY, sizes=(64,), allocator="kept"))


def test_a_step_knows_the_dtypes_that_a_plan_may_ask_for():
    assert tuple(model_step.DTYPES) == models.DTYPES


def test_training_and_bfloat16_are_measured():
    plan = ModelsPlan("test_ssmamba", (), (32,), 1, dtype="bfloat16", train=True, memory=False, rounds=1)
    (row,) = run_models(plan)["results"]
    assert row["reason"] is None


def test_compiled_models_get_rows_of_their_own(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model: model)  # what it does is torch's matter, and takes a minute
    plan = ModelsPlan(**TINY, sizes=(64,), memory=False, compile=True, layout="contiguous")
    report = run_models(plan)
    assert [row["compiled"] for row in report["results"]] == [False, True] * 3
    assert "test_vit*" in format_models(report)


def test_time_per_pixel_is_quoted_against_512_px(monkeypatch):
    monkeypatch.setattr(models, "REFERENCE_SIZE", 32)
    plan = ModelsPlan("test_ssmamba", (), (32, 64), 1, memory=False, rounds=1, layout="channels_last")
    small, large = run_models(plan)["results"]
    assert small["ns_per_pixel_over_512"] == 1.0
    assert large["ns_per_pixel_over_512"] == pytest.approx(large["ns_per_pixel"] / small["ns_per_pixel"])
    assert small["channels_last"]


def test_batches_hold_about_as_many_pixels_at_every_size():
    plan = ModelsPlan(sizes=(224, 512, 1024, 2048))
    assert [plan.batch_for(size) for size in plan.sizes] == [83, 16, 4, 1]
    assert ModelsPlan(sizes=(224, 512)).batch_for(512) == 4
    assert ModelsPlan(sizes=(224,), device="cuda").batch_for(224) == 256
    assert ModelsPlan(sizes=(224,), batch_size=3).batch_for(224) == 3


def test_peak_memory_grows_with_the_batch():
    few, many = (measure_peak_mib(StepSpec("test_ssmamba", 128, n, threads=1)) for n in (1, 64))
    assert many > few + 12  # MiB, the size of the larger batch itself: activations are more than that


def test_memory_of_a_model_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"test_vit at 72 px: .*divisible by patch size"):
        measure_peak_mib(StepSpec("test_vit", 72, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ("test_vitt",)}, "model 'test_vitt' is unknown to timm .*did you mean test_vit"),
        ({"model": "no such thing at all"}, r"unknown to timm .*list_models\(\)"),
        ({"peers": ("test_vit", "test_vit")}, "drop the repeated peer"),
        ({"sizes": (0,)}, "size must be at least 1, got 0"),
        ({"sizes": ()}, "no size to measure at"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
        ({"layout": "diagonal"}, "layout 'diagonal' is unknown"),
        ({"allocator": "jemalloc"}, "allocator 'jemalloc' is unknown; expected one of system, kept"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_models(ModelsPlan(**{**TINY, "sizes": (64,), **changes}))
