/* AVX2 with products of bytes (AVX-VNNI). */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avxvnni")
#endif
#define VEC 8
#define NV 2
#define MR 6
#define PRODUCTS BYTES
#define AMX 0
#define OPS ssmamba_plan_ops_avx_vnni
#include "byte_fours.h"
#include "plan_int8.h"
TARGET_END
#endif
