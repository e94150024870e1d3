"""Inference on a CPU in pieces and in place gives what layers, hooks and callers may rely on."""

from __future__ import annotations

import pytest
import torch
from model_cases import image, small
from timm.layers import LayerNorm
from timm.models import create_feature_extractor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.layers import pieces
from ssmamba_models.models import SSMamba
from ssmamba_models.ops import products


@torch.no_grad()
def shaken(model: SSMamba) -> SSMamba:
    """The model with every parameter moved: fresh biases are 0, fresh norms 1, and would hide that one is forgotten."""
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index), dtype=parameter.dtype)
        parameter += 0.1 * noise
    return model


@pytest.fixture(params=["torch", "onednn"])
def short_pieces(request, monkeypatch):
    """Pieces of small maps, with the products of either library."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 20_000)
    monkeypatch.setattr(products, "is_packed_faster", lambda: request.param == "onednn")


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(160, 168), (97, 33), (1, 7)])
def test_inference_in_pieces_is_inference(dtype, size):
    """Without gradients the stem and the blocks take many tokens in pieces; with them, all at once."""
    model = shaken(small(dims=(16, 256, 16, 16)).to(dtype))
    x = image(*size, batch=8).to(dtype)
    whole = model.forward_intermediates(x)
    with torch.inference_mode():
        final, maps = model.forward_intermediates(x)
    for result, expected in zip((final, *maps), (whole[0], *whole[1])):
        # Shaken parameters make larger maps than fresh ones.
        atol = 5e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(result, expected.detach(), atol=atol, rtol=1e-5)


@pytest.mark.usefixtures("short_pieces")
def test_pieces_are_several():
    """What the tests of pieces rest on: the stem's maps and two stages' tokens do not fit in one."""
    model = small(dims=(16, 256, 16, 16))
    for tokens, width in (
        (8 * 80 * 84, model.stem.conv1.out_channels),
        (8 * 40 * 42, model.stages[0].blocks[0].inner_width),
        (8 * 20 * 21, model.stages[1].blocks[0].inner_width),
    ):
        assert 1 < pieces.piece_length(tokens, width) < tokens / 2
    assert all(pieces.piece_length(items, width) > 0 for items in range(4) for width in (0, 1, 10**6))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OverPlaces(LayerNorm):
    """A norm that looks at the whole map (B, H, W, C)."""

    def forward(self, x):
        return super().forward(x - x.mean((1, 2), keepdim=True))


def replacements(model: SSMamba):
    """(name, owner, attribute, another layer) of layers that inference in pieces goes around or calls by pieces."""
    block = model.stages[1].blocks[0]
    for name in ("norm1", "norm2"):
        for kind in (OverPlaces, lambda width: LayerNorm(width, affine=False)):
            yield f"stem.{name}", model.stem, name, kind(getattr(model.stem, name).weight.shape[0])
        yield f"block.{name}", block, name, OverPlaces(256)
    yield "dms.norm", block.dms, "norm", OverPlaces(256)
    for owner in (model.stem, block.mlp):
        yield "act", owner, "act", torch.nn.GELU(approximate="tanh")
    for owner, name in ((block.dms, "in_proj"), (block.dms, "out_proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
        layer = getattr(owner, name)
        double = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
        double.load_state_dict(layer.state_dict())
        yield name, owner, name, double
    yield "lpr", block, "lpr", torch.nn.Identity()
    for owner in (block.lpr, block.dms):
        for changes in ({"padding_mode": "circular"}, {"dilation": 2, "padding": 2}, {"bias": False}):
            conv = torch.nn.Conv2d(256, 256, 3, groups=256, **{"padding": 1, **changes})
            if owner is block.dms:  # LPR reads its convolution's weights alone
                conv.load_state_dict(owner.conv.state_dict(), strict=False)
            yield f"conv {changes}", owner, "conv", conv
    yield "dms.act", block.dms, "act", torch.nn.ReLU()
    yield "drop_path2", block, "drop_path2", torch.nn.Hardtanh(-0.1, 0.1)


@pytest.mark.usefixtures("short_pieces")
def test_layers_that_were_replaced_are_used():
    """What is fused in inference is what the model was built with, nothing that somebody put in its place."""
    model, x = shaken(small(dims=(16, 256, 16, 16))), image(160, 168, batch=2)
    with torch.inference_mode():
        before = model(x)
        for name, owner, attribute, layer in list(replacements(model)):
            old = getattr(owner, attribute)
            setattr(owner, attribute, layer.eval())
            changed = model(x)
            with torch.enable_grad():
                torch.testing.assert_close(changed, model(x).detach(), atol=1e-5, rtol=1e-5, msg=name)
            assert not torch.allclose(changed, before, atol=1e-5), name
            setattr(owner, attribute, old)


@pytest.mark.usefixtures("short_pieces")
def test_a_forward_that_was_set_on_a_layer_is_used():
    """As adapters do that leave the layer in its place."""
    model, x = shaken(small(dims=(16, 256, 16, 16))), image(160, 168, batch=2)
    block = model.stages[1].blocks[0]
    with torch.inference_mode():
        before = model(x)
        dms, mlp = block.dms, block.mlp
        layers = [model.stem.norm1, model.stem.act, block.lpr, block.norm2]
        for layer in (*layers, dms.in_proj, dms.conv, dms.act, mlp.fc1, mlp.act):
            layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
            changed = model(x)
            with torch.enable_grad():
                torch.testing.assert_close(changed, model(x).detach(), atol=1e-5, rtol=1e-5)
            assert not torch.allclose(changed, before, atol=1e-5)
            del layer.forward


@pytest.mark.usefixtures("short_pieces")
def test_dropout_that_was_kept_in_training_is_random():
    """Monte Carlo dropout: the model in inference, its dropout not."""
    block = shaken(small(dims=(16, 256, 16, 16), proj_drop_rate=0.5)).stages[1].blocks[0]
    x = torch.randn(2, 20, 21, 256)
    with torch.inference_mode():
        assert torch.equal(block(x), block(x))
        for module in block.modules():
            module.train(isinstance(module, torch.nn.Dropout))
        assert not torch.allclose(block(x), block(x))


@pytest.mark.usefixtures("short_pieces")
def test_what_a_caller_gave_is_left_as_it_was():
    """Work in place is on results of our own: also where a layer was taken out, or hands on a view."""
    model = small(dims=(16, 256, 16, 16)).eval()
    block = model.stages[1].blocks[0]
    with torch.inference_mode():
        for x in (image(160, 168, batch=8), image(64, 64).contiguous(memory_format=torch.channels_last)):
            kept = x.clone()
            model(x)
            assert torch.equal(x, kept)
        for lpr in (block.lpr, torch.nn.Identity(), torch.nn.Unflatten(0, (8,))):
            block.lpr = lpr
            x = torch.randn(8, 20, 21, 256)
            kept = x.clone()
            block(x)
            assert torch.equal(x, kept)


class Remembers(torch.nn.Module):
    """A block of another's making, which keeps what it hands on and knows no more than a map and a mask."""

    def forward(self, x, hold=None):
        self.kept, self.copy = x, x.clone()
        return x


