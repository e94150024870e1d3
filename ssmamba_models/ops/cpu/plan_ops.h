/* All operators of plan.h for one instruction set, whose products are of floats or of bfloat16. */
#include "plan_linears.h"

INLINE void normalise_affine(float *x, int64_t width, const Norm *norm) {
  const Moments m = moments(x, width, norm->eps);
  for (int64_t j = 0; j < width; j++) x[j] = (x[j] - m.mean) * m.scale * norm->weight[j] + norm->bias[j];
}

/* Row `row` of a depthwise convolution for VEC channels: `above`, `here` and `below` are rows of the ring, from the pixel
 * before the first on. Three columns are in the making at any time, so that each input is read once. */
INLINE void convolve_row(const float *above, const float *here, const float *below, ptrdiff_t pitch, int64_t width,
                         const vec taps[TAPS], vec bias, float *out) {
#define COLUMN(n, x0, x1, x2) (taps[n] * (x0) + taps[3 + n] * (x1) + taps[6 + n] * (x2))
  vec last, here_now = bias, next = bias;
  {
    const vec x0 = *(const vec *)(above + pitch), x1 = *(const vec *)(here + pitch), x2 = *(const vec *)(below + pitch);
    here_now += COLUMN(1, x0, x1, x2);
    next += COLUMN(0, x0, x1, x2);
  }
  for (int64_t column = 1; column < width; column++) {
    const ptrdiff_t place = (column + 1) * pitch;
    const vec x0 = *(const vec *)(above + place), x1 = *(const vec *)(here + place), x2 = *(const vec *)(below + place);
    last = here_now + COLUMN(2, x0, x1, x2);
    here_now = next + COLUMN(1, x0, x1, x2);
    next = bias + COLUMN(0, x0, x1, x2);
    *(vec *)(out + (column - 1) * LANES) = last;
  }
  *(vec *)(out + (width - 1) * LANES) = here_now;
#undef COLUMN
}

/* In place: a new row overwrites one whose inputs the ring of three rows still holds. */
static void depthwise(const void *args, Worker *worker, int64_t task) {
  const DepthwiseArgs *p = args;
  const int64_t groups = (p->channels + p->group - 1) / p->group, width = p->width, pixels = width * p->channels;
  const int64_t first = task % groups * p->group, channels = min64(p->channels - first, p->group);
  const int64_t padded = up_to(channels, LANES), pitch = up_to(p->group, LANES), row = (width + 2) * pitch;
  const int dtype = (int)p->dtype;
  const ptrdiff_t image = task / groups * p->height * pixels + first;
  Arena arena = {worker->scratch, 0};
  float *ring = arena_take(&arena, 3 * (size_t)row * sizeof(float));
  float *done = arena_take(&arena, (size_t)width * LANES * sizeof(float));
  const int64_t all = up_to(p->channels, LANES);
  memset(ring, 0, 3 * (size_t)row * sizeof(float));
  for (int64_t y = -1; y < p->height; y++) {
    float *next = ring + (y + 1) % 3 * row;
    if (y + 1 == p->height) memset(next, 0, (size_t)row * sizeof(float));
    else
      for (int64_t x = 0; x < width; x++) {
        const ptrdiff_t from = image + (y + 1) * pixels + x * p->channels;
        for (int64_t j = 0; j < padded; j += LANES)
          load(next + (x + 1) * pitch + j, p->x, from + j, (int)min64(channels - j, LANES), dtype);
      }
    if (y < 0) continue;
    const float *above = ring + (y + 2) % 3 * row, *here = ring + y % 3 * row;
    for (int64_t j = 0; j < padded; j += LANES) {
      for (int v = 0; v < LANES; v += VEC) {
        vec taps[TAPS];
        for (int t = 0; t < TAPS; t++) taps[t] = *(const vec *)(p->w.taps + t * all + first + j + v);
        convolve_row(above + j + v, here + j + v, next + j + v, pitch, width, taps,
                     *(const vec *)(p->w.bias + first + j + v), done + v);
      }
      if (p->silu)
        for (int64_t x = 0; x < width; x++) LANEWISE done[x * LANES + i] *= sigmoid(done[x * LANES + i]);
      const int valid = (int)min64(channels - j, LANES);
      for (int64_t x = 0; x < width; x++)
        store(p->x, image + y * pixels + x * p->channels + j, done + x * LANES, valid, dtype);
    }
  }
}

/* The mean over a window of pixels that lies inside the map, 16 channels. */
INLINE void pool(float *out, const ScanInputArgs *p, int64_t image, int64_t y, int64_t x, int64_t channel, int valid) {
  const int64_t s = p->scan->scale, bottom = min64(p->height, (y + 1) * s), right = min64(p->width, (x + 1) * s);
  float sum[LANES] = {0}, one[LANES];
  for (int64_t i = y * s; i < bottom; i++)
    for (int64_t j = x * s; j < right; j++) {
      const ptrdiff_t from = ((image * p->height + i) * p->width + j) * p->channels + p->scan->offset + channel;
      load(one, p->u, from, valid, (int)p->dtype);
      for (int l = 0; l < LANES; l++) sum[l] += one[l];
    }
  const float share = 1.0f / (float)((bottom - y * s) * (right - x * s));
  LANEWISE out[i] = sum[i] * share;
}

