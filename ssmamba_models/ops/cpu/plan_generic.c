/* Any CPU: what a compiler makes of four floats at a time. */
#define VEC 4
#define NV 4
#define MR 4
#define PRODUCTS FLOATS
#define AMX 0
#define OPS ssmamba_plan_ops_generic
#include "plan_ops.h"
