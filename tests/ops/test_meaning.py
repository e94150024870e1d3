"""What the operators mean, without the definition's help: small cases by hand, symmetries, and the hold mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import MAKERS

from ssmamba_models import ops


def keep_pixels(inputs, rows, columns):
    """The map without some of its rows and columns."""
    maps = {k: inputs[k][:, rows][:, :, columns].contiguous() for k in ("u", "delta", "B", "C")}
    return inputs | maps | {"hold": None}


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("axis", ["tokens of a row", "tokens of a column", "a row and two columns of a map"])
def test_a_held_token_is_as_good_as_absent(axis, states, backend):
    """The states after a held token are those of the sequence without it: seen through y, at every free token."""
    height, width = {"tokens of a row": (1, 40), "tokens of a column": (40, 1)}.get(axis, (6, 7))
    inputs = MAKERS["directional_scan"](height, width, channels=18, states=states, skip=False)
    rows, columns = torch.ones(height, dtype=torch.bool), torch.ones(width, dtype=torch.bool)
    if axis == "tokens of a row":
        columns[[0, 3, 4, 5, 20, 39]] = False
    elif axis == "tokens of a column":
        rows[[0, 3, 4, 5, 20, 39]] = False
    else:
        rows[2], columns[[0, 4]] = False, False
    free = rows[:, None] & columns
    with_hold = ops.directional_scan(**(inputs | {"hold": ~free.expand(2, -1, -1)}))[:, rows][:, :, columns]
    without = ops.directional_scan(**keep_pixels(inputs, rows, columns))
    if backend == "c":
        assert torch.equal(with_hold, without)
    else:  # other chunks, other rounding
        torch.testing.assert_close(with_hold, without, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ops.directional_scan(**inputs)[:, rows][:, :, columns], without, rtol=1e-2, atol=1e-2)


def test_what_lies_under_a_held_token_does_not_matter(backend):
    """Neither its input nor its step size is read, and both get no gradient; its output still reads the state."""
    inputs = MAKERS["directional_scan"](3, 5, channels=18, states=2, skip=False)
    hold = torch.zeros(2, 3, 5, dtype=torch.bool)
    hold[0, 1, 2] = hold[1, 0, 0] = True
    leaves = {k: x.clone().requires_grad_() if x is not None else None for k, x in inputs.items()}
    y = ops.directional_scan(**(leaves | {"hold": hold}))
    y.square().sum().backward()
    for name in ("u", "delta", "B"):
        assert not leaves[name].grad[hold].any(), name
        assert leaves[name].grad[~hold].any()
    assert leaves["C"].grad[hold].any()

    other = {k: leaves[k].detach().clone() for k in ("u", "delta", "B")}
    other["u"][hold], other["delta"][hold], other["B"][hold] = 50.0, -3.0, -7.0
    assert torch.equal(ops.directional_scan(**(inputs | other | {"hold": hold})), y.detach())


def test_a_held_step_size_may_be_nan(fast_backend):
    """What was never computed may hold anything: a step size under the mask spoils neither results nor gradients."""
    inputs = MAKERS["directional_scan"](3, 5, channels=18, states=2)
    hold = torch.zeros(2, 3, 5, dtype=torch.bool)
    hold[:, 1, 2] = True
    inputs["hold"] = hold
    results = []
    for value in (0.0, torch.nan, torch.inf):
        leaves = {k: x.clone().requires_grad_() if x.is_floating_point() else x for k, x in inputs.items()}
        with torch.no_grad():
            leaves["delta"][hold] = value
        y = ops.directional_scan(**leaves)
        y.square().sum().backward()
        results.append((y.detach(), *(leaves[k].grad for k in ("u", "A", "B", "C", "D", "delta_bias"))))
    for result in results[1:]:
        for have, want in zip(result, results[0]):
            torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_all_tokens_held(backend):
    inputs = MAKERS["directional_scan"](3, 5, channels=18, states=2)
    inputs["hold"] = torch.ones(2, 3, 5, dtype=torch.bool)
    torch.testing.assert_close(ops.directional_scan(**inputs), inputs["D"] * inputs["u"])


def test_two_tokens_by_hand(backend):
    """y of a 1 x 2 map, written out: the row and the column directions see the same order."""
    u, delta = torch.tensor([0.5, -2.0]), torch.tensor([0.3, 1.0])
    b, c = torch.tensor([1.5, 0.7]), torch.tensor([2.0, 0.4])
    A, D, bias = -0.8, 0.25, 0.1
    dt = torch.log1p(torch.exp(delta + bias))
    decay = torch.exp(dt * A)
    add = dt * b * u
    forward = torch.stack([c[0] * add[0], c[1] * (decay[1] * add[0] + add[1])])
    backward = torch.stack([c[0] * (decay[0] * add[1] + add[0]), c[1] * add[1]])
    y = ops.directional_scan(
        u.view(1, 1, 2, 1), delta.view(1, 1, 2, 1), torch.full((4, 1, 1), A),
        b.view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 1), c.view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 1),
        torch.tensor([D]), torch.full((4, 1), bias),
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(), 2 * forward + 2 * backward + D * u)


def test_each_direction_reaches_where_it_should(backend):
    """An impulse in the middle, one direction alive at a time: who hears it says in which order pixels are read."""
    height, width = 3, 4
    at = (1, 2)
    for k, reached in enumerate(
        (
            lambda i, j: (i, j) >= at,  # rows: reading order
            lambda i, j: (j, i) >= at[::-1],  # columns: down, then right
            lambda i, j: (i, j) <= at,
            lambda i, j: (j, i) <= at[::-1],
        )
    ):
        u, c = torch.zeros(1, height, width, 1), torch.zeros(1, height, width, 4, 1)
        u[0, at[0], at[1]] = 1.0
        c[..., k, :] = 1.0
        y = ops.directional_scan(
            u, torch.zeros_like(u), torch.full((4, 1, 1), -0.1), torch.ones_like(c), c
        )[0, :, :, 0]  # fmt: skip
        want = [[reached(i, j) for j in range(width)] for i in range(height)]
        assert (y != 0).tolist() == want, f"direction {k}"


def test_turning_the_map_turns_the_result(fast_backend):
    """Transposing swaps rows with columns; turning by 180 degrees swaps each direction with its reverse."""
    inputs = MAKERS["directional_scan"](4, 6, channels=18, states=2, hold=True)
    y = ops.directional_scan(**inputs)

    def turned(permutation, turn):
        maps = {k: turn(inputs[k]) for k in ("u", "delta", "B", "C", "hold")}
        maps |= {k: maps[k][:, :, :, permutation] for k in ("B", "C")}
        return ops.directional_scan(**(inputs | maps | {k: inputs[k][permutation] for k in ("A", "delta_bias")}))

    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(turned([1, 0, 3, 2], lambda x: x.transpose(1, 2)), y.transpose(1, 2), **close)
    torch.testing.assert_close(turned([2, 3, 0, 1], lambda x: x.flip(1, 2)), y.flip(1, 2), **close)


def test_selective_scan_is_causal_and_can_be_continued(fast_backend):
    """The last state is that of the prefix: a sequence that goes on with dt = 0 keeps it."""
    inputs = MAKERS["selective_scan"](length=21, channels=18, states=3, gate=False)
    y, state = ops.selective_scan(**inputs, return_last_state=True)
    cut = {k: inputs[k][..., :13] for k in ("u", "delta", "B", "C")}
    y_cut, state_cut = ops.selective_scan(**(inputs | cut), return_last_state=True)
    torch.testing.assert_close(y_cut, y[..., :13], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(state, state_cut)

    idle = inputs["delta"].clone()
    idle[..., 13:] = -1e4  # softplus gives 0
    _, kept = ops.selective_scan(**(inputs | {"delta": idle}), return_last_state=True)
    torch.testing.assert_close(kept, state_cut, rtol=1e-6, atol=1e-6)
    assert state.dtype == torch.float32
    assert state.shape == (2, 18, 3)


def test_one_group_is_no_group(fast_backend):
    inputs = MAKERS["selective_scan"](length=9, channels=6, states=2)
    grouped = inputs | {k: inputs[k][:, None].repeat(1, 3, 1, 1) for k in ("B", "C")}
    torch.testing.assert_close(ops.selective_scan(**grouped), ops.selective_scan(**inputs), rtol=1e-6, atol=1e-6)


def test_a_row_is_two_selective_scans(fast_backend):
    """A 1 x L map: twice the sequence (rows, columns), twice the reversed one."""
    inputs = MAKERS["directional_scan"](1, 23, channels=18, states=2, skip=False)
    y = torch.zeros_like(inputs["u"])
    for k in range(4):
        flip = (lambda x: x.flip(-1)) if k >= 2 else (lambda x: x)
        u, delta = (flip(inputs[n][:, 0].transpose(1, 2)) for n in ("u", "delta"))
        B, C = (flip(inputs[n][:, 0, :, k].transpose(1, 2)) for n in ("B", "C"))
        bias = inputs["delta_bias"][k]
        part = ops.selective_scan(u, delta, inputs["A"][k], B, C, delta_bias=bias, delta_softplus=True)
        y = y + flip(part).transpose(1, 2)[:, None]
    torch.testing.assert_close(ops.directional_scan(**inputs), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [2, 3, 4])
def test_causal_conv1d_is_torchs_convolution(taps, fast_backend):
    inputs = MAKERS["causal_conv1d"](length=23, taps=taps)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    want = F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=x.shape[1])[..., :23]
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.causal_conv1d(x, weight, bias, "silu"), F.silu(want), rtol=1e-5, atol=1e-5)


def test_a_constant_B_goes_with_a_C_that_varies(backend):
    inputs = MAKERS["selective_scan"](length=7, channels=6, states=2, groups=1)
    constant = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    every_step = constant[None, :, :, None].expand(inputs["u"].shape[0], -1, -1, 7)
    wanted = ops.selective_scan(**(inputs | {"B": every_step, "C": inputs["C"].expand(-1, 6, -1, -1)}))
    torch.testing.assert_close(ops.selective_scan(**(inputs | {"B": constant})), wanted)
