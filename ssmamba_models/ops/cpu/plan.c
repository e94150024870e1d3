/* Running a network's operators, in an order that keeps what they pass on in the caches.
 *
 * Early maps are large and their weights small, late ones the reverse. So a few images at a time pass through the first
 * stage, and more of them together through the later ones: a stage calls the one before it for a group of images, then
 * runs its own blocks over the whole group. With images enough, each thread takes groups of its own and never waits;
 * else all threads share every operator's tasks.
 */
#include <stddef.h>
#include <unistd.h>

#include "crew.h"
#include "instruction_set.h"
#include "plan.h"
#if HAS_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

#define MAX_STAGES 16
#define MAX_SCANS 8
#define GROUP 8 /* images at most that pass through the last stage together */

typedef struct {
  const Network *network;
  int64_t batch, height, width;
  const float *images;
  int64_t strides[4];      /* of images, elements: (batch, channel, row, column) */
  float *maps[MAX_STAGES]; /* (batch, h, w, dim) of each stage that is wanted, else NULL; contiguous */
  int64_t stages;          /* how many to compute */
  int64_t map_dtype;
  int64_t instructions;    /* index of the operators' table, see ssmamba_plan_table */
  int64_t linear_instructions; /* of the table of norm_linear and branches, the same if products are not of int8 */
  int64_t threads, memory; /* memory: bytes that all threads' buffers may take before they share one image's */
  char *workspace;         /* ssmamba_plan_workspace bytes */
  Crew crew;               /* zeros */
} Run;

/* Sizes that follow from a run. */
typedef struct {
  const PlanOps *ops, *linear_ops;               /* linear_ops: of norm_linear and branches */
  int64_t height[MAX_STAGES], width[MAX_STAGES]; /* of each stage's map */
  int64_t group[MAX_STAGES];                     /* images that pass through it together */
  size_t x[MAX_STAGES];                          /* bytes of its map, for a group */
  size_t inner, scratch;                         /* bytes of what blocks keep between operators; of an operator's own */
  int64_t cache, shared, task_images;            /* shared: all threads take part in every operator */
} Sizes;

/* A thread's part of the workspace. */
typedef struct {
  Worker worker;
  const Run *run;
  const Sizes *sizes;
  char *x[MAX_STAGES], *inner;
  Crew *crew; /* NULL: alone */
} Place;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t rounded(int64_t a, int64_t grain) { return ceil_div(a, grain) * grain; }
static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
static size_t element(int64_t dtype) { return dtype == F32 ? 4 : 2; }

/* ---- instruction sets ---- */

#if HAS_X86
static int has_features(int32_t leaf, int reg, uint32_t wanted, int32_t sub) {
  uint32_t r[4];
  if (!__get_cpuid_count((uint32_t)leaf, (uint32_t)sub, r, r + 1, r + 2, r + 3)) return 0;
  return (r[reg] & wanted) == wanted;
}

static uint64_t saved_by_system(void) {
  uint32_t low, high;
  if (!has_features(1, 2, 1u << 27, 0)) return 0; /* OSXSAVE */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t)high << 32) | low;
}

static int has_avx2(void) {
  return (saved_by_system() & 0x6) == 0x6 && has_features(1, 2, 1u << 12 | 1u << 29, 0) && /* FMA, F16C */
         has_features(7, 1, 1u << 3 | 1u << 5 | 1u << 8, 0);                               /* BMI, AVX2, BMI2 */
}

static int has_avx512(void) {
  /* F, DQ, CD, BW, VL */
  return has_avx2() && (saved_by_system() & 0xe6) == 0xe6 &&
         has_features(7, 1, 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31, 0);
}

static int has_bf16(void) { return has_avx512() && has_features(7, 0, 1u << 5, 1); }

static int has_avx512_vnni(void) { return has_avx512() && has_features(7, 2, 1u << 11, 0); }

static int has_avx_vnni(void) { return has_avx2() && has_features(7, 0, 1u << 4, 1); }

