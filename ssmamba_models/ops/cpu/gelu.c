/* bias_gelu and its gradient: what stands between the two matrix products of an MLP. A task is a block of rows, whose
 * number does not depend on the threads: sums over rows come back as one partial sum per block. */
#include "simd.h"

#define INV_SQRT_2PI 0.398942280401432678f

typedef struct {
  int64_t rows, width, block; /* block: rows of a task */
  int64_t dtype;              /* of x, y and grad */
  float scale;                /* of the gradient */
  const void *x;              /* (rows, width), contiguous, like y and grad */
  const float *bias;          /* (width,) */
  void *y;                    /* gelu(x + bias) */
  void *grad;                 /* backward: that of y, replaced by that of x */
  float *dbias;               /* backward: (blocks, width) */
} GeluArgs;

/* Straight from and to memory: copies of a vector's halves in between would stall its loads. */

INLINE void gelu_rows(const GeluArgs *a, int64_t first, int64_t last, const int dtype) {
  const int64_t width = a->width;
  const float *bias = a->bias;
  const void *x = a->x;
  void *y = a->y;
  for (int64_t row = first, at = first * width; row < last; row++, at += width)
    _Pragma("omp simd") for (int64_t i = 0; i < width; i++)
      store_one(y, at + i, gelu(load_one(x, at + i, dtype) + bias[i]), dtype);
}

/* dx = scale dy (Phi(v) + v phi(v)) with v = x + bias; gelu(v), which the gradient of the next product's weight needs,
 * comes from the same Phi. */
INLINE void gelu_back_rows(const GeluArgs *a, int64_t first, int64_t last, float *dbias, const int dtype) {
  const int64_t width = a->width;
  const float scale = a->scale, *bias = a->bias;
  const void *x = a->x;
  void *y = a->y, *grad = a->grad;
  memset(dbias, 0, (size_t)width * sizeof(float));
  for (int64_t row = first, at = first * width; row < last; row++, at += width)
    _Pragma("omp simd") for (int64_t i = 0; i < width; i++) {
      float v = load_one(x, at + i, dtype) + bias[i], phi = 0.5f + half_normal(v);
      float square = v * v; /* beyond 400 the density is 0 in any case, and exp2 has its limits */
      square = square > 400.0f ? 400.0f : square;
      float density = exp2_of_many(square * (-0.5f * LOG2E)) * INV_SQRT_2PI;
      float slope = scale * (phi + v * density) * load_one(grad, at + i, dtype);
      store_one(y, at + i, v * phi, dtype);
      store_one(grad, at + i, slope, dtype);
      dbias[i] += slope;
    }
}

INLINE int64_t block_end(const GeluArgs *a, int64_t block) {
  const int64_t end = (block + 1) * a->block;
  return end < a->rows ? end : a->rows;
}

MULTIVERSION
int ssmamba_gelu_forward(const GeluArgs *a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block * a->block, last = block_end(a, block);
    if (a->dtype == F32) gelu_rows(a, first, last, F32);
    else if (a->dtype == BF16) gelu_rows(a, first, last, BF16);
    else gelu_rows(a, first, last, F16);
  }
  return 0;
}

MULTIVERSION
int ssmamba_gelu_backward(const GeluArgs *a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block * a->block, last = block_end(a, block);
    float *dbias = a->dbias + block * a->width;
    if (a->dtype == F32) gelu_back_rows(a, first, last, dbias, F32);
    else if (a->dtype == BF16) gelu_back_rows(a, first, last, dbias, BF16);
    else gelu_back_rows(a, first, last, dbias, F16);
  }
  return 0;
}
