// Cross-entropy of a frozen head, in float and double: -log softmax(h W^T)[target] of each position and its gradient for h,
// without materialising logits; and cross-entropy of existing logits, such as a trained head's, in two passes over them.
//
// The frozen head's gradient is softmax(h W^T) W - W[target]: attention over the vocabulary, so blocks of it are merged as
// flash attention merges its tiles (Dao et al. 2022, arXiv 2205.14135, section 3.1). A block of the head is copied into panels
// for both GEMMs, and all positions use it while it is in the caches. Each thread has its own positions, so results do not
// depend on the number of threads.
//
// Shapes: N positions, H hidden size, V vocabulary.

#include "panels.h"

namespace {

constexpr int64_t BLOCK = 256;     // of the vocabulary
constexpr int64_t ROWS = 96;       // positions whose scores are computed together, at most
constexpr int64_t PLACES = 4096;   // positions per pass over the head; their buffer is as large as their gradient

template <class T> constexpr int64_t LINE = BLOCK + WIDTH<T>;  // row stride of scores; a power of two would share cache sets

// The left side of the first GEMM: TILE positions of one hidden dimension are contiguous.
template <class T> void pack_places(const T* from, int64_t row, int64_t places, int64_t size, T* to) {
    for (int64_t k = 0; k < size; ++k)
        for (int64_t i = 0; i < TILE; ++i) to[k * TILE + i] = i < places ? from[i * row + k] : T(0);
}

template <class T> struct Place {
    T highest, total, right;  // maximum of its scores so far, sum of their exponentials, and the target's score
    T lost;                   // Kahan compensation of the total: each of the many blocks may add very little to it
};

// Updates its position's maximum and sum with one row of scores, and replaces the scores by exponentials. Returns the factor by
// which earlier sums must be multiplied.
template <class T> T turn(T* line, int64_t tokens, int64_t target, Place<T>& place) {
    for (int64_t v = tokens; v < BLOCK; ++v) line[v] = -INFINITY;
    if (target >= 0 && target < tokens) place.right = line[target];
    V<T> most = load(line), sum = {};
    for (int64_t v = WIDTH<T>; v < BLOCK; v += WIDTH<T>) {
        const V<T> next = load(line + v);
        most = next > most ? next : most;
    }
    T high = place.highest;
    for (int i = 0; i < WIDTH<T>; ++i) high = most[i] > high ? most[i] : high;
    for (int64_t v = 0; v < BLOCK; v += WIDTH<T>) {
        const V<T> each = exponential(load(line + v) - high);
        store(line + v, each);
        sum += each;
    }
    T added = 0;
    for (int i = 0; i < WIDTH<T>; ++i) added += sum[i];
    const T less = place.highest == -INFINITY ? T(0) : std::exp(place.highest - high);
    const T before = place.total * less, all_of_it = added - place.lost * less;
    place.total = before + all_of_it;
    place.lost = (place.total - before) - all_of_it;
    place.highest = high;
    return less;
}

template <class T> struct Problem {
    const T* hidden;
    int64_t row;  // row stride of hidden, in elements
    const T* head;
    const int64_t* targets;
    const T* weights;
    T *losses, *grad_hidden;
    int64_t places, size, vocabulary;
    int threads;
};

template <class T> struct Scratch {
    T *left = nullptr, *sums = nullptr, *columns = nullptr, *rows = nullptr, *scores = nullptr;
    Place<T>* place = nullptr;
    ~Scratch() { std::free(left), std::free(sums), std::free(columns), std::free(rows), std::free(scores), std::free(place); }
};

// Scores over one block of `count` positions (a multiple of TILE) that begin at `first`, and their part of the sums.
template <class T>
void block_of_places(const Problem<T>& p, const Scratch<T>& s, const T* columns, const T* rows, T* scores, int64_t first, int64_t count,
                     int64_t from, int64_t padded, const int64_t* targets, int64_t known) {
    const int64_t tokens = p.vocabulary - from < BLOCK ? p.vocabulary - from : BLOCK;
    for (int64_t n = 0; n < up(tokens, WIDE<T>); n += WIDE<T>)
        for (int64_t i = 0; i < count; i += TILE) {
            V<T> made[TILE][COLUMNS] = {};
            multiply<T, COLUMNS>({s.left + (first + i) * p.size, 1, TILE}, {columns + n * p.size, WIDE<T>, WIDTH<T>}, p.size, made);
            put<T, COLUMNS>(made, false, scores + i * LINE<T> + n, LINE<T>);
        }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t place = first + i;
        const T less = turn(scores + i * LINE<T>, tokens, place < known ? targets[place] - from : -1, s.place[place]);
        T* sums = s.sums ? s.sums + place * padded : nullptr;
        if (sums && from > 0 && less != 1)
            for (int64_t d = 0; d < padded; d += WIDTH<T>) store(sums + d, load(sums + d) * less);
    }
    if (!s.sums) return;
    for (int64_t n = 0; n < padded; n += WIDE<T>)
        for (int64_t i = 0; i < count; i += TILE) {
            V<T> made[TILE][COLUMNS] = {};
            multiply<T, COLUMNS>({scores + i * LINE<T>, LINE<T>, 1}, {rows + n * BLOCK, WIDE<T>, WIDTH<T>}, tokens, made);
            put<T, COLUMNS>(made, from > 0, s.sums + (first + i) * padded + n, padded);
        }
}

