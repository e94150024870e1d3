/* Layer norms and matrix products for one instruction set. A file that includes this, as a part of plan_ops.h or of
 * plan_int8.h, defines
 *
 *   VEC       floats in a register          MR      rows of a product that are computed at a time
 *   NV        registers to a row of those
 *   PRODUCTS  what products multiply: FLOATS, BFLOATS (pairs of bfloat16) or BYTES (fours of int8)
 *   AMX       1 if they do it by tiles (MR is 32 then, PANEL too)
 *   OPS       the name of its table
 *
 * A product works on a block of rows that fits into the L2 cache beside what surrounds it. Its left side lies in
 * scratch memory, in slabs of SLAB columns whose rows are PITCH apart: constants, so that the rows of a tile have fixed
 * offsets. Each tile of results passes through a small buffer, where bias, activation and conversion are applied.
 *
 * BYTES: a number is a signed byte times the scale of its row, so a row is staged as floats until it is complete.
 * Weights are unsigned bytes, 128 too large, as the instructions want one side to be; 128 times the row's sum is taken
 * off the results.
 */
#include "plan.h"
#include "scan.h"
#include "scan_maps.h"

#define PANEL (VEC * NV)
#define TAPS 9

typedef float vec __attribute__((vector_size(VEC * sizeof(float)), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VEC * sizeof(int32_t)), aligned(4), may_alias));

/* `total`: a sum of products. K_GRAIN: what the length of a row is padded to. PITCH is not a multiple of 4096 bytes:
 * rows must not share a cache set. */
#if PRODUCTS == BYTES
typedef int8_t elem;
typedef int32_t total;
typedef ivec totals;
#define K_GRAIN (AMX ? 64 : 4)
#define PITCH (SLAB + 64)
#else
typedef float total;
typedef vec totals;
#define PITCH (SLAB + 32)
#if PRODUCTS == BFLOATS
typedef uint16_t elem;
#define K_GRAIN 32
#else
typedef float elem;
#define K_GRAIN 1
#endif
#endif

INLINE int64_t up_to(int64_t x, int64_t grain) { return (x + grain - 1) / grain * grain; }
INLINE int64_t slabs_of(int64_t k) { return (k + SLAB - 1) / SLAB; }

/* The left side of a product: element k of row i is at base[k / SLAB * stride + i * PITCH + k % SLAB]. */
typedef struct {
  elem *base;
  ptrdiff_t stride;
#if PRODUCTS == BYTES
  float *staged; /* row i at staged + i * staged_pitch; all in one place if that is 0 */
  ptrdiff_t staged_pitch;
  RowFacts *facts;
#endif
} Left;

/* `together`: all its rows are written before one is closed (see close_row). */
INLINE Left take_left(Arena *arena, int64_t rows, int64_t k, const int together) {
  rows = up_to(rows, MR);
  Left a;
  a.base = arena_take(arena, (size_t)(slabs_of(k) * rows * PITCH) * sizeof(elem));
  a.stride = rows * PITCH;
#if PRODUCTS == BYTES
  a.staged_pitch = together ? up_to(k, LANES) : 0;
  a.staged = arena_take(arena, (size_t)((together ? rows : 1) * up_to(k, LANES)) * sizeof(float));
  a.facts = arena_take(arena, (size_t)rows * sizeof *a.facts);
#else
  (void)together;
#endif
  return a;
}

INLINE total *take_tile(Arena *arena) { return arena_take(arena, MR * PANEL * sizeof(total)); }

INLINE elem *at(const Left *a, int64_t row, int64_t k) { return a->base + k / SLAB * a->stride + row * PITCH + k % SLAB; }

/* ---- sixteen numbers ---- */

#ifndef ROUND_ROW
#define ROUND_ROW(out, in) LANEWISE(out)[i] = to_bf16((in)[i])
#endif

/* As store_row. */
INLINE void store(void *out, ptrdiff_t place, const float *in, const int valid, const int dtype) {
  if (valid < LANES) store_row(out, place, in, valid, dtype);
  else if (dtype == F32) store_row(out, place, in, LANES, F32);
  else ROUND_ROW((uint16_t *)out + place, in);
}

