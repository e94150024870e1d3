"""`benchmark models` on timm's test models: rows, ratios, and what is refused."""

import json
import shutil
from functools import partial

import pytest
import torch

from ssmamba_models.benchmark import allocators, models
from ssmamba_models.benchmark.memory import measure_peak_mib
from ssmamba_models.benchmark.model_step import ModelStep, StepSpec
from ssmamba_models.benchmark.models import Entry, ModelsPlan, run_models
from ssmamba_models.benchmark.models_table import format_models
from ssmamba_models.benchmark.timing import Timing
from ssmamba_models.cli import benchmark as cli_benchmark
from ssmamba_models.cli import main as cli_main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"model": "test_ssmamba", "peers": ("test_vit", "test_convnext"), "rounds": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def report():
    return run_models(ModelsPlan(**TINY, sizes=(64, 72), memory=False, threads=1))


def rows_of(report, **wanted):
    return [row for row in report["results"] if all(row[key] == value for key, value in wanted.items())]


def test_every_contender_has_a_row_at_every_size(report):
    assert [(r["size"], r["model"], r["mode"]) for r in report["results"]] == [
        (size, name, mode)
        for size in (64, 72)
        for name, mode in (
            ("test_ssmamba", "optimized"),
            ("test_ssmamba", "eager"),
            ("test_vit", "eager"),
            ("test_convnext", "eager"),
        )
    ]


def test_rows_hold_what_they_promise(report):
    for row in rows_of(report, size=64):
        assert row["reason"] is None
        assert (row["dtype"], row["allocator"]) in (("float32", "system"), ("float32", "kept"))
        assert row["images_per_s"] == pytest.approx(2000 / row["median_ms"])
        assert row["ns_per_pixel"] == pytest.approx(row["median_ms"] * 1e6 / (2 * 64 * 64))
        assert 0 < row["parameters_m"] < 1
        assert row["gmacs"] > 0
        assert row["peak_mib"] is None
        assert (row["build_s"] is None) == (row["mode"] == "eager")
        assert (row["ours_over_peer"] is None) == (row["mode"] == "optimized")
        assert (row["eager_over_peer"] is None) == (row["model"] == "test_ssmamba")


def test_ratios_compare_the_right_pairs():
    def entry(name, mode, ms):
        return Entry(StepSpec(name, 64, 1, mode=mode), "system", Timing((ms,), 1))

    ours = [entry("ours", "optimized", 10.0), entry("ours", "eager", 20.0)]
    peers = [entry("peer", "eager", 30.0), entry("peer", "compiled", 15.0)]
    models._set_ratios([*ours, *peers], "ours")
    assert [e.ours_over_peer for e in (*ours, *peers)] == [None, 2.0, 3.0, 1.5]
    assert [e.eager_over_peer for e in (*ours, *peers)] == [None, None, 1.5, None]


def test_without_a_plan_the_ratios_are_of_what_the_commands_run_then():
    ours = Entry(StepSpec("ours", 64, 1, mode="optimized"), "system", reason="refused")
    eager = Entry(StepSpec("ours", 64, 1), "system", Timing((10.0,), 1))
    peer = Entry(StepSpec("peer", 64, 1), "system", Timing((25.0,), 1))
    models._set_ratios([ours, eager, peer], "ours")
    assert (ours.ours_over_peer, eager.ours_over_peer, peer.ours_over_peer) == (None, None, 2.5)


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


@pytest.fixture
def malloc(monkeypatch):
    """Calls to keep blocks, by module, instead of doing so: there would be no way back for other tests."""
    kept = []

    def keep(place):
        kept.append(place)
        return True

    for module in (cli_main, cli_benchmark, allocators):
        monkeypatch.setattr(module, "keep_large_blocks", partial(keep, module.__name__))
    monkeypatch.setattr(allocators, "large_blocks_kept", lambda: bool(kept))
    monkeypatch.setattr(allocators, "can_keep_large_blocks", lambda: True)
    return kept


def test_the_allocator_is_the_systems_unless_told(ssmamba, malloc):
    few = ("benchmark", "models", "--model", "test_ssmamba", "--peers", "", "--sizes", 32, "--batch-size", 1)
    few = (*few, "--rounds", 1, "--threads", 1, "--no-memory")
    result = ssmamba(*few)
    assert result.exit_code == 0, result.output
    assert malloc == []
    assert "malloc as it comes" in result.stdout
    result = ssmamba(*few, "--allocator", "kept")
    assert result.exit_code == 0, result.output
    assert malloc == [allocators.__name__]
    assert "large blocks kept" in result.stdout
    assert ssmamba("list").exit_code == 0
    assert malloc[1:] == [cli_main.__name__]


