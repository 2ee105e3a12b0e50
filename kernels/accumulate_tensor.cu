// Fold one block of K and V into the running softmax of the queries, on tensor cores: bfloat16, float16, float64.
//
//   acc        (n_q, heads, stride_v)  sum of exp(score - row_max) v, float (double for double), read and written
//   row_max, row_sum   (n_q, heads)            running maximum and sum, of acc's type, read and written
//   q          (n_q, heads, dim)       head h uses key head h / group, heads = kv_heads * group
//   k          (n_k, kv_heads, dim)
//   v          (n_k, kv_heads, stride_v), of which columns 0 .. dim_v are folded into those of acc
//   begin, end (n_q,)                  query i sees columns begin[i] <= j < end[i], within 0 .. n_k
//   scale                              factor of the scores q . k
//   width                              columns of a part: the grid's z has as many parts as cover n_k
//   packed_score                       with FUNCTIONS: a PackedScore; see score.cuh
//   fresh                              whether to leave out what acc, row_max and sum hold, and to write each part to
//                                      arrays of its own, (parts, n_q, heads, ..), for combine of state.cu
//
// grid (ceil(n_q group / ROWS), kv_heads, parts) of 32 WARPS threads; ROWS = 16 HEIGHT WARPS; dynamic shared memory:
// ROWS rows of Q, STAGES times KEYS rows of K and of V, each row padded as Fragments says.
// The caller guarantees: dim <= DIM, dim_v <= DIM_V; DIM, DIM_V and KEYS multiples of 16; every row of q, k and v
// aligned to BYTES, which divides dim and dim_v in bytes; n_k + width < 2^31.
//
// A query that sees nothing is left as it was. What a query does not see does not reach it, be it NaN; NaN and
// infinity in what it sees come through. No atomics: the result depends on the arguments alone.
// The algorithm is that of Dao 2023, FlashAttention-2, algorithm 1, with the state kept between launches.

#include "fragments.cuh"
#include "score.cuh"

// The rows of a warp: what they see, and their state in registers.
template <class T, int DIM_V, int HEIGHT, class S>
struct WarpRows {
    using A = Accumulator<T>;
    using F = Fragments<T>;
    A acc[HEIGHT][DIM_V / 8][4];
    A row_max[HEIGHT][2], row_sum[HEIGHT][2];         // of rows g and g + 8 of each 16; of row_sum, this lane's share
    Interval sees[HEIGHT][2];
    typename S::Row row_score[HEIGHT][2];

