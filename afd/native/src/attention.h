// Paged attention for decode and chunked prefill, with any number of query heads on a KV head.
//
// One layer's cache is [block, KV head] pieces of block_size tokens. Keys lie in groups of GROUP tokens, dimension by
// dimension, so that one vector holds the same dimension of many tokens and scores need no sum across lanes; values
// lie token by token. Both keep the DEPTH neighbours of the inner dimension of their product side by side. A row is
// one query of one head; its operations are the same whatever rows and sequences it is computed with.
//
// Slots past a sequence's end may hold anything: scores there are replaced, and `write_kv` clears the one value past
// the end that a pair would read.
#pragma once
#include <vector>

#include "gemm.h"

constexpr int GROUP = 16;        // tokens
constexpr int SPAN = 4 * GROUP;  // tokens of one turn of the softmax
constexpr int ROWS_AT_ONCE = 8 * MAX_ROWS;

struct Heads {
    int64_t heads, kv_heads, dim, block_size;
    int64_t piece() const { return block_size * dim; }
};

// One step's tokens; see afd.layers.attention.base.AttentionBatch. All pointers are to int64.
struct Step {
    int64_t tokens, sequences, table_stride, block_size;
    const int64_t *query_starts, *context_lens, *block_tables, *slots, *positions;
};

template <class T>
INLINE int64_t key_offset(int64_t token, int64_t dim) {  // of dimension 0; dimension d is at d / DEPTH · GROUP · DEPTH
    return token / GROUP * GROUP * dim + token % GROUP * DEPTH<T>;
}

template <class T>
INLINE int64_t value_offset(int64_t token, int64_t dim) {  // of dimension 0; dimension d is at d · DEPTH
    return token / DEPTH<T> * dim * DEPTH<T> + token % DEPTH<T>;
}

// k and v of one token and KV head, [dim], to slot `token` of a piece.
inline void write_kv(const float* k, const float* v, float* key_piece, float* value_piece, int64_t token, int64_t dim) {
    float* to = key_piece + key_offset<float>(token, dim);
    for (int64_t d = 0; d < dim; d++) to[d * GROUP] = k[d];
    std::memcpy(value_piece + value_offset<float>(token, dim), v, dim * sizeof(float));
}

inline void write_kv(const bf16* k, const bf16* v, bf16* key_piece, bf16* value_piece, int64_t token, int64_t dim) {
    bf16* to = key_piece + key_offset<bf16>(token, dim);
    for (int64_t d = 0; d < dim; d += 2) store(to + d * GROUP, load<uint32_t>(k + d));
    // Two tokens share a word. The second is not there when the first is written, since tokens come in order: cleared.
    uint32_t* words = (uint32_t*)(value_piece + token / 2 * dim * 2);
    for (int64_t d = 0; d < dim; d += LANES) {
        VecWord word = __builtin_convertvector(load<VecHalf>(v + d), VecWord);
        store(words + d, token % 2 ? (load<VecWord>(words + d) & 0xffff) | word << 16 : word);
    }
}

// Fetches, for writing, what write_kv will touch.
template <class T>
INLINE void expect_kv(const T* key_piece, const T* value_piece, int64_t token, int64_t dim) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t i = 0; i < GROUP * dim; i += LINE) __builtin_prefetch(key_piece + token / GROUP * GROUP * dim + i, 1, 2);
    for (int64_t i = 0; i < DEPTH<T> * dim; i += LINE)
        __builtin_prefetch(value_piece + token / DEPTH<T> * dim * DEPTH<T> + i, 1, 2);
}

// The rows of one (sequence, KV head) that are computed together, and their running softmax.
template <class T>
struct Rows {
    int64_t count = 0;
    T* q;          // [count, dim]
    float* out;    // [count, dim], not yet divided by `total`
    float best[ROWS_AT_ONCE], total[ROWS_AT_ONCE];
    int64_t visible[ROWS_AT_ONCE];  // tokens each row may see; never falls from row to row
};

// The cache lines of the next turn's pieces, fetched four at a time as this one's work goes on.
struct Ahead {
    const char* pieces[2 * SPAN / GROUP];
    int64_t piece_bytes = 0, at = 0;
    int64_t every = 1, done = 0;  // rows · vectors of a product's steps
    int piece = 2 * SPAN / GROUP;
    INLINE void operator()(int work) {
        if (piece == 2 * SPAN / GROUP || (done += work) < every) return;
        done -= every;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) __builtin_prefetch(pieces[piece] + at + 64 * i, 0, 2);
        if ((at += 256) >= piece_bytes) at = 0, piece++;
    }
};