/* As load_row, for float32 and bfloat16. */
INLINE void load(float *out, const void *in, ptrdiff_t place, const int valid, const int dtype) {
  if (valid < LANES) load_row(out, in, place, valid, dtype);
  else if (dtype == F32) load_row(out, in, place, LANES, F32);
  else load_row(out, in, place, LANES, BF16);
}

/* ---- rows of a left side: put in parts, then closed ---- */

#if PRODUCTS == BYTES
INLINE float *staged(const Left *a, int64_t row, int64_t k) { return a->staged + row * a->staged_pitch + k; }
#endif

/* Sixteen columns from k on, a multiple of 16. */
INLINE void put(const Left *a, int64_t row, int64_t k, const float *in) {
#if PRODUCTS == BYTES
  memcpy(staged(a, row, k), in, LANES * sizeof(float));
#elif PRODUCTS == BFLOATS
  ROUND_ROW(at(a, row, k), in);
#else
  memcpy(at(a, row, k), in, LANES * sizeof(float));
#endif
}

INLINE void put_one(const Left *a, int64_t row, int64_t k, float x) {
#if PRODUCTS == BYTES
  *staged(a, row, k) = x;
#elif PRODUCTS == BFLOATS
  *at(a, row, k) = to_bf16(x);
#else
  *at(a, row, k) = x;
#endif
}

/* Columns [k, k + valid) of a row. k need not be a multiple of 16. */
INLINE void put_part(const Left *a, int64_t row, int64_t k, const float *in, int valid) {
  if (valid == LANES && k % SLAB <= SLAB - LANES) put(a, row, k, in);
  else
    for (int i = 0; i < valid; i++) put_one(a, row, k + i, in[i]);
}

#if PRODUCTS == BYTES
/* The largest of the absolute values; NaN if there is one: as bits it is above all numbers. */
INLINE float largest_of(const float *x, int64_t k) {
  int32_t lanes[LANES] = {0}, largest = 0;
  for (int64_t j = 0; j < k; j += LANES)
    LANEWISE {
      const int32_t b = bits(x[j + i]) & 0x7fffffff;
      lanes[i] = b > lanes[i] ? b : lanes[i];
    }
  for (int i = 0; i < LANES; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  return from_bits(largest);
}

/* A row of bytes from what is staged: its largest number becomes 127 or -127. */
INLINE void quantize_row(const Left *a, int64_t row, int64_t k) {
  const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
  float *x = staged(a, row, 0);
  for (int64_t j = k; j < up_to(k, LANES); j++) x[j] = 0.0f;
  const float largest = largest_of(x, k);
  const float factor = largest > 1e-30f ? 127.0f / largest : 0.0f; /* 0 for NaN too, which the scale then holds */
  int32_t lanes[LANES] = {0}, sum = 0;
  for (int64_t j = 0; j < k; j += LANES) {
    elem *out = at(a, row, j);
    LANEWISE {
      out[i] = (int8_t)bits(x[j + i] * factor + round);
      lanes[i] += out[i];
    }
  }
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  a->facts[row] = (RowFacts){largest / 127.0f, 128 * sum};
}
#endif

/* After the last part of a row of k columns: zeros up to the end of the padded row. */
INLINE void close_row(const Left *a, int64_t row, int64_t k) {
#if PRODUCTS == BYTES
  quantize_row(a, row, k);
#endif
  for (const int64_t end = up_to(k, K_GRAIN); k < end; k++) *at(a, row, k) = 0;
}

/* Rows that a tile has in excess: whatever lies there would be multiplied too, and denormal numbers take long. */
INLINE void put_no_rows(const Left *a, int64_t rows, int64_t k) {
  k = up_to(k, K_GRAIN);
  for (int64_t row = rows; row < up_to(rows, MR); row++)
    for (int64_t j = 0; j < k; j += SLAB) memset(at(a, row, j), 0, (size_t)min64(SLAB, k - j) * sizeof(elem));
}

INLINE float activate_gelu(float x) {
#if PRODUCTS == FLOATS
  return gelu(x);
#else
  return gelu_for_bf16(x);
#endif
}

/* ---- products ---- */

#if !AMX
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}
#endif