// Positions [begin, end): at most PLACES.
template <class T> int some_places(const Problem<T>& p, int64_t begin, int64_t end) {
    const int64_t known = end - begin, places = up(known, TILE), padded = up(p.size, WIDE<T>);
    const int64_t *targets = p.targets + begin, of_columns = BLOCK * p.size, of_rows = BLOCK * padded, of_scores = ROWS * LINE<T>;
    Scratch<T> s;
    s.left = take<T>(places * p.size);
    s.columns = take<T>(2 * of_columns);
    s.scores = take<T>(p.threads * of_scores);
    s.place = take<Place<T>>(places);
    if (!s.left || !s.columns || !s.scores || !s.place) return 1;
    if (p.grad_hidden && (!(s.sums = take<T>(places * padded)) || !(s.rows = take<T>(2 * of_rows)))) return 1;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < places; i += TILE) {
            const int64_t count = known - i < TILE ? known - i : TILE;
            pack_places(p.hidden + (begin + i) * p.row, p.row, count, p.size, s.left + i * p.size);
            for (int64_t j = i; j < i + TILE; ++j) s.place[j] = {-INFINITY, 0, 0, 0};
        }
        T* scores = s.scores + omp_get_thread_num() * of_scores;
        for (int64_t from = 0; from < p.vocabulary; from += BLOCK) {
            // Double buffering: no block is overwritten while another thread reads it.
            const int64_t odd = from / BLOCK % 2, tokens = p.vocabulary - from < BLOCK ? p.vocabulary - from : BLOCK;
            const int64_t columns_of = BLOCK / WIDE<T>, rows_of = s.sums ? padded / WIDE<T> : 0;
            T *columns = s.columns + odd * of_columns, *rows = s.sums ? s.rows + odd * of_rows : nullptr;
            const T* block = p.head + from * p.size;
#pragma omp for schedule(static)
            for (int64_t n = 0; n < columns_of + rows_of; ++n)
                if (n < columns_of)  // panels for h W^T, then for the exponentials times W
                    pack<T>({block, 1, p.size, 1}, 0, p.size, n * WIDE<T>, tokens, columns + n * WIDE<T> * p.size);
                else
                    pack<T>({block, p.size, 1, 1}, 0, tokens, (n - columns_of) * WIDE<T>, p.size, rows + (n - columns_of) * WIDE<T> * BLOCK);
            const int64_t tiles = places / TILE, me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
            const int64_t first = tiles * me / all_of_us * TILE, last = tiles * (me + 1) / all_of_us * TILE;
            for (int64_t i = first; i < last; i += ROWS)
                block_of_places(p, s, columns, rows, scores, i, last - i < ROWS ? last - i : ROWS, from, padded, targets, known);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < known; ++i) {
            const Place<T>& place = s.place[i];
            p.losses[begin + i] = std::log(place.total) + (place.highest - place.right);
            if (!s.sums) continue;
            const T *of_target = p.head + targets[i] * p.size, *sums = s.sums + i * padded, weight = p.weights[begin + i];
            const T share = weight / place.total;
            for (int64_t d = 0; d < p.size; ++d) p.grad_hidden[(begin + i) * p.size + d] = sums[d] * share - of_target[d] * weight;
        }
    }
    return 0;
}

template <class T> int cross_entropy(const Problem<T>& p) {
    const int64_t turns = (p.places + PLACES - 1) / PLACES;
    for (int64_t n = 0; n < turns; ++n)
        if (some_places(p, p.places * n / turns, p.places * (n + 1) / turns)) return 1;
    return 0;
}

// Rows of logits per maximum: their exponentials are summed after it is known.
constexpr int64_t SOME = 16;

