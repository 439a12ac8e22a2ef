// Attention along a prefix tree, for CPUs: softmax(q k^T scale) v, forward and backward, in float and double.
// Inputs and outputs may be bfloat16 if it computes in float.
//
// A block is a stretch of a node's tokens with all query heads that share one key head: its rows are (token, head). Its keys
// are the node's ancestors' and the node's own up to each token. They are processed in chunks that fit the L2 cache, and chunks
// are merged as flash attention merges its tiles (Dao et al. 2022, arXiv 2205.14135, section 3.1). GEMMs are register tiles
// over GCC and Clang's vector extensions, so one source serves each instruction set.
//
// Shapes: H heads, H_kv key/value heads, G = H / H_kv, T tokens, D head size. Results are deterministic for a given number of
// threads: sums have a fixed order.

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 48;    // rows of a block, about
constexpr int64_t CHUNK = 256;  // keys of a chunk

template <class T, int N, bool ADD>
inline void tile(Left<T> a, Right<T> b, int64_t depth, T* c, int64_t c_row) {
    V<T> sums[TILE][N] = {};
    multiply<T, N>(a, b, depth, sums);
    put<T, N>(sums, ADD, c, c_row);
}

// The part of a GEMM that a tile of rows needs: its columns (in vectors), and the depth range [from, to).
struct Extent { int64_t vectors, from, to; };

// c = or += a b; `rows` is padded to a multiple of TILE, and extent(row) is what the tile that begins at `row` needs.
template <class T, bool ADD, class E>
void product(int64_t rows, int64_t vectors, Left<T> a, Right<T> b, T* c, int64_t c_row, E extent) {
    for (int64_t n = 0; n < vectors; n += COLUMNS)
        for (int64_t i = 0; i < rows; i += TILE) {
            const Extent needed = extent(i);
            const int64_t left = needed.vectors - n, depth = needed.to - needed.from;
            if (left <= 0 || depth <= 0) continue;
            const Left<T> from{a.at + i * a.row + needed.from * a.column, a.row, a.column};
            const Right<T> right{b.at + n * b.vector + needed.from * b.row, b.row, b.vector};
            T* to = c + i * c_row + n * WIDTH<T>;
            switch (left) {
                case 1: tile<T, 1, ADD>(from, right, depth, to, c_row); break;
                case 2: tile<T, 2, ADD>(from, right, depth, to, c_row); break;
                case 3: tile<T, (COLUMNS > 2 ? 3 : 2), ADD>(from, right, depth, to, c_row); break;
                default: tile<T, COLUMNS, ADD>(from, right, depth, to, c_row);
            }
        }
}

struct Node { int64_t start, end, subtree_end; };
struct Block { int64_t node, first, last, before; };  // tokens [first, last), and the total cost of all earlier blocks
struct Panel { int64_t first, count; };            // the tokens in one vector of packed keys

template <class T, class S> struct Problem {  // computed in T, stored as S
    int64_t heads, shared, tokens, size, nodes;
    const Node* node;
    T scale;
    const S *query, *key, *value;
    int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides
    int threads;

    // Set by prepare():
    int64_t group = 0, padded = 0, rows = 0, blocks = 0, panels = 0, cost = 0;
    Block* block = nullptr;
    Panel* panel = nullptr;
    int64_t *first_panel = nullptr, *parent = nullptr;
    T *key_panels = nullptr, *value_panels = nullptr, *key_rows = nullptr, *value_rows = nullptr;

    ~Problem() {
        std::free(block), std::free(panel), std::free(first_panel), std::free(parent);
        std::free(key_panels), std::free(value_panels), std::free(key_rows), std::free(value_rows);
    }
};

