/* bias_gelu: what stands between the two matrix products of an MLP, in place. A task is one row. */
#include "simd.h"

typedef struct {
  int64_t rows, width;
  float *x;          /* (rows, width), contiguous */
  const float *bias; /* (width,) */
} BiasGeluArgs;

MULTIVERSION
int ssmamba_bias_gelu(const BiasGeluArgs *a, int64_t begin, int64_t end) {
  const int64_t whole = a->width / LANES * LANES;
  for (int64_t row = begin; row < end; row++) {
    float *x = a->x + row * a->width;
    for (int64_t at = 0; at < whole; at += LANES) {
      float *lanes = x + at;
      const float *bias = a->bias + at;
      LANEWISE lanes[i] = gelu(lanes[i] + bias[i]);
    }
    for (int64_t at = whole; at < a->width; at++) x[at] = gelu(x[at] + a->bias[at]);
  }
  return 0;
}
