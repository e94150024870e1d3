"""DMS and LPR: against a slow re-implementation of the specification, their initialisation, and bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ssmamba_models.models import DMS, LPR, DirectionalSSM, pool_hold


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Parameters away from their initial values, so that none of them is 0 or 1 by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale, shift = 0.3 if p.dim() > 1 else 1.0, 1.0 if "norm" in name else 0.0
            p.copy_(torch.randn(p.shape, generator=g) * scale + shift)
    return module.eval()


def pixels_of(height: int, width: int, k: int) -> list[tuple[int, int]]:
    """The order in which direction k reads a map."""
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    return [rows, columns, rows[::-1], columns[::-1]][k]


def slow_scale(scan: DirectionalSSM, x: torch.Tensor, hold: torch.Tensor | None) -> torch.Tensor:
    """One scale of DMS, pixel by pixel, from the specification; x (H, W, D) float64."""
    p = {name: value.double() for name, value in scan.state_dict().items()}
    height, width, dim = x.shape
    s, n = scan.scale, scan.d_state
    rank = p["dt_proj.weight"].shape[1]
    h2, w2 = math.ceil(height / s), math.ceil(width / s)
    v = torch.zeros(h2, w2, dim, dtype=torch.float64)
    held = torch.zeros(h2, w2, dtype=torch.bool)
    for i in range(h2):
        for j in range(w2):  # cells at the border hold fewer pixels, and divide by as many
            v[i, j] = x[i * s : i * s + s, j * s : j * s + s].reshape(-1, dim).mean(0)
            if hold is not None:
                held[i, j] = bool(hold[i * s : i * s + s, j * s : j * s + s].all())
    y = p["D"] * v
    for k in range(4):
        state = torch.zeros(dim, n, dtype=torch.float64)
        A = -torch.exp(p["A_log"][k])
        for i, j in pixels_of(h2, w2, k):
            projected = p["x_proj.weight"] @ v[i, j]
            r, b, c = projected[:rank], projected[rank : rank + 4 * n], projected[rank + 4 * n :]
            b, c = b.view(4, n)[k] + p["B_bias"][k], c.view(4, n)[k]
            dt = F.softplus(p["dt_proj.weight"] @ r + p["dt_bias"][k])
            if held[i, j]:
                dt = torch.zeros_like(dt)
            state = torch.exp(dt[:, None] * A) * state + dt[:, None] * b * v[i, j][:, None]
            y[i, j] = y[i, j] + state @ c
    if s == 1:
        return y
    up = F.interpolate(y.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)
    return up[0].permute(1, 2, 0)


def slow_dms(dms: DMS, x: torch.Tensor, hold: torch.Tensor | None) -> torch.Tensor:
    """DMS of one image (H, W, C), float64."""
    p = {name: value.double() for name, value in dms.state_dict().items()}
    height, width, dim = x.shape
    projected = F.pad(x @ p["in_proj.weight"].T, (0, 0, 1, 1, 1, 1))
    u = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            window = projected[i : i + 3, j : j + 3]
            u[i, j] = (window * p["conv.weight"][:, 0].permute(1, 2, 0)).sum((0, 1)) + p["conv.bias"]
    u = u * torch.sigmoid(u)
    parts, at = [], 0
    for scan in dms.scans:
        width_of_scale = scan.D.shape[0]
        parts.append(slow_scale(scan, u[..., at : at + width_of_scale], hold))
        at += width_of_scale
    assert at == dim
    y = torch.cat(parts, -1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + dms.norm.eps).sqrt()
    return (y * p["norm.weight"] + p["norm.bias"]) @ p["out_proj.weight"].T


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("d_state", [1, 2])
@pytest.mark.parametrize(("scales", "dim"), [((1,), 6), ((1, 2), 8), ((1, 2), 7), ((2, 3), 6)])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (4, 2)])
def test_dms_is_what_the_specification_says(height, width, scales, dim, d_state, hold):
    torch.manual_seed(0)
    dms = randomise(DMS(dim, scales, d_state))
    x = torch.randn(2, height, width, dim)
    mask = torch.rand(2, height, width) < 0.5 if hold else None
    if hold:  # a whole cell of every scale
        mask[0, :2, :2] = True
    with torch.no_grad():
        y = dms(x, mask)
        want = torch.stack([slow_dms(dms, x[i].double(), None if mask is None else mask[i]) for i in range(2)])
    assert (y - want).abs().max() <= 2e-5 * want.abs().max()


def test_the_hold_mask_matters():
    torch.manual_seed(0)
    dms = randomise(DMS(8))
    x = torch.randn(1, 6, 6, 8)
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(dms(x, mask), dms(x))
        mask[0, 2:4, 2:4] = True
        assert not torch.allclose(dms(x, mask), dms(x), atol=1e-3)


def test_dms_of_a_channels_first_map():
    """A permuted NCHW map gives the same as its copy."""
    torch.manual_seed(0)
    dms = randomise(DMS(8))
    x = torch.randn(2, 8, 5, 7).permute(0, 2, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(dms(x), dms(x.contiguous()))


def test_dms_gives_every_parameter_a_gradient():
    torch.manual_seed(0)
    dms = DMS(8, (1, 2), d_state=2)
    dms(torch.randn(2, 5, 7, 8)).square().sum().backward()
    for name, p in dms.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize(("dim", "scales", "widths"), [(8, (1, 2), [4, 4]), (7, (1, 2), [3, 4]), (8, (1,), [8])])
def test_channels_are_split_among_the_scales(dim, scales, widths):
    assert [scan.D.numel() for scan in DMS(dim, scales).scans] == widths


@pytest.mark.parametrize(("dim", "rank"), [(16, 4), (64, 4), (65, 5), (512, 32)])
def test_the_rank_of_the_step_size(dim, rank):
    dms = DMS(dim, (1,), device="meta")
    assert dms.scans[0].dt_proj.weight.shape == (dim, rank)
    assert dms.scans[0].x_proj.weight.shape == (rank + 8, dim)


@pytest.mark.parametrize("d_state", [1, 4])
def test_initial_values(d_state):
    torch.manual_seed(0)
    scan = DirectionalSSM(512, 8, d_state)
    dt = F.softplus(scan.dt_bias.detach().double())
    assert dt.min() >= 1e-3 * (1 - 1e-3)
    assert dt.max() <= 0.1 * (1 + 1e-3)
    # Log-uniform: the mean of the logarithm lies in the middle, its spread is that of a uniform distribution.
    log = dt.log()
    assert log.mean() == pytest.approx((math.log(1e-3) + math.log(0.1)) / 2, abs=0.1)
    assert log.std() == pytest.approx((math.log(0.1) - math.log(1e-3)) / math.sqrt(12), abs=0.1)
    want = torch.arange(1, d_state + 1).float().log().expand(4, 512, d_state)
    torch.testing.assert_close(scan.A_log.detach(), want)
    assert not scan.B_bias.any()
    assert (scan.D == 1).all()
    dms = DMS(32)
    assert not dms.conv.bias.any()
    assert dms.in_proj.bias is None
    assert dms.out_proj.bias is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 8, "scales": ()}, "scales is ()"),
        ({"dim": 8, "scales": (0, 1)}, "scales is (0, 1)"),
        ({"dim": 8, "scales": (1, -2)}, "scales is (1, -2)"),
        ({"dim": 1, "scales": (1, 2)}, "dim is 1"),
        ({"dim": 8, "d_state": 0}, "d_state is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError) as error:
        DMS(**arguments)
    assert words in str(error.value)


def test_a_hold_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="hold has shape"):
        DMS(8, (1,))(torch.randn(1, 4, 4, 8), torch.zeros(1, 4, 5, dtype=torch.bool))


def test_pool_hold():
    hold = torch.tensor([[[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]], dtype=torch.bool)
    assert pool_hold(hold, 2).tolist() == [[[True, False, False], [True, False, True]]]
    assert torch.equal(pool_hold(hold, 1), hold)
    assert pool_hold(hold, 2).dtype == torch.bool
    assert pool_hold(hold, 5).tolist() == [[[False]]]
    assert pool_hold(torch.ones(1, 3, 3, dtype=torch.bool), 2).all()


# ---- LPR ----


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 9)])
def test_lpr_is_the_map_plus_its_convolution(size):
    torch.manual_seed(0)
    lpr = randomise(LPR(6))
    x = torch.randn(2, *size, 6)
    with torch.no_grad():
        want = x + lpr.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(lpr(x), want, rtol=1e-5, atol=1e-5)


def test_lpr_starts_near_the_identity():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        assert (LPR(16)(x) - x).abs().mean() < 0.1


def test_lpr_gradients():
    torch.manual_seed(0)
    lpr = randomise(LPR(4)).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lpr, x)
    lpr(x).square().sum().backward()
    found = lpr.conv.weight.grad.clone()
    lpr.zero_grad()
    (x + lpr.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).square().sum().backward()
    torch.testing.assert_close(found, lpr.conv.weight.grad)


def test_lpr_is_translation_invariant_inside_the_map():
    torch.manual_seed(0)
    lpr = randomise(LPR(4))
    x = torch.zeros(1, 12, 12, 4)
    x[:, 3:6, 3:6] = torch.randn(3, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(lpr(x.roll((4, 2), (1, 2))), lpr(x).roll((4, 2), (1, 2)))


@pytest.mark.parametrize("scales", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize(
    ("hold", "error", "message"),
    [
        (torch.ones(1, 4, 4, dtype=torch.uint8), TypeError, "hold must be a bool tensor, not torch.uint8"),
        (torch.ones(1, 4, 4), TypeError, "hold must be a bool tensor, not torch.float32"),
        (torch.ones(1, 3, 3, dtype=torch.bool), ValueError, r"hold has shape \(1, 3, 3\), expected .* \(1, 4, 4\)"),
    ],
)
def test_a_hold_mask_that_does_not_fit(scales, hold, error, message):
    with pytest.raises(error, match=message):
        DMS(16, scales)(torch.randn(1, 4, 4, 16), hold)


@pytest.mark.parametrize("arguments", [{"d_state": 2.0}, {"d_state": 0}, {"dt_rank": -1}, {"dim": 0}])
def test_sizes_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DMS(**({"dim": 16} | arguments))
