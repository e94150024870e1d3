/* The operators of plan.h for one instruction set. A file that includes this defines
 *
 *   VEC     floats in a register          MR      rows of a product that are computed at a time
 *   NV      registers to a row of those
 *   BF16_PRODUCTS   1 if products multiply pairs of bfloat16, 0 for float
 *   AMX             1 if they do it by tiles (MR is 32 then, PANEL too)
 *   OPS             the name of its table
 *
 * A matrix product works on a block of rows that fits into the L2 cache beside what surrounds it. Its left side lies in
 * scratch memory, in slabs of SLAB columns whose rows are PITCH apart: constants, so that the rows of a tile have fixed
 * offsets. Each tile of results passes through a small buffer, where bias, activation and conversion are applied.
 */
#include "plan.h"
#include "scan.h"
#include "scan_maps.h"

#define PANEL (VEC * NV)
#define PITCH (SLAB + 32) /* not a multiple of 4096 bytes: rows must not share a cache set */
#define TAPS 9

typedef float vec __attribute__((vector_size(VEC * sizeof(float)), aligned(4), may_alias));

#if BF16_PRODUCTS
typedef uint16_t elem;
#define K_GRAIN 32
#else
typedef float elem;
#define K_GRAIN 1
#endif

INLINE int64_t up_to(int64_t x, int64_t grain) { return (x + grain - 1) / grain * grain; }
INLINE int64_t slabs_of(int64_t k) { return (k + SLAB - 1) / SLAB; }

/* The left side of a product: element k of row i is at base[k / SLAB * stride + i * PITCH + k % SLAB]. */
typedef struct {
  elem *base;
  ptrdiff_t stride;
} Left;

INLINE Left take_left(Arena *arena, int64_t rows, int64_t k) {
  rows = up_to(rows, MR);
  return (Left){arena_take(arena, (size_t)(slabs_of(k) * rows * PITCH) * sizeof(elem)), rows * PITCH};
}

INLINE elem *at(const Left *a, int64_t row, int64_t k) { return a->base + k / SLAB * a->stride + row * PITCH + k % SLAB; }

/* ---- sixteen numbers ---- */

#ifndef ROUND_ROW
#define ROUND_ROW(out, in) LANEWISE(out)[i] = to_bf16((in)[i])
#endif

INLINE void put(elem *out, const float *in) {
#if BF16_PRODUCTS
  ROUND_ROW(out, in);
#else
  memcpy(out, in, LANES * sizeof(float));
#endif
}

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

/* Zeros from column k to the end of the padded row. */
INLINE void put_padding(const Left *a, int64_t row, int64_t k) {
  for (const int64_t end = up_to(k, K_GRAIN); k < end; k++) *at(a, row, k) = 0;
}

/* Columns [k, k + valid) of a row. k need not be a multiple of 16. */
INLINE void put_part(const Left *a, int64_t row, int64_t k, const float *in, int valid) {
  if (valid == LANES && k % SLAB <= SLAB - LANES) put(at(a, row, k), in);
  else
    for (int i = 0; i < valid; i++) {
#if BF16_PRODUCTS
      *at(a, row, k + i) = to_bf16(in[i]);
#else
      *at(a, row, k + i) = in[i];
#endif
    }
}

/* Rows that a tile has in excess: whatever lies there would be multiplied too, and denormal numbers take long. */
INLINE void put_no_rows(const Left *a, int64_t rows, int64_t k) {
  k = up_to(k, K_GRAIN);
  for (int64_t row = rows; row < up_to(rows, MR); row++)
    for (int64_t j = 0; j < k; j += SLAB) memset(at(a, row, j), 0, (size_t)min64(SLAB, k - j) * sizeof(elem));
}

INLINE float activate_gelu(float x) {
#if BF16_PRODUCTS
  return gelu_for_bf16(x);
#else
  return gelu(x);
#endif
}

/* ---- products ---- */

#if !AMX
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}
#endif