@pytest.mark.usefixtures("short_pieces")
def test_what_somebody_may_hold_between_blocks_is_left_as_it_was():
    """A block writes over the map before it only where nobody can have kept that map."""
    model, x = shaken(small(dims=(16, 256, 16, 16), depths=(2, 4, 1, 1))), image(160, 168, batch=8)
    first, second = model.stages[:2]
    seen = []

    def keep(output):
        seen.append((output, output.clone()))
        return output

    for layer in (model.stem, second.downsample.norm, second.blocks[1]):
        layer.register_forward_hook(lambda module, inputs, output: keep(output))
    for stage, i in ((second, 2), (model.stages[2], 0)):
        stage.blocks[i] = Remembers()
    with torch.no_grad():
        model(x)
        first.blocks[0] = Remembers()
        model(x)
        second.downsample.norm._forward_hooks.clear()
        second.downsample.norm.forward = lambda x, forward=second.downsample.norm.forward: keep(forward(x))
        model(x)
    assert len(seen) == 9
    for kept, copy in (*seen, *((block.kept, block.copy) for block in (first.blocks[0], second.blocks[2]))):
        assert torch.equal(kept, copy)


@pytest.mark.usefixtures("short_pieces")
def test_a_block_can_be_called_again_with_what_a_hook_saw():
    model, x, calls = shaken(small(dims=(16, 256, 16, 16), depths=(1, 3, 1, 1))), image(160, 168, batch=8), []
    block = model.stages[1].blocks[1]
    block.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(x)
        block._forward_pre_hooks.clear()
        args, kwargs = calls[0]
        assert torch.equal(block(*args, **kwargs), block(*args, **kwargs))