/* Tiles, with the instruction for their products. Linux lets a process use them once it has asked. */
static int has_tiles(uint32_t products) {
  if (!has_bf16() || !has_features(7, 3, 1u << 24 | products, 0) || (saved_by_system() & 0x60000) != 0x60000) return 0;
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return 0;
#endif
}

static int has_amx(void) { return has_tiles(1u << 22); }
static int has_amx_int8(void) { return has_tiles(1u << 25); }
#endif

typedef struct {
  const char *name;
  const PlanOps *ops;
  int (*usable)(void);
} Table;

static int always(void) { return 1; }

/* From the simplest to the best; those of int8 after all others. */
static const Table TABLES[] = {
    {"generic", &ssmamba_plan_ops_generic, always},
#if HAS_X86
#if defined(SSMAMBA_EMULATE)
    {"avx2", &ssmamba_plan_ops_avx2, has_avx2},
    {"avx512", &ssmamba_plan_ops_avx512, has_avx2},
    {"avx512_bf16", &ssmamba_plan_ops_bf16, has_avx2},
    {"amx_bf16", &ssmamba_plan_ops_amx, has_avx2},
    {"avx_vnni", &ssmamba_plan_ops_avx_vnni, has_avx2},
    {"avx512_vnni", &ssmamba_plan_ops_avx512_vnni, has_avx2},
    {"amx_int8", &ssmamba_plan_ops_amx_int8, has_avx2},
#else
    {"avx2", &ssmamba_plan_ops_avx2, has_avx2},
    {"avx512", &ssmamba_plan_ops_avx512, has_avx512},
    {"avx512_bf16", &ssmamba_plan_ops_bf16, has_bf16},
    {"amx_bf16", &ssmamba_plan_ops_amx, has_amx},
    {"avx_vnni", &ssmamba_plan_ops_avx_vnni, has_avx_vnni},
    {"avx512_vnni", &ssmamba_plan_ops_avx512_vnni, has_avx512_vnni},
    {"amx_int8", &ssmamba_plan_ops_amx_int8, has_amx_int8},
#endif
#endif
};

typedef struct {
  char name[32];
  int64_t usable, panel, k_grain, products;
} TableFacts;

/* What there is at `index`; returns 0 beyond the last. */
int64_t ssmamba_plan_table(TableFacts *facts, int64_t index, int64_t unused) {
  (void)unused;
  if (index < 0 || index >= (int64_t)(sizeof TABLES / sizeof *TABLES)) return 0;
  const Table *table = &TABLES[index];
  memset(facts, 0, sizeof *facts);
  strncpy(facts->name, table->name, sizeof facts->name - 1);
  facts->usable = table->usable();
  facts->panel = table->ops->panel;
  facts->k_grain = table->ops->k_grain;
  facts->products = table->ops->products;
  return 1;
}

/* ---- sizes ---- */

static int64_t slabs(int64_t k) { return ceil_div(k, SLAB); }

/* Rows of a product's block at most: as many as fit into half the cache, `row_bytes` each beside the left side. */
static int64_t most_rows(const Sizes *s, const PlanOps *ops, int64_t k, size_t row_bytes) {
  const int64_t rows = s->cache / 2 / (slabs(k) * ops->slab_row + (int64_t)row_bytes), tile = ops->row_tile;
  return most(least(rows, 256) / tile * tile, tile);
}

/* The same for so many tokens: shares of a size, no small rest, and tasks for all threads. */
static int64_t block_rows(const Sizes *s, const PlanOps *ops, const Run *run, int64_t tokens, int64_t k,
                          size_t row_bytes) {
  const int64_t rows = most_rows(s, ops, k, row_bytes), tile = ops->row_tile;
  int64_t tasks = ceil_div(tokens, rows);
  if (s->shared) tasks = least(rounded(tasks, 2 * run->threads), ceil_div(tokens, tile));
  return least(rows, rounded(ceil_div(tokens, most(tasks, 1)), tile));
}

static size_t staged_bytes(const PlanOps *ops, int64_t rows, int64_t k) {
  return ops->products == BYTES ? aligned((size_t)(rows * rounded(k, 16)) * sizeof(float)) : 0;
}

