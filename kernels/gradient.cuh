// The backward pass of one block of K and V: what its kernels have in common.
//
// With p = exp(score - lse) the weights before dropout, m what dropout multiplies them by, and score' the derivative of
// the score by the scaled product (Dao 2023, FlashAttention-2, algorithm 2; Score is that of score.cuh):
//
//   dv = (m p)^T dout      ds = p (m (dout . v) - delta) score'      dq = scale ds k      dk = scale ds^T q
//
// Two kernels do it, each with sums of its own in registers: gradient_dq has a tile of rows and goes through the
// keys, for dq; gradient_dkdv has a tile of keys and goes through the rows, for dk and dv. So q . k and dout . v are
// made twice, 7 products in place of 5; but nothing is added by atomics, and no memory is needed for parts: the result
// depends on the arguments alone. With BIAS a third one, gradient_dbias, has a tile of keys and goes through the rows
// of one head, for p (m (dout . v) - delta), which is the gradient of the bias: two products more. With RELATIVE
// gradient_drelative does the same, for the entries of the tables by distance. CANONICAL: what
// CANONICAL_TILE keys, or queries, give is summed up by itself and added to what is there, so that it does not show
// where blocks are cut; see README.rst.
//
//   dq       (n_q, heads, dim)       gradient so far, float (double for double), read and written
//   dk       (n_k, kv_heads, dim)    the same
//   dv       (n_k, kv_heads, dim_v)  the same
//   dbias    (n_k, heads)            the same; what the heads that share a bias add to it is summed up afterwards
//   parts    (grid's x, warps, heads, widths)  of gradient_drelative: what each warp has met, double, read and written;
//            the widths are those of all tables
//   inputs   q, k, v and dout, lse and delta; see arguments.cuh
//   visible  (intervals, tiles of rows)  what the rows of each tile see, from `visible_columns` of state.cu
//   problem  what there is besides; see arguments.cuh
//
// The caller guarantees: dim <= DIM, dim_v <= DIM_V; every row of q, k, v and dout aligned to BYTES, which divides dim
// and dim_v in bytes; n_q group + ROWS and n_k + KEYS below 2^31.
//
// A pair that is not seen adds nothing to anything, be it NaN: its weight and ds are 0, and in tiles that are not seen
// in full zeros stand for what is not finite in q, k and dout. NaN comes through all the same: what has it made q . k,
// dout . v or delta NaN for each pair that it belongs to. A row whose delta is not finite has NaN for weights.
#pragma once

#include "rows.cuh"
#include "score.cuh"

// The rows of a tile, as `Rows` has them, but without a division for each: 2^32 / group, rounded up, times a number
// less than group + ROWS gives the quotient in its upper half, for groups of up to 65,000.
class TileRows {
    int heads, group, first_head, first_query, past, rows;
    unsigned inverse;

    // Queries from the first of the tile to that of a row.
    __device__ int queries_on(int row) const {
        if (group == 1) return row;
        return static_cast<int>(static_cast<unsigned long long>(past + row) * inverse >> 32);
    }

public:
    template <class A>
    __device__ TileRows(const Problem<A>& problem, int kv_head, int first)
        : heads(problem.kv_heads * problem.group), group(problem.group), first_head(kv_head * problem.group),
          first_query(first / problem.group), past(first % problem.group), rows(problem.n_q * problem.group - first),
          inverse(0xffffffffu / problem.group + 1) {}

    __device__ int count() const { return rows; }
    __device__ bool contains(int row) const { return row < rows; }
    __device__ int query(int row) const { return first_query + queries_on(row); }
    __device__ int head(int row) const { return first_head + past + row - queries_on(row) * group; }
    __device__ long long state_row(int row) const { return static_cast<long long>(query(row)) * heads + head(row); }
};

// The rows of a tile, of one head.
struct HeadRows {
    int heads, this_head, first, rows;

    template <class A>
    __device__ HeadRows(const Problem<A>& problem, int head, int first)
        : heads(problem.kv_heads * problem.group), this_head(head), first(first), rows(problem.n_q - first) {}

    __device__ int count() const { return rows; }
    __device__ bool contains(int row) const { return row < rows; }
    __device__ int query(int row) const { return first + row; }
    __device__ int head(int) const { return this_head; }
    __device__ long long state_row(int row) const { return static_cast<long long>(query(row)) * heads + this_head; }
};

