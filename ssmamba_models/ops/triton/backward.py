"""Backward kernels: the forward's states once more, and the same scan the other way for the gradient of the state.

With w_t what step t hands to the step before it::

    s_t = c_t dy_t + w_(t+1)        the gradient of h_t
    w_t = exp(dt_t A) s_t           the same recurrence, the same decays, from the end

so a backward takes the launches of a forward: `backward_summary_kernel`, `carry_kernel` twice (states, and w), and
`gradient_kernel`. Sums over pixels or channels leave each program as one partial sum, written, never added to memory;
torch adds them up in a fixed order. Two runs agree to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmamba_models.ops.triton.forward import (
    add_output,
    channels_of,
    initial_output,
    load_bias,
    load_decay,
    offsets_of,
    place,
    summary_offset,
)
from ssmamba_models.ops.triton.tiles import (
    fill_steps,
    load_held,
    load_steps,
    run_adjoint,
    run_forward,
    sigmoid,
    step_sizes,
    store_steps,
    total,
    widen,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_output_gradient(
    grad_ptr, z_ptr, g_offset, g_step, z_offset, z_step, inside, start, length, T: tl.constexpr, RAGGED: tl.constexpr
):
    """Gradients of y before the gate."""
    grads = load_steps(grad_ptr, g_offset, g_step, inside, start, length, T, RAGGED)
    if z_ptr is None:
        out = grads
    else:
        zs = load_steps(z_ptr, z_offset, z_step, inside, start, length, T, RAGGED)
        out = ()
        for t in tl.static_range(T):
            out = out + (grads[t] * zs[t] * sigmoid(zs[t]),)
    return out


@triton.jit
def backward_summary_kernel(
    u_ptr, delta_ptr, B_ptr, C_ptr, A_ptr, bias_ptr, hold_ptr, grad_ptr, z_ptr, steps_ptr, state_ptr, adjoint_ptr,
    u_batch, u_line, u_step, u_channel, d_batch, d_line, d_step, d_channel, z_batch, z_line, z_step, z_channel,
    y_batch, y_line, y_step, y_channel, b_batch, b_line, b_step, b_row, b_state, hold_line, hold_step,
    batch, groups, group_channels, lines, length, first, K, capacity,
    T: tl.constexpr, M: tl.constexpr, DB: tl.constexpr, N: tl.constexpr, SIDES: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per chunk and direction: the sum of its step sizes, the state at its end, and w at its first step, from zeros."""
    u_step, d_step, b_step = widen(u_step, WIDE), widen(d_step, WIDE), widen(b_step, WIDE)
    b_row, b_state = widen(b_row, WIDE), widen(b_state, WIDE)
    hold_line, hold_step = widen(hold_line, WIDE), widen(hold_step, WIDE)
    y_step, z_step = widen(y_step, WIDE), widen(z_step, WIDE)
    image, group, block, _tile, chunk, line, start = place(batch, groups, group_channels, lines, length, M, DB, T)
    channel, exists = channels_of(group, block, group_channels, DB)
    channels, chunks = groups * group_channels, lines * tl.cdiv(length, T)
    rows, big = chunk < chunks, image.to(tl.int64)
    inside = rows & exists
    u_offset = big * u_batch + offsets_of(line, start, channel, u_line, u_step, u_channel, WIDE)
    d_offset = big * d_batch + offsets_of(line, start, channel, d_line, d_step, d_channel, WIDE)
    y_offset = big * y_batch + offsets_of(line, start, channel, y_line, y_step, y_channel, WIDE)
    z_offset = big * z_batch + offsets_of(line, start, channel, z_line, z_step, z_channel, WIDE)
    b_offset = big * b_batch + offsets_of(line, start, 0 * start, b_line, b_step, 0, WIDE)
    us = load_steps(u_ptr, u_offset, u_step, inside, start, length, T, RAGGED)
    deltas = load_steps(delta_ptr, d_offset, d_step, inside, start, length, T, RAGGED)
    dys = load_output_gradient(grad_ptr, z_ptr, y_offset, y_step, z_offset, z_step, inside, start, length, T, RAGGED)
    pixel = big * lines * length + line * hold_line + start * hold_step
    held = load_held(hold_ptr, pixel, hold_step, rows, start, length, T, RAGGED)
    at = offsets_of(chunk, chunk, channel, channels, 0, 1, WIDE)
    for side in tl.static_range(SIDES):
        k = first + 2 * side
        dts = step_sizes(deltas, load_bias(bias_ptr, k, channels, channel, exists), held, T, SOFTPLUS, FAST)
        tl.store(steps_ptr + summary_offset(image, k, 0, capacity, channels, K, 1) + at, total(dts, T), mask=inside)
        for n in range(N):
            A = load_decay(A_ptr, k, channels, channel, exists, n, N)
            row = b_offset + (k + group) * b_row + n * b_state
            bs = load_steps(B_ptr, row, b_step, rows, start, length, T, RAGGED)
            cs = load_steps(C_ptr, row, b_step, rows, start, length, T, RAGGED)
            zero = tl.zeros((M, DB), tl.float32)
            _states, h = run_forward(zero, us, dts, A, bs, T, side == 1)
            _gradients, w = run_adjoint(zero, dys, dts, A, cs, T, side == 1)
            to = summary_offset(image, k, n, capacity, channels, K, N) + at
            tl.store(state_ptr + to, h, mask=inside)
            tl.store(adjoint_ptr + to, w, mask=inside)


