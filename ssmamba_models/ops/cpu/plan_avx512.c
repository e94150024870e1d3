/* AVX-512 (x86-64-v4): thirty-two registers, twenty-eight of them sums. */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#endif
#define VEC 16
#define NV 2
#define MR 14
#define PRODUCTS FLOATS
#define AMX 0
#define OPS ssmamba_plan_ops_avx512
#include "plan_ops.h"
TARGET_END
#endif