static void scan_input(const void *args, Worker *worker, int64_t task) {
  const ScanInputArgs *p = args;
  const Scan *scan = p->scan;
  const int64_t height = (p->height + scan->scale - 1) / scan->scale, width = (p->width + scan->scale - 1) / scan->scale;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  const int dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, scan->width, 0);
  total *c = take_tile(&arena);
  float v[LANES];
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row;
    for (int64_t j = 0; j < scan->width; j += LANES) {
      const int valid = (int)min64(LANES, scan->width - j);
      if (scan->scale == 1) {
        load(v, p->u, token * p->channels + scan->offset + j, valid, dtype);
      } else {
        pool(v, p, token / (height * width), token / width % height, token % width, j, valid);
        store(p->pooled, token * scan->width + j, v, valid, dtype);
      }
      put_part(&a, row, j, v, valid);
    }
    close_row(&a, row, scan->width);
  }
  put_no_rows(&a, rows, scan->width);
  const int64_t n = scan->x_proj.n;
  const Out out = {.data = p->projected + first * n, .pitch = n, .n = n, .dtype = F32, .bias = scan->x_proj.bias};
  multiply_all(&a, rows, &scan->x_proj, TO_MAP, &out, c);
}

/* delta[pixel][16] = r[pixel] . dt_proj, four pixels at a time. `pitch` lies between the rows of r and of dt_proj. */
INLINE void step_sizes(float *delta, const float *r, int64_t r_pitch, const float *dt_proj, int64_t dt_pitch,
                       int64_t rank, int64_t pixels) {
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4, r += 4 * r_pitch)
    for (int v = 0; v < LANES; v += VEC) {
      vec d0 = {0}, d1 = {0}, d2 = {0}, d3 = {0};
      for (int64_t j = 0; j < rank; j++) {
        const vec w = *(const vec *)(dt_proj + j * dt_pitch + v);
        d0 += w * r[j];
        d1 += w * r[r_pitch + j];
        d2 += w * r[2 * r_pitch + j];
        d3 += w * r[3 * r_pitch + j];
      }
      float *out = delta + p * LANES + v;
      *(vec *)out = d0;
      *(vec *)(out + LANES) = d1;
      *(vec *)(out + 2 * LANES) = d2;
      *(vec *)(out + 3 * LANES) = d3;
    }
  for (; p < pixels; p++, r += r_pitch) {
    float sum[LANES] = {0};
    for (int64_t j = 0; j < rank; j++) LANEWISE sum[i] += dt_proj[j * dt_pitch + i] * r[j];
    memcpy(delta + p * LANES, sum, sizeof sum);
  }
}

static void scan(const void *args, Worker *worker, int64_t task) {
  const ScanArgs *p = args;
  const Scan *s = p->scan;
  const int64_t pixels = p->height * p->width, blocks = blocks_of(s->width), states = s->states;
  const int64_t image = task / blocks, channel = task % blocks * LANES, n = s->x_proj.n, first = image * pixels;
  const int valid = (int)min64(LANES, s->width - channel), dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  float *u = arena_take(&arena, pixels * ROW), *delta = arena_take(&arena, pixels * ROW);
  float *y = arena_take(&arena, pixels * ROW), *A = arena_take(&arena, states * ROW);
  float *h = arena_take(&arena, states * ROW), *D = arena_take(&arena, ROW), *bias = arena_take(&arena, ROW);
  int32_t *orders[2] = {arena_take(&arena, pixels * 4), arena_take(&arena, pixels * 4)};
  fill_orders(orders[0], orders[1], p->height, p->width);
  const View view = {.data = p->v, .batch = pixels * p->pitch, .pixel = p->pitch};
  gather(u, &view, image, channel, valid, pixels, dtype);
  const float *projected = p->projected + first * n;
  step_sizes(delta, projected, n, s->dt_proj + channel, up_to(s->width, LANES), s->rank, pixels);
  load_channels(D, s->D + channel, 1, valid, 1.0f);
  for (int64_t q = 0; q < pixels; q++) LANEWISE y[q * LANES + i] = D[i] * u[q * LANES + i];
  for (int k = 0; k < 4; k++) {
    const ptrdiff_t row = k * s->width + channel;
    load_channels(A, s->A + row * states, states, valid, LOG2E);
    load_channels(bias, s->dt_bias + row, 1, valid, 1.0f);
    const Walk walk = {.u = u, .delta = delta, .A = A, .bias = bias,
                       .b = projected + s->rank + k * states, .c = projected + s->rank + (4 + k) * states,
                       .pixel_stride = n, .state_stride = 1};
    memset(h, 0, states * ROW);
    forward_steps(&walk, (int)states, 1, orders[k & 1] + (k < 2 ? 0 : pixels - 1), k < 2 ? 1 : -1, pixels, h, y);
  }
  scatter(p->y, y, image, channel, valid, pixels, s->width, dtype);
}

