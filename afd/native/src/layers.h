// What lies between the products: norm, rotation, gate; and both halves of a layer, built of all of it.
//
// The structs are filled by afd/native/library.py, field by field in this order. Scratch memory belongs to the calling
// thread and grows to the largest batch seen.
#pragma once
#include <atomic>

#include "attention.h"

struct Linear {
    const void* data;  // packed
    int64_t n, k;
    template <class T>
    Packed<T> as() const {
        return {(const T*)data, n, k};
    }
};

struct AttentionLayer {
    int64_t hidden, heads, kv_heads, dim, block_size;
    const void *input_norm, *post_norm;  // [hidden]
    Linear qkv;                          // hidden -> q (or the low rank of q), k, v
    int64_t q_rank;                      // 0, or MFA's low rank, normed by inter_norm and raised by wq
    const void* inter_norm;              // [q_rank]
    Linear wq;                           // q_rank -> heads · dim
    const void *q_norm, *k_norm;         // [dim], or null
    const void* rope;                    // [max_context, 2 · dim]: cosines, then signed sines
    Linear out;                          // heads · dim -> hidden
    Linear gate;                         // float32: hidden -> experts; null on dense layers
    int64_t experts, top_k, renormalise;
    float eps, scale;
};

struct FfnLayer {
    int64_t hidden;
    Linear always_up, always_down;            // dense FFN or shared expert; null where there is none
    int64_t first, local, total;              // experts first … first + local - 1 of total
    const Linear *experts_up, *experts_down;  // [local]; gate and up of SwiGLU interleaved
};

template <class F>
void in_parallel(int64_t threads, int64_t items, F f) {  // f(begin, end) for even parts of the items
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t t = 0; t < threads; t++) f(items * t / threads, items * (t + 1) / threads);
}

template <class T, class Use>
void multiply_in_parallel(int64_t threads, const T* a, ptrdiff_t stride, int64_t rows, const Packed<T>& b, Use use) {
    in_parallel(threads, b.panels(), [&](int64_t begin, int64_t end) { multiply(a, stride, rows, b, begin, end, use); });
}

// Scratch of the calling thread, by purpose. The pointers of one purpose are valid until its next use.
template <class T, int PURPOSE>
T* scratch(int64_t count) {
    thread_local std::vector<T> room;
    if (int64_t(room.size()) < count) room.resize(count);
    return room.data();
}

// out = a . b, in T or float, plus `residual` where there is one; both rows of n values
template <class T, class Out>
void linear(int64_t threads, const T* a, ptrdiff_t stride, int64_t rows, const Linear& weight, const Out* residual,
            Out* out) {
    int64_t n = weight.n;
    multiply_in_parallel(threads, a, stride, rows, weight.as<T>(),
                         [&](int64_t row, int64_t column, Vec(&acc)[MAX_VECTORS]) __attribute__((always_inline)) {
                             for (int v = 0; v < MAX_VECTORS; v++, column += LANES) {
                                 if (column >= n) return;
                                 if (residual && column + LANES <= n)
                                     acc[v] += load_floats(residual + row * n + column);
                                 else if (residual)
                                     for (int i = 0; column + i < n; i++)
                                         acc[v][i] += to_float(residual[row * n + column + i]);
                                 store_part(out + row * n, column, n, acc[v]);
                             }
                         });
}

// The columns first … last - 1 (whole panels, but for the end) of a . b as floats. Wide results such as logits, which no
// cache would hold until they are read, go past the caches.
template <class T>
void columns(int64_t threads, const T* a, int64_t rows, const Linear& weight, int64_t first, int64_t last, float* out) {
    const int64_t n = weight.n, from = first / WIDTH;
    const bool past_caches = n >= 8192 && n % WIDTH == 0 && uintptr_t(out) % sizeof(Vec) == 0;
    in_parallel(threads, (last + WIDTH - 1) / WIDTH - from, [&](int64_t begin, int64_t end) {
        multiply(a, weight.k, rows, weight.as<T>(), from + begin, from + end,
                 [&](int64_t row, int64_t column, Vec(&acc)[MAX_VECTORS]) __attribute__((always_inline)) {
                     for (int v = 0; v < MAX_VECTORS; v++, column += LANES)
                         if (past_caches)
                             stream(out + row * n + column, acc[v]);
                         else if (column < n)
                             store_part(out + row * n, column, n, acc[v]);
                 });
        finish_streams();
    });
}

