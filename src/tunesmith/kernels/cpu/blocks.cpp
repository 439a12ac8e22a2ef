// A decoder block's elementwise operators, one pass over memory each: norms, the gated activation, rotary embeddings.
//
// They compute in float32; inputs and outputs may be bfloat16, rounded once at the end.
// kernels/dispatch.py has the formulas. N rows of H elements; all tensors are contiguous except those of rotary.

#include "vectors.h"

namespace {

constexpr int64_t WIDE = WIDTH<float>;

// Calls what(place, count) for each vector of a row; the last one may be shorter.
template <class F> inline void for_vectors(int64_t size, F what) {
    int64_t at = 0;
    for (; at + WIDE <= size; at += WIDE) what(at, WIDE);
    if (at < size) what(at, size - at);
}

inline float sum(V<float> of) {
    float total = 0;
    for (int i = 0; i < WIDE; ++i) total += of[i];
    return total;
}

// 1 / (1 + e^-x)
inline V<float> logistic(V<float> x) { return 1.0f / (1.0f + exponential(-x)); }


template <class S>
void norm(const S* x, const S* weight, float epsilon, float offset, S* out, float* rstd, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        const S* from = x + r * size;
        V<float> squares = {};
        for_vectors(size, [&](int64_t at, int64_t count) {
            const V<float> each = read(from + at, count);
            squares += each * each;
        });
        rstd[r] = 1.0f / std::sqrt(sum(squares) / size + epsilon);
        for_vectors(size, [&](int64_t at, int64_t count) {
            write(out + r * size + at, read(from + at, count) * rstd[r] * (read(weight + at, count) + offset), count);
        });
    }
}

// Rows whose part of a weight's gradient is summed separately, so that each summand is not small compared with the total.
constexpr int64_t TOGETHER = 64;

// Gradients of x, and of weight if grad_weight (H) is not null: each thread sums its rows, then the threads' sums are added.
template <class S>
int norm_backward(const S* gradient, const S* x, const float* rstd, const S* weight, float offset, S* grad_x, float* grad_weight,
                int64_t rows, int64_t size, int threads) {
    const int64_t padded = up(size, WIDE);
    float* parts = grad_weight ? take<float>(2 * threads * padded) : nullptr;
    if (grad_weight && !parts) return 1;
    if (parts) std::memset(parts, 0, 2 * threads * padded * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
        const int64_t begin = rows * me / all_of_us, end = rows * (me + 1) / all_of_us;
        float *total = parts ? parts + me * padded : nullptr, *part = parts ? total + threads * padded : nullptr;
        for (int64_t r = begin; r < end; ++r) {
            const S *from = x + r * size, *grads = gradient + r * size;
            V<float> products = {};
            for_vectors(size, [&](int64_t at, int64_t count) {
                const V<float> each = read(grads + at, count) * read(from + at, count);
                products += each * (read(weight + at, count) + offset);
                if (part) store(part + at, load(part + at) + each * rstd[r]);
            });
            const float along = -sum(products) * rstd[r] * rstd[r] / size;
            for_vectors(size, [&](int64_t at, int64_t count) {
                const V<float> straight = read(grads + at, count) * (read(weight + at, count) + offset);
                write(grad_x + r * size + at, (straight + read(from + at, count) * along) * rstd[r], count);
            });
            if (part && ((r - begin) % TOGETHER == TOGETHER - 1 || r == end - 1))
                for (int64_t at = 0; at < padded; at += WIDE) {
                    store(total + at, load(total + at) + load(part + at));
                    store(part + at, V<float>{});
                }
        }
    }
    for (int64_t at = 0; parts && at < size; ++at) {
        grad_weight[at] = 0;
        for (int t = 0; t < threads; ++t) grad_weight[at] += parts[t * padded + at];
    }
    std::free(parts);
    return 0;
}

// The activation is SiLU: gate / (1 + e^-gate).
template <class S> void gated(const S* gate, const S* up, S* out, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r)
        for_vectors(size, [&](int64_t column, int64_t count) {
            const int64_t at = r * size + column;
            const V<float> x = read(gate + at, count);
            write(out + at, x * logistic(x) * read(up + at, count), count);
        });
}

template <class S>
void gated_backward(const S* gradient, const S* gate, const S* up, S* grad_gate, S* grad_up, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r)
        for_vectors(size, [&](int64_t column, int64_t count) {
            const int64_t at = r * size + column;
            const V<float> x = read(gate + at, count), grad = read(gradient + at, count), share = logistic(x);
            write(grad_gate + at, grad * read(up + at, count) * share * (1.0f + x * (1.0f - share)), count);
            write(grad_up + at, grad * x * share, count);
        });
}

// x cos + rotate_half(x) sin for x (B, A, L, D); `from` and `to` are the strides of x and of the result in the first three
// dimensions. cos and sin are (B, L, D). With `backwards`, takes the gradient of the result and computes that of x.
template <class S>
void rotary(const S* x, const int64_t* from, const S* cosines, const S* sines, S* out, const int64_t* to, int64_t batch, int64_t heads,
            int64_t length, int64_t size, int backwards, int threads) {
    const int64_t half = size / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t l = 0; l < length; ++l) {
            const S *cosine = cosines + (b * length + l) * size, *sine = sines + (b * length + l) * size;
            for (int64_t a = 0; a < heads; ++a) {
                const S* left = x + b * from[0] + a * from[1] + l * from[2];
                S* into = out + b * to[0] + a * to[1] + l * to[2];
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

}  // namespace

#define EXPORT(S)                                                                                                                \
    extern "C" void norm_##S(const S* x, const S* weight, float epsilon, float offset, S* out, float* rstd, int64_t rows,        \
                             int64_t size, int threads) {                                                                       \
        norm(x, weight, epsilon, offset, out, rstd, rows, size, threads);                                                        \
    }                                                                                                                            \
    extern "C" int norm_backward_##S(const S* gradient, const S* x, const float* rstd, const S* weight, float offset, S* grad_x,   \
                                   float* grad_weight, int64_t rows, int64_t size, int threads) {                                \
        return norm_backward(gradient, x, rstd, weight, offset, grad_x, grad_weight, rows, size, threads);                         \
    }                                                                                                                            \
    extern "C" void gated_##S(const S* gate, const S* up, S* out, int64_t rows, int64_t size, int threads) {                     \
        gated(gate, up, out, rows, size, threads);                                                                               \
    }                                                                                                                            \
    extern "C" void gated_backward_##S(const S* gradient, const S* gate, const S* up, S* grad_gate, S* grad_up, int64_t rows,      \
                                     int64_t size, int threads) {                                                                \
        gated_backward(gradient, gate, up, grad_gate, grad_up, rows, size, threads);                                               \
    }                                                                                                                            \
    extern "C" void rotary_##S(const S* x, const int64_t* from, const S* cosines, const S* sines, S* out, const int64_t* to,     \
                               int64_t batch, int64_t heads, int64_t length, int64_t size, int backwards, int threads) {         \
        rotary(x, from, cosines, sines, out, to, batch, heads, length, size, backwards, threads);                                \
    }

EXPORT(float)
EXPORT(bf16)
