// The backward pass of one block of K and V in float32 throughout, without tensor cores. Arguments and promises are in
// gradient.cuh, with float for T.
//
// gradient_dq: grid (ceil(n_q group / ROWS), kv_heads) of 16 LANES threads; ROWS = HEIGHT LANES.
// gradient_dkdv: grid (ceil(n_k / KEYS), kv_heads); KEYS = HEIGHT LANES. Threads have what Lanes says. Dynamic shared
// memory: of Q and dout, or K and V, the rows of the block; STAGES times the tile of the others; ds, and for
// gradient_dkdv the weights and STAGES TileRowStats; padded as in lanes.cuh. gradient_dbias: grid (ceil(n_k / KEYS),
// heads), else as gradient_dkdv but without ds and weights; `visible` is of tiles of the rows of one head.
// gradient_drelative: as gradient_dbias, but any grid (.., heads), and KEYS ROWS sums of pairs in shared memory.
// DIM, DIM_V and tiles are multiples of 16; LANES is even.

#include "gradient.cuh"
#include "lanes.cuh"

// Sums of COLUMNS columns of the rows of a thread.
template <int LANES, int HEIGHT, int COLUMNS, bool CANONICAL>
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
                    if (column < columns) add_scaled<CANONICAL>(at[column], acc[i][n][c], factor);
                }
        }
    }
};

template <int DIM, int DIM_V, int LANES, int HEIGHT, int KEYS, int STAGES, int BYTES, bool FUNCTIONS, bool BIAS,
          bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(16 * LANES)
gradient_dq(float* dq, const __grid_constant__ GradientInputs<float> inputs,
            const __grid_constant__ Problem<float> problem) {
    using S = Score<float, FUNCTIONS, BIAS, RELATIVE>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, WARPS = THREADS / 32, ROWS = HEIGHT * LANES, EACH = KEYS / 16;
    constexpr int STRIDE_P = padded_weights(KEYS);
    using Tiles = GradientTiles<float, L, DIM, DIM_V, ROWS, KEYS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    static_assert(ROWS <= THREADS, "one interval a thread");
    static_assert(!CANONICAL || CANONICAL_TILE % KEYS == 0, "blocks begin at whole tiles");

    // The tiles of keys that any row of the block sees, in one interval after the other.
    const Rows rows = rows_of_block(problem, ROWS);
    const int mine = threadIdx.x;
    const bool has_row = mine < ROWS && rows.contains(mine);
    VisibleColumns visible;
    Interval range;
    auto look = [&](int number) {
        const Interval interval = has_row ? rows.interval(problem.begin, problem.end, number, mine) : Interval{0, 0};
        visible = visible_to_block<WARPS>(visible_to_warp(interval, has_row));
        range = columns_to_visit<CANONICAL>(visible.hull, KEYS);
    };
    look(0);
    if (range.tiles(KEYS) == 0 && !SEVERAL) return;

    // Q and dout are on their way while the rest of what is known of the rows is read.
    const Tiles memory;
    float* const ds_tile = memory.end();
    const Own own = memory.own();
    own.template copy_rows<BYTES, THREADS>(inputs, rows, problem);
    const S score(problem);
    RowStats<float> row_stats[HEIGHT];
    typename S::Row row_score[HEIGHT];
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
        const int row = L::row(i);
        const bool exists = rows.contains(row);
        const long long at = exists ? rows.state_row(row) : 0;
        row_stats[i] = {inputs.lse[at], inputs.delta[at], Interval{0, 0}};
        row_score[i] = score.row(rows, row);
    }
    auto see = [&](int number) {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i)
            row_stats[i].sees = rows.contains(L::row(i))
                ? rows.interval(problem.begin, problem.end, number, L::row(i)) : Interval{0, 0};
    };
    see(0);

    // Add what tile after tile of keys gives.
    using DqSums = Sums<LANES, HEIGHT, DIM, CANONICAL>;
    DqSums sums;
    auto put = [&] {
        sums.add_to([&](int r) { return rows.contains(r) ? dq + rows.state_row(r) * problem.dim : nullptr; },
                    problem.dim, problem.scale);
    };
    auto add = [&](auto partial, const Other& other, int start) {
        constexpr bool PARTIAL = decltype(partial)::value;
        float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
        L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Own::STRIDE);
        L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Own::STRIDE_V);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int column = start + L::other(j);
            const typename S::Key key = score.key(column);
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], row_stats[i], row_score[i], column, key, problem.scale,
                                       score);
                ds_tile[L::row(i) * STRIDE_P + L::other(j)] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, KEYS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto begin = [&] {
        put();
        sums = DqSums{};
    };
    for (int number = 0;;) {
        for_key_tiles<BYTES, THREADS, CANONICAL, KEYS, STAGES>(memory, inputs, problem, rows.kv_head, range, visible,
                                                               begin, add);
        if (!SEVERAL || ++number >= problem.intervals) break;
        __syncthreads();                           // all have read the last tile of the interval before
        look(number);
        see(number);
        if (CANONICAL) begin();
    }
    put();
}

