// The backward pass of one block of K and V on tensor cores: bfloat16, float16, float64. Arguments and promises are in
// gradient.cuh. Weights and ds are rounded to 16 bits for the products that they are the left side of.
//
// gradient_dq: grid (ceil(n_q group / ROWS), kv_heads, slices) of 32 WARPS threads; ROWS = 16 HEIGHT WARPS; a
// block has COLUMNS columns of dq, those of its slice. gradient_dkdv: grid (ceil(n_k / KEYS), kv_heads, slices); KEYS =
// 16 HEIGHT WARPS; a block has COLUMNS columns of dk and COLUMNS_V of dv, 0 of one of them if both are too many for its
// registers; if there are several slices, either is 0. Dynamic shared memory: of Q and dout, or K and V, the rows of
// the block; STAGES times the tile of the others; but for gradient_dq STAGES TileRowStats; rows padded as Fragments
// says. gradient_dbias: grid (ceil(n_k / KEYS), heads), else as gradient_dkdv; `visible` is of tiles of the rows of one
// head. gradient_drelative: as gradient_dbias, but any grid (.., heads), and KEYS ROWS sums of pairs in shared memory.
// DIM, DIM_V, COLUMNS and tiles are multiples of 16.

#include "fragments.cuh"
#include "gradient.cuh"
#include "softmax.cuh"

template <class T, int DIM, int DIM_V, int COLUMNS, int WARPS, int HEIGHT, int KEYS, int STAGES, int BYTES,
          bool FUNCTIONS, bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(32 * WARPS)
gradient_dq(Accumulator<T>* dq, const __grid_constant__ GradientInputs<T> inputs,
            const __grid_constant__ Problem<Accumulator<T>> problem) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 32 * WARPS, WARP_ROWS = 16 * HEIGHT, ROWS = WARP_ROWS * WARPS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM_V, ROWS, KEYS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    static_assert(WARP_ROWS <= 32, "one interval a lane");
    static_assert(!CANONICAL || CANONICAL_TILE % KEYS == 0, "blocks begin at whole tiles");
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_ROWS;
    const int slice = blockIdx.z * COLUMNS;

    // What each row sees, and the tiles of keys that any row of the block sees, in one interval after the other.
    const Rows rows = rows_of_block(problem, ROWS);
    const bool has_row = lane < WARP_ROWS && rows.contains(mine + lane);
    VisibleColumns visible;
    Interval interval, range;
    auto look = [&](int number) {
        interval = has_row ? rows.interval(problem.begin, problem.end, number, mine + lane) : Interval{0, 0};
        visible = visible_to_warp(interval, has_row);
        range = columns_to_visit<CANONICAL>(visible_to_block<WARPS>(visible).hull, KEYS);
    };
    look(0);
    if (range.tiles(KEYS) == 0 && !SEVERAL) return;

    // Q and dout are on their way while the rest of what is known of the rows is read.
    const Tiles memory;
    const Own own = memory.own();
    own.template copy_rows<BYTES, THREADS>(inputs, rows, problem);
    const S score(problem);
    WarpRowStats<A, HEIGHT, S> known(inputs, rows, mine, score);
    known.see(interval);

    // Add what tile after tile of keys gives.
    A acc[HEIGHT][COLUMNS / 8][4] = {};
    auto put = [&] {
        auto row_of = [&](int r) {
            return rows.contains(mine + r) ? dq + rows.state_row(mine + r) * problem.dim : nullptr;
        };
        add_to<CANONICAL>(row_of, acc, slice, problem.dim, problem.scale);
    };
    auto add = [&](auto partial, const Other& other, int start) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A qk[HEIGHT][KEYS / 8][4] = {}, dout_v[HEIGHT][KEYS / 8][4] = {};
        multiply_transposed<DIM>(qk, own.tile, mine, other.tile, Own::STRIDE);
        multiply_transposed<DIM_V>(dout_v, own.tile_v, mine, other.tile_v, Own::STRIDE_V);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = column_of(start, n, i);
                const typename S::Key key = score.key(column);
#pragma unroll
                for (int m = 0; m < HEIGHT; ++m)
                    differentiate<PARTIAL>(qk[m][n][i], dout_v[m][n][i], known.stats[m][i / 2], known.score[m][i / 2],
                                           column, key, problem.scale, score);
            }
        multiply<PARTIAL, T>(acc, dout_v, other.tile, Other::STRIDE, slice);
    };
    auto begin = [&] {
        put();
        clear(acc);
    };
    for (int number = 0;;) {
        for_key_tiles<BYTES, THREADS, CANONICAL, KEYS, STAGES>(memory, inputs, problem, rows.kv_head, range, visible,
                                                               begin, add);
        if (!SEVERAL || ++number >= problem.intervals) break;
        __syncthreads();                           // all have read the last tile of the interval before
        look(number);
        known.see(interval);
        if (CANONICAL) begin();
    }
    put();
}

