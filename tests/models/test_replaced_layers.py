"""The model computes what its layers are now: replaced, hooked, adapted or cut; and leaves its input as it was."""

from __future__ import annotations

import pytest
import torch
from model_cases import image, small
from timm.layers import LayerNorm
from timm.models import create_feature_extractor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.models import SSMamba


@torch.no_grad()
def perturbed(model: SSMamba) -> SSMamba:
    """The model with every parameter moved: fresh biases are 0, fresh norms 1, and would hide that one is forgotten."""
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=parameter.dtype)
        parameter += 0.1 * noise
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(64, 72), (97, 33), (1, 7)])
def test_inference_mode_gives_what_training_graphs_give(dtype, size):
    model, x = perturbed(small().to(dtype)), image(*size).to(dtype)
    final, maps = model.forward_intermediates(x)
    with torch.inference_mode():
        inferred, inferred_maps = model.forward_intermediates(x)
    for result, expected in zip((inferred, *inferred_maps), (final, *maps)):
        torch.testing.assert_close(result, expected.detach(), atol=1e-5, rtol=1e-5)


def layers_of(model: SSMamba) -> dict[str, torch.nn.Module]:
    """Every layer of the stem, of a downsampling, of one block and of the head that has parameters or activates."""
    parts = ("stem.", "stages.1.downsample.", "stages.1.blocks.0.", "head.")
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith(parts) and not isinstance(layer, (torch.nn.Dropout, torch.nn.ModuleList))
    }


def bent(output: torch.Tensor) -> torch.Tensor:
    """Changed in a way that no norm after it undoes, and that the scans' step sizes show."""
    return 3 * (output + 1).square()


class Bent(torch.nn.Module):
    """A layer in another's place, such as an adapter's."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return bent(self.inner(*args))


LAYERS = sorted(layers_of(small(num_classes=3)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", ["replaced", "forward", "hook"])
def test_every_layer_is_called(name, way):
    """None is bypassed: not where it is replaced, has another forward, or a hook that changes its output."""
    model, x = perturbed(small(num_classes=3)), image(64, 72)
    with torch.inference_mode():
        before = model(x)
        layer = model.get_submodule(name)
        if way == "replaced":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Bent(layer))
        elif way == "forward":
            layer.forward = lambda *args, forward=layer.forward: bent(forward(*args))
        else:
            layer.register_forward_hook(lambda module, inputs, output: bent(output))
        changed = model(x)
        assert not torch.allclose(changed, before, atol=1e-5)
    torch.testing.assert_close(changed, model(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"padding_mode": "circular"}, {"dilation": 2, "padding": 2}, {"bias": False}])
@pytest.mark.parametrize("owner", ["lpr", "dms"])
def test_a_convolution_with_another_geometry_is_used(owner, changes):
    model, x = perturbed(small()), torch.randn(2, 8, 9, 24)
    block = model.stages[1].blocks[0]
    module = getattr(block, owner)
    conv = torch.nn.Conv2d(24, 24, 3, groups=24, **{"padding": 1, **changes})
    conv.load_state_dict(module.conv.state_dict(), strict=False)
    with torch.no_grad():
        before = block(x)
        module.conv = conv
        assert not torch.allclose(block(x), before, atol=1e-5)
        if owner == "lpr":
            torch.testing.assert_close(module(x), x + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class OverTheMap(LayerNorm):
    """A norm that looks at the whole map (B, H, W, C)."""

    def forward(self, x):
        return super().forward(x - x.mean((1, 2), keepdim=True))


@pytest.mark.parametrize("name", ["stem.norm1", "stem.norm2", "stages.1.blocks.0.norm1", "stages.1.blocks.0.dms.norm"])
def test_a_layer_sees_the_whole_map(name):
    model, x = perturbed(small()), image(64, 72)
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    norm = OverTheMap(old.normalized_shape[0])
    norm.load_state_dict(old.state_dict())
    setattr(model.get_submodule(parent), child, norm)
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with torch.inference_mode():
        inferred = model(x)
    torch.testing.assert_close(inferred, model(x).detach(), atol=1e-5, rtol=1e-5)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4
    assert seen[0][0] == 2


def test_low_rank_adapters_change_the_output_and_train():
    """LoRA by hand: a linear layer in parallel to each projection, whose gradients alone are wanted."""

    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer.requires_grad_(False)
            self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, layer.out_features, bias=False)

        def forward(self, x):
            return self.layer(x) + self.up(self.down(x))

    model, x = small(num_classes=3).requires_grad_(False), image(64, 64)
    with torch.no_grad():
        before = model(x)
    for block in model.stages[1].blocks:
        for owner, name in ((block.dms, "in_proj"), (block.dms, "out_proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(owner, name, Adapted(getattr(owner, name)))
    with torch.no_grad():
        assert not torch.allclose(model(x), before, atol=1e-6)
    model(x).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 8
    assert all(name.endswith(("up.weight", "down.weight")) for name in trained)


def test_dropout_that_was_kept_in_training_is_random():
    """Monte Carlo dropout: the model in evaluation, its dropout in training mode."""
    block = perturbed(small(proj_drop_rate=0.5)).stages[1].blocks[0]
    x = torch.randn(2, 10, 11, 24)
    with torch.inference_mode():
        assert torch.equal(block(x), block(x))
        for module in block.modules():
            module.train(isinstance(module, torch.nn.Dropout))
        assert not torch.allclose(block(x), block(x))


def test_the_callers_input_is_left_as_it_was():
    """The activation that works in place works on the model's own map: also where layers were taken out."""
    model = perturbed(small())
    block = model.stages[1].blocks[0]
    with torch.inference_mode():
        for x in (image(64, 72), image(64, 64).contiguous(memory_format=torch.channels_last)):
            kept = x.clone()
            model(x)
            assert torch.equal(x, kept)
        for lpr in (block.lpr, torch.nn.Identity()):
            block.lpr = lpr
            x = torch.randn(2, 10, 11, 24)
            kept = x.clone()
            block(x)
            assert torch.equal(x, kept)