template <int DIM, int DIM_V, int LANES, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS, bool BIAS,
          bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(16 * LANES)
gradient_dkdv(float* dk, float* dv, const __grid_constant__ GradientInputs<float> inputs, const VisibleColumns* visible,
              const __grid_constant__ Problem<float> problem) {
    using S = Score<float, FUNCTIONS, BIAS, RELATIVE>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, KEYS = HEIGHT * LANES, EACH = ROWS / 16, STRIDE_P = padded_weights(ROWS);
    using Tiles = GradientTiles<float, L, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<float, ROWS>;
    const int kv_head = blockIdx.y, first = blockIdx.x * KEYS;
    const Interval keys{first, min(first + KEYS, problem.n_k)};
    static_assert(!CANONICAL || CANONICAL_TILE % ROWS == 0, "blocks begin at whole tiles");

    const Tiles memory;
    float* const ds_tile = memory.end();
    float* const p_tile = ds_tile + KEYS * STRIDE_P;
    Stats* const row_stats = reinterpret_cast<Stats*>(p_tile + KEYS * STRIDE_P);
    const Own own = memory.own();
    own.template copy_keys<BYTES, THREADS>(inputs, kv_head, first, problem.n_k - first, problem);

    // Add what tile after tile of rows gives.
    const S score(problem);
    auto rows_of = [&](int tile) { return TileRows(problem, kv_head, tile * ROWS); };
    using DkSums = Sums<LANES, HEIGHT, DIM, CANONICAL>;
    using DvSums = Sums<LANES, HEIGHT, DIM_V, CANONICAL>;
    DkSums sums;
    DvSums sums_v;
    auto put = [&] {
        sums.add_to([&](int r) { return key_row(dk, problem.dim, first + r, kv_head, problem); }, problem.dim,
                    problem.scale);
        sums_v.add_to([&](int r) { return key_row(dv, problem.dim_v, first + r, kv_head, problem); }, problem.dim_v,
                      1.0f);
    };
    auto add = [&](auto partial, const Other& other, const Stats& stats, const TileRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
        L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Own::STRIDE);
        L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Own::STRIDE_V);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const RowStats<float> row = stats.row(L::other(j));
            const typename S::Row row_score = score.row(rows, L::other(j));
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                const int column = first + L::row(i), at = L::row(i) * STRIDE_P + L::other(j);
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], row, row_score, column, score.key(column), problem.scale,
                                       score);
                p_tile[at] = qk[i][j];
                ds_tile[at] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, ROWS>(sums_v.acc, p_tile, STRIDE_P, other.tile_v, Other::STRIDE_V, 0);
        L::template multiply<PARTIAL, ROWS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto begin = [&] {
        put();
        sums = DkSums{};
        sums_v = DvSums{};
    };
    for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
        memory, row_stats, inputs, problem, visible, problem.group, keys, keys, rows_of, begin, add);
    put();
}

// What the pairs of a tile of keys, from `first` on, and one of rows give a bias: `take(i, j, share)` for key row(i)
// and row other(j).
template <bool PARTIAL, int DIM, int DIM_V, int LANES, int HEIGHT, int EACH, class Own, class Other, class Stats,
          class S, class Take>
