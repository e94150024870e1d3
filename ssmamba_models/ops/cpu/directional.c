/* directional_scan: a map (batch, height, width, channels) read row by row, column by column, and both in reverse. */
#include "scan_maps.h"

typedef struct {
  int64_t batch, height, width, channels, states;
  int64_t dtype;             /* of u, delta, grad, y, du, ddelta */
  View u, delta, B, C, grad; /* B, C float32, [direction][state] contiguous within a pixel */
  const float *A, *D, *bias; /* (4, channels, states), (channels,) or NULL, (4, channels) or NULL */
  const uint8_t *hold;       /* (batch, height, width) or NULL */
  void *y;                   /* (batch, height, width, channels), contiguous, like all that follows */
  void *du, *ddelta;
  float *dA, *dD, *dbias;    /* (batch, 4, channels, states), (batch, channels), (batch, 4, channels) */
  float *dB, *dC;            /* (blocks, batch, height, width, 4, states) */
} DirectionalArgs;

/* The walk in direction k over one task's pixels; fills A and bias. */
INLINE Walk walk_of(const DirectionalArgs *a, int k, int64_t image, int64_t channel, int valid, const float *u,
                    const float *delta, float *A, float *bias) {
  const ptrdiff_t row = k * a->channels + channel;
  load_channels(A, a->A + row * a->states, a->states, valid, LOG2E);
  load_channels(bias, a->bias ? a->bias + row : NULL, 1, valid, 1.0f);
  return (Walk){
      .u = u, .delta = delta, .A = A, .bias = bias,
      .hold = a->hold ? a->hold + image * a->height * a->width : NULL,
      .b = (const float *)a->B.data + image * a->B.batch + k * a->states,
      .c = (const float *)a->C.data + image * a->C.batch + k * a->states,
      .pixel_stride = a->B.pixel, .state_stride = 1,
  };
}

MULTIVERSION
int ssmamba_directional_forward(const DirectionalArgs *a, int64_t begin, int64_t end) {
  const int64_t pixels = a->height * a->width, blocks = blocks_of(a->channels), states = a->states;
  Arena arena;
  if (arena_open(&arena, (3 * (size_t)pixels + 2 * (size_t)states + 2) * ROW + 8 * (size_t)pixels)) return -1;
  float *u = arena_take(&arena, pixels * ROW), *delta = arena_take(&arena, pixels * ROW);
  float *y = arena_take(&arena, pixels * ROW), *A = arena_take(&arena, states * ROW);
  float *h = arena_take(&arena, states * ROW), *D = arena_take(&arena, ROW), *bias = arena_take(&arena, ROW);
  int32_t *orders[2] = {arena_take(&arena, pixels * 4), arena_take(&arena, pixels * 4)};
  fill_orders(orders[0], orders[1], a->height, a->width);
  for (int64_t task = begin; task < end; task++) {
    const int64_t image = task / blocks, channel = task % blocks * LANES;
    const int valid = (int)min64(LANES, a->channels - channel);
    gather(u, &a->u, image, channel, valid, pixels, a->dtype);
    gather(delta, &a->delta, image, channel, valid, pixels, a->dtype);
    load_channels(D, a->D ? a->D + channel : NULL, 1, valid, 1.0f);
    for (int64_t p = 0; p < pixels; p++) LANEWISE y[p * LANES + i] = D[i] * u[p * LANES + i];
    for (int k = 0; k < 4; k++) {
      Walk walk = walk_of(a, k, image, channel, valid, u, delta, A, bias);
      memset(h, 0, states * ROW);
      forward_steps(&walk, (int)states, 1, orders[k & 1] + (k < 2 ? 0 : pixels - 1), k < 2 ? 1 : -1, pixels, h, y);
    }
    scatter(a->y, y, image, channel, valid, pixels, a->channels, a->dtype);
  }
  arena_close(&arena);
  return 0;
}

/* One direction back: forward once to learn the state at the start of every chunk, then chunk by chunk from the end,
 * so that memory stays small however long the walk is. */