@triton.jit
def add_input_gradients(
    dus, ddts, dA, us, dts, states, gradients, h, A, bs, T: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """Add one state's part of the gradients of u and dt, and of A over the chunk.

    The way through the decay needs exp(dt A) h_(t-1); h_t - dt b u would be the same number with its digits cancelled.
    """
    new_us, new_dts = (), ()
    for t in tl.static_range(T):
        if REVERSE:
            if t == T - 1:
                before = h
            else:
                before = states[t + 1]
        else:
            if t == 0:
                before = h
            else:
                before = states[t - 1]
        through = gradients[t] * tl.exp2(dts[t] * A) * before
        dx = gradients[t] * bs[t]
        new_us = new_us + (dus[t] + dx * dts[t],)
        new_dts = new_dts + (ddts[t] + dx * us[t] + through * (A * LN2),)
        dA += through * dts[t]
    return new_us, new_dts, dA


@triton.jit
def store_sums(ptr, sums, offset, stride, rows, start, length, T: tl.constexpr):
    """Write T columns (M, 1) as one tile: each by itself would pass shared memory, behind two barriers."""
    WIDTH: tl.constexpr = 16 if T > 8 else 8
    step = tl.arange(0, WIDTH)[None, :]
    tile = sums[0] + tl.zeros((1, WIDTH), tl.float32)
    for t in tl.static_range(1, T):
        tile = tl.where(step == t, sums[t], tile)
    tl.store(ptr + offset + step * stride, tile, mask=rows & (step < T) & (start + step < length))


@triton.jit
def projection_gradients(gradients, states, us, dts, dys, T: tl.constexpr):
    """This channel block's part of the gradients of B and C: T columns (M, 1) each."""
    dBs, dCs = (), ()
    for t in tl.static_range(T):
        dBs = dBs + (tl.sum(gradients[t] * (dts[t] * us[t]), 1, keep_dims=True),)
        dCs = dCs + (tl.sum(dys[t] * states[t], 1, keep_dims=True),)
    return dBs, dCs


@triton.jit
def through_softplus(ddeltas, ddts, deltas, bias, held, T: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Add dL/ddt times the slope of dt; also the sum over the chunk, which is the bias's."""
    out = ()
    sums = tl.zeros_like(ddts[0])
    for t in tl.static_range(T):
        d = ddts[t]
        if SOFTPLUS:
            d *= sigmoid(deltas[t] + bias)
        if held is not None:
            d = tl.where(held[t] != 0, 0.0, d)
        out = out + (ddeltas[t] + d,)
        sums += d
    return out, sums


@triton.jit
def store_with_sum(
    ptr, sum_ptr, values, offset, stride, inside, start, length, T: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Write tiles, plus what an earlier launch summed (laid out alike)."""
    if sum_ptr is None:
        store_steps(ptr, values, offset, stride, inside, start, length, T, RAGGED)
    else:
        sums = load_steps(sum_ptr, offset, stride, inside, start, length, T, RAGGED)
        out = ()
        for t in tl.static_range(T):
            out = out + (values[t] + sums[t],)
        store_steps(ptr, out, offset, stride, inside, start, length, T, RAGGED)


@triton.jit
def gate_gradients(grads, ys, zs, T: tl.constexpr):
    """Gradient of z in y silu(z)."""
    out = ()
    for t in tl.static_range(T):
        s = sigmoid(zs[t])
        out = out + (grads[t] * ys[t] * s * (1.0 + zs[t] * (1.0 - s)),)
    return out


@triton.jit
def gradient_kernel(
    u_ptr, delta_ptr, B_ptr, C_ptr, A_ptr, bias_ptr, hold_ptr, grad_ptr, z_ptr, D_ptr, carry_ptr, adjoint_ptr,
    du_sum_ptr, ddelta_sum_ptr, du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dD_ptr, dbias_ptr, dB_ptr, dC_ptr,
    u_batch, u_line, u_step, u_channel, d_batch, d_line, d_step, d_channel, z_batch, z_line, z_step, z_channel,
    y_batch, y_line, y_step, y_channel, b_batch, b_line, b_step, b_row, b_state, hold_line, hold_step,
    e_block, e_batch, e_line, e_step, e_row, e_state,
    batch, groups, group_channels, lines, length, first, K, capacity,
    T: tl.constexpr, M: tl.constexpr, DB: tl.constexpr, N: tl.constexpr, SIDES: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of a tile of chunks, given the state and w that arrive at each.

    du, ddelta, dz and the sums so far are laid out as the output's gradient (y_*); dB and dC as e_* says, a copy per
    channel block. dA (tiles, batch, SIDES, N, channels), dbias (tiles, batch, SIDES, channels) and dD (tiles, batch,
    channels) are partial sums.
    """
    u_step, d_step, b_step = widen(u_step, WIDE), widen(d_step, WIDE), widen(b_step, WIDE)
    b_row, b_state = widen(b_row, WIDE), widen(b_state, WIDE)
    hold_line, hold_step = widen(hold_line, WIDE), widen(hold_step, WIDE)
    y_step, z_step = widen(y_step, WIDE), widen(z_step, WIDE)
    e_step, e_row, e_state = widen(e_step, WIDE), widen(e_row, WIDE), widen(e_state, WIDE)
    image, group, block, tile, chunk, line, start = place(batch, groups, group_channels, lines, length, M, DB, T)
    channel, exists = channels_of(group, block, group_channels, DB)
    channels, chunks = groups * group_channels, lines * tl.cdiv(length, T)
    rows, big = chunk < chunks, image.to(tl.int64)
    inside = rows & exists
    u_offset = big * u_batch + offsets_of(line, start, channel, u_line, u_step, u_channel, WIDE)
    d_offset = big * d_batch + offsets_of(line, start, channel, d_line, d_step, d_channel, WIDE)
    y_offset = big * y_batch + offsets_of(line, start, channel, y_line, y_step, y_channel, WIDE)
    z_offset = big * z_batch + offsets_of(line, start, channel, z_line, z_step, z_channel, WIDE)
    b_offset = big * b_batch + offsets_of(line, start, 0 * start, b_line, b_step, 0, WIDE)
    e_offset = block.to(tl.int64) * e_block + big * e_batch
    e_offset += offsets_of(line, start, 0 * start, e_line, e_step, 0, WIDE)
    us = load_steps(u_ptr, u_offset, u_step, inside, start, length, T, RAGGED)
    deltas = load_steps(delta_ptr, d_offset, d_step, inside, start, length, T, RAGGED)
    dys = load_output_gradient(grad_ptr, z_ptr, y_offset, y_step, z_offset, z_step, inside, start, length, T, RAGGED)
    pixel = big * lines * length + line * hold_line + start * hold_step
    held = load_held(hold_ptr, pixel, hold_step, rows, start, length, T, RAGGED)
    at = offsets_of(chunk, chunk, channel, channels, 0, 1, WIDE)
    part = tile.to(tl.int64) * batch + image

    dus = initial_output(dys, D_ptr, None, 0, 0, channel, exists, inside, start, length, T, RAGGED)
    if z_ptr is not None:
        ys = initial_output(us, D_ptr, None, 0, 0, channel, exists, inside, start, length, T, RAGGED)
    ddeltas = fill_steps(tl.zeros((M, DB), tl.float32), T)
    for side in tl.static_range(SIDES):
        k = first + 2 * side
        bias = load_bias(bias_ptr, k, channels, channel, exists)
        dts = step_sizes(deltas, bias, held, T, SOFTPLUS, FAST)
        ddts = fill_steps(tl.zeros((M, DB), tl.float32), T)
        for n in range(N):
            A = load_decay(A_ptr, k, channels, channel, exists, n, N)
            row = b_offset + (k + group) * b_row + n * b_state
            bs = load_steps(B_ptr, row, b_step, rows, start, length, T, RAGGED)
            cs = load_steps(C_ptr, row, b_step, rows, start, length, T, RAGGED)
            of = summary_offset(image, k, n, capacity, channels, K, N) + at
            h = tl.load(carry_ptr + of, mask=inside, other=0.0)
            w = tl.load(adjoint_ptr + of, mask=inside, other=0.0)
            states, _end = run_forward(h, us, dts, A, bs, T, side == 1)
            gradients, _out = run_adjoint(w, dys, dts, A, cs, T, side == 1)
            dA = tl.zeros((M, DB), tl.float32)
            dus, ddts, dA = add_input_gradients(dus, ddts, dA, us, dts, states, gradients, h, A, bs, T, side == 1)
            if z_ptr is not None:
                ys = add_output(ys, states, cs, T)
            to = e_offset + (k + group) * e_row + n * e_state
            dBs, dCs = projection_gradients(gradients, states, us, dts, dys, T)
            store_sums(dB_ptr, dBs, to, e_step, rows, start, length, T)
            store_sums(dC_ptr, dCs, to, e_step, rows, start, length, T)
            part_of = ((part * SIDES + side) * N + n) * channels + channel
            tl.store(dA_ptr + part_of, tl.sum(dA, 0, keep_dims=True), mask=exists)
        ddeltas, sums = through_softplus(ddeltas, ddts, deltas, bias, held, T, SOFTPLUS)
        tl.store(dbias_ptr + (part * SIDES + side) * channels + channel, tl.sum(sums, 0, keep_dims=True), mask=exists)
    if dD_ptr is not None:
        products = ()
        for t in tl.static_range(T):
            products = products + (dys[t] * us[t],)
        tl.store(dD_ptr + part * channels + channel, tl.sum(total(products, T), 0, keep_dims=True), mask=exists)
    store_with_sum(du_ptr, du_sum_ptr, dus, y_offset, y_step, inside, start, length, T, RAGGED)
    store_with_sum(ddelta_ptr, ddelta_sum_ptr, ddeltas, y_offset, y_step, inside, start, length, T, RAGGED)
    if z_ptr is not None:
        grads = load_steps(grad_ptr, y_offset, y_step, inside, start, length, T, RAGGED)
        zs = load_steps(z_ptr, z_offset, z_step, inside, start, length, T, RAGGED)
        store_steps(dz_ptr, gate_gradients(grads, ys, zs, T), y_offset, y_step, inside, start, length, T, RAGGED)