template <class T, class S> bool prepare(Problem<T, S>& p, bool backward) {
    p.group = p.heads / p.shared;
    p.padded = up(p.size, WIDTH<T>);
    const int64_t tokens_of_block = p.group < ROWS ? ROWS / p.group : 1;
    p.rows = up(tokens_of_block * p.group, TILE);
    p.first_panel = take<int64_t>(p.nodes);
    p.parent = take<int64_t>(p.nodes);
    if (!p.first_panel || !p.parent) return false;
    for (int64_t n = 0; n < p.nodes; ++n) {
        const int64_t length = p.node[n].end - p.node[n].start;
        p.first_panel[n] = p.panels;
        p.panels += up(length, WIDTH<T>) / WIDTH<T>;
        p.blocks += up(length, tokens_of_block) / tokens_of_block;
        int64_t above = n - 1;  // depth-first order: the parent is the last node whose subtree contains this one
        while (above >= 0 && p.node[above].subtree_end <= p.node[n].start) above = p.parent[above];
        p.parent[n] = above;
    }
    p.block = take<Block>(p.blocks);
    p.panel = take<Panel>(p.panels);
    if (!p.block || !p.panel) return false;
    int64_t block = 0, panel = 0;
    for (int64_t n = 0; n < p.nodes; ++n) {
        const Node& node = p.node[n];
        int64_t above = 0;  // keys of all ancestors
        for (int64_t each = p.parent[n]; each >= 0; each = p.parent[each]) above += p.node[each].end - p.node[each].start;
        for (int64_t t = node.start; t < node.end; t += tokens_of_block) {
            const int64_t last = t + tokens_of_block < node.end ? t + tokens_of_block : node.end;
            p.block[block++] = {n, t, last, p.cost};
            p.cost += (above + last - node.start) * (last - t);  // keys times tokens
        }
        for (int64_t t = node.start; t < node.end; t += WIDTH<T>)
            p.panel[panel++] = {t, node.end - t < WIDTH<T> ? node.end - t : WIDTH<T>};
    }
    const int64_t packed = p.shared * p.panels * WIDTH<T> * p.size;
    p.key_panels = take<T>(packed);
    if (!p.key_panels) return false;
    if (backward && !(p.value_panels = take<T>(packed))) return false;
    if (p.padded != p.size || !std::is_same<T, S>::value) {
        p.value_rows = take<T>(p.shared * p.tokens * p.padded);
        if (!p.value_rows) return false;
        if (backward && !(p.key_rows = take<T>(p.shared * p.tokens * p.padded))) return false;
    }
    return true;
}

// Keys or values transposed: WIDTH tokens of one head dimension are contiguous, zero-padded after a node's last token.
template <class T, class S> void pack(const Problem<T, S>& p, const S* from, int64_t head, int64_t token, T* to) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p.shared; ++h)
        for (int64_t n = 0; n < p.panels; ++n) {
            const Panel& panel = p.panel[n];
            T* at = to + (h * p.panels + n) * WIDTH<T> * p.size;
            for (int64_t j = 0; j < WIDTH<T>; ++j) {
                const S* row = from + h * head + (panel.first + j) * token;
                if (j < panel.count)
                    for (int64_t d = 0; d < p.size; ++d) at[d * WIDTH<T> + j] = widened(row[d]);
                else
                    for (int64_t d = 0; d < p.size; ++d) at[d * WIDTH<T> + j] = 0;
            }
        }
}

// Copies rows padded to whole vectors, if the head size is not a multiple of one or the stored dtype differs.
template <class T, class S> void fill(const Problem<T, S>& p, const S* from, int64_t head, int64_t token, T* to) {
    if (!to) return;
#pragma omp for collapse(2) schedule(static)
    for (int64_t h = 0; h < p.shared; ++h)
        for (int64_t t = 0; t < p.tokens; ++t) {
            T* at = to + (h * p.tokens + t) * p.padded;
            for (int64_t d = 0; d < p.size; ++d) at[d] = widened(from[h * head + t * token + d]);
            std::memset(at + p.size, 0, (p.padded - p.size) * sizeof(T));
        }
}