template <class T, int DIM, int DIM_V, int COLUMNS, int COLUMNS_V, int WARPS, int HEIGHT, int ROWS, int STAGES,
          int BYTES, bool FUNCTIONS, bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(32 * WARPS)
gradient_dkdv(Accumulator<T>* dk, Accumulator<T>* dv, const __grid_constant__ GradientInputs<T> inputs,
              const VisibleColumns* visible, const Problem<Accumulator<T>> problem) {     // a copy of it: spills less
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 32 * WARPS, WARP_KEYS = 16 * HEIGHT, KEYS = WARP_KEYS * WARPS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<A, ROWS>;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_KEYS, kv_head = blockIdx.y;
    const int first = blockIdx.x * KEYS;
    const int slice = blockIdx.z * (COLUMNS ? COLUMNS : COLUMNS_V);
    const Interval all{first, min(first + KEYS, problem.n_k)};
    const Interval keys{first + mine, min(first + mine + WARP_KEYS, problem.n_k)};     // of this warp
    static_assert(!CANONICAL || CANONICAL_TILE % ROWS == 0, "blocks begin at whole tiles");

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    const Own own = memory.own();
    own.template copy_keys<BYTES, THREADS>(inputs, kv_head, first, problem.n_k - first, problem);

    // Add what tile after tile of rows gives.
    const S score(problem);
    auto rows_of = [&](int tile) { return TileRows(problem, kv_head, tile * ROWS); };
    A acc[HEIGHT][COLUMNS ? COLUMNS / 8 : 1][4] = {}, acc_v[HEIGHT][COLUMNS_V ? COLUMNS_V / 8 : 1][4] = {};
    auto put = [&] {
        auto row_of = [&](A* array, int columns) {
            return [=, &problem](int r) { return key_row(array, columns, keys.low + r, kv_head, problem); };
        };
        if constexpr (COLUMNS != 0)
            add_to<CANONICAL>(row_of(dk, problem.dim), acc, slice, problem.dim, problem.scale);
        if constexpr (COLUMNS_V != 0) add_to<CANONICAL>(row_of(dv, problem.dim_v), acc_v, slice, problem.dim_v, A{1});
    };
    auto add = [&](auto partial, const Other& other, const Stats& stats, const TileRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A qk[HEIGHT][ROWS / 8][4] = {}, dout_v[HEIGHT][ROWS / 8][4] = {};
        multiply_transposed<DIM>(qk, own.tile, mine, other.tile, Own::STRIDE);
        if constexpr (COLUMNS != 0) multiply_transposed<DIM_V>(dout_v, own.tile_v, mine, other.tile_v, Own::STRIDE_V);
#pragma unroll
        for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int r = column_of(0, n, j);
                const RowStats<A> row = stats.row(r);
                const typename S::Row row_score = score.row(rows, r);
#pragma unroll
                for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
                    for (int i = j; i < 4; i += 2) {
                        const int column = keys.low + 16 * m + 8 * (i / 2) + lane / 4;
                        differentiate<PARTIAL>(qk[m][n][i], dout_v[m][n][i], row, row_score, column, score.key(column),
                                               problem.scale, score);
                    }
            }
        if constexpr (COLUMNS_V != 0) multiply<PARTIAL, T>(acc_v, qk, other.tile_v, Other::STRIDE_V, slice);
        if constexpr (COLUMNS != 0) multiply<PARTIAL, T>(acc, dout_v, other.tile, Other::STRIDE, slice);
    };
    auto begin = [&] {
        put();
        clear(acc);
        clear(acc_v);
    };
    for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
        memory, row_stats, inputs, problem, visible, problem.group, all, keys, rows_of, begin, add);
    put();
}

// What the pairs of a warp's keys, row `mine` of `own` and key `first` on, and of a tile of rows give a bias:
// `take(m, h, r, share)` for key 16 m + 8 h + lane / 4 and row r.
template <bool PARTIAL, class T, int DIM, int DIM_V, int HEIGHT, int ROWS, class Own, class Other, class Stats, class S,
          class Take>
