"""optimize: what it gives for which model, and what it refuses."""

from __future__ import annotations

import dataclasses
import platform
import warnings

import pytest
import timm
import torch
from planned_cases import images, small
from timm.layers import LayerNorm
from torch import nn

from ssmamba_models.inference import OptimizeError, fuse_for_training, optimize, optimized_or_eager, plan_of
from ssmamba_models.inference.optimize import AutocastModel
from ssmamba_models.inference.planned import PlannedSSMamba
from ssmamba_models.notice import SSMambaWarning
from ssmamba_models.ops import dispatch
from ssmamba_models.ops.cpu import plan

needs_c = pytest.mark.skipif(not dispatch.is_served_by("c", "cpu"), reason="the C kernels were not built")


@needs_c
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_ssmamba_becomes_a_plan(precision):
    model = small()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = optimize(model, precision)
    assert isinstance(fast, PlannedSSMamba)
    assert fast.precision == precision
    assert plan_of(fast).startswith("fused, ")
    assert not any(p.requires_grad for p in fast.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@needs_c
def test_pooled_features_in_bfloat16_are_those_of_float32():
    model = timm.create_model("ssmamba_tiny", pretrained=True, num_classes=0).eval()
    x = images(4, 3, 160, 160)
    with torch.inference_mode():
        wanted = model(x)
        for precision, bound, cosine in (("float32", 1e-5, 0.999999), ("bfloat16", 1e-2, 0.9999)):
            result = optimize(model, precision)(x)
            assert ((result - wanted).norm() / wanted.norm()).item() < bound
            assert torch.cosine_similarity(result, wanted).min().item() > cosine


def test_other_models_run_the_best_public_way():
    model = timm.create_model("test_vit", num_classes=0).eval()
    assert optimize(model) is model
    assert plan_of(model) == "eager"
    fast, x = optimize(model, "bfloat16"), images(2, 3, 160, 160)
    assert isinstance(fast, AutocastModel)
    assert plan_of(fast) == "autocast"
    with torch.inference_mode():
        assert fast(x).dtype == torch.float32
        torch.testing.assert_close(fast(x), model(x), atol=0.1, rtol=0.1)
        assert not torch.equal(fast(x), model(x))
        final, found = fast.forward_intermediates(x, indices=1)
        assert final.dtype == found[0].dtype == torch.float32
    assert fast.num_features == model.num_features
    assert not hasattr(fast, "no_such_method")


def test_int8_is_refused_for_other_models():
    with pytest.raises(OptimizeError, match=r"int8 is for an SSMamba on a CPU.* the model is VisionTransformer on cpu"):
        optimize(timm.create_model("test_vit", num_classes=0).eval(), "int8")


@needs_c
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's instruction sets")
def test_int8_on_a_cpu_without_its_products_is_an_error_that_names_them(monkeypatch):
    sets = tuple(dataclasses.replace(s, usable=s.usable and s.products != "int8") for s in plan.instruction_sets())
    monkeypatch.setattr(plan, "instruction_sets", lambda: sets)
    with pytest.raises(ValueError, match=r"no int8 products .*avx_vnni, avx512_vnni, amx_int8") as caught:
        optimize(small(), "int8")
    assert not isinstance(caught.value, OptimizeError)  # commands must not fall back to another precision


def test_without_the_c_kernels_a_model_stays_as_it_is(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    model = small()
    assert optimize(model) is model
    with pytest.raises(OptimizeError, match="with the C kernels"):
        optimize(model, "int8")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def changes(model):
    """(what was done, a function that does it)"""
    block = model.stages[1].blocks[0]

    def swap(owner, name, layer):
        return lambda: setattr(owner, name, layer.eval())

    yield "mlp.fc1", swap(block.mlp, "fc1", Doubled(24, 96))
    yield "in_proj", swap(block.dms, "in_proj", nn.Sequential(nn.Linear(24, 24)))
    yield "lpr", swap(block, "lpr", nn.Identity())
    yield "dms", swap(block, "dms", nn.Identity())
    yield "mlp", swap(block, "mlp", nn.Identity())
    yield "stem.act", swap(model.stem, "act", nn.GELU(approximate="tanh"))
    yield "mlp.act", swap(block.mlp, "act", nn.ReLU())
    yield "dms.act", swap(block.dms, "act", nn.GELU())
    yield "norm2", swap(block, "norm2", nn.Identity())
    yield "drop_path1", swap(block, "drop_path1", nn.Dropout(0.5))
    yield "stem.conv1", swap(model.stem, "conv1", nn.Conv2d(3, 8, 5, 2, 2))
    yield (
        "downsample.conv",
        swap(model.stages[1].downsample, "conv", nn.Conv2d(16, 24, 3, 2, 1, padding_mode="reflect")),
    )
    yield "lpr.conv", swap(block.lpr, "conv", nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False))
    yield "dms.conv", swap(block.dms, "conv", nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=24))
    yield "downsample", swap(model.stages[1], "downsample", nn.Identity())
    yield "downsample", swap(model.stages[1], "downsample", nn.Sequential(model.stages[1].downsample))
    yield "stem", swap(model, "stem", nn.Sequential(model.stem))
    yield "stages.1", lambda: model.stages.__setitem__(1, nn.Sequential(model.stages[1]).eval())
    yield "mlp.drop1", swap(block.mlp, "drop1", LayerNorm(96))
    yield "mlp.drop2", swap(block.mlp, "drop2", nn.GELU())
    scan = block.dms.scans[0]
    for part in ("x_proj", "dt_proj"):
        layer = getattr(scan, part)
        yield f"{part} has a bias", swap(scan, part, nn.Linear(layer.in_features, layer.out_features))
        yield part, swap(scan, part, nn.Sequential(layer))
    yield "forward_head of its own", lambda: setattr(model, "forward_head", lambda x: x)
    yield "hooks", lambda: block.norm1.register_forward_hook(lambda *_: None)
    yield "hooks", lambda: block.mlp.register_forward_pre_hook(lambda *_: None)
    yield "forward of its own", lambda: setattr(block.norm1, "forward", lambda x: x)
    yield "training mode", lambda: block.mlp.train()
    yield "fc1", lambda: nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    yield "training mode", model.train
    yield "fc2", lambda: setattr(block.mlp.fc2, "weight", nn.Parameter(torch.zeros(24, 96, dtype=torch.int8), False))