// Maxima and sums (N, padded) of rows [begin, end) of logits (V, N). `lost` is the Kahan compensation of the sums.
template <class T>
void add_up(const T* logits, int64_t places, int64_t begin, int64_t end, T* highest, T* sums, T* lost) {
    for (int64_t v = begin; v < end; v += SOME) {
        const int64_t rows = end - v < SOME ? end - v : SOME;
        for (int64_t i = 0; i < places; i += WIDTH<T>) {
            const int64_t count = places - i < WIDTH<T> ? places - i : WIDTH<T>;
            V<T> some[SOME], most = load(highest + i), added = {};
            for (int64_t r = 0; r < rows; ++r) {
                some[r] = read(logits + (v + r) * places + i, count);
                most = some[r] > most ? some[r] : most;
            }
            const V<T> base = most > all(T(-INFINITY)) ? most : all(T(0));  // else infinities would give NaN
            const V<T> less = exponential(load(highest + i) - base);
            for (int64_t r = 0; r < rows; ++r) added += exponential(some[r] - base);
            const V<T> sum = load(sums + i) * less, all_of_it = added - load(lost + i) * less, total = sum + all_of_it;
            store(highest + i, most), store(sums + i, total), store(lost + i, (total - sum) - all_of_it);
        }
    }
}

// Losses of logits (V, N), which are overwritten by grad_logits if weights (N) are given. Each thread has its own rows; their
// sums are merged like those of blocks.
template <class T>
int from_logits(T* logits, const int64_t* targets, const T* weights, T* losses, int64_t places, int64_t vocabulary, int threads) {
    const int64_t padded = up(places, WIDTH<T>);
    const int64_t each = threads * padded;
    T* made = take<T>(3 * each + 2 * padded);
    if (!made) return 1;
    T *highest = made, *sums = made + each, *lost = made + 2 * each, *top = made + 3 * each, *share = top + padded;
    for (int64_t n = 0; n < each; ++n) highest[n] = -INFINITY, sums[n] = 0, lost[n] = 0;
    for (int64_t i = 0; i < places; ++i) losses[i] = logits[targets[i] * places + i];
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all_of_us = omp_get_num_threads();
        const int64_t begin = vocabulary * me / all_of_us, end = vocabulary * (me + 1) / all_of_us;
        add_up(logits, places, begin, end, highest + me * padded, sums + me * padded, lost + me * padded);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < places; ++i) {
            T high = -INFINITY, sum = 0;
            for (int64_t t = 0; t < threads; ++t) high = highest[t * padded + i] > high ? highest[t * padded + i] : high;
            for (int64_t t = 0; t < threads; ++t)
                if (sums[t * padded + i] != 0) sum += sums[t * padded + i] * std::exp(highest[t * padded + i] - high);
            losses[i] = std::log(sum) + (high - losses[i]);
            top[i] = high, share[i] = weights ? weights[i] / sum : 0;
        }
        for (int64_t v = begin; weights && v < end; ++v)
            for (int64_t i = 0; i < places; i += WIDTH<T>) {
                const int64_t count = places - i < WIDTH<T> ? places - i : WIDTH<T>;
                T* at = logits + v * places + i;
                write(at, exponential(read(at, count) - load(top + i)) * load(share + i), count);
            }
        for (int64_t i = 0; weights && i < places; ++i)
            if (targets[i] >= begin && targets[i] < end) logits[targets[i] * places + i] -= weights[i];
    }
    std::free(made);
    return 0;
}

}  // namespace

// losses (N) of hidden (N, H) with row stride `row`, head (V, H) and targets (N), each in [0, V). If grad_hidden (N, H) is not
// null, it receives the gradient of the losses' sum weighted by weights (N). Returns 0, or 1 if out of memory.
#define EXPORT(T)                                                                                                                \
    extern "C" int cross_entropy_##T(const T* hidden, int64_t row, const T* head, const int64_t* targets, const T* weights,      \
                                     T* losses, T* grad_hidden, int64_t places, int64_t size, int64_t vocabulary, int threads) { \
        return cross_entropy(Problem<T>{hidden, row, head, targets, weights, losses, grad_hidden, places, size, vocabulary, threads}); \
    }                                                                                                                            \
    extern "C" int from_logits_##T(T* logits, const int64_t* targets, const T* weights, T* losses, int64_t places,               \
                                   int64_t vocabulary, int threads) {                                                            \
        return from_logits(logits, targets, weights, losses, places, vocabulary, threads);                                       \
    }

EXPORT(float)
EXPORT(double)
