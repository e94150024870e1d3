"""The encoder itself: sizes, parameters, precision, layouts, and what it promises about any image."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.layers import LayerNorm
from timm.models import create_feature_extractor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.layers import pieces
from ssmamba_models.models import SSMamba
from ssmamba_models.ops import products

DIMS = (16, 24, 32, 48)


def small(seed: int = 0, **kwargs) -> SSMamba:
    torch.manual_seed(seed)
    return timm.create_model("test_ssmamba", **kwargs).eval()


def image(*size: int, chans: int = 3, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, chans, *(size or (64, 64)), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> SSMamba:
    """Not to be altered."""
    return small()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ssmamba_tiny", 9.115e6, 9.125e6),
        ("ssmamba_small", 25_312_356, 25_312_356),
        ("ssmamba_base", 80.745e6, 80.755e6),
        ("test_ssmamba", 1, 0.5e6),
    ],
)
def test_parameters(name, low, high):
    count = sum(p.numel() for p in timm.create_model(name, num_classes=0, device="meta").parameters())
    assert low <= count <= high
    if name == "ssmamba_small":  # the paper's number
        assert abs(count - 25.3e6) < 0.005 * 25.3e6


@pytest.mark.parametrize(("name", "gmacs"), [("ssmamba_tiny", 1.5), ("ssmamba_small", 4.2), ("ssmamba_base", 14.6)])
def test_multiplications(name, gmacs):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    # The operations of the scans are additions and exponentials as well, so they are left out.
    counts = counter.get_flop_counts()["Global"]
    macs = sum(n for op, n in counts.items() if "ssmamba" not in str(op)) / 2
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.05)
    assert any("ssmamba" in str(op) for op in counts)


def test_cost_is_linear_in_pixels():
    model = timm.create_model("ssmamba_tiny", device="meta").eval()

    def flops(side):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side, device="meta"))
        return counter.get_total_flops()

    assert flops(1024) == pytest.approx(16 * flops(256), rel=1e-3)


@pytest.mark.parametrize("size", [(33, 47), (225, 250), (1, 1), (32, 32), (500, 20), (2, 97)])
def test_any_size(size, model):
    with torch.no_grad():
        last, maps = model.forward_intermediates(image(*size, batch=1))
        pooled = model(image(*size, batch=1))
    height, width = size
    for i, m in enumerate(maps):
        for _ in range(2 if i == 0 else 1):
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        assert m.shape == (1, DIMS[i], height, width)
        assert m.isfinite().all()
    assert pooled.shape == (1, 48)
    assert pooled.isfinite().all()
    assert last.shape == (1, height, width, 48)


def test_gradients_at_an_odd_size():
    model = small(num_classes=3).train()
    model(image(33, 47)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_a_batch_of_one_equals_its_row_in_a_batch(size, model):
    x = image(*size, batch=5)
    with torch.no_grad():
        y = model(x)
        for i in (0, 3):
            torch.testing.assert_close(model(x[i : i + 1])[0], y[i], rtol=1e-4, atol=1e-5)


def test_an_empty_batch(model):
    with torch.no_grad():
        assert model(image(batch=0)).shape == (0, 48)


def test_deterministic(model):
    with torch.no_grad():
        assert torch.equal(model(image()), model(image()))
    assert all(torch.equal(a, b) for a, b in zip(small().state_dict().values(), model.state_dict().values()))
    assert not torch.equal(small(seed=1).stem.conv1.weight, model.stem.conv1.weight)


@pytest.mark.parametrize("layout", ["channels_last", "slice", "permuted"])
def test_memory_layout_does_not_matter(layout, model):
    x = image(33, 47)
    if layout == "channels_last":
        moved = x.to(memory_format=torch.channels_last)
    elif layout == "slice":
        moved = torch.nn.functional.pad(x, (3, 2, 1, 5))[:, :, 1:-5, 3:-2]
    else:
        moved = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(x, moved)
    with torch.no_grad():
        torch.testing.assert_close(model(moved), model(x), rtol=1e-5, atol=1e-6)
        other = small().to(memory_format=torch.channels_last)
        torch.testing.assert_close(other(moved), model(x), rtol=1e-4, atol=1e-5)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


def test_bfloat16_autocast_is_close(model):
    x = image()
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
    assert (y.float() - want).abs().max() < 0.05 * want.abs().max()
    assert cosine(y, want) > 0.999


def test_bfloat16_autocast_trains():
    grads = []
    for enabled in (False, True):
        model = small(num_classes=3).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(image()).float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert cosine(*grads) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_created_in_another_dtype(dtype):
    model = timm.create_model("test_ssmamba", num_classes=3, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        y = model(image().to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    model.reset_classifier(5)
    assert model.get_classifier().weight.dtype == dtype


def test_cast_to_bfloat16_is_close(model):
    with torch.no_grad():
        y = small().to(torch.bfloat16)(image().bfloat16())
        assert cosine(y, model(image())) > 0.999


def test_created_on_a_device():
    model = timm.create_model("test_ssmamba", num_classes=3, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(image().to("meta")).shape == (2, 3)
    model.reset_classifier(5)
    assert model.get_classifier().weight.device.type == "meta"


def test_initial_steps_survive_half_precision_creation():
    """The inverse of softplus is computed in float32, then rounded."""
    torch.manual_seed(0)
    model = timm.create_model("test_ssmamba", dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(p.detach().double())
            assert step.min() > 0.9e-3
            assert step.max() < 0.11


def test_the_classifier():
    model = small(num_classes=7)
    assert model.get_classifier() is model.head.fc
    assert model.get_classifier().weight.shape == (7, 48)
    assert not model.get_classifier().bias.any()
    model.reset_classifier(9)
    assert model.num_classes == model.get_classifier().out_features == 9
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)


def test_without_classifier_it_gives_the_classifiers_input():
    """num_classes=0 and reset_classifier(0) give the same features, those before the last layer."""
    model = small(num_classes=7)
    with torch.no_grad():
        want = model.forward_head(model.forward_features(image()), pre_logits=True)
        model.reset_classifier(0)
        torch.testing.assert_close(model(image()), want)


@pytest.mark.parametrize("chans", [1, 4, 6])
def test_input_channels(chans):
    model = small(in_chans=chans)
    assert model(image(chans=chans)).shape == (2, 48)
    with pytest.raises(RuntimeError, match="channels"):
        model(image(chans=chans + 1))


def test_position_and_content_both_matter(model):
    """No position table, and yet an image turned by 180 degrees is another image at every pixel."""
    x = image()
    with torch.no_grad():
        turned = model.forward_features(x.flip(2, 3)).flip(1, 2)
        assert not torch.allclose(turned, model.forward_features(x), rtol=1e-2, atol=1e-2)


def test_every_pixel_reaches_every_token():
    """The scans carry a change in one corner to all the rest of the map."""
    model = small()
    x = image(96, 96, batch=1).double()
    model.double()
    other = x.clone()
    other[:, :, :8, :8] += 5.0
    with torch.no_grad():
        change = (model.forward_intermediates(x, [0], intermediates_only=True)[0]
                  - model.forward_intermediates(other, [0], intermediates_only=True)[0]).abs().amax(1)  # fmt: skip
    assert (change > 0).all()


def test_the_hold_mask_of_a_stage():
    """Stages take a mask on their output grid: pretraining holds masked tokens in every scan."""
    model = small()
    stage = model.stages[1]
    x = torch.randn(1, 10, 14, 16)
    hold = torch.zeros(1, 5, 7, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(stage(x, hold), stage(x))
        hold[:, 2:4, 2:4] = True
        assert not torch.equal(stage(x, hold), stage(x))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dims": (16, 24)}, "expected one per stage"),
        ({"depths": (1, 1, 1)}, "expected one per stage"),
        ({"dims": (), "depths": (), "scales": ()}, "expected one per stage"),
        ({"depths": (1, 0, 1, 1)}, "depths is (1, 0, 1, 1)"),
        ({"dims": (16, 24, 0, 48)}, "dims is (16, 24, 0, 48)"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"d_state": 0}, "d_state is 0"),
        ({"scales": ((1,), (1,), (1,), (0,))}, "scales is (0,)"),
    ],
)
def test_impossible_arguments(kwargs, words):
    base = {"dims": DIMS, "depths": (1, 1, 1, 1), "device": "meta"}
    with pytest.raises(ValueError) as error:
        SSMamba(**(base | kwargs))
    assert words in str(error.value)


def test_resetting_to_impossible_classes():
    model = small(num_classes=3)
    with pytest.raises(ValueError, match="num_classes is -2"):
        model.reset_classifier(-2)
    assert model(image()).shape == (2, 3)  # nothing is half-changed


@pytest.mark.parametrize(
    ("key", "value"), [("d_state", 4), ("mlp_ratio", 2.0), ("scales", ((1,), (1, 2, 4), (2,), (1,)))]
)
def test_variants_by_keyword(key, value):
    model = small(**{key: value}).train()
    model(image()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "head" not in n)


def test_stages_of_equal_width_are_downsampled_too():
    backbone = small(dims=(16, 16, 32, 32), features_only=True)
    sizes = [m.shape[1] for m in backbone(image(64, 64))]
    assert sizes == [64 // r for r in backbone.feature_info.reduction()] == [16, 8, 4, 2]


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_a_drop_path_rate_that_cannot_be(rate):
    with pytest.raises(ValueError, match="drop_path_rate"):
        small(drop_path_rate=rate)


def test_a_scripted_model_under_autocast_is_close_to_the_eager_one(model):
    scripted = torch.jit.script(small())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scripted(image()).float(), model(image()).float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", ["test_ssmamba.nope", "test_ssmamba.", "ssmamba_huge"])
def test_names_and_weights_that_there_are_not(name):
    import ssmamba_models

    with pytest.raises(ValueError, match=r"ssmamba"):
        ssmamba_models.create_model(name)


@pytest.mark.parametrize(("scan_init", "least", "most"), [("silent", 0.0, 1e-3), ("unit", 0.01, 2.0)])
def test_scans_begin_as_loud_as_asked(scan_init, least, most):
    """What the features lose where the states are not read out: c = 0, so that only d * V is left of a scan."""
    model, x = small(scan_init=scan_init).eval(), image(64, 64, batch=4)
    with torch.no_grad():
        features = model(x)
        for name, module in model.named_modules():
            if name.endswith("x_proj"):
                module.weight[-4:] = 0  # one state in four directions
        change = (model(x) - features).norm() / (features - features.mean(0)).norm()
    assert least <= change < most


def test_an_unknown_scan_init_is_named():
    with pytest.raises(ValueError, match=r"scan_init is 'loud', expected one of silent, unit"):
        small(scan_init="loud")


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
