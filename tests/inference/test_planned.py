"""The plan of fused operators computes what the model computes."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_cases import images, small
from torch._subclasses import FakeTensorMode

from ssmamba_models.inference.planned import PlannedSSMamba
from ssmamba_models.ops import dispatch
from ssmamba_models.ops.cpu import plan

pytestmark = pytest.mark.skipif(not dispatch.is_served_by("c", "cpu"), reason="the C kernels were not built")
SETS = {s.name: s.products for s in plan.instruction_sets() if s.usable and s.products != "int8"}
every_set = pytest.mark.parametrize("instructions", SETS)


def maps(model, x):
    with torch.inference_mode():
        final, found = model.forward_intermediates(x)
    return [final.permute(0, 3, 1, 2), *found]


def relative(result, wanted):
    return ((result.double() - wanted.double()).norm() / wanted.double().norm()).item()


def float64(model):
    return copy.deepcopy(model).double()


@every_set
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(96, 96), (97, 33), (1, 7), (224, 32)])
def test_equals_the_model(instructions, precision, size):
    if SETS[instructions] == "bfloat16" and precision == "float32":
        pytest.skip("an instruction set of bfloat16 products")
    model, x = small(), images(3, 3, *size)
    wanted = maps(float64(model), x.double())
    bound = 1e-5 if precision == "float32" else 1e-2
    for result, expected in zip(
        maps(PlannedSSMamba(model, precision, instructions=instructions), x), wanted, strict=True
    ):
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        assert relative(result, expected) < bound


ARCHITECTURES = {
    "widths that are no multiple of 16": {"dims": (9, 17, 33, 50)},
    "wide": {"dims": (16, 24, 40, 560), "depths": (1, 1, 1, 1)},
    "three scales": {"scales": ((1, 2, 3), (2,), (1, 4), (1,))},
    "states": {"d_state": 3},
    "one stage": {"dims": (20,), "depths": (2,), "scales": ((1, 2),)},
    "narrow MLP": {"mlp_ratio": 0.7},
    "grey images": {"in_chans": 1},
    "five channels": {"in_chans": 5},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_model_of_any_geometry(name):
    model = small(**ARCHITECTURES[name])
    x = images(2, model.in_chans, 70, 52)
    for precision, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        for result, expected in zip(maps(PlannedSSMamba(model, precision), x), maps(float64(model), x.double())):
            assert relative(result, expected) < bound


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(0, 5), height=st.integers(1, 70), width=st.integers(1, 70), threads=st.integers(1, 3))
def test_any_size(batch, height, width, threads):
    model, before = small(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = images(batch, 3, height, width)
        for result, expected in zip(maps(PlannedSSMamba(model), x), maps(model, x)):
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_a_tile_has_one_vector_whatever_is_computed_with_it(threads):
    """Neither the batch nor the number of threads, nor how these share the work, changes a bit."""
    model = PlannedSSMamba(small(num_classes=5))
    x = images(11, 3, 64, 80)
    with torch.inference_mode():
        threads(1)
        alone = torch.cat([model.forward_features(x[i : i + 1]) for i in range(len(x))])
        for count in (1, 2, 3, 7):
            threads(count)
            for memory in (1, 2**30):
                model.memory = memory
                assert torch.equal(model.forward_features(x), alone)
                assert torch.equal(model.forward_features(x[:2]), alone[:2])


@pytest.mark.parametrize(
    "layout", ["channels_last", "strided", "expanded", "flipped", "float64", "odd address", "negated"]
)
def test_images_may_lie_in_memory_as_they_like(layout):
    model, x = small(), images(2, 3, 48, 40)
    if layout == "channels_last":
        given = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        given = F.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2]
    elif layout == "expanded":
        x = x[:1, :1].expand(2, 3, -1, -1)
        given = x
    elif layout == "flipped":
        given = x.flip(-1).flip(-1)
    elif layout == "negated":
        given = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert given.is_neg()
    elif layout == "odd address":
        given = torch.frombuffer(bytearray(b"x" + x.numpy().tobytes()), dtype=torch.float32, offset=1).view(x.shape)
    else:
        given = x.double()
    kept = given.clone()
    with torch.inference_mode():
        result = PlannedSSMamba(model)(given)
        torch.testing.assert_close(result, model(x.contiguous()), atol=1e-5, rtol=1e-5)
    assert torch.equal(given, kept)


def test_a_large_image():
    model, x = small(depths=(1, 1, 1, 1)), images(1, 3, 2048, 512)
    for result, expected in zip(maps(PlannedSSMamba(model), x), maps(model, x)):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_threads_of_python_may_call_it_at_once(threads):
    threads(2)
    model, batches = PlannedSSMamba(small()), [images(n, 3, 40 + n, 64) for n in range(1, 9)]
    with torch.inference_mode():
        wanted = [model(x) for x in batches]
    results = [None] * len(batches)

    def work(i):
        with torch.inference_mode():
            for _ in range(3):
                results[i] = model(batches[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, expected in zip(results, wanted):
        assert torch.equal(result, expected)


def _forked(model, x, queue):
    with torch.inference_mode():
        queue.put(model(x).numpy())


@pytest.mark.parametrize("count", [1, 3])
def test_a_forked_child_computes_the_same(threads, count):
    threads(count)
    model, x = PlannedSSMamba(small()), images(5, 3, 64, 64)
    with torch.inference_mode():
        wanted = model(x)
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_forked, args=(model, x, queue))
    child.start()
    assert torch.equal(torch.from_numpy(queue.get()), wanted)
    child.join()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_type_and_device_change_nothing(dtype):
    model, x = small(), images(2, 3, 40, 40)
    with torch.inference_mode():
        wanted = PlannedSSMamba(model).forward_features(x)
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                result = PlannedSSMamba(model).forward_features(x)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(result, wanted)


@torch.no_grad()
def test_what_overflows_is_no_number_as_in_the_model():
    """Diverged weights must not look like features of zeros."""
    model = small()
    for parameter in model.parameters():
        parameter += 10 * parameter.sign()
    x = images(2, 3, 64, 64)
    for result, wanted in zip(maps(PlannedSSMamba(model), x), maps(model, x)):
        assert not (result.isfinite() & ~wanted.isfinite()).any()
    assert not wanted.isfinite().all()


def test_it_has_the_methods_of_the_model():
    model = small(num_classes=7)
    fast, x = PlannedSSMamba(model), images(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
        features = fast.forward_features(x)
        torch.testing.assert_close(features, model.forward_features(x), atol=1e-4, rtol=1e-4)
        for pre_logits in (False, True):
            wanted = model.forward_head(features, pre_logits=pre_logits)
            torch.testing.assert_close(fast.forward_head(features, pre_logits=pre_logits), wanted)
        for arguments in (
            {"indices": 2},
            {"indices": [0, 2], "stop_early": True, "output_fmt": "NHWC"},
            {"indices": [1], "intermediates_only": True, "stop_early": True},
            {"indices": [1], "intermediates_only": True},
        ):
            result, wanted = fast.forward_intermediates(x, **arguments), model.forward_intermediates(x, **arguments)
            if not arguments.get("intermediates_only"):
                torch.testing.assert_close(result[0], wanted[0], atol=1e-4, rtol=1e-4)
                result, wanted = result[1], wanted[1]
            torch.testing.assert_close(result, wanted, atol=1e-4, rtol=1e-4)
    assert fast.num_features == model.num_features
    assert fast.feature_info == model.feature_info
    assert fast.get_classifier().out_features == 7


def test_copies_compute_the_same_and_keep_their_weights():
    model = small()
    fast, x = PlannedSSMamba(model), images(1, 3, 40, 40)
    with torch.inference_mode():
        before = fast(x)
        twin = copy.deepcopy(fast)
        for parameter in model.parameters():
            parameter.zero_()  # the plan holds weights of its own
        assert torch.equal(fast(x), before)
        del fast
        assert torch.equal(twin(x), before)
    with pytest.raises(TypeError, match="send the model"):
        pickle.dumps(twin)


def test_what_it_cannot_do_is_refused():
    fast = PlannedSSMamba(small())
    for bad in (images(2, 4, 8, 8), images(3, 8, 8), images(2, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
            fast(bad)
    with pytest.raises(ValueError, match="floating point numbers on the CPU"):
        fast(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="has no gradients"):
        fast(images(1, 3, 8, 8).requires_grad_())
    with pytest.raises(RuntimeError, match="has no gradients"):
        torch.func.jvp(fast, (images(1, 3, 8, 8),), (images(1, 3, 8, 8),))
    with pytest.raises(RuntimeError, match="for inference alone"):
        fast.train()
    with pytest.raises(ValueError, match="cannot run instructions 'mmx'; it runs generic"):
        PlannedSSMamba(small(), instructions="mmx")
    with pytest.raises(ValueError, match="NCHW"):
        fast.forward_intermediates(images(1, 3, 8, 8), output_fmt="NLC")


def test_tracers_are_refused_and_tensors_without_memory_are_computed():
    fast, x = PlannedSSMamba(small()), images(1, 3, 40, 40)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be traced"), FakeTensorMode() as mode:
        fast(mode.from_tensor(x))
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(fast, x)
    with torch.inference_mode():
        zeros = torch._efficientzerotensor(1, 3, 40, 40)
        assert torch.equal(fast(zeros), fast(torch.zeros(1, 3, 40, 40)))


def test_results_are_float32_under_autocast_too():
    fast = PlannedSSMamba(small(num_classes=3))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fast(images(1, 3, 40, 40)).dtype == torch.float32


def test_the_structs_agree_with_those_of_c():
    ours, theirs = plan.run_struct_bytes()
    assert ours == theirs
