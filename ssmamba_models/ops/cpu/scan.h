/* The primitive that does all the scanning: a walk over pixels in a given order, sixteen channels at a time.
 *
 * The operators first gather their inputs into compact [pixel][16] buffers in float32: each is then read several
 * times, and it is where bfloat16 and float16 are converted. A task is one (image, block of sixteen channels). Every
 * exported function runs tasks [begin, end), touches memory that no other task writes, and returns 0, or -1 if
 * memory ran out: the caller spreads the tasks over threads. Sums over channels (dB, dC) or images (dA, dD, dbias)
 * come back as one partial sum per task, to be added by the caller in a fixed order, so results do not depend on the
 * number of threads.
 *
 * Equations: forward h_t = a_t h_(t-1) + dt_t b_t u_t with a_t = exp(dt_t A), y_t = c_t . h_t (Mamba,
 * arXiv:2312.00752). Backward, with s_t = dL/dh_t = c_t dy_t + a_(t+1) s_(t+1): dc_t = sum_D dy_t h_t,
 * db_t = sum_D s_t dt_t u_t, du_t = dt_t sum_N s_t b_t, d(dt_t) = sum_N s_t (a_t A h_(t-1) + b_t u_t).
 */
#ifndef SSMAMBA_SCAN_H
#define SSMAMBA_SCAN_H

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

#define ROW (LANES * sizeof(float))
/* What the backward pass keeps of one chunk of steps (states, decays) should stay inside the L2 cache. */
#define CHUNK_BYTES (96 * 1024)
/* Steps: columns of a large map lie too far apart for the hardware to guess. */
#define PREFETCH 8

/* What a walk reads: sixteen channels of every pixel, and the two projections of each pixel. */
typedef struct {
  const float *u, *delta;      /* [pixel][16] */
  const uint8_t *hold;
  const float *b, *c;          /* of pixel 0, state 0 */
  ptrdiff_t pixel_stride, state_stride;
  const float *A;              /* [state][16], times log2(e) */
  const float *bias;           /* [16] */
} Walk;

/* y[p] += C_p . h */
INLINE void emit(const Walk *w, const int states, ptrdiff_t p, const float *h, float *y) {
  const float *c = w->c + p * w->pixel_stride;
  float sum[LANES] = {0};
  for (int n = 0; n < states; n++) LANEWISE sum[i] += h[n * LANES + i] * c[n * w->state_stride];
  LANEWISE y[p * LANES + i] += sum[i];
}

/* y += C h along `steps` pixels order[0], order[direction], ...; h goes in and out. y is NULL when only the state is
 * wanted. states, soft and y are compile-time constants wherever speed matters. */
INLINE void walk_forward(const Walk *w, const int states, const int soft, const int32_t *order, const int direction,
                         ptrdiff_t steps, float *h, float *const y) {
  float bias[LANES], state[LANES], A0[LANES];
  LANEWISE bias[i] = w->bias[i];
  LANEWISE state[i] = h[i];
  LANEWISE A0[i] = w->A[i];
  for (ptrdiff_t t = 0; t < steps; t++, order += direction) {
    const ptrdiff_t p = *order, at = p * LANES;
    const float *b = w->b + p * w->pixel_stride, *c = w->c + p * w->pixel_stride;
    const float *u = w->u + at, *delta = w->delta + at;
    if (t + PREFETCH < steps) {
      const ptrdiff_t ahead = (ptrdiff_t)order[PREFETCH * direction] * LANES;
      __builtin_prefetch(w->u + ahead);
      __builtin_prefetch(w->delta + ahead);
      if (y) __builtin_prefetch(y + ahead, 1);
    }
    if (w->hold && w->hold[p]) { /* dt = 0: the state passes */
      if (y) emit(w, states, p, states == 1 ? state : h, y);
      continue;
    }
    if (states == 1) {
      const float b0 = b[0], c0 = c[0];
      LANEWISE {
        float x = delta[i] + bias[i];
        float dt = soft ? softplus(x) : x;
        state[i] = exp2_(dt * A0[i]) * state[i] + dt * u[i] * b0;
        if (y) y[at + i] += state[i] * c0;
      }
      continue;
    }
    float dt[LANES], dtu[LANES], sum[LANES];
    LANEWISE {
      float x = delta[i] + bias[i];
      dt[i] = soft ? softplus(x) : x;
      dtu[i] = dt[i] * u[i];
      sum[i] = 0.0f;
    }
    for (int n = 0; n < states; n++) {
      const float bn = b[n * w->state_stride], cn = c[n * w->state_stride];
      float *hn = h + n * LANES;
      const float *An = w->A + n * LANES;
      LANEWISE {
        hn[i] = exp2_of_many(dt[i] * An[i]) * hn[i] + dtu[i] * bn;
        sum[i] += hn[i] * cn;
      }
    }
    if (y) LANEWISE y[at + i] += sum[i];
  }
  if (states == 1) LANEWISE h[i] = state[i];
}

/* What the backward pass remembers of a chunk: the state h[t][n] before step t (and after the last), the decay
 * a[t][n], the step size, and its derivative with respect to delta. */
