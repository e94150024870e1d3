/* selective_scan: sequences (batch, channels, length), read tile by tile in time, so memory does not grow with length
 * except for one saved state per tile in the backward pass. */
#include "scan.h"

#define TILE 256

typedef struct {
  int64_t batch, channels, length, states, groups;
  int64_t dtype, softplus;
  const void *u, *delta, *z, *grad;  /* (batch, channels, length), contiguous; z may be NULL */
  const float *A, *B, *C, *D, *bias; /* (channels, states), (batch, groups, states, length) twice, (channels,) or NULL */
  const float *grad_state;           /* (batch, channels, states) or NULL */
  void *y;
  float *state;                      /* (batch, channels, states) */
  void *du, *ddelta, *dz;
  float *dA, *dD, *dbias;            /* (batch, channels, states), (batch, channels) twice */
  float *dB, *dC;                    /* (blocks per group, batch, groups, states, length) */
} SelectiveArgs;

/* Four rows of four floats, `stride` apart, turned over into rows `out_stride` apart. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TRANSPOSE 4
typedef float Four __attribute__((vector_size(16)));

INLINE void transpose(float *out, ptrdiff_t out_stride, const float *in, ptrdiff_t stride) {
  Four row[4];
  for (int i = 0; i < 4; i++) memcpy(&row[i], in + i * stride, sizeof(Four));
  const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  row[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  row[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  row[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  row[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
  for (int i = 0; i < 4; i++) memcpy(out + i * out_stride, &row[i], sizeof(Four));
}
#endif
#endif
#ifndef TRANSPOSE
#define TRANSPOSE 1
INLINE void transpose(float *out, ptrdiff_t out_stride, const float *in, ptrdiff_t stride) { *out = *in; }
#endif

/* Sixteen rows of (channels, length), from element `at` on, turned into [time][16]. */
INLINE void gather_times(float *out, const void *in, ptrdiff_t at, int valid, int64_t length, int64_t times,
                         const int dtype) {
  if (valid < LANES) memset(out, 0, times * ROW);
  const int lanes = dtype == F32 ? valid / TRANSPOSE * TRANSPOSE : 0;
  const int64_t whole = lanes ? times / TRANSPOSE * TRANSPOSE : 0;
  for (int64_t t = 0; t < whole; t += TRANSPOSE)
    for (int l = 0; l < lanes; l += TRANSPOSE)
      transpose(out + t * LANES + l, LANES, (const float *)in + at + l * length + t, length);
  for (int l = 0; l < valid; l++, at += length)
    for (int64_t t = l < lanes ? whole : 0; t < times; t++) out[t * LANES + l] = load_one(in, at + t, dtype);
}

INLINE void scatter_times(void *out, const float *in, ptrdiff_t at, int valid, int64_t length, int64_t times,
                          const int dtype) {
  const int lanes = dtype == F32 ? valid / TRANSPOSE * TRANSPOSE : 0;
  const int64_t whole = lanes ? times / TRANSPOSE * TRANSPOSE : 0;
  for (int l = 0; l < lanes; l += TRANSPOSE)
    for (int64_t t = 0; t < whole; t += TRANSPOSE)
      transpose((float *)out + at + l * length + t, length, in + t * LANES + l, LANES);
  for (int l = 0; l < valid; l++, at += length)
    for (int64_t t = l < lanes ? whole : 0; t < times; t++) store_one(out, at + t, in[t * LANES + l], dtype);
}

/* Asks for a cache line of each of sixteen rows of (channels, length), from element `at` on, before it is needed: the
 * rows are too short for the hardware to guess. */
#define ask_for(in, at, valid, length, dtype, writing)  \
  for (int l = 0; l < (valid); l++)                     \
    __builtin_prefetch((const char *)(in) + ((at) + l * (length)) * ((dtype) == F32 ? 4 : 2), writing)

/* Where a task works. Blocks of channels never straddle groups, which have their own B and C. */
typedef struct {
  int64_t image, group, block, channel;
  int valid;
  ptrdiff_t row;  /* of (batch * channels) */
  ptrdiff_t time; /* of the row's first element */
} Place;

INLINE Place place_of(const SelectiveArgs *a, int64_t task) {
  const int64_t width = a->channels / a->groups, blocks = blocks_of(width);
  Place at = {.image = task / (a->groups * blocks), .group = task / blocks % a->groups, .block = task % blocks};
  at.channel = at.group * width + at.block * LANES;
  at.valid = (int)min64(LANES, width - at.block * LANES);
  at.row = at.image * a->channels + at.channel;
  at.time = at.row * a->length;
  return at;
}