#if AMX
/* c (MR x PANEL) = the tile's rows times one panel. k is a multiple of 32. */
INLINE void multiply_tile(const Left *a, int64_t row, const elem *b, int64_t k, float *c) {
  tile_zero_all();
  for (int64_t k0 = 0; k0 < k; k0 += SLAB) {
    const elem *left = at(a, row, k0);
    const int64_t steps = min64(SLAB, k - k0) / 32;
    for (int64_t s = 0; s < steps; s++, left += 32, b += 32 * PANEL) tile_multiply(left, PITCH * 2, b, PANEL * 4);
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

#if BF16_PRODUCTS
#define K_STEP 2
typedef pairs spread;
typedef int32_t columns __attribute__((vector_size(64), aligned(4), may_alias));
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
INLINE void multiply_tile(const Left *a, int64_t row, const elem *b, int64_t k, float *c) {
#define DECLARE_CELL(r, v) vec c##r##_##v = {0};
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
#define STORE_CELL(r, v) *(vec *)(c + r * PANEL + v * VEC) = c##r##_##v;
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

INLINE void finish_block(const float *c, int64_t row, int64_t column, const int kind, const Out *out) {
  const float *bias = out->bias;
  float y[LANES];
  if (bias) LANEWISE y[i] = c[i] + bias[column + i];
  else LANEWISE y[i] = c[i];
  if (kind == GELU) {
    LANEWISE y[i] = activate_gelu(y[i]);
    put(at(out->left, row, column), y); /* the padding too: GELU(0) is 0 */
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
                     int64_t last, const int kind, const Out *out, float *c) {
  const int64_t k_all = up_to(w->k, K_GRAIN);
  k = up_to(k, K_GRAIN);
  tiles_begin();
  for (int64_t panel = first; panel < last; panel++) {
    const elem *b = (const elem *)w->weight + (panel * k_all + k_begin) * PANEL;
    for (int64_t row = 0; row < rows; row += MR) {
      multiply_tile(a, row, b, k, c);
      const int64_t filled = min64(MR, rows - row);
      for (int64_t r = 0; r < filled; r++)
        for (int64_t j = 0; j < PANEL; j += LANES)
          finish_block(c + r * PANEL + j, row + r, (panel - first) * PANEL + j, kind, out);
    }
  }
  tiles_end();
}

INLINE int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

INLINE void multiply_all(const Left *a, int64_t rows, const Linear *w, const int kind, const Out *out, float *c) {
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
    put(at(a, row, j), y);
  }
  for (; j < width; j++) {
    y[0] = (x[j] - m.mean) * m.scale;
    put_part(a, row, j, y, 1);
  }
  put_padding(a, row, width);
}

INLINE void normalise_affine(float *x, int64_t width, const Norm *norm) {
  const Moments m = moments(x, width, norm->eps);
  for (int64_t j = 0; j < width; j++) x[j] = (x[j] - m.mean) * m.scale * norm->weight[j] + norm->bias[j];
}

/* ---- the operators ---- */

static void norm_linear(const void *args, Worker *worker, int64_t task) {
  const NormLinearArgs *p = args;
  Arena arena = {worker->scratch, 0};
  const int64_t first = task * p->rows, rows = min64(p->rows, p->tokens - first), k = p->w.k;
  const Left a = take_left(&arena, p->rows, k);
  float *c = arena_take(&arena, MR * PANEL * sizeof(float));
  for (int64_t row = 0; row < rows; row++) put_normalised(&a, row, p->x + (first + row) * k, k, p->eps);
  put_no_rows(&a, rows, k);
  const int dtype = (int)p->out_dtype;
  char *data = (char *)p->out + (size_t)(first * p->w.n) * (dtype == F32 ? 4 : 2);
  const Out out = {.data = data, .pitch = p->w.n, .n = p->w.n, .dtype = dtype, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
}

/* Row `row` of a depthwise convolution for VEC channels: `above`, `here` and `below` are rows of the ring, from the pixel
 * before the first on. Three columns are in the making at any time, so that each input is read once. */
INLINE void convolve_row(const float *above, const float *here, const float *below, ptrdiff_t pitch, int64_t width,
                         const vec taps[TAPS], vec bias, float *out) {
#define COLUMN(n, x0, x1, x2) (taps[n] * (x0) + taps[3 + n] * (x1) + taps[6 + n] * (x2))
  vec last, here_now = bias, next = bias;
  {
    const vec x0 = *(const vec *)(above + pitch), x1 = *(const vec *)(here + pitch), x2 = *(const vec *)(below + pitch);
    here_now += COLUMN(1, x0, x1, x2);
    next += COLUMN(0, x0, x1, x2);
  }
  for (int64_t column = 1; column < width; column++) {
    const ptrdiff_t place = (column + 1) * pitch;
    const vec x0 = *(const vec *)(above + place), x1 = *(const vec *)(here + place), x2 = *(const vec *)(below + place);
    last = here_now + COLUMN(2, x0, x1, x2);
    here_now = next + COLUMN(1, x0, x1, x2);
    next = bias + COLUMN(0, x0, x1, x2);
    *(vec *)(out + (column - 1) * LANES) = last;
  }
  *(vec *)(out + (width - 1) * LANES) = here_now;
#undef COLUMN
}

/* In place: a new row overwrites one whose inputs the ring of three rows still holds. */
static void depthwise(const void *args, Worker *worker, int64_t task) {
  const DepthwiseArgs *p = args;
  const int64_t groups = (p->channels + p->group - 1) / p->group, width = p->width, pixels = width * p->channels;
  const int64_t first = task % groups * p->group, channels = min64(p->channels - first, p->group);
  const int64_t padded = up_to(channels, LANES), pitch = up_to(p->group, LANES), row = (width + 2) * pitch;
  const int dtype = (int)p->dtype;
  const ptrdiff_t image = task / groups * p->height * pixels + first;
  Arena arena = {worker->scratch, 0};
  float *ring = arena_take(&arena, 3 * (size_t)row * sizeof(float));
  float *done = arena_take(&arena, (size_t)width * LANES * sizeof(float));
  const int64_t all = up_to(p->channels, LANES);
  memset(ring, 0, 3 * (size_t)row * sizeof(float));
  for (int64_t y = -1; y < p->height; y++) {
    float *next = ring + (y + 1) % 3 * row;
    if (y + 1 == p->height) memset(next, 0, (size_t)row * sizeof(float));
    else
      for (int64_t x = 0; x < width; x++) {
        const ptrdiff_t from = image + (y + 1) * pixels + x * p->channels;
        for (int64_t j = 0; j < padded; j += LANES)
          load(next + (x + 1) * pitch + j, p->x, from + j, (int)min64(channels - j, LANES), dtype);
      }
    if (y < 0) continue;
    const float *above = ring + (y + 2) % 3 * row, *here = ring + y % 3 * row;
    for (int64_t j = 0; j < padded; j += LANES) {
      for (int v = 0; v < LANES; v += VEC) {
        vec taps[TAPS];
        for (int t = 0; t < TAPS; t++) taps[t] = *(const vec *)(p->w.taps + t * all + first + j + v);
        convolve_row(above + j + v, here + j + v, next + j + v, pitch, width, taps,
                     *(const vec *)(p->w.bias + first + j + v), done + v);
      }
      if (p->silu)
        for (int64_t x = 0; x < width; x++) LANEWISE done[x * LANES + i] *= sigmoid(done[x * LANES + i]);
      const int valid = (int)min64(channels - j, LANES);
      for (int64_t x = 0; x < width; x++)
        store(p->x, image + y * pixels + x * p->channels + j, done + x * LANES, valid, dtype);
    }
  }
}

/* The mean over a window of pixels that lies inside the map, 16 channels. */
INLINE void pool(float *out, const ScanInputArgs *p, int64_t image, int64_t y, int64_t x, int64_t channel, int valid) {
  const int64_t s = p->scan->scale, bottom = min64(p->height, (y + 1) * s), right = min64(p->width, (x + 1) * s);
  float sum[LANES] = {0}, one[LANES];
  for (int64_t i = y * s; i < bottom; i++)
    for (int64_t j = x * s; j < right; j++) {
      const ptrdiff_t from = ((image * p->height + i) * p->width + j) * p->channels + p->scan->offset + channel;
      load(one, p->u, from, valid, (int)p->dtype);
      for (int l = 0; l < LANES; l++) sum[l] += one[l];
    }
  const float share = 1.0f / (float)((bottom - y * s) * (right - x * s));
  LANEWISE out[i] = sum[i] * share;
}

static void scan_input(const void *args, Worker *worker, int64_t task) {
  const ScanInputArgs *p = args;
  const Scan *scan = p->scan;
  const int64_t height = (p->height + scan->scale - 1) / scan->scale, width = (p->width + scan->scale - 1) / scan->scale;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  const int dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, scan->width);
  float *c = arena_take(&arena, MR * PANEL * sizeof(float));
  float v[LANES];
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row;
    for (int64_t j = 0; j < scan->width; j += LANES) {
      const int valid = (int)min64(LANES, scan->width - j);
      if (scan->scale == 1) {
        load(v, p->u, token * p->channels + scan->offset + j, valid, dtype);
      } else {
        pool(v, p, token / (height * width), token / width % height, token % width, j, valid);
        store(p->pooled, token * scan->width + j, v, valid, dtype);
      }
      put_part(&a, row, j, v, valid);
    }
    put_padding(&a, row, scan->width);
  }
  put_no_rows(&a, rows, scan->width);
  const int64_t n = scan->x_proj.n;
  const Out out = {.data = p->projected + first * n, .pitch = n, .n = n, .dtype = F32, .bias = scan->x_proj.bias};
  multiply_all(&a, rows, &scan->x_proj, TO_MAP, &out, c);
}

/* delta[pixel][16] = r[pixel] . dt_proj, four pixels at a time. `pitch` lies between the rows of r and of dt_proj. */
INLINE void step_sizes(float *delta, const float *r, int64_t r_pitch, const float *dt_proj, int64_t dt_pitch,
                       int64_t rank, int64_t pixels) {
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4, r += 4 * r_pitch)
    for (int v = 0; v < LANES; v += VEC) {
      vec d0 = {0}, d1 = {0}, d2 = {0}, d3 = {0};
      for (int64_t j = 0; j < rank; j++) {
        const vec w = *(const vec *)(dt_proj + j * dt_pitch + v);
        d0 += w * r[j];
        d1 += w * r[r_pitch + j];
        d2 += w * r[2 * r_pitch + j];
        d3 += w * r[3 * r_pitch + j];
      }
      float *out = delta + p * LANES + v;
      *(vec *)out = d0;
      *(vec *)(out + LANES) = d1;
      *(vec *)(out + 2 * LANES) = d2;
      *(vec *)(out + 3 * LANES) = d3;
    }
  for (; p < pixels; p++, r += r_pitch) {
    float sum[LANES] = {0};
    for (int64_t j = 0; j < rank; j++) LANEWISE sum[i] += dt_proj[j * dt_pitch + i] * r[j];
    memcpy(delta + p * LANES, sum, sizeof sum);
  }
}

static void scan(const void *args, Worker *worker, int64_t task) {
  const ScanArgs *p = args;
  const Scan *s = p->scan;
  const int64_t pixels = p->height * p->width, blocks = blocks_of(s->width), states = s->states;
  const int64_t image = task / blocks, channel = task % blocks * LANES, n = s->x_proj.n, first = image * pixels;
  const int valid = (int)min64(LANES, s->width - channel), dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  float *u = arena_take(&arena, pixels * ROW), *delta = arena_take(&arena, pixels * ROW);
  float *y = arena_take(&arena, pixels * ROW), *A = arena_take(&arena, states * ROW);
  float *h = arena_take(&arena, states * ROW), *D = arena_take(&arena, ROW), *bias = arena_take(&arena, ROW);
  int32_t *orders[2] = {arena_take(&arena, pixels * 4), arena_take(&arena, pixels * 4)};
  fill_orders(orders[0], orders[1], p->height, p->width);
  const View view = {.data = p->v, .batch = pixels * p->pitch, .pixel = p->pitch};
  gather(u, &view, image, channel, valid, pixels, dtype);
  const float *projected = p->projected + first * n;
  step_sizes(delta, projected, n, s->dt_proj + channel, up_to(s->width, LANES), s->rank, pixels);
  load_channels(D, s->D + channel, 1, valid, 1.0f);
  for (int64_t q = 0; q < pixels; q++) LANEWISE y[q * LANES + i] = D[i] * u[q * LANES + i];
  for (int k = 0; k < 4; k++) {
    const ptrdiff_t row = k * s->width + channel;
    load_channels(A, s->A + row * states, states, valid, LOG2E);
    load_channels(bias, s->dt_bias + row, 1, valid, 1.0f);
    const Walk walk = {.u = u, .delta = delta, .A = A, .bias = bias,
                       .b = projected + s->rank + k * states, .c = projected + s->rank + (4 + k) * states,
                       .pixel_stride = n, .state_stride = 1};
    memset(h, 0, states * ROW);
    forward_steps(&walk, (int)states, 1, orders[k & 1] + (k < 2 ? 0 : pixels - 1), k < 2 ? 1 : -1, pixels, h, y);
  }
  scatter(p->y, y, image, channel, valid, pixels, s->width, dtype);
}

/* Where a position of the enlarged map lies in the small one, as torch's bilinear interpolation with a given size. */
typedef struct {
  int64_t low, high;
  float share; /* of high */
} Position;

INLINE Position position(int64_t at, int64_t small, int64_t large) {
  float from = ((float)at + 0.5f) * ((float)small / (float)large) - 0.5f;
  from = from < 0.0f ? 0.0f : from;
  const int64_t low = min64((int64_t)from, small - 1);
  return (Position){low, low + (low < small - 1), from - (float)low};
}

/* Channels of one scan at a token, enlarged to the full map. */
INLINE void put_scan(float *out, const BranchesArgs *p, const Scan *s, const void *y, int64_t token) {
  const int dtype = (int)p->dtype;
  if (s->scale == 1) {
    for (int64_t j = 0; j < s->width; j += LANES)
      load(out + j, y, token * s->width + j, (int)min64(LANES, s->width - j), dtype);
    return;
  }
  const int64_t h = (p->height + s->scale - 1) / s->scale, w = (p->width + s->scale - 1) / s->scale;
  const int64_t image = token / (p->height * p->width) * h * w;
  const Position row = position(token / p->width % p->height, h, p->height), column = position(token % p->width, w, p->width);
  const ptrdiff_t corners[4] = {image + row.low * w + column.low, image + row.low * w + column.high,
                                image + row.high * w + column.low, image + row.high * w + column.high};
  const float shares[4] = {(1 - row.share) * (1 - column.share), (1 - row.share) * column.share,
                           row.share * (1 - column.share), row.share * column.share};
  for (int64_t j = 0; j < s->width; j += LANES) {
    float sum[LANES] = {0}, one[LANES];
    const int valid = (int)min64(LANES, s->width - j);
    for (int corner = 0; corner < 4; corner++) {
      load(one, y, corners[corner] * s->width + j, valid, dtype);
      LANEWISE sum[i] += shares[corner] * one[i];
    }
    memcpy(out + j, sum, (size_t)LANES * sizeof(float)); /* what lies beyond `valid` is overwritten or never read */
  }
}

static void branches(const void *args, Worker *worker, int64_t task) {
  const BranchesArgs *p = args;
  const Block *block = p->block;
  const int64_t dim = p->dim, first = task * p->rows, tokens = p->batch * p->height * p->width;
  const int64_t rows = min64(p->rows, tokens - first);
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, dim), hidden = take_left(&arena, p->rows, SLAB);
  float *c = arena_take(&arena, MR * PANEL * sizeof(float));
  float *scanned = arena_take(&arena, (size_t)(dim + LANES) * sizeof(float)), *x = p->x + first * dim;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t s = 0; s < block->scans; s++)
      put_scan(scanned + block->scan[s].offset, p, block->scan + s, p->y[s], first + row);
    put_normalised(&a, row, scanned, dim, block->eps_dms);
  }
  put_no_rows(&a, rows, dim);
  put_no_rows(&hidden, rows, SLAB);
  Out sum = {.data = x, .pitch = dim, .n = dim, .dtype = F32, .bias = block->out_proj.bias};
  multiply_all(&a, rows, &block->out_proj, ADD, &sum, c);
  for (int64_t row = 0; row < rows; row++) put_normalised(&a, row, x + row * dim, dim, block->eps2);
  /* The hidden layer SLAB columns at a time: it need not fit into the cache as a whole. */
  const int64_t panels = panels_of(block->fc1.n), step = SLAB / PANEL;
  for (int64_t panel = 0; panel < panels; panel += step) {
    const int64_t end = min64(panel + step, panels), k = min64(SLAB, block->fc2.k - panel * PANEL);
    const Out inner = {.bias = block->fc1.bias + panel * PANEL, .left = &hidden};
    multiply(&a, rows, &block->fc1, 0, dim, panel, end, GELU, &inner, c);
    sum.bias = panel ? NULL : block->fc2.bias;
    multiply(&hidden, rows, &block->fc2, panel * PANEL, k, 0, panels_of(dim), ADD, &sum, c);
  }
}

