/* AMX: int8 products by tiles. */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,amx-tile,amx-int8")
#endif
#include "bf16_pairs.h" /* for the rounding of maps */
#if defined(SSMAMBA_EMULATE)
static inline int32_t dot_words(int32_t a, int32_t b) {
  int32_t sum = 0;
  for (int j = 0; j < 32; j += 8) sum += (int8_t)(a >> j) * (uint8_t)(b >> j);
  return sum;
}
#endif
#define TILE_SUM int32_t
#define TILE_DOT _tile_dpbsud
#include "amx_tiles.h"

#define VEC 16
#define NV 2
#define MR 32
#define PRODUCTS BYTES
#define AMX 1
#define OPS ssmamba_plan_ops_amx_int8
#include "plan_int8.h"
TARGET_END
#endif