// Tiles of two arrays side by side in shared memory, Q and dout, or K and V. Padding says how far apart rows are.
template <class T, class Padding, int DIM, int DIM_V, int ROWS>
struct TilePair {
    static constexpr int STRIDE = Padding::stride(DIM), STRIDE_V = Padding::stride(DIM_V);
    static constexpr int NUMBERS = ROWS * (STRIDE + STRIDE_V);
    T *tile, *tile_v;

    __device__ explicit TilePair(T* memory) : tile(memory), tile_v(memory + ROWS * STRIDE) {}

    // Start to copy rows; `row(i)` is the number of row i in arrays of dim and dim_v columns.
    template <int BYTES, int THREADS, class Row, class A>
    __device__ void copy(const T* array, const T* array_v, Row row, int count, const Problem<A>& problem) const {
        const int dim = problem.dim, dim_v = problem.dim_v;
        copy_tile<ROWS, DIM, STRIDE, BYTES, THREADS>(tile, [=](int r) { return array + row(r) * dim; }, count, dim);
        copy_tile<ROWS, DIM_V, STRIDE_V, BYTES, THREADS>(
            tile_v, [=](int r) { return array_v + row(r) * dim_v; }, count, dim_v);
    }

    // Start to copy rows of Q and dout; R: a kind of Rows.
    template <int BYTES, int THREADS, class R, class A>
    __device__ void copy_rows(const GradientInputs<T>& inputs, const R& rows, const Problem<A>& problem) const {
        copy<BYTES, THREADS>(
            inputs.q, inputs.dout, [&](int r) { return rows.state_row(r); }, rows.count(), problem);
    }

    // Start to copy rows of K and V: of a key head, key `key` and those that follow, `count` of which count.
    template <int BYTES, int THREADS, class A>
    __device__ void copy_keys(const GradientInputs<T>& inputs, int kv_head, int key, int count,
                              const Problem<A>& problem) const {
        const int kv_heads = problem.kv_heads;
        const long long first = static_cast<long long>(key) * kv_heads + kv_head;
        copy<BYTES, THREADS>(
            inputs.k, inputs.v, [=](int r) { return first + r * kv_heads; }, count, problem);
    }
};

// The tiles of a block of threads in shared memory: OWN rows that stay, STAGES times OTHERS that come and go.
template <class T, class Padding, int DIM, int DIM_V, int OWN, int OTHERS, int STAGES>
struct GradientTiles {
    using Own = TilePair<T, Padding, DIM, DIM_V, OWN>;
    using Other = TilePair<T, Padding, DIM, DIM_V, OTHERS>;
    T* memory;

    __device__ GradientTiles() : memory(reinterpret_cast<T*>(shared_memory())) {}
    __device__ Own own() const { return Own(memory); }
    __device__ Other other(int stage) const { return Other(memory + Own::NUMBERS + stage * Other::NUMBERS); }
    __device__ T* end() const { return memory + Own::NUMBERS + STAGES * Other::NUMBERS; }
};

// Row `key` of dk or dv, of a key head; null if there is no such key.
template <class A>
__device__ inline A* key_row(A* array, int columns, int key, int kv_head, const Problem<A>& problem) {
    if (key >= problem.n_k) return nullptr;
    return array + (static_cast<long long>(key) * problem.kv_heads + kv_head) * columns;
}

// Add to a gradient. In canonical order the product is rounded first, for then no sum of it with a number is -0, which
// adding 0 would change.
template <bool CANONICAL, class A>
__device__ inline void add_scaled(A& at, A x, A factor) {
    if constexpr (CANONICAL) at += rounded_product(x, factor);
    else at += x * factor;
}

// Add accumulators of tensor cores, times `factor`, to columns `start` .. of rows; `row(i)` points to row i or is null.
template <bool CANONICAL, class A, int HEIGHT, int N, class Row>
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
                    if (column < columns) add_scaled<CANONICAL>(at[column], acc[m][n][2 * h + i], factor);
                }
        }
}

template <class A, int HEIGHT, int N>
__device__ inline void clear(A (&acc)[HEIGHT][N][4]) {
#pragma unroll
    for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
}

// What is known of a row.
template <class A>
struct RowStats {
    A lse, delta;
    Interval sees;

    __device__ RowStats() {}
    __device__ RowStats(A lse, A delta, Interval sees) : lse(lse + (delta - delta)), delta(delta), sees(sees) {}
};

