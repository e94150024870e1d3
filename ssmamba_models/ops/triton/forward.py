"""Forward kernels: what each chunk does to a state, and the output once the state at each chunk's start is known.

A scan takes three launches: `summary_kernel` over all chunks at once, `carry_kernel` (carry.py) along the chunks,
`output_kernel` over all chunks again. Scanning a chunk twice costs arithmetic, but no state is ever written to memory
but one per chunk, and (batch, channel block, chunk) gives a GPU enough to do at batch 1 as at batch 64.

Bytes per pixel and channel of directional_scan in bf16, chunks of 8, N = 1: u and delta four times (2 axes x 2 passes),
16; the float32 sum between the axes, 8; y, 2; summaries and carries, about 12. The floor is 6; of a batch of 64 maps of
stage 1, L2 holds most of what is read again. Arithmetic: the compiler's sm_90 code has about 24 instructions per pixel,
channel, direction and pass. Not measured on a GPU yet; if arithmetic limits it, softplus (9 of them) comes first.

Names: k is the direction (row of A and bias), a program scans `SIDES` of them: first, and first + 2 in reverse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssmamba_models.ops.triton.tiles import (
    LOG2E,
    load_held,
    load_steps,
    run_forward,
    sigmoid,
    step_mask,
    step_sizes,
    store_steps,
    total,
    widen,
)


@triton.jit
def place(batch, groups, group_channels, lines, length, M: tl.constexpr, DB: tl.constexpr, T: tl.constexpr):
    """Where this program works: batch, group, channel block, its tile of chunks, and each chunk's line and first step.

    One grid dimension (a second one ends at 65535), channel blocks fastest, so that neighbours share B and C in cache.
    """
    segments = tl.cdiv(length, T)
    tiles = tl.cdiv(lines * segments, M)
    blocks = tl.cdiv(group_channels, DB)
    program = tl.program_id(0)
    block = program % blocks
    group = (program // blocks) % groups
    tile = (program // (blocks * groups)) % tiles
    image = program // (blocks * groups * tiles)
    chunk = tile * M + tl.arange(0, M)[:, None]
    return image, group, block, tile, chunk, chunk // segments, (chunk % segments) * T


@triton.jit
def channels_of(group, block, group_channels, DB: tl.constexpr):
    """Channel numbers (1, DB) in the tensor, and which of them exist."""
    within = block * DB + tl.arange(0, DB)[None, :]
    return group * group_channels + within, within < group_channels


@triton.jit
def offsets_of(line, step, channel, line_stride, step_stride, channel_stride, WIDE: tl.constexpr):
    """Element offsets inside one image; WIDE where 31 bits do not hold them."""
    if WIDE:
        line, step, channel = line.to(tl.int64), step.to(tl.int64), channel.to(tl.int64)
    return line * line_stride + step * step_stride + channel * channel_stride


@triton.jit
def load_bias(bias_ptr, k, channels, channel, exists):
    """The step size bias of direction k, or 0 where there is none."""
    if bias_ptr is None:
        bias = 0.0
    else:
        bias = tl.load(bias_ptr + k * channels + channel, mask=exists, other=0.0)
    return bias


@triton.jit
def load_decay(A_ptr, k, channels, channel, exists, n, N: tl.constexpr):
    """A of one state, with the factor that makes exp an exp2."""
    return tl.load(A_ptr + (k * channels + channel).to(tl.int64) * N + n, mask=exists, other=0.0) * LOG2E


@triton.jit
def summary_offset(image, k, n, capacity, channels, K, N: tl.constexpr):
    """Offset of summaries (batch, K, N, capacity, channels), without the last two."""
    return ((image.to(tl.int64) * K + k) * N + n) * capacity * channels


@triton.jit
def summary_kernel(
    u_ptr, delta_ptr, B_ptr, A_ptr, bias_ptr, hold_ptr, steps_ptr, state_ptr,
    u_batch, u_line, u_step, u_channel, d_batch, d_line, d_step, d_channel,
    b_batch, b_line, b_step, b_row, b_state, hold_line, hold_step,
    batch, groups, group_channels, lines, length, first, K, capacity,
    T: tl.constexpr, M: tl.constexpr, DB: tl.constexpr, N: tl.constexpr, SIDES: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per chunk and direction: the sum of its step sizes, and the state at its end when it starts from zero."""
    u_step, d_step, b_step = widen(u_step, WIDE), widen(d_step, WIDE), widen(b_step, WIDE)
    b_row, b_state = widen(b_row, WIDE), widen(b_state, WIDE)
    hold_line, hold_step = widen(hold_line, WIDE), widen(hold_step, WIDE)
    image, group, block, _tile, chunk, line, start = place(batch, groups, group_channels, lines, length, M, DB, T)
    channel, exists = channels_of(group, block, group_channels, DB)
    channels, chunks = groups * group_channels, lines * tl.cdiv(length, T)
    rows, big = chunk < chunks, image.to(tl.int64)
    inside = rows & exists
    us = load_steps(
        u_ptr + big * u_batch, offsets_of(line, start, channel, u_line, u_step, u_channel, WIDE), u_step, inside,
        start, length, T, RAGGED,
    )  # fmt: skip
    deltas = load_steps(
        delta_ptr + big * d_batch, offsets_of(line, start, channel, d_line, d_step, d_channel, WIDE), d_step, inside,
        start, length, T, RAGGED,
    )  # fmt: skip
    pixel = big * lines * length + line * hold_line + start * hold_step
    held = load_held(hold_ptr, pixel, hold_step, rows, start, length, T, RAGGED)
    b_offset = offsets_of(line, start, 0 * start, b_line, b_step, 0, WIDE)
    at = offsets_of(chunk, chunk, channel, channels, 0, 1, WIDE)
    for side in tl.static_range(SIDES):
        k = first + 2 * side
        dts = step_sizes(deltas, load_bias(bias_ptr, k, channels, channel, exists), held, T, SOFTPLUS, FAST)
        tl.store(steps_ptr + summary_offset(image, k, 0, capacity, channels, K, 1) + at, total(dts, T), mask=inside)
        for n in range(N):
            A = load_decay(A_ptr, k, channels, channel, exists, n, N)
            bs = load_steps(
                B_ptr + big * b_batch + (k + group) * b_row + n * b_state, b_offset, b_step, rows, start, length, T,
                RAGGED,
            )  # fmt: skip
            _states, h = run_forward(tl.zeros((M, DB), tl.float32), us, dts, A, bs, T, side == 1)
            tl.store(state_ptr + summary_offset(image, k, n, capacity, channels, K, N) + at, h, mask=inside)