/* Sixteen or fewer channels of a pixel, as part of a left side. */
INLINE void put_pixel(const Left *a, int64_t row, int64_t k, const void *x, ptrdiff_t from, int64_t channels,
                      const int dtype) {
  float one[LANES];
  for (int64_t j = 0; j < channels; j += LANES) {
    const int valid = (int)min64(LANES, channels - j);
    load(one, x, from + j, valid, dtype);
    put_part(a, row, k + j, one, valid);
  }
}

INLINE void put_zeros(const Left *a, int64_t row, int64_t k, int64_t count) {
  for (int64_t j = 0; j < count; j++) *at(a, row, k + j) = 0;
}

static void downsample(const void *args, Worker *worker, int64_t task) {
  const DownsampleArgs *p = args;
  const int64_t height = (p->height + 1) / 2, width = (p->width + 1) / 2, n = p->w.n;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, p->w.k);
  float *c = arena_take(&arena, MR * PANEL * sizeof(float));
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row, image = token / (height * width);
    const int64_t top = token / width % height * 2 - 1, left = token % width * 2 - 1;
    for (int64_t tap = 0; tap < TAPS; tap++) {
      const int64_t y = top + tap / 3, x = left + tap % 3;
      if (y < 0 || y >= p->height || x < 0 || x >= p->width) put_zeros(&a, row, tap * p->channels, p->channels);
      else {
        const ptrdiff_t from = ((image * p->height + y) * p->width + x) * p->channels;
        put_pixel(&a, row, tap * p->channels, p->x, from, p->channels, (int)p->dtype);
      }
    }
    put_padding(&a, row, p->w.k);
  }
  put_no_rows(&a, rows, p->w.k);
  float *data = p->out + first * n;
  const Out out = {.data = data, .pitch = n, .n = n, .dtype = F32, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
  for (int64_t row = 0; row < rows; row++) normalise_affine(data + row * n, n, &p->norm);
}

