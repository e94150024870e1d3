/* Sixteen channels at a time, as loops over lanes that the compiler turns into vectors of whatever width the machine
 * has (one AVX-512 register, two AVX, four SSE or NEON). Every loop marked LANEWISE runs over 16 floats and calls
 * only the scalar functions below. Measured with GCC 12: 64-byte vector types spill where registers are narrower,
 * these loops do not.
 *
 * Numerics: exp2 and log1p are polynomials that minimise the relative error (9e-8 and 3e-8 before rounding), so
 * no libm call stands in a loop. Rounding to the nearest integer adds and subtracts 1.5 * 2^23; -ffast-math would
 * remove that, so it must never be used here.
 */
#ifndef SSMAMBA_SIMD_H
#define SSMAMBA_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define LANEWISE _Pragma("omp simd simdlen(16)") for (int i = 0; i < LANES; i++)

/* One source, several instruction sets, chosen when the library is loaded (ifunc, hence glibc). GCC before 12 knows the
 * levels by processors that have them. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__)
#if (defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif !defined(__clang__) && __GNUC__ >= 8
#define MULTIVERSION __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#endif
#ifndef MULTIVERSION
#define MULTIVERSION
#endif

#define LOG2E 1.44269504088896341f

INLINE int32_t bits(float x) { int32_t b; memcpy(&b, &x, sizeof b); return b; }
INLINE float from_bits(int32_t b) { float x; memcpy(&x, &b, sizeof x); return x; }
INLINE float absolute(float x) { return from_bits(bits(x) & 0x7fffffff); }

/* Polynomials are evaluated in pairs (Estrin), not one coefficient after another (Horner): a step of the scan is one
 * long chain of dependent operations, and what limits it is the chain's latency, not the number of operations. With
 * many states to a step it is the number: exp2_of_many has one less. */

/* Ranges are clamped as integers, which costs one instruction where a comparison of floats that keeps NaN costs two. */

/* 2^x, with 0 from 2^-127 down and 2^127 from there up. Exactly 1 at 0, so a held token leaves the state untouched to
 * the last bit. The scale 2^n is a factor, not an addition to the exponent, so NaN stays NaN. Good for |x| up to 1e15:
 * beyond, f may be so large that the polynomial overflows. */
INLINE float exp2_by(float x, const int pairs) {
  const float round = 12583039.0f;   /* 1.5 * 2^23 + 127: adding it leaves x rounded to an integer n, as bits, */
  const int32_t lowest = 0x4b400000; /* which are these and n + 127, the exponent of 2^n */
  float shifted = x + round;
  float f = x - (shifted - round);
  int32_t n = bits(shifted);
  n = n > lowest ? n : lowest;
  n = n < lowest + 254 ? n : lowest + 254;
  float scale = from_bits((int32_t)((uint32_t)n << 23));
  float high = f * 0.001326472614891827f + 0.009671512991189957f;
  if (pairs) {
    float f2 = f * f;
    float low = f * 0.6931470036506653f + 1.0f;
    float mid = f * 0.05550733581185341f + 0.24022242426872253f;
    return ((high * f2 + mid) * f2 + low) * scale;
  }
  high = high * f + 0.05550733581185341f;
  high = high * f + 0.24022242426872253f;
  high = high * f + 0.6931470036506653f;
  return (high * f + 1.0f) * scale;
}

INLINE float exp2_(float x) { return exp2_by(x, 1); }
INLINE float exp2_of_many(float x) { return exp2_by(x, 0); }

/* e^-|x|; of NaN, e^-88. */
INLINE float exp_minus_abs(float x) {
  int32_t magnitude = bits(x) & 0x7fffffff;
  magnitude = magnitude < 0x42b00000 ? magnitude : 0x42b00000; /* 88 */
  return exp2_(from_bits(magnitude) * -LOG2E);
}

/* log(1 + z) for z in [0, 1]: z times a polynomial, so the relative error stays small as z goes to 0. */
INLINE float log1p_unit(float z) {
  float z2 = z * z, z4 = z2 * z2;
  float p01 = z * -0.49999648332595825f + 1.0f;
  float p23 = z * -0.24857163429260254f + 0.3332132399082184f;
  float p45 = z * -0.13753795623779297f + 0.19153651595115662f;
  float p67 = z * -0.030065743252635002f + 0.07920445501804352f;
  float p03 = p23 * z2 + p01, p47 = p67 * z2 + p45;
  return ((0.005364812444895506f * z4 + p47) * z4 + p03) * z;
}

/* softplus(x) = max(x, 0) + log1p(e^-|x|), without overflow or a division. */
INLINE float softplus(float x) { return (x < 0.0f ? 0.0f : x) + log1p_unit(exp_minus_abs(x)); }

INLINE float sigmoid(float x) {
  float z = exp_minus_abs(x);
  return (x < 0.0f ? z : 1.0f) / (z + 1.0f);
}

#define GELU_EDGE 5.4f /* from here on the normal distribution's tail is below what float32 adds to 0.5 */