/* Of a left side; `together` as for take_left. Rows of bytes are staged as floats and have facts. */
static size_t left_bytes(const PlanOps *ops, int64_t rows, int64_t k, int together) {
  rows = rounded(rows, ops->row_tile);
  size_t bytes = aligned((size_t)(slabs(k) * rows * ops->slab_row));
  if (ops->products == BYTES) bytes += aligned((size_t)rows * sizeof(RowFacts));
  return bytes + staged_bytes(ops, together ? rows : 1, k);
}

static size_t tile_bytes(const PlanOps *ops) { return (size_t)(ops->row_tile * ops->panel) * sizeof(float); }

/* Channels of a depthwise task: wide groups read memory in longer runs, narrow ones make more tasks. */
static int64_t depthwise_group(const Sizes *s, const Run *run, int64_t images, int64_t channels) {
  int64_t group = 64;
  while (s->shared && group > 16 && images * ceil_div(channels, group) < 2 * run->threads) group /= 2;
  return group;
}

/* Beside a row of the left side lie one of the hidden layer and one of the residual stream. */
static size_t branch_bytes(const PlanOps *ops, int64_t dim) {
  return (size_t)(ops->slab_row + dim * 4) + staged_bytes(ops, 1, SLAB);
}

static void grow(size_t *size, size_t other) { *size = *size > other ? *size : other; }

static void find_stage_scratch(Sizes *s, const Run *run, int64_t i) {
  const Stage *stage = &run->network->stage[i];
  const int64_t pixels = s->height[i] * s->width[i], dim = stage->dim;
  const PlanOps *ops = s->ops, *linear = s->linear_ops;
  const size_t tile = tile_bytes(ops), linear_tile = tile_bytes(linear);
  grow(&s->scratch, left_bytes(ops, most_rows(s, ops, stage->conv.k, 0), stage->conv.k, 0) + tile);
  grow(&s->scratch, left_bytes(linear, most_rows(s, linear, dim, 0), dim, 0) + linear_tile);
  const int64_t rows = most_rows(s, linear, dim, branch_bytes(linear, dim));
  grow(&s->scratch, left_bytes(linear, rows, dim, 0) + left_bytes(linear, rows, SLAB, 1) + linear_tile +
                        aligned((size_t)(dim + 16) * 4));
  grow(&s->scratch, (size_t)(3 * (s->width[i] + 2) * 64 + s->width[i] * 16) * 4);
  for (int64_t b = 0; b < stage->blocks; b++)
    for (int64_t k = 0; k < stage->block[b].scans; k++) {
      const Scan *scan = &stage->block[b].scan[k];
      grow(&s->scratch, left_bytes(ops, most_rows(s, ops, scan->width, 0), scan->width, 0) + tile);
      grow(&s->scratch, (size_t)pixels * (3 * 64 + 8) + 2 * (size_t)scan->states * 64 + 4 * 64);
    }
}

/* What a block keeps between its operators: u, the scans' results, and of each scale its pooled map and projections. */
static size_t block_bytes(const Sizes *s, const Run *run, int64_t i, const Block *block, int64_t images) {
  const int64_t height = s->height[i], width = s->width[i], dim = run->network->stage[i].dim;
  size_t bytes = aligned((size_t)(images * height * width * dim) * element(run->map_dtype));
  for (int64_t k = 0; k < block->scans; k++) {
    const Scan *scan = &block->scan[k];
    const int64_t tokens = images * ceil_div(height, scan->scale) * ceil_div(width, scan->scale);
    bytes += 2 * aligned((size_t)(tokens * scan->width) * element(run->map_dtype));
    bytes += aligned((size_t)(tokens * scan->x_proj.n) * sizeof(float));
  }
  return bytes;
}

static size_t place_bytes(const Sizes *s, const Run *run, int whole) {
  size_t bytes = aligned(s->scratch) + 64 * 64;
  if (!whole) return bytes;
  bytes += aligned(s->inner);
  for (int64_t i = 0; i < run->stages; i++) bytes += aligned(s->x[i]);
  return bytes;
}