@needs_c
@pytest.mark.parametrize("index", range(len(list(changes(small())))))
def test_what_a_plan_cannot_represent_is_an_error_that_names_it(index):
    model = small()
    named, change = list(changes(model))[index]
    change()
    with pytest.raises(OptimizeError, match=named):
        optimize(model)


@needs_c
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_commands_run_such_a_model_as_it_is_and_say_so_once(precision):
    model, x = small(), images(1, 3, 32, 32)
    model.stages[1].blocks[0].lpr = nn.Identity().eval()
    name = f"model in {precision}"
    with pytest.warns(SSMambaWarning, match=rf"{name} runs layer by layer.*blocks\.0\.lpr is Identity"):
        runner = optimized_or_eager(model, precision, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimized_or_eager(model, precision, name)
    with torch.inference_mode():
        torch.testing.assert_close(runner(x), model(x), atol=0.05, rtol=0.05)


@needs_c
def test_a_derived_class_is_refused():
    class Derived(type(small())):
        pass

    with pytest.raises(OptimizeError, match="Derived"):
        optimize(Derived(dims=(16,), depths=(1,), scales=((1,),)).eval())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="precision is 'int4', expected one of float32, bfloat16, int8"):
        optimize(small(), "int4")
    with pytest.raises(ValueError, match="memory is 0"):
        optimize(small(), memory=0)
    with pytest.raises(ValueError, match="memory is True"):
        optimize(small(), memory=True)
    with pytest.raises(ValueError, match="model is str, expected a built model"):
        optimize("ssmamba_tiny")
    with pytest.raises(OptimizeError, match="optimised already, in float32"):
        optimize(PlannedSSMamba(small()), "bfloat16")


@needs_c
def test_a_model_that_is_being_trained_with_fused_operators_is_represented():
    model, x = small(), images(1, 3, 40, 40)
    with torch.inference_mode():
        wanted = optimize(model)(x)
        assert fuse_for_training(model) > 0
        assert torch.equal(optimize(model)(x), wanted)


@needs_c
def test_a_pruned_model_is_represented():
    model, x = small(), images(1, 3, 40, 40)
    model.prune_intermediate_layers([1])
    with torch.inference_mode():
        torch.testing.assert_close(optimize(model)(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_norm_without_weights_is_represented():
    model = small()
    model.stages[0].blocks[0].norm1 = LayerNorm(16, affine=False).eval()
    x = images(1, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(optimize(model)(x), model(x), atol=1e-5, rtol=1e-5)