    // Take up the state of rows `first` .., each with what it sees, of which a lane knows its own row's.
    __device__ void load(const StateArrays<A>& arrays, const Rows& rows, int first, Interval interval, const S& score) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int local = 16 * m + 8 * h + lane / 4;
                sees[m][h] = {__shfl_sync(ALL_LANES, interval.low, local),
                              __shfl_sync(ALL_LANES, interval.high, local)};
                row_score[m][h] = score.row(rows, first + local);
                const bool known = !arrays.fresh && rows.contains(first + local);
                const long long at = known ? rows.state_row(first + local) : 0;
                row_max[m][h] = known ? arrays.row_max[at] : -infinity(A{});
                row_sum[m][h] = known && lane % 4 == 0 ? arrays.row_sum[at] : A{0};
#pragma unroll
                for (int n = 0; n < DIM_V / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int column = column_of(0, n, i);
                        acc[m][n][2 * h + i] =
                            known && column < arrays.dim_v ? arrays.acc[at * arrays.stride_v + column] : A{0};
                    }
            }
    }

    // Put the state back.
    __device__ void store(const StateArrays<A>& arrays, const Rows& rows, int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                A total = row_sum[m][h];
                total += __shfl_xor_sync(ALL_LANES, total, 1);
                total += __shfl_xor_sync(ALL_LANES, total, 2);
                const int row = first + 16 * m + 8 * h + lane / 4;
                if (!rows.contains(row)) continue;
                const long long at = arrays.target_row(rows.state_row(row));
                if (lane % 4 == 0) {
                    arrays.row_max[at] = row_max[m][h];
                    arrays.row_sum[at] = total;
                }
#pragma unroll
                for (int n = 0; n < DIM_V / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int column = column_of(0, n, i);
                        if (column < arrays.dim_v) arrays.acc[at * arrays.stride_v + column] = acc[m][n][2 * h + i];
                    }
            }
    }

    // Add NaN or infinity where V has it among the keys that a row sees; a rare way.
    template <int KEYS>
    __device__ void add_not_finite(const T* v_tile, int stride, int start) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int n = 0; n < DIM_V / 16; ++n) {
                A found[2][4] = {};
#pragma unroll 1
                for (int key = 0; key < KEYS; key += F::DEPTH) {
                    A visible[F::DEPTH / 8][4];
                    typename F::Register a[4], b[4];
#pragma unroll
                    for (int i = 0; i < F::DEPTH / 2; ++i)
                        visible[i / 4][i % 4] = sees[m][i % 4 / 2].holds(column_of(start + key, i / 4, i % 4));
                    F::weights(a, visible, 0);
                    F::right(b, v_tile, stride, key, n * 16);
                    multiply_add(T{}, found[0], a, F::Finite::codes(b[0]), F::Finite::codes(b[1]));
                    multiply_add(T{}, found[1], a, F::Finite::codes(b[2]), F::Finite::codes(b[3]));
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) add_found(acc[m][2 * n + i / 4][i % 4], found[i / 4][i % 4]);
            }
    }

    // Turn the scores of a tile into weights, and move the state to the new maximum.
    template <int N>
    __device__ void weigh(A (&s)[N][4], int m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            A high = row_max[m][h];
#pragma unroll
            for (int n = 0; n < N; ++n) high = larger(high, larger(s[n][2 * h], s[n][2 * h + 1]));
            high = larger(high, __shfl_xor_sync(ALL_LANES, high, 1));
            high = larger(high, __shfl_xor_sync(ALL_LANES, high, 2));
            const A base = high == -infinity(A{}) ? A{0} : high;    // -inf - -inf would be NaN
            const A shrink = exponential(row_max[m][h] - base);
            row_max[m][h] = high;
            A more = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    s[n][i] = exponential(s[n][i] - base);
                    more += s[n][i];
                }
            row_sum[m][h] = row_sum[m][h] * shrink + more;
#pragma unroll
            for (int n = 0; n < DIM_V / 8; ++n) {
                acc[m][n][2 * h] *= shrink;
                acc[m][n][2 * h + 1] *= shrink;
            }
        }
    }

    // Fold the tile of keys from `start`. PARTIAL: some rows don't see all of it.
    template <bool PARTIAL, int DIM, int KEYS>
    __device__ void fold(const T* q_tile, int row, const T* k_tile, int stride, const T* v_tile, int stride_v,
                         int start, A scale, const S& score) {
        A s[HEIGHT][KEYS / 8][4] = {};
        multiply_transposed<DIM>(s, q_tile, row, k_tile, stride);
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = column_of(start, n, i);
                    s[m][n][i] = score.apply(rounded_product(s[m][n][i], scale), row_score[m][i / 2], score.key(column));
                    if (PARTIAL && !sees[m][i / 2].holds(column)) s[m][n][i] = -infinity(A{});
                }
            weigh(s[m], m);
            if constexpr (S::FUNCTIONS) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        s[m][n][i] *= score.dropout_factor(row_score[m][i / 2], score.key(column_of(start, n, i)));
            }
        }
        const bool all_finite = multiply<PARTIAL, T>(acc, s, v_tile, stride_v, 0);
        if (PARTIAL && !__all_sync(ALL_LANES, all_finite)) add_not_finite<KEYS>(v_tile, stride_v, start);
    }
};

template <class T, int DIM, int DIM_V, int WARPS, int HEIGHT, int KEYS, int STAGES, int BYTES,
          bool FUNCTIONS>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 4 && sizeof(T) == 2 ? 2 : 1)