INLINE Walk walk_of(const SelectiveArgs *a, const Place *at, const float *u, const float *delta, float *A, float *bias) {
  const ptrdiff_t rows = (at->image * a->groups + at->group) * a->states * a->length;
  load_channels(A, a->A + at->channel * a->states, a->states, at->valid, LOG2E);
  load_channels(bias, a->bias ? a->bias + at->channel : NULL, 1, at->valid, 1.0f);
  return (Walk){.u = u, .delta = delta, .A = A, .bias = bias, .b = a->B + rows, .c = a->C + rows,
                .pixel_stride = 1, .state_stride = a->length};
}

MULTIVERSION
int ssmamba_selective_forward(const SelectiveArgs *a, int64_t begin, int64_t end) {
  const int64_t states = a->states;
  const int dtype = (int)a->dtype;
  Arena arena;
  if (arena_open(&arena, (4 * TILE + 2 * (size_t)states + 2) * ROW + 4 * TILE)) return -1;
  float *u = arena_take(&arena, TILE * ROW), *delta = arena_take(&arena, TILE * ROW);
  float *y = arena_take(&arena, TILE * ROW), *z = arena_take(&arena, TILE * ROW);
  float *A = arena_take(&arena, states * ROW), *h = arena_take(&arena, states * ROW);
  float *D = arena_take(&arena, ROW), *bias = arena_take(&arena, ROW);
  int32_t *order = arena_take(&arena, TILE * 4);
  for (int t = 0; t < TILE; t++) order[t] = t;
  for (int64_t task = begin; task < end; task++) {
    const Place at = place_of(a, task), after = place_of(a, task + 1);
    Walk walk = walk_of(a, &at, u, delta, A, bias);
    load_channels(D, a->D ? a->D + at.channel : NULL, 1, at.valid, 1.0f);
    memset(h, 0, states * ROW);
    for (int64_t t = 0; t < a->length; t += TILE, walk.b += TILE, walk.c += TILE) {
      const int64_t times = min64(TILE, a->length - t);
      gather_times(u, a->u, at.time + t, at.valid, a->length, times, dtype);
      gather_times(delta, a->delta, at.time + t, at.valid, a->length, times, dtype);
      for (int64_t s = 0; s < times; s++) LANEWISE y[s * LANES + i] = D[i] * u[s * LANES + i];
      /* The tile after this one: of these rows, or the first of the next task's. */
      const int same = t + TILE < a->length;
      const ptrdiff_t next = same ? at.time + t + TILE : after.time;
      const int next_valid = same ? at.valid : task + 1 < end ? after.valid : 0;
      const int64_t next_times = same ? a->length - t - TILE : a->length;
      for (int64_t s = 0; s < times; s += LANES) {
        if (s < next_times) {
          ask_for(a->u, next + s, next_valid, a->length, dtype, 0);
          ask_for(a->delta, next + s, next_valid, a->length, dtype, 0);
        }
        ask_for(a->y, at.time + t + s, at.valid, a->length, dtype, 1);
        forward_steps(&walk, (int)states, (int)a->softplus, order + s, 1, min64(LANES, times - s), h, y);
      }
      if (a->z) {
        gather_times(z, a->z, at.time + t, at.valid, a->length, times, dtype);
        for (int64_t s = 0; s < times; s++) LANEWISE y[s * LANES + i] *= z[s * LANES + i] * sigmoid(z[s * LANES + i]);
      }
      scatter_times(a->y, y, at.time + t, at.valid, a->length, times, dtype);
    }
    store_channels(a->state + at.row * states, h, states, at.valid);
  }
  arena_close(&arena);
  return 0;
}

/* Through y * silu(z): z becomes dz, grad becomes dL/dy. Needs the chunk's states, to compute y again. */
INLINE void back_through_gate(const Walk *w, const Chunk *chunk, const float *D, const float *u, float *z, float *grad,
                              int64_t states, int64_t times) {
  for (int64_t s = 0; s < times; s++) {
    float y[LANES];
    LANEWISE y[i] = D[i] * u[s * LANES + i];
    for (int64_t n = 0; n < states; n++) {
      const float *h = chunk->h + ((s + 1) * states + n) * LANES, c = w->c[n * w->state_stride + s];
      LANEWISE y[i] += h[i] * c;
    }
    LANEWISE {
      float x = z[s * LANES + i], g = grad[s * LANES + i], gate = sigmoid(x);
      z[s * LANES + i] = g * y[i] * gate * (1.0f + x * (1.0f - gate));
      grad[s * LANES + i] = g * x * gate;
    }
  }
}

