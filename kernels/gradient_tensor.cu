// The backward pass of one block of K and V on tensor cores: bfloat16, float16, float64. Arguments and promises are in
// gradient.cuh. Weights and ds are rounded to 16 bits for the products that they are the left side of.
//
// gradient_dq: grid (ceil(n_q group / ROWS), kv_heads, slices) of 32 WARPS threads; ROWS = 16 HEIGHT WARPS; a
// block has COLUMNS columns of dq, those of its slice. gradient_dkdv: grid (ceil(n_k / KEYS), kv_heads, slices); KEYS =
// 16 HEIGHT WARPS; a block has COLUMNS columns of dk and COLUMNS_V of dv, 0 of one of them if both are too many for its
// registers; if there are several slices, either is 0. Dynamic shared memory: of Q and dout, or K and V, the rows of
// the block; STAGES times the tile of the others; for gradient_dkdv STAGES TileRowStats; rows padded as Fragments says.
// DIM, DIM_V, COLUMNS and tiles are multiples of 16.

#include "fragments.cuh"
#include "gradient.cuh"

template <class T, int DIM, int DIM_V, int ROWS>
using Pair = TilePair<T, DIM, DIM_V, ROWS, DIM + Fragments<T>::PAD, DIM_V + Fragments<T>::PAD>;

// Add accumulators, times `factor`, to columns `start` .. of rows; `row(i)` points to row i, or is null.
template <class A, int HEIGHT, int N, class Row>
__device__ inline void add_to(Row row, const A (&acc)[HEIGHT][N][4], int start, int columns, A factor) {
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            A* const at = row(16 * m + 8 * h + threadIdx.x % 32 / 4);
            if (!at) continue;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int column = column_of(start, n, i);
                    if (column < columns) at[column] += acc[m][n][2 * h + i] * factor;
                }
        }
}

template <class T, int DIM, int DIM_V, int COLUMNS, int WARPS, int HEIGHT, int KEYS, int STAGES, int BYTES,
          bool FUNCTIONS>
__global__ void __launch_bounds__(32 * WARPS)
gradient_dq(Accumulator<T>* dq, const T* dout, const Accumulator<T>* lse, const Accumulator<T>* delta, const T* q,
                 const T* k, const T* v, const int* begin, const int* end, int n_q, int n_k, int kv_heads, int group,
                 int dim, int dim_v, Accumulator<T> scale, const void* packed_score) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS>;
    constexpr int THREADS = 32 * WARPS, WARP_ROWS = 16 * HEIGHT, ROWS = WARP_ROWS * WARPS;
    using Mine = Pair<T, DIM, DIM_V, ROWS>;
    using Other = Pair<T, DIM, DIM_V, KEYS>;
    static_assert(WARP_ROWS <= 32, "one interval a lane");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = warp * WARP_ROWS;
    const int slice = blockIdx.z * COLUMNS;

    const Rows rows{n_q, kv_heads, group, static_cast<int>(blockIdx.y),
                    static_cast<int>(gridDim.x - 1 - blockIdx.x) * ROWS};      // the last rows, which see most, first
    const bool has_row = lane < WARP_ROWS && rows.contains(mine + lane);
    const Interval interval = has_row ? rows.interval(begin, end, mine + lane) : Interval{0, 0};
    const VisibleColumns visible = visible_to_warp(interval, has_row);
    const Interval range = visible_to_block<WARPS>(visible).hull;
    const int tiles = range.tiles(KEYS);
    if (tiles == 0) return;

    T* const memory = reinterpret_cast<T*>(shared_memory());
    const Mine own(memory);
    own.template copy<BYTES, THREADS>(
        q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    RowStats<A> known[HEIGHT][2];
    typename S::Row row_score[HEIGHT][2];
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int local = 16 * m + 8 * h + lane / 4;
            const Interval sees{__shfl_sync(ALL_LANES, interval.low, local),
                                __shfl_sync(ALL_LANES, interval.high, local)};
            const long long at = rows.contains(mine + local) ? rows.state_row(mine + local) : 0;
            known[m][h] = {lse[at], delta[at], sees};
            row_score[m][h] = score.row(rows, mine + local);
        }

    A acc[HEIGHT][COLUMNS / 8][4] = {};
    auto add = [&](auto partial, const Other& other, int start) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A qk[HEIGHT][KEYS / 8][4] = {}, dout_v[HEIGHT][KEYS / 8][4] = {};
        multiply_transposed<DIM>(qk, own.tile, mine, other.tile, Mine::STRIDE);
        multiply_transposed<DIM_V>(dout_v, own.tile_v, mine, other.tile_v, Mine::STRIDE_V);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = column_of(start, n, i), key = score.key(column);
#pragma unroll
                for (int m = 0; m < HEIGHT; ++m)
                    differentiate<PARTIAL>(qk[m][n][i], dout_v[m][n][i], known[m][i / 2], row_score[m][i / 2], column, key,
                                           scale, score);
            }
        multiply<PARTIAL, T>(acc, dout_v, other.tile, Other::STRIDE, slice);
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
        if (visible.skips(start, KEYS)) return;
        if (visible.full(start, KEYS)) add(False{}, other, start);
        else add(True{}, other, start);
    });
    add_to([&](int r) { return rows.contains(mine + r) ? dq + rows.state_row(mine + r) * dim : nullptr; }, acc, slice,
           dim, scale);
}

