"""The scan primitive: a short run of the recurrence, held in registers.

A tile is `T` steps of `M` chunks by `D` channels, written as a tuple of T tensors of shape (M, D). Steps are
unrolled, so the recurrence is one multiply-add per step, channel and direction, in whichever order the steps are
visited; a reversed scan reads the same registers backwards. Compared with `tl.associative_scan` over a (T, M, D)
tensor this needs no product of decays, no shuffles (reverse=True costs three per element on NVIDIA), and lets a
thread hold neighbouring channels, so that loads are wide: 11 instructions per step instead of about 25.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fill_steps(value, T: tl.constexpr):
    """The same tensor at every step."""
    out = ()
    for _ in tl.static_range(T):
        out = out + (value,)
    return out


@triton.jit
def widen(stride, WIDE: tl.constexpr):
    """A stride whose multiples are 64 bits wide; WIDE where 31 do not hold them."""
    if WIDE:
        return tl.full((), 0, tl.int64) + stride
    else:  # the compiler reads on after a return inside a constant `if`
        return stride


@triton.jit
def step_mask(rows, first, t, length, RAGGED: tl.constexpr):
    """`rows`, less the chunks whose step t lies behind the end of their line."""
    if RAGGED:
        return rows & (first + t < length)
    else:
        return rows


@triton.jit
def load_steps(ptr, offsets, stride, rows, first, length, T: tl.constexpr, RAGGED: tl.constexpr):
    """T tiles, `stride` elements apart, in float32; zeros outside the mask."""
    out = ()
    for t in tl.static_range(T):
        mask = step_mask(rows, first, t, length, RAGGED)
        out = out + (tl.load(ptr + offsets + t * stride, mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def store_steps(ptr, values, offsets, stride, rows, first, length, T: tl.constexpr, RAGGED: tl.constexpr):
    """Write T tiles, `stride` elements apart, in the dtype of `ptr`."""
    for t in tl.static_range(T):
        mask = step_mask(rows, first, t, length, RAGGED)
        tl.store(ptr + offsets + t * stride, values[t].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def log1p_unit(z, FAST: tl.constexpr):
    """log(1 + z) for z in [0, 1]: minimax polynomials of relative error 6e-5 (FAST) and 2e-7.

    `lg2.approx(1 + z)` would lose the small values (1e-7 absolute, where step sizes of 1e-3 are usual), and the exact
    library call costs twice as much.
    """
    if FAST:
        p = 0.041347283869981766 * z - 0.15742716193199158
        p = p * z + 0.30630090832710266
        p = p * z - 0.4969778060913086
        p = p * z + 0.9999432563781738
    else:
        p = -0.0032440233044326305 * z + 0.019851453602313995
        p = p * z - 0.05695951730012894
        p = p * z + 0.10603653639554977
        p = p * z - 0.15305592119693756
        p = p * z + 0.1967593878507614
        p = p * z - 0.24954134225845337
        p = p * z + 0.3332996368408203
        p = p * z - 0.4999990165233612
        p = p * z + 1.0
    return p * z


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + exp(x)), without overflow."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp2(tl.abs(x) * -LOG2E), FAST)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), the derivative of softplus."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def load_held(hold_ptr, offsets, stride, rows, first, length, T: tl.constexpr, RAGGED: tl.constexpr):
    """T masks (M, 1), 1 where the state passes untouched, also behind the end of a line; None if that is nowhere."""
    if hold_ptr is None and not RAGGED:
        out = None
    else:
        out = ()
        for t in tl.static_range(T):
            mask = step_mask(rows, first, t, length, RAGGED)
            if hold_ptr is None:
                out = out + (tl.where(mask, 0, 1),)
            else:
                out = out + (tl.load(hold_ptr + offsets + t * stride, mask=mask, other=1),)
    return out


@triton.jit
def step_sizes(deltas, bias, held, T: tl.constexpr, SOFTPLUS: tl.constexpr, FAST: tl.constexpr):
    """dt_t = delta_t + bias, through softplus; 0 where held, which makes a step the identity."""
    out = ()
    for t in tl.static_range(T):
        dt = deltas[t] + bias
        if SOFTPLUS:
            dt = softplus(dt, FAST)
        if held is not None:
            dt = tl.where(held[t] != 0, 0.0, dt)
        out = out + (dt,)
    return out


@triton.jit
def total(values, T: tl.constexpr):
    """The sum of T tiles."""
    out = values[0]
    for t in tl.static_range(1, T):
        out = out + values[t]
    return out


@triton.jit
def run_forward(h, us, dts, A, bs, T: tl.constexpr, REVERSE: tl.constexpr):
    """h_t = exp2(dt_t A) h_(t-1) + dt_t u_t b_t from h; all T states, in memory order, and the last one.

    Args:
        h, A: (M, D) or broadcastable; A includes log2(e).
        us, dts, bs: tuples of T; REVERSE visits them from the last to the first.
    """
    states = ()
    for t in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
        h = tl.exp2(dts[t] * A) * h + (dts[t] * us[t]) * bs[t]
        if REVERSE:
            states = (h,) + states
        else:
            states = states + (h,)
    return states, h


@triton.jit
def run_adjoint(w, dys, dts, A, cs, T: tl.constexpr, REVERSE: tl.constexpr):
    """s_t = c_t dy_t + w_(t+1), w_t = exp2(dt_t A) s_t: the gradient of the state, against the scan's direction.

    Args:
        w: (M, D), what arrives from the step after the last.
        REVERSE: the scan's own direction, so the gradient runs from the first to the last of the tuple.

    Returns:
        All s_t in memory order, and w of the scan's first step.
    """
    gradients = ()
    for t in tl.static_range(0 if REVERSE else T - 1, T if REVERSE else -1, 1 if REVERSE else -1):
        s = dys[t] * cs[t] + w
        w = tl.exp2(dts[t] * A) * s
        if REVERSE:
            gradients = gradients + (s,)
        else:
            gradients = (s,) + gradients
    return gradients, w
