// The backward pass of one block of K and V on tensor cores by pairs of warps, for float64. The first warp of a pair
// makes q . k, the second dout . v, so that each has half of the accumulators, and dk and dv take one launch; what one
// makes and the other needs goes through shared memory. Arguments and promises are in gradient.cuh.
//
// gradient_dq: grid (ceil(n_q group / ROWS), kv_heads, slices) of 64 PAIRS threads; ROWS = 16 HEIGHT PAIRS; a block has
// COLUMNS columns of dq, those of its slice, and each warp of a pair half of them. gradient_dkdv: grid (ceil(n_k /
// KEYS), kv_heads, slices); KEYS = 16 HEIGHT PAIRS; a block has COLUMNS columns of dv, in the first warps, and of dk,
// in the second. Dynamic shared memory: as for gradient_tensor.cu, and then for each pair one Handed, two for gradient_dq.
// The caller guarantees further: dim_v <= DIM; DIM and tiles multiples of 16; COLUMNS a multiple of 32, of 16 for
// gradient_dkdv; slices reach beyond DIM by 16 columns at most.

#include "fragments.cuh"
#include "gradient.cuh"

// Accumulators that the lanes of a warp hand to those of another.
template <class A, int HEIGHT, int N>
struct Handed {
    struct alignas(16) Part { A x[16 / sizeof(A)]; };
    static constexpr int NUMBERS = 16 / sizeof(A), PARTS = 4 / NUMBERS;
    Part parts[HEIGHT][N][PARTS][32];

    __device__ void put(int m, int n, const A (&x)[4]) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            Part part;
#pragma unroll
            for (int j = 0; j < NUMBERS; ++j) part.x[j] = x[i * NUMBERS + j];
            parts[m][n][i][threadIdx.x % 32] = part;
        }
    }

    __device__ void get(int m, int n, A (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const Part part = parts[m][n][i][threadIdx.x % 32];
#pragma unroll
            for (int j = 0; j < NUMBERS; ++j) x[i * NUMBERS + j] = part.x[j];
        }
    }
};

// Wait for the other warp of the pair.
__device__ inline void meet_other(int pair) { named_barrier_sync(1 + pair, 64); }

template <class T, int DIM, int COLUMNS, int PAIRS, int HEIGHT, int KEYS, int STAGES, int BYTES, bool FUNCTIONS,
          bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(64 * PAIRS)
gradient_dq(Accumulator<T>* dq, const __grid_constant__ GradientInputs<T> inputs,
            const __grid_constant__ Problem<Accumulator<T>> problem) {
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 64 * PAIRS, PAIR_ROWS = 16 * HEIGHT, ROWS = PAIR_ROWS * PAIRS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM, ROWS, KEYS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Products = Handed<A, HEIGHT, KEYS / 8>;
    static_assert(PAIR_ROWS <= 32, "one interval a lane");
    static_assert(!CANONICAL || CANONICAL_TILE % KEYS == 0, "blocks begin at whole tiles");
    static_assert(COLUMNS % 32 == 0, "whole tiles for either warp");
    const int warp = threadIdx.x / 32, pair = warp % PAIRS, lane = threadIdx.x % 32, mine = pair * PAIR_ROWS;
    const bool first = warp < PAIRS;
    const int slice = blockIdx.z * COLUMNS + (first ? 0 : COLUMNS / 2);

    // What each row sees, and the tiles of keys that any row of the block sees, in one interval after the other.
    const Rows rows = rows_of_block(problem, ROWS);
    const bool has_row = lane < PAIR_ROWS && rows.contains(mine + lane);
    VisibleColumns visible;
    Interval interval, range;
    auto look = [&](int number) {
        interval = has_row ? rows.interval(problem.begin, problem.end, number, mine + lane) : Interval{0, 0};
        visible = visible_to_warp(interval, has_row);
        range = columns_to_visit<CANONICAL>(visible_to_block<2 * PAIRS>(visible).hull, KEYS);
    };
    look(0);
    if (range.tiles(KEYS) == 0 && !SEVERAL) return;

    // Q and dout are on their way while the rest of what is known of the rows is read.
    const Tiles memory;
    const Own own = memory.own();
    Products* const handed = reinterpret_cast<Products*>(memory.end()) + 2 * pair;
    own.template copy_rows<BYTES, THREADS>(inputs, rows, problem);
    const S score(problem);
    WarpRowStats<A, HEIGHT, S> known(inputs, rows, mine, score);
    known.see(interval);

    // Add what tile after tile of keys gives. Both warps make the same ds of what the two have made.
    A acc[HEIGHT][COLUMNS / 16][4] = {};
    auto put = [&] {
        auto row_of = [&](int r) {
            return rows.contains(mine + r) ? dq + rows.state_row(mine + r) * problem.dim : nullptr;
        };
        add_to<CANONICAL>(row_of, acc, slice, problem.dim, problem.scale);
    };
    const T* const own_tile = first ? own.tile : own.tile_v;
    auto add = [&](auto partial, const Other& other, int start) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A s[HEIGHT][KEYS / 8][4] = {};                  // q . k, then slopes; or dout . v; then ds
        multiply_transposed<DIM>(s, own_tile, mine, first ? other.tile : other.tile_v, Own::STRIDE);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int m = 0; m < HEIGHT; ++m) {
                if (first) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = column_of(start, n, i);
                        s[m][n][i] = weigh<PARTIAL>(s[m][n][i], known.stats[m][i / 2], known.score[m][i / 2], column,
                                                    score.key(column), problem.scale, score);
                    }
                }
                handed[first].put(m, n, s[m][n]);
            }
        meet_other(pair);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int m = 0; m < HEIGHT; ++m) {
                A theirs[4];
                handed[!first].get(m, n, theirs);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = column_of(start, n, i);
                    const A slope = first ? s[m][n][i] : theirs[i];
                    A dout_v = first ? theirs[i] : s[m][n][i];
                    turn_to_ds<PARTIAL>(dout_v, slope, known.stats[m][i / 2], known.score[m][i / 2], column,
                                        score.key(column), score);
                    s[m][n][i] = dout_v;
                }
            }
        multiply<PARTIAL, T>(acc, s, other.tile, Other::STRIDE, slice);
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