@triton.jit
def initial_output(
    us, D_ptr, sum_ptr, sum_offset, sum_step, channel, exists, inside, start, length, T: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """T tiles of D u, plus what an earlier launch summed."""
    out = ()
    for t in tl.static_range(T):
        if D_ptr is None:
            y = tl.zeros_like(us[t])
        else:
            y = tl.load(D_ptr + channel, mask=exists, other=0.0) * us[t]
        if sum_ptr is not None:
            mask = step_mask(inside, start, t, length, RAGGED)
            y += tl.load(sum_ptr + sum_offset + t * sum_step, mask=mask, other=0.0)
        out = out + (y,)
    return out


@triton.jit
def add_output(ys, states, cs, T: tl.constexpr):
    """y_t + c_t h_t."""
    out = ()
    for t in tl.static_range(T):
        out = out + (ys[t] + cs[t] * states[t],)
    return out


@triton.jit
def gate(ys, zs, T: tl.constexpr):
    """y_t silu(z_t)."""
    out = ()
    for t in tl.static_range(T):
        out = out + (ys[t] * zs[t] * sigmoid(zs[t]),)
    return out


@triton.jit
def output_kernel(
    u_ptr, delta_ptr, B_ptr, C_ptr, A_ptr, bias_ptr, hold_ptr, carry_ptr, D_ptr, z_ptr, sum_ptr, y_ptr,
    u_batch, u_line, u_step, u_channel, d_batch, d_line, d_step, d_channel, z_batch, z_line, z_step, z_channel,
    y_batch, y_line, y_step, y_channel, b_batch, b_line, b_step, b_row, b_state, hold_line, hold_step,
    batch, groups, group_channels, lines, length, first, K, capacity,
    T: tl.constexpr, M: tl.constexpr, DB: tl.constexpr, N: tl.constexpr, SIDES: tl.constexpr, SOFTPLUS: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = (sum over directions of C h + D u + `sum_ptr`) silu(z). `sum_ptr` is laid out as y."""
    u_step, d_step, b_step = widen(u_step, WIDE), widen(d_step, WIDE), widen(b_step, WIDE)
    b_row, b_state = widen(b_row, WIDE), widen(b_state, WIDE)
    hold_line, hold_step = widen(hold_line, WIDE), widen(hold_step, WIDE)
    y_step, z_step = widen(y_step, WIDE), widen(z_step, WIDE)
    image, group, block, _tile, chunk, line, start = place(batch, groups, group_channels, lines, length, M, DB, T)
    channel, exists = channels_of(group, block, group_channels, DB)
    channels, chunks = groups * group_channels, lines * tl.cdiv(length, T)
    rows, big = chunk < chunks, image.to(tl.int64)
    inside = rows & exists
    us = load_steps(
        u_ptr + big * u_batch, offsets_of(line, start, channel, u_line, u_step, u_channel, WIDE), u_step, inside,
        start, length, T, RAGGED,
    )  # fmt: skip
    deltas = load_steps(
        delta_ptr + big * d_batch, offsets_of(line, start, channel, d_line, d_step, d_channel, WIDE), d_step, inside,
        start, length, T, RAGGED,
    )  # fmt: skip
    pixel = big * lines * length + line * hold_line + start * hold_step
    held = load_held(hold_ptr, pixel, hold_step, rows, start, length, T, RAGGED)
    b_offset = offsets_of(line, start, 0 * start, b_line, b_step, 0, WIDE)
    y_offset = offsets_of(line, start, channel, y_line, y_step, y_channel, WIDE)
    at = offsets_of(chunk, chunk, channel, channels, 0, 1, WIDE)
    ys = initial_output(
        us, D_ptr, sum_ptr, big * y_batch + y_offset, y_step, channel, exists, inside, start, length, T, RAGGED
    )
    for side in tl.static_range(SIDES):
        k = first + 2 * side
        dts = step_sizes(deltas, load_bias(bias_ptr, k, channels, channel, exists), held, T, SOFTPLUS, FAST)
        for n in range(N):
            A = load_decay(A_ptr, k, channels, channel, exists, n, N)
            row = big * b_batch + (k + group) * b_row + n * b_state
            bs = load_steps(B_ptr + row, b_offset, b_step, rows, start, length, T, RAGGED)
            cs = load_steps(C_ptr + row, b_offset, b_step, rows, start, length, T, RAGGED)
            h = tl.load(carry_ptr + summary_offset(image, k, n, capacity, channels, K, N) + at, mask=inside, other=0.0)
            states, _end = run_forward(h, us, dts, A, bs, T, side == 1)
            ys = add_output(ys, states, cs, T)
    if z_ptr is not None:
        z_offset = offsets_of(line, start, channel, z_line, z_step, z_channel, WIDE)
        ys = gate(ys, load_steps(z_ptr + big * z_batch, z_offset, z_step, inside, start, length, T, RAGGED), T)
    store_steps(y_ptr + big * y_batch, ys, y_offset, y_step, inside, start, length, T, RAGGED)