/* The 3x3 patch of every channel around a pixel, zeros beyond the image. */
INLINE void copy_patch(float *patch, const StemArgs *p, const float *image, int64_t top, int64_t left) {
  const int64_t *strides = p->strides;
  const int inside = top >= 0 && top + 3 <= p->height && left >= 0 && left + 3 <= p->width;
  for (int64_t channel = 0; channel < p->channels; channel++, patch += TAPS) {
    const float *from = image + channel * strides[1] + top * strides[2] + left * strides[3];
    for (int i = 0; i < 3; i++, from += strides[2])
      for (int j = 0; j < 3; j++)
        patch[3 * i + j] = inside || (top + i >= 0 && top + i < p->height && left + j >= 0 && left + j < p->width)
                               ? from[j * strides[3]]
                               : 0.0f;
  }
}

static void stem(const void *args, Worker *worker, int64_t task) {
  const StemArgs *p = args;
  const int64_t height = (p->height + 1) / 2, width = (p->width + 1) / 2, n = p->w.n, k = p->w.k;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  const int dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, k);
  float *c = arena_take(&arena, MR * PANEL * sizeof(float)), *y = arena_take(&arena, (size_t)(p->rows * n) * sizeof(float));
  float *patch = arena_take(&arena, (size_t)up_to(k, LANES) * sizeof(float));
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row;
    const float *image = p->x + token / (height * width) * p->strides[0];
    copy_patch(patch, p, image, token / width % height * 2 - 1, token % width * 2 - 1);
    for (int64_t j = 0; j < k; j += LANES) put_part(&a, row, j, patch + j, (int)min64(LANES, k - j));
    put_padding(&a, row, k);
  }
  put_no_rows(&a, rows, k);
  const Out out = {.data = y, .pitch = n, .n = n, .dtype = F32, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
  for (int64_t row = 0; row < rows; row++) {
    float *x = y + row * n;
    normalise_affine(x, n, &p->norm);
    int64_t j = 0;
    const ptrdiff_t to = (first + row) * n;
    for (; j + LANES <= n; j += LANES) {
      LANEWISE x[j + i] = activate_gelu(x[j + i]);
      store(p->out, to + j, x + j, LANES, dtype);
    }
    for (; j < n; j++) store_one(p->out, to + j, activate_gelu(x[j]), dtype);
  }
}

const PlanOps OPS = {
    .panel = PANEL,
    .k_grain = K_GRAIN,
    .row_tile = MR,
    .slab_row = PITCH * sizeof(elem),
    .bf16 = BF16_PRODUCTS,
    .norm_linear = norm_linear,
    .depthwise = depthwise,
    .scan_input = scan_input,
    .scan = scan,
    .branches = branches,
    .downsample = downsample,
    .stem = stem,
};
