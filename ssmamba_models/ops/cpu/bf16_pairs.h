/* Products of pairs of bfloat16, summed in float32: AVX512-BF16's instruction, or the same in plain C. */
#include <stdint.h>
#include <string.h>

typedef int32_t pairs __attribute__((vector_size(64)));
typedef float sums __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) pairs broadcast_pair(const uint16_t *pair) {
  int32_t both;
  memcpy(&both, pair, sizeof both);
  return both - (pairs){0};
}

#if defined(SSMAMBA_EMULATE)
static inline float half_of(int32_t pair, int second) {
  const uint32_t raw = second ? (uint32_t)pair & 0xffff0000u : (uint32_t)pair << 16;
  float x;
  memcpy(&x, &raw, sizeof x);
  return x;
}

static inline sums dot_pairs(sums c, pairs a, pairs b) {
  for (int i = 0; i < 16; i++) {
    c[i] += half_of(a[i], 1) * half_of(b[i], 1);
    c[i] += half_of(a[i], 0) * half_of(b[i], 0);
  }
  return c;
}
#else
#include <immintrin.h>

static inline __attribute__((always_inline)) sums dot_pairs(sums c, pairs a, pairs b) {
  return (sums)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}

/* Rounds sixteen floats. */
#define ROUND_ROW(out, in) \
  _mm256_storeu_si256((__m256i *)(out), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in)))
#endif
