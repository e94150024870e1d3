/* depthwise3x3: every channel of a channels-last map convolved with a 3x3 kernel of its own, in place. A task is one
 * image's group of channels: a new row overwrites one whose inputs the ring of three rows still holds. */
#include "scan.h"

#define LARGEST 64 /* channels of a group at most; the ring of a map up to 600 wide then stays in half a MiB */
#define TAPS 9

typedef struct {
  int64_t batch, height, width, channels;
  int64_t group; /* channels of a task: a multiple of LANES up to LARGEST */
  int64_t silu, residual;
  float *x;                   /* (batch, height, width, channels), contiguous */
  const float *weight, *bias; /* (channels, 3, 3), (channels,) */
} DepthwiseArgs;

/* What one group needs of the parameters, by lanes. Lanes without a channel repeat the group's first. */
typedef struct {
  float taps[LARGEST / LANES][TAPS][LANES], bias[LARGEST / LANES][LANES];
} Kernels;

INLINE void read_kernels(Kernels *k, const DepthwiseArgs *a, int64_t first, int64_t channels) {
  for (int64_t c = 0; c < blocks_of(channels) * LANES; c++) {
    const int64_t channel = first + (c < channels ? c : 0);
    for (int t = 0; t < TAPS; t++) k->taps[c / LANES][t][c % LANES] = a->weight[channel * TAPS + t];
    /* The map itself is one more weight of 1 at the kernel's centre. */
    if (a->residual) k->taps[c / LANES][TAPS / 2][c % LANES] += 1.0f;
    k->bias[c / LANES][c % LANES] = a->bias[channel];
  }
}

/* One row of sixteen channels. `rows` are the rows above, at and below it in the ring, from the pixel before the first
 * on, `pitch` apart; `out` is the row in the map, its pixels `step` apart; `valid` lanes are written. */
INLINE void convolve_row(const float *rows[3], int64_t pitch, float *out, int64_t step, int64_t width,
                         const float taps[TAPS][LANES], const float *bias, const int valid, const int silu) {
  for (int64_t col = 0; col < width; col++) {
    const float *above = rows[0] + col * pitch, *here = rows[1] + col * pitch, *below = rows[2] + col * pitch;
    float y[LANES];
    LANEWISE {
      float sum = bias[i];
      for (int j = 0; j < 3; j++) sum += taps[j][i] * above[j * pitch + i];
      for (int j = 0; j < 3; j++) sum += taps[3 + j][i] * here[j * pitch + i];
      for (int j = 0; j < 3; j++) sum += taps[6 + j][i] * below[j * pitch + i];
      y[i] = sum;
    }
    if (silu) LANEWISE y[i] *= sigmoid(y[i]);
    memcpy(out + col * step, y, (size_t)valid * sizeof(float));
  }
}

INLINE void convolve_block(const float *rows[3], int64_t pitch, float *out, int64_t step, int64_t width,
                           const float taps[TAPS][LANES], const float *bias, const int valid, const int silu) {
  if (valid < LANES) convolve_row(rows, pitch, out, step, width, taps, bias, valid, silu);
  else if (silu) convolve_row(rows, pitch, out, step, width, taps, bias, LANES, 1);
  else convolve_row(rows, pitch, out, step, width, taps, bias, LANES, 0);
}

MULTIVERSION
int ssmamba_depthwise(const DepthwiseArgs *a, int64_t begin, int64_t end) {
  const int64_t groups = (a->channels + a->group - 1) / a->group, pixels = a->width * a->channels;
  /* A pixel of zeros at both ends of every row of the ring. */
  const int64_t row = (a->width + 2) * a->group;
  Arena arena;
  if (arena_open(&arena, 3 * (size_t)row * sizeof(float))) return -1;
  float *ring = arena_take(&arena, 3 * (size_t)row * sizeof(float));
  Kernels kernels;
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task % groups * a->group, channels = min64(a->channels - first, a->group);
    float *map = a->x + task / groups * a->height * pixels + first;
    read_kernels(&kernels, a, first, channels);
    memset(ring, 0, 3 * (size_t)row * sizeof(float));
    for (int64_t at = -1; at < a->height; at++) {
      float *next = ring + (at + 1) % 3 * row;
      if (at + 1 == a->height) memset(next, 0, (size_t)row * sizeof(float));
      else
        for (int64_t col = 0; col < a->width; col++)
          memcpy(next + (col + 1) * a->group, map + (at + 1) * pixels + col * a->channels,
                 (size_t)channels * sizeof(float));
      if (at < 0) continue;
      for (int64_t block = 0; block < blocks_of(channels); block++) {
        const int64_t lane = block * LANES;
        const float *rows[3] = {ring + (at + 2) % 3 * row + lane, ring + at % 3 * row + lane, next + lane};
        convolve_block(rows, a->group, map + at * pixels + lane, a->channels, a->width, kernels.taps[block],
                       kernels.bias[block], (int)min64(channels - lane, LANES), (int)a->silu);
      }
    }
  }
  arena_close(&arena);
  return 0;
}