// Scores of ROWS rows against the SPAN tokens whose keys are at keys[0 … SPAN/GROUP - 1].
template <int ROWS, class T>
INLINE void score(const T* q, int64_t dim, const T* const (&keys)[SPAN / GROUP], float (&scores)[MAX_ROWS][SPAN],
                  Ahead& ahead) {
    for (int first = 0; first < SPAN; first += WIDTH) {
        const T* b[MAX_VECTORS];
        for (int v = 0; v < MAX_VECTORS; v++) {
            int token = first + v * LANES;
            b[v] = keys[token / GROUP] + token % GROUP * DEPTH<T>;
        }
        Vec acc[ROWS][MAX_VECTORS] = {};
        accumulate<ROWS, MAX_VECTORS>(q, dim, b, GROUP * DEPTH<T>, dim / DEPTH<T>, acc,
                                      [&]() __attribute__((always_inline)) { ahead(ROWS * MAX_VECTORS); });
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < MAX_VECTORS; v++) store(&scores[r][first + v * LANES], acc[r][v]);
    }
}

// One row's softmax goes on over `count` more tokens: their weights to p, out scaled to the new maximum.
template <class T>
INLINE void soften(Rows<T>& rows, int64_t r, const float* scores, float scale, int64_t count, int64_t dim, T* p) {
    Vec index, s[SPAN / LANES], most = splat(-INFINITY);
    for (int i = 0; i < LANES; i++) index[i] = float(i);
    for (int j = 0; j < SPAN / LANES; j++) {
        s[j] = load<Vec>(scores + j * LANES) * scale;
        s[j] = index + float(j * LANES) < splat(float(count)) ? s[j] : splat(-INFINITY);
        most = maximum(most, s[j]);
    }
    float best = std::max(rows.best[r], largest(most));
    Vec total = {};
    for (int j = 0; j < SPAN / LANES; j++) {
        Vec weight = exponential(s[j] - best);
        weight = index + float(j * LANES) < splat(float(count)) ? weight : Vec{};
        total += weight;
        store_floats(p + j * LANES, weight);
    }
    float keep = rows.best[r] == best ? 1.0f : std::exp(rows.best[r] - best);
    rows.total[r] = rows.total[r] * keep + sum(total);
    rows.best[r] = best;
    if (keep != 1.0f)
        for (int64_t d = 0; d < dim; d += LANES) store(rows.out + r * dim + d, load<Vec>(rows.out + r * dim + d) * keep);
}

// out += p[ROWS, count] . values, for VECTORS · LANES dimensions from `first`.
template <int ROWS, int VECTORS, class T>
INLINE void blend(const T* p, const T* const (&values)[SPAN / GROUP], int64_t count, int64_t first, int64_t dim,
                  float* out, Ahead& ahead) {
    Vec acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) acc[r][v] = load<Vec>(out + r * dim + first + v * LANES);
    for (int64_t token = 0; token < count; token += GROUP) {
        const T* b[VECTORS];
        for (int v = 0; v < VECTORS; v++) b[v] = values[token / GROUP] + (first + v * LANES) * DEPTH<T>;
        int64_t steps = (std::min<int64_t>(GROUP, count - token) + DEPTH<T> - 1) / DEPTH<T>;
        accumulate<ROWS, VECTORS>(p + token, SPAN, b, dim * DEPTH<T>, steps, acc,
                                  [&]() __attribute__((always_inline)) { ahead(ROWS * VECTORS); });
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * dim + first + v * LANES, acc[r][v]);
}

// All rows against the tokens from `start` (a multiple of SPAN) on.
template <class T>
void turn(Rows<T>& rows, int64_t start, const T* const (&keys)[SPAN / GROUP], const T* const (&values)[SPAN / GROUP],
          float scale, int64_t dim, Ahead& ahead) {
    alignas(64) float scores[MAX_ROWS][SPAN];
    alignas(64) T p[MAX_ROWS][SPAN];
    int64_t tiles = (rows.count + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t first = rows.count * t / tiles, count = rows.count * (t + 1) / tiles - first;
        int64_t most = std::min<int64_t>(SPAN, rows.visible[first + count - 1] - start);
        if (most <= 0) continue;
        with_rows(count, [&](auto n) __attribute__((always_inline)) {
            constexpr int ROWS = decltype(n)::value;
            score<ROWS>(rows.q + first * dim, dim, keys, scores, ahead);
            for (int r = 0; r < ROWS; r++) {
                int64_t seen = std::min<int64_t>(SPAN, rows.visible[first + r] - start);
                if (seen > 0)
                    soften(rows, first + r, scores[r], scale, seen, dim, p[r]);
                else
                    for (int i = 0; i < SPAN; i++) p[r][i] = T{};
            }
            float* out = rows.out + first * dim;
            int64_t d = 0;
            for (; d + WIDTH <= dim; d += WIDTH) blend<ROWS, MAX_VECTORS>(p[0], values, most, d, dim, out, ahead);
            for (; d < dim; d += LANES) blend<ROWS, 1>(p[0], values, most, d, dim, out, ahead);
        });
    }
}