accumulate(Accumulator<T>* acc, Accumulator<T>* row_max, Accumulator<T>* row_sum, const T* q, const T* k, const T* v,
           const int* begin, const int* end, int n_q, int n_k, int kv_heads, int group, int dim, int dim_v,
           int stride_v, Accumulator<T> scale, int width, int fresh, const void* packed_score) {
    using A = Accumulator<T>;
    using F = Fragments<T>;
    using S = Score<A, FUNCTIONS>;
    constexpr int THREADS = 32 * WARPS, WARP_ROWS = 16 * HEIGHT, ROWS = WARP_ROWS * WARPS;
    constexpr int STRIDE = DIM + F::PAD, STRIDE_V = DIM_V + F::PAD_V, STAGE = KEYS * (STRIDE + STRIDE_V);
    static_assert(WARP_ROWS <= 32 && KEYS < MINUS, "one interval a lane; codes must not run over");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const Rows rows{n_q, kv_heads, group, static_cast<int>(blockIdx.y),
                    static_cast<int>(gridDim.x - 1 - blockIdx.x) * ROWS};      // the last rows, which see most, first
    const Interval part{static_cast<int>(blockIdx.z) * width, min(n_k, static_cast<int>(blockIdx.z + 1) * width)};
    const int mine = warp * WARP_ROWS;
    const bool has_row = lane < WARP_ROWS && rows.contains(mine + lane);
    const Interval interval = has_row ? intersection(rows.interval(begin, end, mine + lane), part) : Interval{0, 0};
    const VisibleColumns visible = visible_to_warp(interval, has_row);
    const Interval range = visible_to_block<WARPS>(visible).hull;
    const int tiles = range.tiles(KEYS);
    if (tiles == 0 && !fresh) return;

    T* const q_tile = reinterpret_cast<T*>(shared_memory());
    T* const stages = q_tile + ROWS * STRIDE;
    auto load = [&](int i) {
        const long long at = range.low + static_cast<long long>(i) * KEYS;
        const int count = range.high - static_cast<int>(at);
        T* const k_tile = stages + i % STAGES * STAGE;
        const T* const k_rows = k + (at * kv_heads + rows.kv_head) * dim;
        const T* const v_rows = v + (at * kv_heads + rows.kv_head) * stride_v;
        const int step = kv_heads * dim, step_v = kv_heads * stride_v;       // within a tile 32 bits are enough
        copy_tile<KEYS, DIM, STRIDE, BYTES, THREADS>(k_tile, [=](int r) { return k_rows + r * step; }, count, dim);
        copy_tile<KEYS, DIM_V, STRIDE_V, BYTES, THREADS>(
            k_tile + KEYS * STRIDE, [=](int r) { return v_rows + r * step_v; }, count, dim_v);
    };
    if (tiles) {
        copy_tile<ROWS, DIM, STRIDE, BYTES, THREADS>(
            q_tile, [&](int r) { return q + rows.state_row(r) * dim; }, rows.count(), dim);
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) {
            if (i < tiles) load(i);
            copy_commit();
        }
    }

    const StateArrays<A> arrays{acc, row_max, row_sum, dim_v, stride_v, fresh != 0,
                                static_cast<long long>(blockIdx.z) * n_q * kv_heads * group};
    const S score(packed_score, n_q, n_k, kv_heads * group);
    WarpRows<T, DIM_V, HEIGHT, S> state;
    state.load(arrays, rows, mine, interval, score);

    for (int i = 0; i < tiles; ++i) {
        if constexpr (STAGES == 1) {
            __syncthreads();                       // all have read the tile before
            load(i);
            copy_commit();
            copy_wait<0>();
            __syncthreads();
        } else {
            copy_wait<STAGES - 2>();               // tile i is here, for this thread;
            __syncthreads();                       // for all, and all have read tile i - 1, whose stage is free
            if (i + STAGES - 1 < tiles) load(i + STAGES - 1);
            copy_commit();
        }
        const T* const k_tile = stages + i % STAGES * STAGE;
        const T* const v_tile = k_tile + KEYS * STRIDE;
        const int start = range.low + i * KEYS;
        if (visible.skips(start, KEYS)) continue;
        if (visible.full(start, KEYS))
            state.template fold<false, DIM, KEYS>(q_tile, mine, k_tile, STRIDE, v_tile, STRIDE_V, start, scale, score);
        else
            state.template fold<true, DIM, KEYS>(q_tile, mine, k_tile, STRIDE, v_tile, STRIDE_V, start, scale, score);
    }
    state.store(arrays, rows, mine);
}
