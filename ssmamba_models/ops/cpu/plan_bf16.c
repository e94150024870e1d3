/* AVX-512 with bfloat16 products (AVX512-BF16). */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")
#endif
#include "bf16_pairs.h"
#define VEC 16
#define NV 2
#define MR 14
#define PRODUCTS BFLOATS
#define AMX 0
#define OPS ssmamba_plan_ops_bf16
#include "plan_ops.h"
TARGET_END
#endif
