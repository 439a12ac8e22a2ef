// A GEMM plus a low-rank GEMM, accumulated in registers, in float32: low = x P, out = x M + low Q.
//
// A linear layer with an adapter is M = W^T, P = A^T, Q = scale B^T. The gradient of its input is M = W, P = scale B, Q = A,
// with the gradient of its output as x. So the low-rank GEMMs cost only their FLOPs and no extra pass over memory. Blocks of M
// and Q are copied into panels. Each thread has its own rows, so results do not depend on the number of threads.
//
// Shapes: T tokens, K columns of x, N columns of M, R rank.

#include "panels.h"

namespace {

constexpr int64_t DEPTH = 1600;                   // columns of x that are multiplied before sums are stored, at most
constexpr int64_t OF_ROWS = 1 << 16;              // elements of x that stay in the L2 cache
constexpr int64_t OF_PANELS = 1 << 20;            // elements of all panels, about: a part of the last-level cache

// One tile of c = or += a b + low q, N vectors of columns wide; b and q are panels.
template <int N>
inline void tile(Left<float> a, const float* b, int64_t depth, Left<float> low, const float* q, int64_t rank, bool add, int64_t rows,
                 int64_t columns, float* c, int64_t row) {
    V<float> sums[TILE][N] = {};
    multiply<float, N>(a, {b, WIDE<float>, WIDTH<float>}, depth, sums);
    if (rank > 0) multiply<float, N>(low, {q, WIDE<float>, WIDTH<float>}, rank, sums);
    put_part(sums, rows, columns, add, c, row);
}

inline void any_tile(Left<float> a, const float* b, int64_t depth, Left<float> low, const float* q, int64_t rank, bool add,
                     int64_t rows, int64_t columns, float* c, int64_t row) {
    switch (up(columns, WIDTH<float>) / WIDTH<float>) {
        case 1: return tile<1>(a, b, depth, low, q, rank, add, rows, columns, c, row);
        case 2: return tile<2>(a, b, depth, low, q, rank, add, rows, columns, c, row);
        case 3: return tile<(COLUMNS > 2 ? 3 : 2)>(a, b, depth, low, q, rank, add, rows, columns, c, row);
        default: return tile<COLUMNS>(a, b, depth, low, q, rank, add, rows, columns, c, row);
    }
}

struct Problem {
    const float* x;
    int64_t x_row, tokens, numbers;
    Matrix<float> m, p, q;
    int64_t columns, rank;
    float *low, *out;
    bool add;
    int threads;
};

// The input of a tile of rows that begins at `row`: the rows themselves, or a zero-padded copy if there are fewer than TILE.
Left<float> rows_of(const float* from, int64_t stride, int64_t row, int64_t rows, int64_t first, int64_t count, float* spare) {
    if (rows == TILE) return {from + row * stride + first, stride, 1};
    for (int64_t i = 0; i < TILE; ++i)
        for (int64_t k = 0; k < count; ++k) spare[i * count + k] = i < rows ? from[(row + i) * stride + first + k] : 0.0f;
    return {spare, count, 1};
}

int product(const Problem& p) {
    const int64_t turns = (p.numbers + DEPTH - 1) / DEPTH, depth = (p.numbers + turns - 1) / turns;
    const int64_t low_panels = up(p.rank, WIDE<float>) / WIDE<float>, all_panels = up(p.columns, WIDE<float>) / WIDE<float>;
    const int64_t of_panel = (depth + p.rank) * WIDE<float>;
    int64_t at_once = OF_PANELS / of_panel;
    at_once = at_once < 1 ? 1 : at_once > all_panels ? all_panels : at_once;
    int64_t block = OF_ROWS / depth / TILE * TILE;
    block = block < 2 * TILE ? 2 * TILE : block;
    const int64_t of_spare = TILE * (depth + p.rank);
    float *panels = take<float>(at_once * of_panel), *low_of = take<float>(low_panels * depth * WIDE<float>);
    float* spare = take<float>(p.threads * of_spare);
    if (!panels || !low_of || !spare) {
        std::free(panels), std::free(low_of), std::free(spare);
        return 1;
    }
#pragma omp parallel num_threads(p.threads)
    {
        float *own = spare + omp_get_thread_num() * of_spare, *own_low = own + TILE * depth;
        const int64_t tiles = up(p.tokens, TILE) / TILE, me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
        const int64_t begin = tiles * me / all_of_us * TILE;
        const int64_t end = tiles * (me + 1) / all_of_us * TILE < p.tokens ? tiles * (me + 1) / all_of_us * TILE : p.tokens;
        for (int64_t k = 0; k < p.numbers; k += depth) {
            const int64_t deep = p.numbers - k < depth ? p.numbers - k : depth;
            const bool last = k + deep == p.numbers;
            for (int64_t n = 0; n < all_panels; n += at_once) {
                const int64_t some = all_panels - n < at_once ? all_panels - n : at_once;
                const int64_t lows = n == 0 ? low_panels : 0;
#pragma omp for schedule(static)
                for (int64_t j = 0; j < some + lows; ++j) {
                    if (j >= some) {
                        pack(p.p, k, deep, (j - some) * WIDE<float>, p.rank, low_of + (j - some) * depth * WIDE<float>);
                        continue;
                    }
                    pack(p.m, k, deep, (n + j) * WIDE<float>, p.columns, panels + j * of_panel);
                    if (last) pack(p.q, 0, p.rank, (n + j) * WIDE<float>, p.columns, panels + j * of_panel + depth * WIDE<float>);
                }
                for (int64_t i = begin; i < end; i += block) {
                    const int64_t until = i + block < end ? i + block : end;
                    for (int64_t j = 0; j < lows; ++j)
                        for (int64_t t = i; t < until; t += TILE) {
                            const int64_t rows = until - t < TILE ? until - t : TILE, wide = p.rank - j * WIDE<float>;
                            any_tile(rows_of(p.x, p.x_row, t, rows, k, deep, own), low_of + j * depth * WIDE<float>, deep, {}, nullptr, 0,
                                     k > 0, rows, wide < WIDE<float> ? wide : WIDE<float>, p.low + t * p.rank + j * WIDE<float>, p.rank);
                        }
                    for (int64_t j = 0; j < some; ++j)
                        for (int64_t t = i; t < until; t += TILE) {
                            const int64_t rows = until - t < TILE ? until - t : TILE, wide = p.columns - (n + j) * WIDE<float>;
                            const float* panel = panels + j * of_panel;
                            any_tile(rows_of(p.x, p.x_row, t, rows, k, deep, own), panel, deep,
                                     rows_of(p.low, p.rank, t, rows, 0, p.rank, own_low), panel + depth * WIDE<float>, last ? p.rank : 0,
                                     p.add || k > 0, rows, wide < WIDE<float> ? wide : WIDE<float>, p.out + t * p.columns + (n + j) * WIDE<float>,
                                     p.columns);
                        }
                }
#pragma omp barrier
            }
        }
    }
    std::free(panels), std::free(low_of), std::free(spare);
    return 0;
}

}  // namespace

// low (T, R) = x P and out (T, N) = or += x M + low Q for x (T, K) with row stride x_row. `matrices` has the row and column
// strides of M (K, N), P (K, R) and Q (R, N). Returns 0, or 1 if out of memory.
extern "C" int adapted(const float* x, int64_t x_row, const float* m, const float* p, const float* q, const int64_t* matrices,
                       float p_times, float q_times, float* low, float* out, int add, int64_t tokens, int64_t numbers,
                       int64_t columns, int64_t rank, int threads) {
    const int64_t* s = matrices;
    return product({x, x_row, tokens, numbers, {m, s[0], s[1], 1.0f}, {p, s[2], s[3], p_times}, {q, s[4], s[5], q_times}, columns, rank,
                    low, out, add != 0, threads});
}
