/* AMX: bfloat16 products by tiles. */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
#include "bf16_pairs.h"
#if defined(SSMAMBA_EMULATE)
static inline float dot_words(int32_t a, int32_t b) {
  return half_of(a, 0) * half_of(b, 0) + half_of(a, 1) * half_of(b, 1);
}
#endif
#define TILE_SUM float
#define TILE_DOT _tile_dpbf16ps
#include "amx_tiles.h"

#define VEC 16
#define NV 2
#define MR 32
#define PRODUCTS BFLOATS
#define AMX 1
#define OPS ssmamba_plan_ops_amx
#include "plan_ops.h"
TARGET_END
#endif