MULTIVERSION
int ssmamba_selective_backward(const SelectiveArgs *a, int64_t begin, int64_t end) {
  const int64_t states = a->states, steps = min64(chunk_steps(states, a->length), TILE);
  const int64_t chunks = (a->length + steps - 1) / steps;
  const int dtype = (int)a->dtype, soft = (int)a->softplus;
  Arena arena;
  if (arena_open(&arena, 6 * steps * ROW + scratch_bytes(states, steps, chunks) + 4 * (size_t)steps)) return -1;
  float *u = arena_take(&arena, steps * ROW), *delta = arena_take(&arena, steps * ROW);
  float *z = arena_take(&arena, steps * ROW), *grad = arena_take(&arena, steps * ROW);
  float *du = arena_take(&arena, steps * ROW), *ddelta = arena_take(&arena, steps * ROW);
  Scratch sc = scratch_take(&arena, states, steps, chunks);
  int32_t *order = arena_take(&arena, steps * 4);
  for (int t = 0; t < steps; t++) order[t] = t;

  for (int64_t task = begin; task < end; task++) {
    const Place at = place_of(a, task);
    Walk walk = walk_of(a, &at, u, delta, sc.A, sc.bias);
    const float *b = walk.b, *c = walk.c;
    const ptrdiff_t rows = ((at.block * a->batch + at.image) * a->groups + at.group) * states * a->length;
    load_channels(sc.D, a->D ? a->D + at.channel : NULL, 1, at.valid, 1.0f);
    memset(sc.saved, 0, states * ROW);
    memset(sc.h, 0, states * ROW);
    for (int64_t k = 0; k + 1 < chunks; k++) {
      const int64_t t = k * steps;
      gather_times(u, a->u, at.time + t, at.valid, a->length, steps, dtype);
      gather_times(delta, a->delta, at.time + t, at.valid, a->length, steps, dtype);
      walk.b = b + t;
      walk.c = c + t;
      forward_steps(&walk, (int)states, soft, order, 1, steps, sc.h, NULL);
      memcpy(sc.saved + (k + 1) * states * LANES, sc.h, states * ROW);
    }
    memset(sc.dD, 0, ROW);
    memset(sc.dbias, 0, ROW);
    memset(sc.dA, 0, states * ROW);
    load_channels(sc.carry, a->grad_state ? a->grad_state + at.row * states : NULL, states, at.valid, 1.0f);
    for (int64_t k = chunks - 1; k >= 0; k--) {
      const int64_t t = k * steps, times = min64(steps, a->length - t);
      gather_times(u, a->u, at.time + t, at.valid, a->length, times, dtype);
      gather_times(delta, a->delta, at.time + t, at.valid, a->length, times, dtype);
      gather_times(grad, a->grad, at.time + t, at.valid, a->length, times, dtype);
      walk.b = b + t;
      walk.c = c + t;
      record_steps(&walk, (int)states, soft, order, 1, times, sc.saved + k * states * LANES, &sc.chunk);
      if (a->z) {
        gather_times(z, a->z, at.time + t, at.valid, a->length, times, dtype);
        back_through_gate(&walk, &sc.chunk, sc.D, u, z, grad, states, times);
        scatter_times(a->dz, z, at.time + t, at.valid, a->length, times, dtype);
      }
      for (int64_t s = 0; s < times; s++) LANEWISE {
        du[s * LANES + i] = sc.D[i] * grad[s * LANES + i];
        sc.dD[i] += u[s * LANES + i] * grad[s * LANES + i];
        ddelta[s * LANES + i] = 0.0f;
      }
      Gradients g = {.grad = grad, .du = du, .ddelta = ddelta, .dA = sc.dA, .dbias = sc.dbias,
                     .db = a->dB + rows + t, .dc = a->dC + rows + t, .pixel_stride = 1, .state_stride = a->length};
      back_steps(&walk, (int)states, order, 1, times, &sc.chunk, &g, sc.carry);
      scatter_times(a->du, du, at.time + t, at.valid, a->length, times, dtype);
      scatter_times(a->ddelta, ddelta, at.time + t, at.valid, a->length, times, dtype);
    }
    store_channels(a->dD + at.row, sc.dD, 1, at.valid);
    store_channels(a->dbias + at.row, sc.dbias, 1, at.valid);
    store_channels(a->dA + at.row * states, sc.dA, states, at.valid);
  }
  arena_close(&arena);
  return 0;
}