// What is known of the rows of a warp, in registers: lane 4 g + t has rows g and g + 8 of each 16, as of accumulators.
template <class A, int HEIGHT, class S>
struct WarpRowStats {
    RowStats<A> stats[HEIGHT][2];
    typename S::Row score[HEIGHT][2];

    __device__ static int row(int m, int h) { return 16 * m + 8 * h + threadIdx.x % 32 / 4; }

    // Read it, but for what the rows see; the first is row `first` of the block.
    template <class T>
    __device__ WarpRowStats(const GradientInputs<T>& inputs, const Rows& rows, int first, const S& of_problem) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int number = first + row(m, h);
                const long long at = rows.contains(number) ? rows.state_row(number) : 0;
                stats[m][h] = {inputs.lse[at], inputs.delta[at], Interval{0, 0}};
                score[m][h] = of_problem.row(rows, number);
            }
    }

    // Lane i brings the `interval` that row i of the warp sees, and gets those of its own rows.
    __device__ void see(Interval interval) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                stats[m][h].sees = {__shfl_sync(ALL_LANES, interval.low, row(m, h)),
                                    __shfl_sync(ALL_LANES, interval.high, row(m, h))};
    }
};

// What is known of the rows of a tile, in shared memory.
template <class A, int ROWS>
struct TileRowStats {
    A lse[ROWS], delta[ROWS];
    int begin[ROWS], end[ROWS];

    // Start to copy it, with interval `number` of what the rows see; a row that is not there sees nothing. R: TileRows
    // or HeadRows.
    template <int THREADS, class R, class T>
    __device__ void copy(const GradientInputs<T>& inputs, const R& rows, const Problem<A>& problem, int number) {
        const long long first = static_cast<long long>(number) * problem.n_q;
        for (int r = threadIdx.x; r < ROWS; r += THREADS) {
            const bool there = rows.contains(r);
            const long long at = there ? rows.state_row(r) : 0;
            const int query = there ? rows.query(r) : 0;
            copy_async<sizeof(A)>(lse + r, inputs.lse + at, there);
            copy_async<sizeof(A)>(delta + r, inputs.delta + at, there);
            copy_async<4>(begin + r, problem.begin + first + query, there);
            copy_async<4>(end + r, problem.end + first + query, there);
        }
    }

    __device__ RowStats<A> row(int r) const { return {lse[r], delta[r], {begin[r], end[r]}}; }
};

// The weight of a score, before dropout.
template <class A>
__device__ inline A known_weight(A x, A lse) {
    const A shift = x - lse;                   // above 0 by rounding alone, which is far where scores are huge
    return exponential(shift > 0 ? A{0} : shift);
}

// Of a row and a key: turn q . k into the weight that dv has; give p score', of which ds is made. PARTIAL: the row may
// not see the key.
template <bool PARTIAL, class A, class S>
__device__ inline A weigh(A& qk, const RowStats<A>& row, const typename S::Row& row_score, int column,
                          const typename S::Key& key, A scale, const S& score) {
    A derivative = 1;
    const A x = score.apply(rounded_product(qk, scale), row_score, key, derivative);
    const A p = known_weight(x, row.lse);
    qk = !PARTIAL || row.sees.holds(column) ? p * score.dropout_factor(row_score, key) : A{0};
    return p * derivative;
}

// The same: turn dout . v into ds, with what `weigh` gave.
template <bool PARTIAL, class A, class S>
__device__ inline void turn_to_ds(A& dout_v, A slope, const RowStats<A>& row, const typename S::Row& row_score,
                                  int column, const typename S::Key& key, const S& score) {
    const A ds = slope * (score.dropout_factor(row_score, key) * dout_v - row.delta);
    dout_v = !PARTIAL || row.sees.holds(column) ? ds : A{0};
}

// Both for one pair.
template <bool PARTIAL, class A, class S>
__device__ inline void differentiate(A& qk, A& dout_v, const RowStats<A>& row, const typename S::Row& row_score,
                                     int column, const typename S::Key& key, A scale, const S& score) {
    const A slope = weigh<PARTIAL>(qk, row, row_score, column, key, scale, score);
    turn_to_ds<PARTIAL>(dout_v, slope, row, row_score, column, key, score);
}