#if AMX
/* c (MR x PANEL) = the tile's rows times one panel. k is a multiple of K_GRAIN. */
INLINE void multiply_tile(const Left *a, int64_t row, const elem *b, int64_t k, total *c) {
  tile_zero_all();
  for (int64_t k0 = 0; k0 < k; k0 += SLAB) {
    const elem *left = at(a, row, k0);
    const int64_t steps = min64(SLAB, k - k0) / K_GRAIN;
    for (int64_t s = 0; s < steps; s++, left += K_GRAIN, b += K_GRAIN * PANEL)
      tile_multiply(left, PITCH * sizeof(elem), b, PANEL * 4);
  }
  tile_store_all(c, PANEL * 4);
}
#else
#if MR == 4
#define EACH_ROW(X) X(0) X(1) X(2) X(3)
#elif MR == 6
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5)
#elif MR == 12
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#elif MR == 14
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13)
#endif
#if NV == 2
#define EACH_COLUMN(X, r) X(r, 0) X(r, 1)
#elif NV == 4
#define EACH_COLUMN(X, r) X(r, 0) X(r, 1) X(r, 2) X(r, 3)
#endif
#define EACH_CELL(X, r) EACH_COLUMN(X, r)

#if PRODUCTS == BYTES
#define K_STEP 4
typedef ivec columns, spread;
#define BROADCAST(p) broadcast_four(p)
#define MULTIPLY_ADD(c, a, b) c = dot_fours(c, b, a)
#elif PRODUCTS == BFLOATS
#define K_STEP 2
typedef pairs spread;
typedef ivec columns;
#define BROADCAST(p) broadcast_pair(p)
#define MULTIPLY_ADD(c, a, b) c = dot_pairs(c, a, b)
#else
#define K_STEP 1
typedef vec columns;
typedef float spread; /* times a vector: one load that fills a register */
#define BROADCAST(p) (*(p))
#define MULTIPLY_ADD(c, a, b) c += (a) * (b)
#endif

/* c (MR x PANEL) = the tile's rows times one panel. */
INLINE void multiply_tile(const Left *a, int64_t row, const elem *b, int64_t k, total *c) {
#define DECLARE_CELL(r, v) totals c##r##_##v = {0};
#define DECLARE_ROW(r) EACH_CELL(DECLARE_CELL, r)
  EACH_ROW(DECLARE_ROW)
  for (int64_t k0 = 0; k0 < k; k0 += SLAB) {
    const elem *left = at(a, row, k0);
    const elem *end = left + min64(SLAB, k - k0);
    for (; left < end; left += K_STEP, b += K_STEP * PANEL) {
#define LOAD_B(r, v) const columns b##v = *(const columns *)(b + v * VEC * K_STEP);
      EACH_COLUMN(LOAD_B, 0)
#define CELL(r, v) MULTIPLY_ADD(c##r##_##v, a##r, b##v);
#define STEP(r) { const spread a##r = BROADCAST(left + r * PITCH); EACH_CELL(CELL, r) }
      EACH_ROW(STEP)
    }
  }
#define STORE_CELL(r, v) *(totals *)(c + r * PANEL + v * VEC) = c##r##_##v;
#define STORE_ROW(r) EACH_CELL(STORE_CELL, r)
  EACH_ROW(STORE_ROW)
}
#endif

/* What becomes of a tile of results: stored as a map or as float rows, added to float rows, or made the next product's
 * left side through GELU. */
enum { TO_MAP, ADD, GELU };

typedef struct {
  void *data;      /* of row 0, column 0; unused by GELU */
  ptrdiff_t pitch; /* elements from row to row */
  int64_t n;       /* columns that exist */
  int dtype;       /* of TO_MAP */
  const float *bias;
  const Left *left; /* of GELU */
} Out;

/* Sixteen sums of row `row` as floats, from `column` of the weights on: `sums` where they are not floats already. */
INLINE const float *read_totals(float *sums, const total *c, const Left *a, int64_t row, const Linear *w,
                                int64_t column) {
#if PRODUCTS == BYTES
  const RowFacts facts = a->facts[row];
  const float *scales = w->scale + column;
  LANEWISE sums[i] = (float)(c[i] - facts.excess) * (facts.scale * scales[i]);
  return sums;
#else
  (void)sums, (void)a, (void)row, (void)w, (void)column;
  return c;
#endif
}

