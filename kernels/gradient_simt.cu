// The backward pass of one block of K and V in float32 throughout, without tensor cores. Arguments and promises are in
// gradient.cuh, with float for T.
//
// gradient_dq: grid (ceil(n_q group / ROWS), kv_heads) of 16 LANES threads; ROWS = HEIGHT LANES.
// gradient_dkdv: grid (ceil(n_k / KEYS), kv_heads); KEYS = HEIGHT LANES. Threads have what Lanes says. Dynamic shared
// memory: of Q and dout, or K and V, the rows of the block; STAGES times the tile of the others; ds, and for
// gradient_dkdv the weights and STAGES TileRowStats; padded as in lanes.cuh.
// DIM, DIM_V and tiles are multiples of 16; LANES is even.

#include "gradient.cuh"
#include "lanes.cuh"

template <int DIM, int DIM_V, int ROWS>
using Pair = TilePair<float, DIM, DIM_V, ROWS, padded(DIM), padded(DIM_V)>;

// Sums of COLUMNS columns of the rows of a thread.
template <int LANES, int HEIGHT, int COLUMNS>
struct Sums {
    static constexpr int VECTOR = vector_of(COLUMNS), VECTORS = vectors_of(COLUMNS);
    float acc[HEIGHT][VECTORS][VECTOR] = {};

    // Add them, times `factor`, to rows; `row(i)` points to row i, or is null.
    template <class Row>
    __device__ void add_to(Row row, int columns, float factor) const {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            float* const at = row(Lanes<LANES>::row(i));
            if (!at) continue;
#pragma unroll
            for (int n = 0; n < VECTORS; ++n)
#pragma unroll
                for (int c = 0; c < VECTOR; ++c) {
                    const int column = Lanes<LANES>::template column<VECTOR>(n, c);
                    if (column < columns) at[column] += acc[i][n][c] * factor;
                }
        }
    }
};

template <int DIM, int DIM_V, int LANES, int HEIGHT, int KEYS, int STAGES, int BYTES, bool FUNCTIONS>
__global__ void __launch_bounds__(16 * LANES)
gradient_dq(float* dq, const float* dout, const float* lse, const float* delta, const float* q, const float* k,
                 const float* v, const int* begin, const int* end, int n_q, int n_k, int kv_heads, int group, int dim,
                 int dim_v, float scale, const void* packed_score) {
    using S = Score<float, FUNCTIONS>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, WARPS = THREADS / 32, ROWS = HEIGHT * LANES, EACH = KEYS / 16;
    constexpr int STRIDE_P = padded_weights(KEYS);
    using Mine = Pair<DIM, DIM_V, ROWS>;
    using Other = Pair<DIM, DIM_V, KEYS>;
    static_assert(ROWS <= THREADS, "one interval a thread");

    const Rows rows{n_q, kv_heads, group, static_cast<int>(blockIdx.y),
                    static_cast<int>(gridDim.x - 1 - blockIdx.x) * ROWS};      // the last rows, which see most, first
    const int mine = threadIdx.x;
    const bool has_row = mine < ROWS && rows.contains(mine);
    const Interval interval = has_row ? rows.interval(begin, end, mine) : Interval{0, 0};
    const VisibleColumns visible = visible_to_block<WARPS>(visible_to_warp(interval, has_row));
    const Interval range = visible.hull;
    const int tiles = range.tiles(KEYS);
    if (tiles == 0) return;

    float* const memory = reinterpret_cast<float*>(shared_memory());
    float* const ds_tile = memory + Mine::NUMBERS + STAGES * Other::NUMBERS;
    const Mine own(memory);
    own.template copy<BYTES, THREADS>(
        q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    RowStats<float> known[HEIGHT];
    typename S::Row row_score[HEIGHT];
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
        const bool there = rows.contains(L::row(i));
        const long long at = there ? rows.state_row(L::row(i)) : 0;
        known[i] = {lse[at], delta[at], there ? rows.interval(begin, end, L::row(i)) : Interval{0, 0}};
        row_score[i] = score.row(rows, L::row(i));
    }

    Sums<LANES, HEIGHT, DIM> sums;
    auto add = [&](auto partial, const Other& other, int start) {
        constexpr bool PARTIAL = decltype(partial)::value;
        float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
        L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Mine::STRIDE);
        L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Mine::STRIDE_V);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int column = start + L::other(j), key = score.key(column);
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], known[i], row_score[i], column, key, scale, score);
                ds_tile[L::row(i) * STRIDE_P + L::other(j)] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, KEYS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto load = [&](int i, int stage) {
        const long long at = range.low + static_cast<long long>(i) * KEYS;
        const long long first = at * kv_heads + rows.kv_head;
        Other(memory + Mine::NUMBERS + stage * Other::NUMBERS).template copy<BYTES, THREADS>(
            k, v, [=](int r) { return first + r * kv_heads; }, range.high - static_cast<int>(at), dim, dim_v);
    };
    for_tiles<STAGES>(tiles, [](int i) { return i; }, load, [&](int i, int stage) {
        const int start = range.low + i * KEYS;
        const Other other(memory + Mine::NUMBERS + stage * Other::NUMBERS);
        if (visible.full(start, KEYS)) add(False{}, other, start);
        else add(True{}, other, start);
    });
    sums.add_to([&](int r) { return rows.contains(r) ? dq + rows.state_row(r) * dim : nullptr; }, dim, scale);
}

