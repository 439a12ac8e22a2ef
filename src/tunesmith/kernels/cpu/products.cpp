// A weight's gradient, g^T x, in float32. oneDNN would first make a transposed copy of g; here g is read in place.
//
// Blocks of both are copied into panels. The result does not depend on the number of threads: depth is not split.

#include "panels.h"

namespace {

constexpr int64_t DEPTH = 512;  // of a block; 96 rows of it fill a fifth of an L2 cache
constexpr int64_t ROWS = 96;    // of a block, at most

// Prefetches a tile of c.
inline void fetch(const float* c, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < COLUMNS; ++j) __builtin_prefetch(c + i * row + j * WIDTH<float>, 1);
}

// Columns [first, last) of out (R, N) = left^T right; `packed` is left in consecutive tiles of TILE columns by DEPTH rows.
void thin_part(const float* packed, int64_t rank, const float* right, int64_t right_row, int64_t tokens, int64_t first, int64_t last,
               float* spare, float* out, int64_t columns) {
    const int64_t filled = up(rank, TILE);
    for (int64_t k = 0; k < tokens; k += DEPTH) {
        const int64_t depth = tokens - k < DEPTH ? tokens - k : DEPTH;
        for (int64_t n = first; n < last; n += WIDE<float>) {
            Right<float> from{right + k * right_row + n, right_row, WIDTH<float>};
            if (last - n < WIDE<float>) {
                pack<float>({right, right_row, 1, 1}, k, depth, n, last, spare);
                from = {spare, WIDE<float>, WIDTH<float>};
            }
            for (int64_t i = 0; i < rank; i += TILE) {
                V<float> sums[TILE][COLUMNS] = {};
                multiply<float, COLUMNS>({packed + k * filled + i * depth, 1, TILE}, from, depth, sums);
                put_part(sums, rank - i, last - n, k > 0, out + i * columns + n, columns);
            }
        }
    }
}

}  // namespace

// out (R, N) = left^T right for left (T, R) and right (T, N) with row strides left_row and right_row. For small R, since right
// is read once and in place. Returns 0, or 1 if out of memory.
extern "C" int thin_across_rows(const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
                                int64_t tokens, int64_t rank, int64_t columns, int threads) {
    const int64_t filled = up(rank, TILE);
    float *packed = take<float>(tokens * filled), *spare = take<float>(threads * DEPTH * WIDE<float>);
    if (!packed || !spare) {
        std::free(packed), std::free(spare);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < tokens; k += DEPTH) {
            const int64_t depth = tokens - k < DEPTH ? tokens - k : DEPTH;
            pack_tiles(left + k * left_row, left_row, 0, rank, depth, packed + k * filled, depth);
        }
        const int64_t panels = up(columns, WIDE<float>) / WIDE<float>, me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
        const int64_t first = panels * me / all_of_us * WIDE<float>, last = panels * (me + 1) / all_of_us * WIDE<float>;
        thin_part(packed, rank, right, right_row, tokens, first, last < columns ? last : columns, spare + me * DEPTH * WIDE<float>, out, columns);
    }
    std::free(packed), std::free(spare);
    return 0;
}

// out (O, I) = g^T x for g (T, O) and x (T, I) with row strides g_row and x_row. Returns 0, or 1 if out of memory.
extern "C" int across_rows(const float* g, int64_t g_row, const float* x, int64_t x_row, float* out, int64_t tokens, int64_t rows,
                           int64_t columns, int threads) {
    const int64_t wide = up(columns, WIDE<float>), turns = up(rows, threads * ROWS) / ROWS;
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
        for (int64_t n = 0; n < wide; n += WIDE<float>)
            pack<float>({x, x_row, 1, 1}, k, depth, n, columns, right + n * DEPTH);
        float* own = left + omp_get_thread_num() * DEPTH * block;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m += block) {
            const int64_t end = m + block < rows ? m + block : rows;
            pack_tiles(g + k * g_row, g_row, m, end - m, depth, own, DEPTH);
            for (int64_t n = 0; n < wide; n += WIDE<float>)
                for (int64_t i = m; i < end; i += TILE) {
                    if (k > 0) fetch(out + i * columns + n, columns, end - i < TILE ? end - i : TILE);
                    V<float> sums[TILE][COLUMNS] = {};
                    multiply<float, COLUMNS>({own + (i - m) * DEPTH, 1, TILE}, {right + n * DEPTH, WIDE<float>, WIDTH<float>}, depth, sums);
                    put_part(sums, end - i, columns - n, k > 0, out + i * columns + n, columns);
                }
        }
    }
    std::free(right), std::free(left);
    return 0;
}