template <class T>
void rms_norm(const T* x, const T* weight, int64_t rows, ptrdiff_t stride, int64_t width, float eps, T* out,
              ptrdiff_t out_stride) {
    for (int64_t r = 0; r < rows; r++, x += stride, out += out_stride) {
        Vec squares = {};
        float rest = 0;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            Vec v = load_floats(x + i);
            squares += v * v;
        }
        for (; i < width; i++) rest += to_float(x[i]) * to_float(x[i]);
        float by = 1.0f / std::sqrt((sum(squares) + rest) / float(width) + eps);
        for (i = 0; i + LANES <= width; i += LANES)
            store_floats(out + i, load_floats(x + i) * by * load_floats(weight + i));
        for (; i < width; i++) put(out + i, to_float(x[i]) * by * to_float(weight[i]));
    }
}

// Rotates one head in place by its position's row of the table.
template <class T>
void rotate(T* x, const T* row, int64_t dim) {
    int64_t half = dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        Vec a = load_floats(x + i), b = load_floats(x + half + i);
        store_floats(x + i, a * load_floats(row + i) + b * load_floats(row + dim + i));
        store_floats(x + half + i, b * load_floats(row + half + i) + a * load_floats(row + dim + half + i));
    }
    for (; i < half; i++) {
        float a = to_float(x[i]), b = to_float(x[half + i]);
        put(x + i, a * to_float(row[i]) + b * to_float(row[dim + i]));
        put(x + half + i, b * to_float(row[half + i]) + a * to_float(row[dim + half + i]));
    }
}

