// The library's functions, as afd/native/library.py calls them. T is chosen by `wide`: 1 float32, 0 bfloat16.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "layers.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Calls f with a null pointer of the element type.
template <class F>
static auto with_type(int64_t wide, F f) {
    return wide ? f((float*)nullptr) : f((bf16*)nullptr);
}

template <class P>
using Element = std::remove_pointer_t<P>;

EXPORT int64_t afd_version() { return 1; }
EXPORT int64_t afd_lanes() { return LANES; }

// Elements of weight [n, k] packed; with `pairs`, gate and up of [2 · n, k] interleaved for SwiGLU.
EXPORT int64_t afd_packed_size(int64_t wide, int64_t n, int64_t k, int64_t pairs) {
    int64_t columns = pairs ? 2 * round_up(n, WIDTH / 2) : round_up(n, WIDTH);
    return columns * round_up(k, wide ? 1 : 2);
}

EXPORT void afd_pack(int64_t wide, const void* weight, int64_t n, int64_t k, int64_t pairs, void* packed) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        constexpr int64_t HALF = WIDTH / 2;
        auto in_pairs = [&](int64_t c) {
            int64_t row = c / WIDTH * HALF + c % HALF;
            return row >= n ? -1 : c % WIDTH < HALF ? row : n + row;
        };
        auto plain = [&](int64_t c) { return c < n ? c : -1; };
        if (pairs)
            pack((const T*)weight, k, 2 * round_up(n, HALF), (T*)packed, in_pairs);
        else
            pack((const T*)weight, k, round_up(n, WIDTH), (T*)packed, plain);
    });
}

EXPORT int64_t afd_width() { return WIDTH; }

EXPORT void afd_linear(int64_t wide, int64_t threads, const Linear* weight, const void* a, int64_t rows, void* out) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        linear<T, T>(threads, (const T*)a, weight->k, rows, *weight, nullptr, (T*)out);
    });
}

EXPORT void afd_columns(int64_t wide, int64_t threads, const Linear* weight, const void* a, int64_t rows, int64_t first,
                        int64_t last, float* out) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        columns(threads, (const T*)a, rows, *weight, first, last, out);
    });
}

EXPORT void afd_rms_norm(int64_t wide, const void* x, const void* weight, int64_t rows, int64_t width, float eps,
                         void* out) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        rms_norm((const T*)x, (const T*)weight, rows, width, width, eps, (T*)out, width);
    });
}

// Asks for huge pages under memory that is read in pieces from all over it, before it is first touched. Where the
// system has none, nothing changes.
EXPORT void afd_expect_scattered(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = sysconf(_SC_PAGESIZE), from = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t to = ((uintptr_t)memory + bytes) / page * page;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

EXPORT void afd_store_kv(int64_t wide, const Heads* heads, const Step* step, const void* k, const void* v,
                         void* k_cache, void* v_cache) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        for (int64_t r = 0; r < step->tokens; r++)
            for (int64_t h = 0; h < heads->kv_heads; h++) {
                int64_t block = step->slots[r] / heads->block_size, token = step->slots[r] % heads->block_size;
                int64_t piece = (block * heads->kv_heads + h) * heads->piece();
                int64_t row = (r * heads->kv_heads + h) * heads->dim;
                write_kv((const T*)k + row, (const T*)v + row, (T*)k_cache + piece, (T*)v_cache + piece, token,
                         heads->dim);
            }
    });
}

EXPORT void afd_attend(int64_t wide, int64_t threads, const Heads* heads, const Step* step, const void* q,
                       const void* k_cache, const void* v_cache, float scale, void* out) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        attend_all(*heads, *step, threads, (const T*)q, (const T*)k_cache, (const T*)v_cache, scale, (T*)out);
    });
}

EXPORT void afd_attention_half(int64_t wide, int64_t threads, const AttentionLayer* layer, const Step* step,
                               const void* hidden, void* keys, void* values, void* residual, void* y, int32_t* ids,
                               float* weights) {
    with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        attention_half(*layer, *step, threads, (const T*)hidden, (T*)keys, (T*)values, (T*)residual, (T*)y, ids,
                       weights);
    });
}

// 1 when this shard adds something, 0 when not, -1 when an expert id is outside 0 … total - 1.
EXPORT int64_t afd_ffn_half(int64_t wide, int64_t threads, const FfnLayer* layer, const void* x, int64_t rows,
                            const int32_t* ids, const float* weights, int64_t top_k, void* out) {
    for (int64_t i = 0; i < rows * top_k; i++)
        if (ids[i] < 0 || ids[i] >= layer->total) return -1;
    return with_type(wide, [&](auto* type) {
        using T = Element<decltype(type)>;
        return int64_t(ffn_half(*layer, threads, (const T*)x, rows, ids, weights, top_k, (T*)out));
    });
}

// The index of each row's largest value; of equal ones the first.
EXPORT void afd_best(const float* x, int64_t rows, int64_t columns, int64_t* best) {
    for (int64_t r = 0; r < rows; r++, x += columns) {
        Vec most[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
        int64_t i = 0;
        for (; i + 4 * LANES <= columns; i += 4 * LANES)
            for (int v = 0; v < 4; v++) most[v] = maximum(most[v], load<Vec>(x + i + v * LANES));
        float top = largest(maximum(maximum(most[0], most[1]), maximum(most[2], most[3])));
        for (; i < columns; i++) top = x[i] > top ? x[i] : top;
        best[r] = 0;
        for (i = 0; i < columns; i++)
            if (x[i] == top) {
                best[r] = i;
                break;
            }
    }
}
