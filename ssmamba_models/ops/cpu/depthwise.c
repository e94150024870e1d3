/* depthwise3x3: every channel of a channels-last map convolved with a 3x3 kernel of its own, with the residual and
 * SiLU that may follow. A task is one image's group of channels. Rows pass through rings of three in float32: each is
 * read from the map once, and that is where bfloat16 and float16 are converted.
 *
 * Backward, with p = conv(x) + bias (+ x) and q = dy SiLU'(p), p recomputed: dx = q correlated with the kernel, which
 * needs q one row beyond, so dx follows one row behind q; dw_t = sum q x_t; dbias = sum q. */
#include "scan.h"

#define LARGEST 64 /* channels of a group at most: the rings of a map 600 wide then stay within a MiB */
#define TAPS 9

typedef struct {
  int64_t batch, height, width, channels;
  int64_t group; /* channels of a task: a multiple of LANES up to LARGEST */
  int64_t dtype; /* of x, y, grad and dx */
  int64_t silu, residual;
  const void *x;              /* (batch, height, width, channels), contiguous, like y, grad and dx */
  const float *weight, *bias; /* (channels, 3, 3), (channels,) or NULL */
  const void *grad;
  void *y, *dx;
  float *dweight, *dbias; /* (batch, channels, 3, 3), (batch, channels): a sum per image */
} DepthwiseArgs;

/* What one group needs of the parameters, by lanes; zero where there is no channel. */
typedef struct {
  float taps[LARGEST / LANES][TAPS][LANES], bias[LARGEST / LANES][LANES];
} Kernels;

INLINE void read_kernels(Kernels *k, const DepthwiseArgs *a, int64_t first, int64_t channels) {
  memset(k, 0, sizeof *k);
  for (int64_t c = 0; c < channels; c++) {
    for (int t = 0; t < TAPS; t++) k->taps[c / LANES][t][c % LANES] = a->weight[(first + c) * TAPS + t];
    /* The map itself is one more weight of 1 at the kernel's centre. */
    if (a->residual) k->taps[c / LANES][TAPS / 2][c % LANES] += 1.0f;
    if (a->bias) k->bias[c / LANES][c % LANES] = a->bias[first + c];
  }
}

/* Three rows of blocks of sixteen channels, [row][block][width + 2][16], with a pixel of zeros at both ends. */
typedef struct {
  float *data;
  int64_t blocks, line; /* floats of a block's row */
} Ring;

INLINE float *ring_row(const Ring *r, int64_t row, int64_t block) {
  return r->data + ((row + 3) % 3 * r->blocks + block) * r->line;
}

INLINE Ring ring_take(Arena *arena, int64_t blocks, int64_t width) {
  const int64_t line = (width + 2) * LANES;
  return (Ring){arena_take(arena, 3 * (size_t)(blocks * line) * sizeof(float)), blocks, line};
}

INLINE void ring_clear(const Ring *r) { memset(r->data, 0, 3 * (size_t)(r->blocks * r->line) * sizeof(float)); }

INLINE void ring_clear_row(const Ring *r, int64_t row) {
  memset(ring_row(r, row, 0), 0, (size_t)(r->blocks * r->line) * sizeof(float));
}

/* A row of one block from or to the map, whose pixels are `step` elements apart. */
INLINE void read_line(float *line, const void *map, ptrdiff_t at, int64_t step, int64_t width, int valid, int dtype) {
  if (valid == LANES && dtype == F32)
    for (int64_t col = 0; col < width; col++) load_row(line + col * LANES, map, at + col * step, LANES, F32);
  else if (valid == LANES && dtype == BF16)
    for (int64_t col = 0; col < width; col++) load_row(line + col * LANES, map, at + col * step, LANES, BF16);
  else
    for (int64_t col = 0; col < width; col++) load_row(line + col * LANES, map, at + col * step, valid, dtype);
}

INLINE void write_line(void *map, ptrdiff_t at, int64_t step, const float *line, int64_t width, int valid, int dtype) {
  if (valid == LANES && dtype == F32)
    for (int64_t col = 0; col < width; col++) store_row(map, at + col * step, line + col * LANES, LANES, F32);
  else if (valid == LANES && dtype == BF16)
    for (int64_t col = 0; col < width; col++) store_row(map, at + col * step, line + col * LANES, LANES, BF16);
  else
    for (int64_t col = 0; col < width; col++) store_row(map, at + col * step, line + col * LANES, valid, dtype);
}