template <class T, class S>
Right<T> rows_of(const Problem<T, S>& p, const T* filled, const S* plain, int64_t head, int64_t token, int64_t h, int64_t t) {
    if constexpr (std::is_same<T, S>::value)
        if (!filled) return {plain + h * head + t * token, token, WIDTH<T>};
    return {filled + (h * p.tokens + t) * p.padded, p.padded, WIDTH<T>};
}

// A block's rows (token, head) of one tensor, multiplied by a scalar.
template <class T, class S>
void gather(const Problem<T, S>& p, const S* from, int64_t head, int64_t token, int64_t h, const Block& b, T times, T* to) {
    int64_t row = 0;
    for (int64_t t = b.first; t < b.last; ++t)
        for (int64_t g = 0; g < p.group; ++g, ++row) {
            const S* at = from + (h * p.group + g) * head + t * token;
            T* into = to + row * p.padded;
            for (int64_t d = 0; d < p.size; ++d) into[d] = widened(at[d]) * times;
            for (int64_t d = p.size; d < p.padded; ++d) into[d] = 0;
        }
    std::memset(to + row * p.padded, 0, (p.rows - row) * p.padded * sizeof(T));
}

// Calls what(first token, keys, first panel, whether they belong to the block's own node) for each chunk, starting at the root.
template <class T, class S, class F> void for_chunks(const Problem<T, S>& p, const Block& b, F what) {
    int64_t path[64], depth = 0, node = b.node;
    // Deep trees are walked from the node up in stretches of 64; the order of chunks affects only rounding.
    for (; node >= 0; node = p.parent[node]) {
        path[depth++] = node;
        if (depth == 64 || p.parent[node] < 0) {
            while (depth > 0) {
                const int64_t n = path[--depth];
                const bool own = n == b.node;
                const int64_t start = p.node[n].start, end = own ? b.last : p.node[n].end;
                for (int64_t t = start; t < end; t += CHUNK)
                    what(t, end - t < CHUNK ? end - t : CHUNK, p.first_panel[n] + (t - start) / WIDTH<T>, own);
            }
        }
    }
}

// How many of a chunk's `keys`, the first of which is token `first`, a block's row attends to.
template <class T, class S> int64_t seen_by(const Problem<T, S>& p, const Block& b, int64_t row, int64_t first, int64_t keys, bool own) {
    const int64_t before = b.first + row / p.group - first + 1;
    if (!own || before > keys) return keys;
    return before > 0 ? before : 0;
}

constexpr int64_t SPARE = 16;  // columns after a chunk: rows of a transposed GEMM are padded to a multiple of TILE
template <class T> constexpr int64_t LINE = CHUNK + (WIDTH<T> > SPARE ? WIDTH<T> : SPARE);

