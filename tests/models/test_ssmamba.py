"""The encoder itself: sizes, parameters, precision, layouts, and what it promises about any image."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from model_cases import image, small
from torch.utils.flop_counter import FlopCounterMode

from ssmamba_models.models import SSMamba

DIMS = (16, 24, 32, 48)


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
