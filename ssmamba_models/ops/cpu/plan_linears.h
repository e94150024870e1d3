/* The operators whose linear layers may be of int8: they take tokens one by one. */
#include "plan_product.h"

static void norm_linear(const void *args, Worker *worker, int64_t task) {
  const NormLinearArgs *p = args;
  Arena arena = {worker->scratch, 0};
  const int64_t first = task * p->rows, rows = min64(p->rows, p->tokens - first), k = p->w.k;
  const Left a = take_left(&arena, p->rows, k, 0);
  total *c = take_tile(&arena);
  for (int64_t row = 0; row < rows; row++) put_normalised(&a, row, p->x + (first + row) * k, k, p->eps);
  put_no_rows(&a, rows, k);
  const int dtype = (int)p->out_dtype;
  char *data = (char *)p->out + (size_t)(first * p->w.n) * (dtype == F32 ? 4 : 2);
  const Out out = {.data = data, .pitch = p->w.n, .n = p->w.n, .dtype = dtype, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
}

/* Where a position of the enlarged map lies in the small one, as torch's bilinear interpolation with a given size. */
typedef struct {
  int64_t low, high;
  float share; /* of high */
} Position;

INLINE Position position(int64_t at, int64_t small, int64_t large) {
  float from = ((float)at + 0.5f) * ((float)small / (float)large) - 0.5f;
  from = from < 0.0f ? 0.0f : from;
  const int64_t low = min64((int64_t)from, small - 1);
  return (Position){low, low + (low < small - 1), from - (float)low};
}

/* Channels of one scan at a token, enlarged to the full map. */
INLINE void put_scan(float *out, const BranchesArgs *p, const Scan *s, const void *y, int64_t token) {
  const int dtype = (int)p->dtype;
  if (s->scale == 1) {
    for (int64_t j = 0; j < s->width; j += LANES)
      load(out + j, y, token * s->width + j, (int)min64(LANES, s->width - j), dtype);
    return;
  }
  const int64_t h = (p->height + s->scale - 1) / s->scale, w = (p->width + s->scale - 1) / s->scale;
  const int64_t image = token / (p->height * p->width) * h * w;
  const Position row = position(token / p->width % p->height, h, p->height), column = position(token % p->width, w, p->width);
  const ptrdiff_t corners[4] = {image + row.low * w + column.low, image + row.low * w + column.high,
                                image + row.high * w + column.low, image + row.high * w + column.high};
  const float shares[4] = {(1 - row.share) * (1 - column.share), (1 - row.share) * column.share,
                           row.share * (1 - column.share), row.share * column.share};
  for (int64_t j = 0; j < s->width; j += LANES) {
    float sum[LANES] = {0}, one[LANES];
    const int valid = (int)min64(LANES, s->width - j);
    for (int corner = 0; corner < 4; corner++) {
      load(one, y, corners[corner] * s->width + j, valid, dtype);
      LANEWISE sum[i] += shares[corner] * one[i];
    }
    memcpy(out + j, sum, (size_t)LANES * sizeof(float)); /* what lies beyond `valid` is overwritten or never read */
  }
}

static void branches(const void *args, Worker *worker, int64_t task) {
  const BranchesArgs *p = args;
  const Block *block = p->block;
  const int64_t dim = p->dim, first = task * p->rows, tokens = p->batch * p->height * p->width;
  const int64_t rows = min64(p->rows, tokens - first);
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, dim, 0), hidden = take_left(&arena, p->rows, SLAB, 1);
  total *c = take_tile(&arena);
  float *scanned = arena_take(&arena, (size_t)(dim + LANES) * sizeof(float)), *x = p->x + first * dim;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t s = 0; s < block->scans; s++)
      put_scan(scanned + block->scan[s].offset, p, block->scan + s, p->y[s], first + row);
    put_normalised(&a, row, scanned, dim, block->eps_dms);
  }
  put_no_rows(&a, rows, dim);
  put_no_rows(&hidden, rows, SLAB);
  Out sum = {.data = x, .pitch = dim, .n = dim, .dtype = F32, .bias = block->out_proj.bias};
  multiply_all(&a, rows, &block->out_proj, ADD, &sum, c);
  for (int64_t row = 0; row < rows; row++) put_normalised(&a, row, x + row * dim, dim, block->eps2);
  /* The hidden layer SLAB columns at a time: it need not fit into the cache as a whole. */
  const int64_t panels = panels_of(block->fc1.n), step = SLAB / PANEL;
  for (int64_t panel = 0; panel < panels; panel += step) {
    const int64_t end = min64(panel + step, panels), k = min64(SLAB, block->fc2.k - panel * PANEL);
    const Out inner = {.bias = block->fc1.bias + panel * PANEL, .left = &hidden};
    multiply(&a, rows, &block->fc1, 0, dim, panel, end, GELU, &inner, c);
#if PRODUCTS == BYTES
    for (int64_t row = 0; row < rows; row++) close_row(&hidden, row, k);
#endif
    sum.bias = panel ? NULL : block->fc2.bias;
    multiply(&hidden, rows, &block->fc2, panel * PANEL, k, 0, panels_of(dim), ADD, &sum, c);
  }
}