// What such a pair adds to the gradient of the key's bias: ds, but for the derivative of the score.
template <bool PARTIAL, class A, class S>
__device__ inline A bias_gradient(A qk, A dout_v, const RowStats<A>& row, const typename S::Row& row_score, int column,
                                  const typename S::Key& key, A scale, const S& score) {
    const A p = known_weight(score.apply(rounded_product(qk, scale), row_score, key), row.lse);
    const A share = p * (score.dropout_factor(row_score, key) * dout_v - row.delta);
    return !PARTIAL || row.sees.holds(column) ? share : A{0};
}

// What is summed up of pairs for the entries of tables by distance, by a warp: its part of `parts`, of one head.
template <class A>
class EntrySums {
    using Bias = RelativeBias<A, true>;
    const Bias& bias;
    double* sums;

    // Add what each lane has for an entry; where several have the same, one lane after the other, so that runs are the
    // same bit for bit. All lanes of the warp.
    __device__ static void add(double* of_axis, int entry, double x) {
        const int lane = threadIdx.x % 32;
        const unsigned same = __match_any_sync(ALL_LANES, entry);
        if (same == ALL_LANES) {
#pragma unroll
            for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
            if (lane == 0) of_axis[entry] += x;
            __syncwarp();
            return;
        }
        const int turn = __popc(same & ((1u << lane) - 1)), turns = __reduce_max_sync(ALL_LANES, __popc(same));
        for (int i = 0; i < turns; ++i) {
            if (i == turn) of_axis[entry] += x;
            __syncwarp();
        }
    }

public:
    __device__ EntrySums(const Bias& bias, double* parts, int warps, int head) : bias(bias) {
        const auto& problem = bias.problem;
        int widths = 0;
        for (int axis = 0; axis < problem.axes; ++axis) widths += problem.widths[axis];
        const long long warp = static_cast<long long>(blockIdx.x) * warps + threadIdx.x / 32;
        sums = parts + (warp * problem.kv_heads * problem.group + head) * widths;
    }

    // Add what KEYS keys of the warp and ROWS rows give: `shares`, (keys of the block, ROWS), in shared memory;
    // `key_of(i)` is the number of the warp's key i in the block, whose first key is `first`. All lanes of the warp.
    template <int KEYS, int ROWS, class KeyOf>
    __device__ void add_tile(const A* shares, const HeadRows& rows, int first, KeyOf key_of) const {
        const auto& problem = bias.problem;
        __syncwarp();                              // the shares of the warp are there
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < KEYS * ROWS; i += 32) {
            const int key = key_of(i / ROWS), row = i % ROWS;
            const double x = first + key < problem.n_k ? shares[key * ROWS + row] : A{0};
            if (__all_sync(ALL_LANES, x == 0)) continue;
            double* of_axis = sums;
#pragma unroll 1
            for (int axis = 0; axis < problem.axes; ++axis) {
                add(of_axis, bias.entry(bias.row(rows, row), bias.key(first + key), axis), x);
                of_axis += problem.widths[axis];
            }
        }
        __syncwarp();                              // all lanes have read them
    }
};

// The first tile of rows from number `from` on of which any row may see one of the keys; `count` if there is none. All
// lanes of a warp.
__device__ inline int next_tile(const VisibleColumns* visible, int from, int count, Interval keys) {
    for (int first = from; first < count; first += 32) {
        const int tile = first + threadIdx.x % 32;
        const bool sees = tile < count && !visible[tile].skips(keys.low, keys.high - keys.low);
        const int found = __reduce_min_sync(ALL_LANES, sees ? tile : NOWHERE);
        if (found != NOWHERE) return found;
    }
    return count;
}

// Says where tiles of rows, in ascending order, come to another tile of CANONICAL_TILE queries, or to another interval;
// never but in canonical order.
template <bool CANONICAL, int ROWS>
class CanonicalTiles {
    int rows, current = 0, interval = 0;

public:
    __device__ explicit CanonicalTiles(int group) : rows(CANONICAL_TILE * group) {}

    // Whether a tile of rows is of another one than the tile before.
    __device__ bool begins(int tile, int number) {
        if constexpr (!CANONICAL) return false;
        const int now = tile * ROWS / rows;
        const bool begins = now != current || number != interval;
        current = now;
        interval = number;
        return begins;
    }
};

