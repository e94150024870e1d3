/* A whole SSMamba encoder as a plan of fused operators, for inference on a CPU.
 *
 * Activations are channels-last. Three kinds of numbers: the residual stream is float32; maps between operators (the
 * scan's input and output, the stem's first map) are `map_dtype`, float32 or bfloat16; what goes into a matrix product is
 * `elem`, which each instruction set fixes (float, or bfloat16 or int8 where the CPU multiplies it).
 *
 * Every operator is a function (args, worker, task) over tasks that touch no memory in common: tokens of a map, or one
 * image's block of channels. plan_ops.h holds them and is compiled once for each instruction set; plan.c runs them.
 * plan_int8.h holds those that have int8 products: the linear layers of blocks.
 */
#ifndef SSMAMBA_PLAN_H
#define SSMAMBA_PLAN_H

#include "simd.h"

/* y = x W^T + bias, W packed into panels of `panel` columns (see PlanOps): [panel][k][column] floats, or
 * [panel][k / 2][column][2] bfloat16, or [panel][k / 4][column][4] bytes, which are 128 + weight / scale. k is padded
 * to PlanOps.k_grain and n to a multiple of the panel, with zeros. */
typedef struct {
  const void *weight;
  const float *bias, *scale; /* scale: of each column of bytes */
  int64_t n, k;
} Linear;

/* A 3x3 depthwise convolution: [9][channels] and [channels], padded with zeros to a multiple of 16 channels. */
typedef struct {
  const float *taps, *bias;
} Depthwise;

/* Affine layer norm; where a linear layer follows, its weight and bias are folded into that and not kept here. */
typedef struct {
  const float *weight, *bias;
  double eps;
} Norm;

/* DirectionalSSM: channels [offset, offset + width) of the DMS input, at 1 / scale of its resolution. */
typedef struct {
  int64_t scale, offset, width, rank, states;
  Linear x_proj;                 /* its bias holds B_bias */
  const float *dt_proj;          /* [rank][width padded to 16] */
  const float *A, *D, *dt_bias;  /* (4, width, states), (width,), (4, width) */
} Scan;

typedef struct {
  Depthwise lpr, conv;
  double eps1, eps_dms, eps2;
  Linear in_proj, out_proj, fc1, fc2;
  int64_t scans;
  const Scan *scan;
} Block;

/* The 3x3 convolution of stride 2 before a stage (in stage 0 the stem's second), its norm, and the stage's blocks. */
typedef struct {
  int64_t dim;
  Linear conv; /* k is 9 * input channels, ordered (row, column, channel) */
  Norm norm;
  int64_t blocks;
  const Block *block;
} Stage;

typedef struct {
  int64_t in_chans, stem_dim;
  Linear conv1; /* k is 9 * in_chans, ordered (channel, row, column) */
  Norm norm1;
  int64_t stages;
  const Stage *stage;
} Network;

/* ---- what operators are called with ---- */

typedef struct {
  char *scratch; /* the thread's own, aligned to 64 bytes */
} Worker;

typedef void (*Operator)(const void *args, Worker *worker, int64_t task);

/* out = LN(x) W^T + bias for rows of x. A task is `rows` tokens. */
typedef struct {
  int64_t tokens, rows, out_dtype;
  double eps;
  const float *x; /* (tokens, w.k) */
  Linear w;
  void *out;      /* (tokens, w.n) */
} NormLinearArgs;

/* Each channel convolved with its 3x3 kernel, in place; then SiLU if asked. A task is one image's group of channels. */
typedef struct {
  int64_t batch, height, width, channels, group, dtype, silu;
  void *x;
  Depthwise w;
} DepthwiseArgs;

/* The scan's own projections, (tokens of the scale, rank + 8 * states) float32: r, b, c. Where scale > 1 also the pooled
 * input. A task is `rows` pooled tokens. */
typedef struct {
  int64_t batch, height, width, channels, rows, dtype;
  const void *u;   /* (batch, height, width, channels) */
  const Scan *scan;
  void *pooled;    /* (batch, ceil(height / scale), ceil(width / scale), scan->width) in dtype; unused at scale 1 */
  float *projected;
} ScanInputArgs;

/* A task is one image's block of 16 channels. */
typedef struct {
  int64_t batch, height, width, dtype; /* the scale's own height and width */
  int64_t pitch;                       /* channels from pixel to pixel of v */
  const void *v;                       /* the scale's first channel */
  const Scan *scan;
  const float *projected;
  void *y; /* (batch, height, width, scan->width) */
} ScanArgs;

/* x += LN([y_1; up(y_2); ...]) W_out^T + bias; x += MLP(LN(x)). A task is `rows` tokens. */
typedef struct {
  int64_t batch, height, width, rows, dtype;
  float *x; /* (batch, height, width, dim) */
  int64_t dim;
  const Block *block;
  const void *const *y; /* one map per scan */
} BranchesArgs;

/* A 3x3 convolution of stride 2 with zero padding, then LN; out float32. A task is `rows` output tokens. */
typedef struct {
  int64_t batch, height, width, channels, dtype, rows; /* of the input */
  const void *x;
  Linear w;
  Norm norm;
  float *out;
} DownsampleArgs;

/* The stem's first convolution: images with any strides, then LN and GELU. A task is `rows` output tokens. */
typedef struct {
  int64_t batch, height, width, channels, rows, dtype; /* of the input; dtype of the output */
  const float *x;
  int64_t strides[4]; /* elements, (batch, channel, row, column) */
  Linear w;
  Norm norm;
  void *out;
} StemArgs;

/* What is known of a row of bytes: what 1 stands for, and how much the products' sums are too large. */
typedef struct {
  float scale;
  int32_t excess;
} RowFacts;

/* What products multiply. */
#define FLOATS 0
#define BFLOATS 1
#define BYTES 2

/* panel, k_grain: see Linear. row_tile: rows computed at a time. slab_row: bytes of a product's left side, for a row
 * and each SLAB columns or part of them. With products of BYTES there are norm_linear and branches alone. */
#define SLAB 512
typedef struct {
  int64_t panel, k_grain, row_tile, slab_row, products;
  Operator norm_linear, depthwise, scan_input, scan, branches, downsample, stem;
} PlanOps;

extern const PlanOps ssmamba_plan_ops_generic, ssmamba_plan_ops_avx2, ssmamba_plan_ops_avx512, ssmamba_plan_ops_bf16,
    ssmamba_plan_ops_amx, ssmamba_plan_ops_avx_vnni, ssmamba_plan_ops_avx512_vnni, ssmamba_plan_ops_amx_int8;

#endif
