// What a decoder block computes number by number, one pass over memory each, in float32: norms, the gated activation, rotations.
//
// Formulas are those of methods/elementwise.py. N rows of H numbers; all are contiguous but for the rotations'.

#include "vectors.h"

namespace {

constexpr int64_t WIDE = WIDTH<float>;

// Calls what(place, count) for each vector of a row; the last one may be shorter.
template <class F> inline void for_vectors(int64_t size, F what) {
    int64_t at = 0;
    for (; at + WIDE <= size; at += WIDE) what(at, WIDE);
    if (at < size) what(at, size - at);
}

inline V<float> read(const float* at, int64_t count) {
    if (count == WIDE) return load(at);
    V<float> made = {};
    for (int64_t i = 0; i < count; ++i) made[i] = at[i];
    return made;
}

inline void write(float* at, V<float> what, int64_t count) {
    if (count == WIDE) return store(at, what);
    for (int64_t i = 0; i < count; ++i) at[i] = what[i];
}

inline float sum(V<float> of) {
    float total = 0;
    for (int i = 0; i < WIDE; ++i) total += of[i];
    return total;
}

// 1 / (1 + e^-x)
inline V<float> logistic(V<float> x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace

extern "C" void norm(const float* x, const float* weight, float epsilon, float offset, float* out, float* root, int64_t rows,
                     int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const float* from = x + r * size;
        V<float> squares = {};
        for_vectors(size, [&](int64_t at, int64_t count) {
            const V<float> each = read(from + at, count);
            squares += each * each;
        });
        root[r] = 1.0f / std::sqrt(sum(squares) / size + epsilon);
        for_vectors(size, [&](int64_t at, int64_t count) {
            write(out + r * size + at, read(from + at, count) * root[r] * (read(weight + at, count) + offset), count);
        });
    }
}

extern "C" void norm_slopes(const float* gradient, const float* x, const float* root, const float* weight, float offset,
                            float* into_x, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const float *from = x + r * size, *slopes = gradient + r * size;
        V<float> products = {};
        for_vectors(size, [&](int64_t at, int64_t count) {
            products += read(slopes + at, count) * (read(weight + at, count) + offset) * read(from + at, count);
        });
        const float along = -sum(products) * root[r] * root[r] / size;
        for_vectors(size, [&](int64_t at, int64_t count) {
            const V<float> straight = read(slopes + at, count) * (read(weight + at, count) + offset);
            write(into_x + r * size + at, (straight + read(from + at, count) * along) * root[r], count);
        });
    }
}

// The activation is SiLU: gate / (1 + e^-gate).
extern "C" void gated(const float* gate, const float* up, float* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r)
        for_vectors(size, [&](int64_t column, int64_t count) {
            const int64_t at = r * size + column;
            const V<float> x = read(gate + at, count);
            write(out + at, x * logistic(x) * read(up + at, count), count);
        });
}

extern "C" void gated_slopes(const float* gradient, const float* gate, const float* up, float* into_gate, float* into_up,
                             int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r)
        for_vectors(size, [&](int64_t column, int64_t count) {
            const int64_t at = r * size + column;
            const V<float> x = read(gate + at, count), slope = read(gradient + at, count), share = logistic(x);
            write(into_gate + at, slope * read(up + at, count) * share * (1.0f + x * (1.0f - share)), count);
            write(into_up + at, slope * x * share, count);
        });
}

// x cos + rotate_half(x) sin for x (B, A, L, D), whose strides and the result's are given for the first three; cos and sin are
// (B, L, D). Backwards, what a gradient of it comes to for x.
extern "C" void rotary(const float* x, const int64_t* from, const float* cosines, const float* sines, float* out, const int64_t* to,
                       int64_t batch, int64_t heads, int64_t length, int64_t size, int backwards, int threads) {
    const int64_t half = size / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t l = 0; l < length; ++l) {
            const float *cosine = cosines + (b * length + l) * size, *sine = sines + (b * length + l) * size;
            for (int64_t a = 0; a < heads; ++a) {
                const float* left = x + b * from[0] + a * from[1] + l * from[2];
                float* into = out + b * to[0] + a * to[1] + l * to[2];
                for_vectors(half, [&](int64_t at, int64_t count) {
                    const V<float> one = read(left + at, count), two = read(left + half + at, count);
                    const V<float> low = read(sine + at, count), high = read(sine + half + at, count);
                    const V<float> first = backwards ? two * high : -(two * low), second = backwards ? -(one * low) : one * high;
                    write(into + at, one * read(cosine + at, count) + first, count);
                    write(into + half + at, two * read(cosine + half + at, count) + second, count);
                });
            }
        }
}