template <int DIM, int DIM_V, int LANES, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS>
__global__ void __launch_bounds__(16 * LANES)
gradient_dkdv(float* dk, float* dv, const float* dout, const float* lse, const float* delta, const float* q,
              const float* k, const float* v, const int* begin, const int* end, const VisibleColumns* visible_columns, int n_q, int n_k,
              int kv_heads, int group, int dim, int dim_v, float scale, const void* packed_score) {
    using S = Score<float, FUNCTIONS>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, KEYS = HEIGHT * LANES, EACH = ROWS / 16, STRIDE_P = padded_weights(ROWS);
    using Mine = Pair<DIM, DIM_V, KEYS>;
    using Other = Pair<DIM, DIM_V, ROWS>;
    using Known = TileRowStats<float, ROWS>;
    const int kv_head = blockIdx.y, first = blockIdx.x * KEYS, tiles = (n_q * group + ROWS - 1) / ROWS;
    const Interval keys{first, min(first + KEYS, n_k)};

    float* const memory = reinterpret_cast<float*>(shared_memory());
    float* const ds_tile = memory + Mine::NUMBERS + STAGES * Other::NUMBERS;
    float* const p_tile = ds_tile + KEYS * STRIDE_P;
    Known* const known = reinterpret_cast<Known*>(p_tile + KEYS * STRIDE_P);
    const Mine own(memory);
    const long long first_row = static_cast<long long>(first) * kv_heads + kv_head;
    own.template copy<BYTES, THREADS>(
        k, v, [=](int r) { return first_row + r * kv_heads; }, n_k - first, dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    auto rows_of = [&](int tile) { return TileRows(n_q, kv_heads, group, kv_head, tile * ROWS); };
    Sums<LANES, HEIGHT, DIM> sums;
    Sums<LANES, HEIGHT, DIM_V> sums_v;
    auto add = [&](auto partial, const Other& other, const Known& those, const TileRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
        L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Mine::STRIDE);
        L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Mine::STRIDE_V);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const RowStats<float> row = those.row(L::other(j));
            const typename S::Row row_score = score.row(rows, L::other(j));
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                const int column = first + L::row(i), at = L::row(i) * STRIDE_P + L::other(j);
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], row, row_score, column, score.key(column), scale, score);
                p_tile[at] = qk[i][j];
                ds_tile[at] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, ROWS>(sums_v.acc, p_tile, STRIDE_P, other.tile_v, Other::STRIDE_V, 0);
        L::template multiply<PARTIAL, ROWS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto load = [&](int tile, int stage) {
        const TileRows rows = rows_of(tile);
        Other(memory + Mine::NUMBERS + stage * Other::NUMBERS).template copy<BYTES, THREADS>(
            q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);
        known[stage].template copy<THREADS>(lse, delta, begin, end, rows);
    };
    for_tiles<STAGES>(tiles, [&](int from) { return next_tile(visible_columns, from, tiles, keys); }, load,
                      [&](int tile, int stage) {
        const Other other(memory + Mine::NUMBERS + stage * Other::NUMBERS);
        if (visible_columns[tile].full(keys.low, keys.high - keys.low)) add(False{}, other, known[stage], rows_of(tile));
        else add(True{}, other, known[stage], rows_of(tile));
    });
    auto row_of = [&](float* array, int columns) {
        return [=](int r) {
            return first + r < n_k ? array + (static_cast<long long>(first + r) * kv_heads + kv_head) * columns
                                   : nullptr;
        };
    };
    sums.add_to(row_of(dk, dim), dim, scale);
    sums_v.add_to(row_of(dv, dim_v), dim_v, 1.0f);
}
