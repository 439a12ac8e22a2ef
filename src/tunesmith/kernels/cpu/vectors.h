// Vectors based on GCC and Clang's vector extensions, as wide as the instruction set supports.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4;  // 32 registers: 24 sums, 4 columns, 1 row
#elif defined(__AVX__)
constexpr int BYTES = 32, COLUMNS = 2;  // 16 registers: 12 sums, 2 columns, 1 row
#else
constexpr int BYTES = 16, COLUMNS = 2;
#endif
constexpr int64_t TILE = 6;  // rows of a register tile

template <class T> struct Wide {};
template <> struct Wide<float> {
    typedef float V __attribute__((vector_size(BYTES)));
    typedef float Loose __attribute__((vector_size(BYTES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(BYTES)));
};
template <> struct Wide<double> {
    typedef double V __attribute__((vector_size(BYTES)));
    typedef double Loose __attribute__((vector_size(BYTES), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(BYTES)));
};
template <class T> using V = typename Wide<T>::V;
template <class T> constexpr int64_t WIDTH = BYTES / sizeof(T);

// A value that is stored as bfloat16, the upper half of a float, and computed with as float.
struct bf16 {
    uint16_t bits;
};
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef uint16_t Upper __attribute__((vector_size(BYTES / 2)));
typedef uint16_t LooseUpper __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));

inline V<float> widened(Upper bits) { return (V<float>)(__builtin_convertvector(bits, Bits) << 16); }
inline float widened(bf16 one) {
    const uint32_t bits = static_cast<uint32_t>(one.bits) << 16;
    float made;
    std::memcpy(&made, &bits, sizeof made);
    return made;
}
template <class T> inline T widened(T one) { return one; }

// Rounded to nearest, ties to even; NaN stays NaN.
inline Upper narrowed(V<float> what) {
    const Bits bits = (Bits)what, odd = bits >> 16 & 1, none = (Bits)(what != what);
    return __builtin_convertvector(((bits + 0x7fff + odd) >> 16 & ~none) | (none & 0x7fc0), Upper);
}

inline void keep(bf16* at, float what) {
    uint32_t bits;
    std::memcpy(&bits, &what, sizeof bits);
    at->bits = what == what ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
template <class T> inline void keep(T* at, T what) { *at = what; }

inline V<float> load(const bf16* at) { return widened((Upper)(*reinterpret_cast<const LooseUpper*>(at))); }
inline void store(bf16* at, V<float> what) { *reinterpret_cast<LooseUpper*>(at) = narrowed(what); }
template <class T> inline V<T> load(const T* at) { return *reinterpret_cast<const typename Wide<T>::Loose*>(at); }
template <class T> inline void store(T* at, V<T> what) { *reinterpret_cast<typename Wide<T>::Loose*>(at) = what; }

// Reads or writes a vector's first `count` elements. The others are read as 0, and are not written.
template <class S> inline auto read(const S* at, int64_t count) {
    constexpr int64_t WIDE = sizeof(load(at)) / sizeof(load(at)[0]);
    if (count == WIDE) return load(at);
    S some[WIDE] = {};
    std::memcpy(some, at, count * sizeof(S));
    return load(some);
}
template <class S, class F> inline void write(S* at, F what, int64_t count) {
    constexpr int64_t WIDE = sizeof(what) / sizeof(what[0]);
    if (count == WIDE) return store(at, what);
    S some[WIDE];
    store(some, what);
    std::memcpy(at, some, count * sizeof(S));
}

template <class T> inline V<T> all(T one) { return one - V<T>{}; }
inline int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// A matrix whose columns are grouped into vectors: `row` is the row stride, `vector` the stride between vectors of one row.
template <class T> struct Right { const T* at; int64_t row, vector; };
template <class T> struct Left { const T* at; int64_t row, column; };

// Adds to sums the product of TILE rows of a with N vectors of columns of b; sums should stay in registers.
template <class T, int N> inline void multiply(Left<T> a, Right<T> b, int64_t depth, V<T> (&sums)[TILE][N]) {
    for (int64_t k = 0; k < depth; ++k) {
        V<T> right[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) right[n] = load(b.at + k * b.row + n * b.vector);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; ++i) {
            const V<T> left = all(a.at[i * a.row + k * a.column]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[i][n] += left * right[n];
        }
    }
}

// c = or += sums; `row` is c's row stride.
template <class T, int N> inline void put(const V<T> (&sums)[TILE][N], bool add, T* c, int64_t row) {
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            T* at = c + i * row + n * WIDTH<T>;
            store(at, add ? load(at) + sums[i][n] : sums[i][n]);
        }
}

// Uninitialised memory aligned to a cache line, or null; release it with free().
template <class T> T* take(int64_t count) {
    return static_cast<T*>(std::aligned_alloc(64, up((count > 0 ? count : 1) * sizeof(T), 64)));
}

// 2^(x (times + rest)), accurate to one or two ulps; 0 below 2^-126, and NaN stays NaN. The exponent must stay below 128.
inline V<float> power(V<float> x, float times = 1, float rest = 0) {
    typedef Wide<float>::I I;
    const V<float> low = all(-127.0f / times), magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to a whole number
    x = x < low ? low : x;
    const V<float> whole = (x * times + magic) - magic;
    const V<float> f = (x * times - whole) + x * rest;
    V<float> p = all(1.525273380405984e-5f);
    p = p * f + 1.540353039338161e-4f;
    p = p * f + 1.333355814642844e-3f;
    p = p * f + 9.618129107628477e-3f;
    p = p * f + 5.550410866482158e-2f;
    p = p * f + 2.402265069591007e-1f;
    p = p * f + 6.931471805599453e-1f;
    p = p * f + 1.0f;
    const I exponent = __builtin_convertvector(whole, I) << 23;
    const I drop = whole < all(-126.5f);
    return (V<float>)(((I)p + exponent) & ~drop);
}
inline V<double> power(V<double> x) {
    for (int i = 0; i < WIDTH<double>; ++i) x[i] = std::exp2(x[i]);
    return x;
}

// e^x; in float, x is clamped to at most 88.
inline V<float> exponential(V<float> x) {
    const V<float> high = all(88.0f);
    x = x > high ? high : x;
    return power(x, 1.44269502162933349609375f, 1.92596299112661746887e-8f);  // log2(e) in two parts
}
inline V<double> exponential(V<double> x) {
    for (int i = 0; i < WIDTH<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

}  // namespace