template <class T, class S>
void forward_block(const Problem<T, S>& p, int64_t h, const Block& b, T* scratch, S* out, T* weight) {
    const T log2e = T(1.4426950408889634), ln2 = T(0.6931471805599453);
    T* query = scratch;
    T* sums = query + p.rows * p.padded;
    T* scores = sums + p.rows * p.padded;
    T* highest = scores + p.rows * LINE<T>;
    T* total = highest + p.rows;
    const int64_t rows = up((b.last - b.first) * p.group, TILE);
    gather(p, p.query, p.query_head, p.query_token, h, b, p.scale * log2e, query);
    std::memset(sums, 0, rows * p.padded * sizeof(T));
    for (int64_t r = 0; r < rows; ++r) highest[r] = -INFINITY, total[r] = 0;
    for_chunks(p, b, [&](int64_t first, int64_t keys, int64_t panel, bool own) {
        const int64_t vectors = up(keys, WIDTH<T>) / WIDTH<T>, step = WIDTH<T> * p.size;
        const auto seen_of_tile = [&](int64_t row) { return seen_by(p, b, row + TILE - 1, first, keys, own); };
        product<T, false>(rows, vectors, {query, p.padded, 1}, {p.key_panels + (h * p.panels + panel) * step, WIDTH<T>, step}, scores,
                          LINE<T>, [&](int64_t row) { return Extent{up(seen_of_tile(row), WIDTH<T>) / WIDTH<T>, 0, p.size}; });
        for (int64_t r = 0; r < rows; ++r) {
            T* line = scores + r * LINE<T>;
            const int64_t seen = seen_by(p, b, r, first, keys, own);
            for (int64_t k = seen; k < vectors * WIDTH<T>; ++k) line[k] = -INFINITY;
            if (seen == 0) {
                for (int64_t k = 0; k < vectors * WIDTH<T>; ++k) line[k] = 0;
                continue;
            }
            const int64_t upto = up(seen, WIDTH<T>);
            V<T> most = load(line);
            for (int64_t k = WIDTH<T>; k < upto; k += WIDTH<T>) {
                const V<T> next = load(line + k);
                most = next > most ? next : most;
            }
            T high = highest[r];
            for (int i = 0; i < WIDTH<T>; ++i) high = most[i] > high ? most[i] : high;
            V<T> sum = {};
            for (int64_t k = 0; k < upto; k += WIDTH<T>) {
                const V<T> each = power(load(line + k) - high);
                store(line + k, each);
                sum += each;
            }
            for (int64_t k = upto; k < vectors * WIDTH<T>; ++k) line[k] = 0;
            T added = 0;
            for (int i = 0; i < WIDTH<T>; ++i) added += sum[i];
            if (highest[r] == -INFINITY) {
                total[r] = added;
            } else {
                const T less = std::exp2(highest[r] - high);
                total[r] = total[r] * less + added;
                if (less != 1)
                    for (int64_t d = 0; d < p.padded; d += WIDTH<T>) store(sums + r * p.padded + d, load(sums + r * p.padded + d) * less);
            }
            highest[r] = high;
        }
        product<T, true>(rows, p.padded / WIDTH<T>, {scores, LINE<T>, 1},
                         rows_of(p, p.value_rows, p.value, p.value_head, p.value_token, h, first), sums, p.padded,
                         [&](int64_t row) { return Extent{p.padded / WIDTH<T>, 0, seen_of_tile(row)}; });
    });
    int64_t row = 0;
    for (int64_t t = b.first; t < b.last; ++t)
        for (int64_t g = 0; g < p.group; ++g, ++row) {
            const int64_t place = t * p.heads + h * p.group + g;
            const T one = 1 / total[row];
            for (int64_t d = 0; d < p.size; ++d) keep(out + place * p.size + d, sums[row * p.padded + d] * one);
            weight[place] = highest[row] * ln2 + std::log(total[row]);
        }
}

template <class T, class S> int forward(Problem<T, S>& p, S* out, T* weight) {
    if (!prepare(p, false)) return 1;
    const int64_t each = up(p.rows * (2 * p.padded + LINE<T> + 2), 64);
    T* scratch = take<T>(each * p.threads);
    if (!scratch) return 1;
#pragma omp parallel num_threads(p.threads)
    {
        pack(p, p.key, p.key_head, p.key_token, p.key_panels);
        fill(p, p.value, p.value_head, p.value_token, p.value_rows);
        T* own = scratch + each * omp_get_thread_num();
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t h = 0; h < p.shared; ++h)
            for (int64_t b = p.blocks - 1; b >= 0; --b) forward_block(p, h, p.block[b], own, out, weight);
    }
    std::free(scratch);
    return 0;
}

template <class T, class S> struct Upstream {
    const S* gradient;
    int64_t head, token;
    const S* out;     // (T, H, D)
    const T* weight;  // (T, H)
    S* grad_query;    // (T, H, D)
};