/* Sixteen sums of row `row`, from column `column` of the results on. */
INLINE void finish_block(const float *c, int64_t row, int64_t column, const int kind, const Out *out) {
  const float *bias = out->bias;
  float y[LANES];
  if (bias) LANEWISE y[i] = c[i] + bias[column + i];
  else LANEWISE y[i] = c[i];
  if (kind == GELU) {
    LANEWISE y[i] = activate_gelu(y[i]);
    put(out->left, row, column, y); /* the padding too: GELU(0) is 0 */
    return;
  }
  const int64_t left = out->n - column;
  const ptrdiff_t place = row * out->pitch + column;
  if (left >= LANES) {
    if (kind == ADD) {
      float *sum = (float *)out->data + place;
      LANEWISE sum[i] += y[i];
    } else store(out->data, place, y, LANES, out->dtype);
    return;
  }
  for (int64_t i = 0; i < left; i++) {
    if (kind == ADD) ((float *)out->data)[place + i] += y[i];
    else store_one(out->data, place + i, y[i], out->dtype);
  }
}

/* `rows` rows of a, columns [0, k) of it, times panels [first, last) of w, whose rows from k_begin on belong to them.
 * Column 0 of the results is the first panel's. */
INLINE void multiply(const Left *a, int64_t rows, const Linear *w, int64_t k_begin, int64_t k, int64_t first,
                     int64_t last, const int kind, const Out *out, total *c) {
  const int64_t k_all = up_to(w->k, K_GRAIN);
  k = up_to(k, K_GRAIN);
  tiles_begin();
  for (int64_t panel = first; panel < last; panel++) {
    const elem *b = (const elem *)w->weight + (panel * k_all + k_begin) * PANEL;
    for (int64_t row = 0; row < rows; row += MR) {
      multiply_tile(a, row, b, k, c);
      const int64_t filled = min64(MR, rows - row);
      for (int64_t r = 0; r < filled; r++)
        for (int64_t j = 0; j < PANEL; j += LANES) {
          float sums[LANES];
          const float *read = read_totals(sums, c + r * PANEL + j, a, row + r, w, panel * PANEL + j);
          finish_block(read, row + r, (panel - first) * PANEL + j, kind, out);
        }
    }
  }
  tiles_end();
}

INLINE int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

INLINE void multiply_all(const Left *a, int64_t rows, const Linear *w, const int kind, const Out *out, total *c) {
  multiply(a, rows, w, 0, w->k, 0, panels_of(w->n), kind, out, c);
}

/* ---- layer norm ---- */

typedef struct {
  float mean, scale;
} Moments;

INLINE float sum_lanes(const float *x) {
  float sum = 0.0f;
  _Pragma("omp simd simdlen(16) reduction(+ : sum)") for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

INLINE Moments moments(const float *x, int64_t width, double eps) {
  const int64_t whole = width / LANES * LANES;
  float lanes[LANES] = {0};
  for (int64_t j = 0; j < whole; j += LANES) LANEWISE lanes[i] += x[j + i];
  float sum = sum_lanes(lanes);
  for (int64_t j = whole; j < width; j++) sum += x[j];
  const float mean = sum / (float)width;
  LANEWISE lanes[i] = 0.0f;
  for (int64_t j = 0; j < whole; j += LANES) LANEWISE lanes[i] += (x[j + i] - mean) * (x[j + i] - mean);
  sum = sum_lanes(lanes);
  for (int64_t j = whole; j < width; j++) sum += (x[j] - mean) * (x[j] - mean);
  const float variance = sum / (float)width;
  /* A variance beyond float32 makes NaN, as in torch, and not zeros. */
  return (Moments){mean, 1.0f / __builtin_sqrtf(variance + (float)eps) + (variance - variance)};
}

/* (x - mean) / deviation, as a row of a product's left side. */
INLINE void put_normalised(const Left *a, int64_t row, const float *x, int64_t width, double eps) {
  const Moments m = moments(x, width, eps);
  float y[LANES];
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) {
    LANEWISE y[i] = (x[j + i] - m.mean) * m.scale;
    put(a, row, j, y);
  }
  for (; j < width; j++) {
    y[0] = (x[j] - m.mean) * m.scale;
    put_one(a, row, j, y[0]);
  }
  close_row(a, row, width);
}