@pytest.mark.usefixtures("short_pieces")
def test_features_between_blocks_are_those_of_a_graph():
    """torch.fx makes a graph that hands on every block's map."""
    model, x = shaken(small(dims=(16, 256, 16, 16), depths=(1, 3, 1, 1))), image(160, 168, batch=8)
    names = [f"stages.1.blocks.{i}" for i in range(3)]
    with torch.no_grad():
        extractor = create_feature_extractor(model, names)
        maps = extractor(x)
    wanted = extractor(x)
    for name in names:
        torch.testing.assert_close(maps[name], wanted[name].detach(), atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("short_pieces")
def test_a_block_overwrites_what_it_was_given_up():
    block = shaken(small(dims=(16, 256, 16, 16))).stages[1].blocks[0]
    x = torch.randn(8, 20, 21, 256)
    with torch.no_grad():
        wanted = block(x.clone())
        mine = x.clone()
        result = block(mine, overwrite=True)
        assert result.data_ptr() == mine.data_ptr()
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=1e-5)
        for overwrite in (False, True):
            for map_, expected in ((x, wanted), (x[:1], wanted[:1])):
                for order in ((0, 2, 1, 3), (0, 3, 1, 2)):  # in memory; the second is torch's usual one of images
                    back = [order.index(i) for i in range(4)]
                    turned = map_.permute(order).contiguous().permute(back)
                    result = block(turned, overwrite=overwrite)
                    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("short_pieces")
def test_a_model_traced_in_inference_takes_other_sizes():
    """A trace holds no number of pieces."""
    model = small(dims=(16, 256, 16, 16)).eval()
    large, other = image(160, 168, batch=8), image(224, 200, batch=11)
    with torch.no_grad():
        traced = torch.jit.trace(model, large, check_trace=False)
        torch.testing.assert_close(traced(other), model(other), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("short_pieces")
def test_shapes_can_be_asked_without_computing():
    model = small(dims=(16, 256, 16, 16))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(torch.empty(8, 3, 160, 168)).shape == (8, 16)


def test_operations_are_counted_of_large_maps_too():
    """The counter's hooks make inference take whole maps, so none is counted by pieces or left out."""
    model, x = small(dims=(16, 256, 16, 16)).eval(), image(160, 168, batch=8)
    counts = []
    for images in (x, x[:1]):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == 8 * counts[1]


@pytest.mark.usefixtures("short_pieces")
def test_a_hook_sees_the_whole_map_in_inference_too():
    model = small(dims=(16, 256, 16, 16)).eval()
    x = image(160, 168, batch=8)
    seen = []
    for module in (model.stem.norm1, model.stages[1].blocks[0].mlp):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.inference_mode():
        model(x)
    assert [tuple(shape) for shape in seen] == [(8, 80, 84, 8), (8, 20, 21, 256)]


@pytest.mark.usefixtures("short_pieces")
def test_a_hook_on_all_modules_may_keep_what_it_sees():
    model, x, seen = shaken(small(dims=(16, 256, 16, 16))), image(160, 168), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append((output, output.clone()))
    )
    try:
        with torch.inference_mode():
            model.stem(x)
            model.stages[1].blocks[0](torch.randn(2, 20, 21, 256))
    finally:
        handle.remove()
    assert len(seen) > 20
    # DMS's SiLU is one that works in place: what its convolution gave changes.
    assert sum(not torch.equal(kept, copy) for kept, copy in seen) == 1
