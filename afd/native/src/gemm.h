// Products with a packed right-hand side: out[rows, n] = a[rows, k] . weight[n, k] transposed.
//
// Packed: panels of WIDTH columns; in a panel, step by step of the inner dimension, each column's DEPTH values side by
// side; zeros pad n to whole panels and k to whole steps. A panel is read from memory once, in order, and used for all
// rows; meanwhile the next one is fetched. Every row's additions come in the same order however many rows there are,
// so a row's result never depends on its neighbours.
#pragma once
#include "simd.h"

constexpr int WIDTH = MAX_VECTORS * LANES;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
struct Packed {
    const T* data;
    int64_t n, k;  // k in whole steps
    int64_t panels() const { return (n + WIDTH - 1) / WIDTH; }
    int64_t panel_size() const { return k * WIDTH; }
};

// `row_of(column)` is the row of weight [?, k] that becomes a packed column, or -1 for zeros.
template <class T, class RowOf>
void pack(const T* weight, int64_t k, int64_t columns, T* packed, RowOf row_of) {
    int64_t padded_k = round_up(k, DEPTH<T>);
    for (int64_t c = 0; c < columns; c++) {
        int64_t row = row_of(c);
        T* to = packed + c / WIDTH * WIDTH * padded_k + c % WIDTH * DEPTH<T>;
        for (int64_t i = 0; i < padded_k; i++)
            to[i / DEPTH<T> * WIDTH * DEPTH<T> + i % DEPTH<T>] = row < 0 || i >= k ? T{} : weight[row * k + i];
    }
}

// acc += a[ROWS rows, steps · DEPTH] . b, where b[v] points at LANES columns and `b_stride` leads to the next step.
// `each_step` is called once a step.
template <int ROWS, int VECTORS, class T, class EachStep>
INLINE void accumulate(const T* a, ptrdiff_t a_stride, const T* const (&b)[VECTORS], ptrdiff_t b_stride, int64_t steps,
                       Vec (&acc)[ROWS][VECTORS], EachStep each_step) {
    ptrdiff_t offset = 0;
    for (int64_t s = 0; s < steps; s++) {
        Vec columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = load<Vec>(b[v] + offset);
        each_step();
        step<ROWS, VECTORS>(a, a_stride, columns, acc);
        a += DEPTH<T>;
        offset += b_stride;
    }
}

// Calls f with std::integral_constant-like ROWS in its first argument's type, for 1 … MAX_ROWS rows.
template <int N>
struct Count {
    static constexpr int value = N;
};

template <class F>
INLINE void with_rows(int64_t rows, F f) {
    switch (rows) {
        case 1: return f(Count<1>{});
        case 2: return f(Count<2>{});
        case 3: return f(Count<3>{});
        case 4: return f(Count<4>{});
        case 5: return f(Count<5>{});
        default: return f(Count<6>{});
    }
}

static_assert(MAX_ROWS <= 6, "with_rows knows no more");

// Calls use(row, first column, acc) for every row, for the panels begin … end - 1.
template <class T, class Use>
void multiply(const T* a, ptrdiff_t a_stride, int64_t rows, const Packed<T>& b, int64_t begin, int64_t end, Use use) {
    int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    constexpr int LINES_PER_STEP = WIDTH * DEPTH<T> * int(sizeof(T)) / 64;
    for (int64_t p = begin; p < end; p++) {
        const T* panel = b.data + p * b.panel_size();
        const T* columns[MAX_VECTORS];
        for (int v = 0; v < MAX_VECTORS; v++) columns[v] = panel + v * LANES * DEPTH<T>;
        const char* next = (const char*)(panel + b.panel_size());
        const char* last = p + 1 < end ? next + b.panel_size() * sizeof(T) : next;
        int64_t credit = 0;
        for (int64_t block = 0; block < blocks; block++) {
            int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
            with_rows(count, [&](auto n) __attribute__((always_inline)) {
                constexpr int ROWS = decltype(n)::value;
                Vec acc[ROWS][MAX_VECTORS] = {};
                accumulate<ROWS, MAX_VECTORS>(
                    a + first * a_stride, a_stride, columns, WIDTH * DEPTH<T>, b.k / DEPTH<T>, acc,
                    [&]() __attribute__((always_inline)) {
                        for (credit += LINES_PER_STEP; credit >= blocks; credit -= blocks)
                            if (next < last) __builtin_prefetch(next, 0, 2), next += 64;
                    });
                for (int r = 0; r < ROWS; r++) use(first + r, p * WIDTH, acc[r]);
            });
        }
    }
}

// Stores one vector of a row of `columns` columns; the last one may be cut.
template <class Out>
INLINE void store_part(Out* row, int64_t column, int64_t columns, Vec v) {
    if (column + LANES <= columns) return store_floats(row + column, v);
    for (int i = 0; column + i < columns; i++) put(row + column + i, v[i]);
}