/* Eight lanes: nine of these, of a kernel or of its gradient, stay in AVX2's sixteen registers along a row. */
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
#define HALF 8
#define AT(base, offset) (*(const Half *)((base) + (offset)))

/* out[col] = bias + sum of nine taps, over rows that begin at the pixel of zeros. With `flip` the kernel is turned by
 * 180 degrees: its transpose. */
INLINE void convolve(const float *above, const float *here, const float *below, float *out, int64_t width,
                     const float taps[TAPS][LANES], const float *bias, const int flip) {
  for (int64_t lane = 0; lane < LANES; lane += HALF) {
    const Half a0 = AT(taps[flip ? 8 : 0], lane), a1 = AT(taps[flip ? 7 : 1], lane), a2 = AT(taps[flip ? 6 : 2], lane);
    const Half h0 = AT(taps[flip ? 5 : 3], lane), h1 = AT(taps[4], lane), h2 = AT(taps[flip ? 3 : 5], lane);
    const Half b0 = AT(taps[flip ? 2 : 6], lane), b1 = AT(taps[flip ? 1 : 7], lane), b2 = AT(taps[flip ? 0 : 8], lane);
    const Half start = AT(bias, lane);
    for (int64_t at = lane; at < width * LANES; at += LANES) {
      Half sum = start + a0 * AT(above, at), other = h0 * AT(here, at);
      sum += a1 * AT(above, at + LANES);
      other += h1 * AT(here, at + LANES);
      sum += a2 * AT(above, at + 2 * LANES);
      other += h2 * AT(here, at + 2 * LANES);
      sum += b0 * AT(below, at);
      other += b1 * AT(below, at + LANES);
      sum += b2 * AT(below, at + 2 * LANES);
      *(Half *)(out + at) = sum + other;
    }
  }
}

/* Add the sums along a row of q times the nine neighbours of x to `taps`, and that of q to `bias`. */
INLINE void correlate(const float *q, const float *above, const float *here, const float *below, int64_t width,
                      float taps[TAPS][LANES], float *bias) {
  for (int64_t lane = 0; lane < LANES; lane += HALF) {
    Half a0 = AT(taps[0], lane), a1 = AT(taps[1], lane), a2 = AT(taps[2], lane);
    Half h0 = AT(taps[3], lane), h1 = AT(taps[4], lane), h2 = AT(taps[5], lane);
    Half b0 = AT(taps[6], lane), b1 = AT(taps[7], lane), b2 = AT(taps[8], lane), sum = AT(bias, lane);
    for (int64_t at = lane; at < width * LANES; at += LANES) {
      const Half g = AT(q, at);
      a0 += g * AT(above, at);
      a1 += g * AT(above, at + LANES);
      a2 += g * AT(above, at + 2 * LANES);
      h0 += g * AT(here, at);
      h1 += g * AT(here, at + LANES);
      h2 += g * AT(here, at + 2 * LANES);
      b0 += g * AT(below, at);
      b1 += g * AT(below, at + LANES);
      b2 += g * AT(below, at + 2 * LANES);
      sum += g;
    }
    const Half results[TAPS] = {a0, a1, a2, h0, h1, h2, b0, b1, b2};
    for (int t = 0; t < TAPS; t++) *(Half *)(taps[t] + lane) = results[t];
    *(Half *)(bias + lane) = sum;
  }
}

/* Row `row` of x into the ring, zeros beyond the map. */
INLINE void read_row(const Ring *ring, const DepthwiseArgs *a, ptrdiff_t image, int64_t row, int64_t channels) {
  if (row >= a->height) {
    ring_clear_row(ring, row);
    return;
  }
  const ptrdiff_t at = image + row * a->width * a->channels;
  for (int64_t block = 0; block < ring->blocks; block++)
    read_line(ring_row(ring, row, block) + LANES, a->x, at + block * LANES, a->channels, a->width,
              (int)min64(channels - block * LANES, LANES), (int)a->dtype);
}