static void find_group_sizes(Sizes *s, const Run *run, int64_t images) {
  const Network *network = run->network;
  s->inner = s->scratch = 0;
  for (int64_t i = run->stages - 1; i >= 0; i--) {
    const Stage *stage = &network->stage[i];
    const int64_t pixels = s->height[i] * s->width[i];
    const int64_t bytes = pixels * stage->dim * (4 + 2 * (int64_t)element(run->map_dtype));
    images = least(images, most(1, 2 * s->cache / bytes));
    s->group[i] = images;
    s->x[i] = (size_t)(images * pixels * stage->dim) * sizeof(float);
    for (int64_t b = 0; b < stage->blocks; b++) grow(&s->inner, block_bytes(s, run, i, &stage->block[b], images));
  }
  const int64_t stem_height = ceil_div(run->height, 2), stem_width = ceil_div(run->width, 2), dim = network->stem_dim;
  const int64_t tokens = s->group[0] * stem_height * stem_width;
  grow(&s->inner, (size_t)(tokens * dim) * element(run->map_dtype));
  const int64_t rows = most_rows(s, s->ops, network->conv1.k, (size_t)dim * 4);
  grow(&s->scratch, left_bytes(s->ops, rows, network->conv1.k, 0) + tile_bytes(s->ops) +
                        aligned((size_t)(rows * dim) * 4) + aligned((size_t)(network->conv1.k + 16) * 4));
  for (int64_t i = 0; i < run->stages; i++) find_stage_scratch(s, run, i);
}

static void find_sizes(Sizes *s, const Run *run) {
  memset(s, 0, sizeof *s);
  s->ops = TABLES[run->instructions].ops;
  s->linear_ops = TABLES[run->linear_instructions].ops;
  s->cache = 1 << 20;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (l2 >= 1 << 18) s->cache = least(l2, 1 << 22);
#endif
  int64_t height = ceil_div(run->height, 2), width = ceil_div(run->width, 2);
  for (int64_t i = 0; i < run->stages; i++) {
    s->height[i] = height = ceil_div(height, 2);
    s->width[i] = width = ceil_div(width, 2);
  }
  /* Each thread alone with its images, where these can be shared out without leaving many threads idle. */
  const int64_t turns = ceil_div(run->batch, run->threads);
  s->shared = run->threads > 1 && 5 * run->batch < 4 * turns * run->threads;
  if (!s->shared) {
    s->task_images = ceil_div(turns, ceil_div(turns, GROUP));
    find_group_sizes(s, run, s->task_images);
    if (run->threads == 1 || (int64_t)place_bytes(s, run, 1) * run->threads <= run->memory) return;
    s->shared = 1;
  }
  s->task_images = least(run->batch, GROUP);
  find_group_sizes(s, run, s->task_images);
}

int64_t ssmamba_plan_workspace(const Run *run, int64_t unused, int64_t unused2) {
  (void)unused, (void)unused2;
  Sizes s;
  find_sizes(&s, run);
  const size_t whole = place_bytes(&s, run, 1), small = place_bytes(&s, run, 0);
  return (int64_t)(64 + whole + (size_t)(run->threads - 1) * (s.shared ? small : whole));
}

static void take_place(Place *place, const Run *run, const Sizes *s, int64_t thread, Crew *crew) {
  memset(place, 0, sizeof *place);
  char *base = (char *)(((uintptr_t)run->workspace + 63) / 64 * 64);
  const size_t whole = place_bytes(s, run, 1), each = s->shared ? place_bytes(s, run, 0) : whole;
  if (thread > 0) base += whole + (size_t)(thread - 1) * each;
  place->run = run;
  place->sizes = s;
  place->crew = crew;
  place->worker.scratch = base;
  if (thread > 0 && s->shared) return;
  base += aligned(s->scratch) + 64 * 64;
  place->inner = base;
  base += aligned(s->inner);
  for (int64_t i = 0; i < run->stages; i++) {
    place->x[i] = base;
    base += aligned(s->x[i]);
  }
}

/* ---- the network ---- */

static void perform(Place *p, Operator operator, const void *args, int64_t tasks) {
  if (p->crew && tasks > 1) crew_run(p->crew, &p->worker, operator, args, tasks);
  else
    for (int64_t task = 0; task < tasks; task++) operator(args, &p->worker, task);
}

