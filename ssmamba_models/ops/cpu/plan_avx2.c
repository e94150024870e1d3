/* AVX2 and FMA: sixteen registers, twelve of them sums. */
#include "instruction_set.h"
#if HAS_X86
TARGET("avx2,fma,bmi,bmi2,f16c")
#define VEC 8
#define NV 2
#define MR 6
#define PRODUCTS FLOATS
#define AMX 0
#define OPS ssmamba_plan_ops_avx2
#include "plan_ops.h"
TARGET_END
#endif