/* Sixteen or fewer channels of a pixel, as part of a left side. */
INLINE void put_pixel(const Left *a, int64_t row, int64_t k, const void *x, ptrdiff_t from, int64_t channels,
                      const int dtype) {
  float one[LANES];
  for (int64_t j = 0; j < channels; j += LANES) {
    const int valid = (int)min64(LANES, channels - j);
    load(one, x, from + j, valid, dtype);
    put_part(a, row, k + j, one, valid);
  }
}

INLINE void put_zeros(const Left *a, int64_t row, int64_t k, int64_t count) {
  for (int64_t j = 0; j < count; j++) *at(a, row, k + j) = 0;
}

static void downsample(const void *args, Worker *worker, int64_t task) {
  const DownsampleArgs *p = args;
  const int64_t height = (p->height + 1) / 2, width = (p->width + 1) / 2, n = p->w.n;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, p->w.k, 0);
  total *c = take_tile(&arena);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row, image = token / (height * width);
    const int64_t top = token / width % height * 2 - 1, left = token % width * 2 - 1;
    for (int64_t tap = 0; tap < TAPS; tap++) {
      const int64_t y = top + tap / 3, x = left + tap % 3;
      if (y < 0 || y >= p->height || x < 0 || x >= p->width) put_zeros(&a, row, tap * p->channels, p->channels);
      else {
        const ptrdiff_t from = ((image * p->height + y) * p->width + x) * p->channels;
        put_pixel(&a, row, tap * p->channels, p->x, from, p->channels, (int)p->dtype);
      }
    }
    close_row(&a, row, p->w.k);
  }
  put_no_rows(&a, rows, p->w.k);
  float *data = p->out + first * n;
  const Out out = {.data = data, .pitch = n, .n = n, .dtype = F32, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
  for (int64_t row = 0; row < rows; row++) normalise_affine(data + row * n, n, &p->norm);
}

/* The 3x3 patch of every channel around a pixel, zeros beyond the image. */
INLINE void copy_patch(float *patch, const StemArgs *p, const float *image, int64_t top, int64_t left) {
  const int64_t *strides = p->strides;
  const int inside = top >= 0 && top + 3 <= p->height && left >= 0 && left + 3 <= p->width;
  for (int64_t channel = 0; channel < p->channels; channel++, patch += TAPS) {
    const float *from = image + channel * strides[1] + top * strides[2] + left * strides[3];
    for (int i = 0; i < 3; i++, from += strides[2])
      for (int j = 0; j < 3; j++)
        patch[3 * i + j] = inside || (top + i >= 0 && top + i < p->height && left + j >= 0 && left + j < p->width)
                               ? from[j * strides[3]]
                               : 0.0f;
  }
}

static void stem(const void *args, Worker *worker, int64_t task) {
  const StemArgs *p = args;
  const int64_t height = (p->height + 1) / 2, width = (p->width + 1) / 2, n = p->w.n, k = p->w.k;
  const int64_t first = task * p->rows, rows = min64(p->rows, p->batch * height * width - first);
  const int dtype = (int)p->dtype;
  Arena arena = {worker->scratch, 0};
  const Left a = take_left(&arena, p->rows, k, 0);
  total *c = take_tile(&arena);
  float *y = arena_take(&arena, (size_t)(p->rows * n) * sizeof(float));
  float *patch = arena_take(&arena, (size_t)up_to(k, LANES) * sizeof(float));
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = first + row;
    const float *image = p->x + token / (height * width) * p->strides[0];
    copy_patch(patch, p, image, token / width % height * 2 - 1, token % width * 2 - 1);
    for (int64_t j = 0; j < k; j += LANES) put_part(&a, row, j, patch + j, (int)min64(LANES, k - j));
    close_row(&a, row, k);
  }
  put_no_rows(&a, rows, k);
  const Out out = {.data = y, .pitch = n, .n = n, .dtype = F32, .bias = p->w.bias};
  multiply_all(&a, rows, &p->w, TO_MAP, &out, c);
  for (int64_t row = 0; row < rows; row++) {
    float *x = y + row * n;
    normalise_affine(x, n, &p->norm);
    int64_t j = 0;
    const ptrdiff_t to = (first + row) * n;
    for (; j + LANES <= n; j += LANES) {
      LANEWISE x[j + i] = activate_gelu(x[j + i]);
      store(p->out, to + j, x + j, LANES, dtype);
    }
    for (; j < n; j++) store_one(p->out, to + j, activate_gelu(x[j]), dtype);
  }
}

const PlanOps OPS = {
    .panel = PANEL,
    .k_grain = K_GRAIN,
    .row_tile = MR,
    .slab_row = PITCH * sizeof(elem),
    .products = PRODUCTS,
    .norm_linear = norm_linear,
    .depthwise = depthwise,
    .scan_input = scan_input,
    .scan = scan,
    .branches = branches,
    .downsample = downsample,
    .stem = stem,
};
