/* layer_norm and its gradient. A task is a block of rows, whose number does not depend on the threads: sums over rows
 * come back as one partial sum per block. Backward recomputes mean and variance, which costs less than to read what
 * forward could have kept of them, as the row is at hand.
 *
 * With z = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - z mean(g z)), dweight = sum dy z,
 * dbias = sum dy (Ba et al., arXiv:1607.06450, supplement). */
#include "scan.h"

typedef struct {
  int64_t rows, width, block; /* block: rows of a task */
  int64_t dtype;              /* of x, y, grad, add and dx */
  float eps;
  const void *x;              /* (rows, width), contiguous, like y, grad, add and dx */
  const float *weight, *bias; /* (width,) */
  void *y;
  const void *grad;
  const void *add; /* backward: added to dx, or NULL */
  void *dx;        /* may be grad or add */
  float *dweight, *dbias; /* (blocks, width) */
} NormArgs;

#define OVER_ROW for (int64_t i = 0; i < width; i++)

/* x - mean over a row of x, into `out`; returns rstd. */
INLINE float centre(float *out, const void *x, ptrdiff_t at, int64_t width, float eps, const int dtype) {
  float sum = 0.0f, squares = 0.0f;
  _Pragma("omp simd reduction(+ : sum)") OVER_ROW {
    float value = load_one(x, at + i, dtype);
    out[i] = value;
    sum += value;
  }
  const float mean = sum / (float)width;
  _Pragma("omp simd reduction(+ : squares)") OVER_ROW {
    float value = out[i] - mean;
    out[i] = value;
    squares += value * value;
  }
  const float variance = squares / (float)width;
  /* A variance beyond float32 makes NaN, as in torch, and not zeros. */
  return 1.0f / __builtin_sqrtf(variance + eps) + (variance - variance);
}

INLINE void norm_rows(const NormArgs *a, int64_t first, int64_t last, float *z, const int dtype) {
  const int64_t width = a->width;
  const float *weight = a->weight, *bias = a->bias;
  void *y = a->y;
  for (int64_t row = first, at = first * width; row < last; row++, at += width) {
    const float rstd = centre(z, a->x, at, width, a->eps, dtype);
    _Pragma("omp simd") OVER_ROW store_one(y, at + i, z[i] * rstd * weight[i] + bias[i], dtype);
  }
}

INLINE void norm_back_rows(const NormArgs *a, int64_t first, int64_t last, float *z, float *g, float *dweight,
                           float *dbias, const int dtype) {
  const int64_t width = a->width;
  const float *weight = a->weight;
  const void *grad = a->grad, *add = a->add;
  void *dx = a->dx;
  memset(dweight, 0, (size_t)width * sizeof(float));
  memset(dbias, 0, (size_t)width * sizeof(float));
  for (int64_t row = first, at = first * width; row < last; row++, at += width) {
    const float rstd = centre(z, a->x, at, width, a->eps, dtype);
    float sum = 0.0f, along = 0.0f;
    _Pragma("omp simd reduction(+ : sum, along)") OVER_ROW {
      float dy = load_one(grad, at + i, dtype), value = z[i] * rstd, through = dy * weight[i];
      dweight[i] += dy * value;
      dbias[i] += dy;
      z[i] = value;
      g[i] = through;
      sum += through;
      along += through * value;
    }
    const float mean = sum / (float)width, slope = along / (float)width;
    if (add)
      _Pragma("omp simd") OVER_ROW store_one(dx, at + i, rstd * (g[i] - mean - z[i] * slope) + load_one(add, at + i, dtype),
                                             dtype);
    else _Pragma("omp simd") OVER_ROW store_one(dx, at + i, rstd * (g[i] - mean - z[i] * slope), dtype);
  }
}

MULTIVERSION
int ssmamba_norm_forward(const NormArgs *a, int64_t begin, int64_t end) {
  Arena arena;
  if (arena_open(&arena, (size_t)a->width * sizeof(float))) return -1;
  float *z = arena_take(&arena, (size_t)a->width * sizeof(float));
  const int64_t first = begin * a->block, last = min64(end * a->block, a->rows);
  if (a->dtype == F32) norm_rows(a, first, last, z, F32);
  else if (a->dtype == BF16) norm_rows(a, first, last, z, BF16);
  else norm_rows(a, first, last, z, F16);
  arena_close(&arena);
  return 0;
}

MULTIVERSION
int ssmamba_norm_backward(const NormArgs *a, int64_t begin, int64_t end) {
  const size_t bytes = (size_t)a->width * sizeof(float);
  Arena arena;
  if (arena_open(&arena, 2 * bytes)) return -1;
  float *z = arena_take(&arena, bytes), *g = arena_take(&arena, bytes);
  for (int64_t block = begin; block < end; block++) {
    const int64_t first = block * a->block, last = min64(first + a->block, a->rows), at = block * a->width;
    if (a->dtype == F32) norm_back_rows(a, first, last, z, g, a->dweight + at, a->dbias + at, F32);
    else if (a->dtype == BF16) norm_back_rows(a, first, last, z, g, a->dweight + at, a->dbias + at, BF16);
    else norm_back_rows(a, first, last, z, g, a->dweight + at, a->dbias + at, F16);
  }
  arena_close(&arena);
  return 0;
}
