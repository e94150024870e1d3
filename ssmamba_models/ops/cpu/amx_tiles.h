/* Products by the tiles of AMX: four of sums (0 to 3), two of rows (4, 5), two of columns (6, 7). A file that includes
 * this defines TILE_SUM, the type of a sum, and TILE_DOT, the instruction; for emulation dot_words, what that adds. */
#define TILE static inline __attribute__((always_inline))

#if defined(SSMAMBA_EMULATE)
static _Thread_local struct {
  int begun;
  TILE_SUM sums[4][16][16];
} tiles;

TILE void tiles_begin(void) { tiles.begun = 1; }
TILE void tiles_end(void) { tiles.begun = 0; }
TILE void tile_zero_all(void) { memset(tiles.sums, 0, sizeof tiles.sums); }

static void tile_multiply(const void *rows, size_t row_bytes, const void *columns, size_t column_bytes) {
  if (!tiles.begun) __builtin_trap();
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++) {
        int32_t a, b;
        memcpy(&a, (const char *)rows + (size_t)(t / 2 * 16 + i) * row_bytes + k * 4, 4);
        for (int j = 0; j < 16; j++) {
          memcpy(&b, (const char *)columns + k * column_bytes + (size_t)(t % 2) * 64 + j * 4, 4);
          tiles.sums[t][i][j] += dot_words(a, b);
        }
      }
}

TILE void tile_store_all(TILE_SUM *out, size_t row_bytes) {
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < 16; i++)
      memcpy((char *)out + (size_t)(t / 2 * 16 + i) * row_bytes + (t % 2) * 64, tiles.sums[t][i], 64);
}
#else
/* Eight tiles of 16 rows of 64 bytes. */
static const struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} CONFIG __attribute__((aligned(64))) = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* The instructions' intrinsics do not tell compilers that they read and write memory. */
#define MEMORY_BARRIER __asm__ volatile("" ::: "memory")

TILE void tiles_begin(void) {
  MEMORY_BARRIER;
  _tile_loadconfig(&CONFIG);
}

TILE void tiles_end(void) { _tile_release(); }

TILE void tile_zero_all(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

TILE void tile_multiply(const void *rows, size_t row_bytes, const void *columns, size_t column_bytes) {
  _tile_loadd(6, columns, column_bytes);
  _tile_loadd(4, rows, row_bytes);
  TILE_DOT(0, 4, 6);
  _tile_loadd(7, (const char *)columns + 64, column_bytes);
  TILE_DOT(1, 4, 7);
  _tile_loadd(5, (const char *)rows + 16 * row_bytes, row_bytes);
  TILE_DOT(2, 5, 6);
  TILE_DOT(3, 5, 7);
}

TILE void tile_store_all(TILE_SUM *out, size_t row_bytes) {
  _tile_stored(0, out, row_bytes);
  _tile_stored(1, (char *)out + 64, row_bytes);
  _tile_stored(2, (char *)out + 16 * row_bytes, row_bytes);
  _tile_stored(3, (char *)out + 16 * row_bytes + 64, row_bytes);
  MEMORY_BARRIER;
}
#endif