// Go through the tiles that `next` gives, which finds the first of `count` from a number on: `load(tile, stage)` starts
// to copy one to a stage, of which there are 1 or 2, while `work(tile, stage)` is at the one before. All threads of
// the block.
template <int STAGES, class Next, class Load, class Work>
__device__ inline void for_tiles(int count, Next next, Load load, Work work) {
    int ahead = next(0);
    if (STAGES == 2 && ahead < count) load(ahead, 0);
    copy_commit();
    for (int i = 0; ahead < count; ++i) {
        const int tile = ahead, stage = i % STAGES;
        ahead = next(tile + 1);
        if constexpr (STAGES == 1) {
            __syncthreads();                       // all have read the tile before
            load(tile, 0);
            copy_commit();
        }
        copy_wait<0>();                            // the tile is here, for this thread;
        __syncthreads();                           // for all, and all have read the one before, whose stage is free
        if (STAGES == 2 && ahead < count) load(ahead, 1 - stage);
        copy_commit();
        work(tile, stage);
    }
}

// Go through the tiles of rows of which any may see one of `all`, the keys of the block, in one interval after the
// other: `rows_of(tile)` are its rows, what is known of them goes to `row_stats`, one for each stage. `work(partial,
// tile, stats, rows)` is called where any may see one of `keys`, those of the warp; `begin()` in canonical order before
// the first tile of another CANONICAL_TILE queries, of `group` rows each, and before another interval. All threads of
// the block.
template <int BYTES, int THREADS, bool SEVERAL, bool CANONICAL, int ROWS, int STAGES, class Tiles, class Stats, class T,
          class A, class RowsOf, class Begin, class Work>
__device__ inline void for_row_tiles(const Tiles& memory, Stats* row_stats, const GradientInputs<T>& inputs,
                                     const Problem<A>& problem, const VisibleColumns* visible, int group, Interval all,
                                     Interval keys, RowsOf rows_of, Begin begin, Work work) {
    const int tiles = (problem.n_q * group + ROWS - 1) / ROWS;
    auto interval_of = [&](int i) { return SEVERAL ? i / tiles : 0; };
    auto load = [&](int i, int stage) {
        const int number = interval_of(i);
        const auto rows = rows_of(i - number * tiles);
        memory.other(stage).template copy_rows<BYTES, THREADS>(inputs, rows, problem);
        row_stats[stage].template copy<THREADS>(inputs, rows, problem, number);
    };
    CanonicalTiles<CANONICAL, ROWS> canonical_tiles(group);
    const int of_all = SEVERAL ? tiles * problem.intervals : tiles;
    for_tiles<STAGES>(of_all, [&](int from) { return next_tile(visible, from, of_all, all); }, load,
                      [&](int i, int stage) {
        const int number = interval_of(i), tile = i - number * tiles;
        if (canonical_tiles.begins(tile, number)) begin();
        const VisibleColumns of_tile = visible[i];
        const int count = keys.high - keys.low;
        if (count <= 0 || of_tile.skips(keys.low, count)) return;
        const auto rows = rows_of(tile);
        if (!CANONICAL && of_tile.full(keys.low, count)) work(False{}, memory.other(stage), row_stats[stage], rows);
        else work(True{}, memory.other(stage), row_stats[stage], rows);
    });
}

// Go through the tiles of keys in `range`, those of a key head: `work(partial, tile, start)` is called where the rows
// of the warp, of which `visible` is, may see any; `begin()` in canonical order before the first of another
// CANONICAL_TILE keys. All threads of the block.
template <int BYTES, int THREADS, bool CANONICAL, int KEYS, int STAGES, class Tiles, class T, class A, class Begin,
          class Work>
__device__ inline void for_key_tiles(const Tiles& memory, const GradientInputs<T>& inputs, const Problem<A>& problem,
                                     int kv_head, Interval range, const VisibleColumns& visible, Begin begin,
                                     Work work) {
    auto load = [&](int i, int stage) {
        const int start = range.low + i * KEYS;
        memory.other(stage).template copy_keys<BYTES, THREADS>(
            inputs, kv_head, start, columns_there<CANONICAL>(range, problem.n_k, start), problem);
    };
    for_tiles<STAGES>(range.tiles(KEYS), [](int i) { return i; }, load, [&](int i, int stage) {
        const int start = range.low + i * KEYS;
        if (CANONICAL && start % CANONICAL_TILE == 0) begin();
        if (visible.skips(start, KEYS)) return;
        if (!CANONICAL && visible.full(start, KEYS)) work(False{}, memory.other(stage), start);
        else work(True{}, memory.other(stage), start);
    });
}