def test_both_allocators_and_dtypes_in_one_run(malloc):
    plan = ModelsPlan(**{**TINY, "peers": ("test_vit",), "rounds": 1}, sizes=(64,), memory=False, layout="contiguous")
    plan = models.replace(plan, dtype="both", allocator="both")
    report = run_models(plan)
    assert [(row["allocator"], row["dtype"], row["model"], row["mode"]) for row in report["results"]] == [
        (allocator, dtype, *contender)
        for allocator in ("system", "kept")
        for dtype in ("float32", "bfloat16")
        for contender in (("test_ssmamba", "optimized"), ("test_ssmamba", "eager"), ("test_vit", "eager"))
    ]
    text = format_models(report)
    for group in ("float32, malloc as it comes", "bfloat16, malloc as it comes", "bfloat16, large blocks kept"):
        assert text.count(f"inference, {group}") == 1
    assert text.count("times the images/s of") == 4
    with pytest.raises(ValueError, match="--allocator both: this process keeps large blocks already"):
        run_models(plan)


def test_blocks_that_cannot_be_kept_are_not_said_to_be(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with pytest.raises(ValueError, match=r"--allocator kept: .*GLIBC_TUNABLES .*use --allocator system"):
        run_models(ModelsPlan(**TINY, sizes=(64,), allocator="kept"))


def test_training_and_bfloat16_are_measured():
    plan = ModelsPlan("test_ssmamba", (), (32,), 1, dtype="bfloat16", train=True, memory=False, rounds=1)
    (row,) = run_models(plan)["results"]
    assert (row["reason"], row["mode"], row["dtype"]) == (None, "eager", "bfloat16")


def test_modes_compute_the_same_features():
    eager, optimized = (
        ModelStep(StepSpec("test_ssmamba", 64, 2, mode=mode)).features() for mode in ("eager", "optimized")
    )
    torch.testing.assert_close(optimized, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "seen"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_an_eager_step_computes_in_its_dtype(dtype, seen):
    step = ModelStep(StepSpec("test_vit", 64, 1, dtype=dtype))
    found = []
    step.model.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    step()
    assert found == [seen]


def test_an_optimized_step_gets_its_precision_and_no_autocast(monkeypatch):
    seen = []

    class Plan(torch.nn.Identity):
        def forward(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return images

    def optimize(model, precision):
        seen.append(precision)
        return Plan()

    monkeypatch.setattr("ssmamba_models.inference.optimize", optimize)
    ModelStep(StepSpec("test_ssmamba", 64, 1, dtype="bfloat16", mode="optimized"))()
    assert seen == ["bfloat16", False]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")
def test_compiled_models_get_rows_of_their_own():
    plan = ModelsPlan(**{**TINY, "peers": ("test_vit",)}, sizes=(64,), memory=True, compile=True, layout="contiguous")
    report = run_models(plan)
    assert [row["reason"] for row in report["results"]] == [None] * 4
    assert [(row["model"], row["mode"]) for row in report["results"]] == [
        ("test_ssmamba", "optimized"),
        ("test_ssmamba", "eager"),
        ("test_vit", "eager"),
        ("test_vit", "compiled"),
    ]
    for row in report["results"]:
        assert (row["peak_mib"] is None) == (row["mode"] == "compiled")
        assert (row["build_s"] is None) == (row["mode"] == "eager")
    (line,) = [row for row in format_models(report).splitlines() if row.startswith("test_vit ") and "-" not in row]
    eager, compiled = (rows_of(report, model="test_vit", mode=mode)[0] for mode in ("eager", "compiled"))
    ratios = [eager["ours_over_peer"], compiled["ours_over_peer"], eager["eager_over_peer"]]
    assert line.split() == ["test_vit", "64", *(f"{ratio:.2f}" for ratio in ratios)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")
def test_compiled_weights_are_frozen():
    step = ModelStep(StepSpec("test_vit", 64, 2, mode="compiled"))
    before = step.features()
    torch.testing.assert_close(before, ModelStep(StepSpec("test_vit", 64, 2)).features(), rtol=1e-4, atol=1e-5)
    for layer in step.model.modules():
        if isinstance(layer, torch.nn.Linear):  # the compiled model multiplies by a packed copy
            layer.weight.detach().zero_()
    assert torch.equal(step.features(), before)


def test_where_there_is_no_plan_our_model_is_compiled():
    plan = ModelsPlan("test_ssmamba", ("test_vit",), (64,), 1, train=True, compile=True, layout="contiguous")
    specs = list(models._contenders(plan, "float32", 1, print))
    assert [(s.name, s.mode) for s in specs] == [
        (name, mode) for name in ("test_ssmamba", "test_vit") for mode in ("eager", "compiled")
    ]


def test_without_a_compiler_the_row_says_so(monkeypatch):
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    report = run_models(ModelsPlan("test_ssmamba", ("test_vit",), (64,), 1, compile=True, memory=False, rounds=1))
    (row,) = rows_of(report, mode="compiled")
    assert "compiler" in row["reason"]
    assert [row["reason"] for row in report["results"] if row["mode"] != "compiled"] == [None] * 3


def test_time_per_pixel_is_quoted_against_512_px(monkeypatch):
    monkeypatch.setattr(models, "REFERENCE_SIZE", 32)
    plan = ModelsPlan("test_ssmamba", (), (32, 64), 1, memory=False, rounds=1, layout="channels_last")
    small, large = rows_of(run_models(plan), mode="eager")
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
        ({"allocator": "jemalloc"}, "allocator 'jemalloc' is unknown; expected one of system, kept, both"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run_models(ModelsPlan(**{**TINY, "sizes": (64,), **changes}))