static void run_depthwise(Place *p, void *x, Depthwise w, int64_t images, int64_t i, int64_t dtype, int64_t silu) {
  const Sizes *s = p->sizes;
  const int64_t channels = p->run->network->stage[i].dim;
  const DepthwiseArgs args = {.batch = images, .height = s->height[i], .width = s->width[i], .channels = channels,
                              .group = depthwise_group(s, p->run, images, channels), .dtype = dtype, .silu = silu,
                              .x = x, .w = w};
  perform(p, s->ops->depthwise, &args, images * ceil_div(channels, args.group));
}

static void run_scan(Place *p, const void *u, const Scan *scan, int64_t images, int64_t i, char **inner, void **y) {
  const Run *run = p->run;
  const Sizes *s = p->sizes;
  const int64_t dim = run->network->stage[i].dim, dtype = run->map_dtype;
  const int64_t height = ceil_div(s->height[i], scan->scale), width = ceil_div(s->width[i], scan->scale);
  const int64_t tokens = images * height * width;
  const size_t map = aligned((size_t)(tokens * scan->width) * element(dtype));
  char *pooled = *inner;
  *y = pooled + map;
  float *projected = (float *)(pooled + 2 * map);
  *inner = (char *)projected + aligned((size_t)(tokens * scan->x_proj.n) * sizeof(float));
  const ScanInputArgs input = {.batch = images, .height = s->height[i], .width = s->width[i], .channels = dim,
                               .rows = block_rows(s, s->ops, run, tokens, scan->width, 0), .dtype = dtype, .u = u,
                               .scan = scan, .pooled = pooled, .projected = projected};
  perform(p, s->ops->scan_input, &input, ceil_div(tokens, input.rows));
  const int whole = scan->scale == 1;
  const ScanArgs args = {.batch = images, .height = height, .width = width, .dtype = dtype,
                         .pitch = whole ? dim : scan->width,
                         .v = whole ? (const char *)u + (size_t)scan->offset * element(dtype) : pooled,
                         .scan = scan, .projected = projected, .y = *y};
  perform(p, s->ops->scan, &args, images * ceil_div(scan->width, 16));
}

static void run_block(Place *p, float *x, const Block *block, int64_t images, int64_t i) {
  const Run *run = p->run;
  const Sizes *s = p->sizes;
  const int64_t dim = run->network->stage[i].dim, tokens = images * s->height[i] * s->width[i];
  const PlanOps *linear = s->linear_ops;
  char *inner = p->inner, *u = inner;
  inner += aligned((size_t)(tokens * dim) * element(run->map_dtype));
  run_depthwise(p, x, block->lpr, images, i, F32, 0);
  const NormLinearArgs project = {.tokens = tokens, .rows = block_rows(s, linear, run, tokens, dim, 0),
                                  .out_dtype = run->map_dtype, .eps = block->eps1, .x = x, .w = block->in_proj, .out = u};
  perform(p, linear->norm_linear, &project, ceil_div(tokens, project.rows));
  run_depthwise(p, u, block->conv, images, i, run->map_dtype, 1);
  void *y[MAX_SCANS];
  for (int64_t k = 0; k < block->scans; k++) run_scan(p, u, &block->scan[k], images, i, &inner, &y[k]);
  const BranchesArgs args = {.batch = images, .height = s->height[i], .width = s->width[i],
                             .rows = block_rows(s, linear, run, tokens, dim, branch_bytes(linear, dim)),
                             .dtype = run->map_dtype, .x = x, .dim = dim, .block = block, .y = (const void *const *)y};
  perform(p, linear->branches, &args, ceil_div(tokens, args.rows));
}