__device__ inline void bias_gradients(const Own& own, const Other& other, const Stats& stats, const HeadRows& rows,
                                      int first, const Problem<float>& problem, const S& score, Take take) {
    using L = Lanes<LANES>;
    float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
    L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Own::STRIDE);
    L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Own::STRIDE_V);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const RowStats<float> row = stats.row(L::other(j));
        const typename S::Row row_score = score.row(rows, L::other(j));
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            const int column = first + L::row(i);
            take(i, j, bias_gradient<PARTIAL>(qk[i][j], dout_v[i][j], row, row_score, column, score.key(column),
                                              problem.scale, score));
        }
    }
}

template <int DIM, int DIM_V, int LANES, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS, bool BIAS,
          bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(16 * LANES)
gradient_dbias(float* dbias, const __grid_constant__ GradientInputs<float> inputs, const VisibleColumns* visible,
               const __grid_constant__ Problem<float> problem) {
    using S = Score<float, FUNCTIONS, BIAS, RELATIVE>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, KEYS = HEIGHT * LANES, EACH = ROWS / 16;
    using Tiles = GradientTiles<float, L, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<float, ROWS>;
    const int head = blockIdx.y, first = blockIdx.x * KEYS;
    const Interval keys{first, min(first + KEYS, problem.n_k)};
    static_assert(!CANONICAL || CANONICAL_TILE % ROWS == 0, "blocks begin at whole tiles");

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    const Own own = memory.own();
    own.template copy_keys<BYTES, THREADS>(inputs, head / problem.group, first, problem.n_k - first, problem);

    // Sum up what tile after tile of rows gives: of each key, a lane has its share of the rows.
    const S score(problem);
    auto rows_of = [&](int tile) { return HeadRows(problem, head, tile * ROWS); };
    float sums[HEIGHT] = {};
    auto put = [&] {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            const float whole = across_row(sums[i], added);
            float* const at = key_row(dbias, problem.group, first + L::row(i), 0, problem);
            if (at && L::lane() == 0) at[head] += whole;
            sums[i] = 0;
        }
    };
    auto add = [&](auto partial, const Other& other, const Stats& stats, const HeadRows& rows) {
        bias_gradients<decltype(partial)::value, DIM, DIM_V, LANES, HEIGHT, EACH>(
            own, other, stats, rows, first, problem, score, [&](int i, int, float share) { sums[i] += share; });
    };
    for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
        memory, row_stats, inputs, problem, visible, 1, keys, keys, rows_of, put, add);
    put();
}

template <int DIM, int DIM_V, int LANES, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS, bool BIAS,
          bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(16 * LANES)
gradient_drelative(double* parts, const __grid_constant__ GradientInputs<float> inputs, const VisibleColumns* visible,
                   const __grid_constant__ Problem<float> problem) {
    using S = Score<float, FUNCTIONS, BIAS, RELATIVE>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, WARPS = THREADS / 32, KEYS = HEIGHT * LANES, EACH = ROWS / 16;
    using Tiles = GradientTiles<float, L, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<float, ROWS>;
    const int head = blockIdx.y, warp = threadIdx.x / 32;
    static_assert(RELATIVE && !CANONICAL, "no canonical order");

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    float* const shares = reinterpret_cast<float*>(row_stats + STAGES);
    const Own own = memory.own();
    const S score(problem);
    const EntrySums<float> sums(score.relative, parts, WARPS, head);
    auto rows_of = [&](int tile) { return HeadRows(problem, head, tile * ROWS); };

    // Go through tiles of keys, of each through tiles of rows.
    for (int first = blockIdx.x * KEYS; first < problem.n_k; first += gridDim.x * KEYS) {
        const Interval keys{first, min(first + KEYS, problem.n_k)};
        own.template copy_keys<BYTES, THREADS>(inputs, head / problem.group, first, problem.n_k - first, problem);
        auto add = [&](auto partial, const Other& other, const Stats& stats, const HeadRows& rows) {
            bias_gradients<decltype(partial)::value, DIM, DIM_V, LANES, HEIGHT, EACH>(
                own, other, stats, rows, first, problem, score,
                [&](int i, int j, float share) { shares[L::row(i) * ROWS + L::other(j)] = share; });
            sums.template add_tile<2 * HEIGHT, ROWS>(
                shares, rows, first, [=](int i) { return i / 2 * LANES + 2 * warp + i % 2; });
        };
        for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
            memory, row_stats, inputs, problem, visible, 1, keys, keys, rows_of, [] {}, add);
        copy_wait<0>();
        __syncthreads();                           // all have read the keys
    }
}