INLINE void directional_back(const Walk *walk, Gradients *g, Scratch *s, int64_t states, const int32_t *order,
                             int direction, int64_t pixels, int64_t steps, int64_t chunks) {
  memset(s->saved, 0, states * ROW);
  memset(s->h, 0, states * ROW);
  memset(s->carry, 0, states * ROW);
  for (int64_t c = 0; c + 1 < chunks; c++) {
    forward_steps(walk, (int)states, 1, order + direction * c * steps, direction, steps, s->h, NULL);
    memcpy(s->saved + (c + 1) * states * LANES, s->h, states * ROW);
  }
  for (int64_t c = chunks - 1; c >= 0; c--) {
    const int32_t *first = order + direction * c * steps;
    const int64_t count = min64(steps, pixels - c * steps);
    record_steps(walk, (int)states, 1, first, direction, count, s->saved + c * states * LANES, &s->chunk);
    back_steps(walk, (int)states, first, direction, count, &s->chunk, g, s->carry);
  }
}

MULTIVERSION
int ssmamba_directional_backward(const DirectionalArgs *a, int64_t begin, int64_t end) {
  const int64_t pixels = a->height * a->width, blocks = blocks_of(a->channels), states = a->states;
  const int64_t steps = chunk_steps(states, pixels), chunks = (pixels + steps - 1) / steps;
  Arena arena;
  if (arena_open(&arena, 5 * pixels * ROW + scratch_bytes(states, steps, chunks) + 8 * (size_t)pixels)) return -1;
  float *u = arena_take(&arena, pixels * ROW), *delta = arena_take(&arena, pixels * ROW);
  float *grad = arena_take(&arena, pixels * ROW);
  float *du = arena_take(&arena, pixels * ROW), *ddelta = arena_take(&arena, pixels * ROW);
  Scratch s = scratch_take(&arena, states, steps, chunks);
  int32_t *orders[2] = {arena_take(&arena, pixels * 4), arena_take(&arena, pixels * 4)};
  fill_orders(orders[0], orders[1], a->height, a->width);

  for (int64_t task = begin; task < end; task++) {
    const int64_t image = task / blocks, block = task % blocks, channel = block * LANES;
    const int valid = (int)min64(LANES, a->channels - channel);
    gather(u, &a->u, image, channel, valid, pixels, a->dtype);
    gather(delta, &a->delta, image, channel, valid, pixels, a->dtype);
    gather(grad, &a->grad, image, channel, valid, pixels, a->dtype);
    load_channels(s.D, a->D ? a->D + channel : NULL, 1, valid, 1.0f);
    memset(s.dD, 0, ROW);
    for (int64_t p = 0; p < pixels; p++) LANEWISE {
      const ptrdiff_t at = p * LANES + i;
      du[at] = s.D[i] * grad[at];
      s.dD[i] += u[at] * grad[at];
      ddelta[at] = 0.0f;
    }
    store_channels(a->dD + image * a->channels + channel, s.dD, 1, valid);
    for (int k = 0; k < 4; k++) {
      Walk walk = walk_of(a, k, image, channel, valid, u, delta, s.A, s.bias);
      const ptrdiff_t at = ((block * a->batch + image) * pixels * 4 + k) * states;
      Gradients g = {.grad = grad, .du = du, .ddelta = ddelta, .dA = s.dA, .dbias = s.dbias,
                     .db = a->dB + at, .dc = a->dC + at, .pixel_stride = 4 * states, .state_stride = 1};
      memset(s.dbias, 0, ROW);
      memset(s.dA, 0, states * ROW);
      directional_back(&walk, &g, &s, states, orders[k & 1] + (k < 2 ? 0 : pixels - 1), k < 2 ? 1 : -1, pixels, steps,
                       chunks);
      const ptrdiff_t row = (image * 4 + k) * a->channels + channel;
      store_channels(a->dbias + row, s.dbias, 1, valid);
      store_channels(a->dA + row * states, s.dA, states, valid);
    }
    scatter(a->du, du, image, channel, valid, pixels, a->channels, a->dtype);
    scatter(a->ddelta, ddelta, image, channel, valid, pixels, a->channels, a->dtype);
  }
  arena_close(&arena);
  return 0;
}