static void run_stem(Place *p, int64_t begin, int64_t images) {
  const Run *run = p->run;
  const Sizes *s = p->sizes;
  const int64_t tokens = images * ceil_div(run->height, 2) * ceil_div(run->width, 2);
  const Network *network = run->network;
  StemArgs args = {.batch = images, .height = run->height, .width = run->width, .channels = network->in_chans,
                   .rows = block_rows(s, s->ops, run, tokens, network->conv1.k, (size_t)network->stem_dim * 4),
                   .dtype = run->map_dtype, .x = run->images + begin * run->strides[0], .w = network->conv1,
                   .norm = network->norm1, .out = p->inner};
  memcpy(args.strides, run->strides, sizeof args.strides);
  perform(p, s->ops->stem, &args, ceil_div(tokens, args.rows));
}

/* Where stage i's maps of images [begin, ...) are computed: where they are wanted, else in the workspace. */
static float *map_of(const Place *p, int64_t i, int64_t begin) {
  const Sizes *s = p->sizes;
  if (!p->run->maps[i]) return (float *)p->x[i];
  return p->run->maps[i] + begin * s->height[i] * s->width[i] * p->run->network->stage[i].dim;
}

static void run_stage(Place *p, int64_t i, int64_t begin, int64_t images, float *x) {
  const Run *run = p->run;
  const Sizes *s = p->sizes;
  const Stage *stage = &run->network->stage[i];
  const int64_t pixels = s->height[i] * s->width[i], step = i > 0 ? s->group[i - 1] : images;
  for (int64_t done = 0; done < images; done += step) {
    const int64_t some = least(step, images - done), tokens = some * pixels;
    DownsampleArgs args = {.batch = some, .w = stage->conv, .norm = stage->norm, .out = x + done * pixels * stage->dim,
                           .rows = block_rows(s, s->ops, run, tokens, stage->conv.k, 0)};
    if (i == 0) {
      run_stem(p, begin + done, some);
      args.height = ceil_div(run->height, 2), args.width = ceil_div(run->width, 2);
      args.channels = run->network->stem_dim, args.dtype = run->map_dtype, args.x = p->inner;
    } else {
      float *before = map_of(p, i - 1, begin + done);
      run_stage(p, i - 1, begin + done, some, before);
      args.height = s->height[i - 1], args.width = s->width[i - 1];
      args.channels = run->network->stage[i - 1].dim, args.dtype = F32, args.x = before;
    }
    perform(p, s->ops->downsample, &args, ceil_div(tokens, args.rows));
  }
  for (int64_t b = 0; b < stage->blocks; b++) run_block(p, x, &stage->block[b], images, i);
}

static void run_images(Place *p, int64_t begin, int64_t images) {
  const int64_t last = p->run->stages - 1, step = p->sizes->group[last];
  for (int64_t done = 0; done < images; done += step) {
    const int64_t some = least(step, images - done);
    run_stage(p, last, begin + done, some, map_of(p, last, begin + done));
  }
}

/* A task: the images of one thread. Its worker is the first member of a Place. */
static void images_task(const void *args, Worker *worker, int64_t task) {
  Place *place = (Place *)(void *)((char *)worker - offsetof(Place, worker));
  const Run *run = args;
  const int64_t begin = task * place->sizes->task_images;
  Crew *crew = place->crew;
  place->crew = NULL;
  run_images(place, begin, least(place->sizes->task_images, run->batch - begin));
  place->crew = crew;
}

/* Threads [begin, end) of run->threads. Thread 0 leads; it alone can do all the work. */
int64_t ssmamba_plan_run(Run *run, int64_t begin, int64_t end) {
  Sizes sizes;
  find_sizes(&sizes, run);
  for (int64_t thread = begin; thread < end; thread++) {
    Place place;
    Crew *crew = run->threads > 1 ? &run->crew : NULL;
    take_place(&place, run, &sizes, thread, crew);
    if (thread > 0) {
      crew_follow(crew, &place.worker);
      continue;
    }
    if (sizes.shared || !crew) run_images(&place, 0, run->batch);
    else crew_run(crew, &place.worker, images_task, run, ceil_div(run->batch, sizes.task_images));
    if (crew) crew_over(crew);
  }
  return 0;
}

int64_t ssmamba_plan_run_bytes(const void *unused, int64_t unused2, int64_t unused3) {
  (void)unused, (void)unused2, (void)unused3;
  return sizeof(Run);
}
