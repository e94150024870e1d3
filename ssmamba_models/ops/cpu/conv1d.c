/* causal_conv1d: a depthwise convolution along time that never looks ahead. A task is one row (image, channel). */
#include "scan.h"

typedef struct {
  int64_t batch, channels, length, taps;
  int64_t dtype, silu;
  const void *x, *grad;       /* (batch, channels, length), contiguous */
  const float *weight, *bias; /* (channels, taps), (channels,) or NULL */
  void *y, *dx;
  float *dweight, *dbias;     /* (batch, channels, taps), (batch, channels) */
} ConvArgs;

#define HISTORY 3 /* taps - 1 at most */

INLINE int64_t padded(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* One row into out[HISTORY + t], zeros before it and up to a multiple of LANES after it. */
INLINE void read_row(float *out, const void *in, ptrdiff_t at, int64_t length, const int dtype) {
  for (int t = 0; t < HISTORY; t++) out[t] = 0.0f;
  for (int64_t t = 0; t < length; t += LANES) {
    const int64_t left = length - t;
    if (left >= LANES) load_row(out + HISTORY + t, in, at + t, LANES, dtype);
    else load_row(out + HISTORY + t, in, at + t, (int)left, dtype);
  }
}

INLINE void write_row(void *out, ptrdiff_t at, const float *in, int64_t length, int64_t t, const int dtype) {
  if (length - t >= LANES) store_row(out, at + t, in, LANES, dtype);
  else store_row(out, at + t, in, (int)(length - t), dtype);
}

/* Before the activation, sixteen times from t on; x[HISTORY + t] is time t. */
INLINE void convolve(float *out, const float *x, const float *w, const int taps, float bias) {
  const float *first = x + HISTORY - (taps - 1);
  LANEWISE {
    float y = bias;
    for (int j = 0; j < taps; j++) y += w[j] * first[i + j];
    out[i] = y;
  }
}

INLINE void row_forward(const ConvArgs *a, int64_t row, const int taps, const int dtype, const float *x) {
  const int64_t channel = row % a->channels;
  const float *w = a->weight + channel * taps, bias = a->bias ? a->bias[channel] : 0.0f;
  float y[LANES];
  for (int64_t t = 0; t < a->length; t += LANES) {
    convolve(y, x + t, w, taps, bias);
    if (a->silu) LANEWISE y[i] *= sigmoid(y[i]);
    write_row(a->y, row * a->length, y, a->length, t, dtype);
  }
}

/* g[t] is dL/d(before the activation), followed by zeros: the steps after the last. */
INLINE void row_backward(const ConvArgs *a, int64_t row, const int taps, const int dtype, const float *x, float *g) {
  const int64_t channel = row % a->channels;
  const float *w = a->weight + channel * taps, bias = a->bias ? a->bias[channel] : 0.0f;
  float dw[4][LANES] = {{0}}, db[LANES] = {0}, y[LANES];
  read_row(g, a->grad, row * a->length, a->length, dtype);
  g += HISTORY;
  for (int64_t t = 0; t < a->length; t += LANES) {
    float *dz = g + t;
    if (a->silu) {
      convolve(y, x + t, w, taps, bias);
      LANEWISE {
        float gate = sigmoid(y[i]);
        dz[i] *= gate * (1.0f + y[i] * (1.0f - gate));
      }
    }
    LANEWISE db[i] += dz[i];
    for (int j = 0; j < taps; j++) {
      const float *shifted = x + HISTORY - (taps - 1) + t + j;
      LANEWISE dw[j][i] += dz[i] * shifted[i];
    }
  }
  memset(g + padded(a->length), 0, ROW);
  for (int64_t t = 0; t < a->length; t += LANES) {
    LANEWISE {
      float dx = 0.0f;
      for (int j = 0; j < taps; j++) dx += w[j] * g[t + i + (taps - 1) - j];
      y[i] = dx;
    }
    write_row(a->dx, row * a->length, y, a->length, t, dtype);
  }
  float total = 0.0f;
  for (int i = 0; i < LANES; i++) total += db[i];
  a->dbias[row] = total;
  for (int j = 0; j < taps; j++) {
    total = 0.0f;
    for (int i = 0; i < LANES; i++) total += dw[j][i];
    a->dweight[row * taps + j] = total;
  }
}

MULTIVERSION
int ssmamba_conv_forward(const ConvArgs *a, int64_t begin, int64_t end) {
  Arena arena;
  if (arena_open(&arena, (HISTORY + (size_t)padded(a->length)) * sizeof(float))) return -1;
  float *x = arena_take(&arena, 0);
  for (int64_t row = begin; row < end; row++) {
    const int dtype = (int)a->dtype;
    read_row(x, a->x, row * a->length, a->length, dtype);
    if (a->taps == 4 && dtype == F32) row_forward(a, row, 4, F32, x);
    else if (a->taps == 4) row_forward(a, row, 4, dtype, x);
    else if (a->taps == 3) row_forward(a, row, 3, dtype, x);
    else row_forward(a, row, 2, dtype, x);
  }
  arena_close(&arena);
  return 0;
}

MULTIVERSION
int ssmamba_conv_backward(const ConvArgs *a, int64_t begin, int64_t end) {
  Arena arena;
  const size_t row_bytes = (HISTORY + (size_t)padded(a->length) + LANES) * sizeof(float);
  if (arena_open(&arena, 2 * row_bytes)) return -1;
  float *x = arena_take(&arena, row_bytes), *g = arena_take(&arena, row_bytes);
  for (int64_t row = begin; row < end; row++) {
    const int dtype = (int)a->dtype;
    read_row(x, a->x, row * a->length, a->length, dtype);
    if (a->taps == 4) row_backward(a, row, 4, dtype, x, g);
    else if (a->taps == 3) row_backward(a, row, 3, dtype, x, g);
    else row_backward(a, row, 2, dtype, x, g);
  }
  arena_close(&arena);
  return 0;
}