MULTIVERSION
int ssmamba_depthwise_forward(const DepthwiseArgs *a, int64_t begin, int64_t end) {
  const int64_t groups = (a->channels + a->group - 1) / a->group, most = a->group / LANES;
  const size_t line = (size_t)(a->width + 2) * ROW;
  Arena arena;
  if (arena_open(&arena, (3 * (size_t)most + 1) * line)) return -1;
  Ring ring = ring_take(&arena, most, a->width);
  float *out = arena_take(&arena, line);
  Kernels k;
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task % groups * a->group, channels = min64(a->channels - first, a->group);
    const ptrdiff_t image = task / groups * a->height * a->width * a->channels + first;
    ring.blocks = blocks_of(channels);
    read_kernels(&k, a, first, channels);
    ring_clear(&ring);
    read_row(&ring, a, image, 0, channels);
    for (int64_t row = 0; row < a->height; row++) {
      read_row(&ring, a, image, row + 1, channels);
      for (int64_t block = 0; block < ring.blocks; block++) {
        convolve(ring_row(&ring, row - 1, block), ring_row(&ring, row, block), ring_row(&ring, row + 1, block), out,
                 a->width, k.taps[block], k.bias[block], 0);
        if (a->silu)
          _Pragma("omp simd") for (int64_t i = 0; i < a->width * LANES; i++) out[i] *= sigmoid(out[i]);
        write_line(a->y, image + row * a->width * a->channels + block * LANES, a->channels, out, a->width,
                   (int)min64(channels - block * LANES, LANES), (int)a->dtype);
      }
    }
  }
  arena_close(&arena);
  return 0;
}

/* q = dy SiLU'(p), from dy in place, with p in `pre`. */
INLINE void silu_back(float *q, const float *pre, int64_t width) {
  _Pragma("omp simd") for (int64_t i = 0; i < width * LANES; i++) {
    float s = sigmoid(pre[i]);
    q[i] *= s * (1.0f + pre[i] * (1.0f - s));
  }
}

MULTIVERSION
int ssmamba_depthwise_backward(const DepthwiseArgs *a, int64_t begin, int64_t end) {
  const int64_t groups = (a->channels + a->group - 1) / a->group, most = a->group / LANES;
  const size_t line = (size_t)(a->width + 2) * ROW;
  Arena arena;
  if (arena_open(&arena, (6 * (size_t)most + 1) * line)) return -1;
  Ring x = ring_take(&arena, most, a->width), q = ring_take(&arena, most, a->width);
  float *out = arena_take(&arena, line);
  const float zeros[LANES] = {0};
  Kernels k, d;
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task % groups * a->group, channels = min64(a->channels - first, a->group);
    const int64_t number = task / groups;
    const ptrdiff_t image = number * a->height * a->width * a->channels + first, pitch = a->width * a->channels;
    x.blocks = q.blocks = blocks_of(channels);
    read_kernels(&k, a, first, channels);
    memset(&d, 0, sizeof d);
    ring_clear(&x);
    ring_clear(&q);
    read_row(&x, a, image, 0, channels);
    for (int64_t row = 0; row <= a->height; row++) {
      if (row < a->height) read_row(&x, a, image, row + 1, channels);
      else ring_clear_row(&q, row);
      for (int64_t block = 0; block < q.blocks; block++) {
        const ptrdiff_t at = image + row * pitch + block * LANES;
        const int valid = (int)min64(channels - block * LANES, LANES);
        if (row < a->height) {
          const float *above = ring_row(&x, row - 1, block), *here = ring_row(&x, row, block);
          const float *below = ring_row(&x, row + 1, block);
          float *now = ring_row(&q, row, block) + LANES;
          read_line(now, a->grad, at, a->channels, a->width, valid, (int)a->dtype);
          if (a->silu) {
            convolve(above, here, below, out, a->width, k.taps[block], k.bias[block], 0);
            silu_back(now, out, a->width);
          }
          correlate(now, above, here, below, a->width, d.taps[block], d.bias[block]);
        }
        if (row > 0) {
          convolve(ring_row(&q, row - 2, block), ring_row(&q, row - 1, block), ring_row(&q, row, block), out,
                   a->width, k.taps[block], zeros, 1);
          write_line(a->dx, at - pitch, a->channels, out, a->width, valid, (int)a->dtype);
        }
      }
    }
    for (int64_t c = 0; c < channels; c++) {
      const int64_t channel = number * a->channels + first + c;
      for (int t = 0; t < TAPS; t++) a->dweight[channel * TAPS + t] = d.taps[c / LANES][t][c % LANES];
      a->dbias[channel] = d.bias[c / LANES][c % LANES];
    }
  }
  arena_close(&arena);
  return 0;
}