template <class T, int DIM, int DIM_V, int COLUMNS, int COLUMNS_V, int WARPS, int HEIGHT, int ROWS, int STAGES,
          int BYTES, bool FUNCTIONS>
__global__ void __launch_bounds__(32 * WARPS)
gradient_dkdv(Accumulator<T>* dk, Accumulator<T>* dv, const T* dout, const Accumulator<T>* lse,
              const Accumulator<T>* delta, const T* q, const T* k, const T* v, const int* begin, const int* end,
              const VisibleColumns* visible_columns, int n_q, int n_k, int kv_heads, int group, int dim, int dim_v, Accumulator<T> scale,
              const void* packed_score) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS>;
    constexpr int THREADS = 32 * WARPS, WARP_KEYS = 16 * HEIGHT, KEYS = WARP_KEYS * WARPS;
    using Mine = Pair<T, DIM, DIM_V, KEYS>;
    using Other = Pair<T, DIM, DIM_V, ROWS>;
    using Known = TileRowStats<A, ROWS>;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_KEYS, kv_head = blockIdx.y;
    const int first = blockIdx.x * KEYS, tiles = (n_q * group + ROWS - 1) / ROWS;
    const int slice = blockIdx.z * (COLUMNS ? COLUMNS : COLUMNS_V);
    const Interval all{first, min(first + KEYS, n_k)};
    const Interval keys{first + mine, min(first + mine + WARP_KEYS, n_k)};     // of this warp

    T* const memory = reinterpret_cast<T*>(shared_memory());
    Known* const known = reinterpret_cast<Known*>(memory + Mine::NUMBERS + STAGES * Other::NUMBERS);
    const Mine own(memory);
    const long long first_row = static_cast<long long>(first) * kv_heads + kv_head;
    own.template copy<BYTES, THREADS>(
        k, v, [=](int r) { return first_row + r * kv_heads; }, n_k - first, dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    auto rows_of = [&](int tile) { return TileRows(n_q, kv_heads, group, kv_head, tile * ROWS); };
    A acc[HEIGHT][COLUMNS ? COLUMNS / 8 : 1][4] = {}, acc_v[HEIGHT][COLUMNS_V ? COLUMNS_V / 8 : 1][4] = {};
    auto add = [&](auto partial, const Other& other, const Known& those, const TileRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A qk[HEIGHT][ROWS / 8][4] = {}, dout_v[HEIGHT][ROWS / 8][4] = {};
        multiply_transposed<DIM>(qk, own.tile, mine, other.tile, Mine::STRIDE);
        if constexpr (COLUMNS != 0) multiply_transposed<DIM_V>(dout_v, own.tile_v, mine, other.tile_v, Mine::STRIDE_V);
#pragma unroll
        for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int r = column_of(0, n, j);
                const RowStats<A> row = those.row(r);
                const typename S::Row row_score = score.row(rows, r);
#pragma unroll
                for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
                    for (int i = j; i < 4; i += 2) {
                        const int column = keys.low + 16 * m + 8 * (i / 2) + lane / 4;
                        differentiate<PARTIAL>(qk[m][n][i], dout_v[m][n][i], row, row_score, column, score.key(column),
                                               scale, score);
                    }
            }
        if constexpr (COLUMNS_V != 0) multiply<PARTIAL, T>(acc_v, qk, other.tile_v, Other::STRIDE_V, slice);
        if constexpr (COLUMNS != 0) multiply<PARTIAL, T>(acc, dout_v, other.tile, Other::STRIDE, slice);
    };
    auto load = [&](int tile, int stage) {
        const TileRows rows = rows_of(tile);
        Other(memory + Mine::NUMBERS + stage * Other::NUMBERS).template copy<BYTES, THREADS>(
            q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);
        known[stage].template copy<THREADS>(lse, delta, begin, end, rows);
    };
    for_tiles<STAGES>(tiles, [&](int from) { return next_tile(visible_columns, from, tiles, all); }, load,
                      [&](int tile, int stage) {
        const Other other(memory + Mine::NUMBERS + stage * Other::NUMBERS);
        const VisibleColumns visible = visible_columns[tile];
        const int count = keys.high - keys.low;
        if (count <= 0 || visible.skips(keys.low, count)) return;
        if (visible.full(keys.low, count)) add(False{}, other, known[stage], rows_of(tile));
        else add(True{}, other, known[stage], rows_of(tile));
    });
    auto row_of = [&](A* array, int columns) {
        return [=](int r) {
            return keys.low + r < n_k ? array + (static_cast<long long>(keys.low + r) * kv_heads + kv_head) * columns
                                      : nullptr;
        };
    };
    if constexpr (COLUMNS != 0) add_to(row_of(dk, dim), acc, slice, dim, scale);
    if constexpr (COLUMNS_V != 0) add_to(row_of(dv, dim_v), acc_v, slice, dim_v, A{1});
}