// One sequence's queries in one KV head, of items numbered sequence · kv_heads + KV head. q and out are [tokens, heads,
// dim] of the whole step. `following` is the item whose first pieces are fetched at the end of this one, or -1.
template <class T>
void attend(const T* q, T* out, const T* k_cache, const T* v_cache, const Step& step, int64_t item, int64_t following,
            const Heads& h, float scale) {
    const int64_t sequence = item / h.kv_heads, kv_head = item % h.kv_heads;
    thread_local std::vector<char> room;
    room.resize(ROWS_AT_ONCE * h.dim * (sizeof(T) + sizeof(float)));
    Rows<T> rows;
    rows.out = (float*)room.data();
    rows.q = (T*)(rows.out + ROWS_AT_ONCE * h.dim);
    int64_t per_kv = h.heads / h.kv_heads, from = step.query_starts[sequence];
    int64_t queries = step.query_starts[sequence + 1] - from, context = step.context_lens[sequence];
    auto place = [&](int64_t r) { return ((from + r / per_kv) * h.heads + kv_head * per_kv + r % per_kv) * h.dim; };
    auto find = [&](int64_t of, int64_t start, const T* (&keys)[SPAN / GROUP], const T* (&values)[SPAN / GROUP]) {
        const int64_t* table = step.block_tables + of / h.kv_heads * step.table_stride;
        int64_t last = (step.context_lens[of / h.kv_heads] - 1) / GROUP * GROUP;
        for (int g = 0; g < SPAN / GROUP; g++) {
            int64_t token = std::min(start + g * GROUP, last);
            int64_t piece = (table[token / h.block_size] * h.kv_heads + of % h.kv_heads) * h.piece();
            keys[g] = k_cache + piece + key_offset<T>(token % h.block_size, h.dim);
            values[g] = v_cache + piece + value_offset<T>(token % h.block_size, h.dim);
        }
    };
    for (int64_t first = 0; first < queries * per_kv; first += rows.count) {
        rows.count = std::min<int64_t>(ROWS_AT_ONCE, queries * per_kv - first);
        for (int64_t r = 0; r < rows.count; r++) {
            std::memcpy(rows.q + r * h.dim, q + place(first + r), h.dim * sizeof(T));
            rows.best[r] = -INFINITY;
            rows.total[r] = 0;
            rows.visible[r] = context - queries + (first + r) / per_kv + 1;
        }
        std::memset(rows.out, 0, rows.count * h.dim * sizeof(float));
        const T *keys[SPAN / GROUP], *values[SPAN / GROUP], *next_keys[SPAN / GROUP], *next_values[SPAN / GROUP];
        int64_t end = rows.visible[rows.count - 1];
        find(item, 0, keys, values);
        for (int64_t start = 0; start < end; start += SPAN) {
            Ahead ahead;
            bool goes_on = start + SPAN < end;
            if (goes_on || following >= 0) {
                find(goes_on ? item : following, goes_on ? start + SPAN : 0, next_keys, next_values);
                for (int g = 0; g < SPAN / GROUP; g++) {
                    ahead.pieces[2 * g] = (const char*)(next_keys[g]);
                    ahead.pieces[2 * g + 1] = (const char*)next_values[g];
                }
                ahead.piece = 0;
                ahead.every = rows.count * 256 / int64_t(sizeof(Vec));  // every row uses every vector once
                ahead.piece_bytes = GROUP * h.dim * sizeof(T);
            }
            turn(rows, start, keys, values, scale, h.dim, ahead);
            std::copy(next_keys, next_keys + SPAN / GROUP, keys);
            std::copy(next_values, next_values + SPAN / GROUP, values);
        }
        for (int64_t r = 0; r < rows.count; r++)
            for (int64_t d = 0; d < h.dim; d += LANES)
                store_floats(out + place(first + r) + d, load<Vec>(rows.out + r * h.dim + d) / rows.total[r]);
    }
}