typedef struct {
  float *h, *a, *dt, *slope;
} Chunk;

INLINE void walk_record(const Walk *w, const int states, const int soft, const int32_t *order, const int direction,
                        ptrdiff_t steps, const float *h, const Chunk *chunk) {
  memcpy(chunk->h, h, (size_t)states * LANES * sizeof(float));
  for (ptrdiff_t t = 0; t < steps; t++, order += direction) {
    const ptrdiff_t p = *order;
    const float *u = w->u + p * LANES, *delta = w->delta + p * LANES, *bias = w->bias;
    const float *b = w->b + p * w->pixel_stride;
    const int held = w->hold && w->hold[p];
    float *dt = chunk->dt + t * LANES, *slope = chunk->slope + t * LANES;
    float dtu[LANES];
    if (held) { /* dt = 0 whatever delta is, NaN included */
      LANEWISE dt[i] = slope[i] = dtu[i] = 0.0f;
    } else {
      LANEWISE {
        float x = delta[i] + bias[i];
        float z = exp_minus_abs(x);
        dt[i] = soft ? (x < 0.0f ? 0.0f : x) + log1p_unit(z) : x;
        slope[i] = soft ? (x < 0.0f ? z : 1.0f) / (z + 1.0f) : 1.0f;
        dtu[i] = dt[i] * u[i];
      }
    }
    const float *h_in = chunk->h + t * states * LANES;
    float *h_out = chunk->h + (t + 1) * states * LANES, *a_out = chunk->a + t * states * LANES;
    for (int n = 0; n < states; n++) {
      const float bn = b[n * w->state_stride];
      const float *hn = h_in + n * LANES, *An = w->A + n * LANES;
      float *on = h_out + n * LANES, *an = a_out + n * LANES;
      LANEWISE {
        float a = exp2_by(dt[i] * An[i], states == 1);
        an[i] = a;
        on[i] = a * hn[i] + dtu[i] * bn;
      }
    }
  }
}

/* What the walk back adds to. db and dc are of pixel 0, state 0. */
typedef struct {
  const float *grad;           /* [pixel][16] */
  float *du, *ddelta;
  float *db, *dc;
  ptrdiff_t pixel_stride, state_stride;
  float *dA, *dbias;           /* [state][16], [16] */
} Gradients;

/* The chunk's steps in reverse; `order` is at its first step. carry[n] is dL/dh from the steps after: in and out. */
INLINE void walk_back(const Walk *w, const int states, const int32_t *order, const int direction, ptrdiff_t steps,
                      const Chunk *chunk, const Gradients *g, float *carry) {
  for (ptrdiff_t t = steps - 1; t >= 0; t--) {
    const ptrdiff_t p = order[t * direction], at = p * LANES;
    const float *dy = g->grad + at, *u = w->u + at;
    const float *dt = chunk->dt + t * LANES, *slope = chunk->slope + t * LANES;
    const float *b = w->b + p * w->pixel_stride, *c = w->c + p * w->pixel_stride;
    float *db = g->db + p * g->pixel_stride, *dc = g->dc + p * g->pixel_stride;
    const float *h_in = chunk->h + t * states * LANES, *h_out = h_in + states * LANES;
    const float *a = chunk->a + t * states * LANES;
    float d_dt[LANES], d_dtu[LANES], dtu[LANES];
    LANEWISE {
      d_dt[i] = d_dtu[i] = 0.0f;
      dtu[i] = dt[i] * u[i];
    }
    for (int n = 0; n < states; n++) {
      const float bn = b[n * w->state_stride], cn = c[n * w->state_stride];
      const float *An = w->A + n * LANES, *an = a + n * LANES;
      const float *hi = h_in + n * LANES, *ho = h_out + n * LANES;
      float *carry_n = carry + n * LANES, *dA = g->dA + n * LANES;
      float sum_b = 0.0f, sum_c = 0.0f;
      _Pragma("omp simd simdlen(16) reduction(+ : sum_b, sum_c)") for (int i = 0; i < LANES; i++) {
        float s = carry_n[i] + dy[i] * cn;
        float decay = s * an[i]; /* also what the step before receives */
        float through_a = decay * hi[i];
        sum_c += dy[i] * ho[i];
        sum_b += s * dtu[i];
        d_dtu[i] += s * bn;
        d_dt[i] += through_a * An[i];
        dA[i] += through_a * dt[i];
        carry_n[i] = decay;
      }
      db[n * g->state_stride] = sum_b;
      dc[n * g->state_stride] = sum_c;
    }
    float *du = g->du + at, *ddelta = g->ddelta + at, *dbias = g->dbias;
    LANEWISE {
      /* A holds log2(e) times the true value. */
      float dx = (d_dt[i] * (1.0f / LOG2E) + d_dtu[i] * u[i]) * slope[i];
      ddelta[i] += dx;
      dbias[i] += dx;
      du[i] += d_dtu[i] * dt[i];
    }
  }
}

