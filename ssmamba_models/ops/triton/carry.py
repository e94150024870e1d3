"""The scan over chunks: from what each does to a state that starts at zero, to the state that each starts with."""

from __future__ import annotations

import triton
import triton.language as tl

from ssmamba_models.ops.triton.tiles import LOG2E


@triton.jit
def carry_kernel(
    steps_ptr, state_ptr, A_ptr, initial_ptr, last_ptr, capacity, even_chunks, odd_chunks, channels, K,
    N: tl.constexpr, U: tl.constexpr, DB: tl.constexpr, ADJOINT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """state[i] = the sum over earlier chunks, in place; earlier along direction k, or against it (ADJOINT).

    One program walks one (image, direction, state, channel block). It reads `U` chunks at a time, so that their
    latencies overlap. Directions 2 and 3 visit the chunks from the last to the first.

    Args:
        steps_ptr: (batch, K, capacity, channels) sums of step sizes.
        state_ptr: (batch, K, N, capacity, channels), overwritten.
        even_chunks, odd_chunks: how many chunks directions 0 and 2, and 1 and 3, have; the rest is unused.
        initial_ptr: (batch, channels, N) start, or None for zeros. K = 1 only.
        last_ptr: (batch, channels, N) for what leaves the last chunk, or None. K = 1 only.
    """
    blocks = tl.cdiv(channels, DB)
    program = tl.program_id(0)
    block = program % blocks
    n = (program // blocks) % N
    k = (program // (blocks * N)) % K
    image = (program // (blocks * N * K)).to(tl.int64)
    channel = block * DB + tl.arange(0, DB)
    exists = channel < channels
    A = tl.load(A_ptr + (k * channels + channel).to(tl.int64) * N + n, mask=exists, other=0.0) * LOG2E
    steps_ptr += (image * K + k) * capacity * channels
    state_ptr += ((image * K + k) * N + n) * capacity * channels
    chunks = tl.where(k % 2 == 0, even_chunks, odd_chunks)
    edge = (image * channels + channel) * N + n
    if initial_ptr is None:
        h = tl.zeros((DB,), tl.float32)
    else:
        h = tl.load(initial_ptr + edge, mask=exists, other=0.0)
    backwards = k < 2 if ADJOINT else k >= 2
    for begin in range(0, chunks, U):
        sums, ends, places, masks = (), (), (), ()
        for i in tl.static_range(U):
            index = begin + i + tl.zeros_like(channel)
            chunk = tl.where(backwards, chunks - 1 - index, index)
            if WIDE:
                chunk = chunk.to(tl.int64)
            at = chunk * channels + channel
            mask = exists & (index < chunks)
            places = places + (at,)
            masks = masks + (mask,)
            sums = sums + (tl.load(steps_ptr + at, mask=mask, other=0.0),)
            ends = ends + (tl.load(state_ptr + at, mask=mask, other=0.0),)
        for i in tl.static_range(U):
            tl.store(state_ptr + places[i], h, mask=masks[i])
            h = tl.exp2(sums[i] * A) * h + ends[i]  # behind the last chunk both are zero: h stays
    if last_ptr is not None:
        tl.store(last_ptr + edge, h, mask=exists)
