/* Products of four unsigned and four signed bytes, summed in int32, VEC sums at a time: the instruction of AVX-VNNI or
 * AVX512-VNNI, or the same in plain C. */
#include <stdint.h>
#include <string.h>

typedef int32_t fours __attribute__((vector_size(VEC * 4)));

static inline __attribute__((always_inline)) fours broadcast_four(const int8_t *four) {
  int32_t all;
  memcpy(&all, four, sizeof all);
  return all - (fours){0};
}

#if defined(SSMAMBA_EMULATE)
static inline fours dot_fours(fours c, fours unsigneds, fours signeds) {
  for (int i = 0; i < VEC; i++)
    for (int j = 0; j < 32; j += 8) c[i] += (uint8_t)(unsigneds[i] >> j) * (int8_t)(signeds[i] >> j);
  return c;
}
#else
#include <immintrin.h>

static inline __attribute__((always_inline)) fours dot_fours(fours c, fours unsigneds, fours signeds) {
#if VEC == 16
  return (fours)_mm512_dpbusd_epi32((__m512i)c, (__m512i)unsigneds, (__m512i)signeds);
#else
  return (fours)_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)unsigneds, (__m256i)signeds);
#endif
}
#endif