def test_what_a_hook_keeps_is_left_as_it_was():
    model, x, seen = perturbed(small()), image(64, 64), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append((module, output, output.clone()))
    )
    try:
        with torch.inference_mode():
            model(x)
    finally:
        handle.remove()
    assert len(seen) > 100
    changed = [module for module, kept, copy in seen if not torch.equal(kept, copy)]
    convs = [block.dms.conv for stage in model.stages for block in stage.blocks]
    assert changed == convs  # which are followed by a SiLU in place


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 1, 2)])
def test_a_block_takes_any_memory_layout(order):
    block = perturbed(small()).stages[1].blocks[0]
    x = torch.randn(2, 10, 11, 24)
    back = [order.index(i) for i in range(4)]
    with torch.no_grad():
        for strided in (x.permute(order).contiguous().permute(back), torch.cat((x, x), -1)[..., :24]):
            torch.testing.assert_close(block(strided), block(x), atol=1e-5, rtol=1e-5)


def test_features_between_blocks_are_those_of_a_graph():
    """torch.fx makes a graph that gives every block's map, and the layers inside a block."""
    model, x = perturbed(small(depths=(1, 3, 1, 1))), image(64, 72)
    names = [f"stages.1.blocks.{i}" for i in range(3)] + ["stages.1.blocks.1.lpr", "stages.1.blocks.1.dms.norm"]
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    with torch.no_grad():
        model(x)
        for handle in handles:  # tracing calls them too
            handle.remove()
        maps = create_feature_extractor(model, names)(x)
    for name in names:
        torch.testing.assert_close(maps[name], seen[name], atol=1e-5, rtol=1e-5)


def test_a_trace_takes_other_sizes():
    model = perturbed(small())
    with torch.no_grad():
        traced = torch.jit.trace(model, image(64, 72), check_trace=False)
        other = image(96, 80, batch=3)
        torch.testing.assert_close(traced(other), model(other), atol=1e-5, rtol=1e-5)


def test_shapes_without_data():
    model = small()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(torch.empty(8, 3, 160, 168)).shape == (8, 48)


def test_operations_are_counted_per_image():
    model, x = small(), image(160, 168, batch=8)
    counts = []
    for images in (x, x[:1]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == 8 * counts[1] > 0


@pytest.mark.parametrize("name", ["DMS", "LPR", "DirectionalSSM", "pool_hold"])
def test_layers_under_their_old_name(name):
    from ssmamba_models import layers, models

    with pytest.warns(DeprecationWarning, match="import it from ssmamba_models.models"):
        assert getattr(layers, name) is getattr(models, name)
    with pytest.raises(AttributeError, match="no attribute 'Block'"):
        _ = layers.Block
