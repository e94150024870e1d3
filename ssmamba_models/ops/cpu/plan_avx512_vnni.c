/* AVX-512 with products of bytes (AVX512-VNNI). */
#include "instruction_set.h"
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
TARGET("avx2,fma,bmi,bmi2,f16c")
#else
TARGET("avx2,fma,bmi,bmi2,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")
#endif
#define VEC 16
#define NV 2
#define MR 14
#define PRODUCTS BYTES
#define AMX 0
#define OPS ssmamba_plan_ops_avx512_vnni
#include "byte_fours.h"
#include "plan_int8.h"
TARGET_END
#endif
