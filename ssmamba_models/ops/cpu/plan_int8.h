/* The operators of plan.h that have int8 products, for one instruction set. */
#include "plan_linears.h"

const PlanOps OPS = {
    .panel = PANEL,
    .k_grain = K_GRAIN,
    .row_tile = MR,
    .slab_row = PITCH * sizeof(elem),
    .products = PRODUCTS,
    .norm_linear = norm_linear,
    .branches = branches,
};