/* The same, with the usual numbers of states known to the compiler. */
INLINE void forward_steps(const Walk *w, int states, int soft, const int32_t *order, int direction, ptrdiff_t steps,
                          float *h, float *y) {
  if (states == 1 && soft) walk_forward(w, 1, 1, order, direction, steps, h, y);
  else if (states == 16 && soft) walk_forward(w, 16, 1, order, direction, steps, h, y);
  else if (states == 1) walk_forward(w, 1, 0, order, direction, steps, h, y);
  else walk_forward(w, states, soft, order, direction, steps, h, y);
}

INLINE void record_steps(const Walk *w, int states, int soft, const int32_t *order, int direction, ptrdiff_t steps,
                         const float *h, const Chunk *chunk) {
  if (states == 1) walk_record(w, 1, soft, order, direction, steps, h, chunk);
  else walk_record(w, states, soft, order, direction, steps, h, chunk);
}

INLINE void back_steps(const Walk *w, int states, const int32_t *order, int direction, ptrdiff_t steps,
                       const Chunk *chunk, const Gradients *g, float *carry) {
  if (states == 1) walk_back(w, 1, order, direction, steps, chunk, g, carry);
  else walk_back(w, states, order, direction, steps, chunk, g, carry);
}

/* ---- memory ---- */

/* A call's scratch: one allocation, handed out in pieces aligned to a vector. */
typedef struct {
  char *base;
  size_t used;
} Arena;

INLINE int arena_open(Arena *arena, size_t bytes) {
  /* Large maps want huge pages: reading a column touches a new 4 KiB page at every step. */
  const size_t huge = (size_t)2 << 20, align = bytes >= 2 * huge ? huge : 64;
  /* Room for the rounding of up to 64 pieces; aligned_alloc wants a multiple of the alignment. */
  bytes = (bytes + 64 * 64 + align - 1) / align * align;
#if defined(_WIN32)
  arena->base = _aligned_malloc(bytes, align);
#else
  arena->base = aligned_alloc(align, bytes);
#endif
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (arena->base && align == huge) madvise(arena->base, bytes, MADV_HUGEPAGE); /* a hint: failure is harmless */
#endif
  arena->used = 0;
  return arena->base ? 0 : -1;
}

INLINE void *arena_take(Arena *arena, size_t bytes) {
  void *piece = arena->base + arena->used;
  arena->used += (bytes + 63) / 64 * 64;
  return piece;
}

INLINE void arena_close(Arena *arena) {
#if defined(_WIN32)
  _aligned_free(arena->base);
#else
  free(arena->base);
#endif
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks_of(int64_t channels) { return (channels + LANES - 1) / LANES; }

/* out[state][16] = in[channel][state] * scale, zero where there is no channel. in may be NULL: all zero. */
INLINE void load_channels(float *out, const float *in, int64_t states, int valid, float scale) {
  memset(out, 0, (size_t)states * ROW);
  if (!in) return;
  for (int l = 0; l < valid; l++)
    for (int64_t n = 0; n < states; n++) out[n * LANES + l] = in[l * states + n] * scale;
}

INLINE void store_channels(float *out, const float *in, int64_t states, int valid) {
  for (int l = 0; l < valid; l++)
    for (int64_t n = 0; n < states; n++) out[l * states + n] = in[n * LANES + l];
}

/* Steps whose record (h and a: `states` rows each; dt and slope: one each) fits into CHUNK_BYTES. */
INLINE int64_t chunk_steps(int64_t states, int64_t length) {
  int64_t steps = CHUNK_BYTES / (int64_t)((2 * states + 2) * ROW);
  return min64(steps < 16 ? 16 : steps, length);
}

/* Scratch that the backward walks share, whatever they walk over. */
typedef struct {
  float *A, *dA, *bias, *dbias, *D, *dD; /* [state][16] twice, then [16] */
  float *h, *carry;                      /* [state][16] */
  float *saved;                          /* [chunk][state][16]: the state at the start of every chunk */
  Chunk chunk;
} Scratch;

INLINE size_t scratch_bytes(int64_t states, int64_t steps, int64_t chunks) {
  return (size_t)((2 * steps + 5 + chunks) * states + 2 * steps + 4) * ROW;
}

INLINE Scratch scratch_take(Arena *arena, int64_t states, int64_t steps, int64_t chunks) {
  const size_t rows = (size_t)states * ROW;
  Scratch s;
  s.A = arena_take(arena, rows);
  s.dA = arena_take(arena, rows);
  s.bias = arena_take(arena, ROW);
  s.dbias = arena_take(arena, ROW);
  s.D = arena_take(arena, ROW);
  s.dD = arena_take(arena, ROW);
  s.h = arena_take(arena, rows);
  s.carry = arena_take(arena, rows);
  s.saved = arena_take(arena, chunks * rows);
  s.chunk.h = arena_take(arena, (steps + 1) * rows);
  s.chunk.a = arena_take(arena, steps * rows);
  s.chunk.dt = arena_take(arena, steps * ROW);
  s.chunk.slope = arena_take(arena, steps * ROW);
  return s;
}

#endif