__device__ inline void bias_gradients(const Own& own, const Other& other, const Stats& stats, const HeadRows& rows,
                                      int mine, int first, const Problem<Accumulator<T>>& problem, const S& score,
                                      Take take) {
    using A = Accumulator<T>;
    A qk[HEIGHT][ROWS / 8][4] = {}, dout_v[HEIGHT][ROWS / 8][4] = {};
    multiply_transposed<DIM>(qk, own.tile, mine, other.tile, Own::STRIDE);
    multiply_transposed<DIM_V>(dout_v, own.tile_v, mine, other.tile_v, Own::STRIDE_V);
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int r = column_of(0, n, j);
            const RowStats<A> row = stats.row(r);
            const typename S::Row row_score = score.row(rows, r);
#pragma unroll
            for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int column = first + 16 * m + 8 * h + threadIdx.x % 32 / 4;
                    take(m, h, r, bias_gradient<PARTIAL>(qk[m][n][2 * h + j], dout_v[m][n][2 * h + j], row, row_score,
                                                         column, score.key(column), problem.scale, score));
                }
        }
}

template <class T, int DIM, int DIM_V, int WARPS, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS,
          bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(32 * WARPS)
gradient_dbias(Accumulator<T>* dbias, const __grid_constant__ GradientInputs<T> inputs, const VisibleColumns* visible,
               const __grid_constant__ Problem<Accumulator<T>> problem) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 32 * WARPS, WARP_KEYS = 16 * HEIGHT, KEYS = WARP_KEYS * WARPS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<A, ROWS>;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_KEYS;
    const int head = blockIdx.y, first = blockIdx.x * KEYS;
    const Interval all{first, min(first + KEYS, problem.n_k)};
    const Interval keys{first + mine, min(first + mine + WARP_KEYS, problem.n_k)};     // of this warp
    static_assert(!CANONICAL || CANONICAL_TILE % ROWS == 0, "blocks begin at whole tiles");

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    const Own own = memory.own();
    own.template copy_keys<BYTES, THREADS>(inputs, head / problem.group, first, problem.n_k - first, problem);

    // Sum up what tile after tile of rows gives: of each key, a lane has its share of the rows.
    const S score(problem);
    auto rows_of = [&](int tile) { return HeadRows(problem, head, tile * ROWS); };
    A sums[HEIGHT][2] = {};
    auto put = [&] {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const A whole = sum_of_row(sums[m][h]);
                A* const at = key_row(dbias, problem.group, keys.low + 16 * m + 8 * h + lane / 4, 0, problem);
                if (at && lane % 4 == 0) at[head] += whole;
                sums[m][h] = 0;
            }
    };
    auto add = [&](auto partial, const Other& other, const Stats& stats, const HeadRows& rows) {
        bias_gradients<decltype(partial)::value, T, DIM, DIM_V, HEIGHT, ROWS>(
            own, other, stats, rows, mine, keys.low, problem, score,
            [&](int m, int h, int, A share) { sums[m][h] += share; });
    };
    for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
        memory, row_stats, inputs, problem, visible, 1, all, keys, rows_of, put, add);
    put();
}

template <class T, int DIM, int DIM_V, int WARPS, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS,
          bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(32 * WARPS)
gradient_drelative(double* parts, const __grid_constant__ GradientInputs<T> inputs, const VisibleColumns* visible,
                   const __grid_constant__ Problem<Accumulator<T>> problem) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 32 * WARPS, WARP_KEYS = 16 * HEIGHT, KEYS = WARP_KEYS * WARPS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM_V, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<A, ROWS>;
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_KEYS, head = blockIdx.y;
    static_assert(RELATIVE && !CANONICAL, "no canonical order");

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    A* const shares = reinterpret_cast<A*>(row_stats + STAGES);
    const Own own = memory.own();
    const S score(problem);
    const EntrySums<A> sums(score.relative, parts, WARPS, head);
    auto rows_of = [&](int tile) { return HeadRows(problem, head, tile * ROWS); };

    // Go through tiles of keys, of each through tiles of rows.
    for (int first = blockIdx.x * KEYS; first < problem.n_k; first += gridDim.x * KEYS) {
        const Interval all{first, min(first + KEYS, problem.n_k)};
        const Interval keys{first + mine, min(first + mine + WARP_KEYS, problem.n_k)};     // of this warp
        own.template copy_keys<BYTES, THREADS>(inputs, head / problem.group, first, problem.n_k - first, problem);
        auto add = [&](auto partial, const Other& other, const Stats& stats, const HeadRows& rows) {
            bias_gradients<decltype(partial)::value, T, DIM, DIM_V, HEIGHT, ROWS>(
                own, other, stats, rows, mine, keys.low, problem, score, [&](int m, int h, int r, A share) {
                    shares[(mine + 16 * m + 8 * h + lane / 4) * ROWS + r] = share;
                });
            sums.template add_tile<WARP_KEYS, ROWS>(shares, rows, first, [=](int i) { return mine + i; });
        };
        for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
            memory, row_stats, inputs, problem, visible, 1, all, keys, rows_of, [] {}, add);
        copy_wait<0>();
        __syncthreads();                           // all have read the keys
    }
}
