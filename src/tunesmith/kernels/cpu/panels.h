// Blocks of matrices, packed so that a register tile reads them contiguously (Goto and van de Geijn 2008, "Anatomy of
// high-performance matrix multiplication", section 4).

#pragma once

#include "vectors.h"

namespace {

template <class T> constexpr int64_t WIDE = WIDTH<T> * COLUMNS;  // columns of a panel

template <class T> struct Matrix {
    const T* at;
    int64_t row, column;  // strides
    T times;
};

// Rows [from, from + depth) and columns [first, first + WIDE) of m, zero-padded after the last of `columns`.
template <class T> void pack(const Matrix<T>& m, int64_t from, int64_t depth, int64_t first, int64_t columns, T* to) {
    const int64_t count = columns - first < WIDE<T> ? columns - first : WIDE<T>;
    const T* at = m.at + from * m.row + first * m.column;
    if (m.column == 1) {
        for (int64_t k = 0; k < depth; ++k) {
            T* row = to + k * WIDE<T>;
            for (int64_t j = 0; j < count; ++j) row[j] = at[k * m.row + j] * m.times;
            for (int64_t j = count > 0 ? count : 0; j < WIDE<T>; ++j) row[j] = 0;
        }
        return;
    }
    constexpr int64_t STEP = 16;  // rows of all columns that stay in the L1 cache
    for (int64_t k = 0; k < depth; k += STEP) {
        const int64_t end = k + STEP < depth ? k + STEP : depth;
        for (int64_t j = 0; j < WIDE<T>; ++j)
            for (int64_t each = k; each < end; ++each)
                to[each * WIDE<T> + j] = j < count ? at[each * m.row + j * m.column] * m.times : T(0);
    }
}

// Packs columns [first, first + count) of `depth` rows into tiles of TILE columns; each tile starts `apart` tile rows after the
// previous one. Reads row by row, in memory order.
template <class T> void pack_tiles(const T* from, int64_t row, int64_t first, int64_t count, int64_t depth, T* to, int64_t apart) {
    constexpr int64_t AHEAD = 8;  // prefetch distance in rows
    const int64_t whole = count / TILE * TILE;
    for (int64_t k = 0; k < depth; ++k) {
        const T* at = from + k * row + first;
        if (k + AHEAD < depth)
            for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(at + AHEAD * row + i);
        for (int64_t i = 0; i < whole; i += TILE) std::memcpy(to + i * apart + k * TILE, at + i, TILE * sizeof(T));
        for (int64_t i = whole; i < up(count, TILE); ++i) to[whole * apart + k * TILE + i - whole] = i < count ? at[i] : T(0);
    }
}

// As put(), but c may end after `rows` rows or `columns` columns of the tile.
template <class T, int N>
inline void put_part(const V<T> (&sums)[TILE][N], int64_t rows, int64_t columns, bool add, T* c, int64_t row) {
    if (rows >= TILE && columns >= N * WIDTH<T>) return put<T, N>(sums, add, c, row);
    for (int64_t i = 0; i < rows && i < TILE; ++i)
        for (int64_t j = 0; j < columns && j < N * WIDTH<T>; ++j) {
            const T sum = sums[i][j / WIDTH<T>][j % WIDTH<T>];
            c[i * row + j] = add ? c[i * row + j] + sum : sum;
        }
}

}  // namespace
