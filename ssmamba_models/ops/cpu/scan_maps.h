/* Maps (batch, height, width, channels) as a scan reads them: in which order, and sixteen channels at a time. */
#ifndef SSMAMBA_SCAN_MAPS_H
#define SSMAMBA_SCAN_MAPS_H

#include "scan.h"

typedef struct {
  const void *data;
  int64_t batch; /* strides, in elements */
  int64_t pixel;
} View;

/* columns[t] is the pixel visited at step t when reading column after column; rows is the identity. */
INLINE void fill_orders(int32_t *rows, int32_t *columns, int64_t height, int64_t width) {
  for (int64_t j = 0; j < width; j++)
    for (int64_t i = 0; i < height; i++) columns[j * height + i] = (int32_t)(i * width + j);
  for (int64_t t = 0; t < height * width; t++) rows[t] = (int32_t)t;
}

INLINE void gather(float *out, const View *view, int64_t image, int64_t channel, int valid, int64_t pixels,
                   int64_t dtype) {
  ptrdiff_t at = image * view->batch + channel;
  if (valid == LANES && dtype == F32)
    for (int64_t p = 0; p < pixels; p++, at += view->pixel) load_row(out + p * LANES, view->data, at, LANES, F32);
  else if (valid == LANES && dtype == BF16)
    for (int64_t p = 0; p < pixels; p++, at += view->pixel) load_row(out + p * LANES, view->data, at, LANES, BF16);
  else
    for (int64_t p = 0; p < pixels; p++, at += view->pixel)
      load_row(out + p * LANES, view->data, at, valid, (int)dtype);
}

INLINE void scatter(void *out, const float *in, int64_t image, int64_t channel, int valid, int64_t pixels,
                    int64_t channels, int64_t dtype) {
  ptrdiff_t at = image * pixels * channels + channel;
  for (int64_t p = 0; p < pixels; p++, at += channels) store_row(out, at, in + p * LANES, valid, (int)dtype);
}

#endif
