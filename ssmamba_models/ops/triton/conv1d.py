"""Kernels of causal_conv1d: each program a tile of channels by time, its neighbours' edges read again (from cache)."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmamba_models.ops.triton.tiles import sigmoid


@triton.jit
def place(channels, length, DB: tl.constexpr, LB: tl.constexpr):
    """This program's image, part (of all tiles along time, then of all images), channels (DB, 1) and times (1, LB)."""
    blocks = tl.cdiv(channels, DB)
    tiles = tl.cdiv(length, LB)
    program = tl.program_id(0)
    tile = program % tiles
    block = (program // tiles) % blocks
    image = program // (tiles * blocks)
    channel = block * DB + tl.arange(0, DB)[:, None]
    time = tile * LB + tl.arange(0, LB)[None, :]
    return image.to(tl.int64), image * tiles + tile, channel, time


@triton.jit
def load_at(ptr, channel, time, channels, length, channel_stride, time_stride):
    """(DB, LB) in float32; zeros before the first step and behind the last."""
    mask = (channel < channels) & (time >= 0) & (time < length)
    offset = channel.to(tl.int64) * channel_stride + time.to(tl.int64) * time_stride
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_weights(weight_ptr, channel, channels, W: tl.constexpr):
    """W vectors (DB, 1), the taps of a block of channels."""
    out = ()
    for j in tl.static_range(W):
        out = out + (tl.load(weight_ptr + channel * W + j, mask=channel < channels, other=0.0),)
    return out


@triton.jit
def load_bias(bias_ptr, channel, channels):
    """The bias of a block of channels, or 0 where there is none."""
    if bias_ptr is None:
        bias = 0.0
    else:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
    return bias


@triton.jit
def convolve(bias, weights, xs, first: tl.constexpr, W: tl.constexpr):
    """bias + sum_j weight_j xs[first + j]."""
    y = weights[0] * xs[first] + bias
    for j in tl.static_range(1, W):
        y += weights[j] * xs[first + j]
    return y


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_batch, x_channel, x_step, channels, length,
    W: tl.constexpr, SILU: tl.constexpr, DB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    """y (batch, channels, length), contiguous."""
    image, _, channel, time = place(channels, length, DB, LB)
    weights = load_weights(weight_ptr, channel, channels, W)
    xs = ()
    for j in tl.static_range(W):
        xs = xs + (load_at(x_ptr + image * x_batch, channel, time + (j - W + 1), channels, length, x_channel, x_step),)
    y = convolve(load_bias(bias_ptr, channel, channels), weights, xs, 0, W)
    if SILU:
        y *= sigmoid(y)
    to = (image * channels + channel) * length + time
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=(channel < channels) & (time < length))


@triton.jit
def conv_backward_kernel(
    x_ptr, grad_ptr, weight_ptr, bias_ptr, dx_ptr, dweight_ptr, dbias_ptr, x_batch, x_channel, x_step, channels, length,
    W: tl.constexpr, SILU: tl.constexpr, DB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    """dx, and partial sums of dweight (parts, channels, W) and dbias (parts, channels). grad, dx: contiguous.

    Input t feeds outputs t .. t + W - 1, whose gradients before the activation need the inputs around them again.
    """
    image, part, channel, time = place(channels, length, DB, LB)
    weights, bias = load_weights(weight_ptr, channel, channels, W), load_bias(bias_ptr, channel, channels)
    xs = ()
    for j in tl.static_range(2 * W - 1 if SILU else W):
        xs = xs + (load_at(x_ptr + image * x_batch, channel, time + (j - W + 1), channels, length, x_channel, x_step),)
    dpres = ()
    for j in tl.static_range(W):
        d = load_at(grad_ptr + image * channels * length, channel, time + j, channels, length, length, 1)
        if SILU:
            y = convolve(bias, weights, xs, j, W)
            s = sigmoid(y)
            d *= s * (1.0 + y * (1.0 - s))
        dpres = dpres + (d,)
    dx = weights[W - 1] * dpres[0]
    for j in tl.static_range(1, W):
        dx += weights[W - 1 - j] * dpres[j]
    inside = channel < channels
    to = (image * channels + channel) * length + time
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=inside & (time < length))
    at = part.to(tl.int64) * channels + channel
    for j in tl.static_range(W):
        tl.store(dweight_ptr + at * W + j, tl.sum(dpres[0] * xs[j], 1, keep_dims=True), mask=inside)
    tl.store(dbias_ptr + at, tl.sum(dpres[0], 1, keep_dims=True), mask=inside)