template <class T, class S>
void backward_block(const Problem<T, S>& p, const Upstream<T, S>& u, int64_t h, const Block& b, T* scratch, T* grad_key, T* grad_value) {
    const T log2e = T(1.4426950408889634);
    T* query = scratch;
    T* gradient = query + p.rows * p.padded;
    T* sums = gradient + p.rows * p.padded;
    T* scores = sums + p.rows * p.padded;
    T* grads = scores + p.rows * LINE<T>;
    T* weight = grads + p.rows * LINE<T>;
    T* delta = weight + p.rows;
    const int64_t rows = up((b.last - b.first) * p.group, TILE);
    gather(p, p.query, p.query_head, p.query_token, h, b, p.scale * log2e, query);
    gather(p, u.gradient, u.head, u.token, h, b, T(1), gradient);
    std::memset(sums, 0, rows * p.padded * sizeof(T));
    for (int64_t r = 0; r < rows; ++r) {
        weight[r] = delta[r] = 0;
        if (r >= (b.last - b.first) * p.group) continue;
        const int64_t place = (b.first + r / p.group) * p.heads + h * p.group + r % p.group;
        weight[r] = u.weight[place] * log2e;
        for (int64_t d = 0; d < p.size; ++d) delta[r] += gradient[r * p.padded + d] * widened(u.out[place * p.size + d]);
    }
    for_chunks(p, b, [&](int64_t first, int64_t keys, int64_t panel, bool own) {
        const int64_t vectors = up(keys, WIDTH<T>) / WIDTH<T>, step = WIDTH<T> * p.size, from = (h * p.panels + panel) * step;
        const auto seen_of_tile = [&](int64_t row) { return seen_by(p, b, row + TILE - 1, first, keys, own); };
        const auto to_keys = [&](int64_t row) { return Extent{up(seen_of_tile(row), WIDTH<T>) / WIDTH<T>, 0, p.size}; };
        product<T, false>(rows, vectors, {query, p.padded, 1}, {p.key_panels + from, WIDTH<T>, step}, scores, LINE<T>, to_keys);
        product<T, false>(rows, vectors, {gradient, p.padded, 1}, {p.value_panels + from, WIDTH<T>, step}, grads, LINE<T>, to_keys);
        for (int64_t r = 0; r < rows; ++r) {
            T *line = scores + r * LINE<T>, *grad = grads + r * LINE<T>;
            const int64_t seen = seen_by(p, b, r, first, keys, own);
            const int64_t upto = up(seen, WIDTH<T>);
            for (int64_t k = 0; k < upto; k += WIDTH<T>) {
                const V<T> chance = power(load(line + k) - weight[r]);
                store(line + k, chance);
                store(grad + k, chance * (load(grad + k) - delta[r]));
            }
            for (int64_t k = seen; k < up(keys, TILE); ++k) line[k] = grad[k] = 0;
        }
        const int64_t wide = p.padded / WIDTH<T>;
        product<T, true>(rows, wide, {grads, LINE<T>, 1}, rows_of(p, p.key_rows, p.key, p.key_head, p.key_token, h, first), sums,
                         p.padded, [&](int64_t row) { return Extent{wide, 0, seen_of_tile(row)}; });
        const auto from_rows = [&](int64_t key) {  // starts at the first row that attends to the key
            const int64_t before = own && first + key > b.first ? (first + key - b.first) * p.group : 0;
            return Extent{wide, before, rows};
        };
        product<T, true>(up(keys, TILE), wide, {grads, 1, LINE<T>}, {query, p.padded, WIDTH<T>}, grad_key + first * p.padded,
                         p.padded, from_rows);
        product<T, true>(up(keys, TILE), wide, {scores, 1, LINE<T>}, {gradient, p.padded, WIDTH<T>},
                         grad_value + first * p.padded, p.padded, from_rows);
    });
    int64_t row = 0;
    for (int64_t t = b.first; t < b.last; ++t)
        for (int64_t g = 0; g < p.group; ++g, ++row) {
            S* at = u.grad_query + (t * p.heads + h * p.group + g) * p.size;
            for (int64_t d = 0; d < p.size; ++d) keep(at + d, sums[row * p.padded + d] * p.scale);
        }
}