// Softmax over all experts, then the best top_k; of equal logits the lowest expert id wins.
inline void choose_experts(const float* logits, int64_t experts, int64_t top_k, bool renormalise, int32_t* ids,
                           float* weights) {
    float most = *std::max_element(logits, logits + experts), total = 0, chosen = 0;
    for (int64_t e = 0; e < experts; e++) total += std::exp(logits[e] - most);
    for (int64_t j = 0; j < top_k; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            bool taken = false;
            for (int64_t i = 0; i < j; i++) taken |= ids[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        ids[j] = int32_t(best);
        chosen += weights[j] = std::exp(logits[best] - most) / total;
    }
    if (renormalise)
        for (int64_t j = 0; j < top_k; j++) weights[j] /= chosen;
}

template <class T>
void run_gate(const AttentionLayer& layer, int64_t threads, const T* y, int64_t rows, int32_t* ids, float* weights) {
    float* wide = scratch<float, 0>(rows * layer.hidden);
    float* logits = scratch<float, 1>(rows * layer.experts);
    for (int64_t i = 0; i < rows * layer.hidden; i++) wide[i] = to_float(y[i]);
    linear<float, float>(threads, wide, layer.hidden, rows, layer.gate, nullptr, logits);
    for (int64_t r = 0; r < rows; r++)
        choose_experts(logits + r * layer.experts, layer.experts, layer.top_k, layer.renormalise, ids + r * layer.top_k,
                       weights + r * layer.top_k);
}

// hidden -> q [rows, heads, dim] in scratch memory, rotated; k and v go to the cache.
template <class T>
T* project(const AttentionLayer& layer, const Step& step, int64_t threads, const T* hidden, T* keys, T* values) {
    const int64_t rows = step.tokens, dim = layer.dim, kv = layer.kv_heads * dim, width = layer.heads * dim;
    auto pieces = [&](int64_t r) { return step.slots[r] / layer.block_size * layer.kv_heads * layer.block_size * dim; };
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < layer.kv_heads; h++) {
            int64_t piece = pieces(r) + h * layer.block_size * dim;
            expect_kv(keys + piece, values + piece, step.slots[r] % layer.block_size, dim);
        }
    T* x = scratch<T, 2>(rows * layer.hidden);
    rms_norm(hidden, (const T*)layer.input_norm, rows, layer.hidden, layer.hidden, layer.eps, x, layer.hidden);
    const int64_t low = layer.q_rank ? layer.q_rank : width, stride = layer.qkv.n;
    T* qkv = scratch<T, 3>(rows * stride);
    linear<T, T>(threads, x, layer.hidden, rows, layer.qkv, nullptr, qkv);
    T* q = scratch<T, 4>(rows * width);
    if (layer.q_rank) {
        rms_norm(qkv, (const T*)layer.inter_norm, rows, stride, low, layer.eps, qkv, stride);
        linear<T, T>(threads, qkv, stride, rows, layer.wq, nullptr, q);
    }
    in_parallel(threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            T *mine = q + r * width, *k = qkv + r * stride + low;
            if (!layer.q_rank) std::memcpy(mine, qkv + r * stride, width * sizeof(T));
            if (layer.q_norm) {
                rms_norm(mine, (const T*)layer.q_norm, layer.heads, dim, dim, layer.eps, mine, dim);
                rms_norm(k, (const T*)layer.k_norm, layer.kv_heads, dim, dim, layer.eps, k, dim);
            }
            const T* turn = (const T*)layer.rope + step.positions[r] * 2 * dim;
            for (int64_t h = 0; h < layer.heads; h++) rotate(mine + h * dim, turn, dim);
            for (int64_t h = 0; h < layer.kv_heads; h++) rotate(k + h * dim, turn, dim);
        }
    });
    for (int64_t r = 0; r < rows; r++) {  // by one thread: neighbours share cache lines
        const T* k = qkv + r * stride + low;
        for (int64_t h = 0; h < layer.kv_heads; h++) {
            int64_t piece = pieces(r) + h * layer.block_size * dim;
            write_kv(k + h * dim, k + kv + h * dim, keys + piece, values + piece, step.slots[r] % layer.block_size, dim);
        }
    }
    return q;
}

template <class T>
void attend_all(const Heads& heads, const Step& step, int64_t threads, const T* q, const T* keys, const T* values,
                float scale, T* out) {
    std::atomic<int64_t> next{0};  // contexts differ: whoever is free takes the next
    const int64_t items = step.sequences * heads.kv_heads;
    in_parallel(threads, threads, [&](int64_t, int64_t) {
        for (int64_t i = next++, following; i < items; i = following) {
            following = next++;
            attend(q, out, keys, values, step, i, following < items ? following : -1, heads, scale);
        }
    });
}

template <class T>
void attention_half(const AttentionLayer& layer, const Step& step, int64_t threads, const T* hidden, T* keys, T* values,
                    T* residual, T* y, int32_t* ids, float* weights) {
    T* q = project(layer, step, threads, hidden, keys, values);
    T* out = scratch<T, 5>(step.tokens * layer.heads * layer.dim);
    attend_all<T>({layer.heads, layer.kv_heads, layer.dim, layer.block_size}, step, threads, q, keys, values,
                  layer.scale, out);
    linear<T, T>(threads, out, layer.heads * layer.dim, step.tokens, layer.out, hidden, residual);
    rms_norm(residual, (const T*)layer.post_norm, step.tokens, layer.hidden, layer.hidden, layer.eps, y, layer.hidden);
    if (layer.gate.data) run_gate(layer, threads, y, step.tokens, ids, weights);
}

