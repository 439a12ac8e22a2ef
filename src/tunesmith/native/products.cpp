// A weight's gradient, g^T x, in float32: what oneDNN computes after a transposed copy of g is read in place here.
//
// Blocks of both are copied into panels that a register tile reads one after the other (Goto and van de Geijn 2008, "Anatomy of
// high-performance matrix multiplication", section 4). The result is the same for each number of threads: depth is not divided.

#include "vectors.h"

namespace {

constexpr int64_t WIDE = WIDTH<float> * COLUMNS;  // columns of a tile
constexpr int64_t DEPTH = 512;  // of a block; 96 rows of it fill a fifth of a second-level cache
constexpr int64_t ROWS = 96;    // of a block, at the most

// Columns [first, first + count) of `depth` rows, `WIDE_` at a time and zeros behind the last one.
template <int64_t WIDE_> void pack(const float* from, int64_t row, int64_t first, int64_t count, int64_t depth, float* to) {
    if (count >= WIDE_) {
        for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * WIDE_, from + k * row + first, WIDE_ * sizeof(float));
        return;
    }
    for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(to + k * WIDE_, from + k * row + first, count * sizeof(float));
        std::memset(to + k * WIDE_ + count, 0, (WIDE_ - count) * sizeof(float));
    }
}

// Columns [first, first + count) of `depth` rows, TILE at a time, each tile DEPTH rows long: row by row, as they lie in memory.
void pack_tiles(const float* from, int64_t row, int64_t first, int64_t count, int64_t depth, float* to) {
    constexpr int64_t AHEAD = 8;  // rows that memory has time for
    const int64_t whole = count / TILE * TILE;
    for (int64_t k = 0; k < depth; ++k) {
        const float* at = from + k * row + first;
        if (k + AHEAD < depth)
            for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(at + AHEAD * row + i);
        for (int64_t i = 0; i < whole; i += TILE) std::memcpy(to + i * DEPTH + k * TILE, at + i, TILE * sizeof(float));
        for (int64_t i = whole; i < up(count, TILE); ++i) to[whole * DEPTH + k * TILE + i - whole] = i < count ? at[i] : 0.0f;
    }
}

// Asks for a tile of c before it is needed.
inline void fetch(const float* c, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < COLUMNS; ++j) __builtin_prefetch(c + i * row + j * WIDTH<float>, 1);
}

// A tile at the edges of c, where it is not whole: as put().
void put_part(const V<float> (&sums)[TILE][COLUMNS], int64_t rows, int64_t columns, bool add, float* c, int64_t row) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            const float sum = sums[i][j / WIDTH<float>][j % WIDTH<float>];
            c[i * row + j] = add ? c[i * row + j] + sum : sum;
        }
}

// Columns [first, last) of out (R, N) = left^T right; `packed` is left, TILE columns of DEPTH rows after one another.
void thin_part(const float* packed, int64_t rank, const float* right, int64_t right_row, int64_t tokens, int64_t first, int64_t last,
               float* spare, float* out, int64_t columns) {
    const int64_t filled = up(rank, TILE);
    for (int64_t k = 0; k < tokens; k += DEPTH) {
        const int64_t depth = tokens - k < DEPTH ? tokens - k : DEPTH;
        for (int64_t n = first; n < last; n += WIDE) {
            Right<float> from{right + k * right_row + n, right_row, WIDTH<float>};
            if (last - n < WIDE) {
                pack<WIDE>(right + k * right_row, right_row, n, last - n, depth, spare);
                from = {spare, WIDE, WIDTH<float>};
            }
            for (int64_t i = 0; i < rank; i += TILE) {
                V<float> sums[TILE][COLUMNS] = {};
                multiply<float, COLUMNS>({packed + k * filled + i * depth, 1, TILE}, from, depth, sums);
                float* to = out + i * columns + n;
                if (rank - i >= TILE && last - n >= WIDE)
                    put<float, COLUMNS>(sums, k > 0, to, columns);
                else
                    put_part(sums, rank - i < TILE ? rank - i : TILE, last - n < WIDE ? last - n : WIDE, k > 0, to, columns);
            }
        }
    }
}

}  // namespace

// out (R, N) = left^T right for left (T, R) and right (T, N), whose rows lie so many numbers apart; for a small R, as right is
// read once and in place. Returns 0, or 1 where memory is short.
extern "C" int thin_across_rows(const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
                                int64_t tokens, int64_t rank, int64_t columns, int threads) {
    const int64_t filled = up(rank, TILE);
    float *packed = take<float>(tokens * filled), *spare = take<float>(threads * DEPTH * WIDE);
    if (!packed || !spare) {
        std::free(packed), std::free(spare);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < tokens; k += DEPTH) {
            const int64_t depth = tokens - k < DEPTH ? tokens - k : DEPTH;
            for (int64_t i = 0; i < rank; i += TILE)
                pack<TILE>(left + k * left_row, left_row, i, rank - i, depth, packed + k * filled + i * depth);
        }
        const int64_t panels = up(columns, WIDE) / WIDE, me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
        const int64_t first = panels * me / all_of_us * WIDE, last = panels * (me + 1) / all_of_us * WIDE;
        thin_part(packed, rank, right, right_row, tokens, first, last < columns ? last : columns, spare + me * DEPTH * WIDE, out, columns);
    }
    std::free(packed), std::free(spare);
    return 0;
}

// out (O, I) = g^T x for g (T, O) and x (T, I), whose rows lie g_row and x_row numbers apart. Returns 0, or 1 where memory is short.
extern "C" int across_rows(const float* g, int64_t g_row, const float* x, int64_t x_row, float* out, int64_t tokens, int64_t rows,
                           int64_t columns, int threads) {
    const int64_t wide = up(columns, WIDE), turns = up(rows, threads * ROWS) / ROWS;
    const int64_t block = up((rows + turns - 1) / turns, TILE);  // the same number of blocks for each thread
    float *right = take<float>(DEPTH * wide), *left = take<float>(threads * DEPTH * block);
    if (!right || !left) {
        std::free(right), std::free(left);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0; k < tokens; k += DEPTH) {
        const int64_t depth = tokens - k < DEPTH ? tokens - k : DEPTH;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < wide; n += WIDE)
            pack<WIDE>(x + k * x_row, x_row, n, columns - n, depth, right + n * DEPTH);
        float* own = left + omp_get_thread_num() * DEPTH * block;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m += block) {
            const int64_t end = m + block < rows ? m + block : rows;
            pack_tiles(g + k * g_row, g_row, m, end - m, depth, own);
            for (int64_t n = 0; n < wide; n += WIDE)
                for (int64_t i = m; i < end; i += TILE) {
                    if (k > 0) fetch(out + i * columns + n, columns, end - i < TILE ? end - i : TILE);
                    V<float> sums[TILE][COLUMNS] = {};
                    multiply<float, COLUMNS>({own + (i - m) * DEPTH, 1, TILE}, {right + n * DEPTH, WIDE, WIDTH<float>}, depth, sums);
                    float* to = out + i * columns + n;
                    if (end - i >= TILE && columns - n >= WIDE)
                        put<float, COLUMNS>(sums, k > 0, to, columns);
                    else
                        put_part(sums, end - i < TILE ? end - i : TILE, columns - n < WIDE ? columns - n : WIDE, k > 0, to, columns);
                }
        }
    }
    std::free(right), std::free(left);
    return 0;
}