template <class T, class S> int backward(Problem<T, S>& p, const Upstream<T, S>& u, S* grad_key, S* grad_value) {
    if (!prepare(p, true)) return 1;
    // A head's blocks are split into runs of about equal cost, each with its own sums for keys and values.
    int64_t runs = 1;
    while (runs < 8 && runs < p.blocks && p.shared * runs % p.threads != 0) ++runs;
    const int64_t of_run = (p.tokens + TILE) * p.padded;
    const int64_t each = up(p.rows * (3 * p.padded + 2 * LINE<T> + 2), 64);
    T* scratch = take<T>(each * p.threads);
    T* sums = take<T>(2 * p.shared * runs * of_run);
    int64_t* cuts = take<int64_t>(runs + 1);
    if (!scratch || !sums || !cuts) {
        std::free(scratch), std::free(sums), std::free(cuts);
        return 1;
    }
    int64_t run = 0;
    for (int64_t b = 0; b < p.blocks; ++b)
        while (run < runs && p.block[b].before * runs >= p.cost * run) cuts[run++] = b;
    while (run <= runs) cuts[run++] = p.blocks;
#pragma omp parallel num_threads(p.threads)
    {
        pack(p, p.key, p.key_head, p.key_token, p.key_panels);
        pack(p, p.value, p.value_head, p.value_token, p.value_panels);
        fill(p, p.key, p.key_head, p.key_token, p.key_rows);
        T* own = scratch + each * omp_get_thread_num();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < p.shared * runs; ++unit) {
            T* to = sums + 2 * unit * of_run;
            std::memset(to, 0, 2 * of_run * sizeof(T));
            for (int64_t b = cuts[unit % runs]; b < cuts[unit % runs + 1]; ++b)
                backward_block(p, u, unit / runs, p.block[b], own, to, to + of_run);
        }
        const T ln2 = T(0.6931471805599453);  // queries were multiplied by scale log2(e)
#pragma omp for collapse(2) schedule(static)
        for (int64_t t = 0; t < p.tokens; ++t)
            for (int64_t h = 0; h < p.shared; ++h) {
                const int64_t to = (t * p.shared + h) * p.size;
                for (int64_t d = 0; d < p.size; d += WIDTH<T>) {
                    V<T> key = {}, value = {};
                    for (int64_t run = 0; run < runs; ++run) {
                        const T* from = sums + 2 * (h * runs + run) * of_run + t * p.padded + d;
                        key += load(from), value += load(from + of_run);
                    }
                    key *= ln2;
                    for (int64_t i = 0; i < WIDTH<T> && d + i < p.size; ++i) {
                        keep(grad_key + to + d + i, key[i]);
                        keep(grad_value + to + d + i, value[i]);
                    }
                }
            }
    }
    std::free(scratch), std::free(sums), std::free(cuts);
    return 0;
}

}  // namespace

// Strides are in elements; nodes is (count, 3): start, end, subtree_end. They return 0, or 1 if out of memory.
#define GIVEN(S)                                                                                                                 \
    const int64_t *sizes, const int64_t *strides, const int64_t *nodes, double scale, const S *query, const S *key, const S *value
#define PROBLEM(T, S)                                                                                                            \
    Problem<T, S> p {                                                                                                            \
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], reinterpret_cast<const Node*>(nodes), T(scale), query, key, value,     \
            strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], threads                                      \
    }
#define EXPORT(T, S)                                                                                                             \
    extern "C" int tree_forward_##S(GIVEN(S), S* out, T* weight, int threads) {                                                  \
        PROBLEM(T, S);                                                                                                           \
        return forward(p, out, weight);                                                                                          \
    }                                                                                                                            \
    extern "C" int tree_backward_##S(GIVEN(S), const S* gradient, const S* out, const T* weight, S* grad_query, S* grad_key,     \
                                     S* grad_value, int threads) {                                                               \
        PROBLEM(T, S);                                                                                                           \
        return backward(p, Upstream<T, S>{gradient, strides[6], strides[7], out, weight, grad_query}, grad_key, grad_value);     \
    }

EXPORT(float, float)
EXPORT(double, double)
EXPORT(float, bf16)
