/* bias_gelu: what stands between the two matrix products of an MLP, in place. A task is one row. */
#include "simd.h"

typedef struct {
  int64_t rows, width;
  float *x;          /* (rows, width), contiguous */
  const float *bias; /* (width,) */
} BiasGeluArgs;

#define EDGE 5.4f /* from here on the normal distribution's tail is below what float32 adds to 0.5 */

/* x * Phi(x), with Phi(x) - 0.5 = erf(x / sqrt(2)) / 2 as x times a quotient of polynomials in x^2 that minimises the
 * absolute error on [-EDGE, EDGE] (6e-9 before rounding). NaN stays NaN. */
INLINE float gelu(float x) {
  float t = x * x;
  t = t > EDGE * EDGE ? EDGE * EDGE : t;
  float top = 2.338673255053436e-08f;
  top = top * t + 6.360014140227577e-06f;
  top = top * t + 1.6432142001576722e-04f;
  top = top * t + 4.650849383324385e-03f;
  top = top * t + 3.337220475077629e-02f;
  top = top * t + 3.98942232131958e-01f;
  float bottom = 1.2165904763605795e-06f;
  bottom = bottom * t + 7.240007835207507e-05f;
  bottom = bottom * t + 1.8589799292385578e-03f;
  bottom = bottom * t + 2.8378672897815704e-02f;
  bottom = bottom * t + 2.503178119659424e-01f;
  bottom = bottom * t + 1.0f;
  float half = x * (top / bottom);
  half = x >= EDGE ? 0.5f : half;
  half = x <= -EDGE ? -0.5f : half;
  return x * (0.5f + half);
}

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