/* Phi(x) - 0.5 = erf(x / sqrt(2)) / 2 as x times a quotient of polynomials in x^2 that minimises the absolute error on
 * [-GELU_EDGE, GELU_EDGE] (6e-9 before rounding), with the normal distribution's Phi. NaN stays NaN. */
INLINE float half_normal(float x) {
  float t = x * x;
  t = t > GELU_EDGE * GELU_EDGE ? GELU_EDGE * GELU_EDGE : t;
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
  half = x >= GELU_EDGE ? 0.5f : half;
  return x <= -GELU_EDGE ? -0.5f : half;
}

/* x Phi(x) */
INLINE float gelu(float x) { return x * (0.5f + half_normal(x)); }

/* The same to 2e-5 times max(|x|, 0.3) or so, without a division: enough for a result that is rounded to bfloat16. */
INLINE float gelu_for_bf16(float x) {
  const float edge = 3.8f;
  float t = x * x;
  t = t > edge * edge ? edge * edge : t;
  float p = -1.7499147686450556e-09f;
  p = p * t + 1.2917570302306558e-07f;
  p = p * t + -4.217372861603508e-06f;
  p = p * t + 8.132358198054135e-05f;
  p = p * t + -0.0010472011053934693f;
  p = p * t + 0.009641047567129135f;
  p = p * t + -0.06609941273927689f;
  p = p * t + 0.3987831771373749f;
  float half = x * p;
  half = x >= edge ? 0.5f : half;
  half = x <= -edge ? -0.5f : half;
  return x * (0.5f + half);
}

/* ---- float32, bfloat16 and float16 in memory ---- */

enum { F32 = 0, BF16 = 1, F16 = 2 };

INLINE float from_bf16(uint16_t raw) { return from_bits((int32_t)((uint32_t)raw << 16)); }

/* Exponent and mantissa shifted into place, rescaled by 2^112 (this mends subnormals too); inf and nan redone. */
INLINE float from_f16(uint16_t raw) {
  int32_t magnitude = (raw & 0x7fff) << 13;
  int32_t finite = bits(from_bits(magnitude) * 0x1p112f);
  int32_t out = magnitude > 0x0f7fffff ? magnitude | 0x7f800000 : finite;
  return from_bits(out | (int32_t)((uint32_t)(raw & 0x8000) << 16));
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
  int32_t b = bits(x), rounded = b + 0x7fff + ((b >> 16) & 1);
  return (uint16_t)(((b & 0x7fffffff) > 0x7f800000 ? b | 0x400000 : rounded) >> 16);
}

INLINE uint16_t to_f16(float x) {
  int32_t b = bits(x), m = b & 0x7fffffff;
  int32_t normal = (m + 0xfff + ((m >> 13) & 1) - (112 << 23)) >> 13;
  /* Below 2^-14 the result is subnormal: adding 0.5 lets the adder do the rounding. */
  int32_t subnormal = bits(from_bits(m) + 0.5f) - 0x3f000000;
  int32_t out = m > 0x387fffff ? normal : subnormal;
  out = m > 0x477fefff ? 0x7c00 : out; /* 65520 and more round to infinity */
  out = m > 0x7f800000 ? 0x7e00 : out;
  return (uint16_t)(out | ((b >> 16) & 0x8000));
}

INLINE float load_one(const void *base, ptrdiff_t at, int dtype) {
  if (dtype == F32) return ((const float *)base)[at];
  uint16_t raw = ((const uint16_t *)base)[at];
  return dtype == BF16 ? from_bf16(raw) : from_f16(raw);
}

INLINE void store_one(void *base, ptrdiff_t at, float x, int dtype) {
  if (dtype == F32) ((float *)base)[at] = x;
  else ((uint16_t *)base)[at] = dtype == BF16 ? to_bf16(x) : to_f16(x);
}

/* Sixteen neighbours from element `at` on; lanes at and above `valid` read as 0 and are not written. */
INLINE void load_row(float *out, const void *base, ptrdiff_t at, const int valid, const int dtype) {
  if (valid == LANES) {
    if (dtype == F32) memcpy(out, (const float *)base + at, LANES * sizeof(float));
    else if (dtype == BF16) LANEWISE out[i] = from_bf16(((const uint16_t *)base)[at + i]);
    else LANEWISE out[i] = from_f16(((const uint16_t *)base)[at + i]);
    return;
  }
  LANEWISE out[i] = 0.0f;
  for (int i = 0; i < valid; i++) out[i] = load_one(base, at + i, dtype);
}

INLINE void store_row(void *base, ptrdiff_t at, const float *row, const int valid, const int dtype) {
  if (valid == LANES) {
    if (dtype == F32) memcpy((float *)base + at, row, LANES * sizeof(float));
    else if (dtype == BF16) LANEWISE((uint16_t *)base)[at + i] = to_bf16(row[i]);
    else LANEWISE((uint16_t *)base)[at + i] = to_f16(row[i]);
    return;
  }
  for (int i = 0; i < valid; i++) store_one(base, at + i, row[i], dtype);
}

#endif