// x [rows, hidden] -> use(row, column, part) of a SwiGLU feed-forward
template <class T, class Use>
void swiglu(int64_t threads, const T* x, int64_t hidden, int64_t rows, const Linear& up, const Linear& down, Use use) {
    const int64_t width = up.as<T>().panels() * WIDTH / 2;  // padded with zeros
    T* inner = scratch<T, 6>(rows * width);
    multiply_in_parallel(threads, x, hidden, rows, up.as<T>(),
                         [&](int64_t row, int64_t column, Vec(&acc)[MAX_VECTORS]) __attribute__((always_inline)) {
                             for (int v = 0; v < MAX_VECTORS / 2; v++)
                                 store_floats(inner + row * width + column / 2 + v * LANES,
                                              silu(acc[v]) * acc[v + MAX_VECTORS / 2]);
                         });
    multiply_in_parallel(threads, inner, width, rows, down.as<T>(), use);
}

// Adds the experts' weighted answers to total [rows, stride], expert by expert: the order of a token's additions is
// that of its experts' ids, whoever else is there.
template <class T>
void run_experts(const FfnLayer& layer, int64_t threads, const T* x, int64_t rows, const int32_t* ids,
                 const float* weights, int64_t top_k, float* total, int64_t stride) {
    int64_t* starts = scratch<int64_t, 7>(layer.local + 2);
    int64_t* places = scratch<int64_t, 8>(rows * top_k);
    std::fill(starts, starts + layer.local + 2, 0);
    auto local = [&](int64_t i) { return ids[i] - layer.first; };
    auto here = [&](int64_t i) { return local(i) >= 0 && local(i) < layer.local; };
    for (int64_t i = 0; i < rows * top_k; i++)
        if (here(i)) starts[local(i) + 2]++;
    for (int64_t e = 2; e < layer.local + 2; e++) starts[e] += starts[e - 1];
    for (int64_t i = 0; i < rows * top_k; i++)
        if (here(i)) places[starts[local(i) + 1]++] = i;
    T* chosen = scratch<T, 9>(rows * top_k * layer.hidden);
    for (int64_t e = 0; e < layer.local; e++) {
        int64_t count = starts[e + 1] - starts[e];
        if (count == 0) continue;
        const int64_t* mine = places + starts[e];
        for (int64_t i = 0; i < count; i++)
            std::memcpy(chosen + i * layer.hidden, x + mine[i] / top_k * layer.hidden, layer.hidden * sizeof(T));
        swiglu(threads, chosen, layer.hidden, count, layer.experts_up[e], layer.experts_down[e],
               [&](int64_t row, int64_t column, Vec(&acc)[MAX_VECTORS]) __attribute__((always_inline)) {
                   float* to = total + mine[row] / top_k * stride + column;
                   float weight = weights[mine[row]];
                   for (int v = 0; v < MAX_VECTORS; v++)
                       store(to + v * LANES, load<Vec>(to + v * LANES) + acc[v] * weight);
               });
    }
}

// Whether anything was added; out is written only then.
template <class T>
bool ffn_half(const FfnLayer& layer, int64_t threads, const T* x, int64_t rows, const int32_t* ids,
              const float* weights, int64_t top_k, T* out) {
    const int64_t hidden = layer.hidden, stride = round_up(hidden, WIDTH);
    auto here = [&](int32_t id) { return id >= layer.first && id < layer.first + layer.local; };
    bool some = layer.local > 0 && std::any_of(ids, ids + rows * top_k, here);
    if (!some && !layer.always_up.data) return false;
    float* total = scratch<float, 10>(rows * stride);
    if (layer.always_up.data)
        swiglu(threads, x, hidden, rows, layer.always_up, layer.always_down,
               [&](int64_t row, int64_t column, Vec(&acc)[MAX_VECTORS]) __attribute__((always_inline)) {
                   for (int v = 0; v < MAX_VECTORS; v++) store(total + row * stride + column + v * LANES, acc[v]);
               });
    else
        std::fill(total, total + rows * stride, 0.0f);
    if (some) run_experts(layer, threads, x, rows, ids, weights, top_k, total, stride);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < hidden; c += LANES) store_part(out + r * hidden, c, hidden, load<Vec>(total + r * stride + c));
    return true;
}