template <class T, int DIM, int COLUMNS, int PAIRS, int HEIGHT, int ROWS, int STAGES, int BYTES, bool FUNCTIONS,
          bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(64 * PAIRS)
gradient_dkdv(Accumulator<T>* dk, Accumulator<T>* dv, const __grid_constant__ GradientInputs<T> inputs,
              const VisibleColumns* visible, const Problem<Accumulator<T>> problem) {     // a copy of it: spills less
    using A = Accumulator<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 64 * PAIRS, PAIR_KEYS = 16 * HEIGHT, KEYS = PAIR_KEYS * PAIRS;
    using Tiles = GradientTiles<T, Fragments<T>, DIM, DIM, KEYS, ROWS, STAGES>;
    using Own = typename Tiles::Own;
    using Other = typename Tiles::Other;
    using Stats = TileRowStats<A, ROWS>;
    using Slopes = Handed<A, HEIGHT, ROWS / 8>;
    static_assert(!CANONICAL || CANONICAL_TILE % ROWS == 0, "blocks begin at whole tiles");
    const int warp = threadIdx.x / 32, pair = warp % PAIRS, lane = threadIdx.x % 32, mine = pair * PAIR_KEYS;
    const bool first = warp < PAIRS;
    const int slice = blockIdx.z * COLUMNS, kv_head = blockIdx.y, first_key = blockIdx.x * KEYS;
    const Interval all{first_key, min(first_key + KEYS, problem.n_k)};
    const Interval keys{first_key + mine, min(first_key + mine + PAIR_KEYS, problem.n_k)};     // of this pair

    const Tiles memory;
    Stats* const row_stats = reinterpret_cast<Stats*>(memory.end());
    Slopes& slopes = reinterpret_cast<Slopes*>(row_stats + STAGES)[pair];
    const Own own = memory.own();
    own.template copy_keys<BYTES, THREADS>(inputs, kv_head, first_key, problem.n_k - first_key, problem);

    // Add what tile after tile of rows gives: the first warp to dv, the second to dk.
    const S score(problem);
    auto rows_of = [&](int tile) { return TileRows(problem, kv_head, tile * ROWS); };
    A acc[HEIGHT][COLUMNS / 8][4] = {};
    auto put = [&] {
        A* const array = first ? dv : dk;
        const int columns = first ? problem.dim_v : problem.dim;
        auto row_of = [&](int r) { return key_row(array, columns, keys.low + r, kv_head, problem); };
        add_to<CANONICAL>(row_of, acc, slice, columns, first ? A{1} : problem.scale);
    };
    const T* const own_tile = first ? own.tile : own.tile_v;
    auto add = [&](auto partial, const Other& other, const Stats& stats, const TileRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        A s[HEIGHT][ROWS / 8][4] = {};                  // q . k, then weights; or dout . v, then ds
        multiply_transposed<DIM>(s, own_tile, mine, first ? other.tile : other.tile_v, Own::STRIDE);
        auto for_all = [&](auto work) {
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
                for (int m = 0; m < HEIGHT; ++m) work(m, n);
        };
        auto column = [&](int m, int i) { return keys.low + 16 * m + 8 * (i / 2) + lane / 4; };
        if (first) {
            for_all([&](int m, int n) {
                A slope[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = column_of(0, n, i);
                    slope[i] = weigh<PARTIAL>(s[m][n][i], stats.row(r), score.row(rows, r), column(m, i),
                                              score.key(column(m, i)), problem.scale, score);
                }
                slopes.put(m, n, slope);
            });
        }
        meet_other(pair);
        if (!first) {
            for_all([&](int m, int n) {
                A slope[4];
                slopes.get(m, n, slope);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int r = column_of(0, n, i);
                    turn_to_ds<PARTIAL>(s[m][n][i], slope[i], stats.row(r), score.row(rows, r), column(m, i),
                                        score.key(column(m, i)), score);
                }
            });
        }
        multiply<PARTIAL, T>(acc, s, first ? other.tile_v : other.tile, Other::STRIDE, slice);
    };
    auto begin = [&] {
        put();
        clear(acc);
    };
    for_row_tiles<BYTES, THREADS, SEVERAL, CANONICAL, ROWS, STAGES>(
        memory, row_stats, inputs, problem, visible, problem.group, all, keys, rows_of, begin, add);
    put();
}
