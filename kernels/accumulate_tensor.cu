// Fold one block of K and V into the running softmax of the queries, on tensor cores: bfloat16, float16, float64.
//
//   arrays   state of the queries, float (double for double), read and written
//   q        (n_q, heads, dim)
//   k        (n_k, kv_heads, dim)
//   v        (n_k, kv_heads, stride_v), of which columns 0 .. dim_v are folded into those of acc
//   problem  what there is besides; see arguments.cuh
//
// grid (ceil(n_q group / ROWS), kv_heads, parts) of 32 WARPS threads; ROWS = 16 HEIGHT WARPS; dynamic shared memory:
// ROWS rows of Q, STAGES times KEYS rows of K and of V, each row padded as Fragments says.
// The caller guarantees: dim <= DIM, dim_v <= DIM_V; DIM, DIM_V and KEYS multiples of 16; every row of q, k and v
// aligned to BYTES, which divides dim and dim_v in bytes; n_k + width < 2^31.
//
// A query that sees nothing is left as it was. What a query does not see does not reach it, be it NaN; NaN and
// infinity in what it sees come through. No atomics: the result depends on the arguments alone. CANONICAL: that of a
// row does so on nothing but what it sees; see README.rst.
// The algorithm is that of Dao 2023, FlashAttention-2, algorithm 1, with the state kept between launches.

#include "fragments.cuh"
#include "score.cuh"
#include "softmax.cuh"

// The rows of a warp: what they see, and their state in registers.
template <class T, int DIM_V, int HEIGHT, class S, bool CANONICAL>
struct WarpRows {
    using A = Accumulator<T>;
    using F = Fragments<T>;
    static constexpr bool FUSED = sizeof(A) == 4 && DIM_V <= 64 && !CANONICAL;       // beyond, registers are short
    A acc[HEIGHT][DIM_V / 8][4];
    A row_max[HEIGHT][2], row_sum[HEIGHT][2];
    Interval sees[HEIGHT][2];
    typename S::Row row_score[HEIGHT][2];

    // Number of one of a lane's rows, among those of the warp.
    __device__ static int row(int m, int h) { return 16 * m + 8 * h + threadIdx.x % 32 / 4; }

    // Lane i brings the `interval` that row i of the warp sees, and gets those of its own rows.
    __device__ void see(Interval interval) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                sees[m][h] = {__shfl_sync(ALL_LANES, interval.low, row(m, h)),
                              __shfl_sync(ALL_LANES, interval.high, row(m, h))};
    }

    // Load the state of the warp's rows, the first of which is row `first` of the block.
    __device__ void load(const StateArrays<A>& arrays, int dim_v, const Rows& rows, int first, const S& score) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                row_score[m][h] = score.row(rows, first + row(m, h));
                load_state<false>(arrays, rows, first + row(m, h), dim_v, h, acc[m], row_max[m][h], row_sum[m][h]);
            }
    }

    // Put the state back.
    __device__ void store(const StateArrays<A>& arrays, int dim_v, const Rows& rows, int first) {
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) {
            shed_sign_of_zero(m);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                store_state<false>(arrays, rows, first + row(m, h), dim_v, h, acc[m], row_max[m][h], row_sum[m][h]);
        }
    }

    // In canonical order, make 0 of -0: whether adding 0 does so depends on what other rows see.
    __device__ void shed_sign_of_zero(int m) {
        if constexpr (CANONICAL) {
#pragma unroll
            for (int n = 0; n < DIM_V / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[m][n][i] += A{0};
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
    __device__ void weigh(A (&s)[N][4], int m, A factor) {
        A shrink[2];
        online_softmax<FUSED, CANONICAL>(s, factor, row_max[m], row_sum[m], shrink);
#pragma unroll
        for (int n = 0; n < DIM_V / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][n][i] *= shrink[i / 2];
        shed_sign_of_zero(m);
    }

    // Fold the tile of keys from `start`. PARTIAL: some rows don't see all of it.
    template <bool PARTIAL, int DIM, int KEYS>
    __device__ void fold(const T* q_tile, int first, const T* k_tile, const T* v_tile, int start,
                         const Problem<A>& problem, const S& score) {
        constexpr int STRIDE = DIM + F::PAD, STRIDE_V = DIM_V + F::PAD_V;
        A s[HEIGHT][KEYS / 8][4] = {};
        multiply_transposed<DIM>(s, q_tile, first, k_tile, STRIDE);
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = column_of(start, n, i);
                    if constexpr (!S::PLAIN)
                        s[m][n][i] = score.apply(rounded_product(s[m][n][i], problem.scale), row_score[m][i / 2],
                                                 score.key(column));
                    if (PARTIAL && !sees[m][i / 2].holds(column)) s[m][n][i] = -infinity(A{});
                }
            weigh(s[m], m, problem.factor);
            if constexpr (S::FUNCTIONS) {
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        s[m][n][i] *= score.dropout_factor(row_score[m][i / 2], score.key(column_of(start, n, i)));
            }
        }
        const bool all_finite = multiply<PARTIAL, T>(acc, s, v_tile, STRIDE_V, 0);
        if (PARTIAL && !__all_sync(ALL_LANES, all_finite)) add_not_finite<KEYS>(v_tile, STRIDE_V, start);
    }
};

// `arrays` is not __grid_constant__ as `problem` is: ptxas spills less so.
template <class T, int DIM, int DIM_V, int WARPS, int HEIGHT, int KEYS, int STAGES, int BYTES, bool FUNCTIONS,
          bool BIAS, bool RELATIVE, bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 4 && sizeof(T) == 2 ? 2 : 1)
accumulate(const StateArrays<Accumulator<T>> arrays, const T* q, const T* k, const T* v,
           const __grid_constant__ Problem<Accumulator<T>> problem) {
    using A = Accumulator<T>;
    using F = Fragments<T>;
    using S = Score<A, FUNCTIONS, BIAS, RELATIVE>;
    constexpr int THREADS = 32 * WARPS, WARP_ROWS = 16 * HEIGHT, ROWS = WARP_ROWS * WARPS;
    constexpr int STRIDE = DIM + F::PAD, STRIDE_V = DIM_V + F::PAD_V, STAGE = KEYS * (STRIDE + STRIDE_V);
    static_assert(WARP_ROWS <= 32 && KEYS < MINUS, "one interval a lane; codes must not run over");
    static_assert(!CANONICAL || CANONICAL_TILE % KEYS == 0, "blocks begin at whole tiles");
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * WARP_ROWS;

    // What each row sees of this part, and the tiles of keys that any row of the block sees, in one interval after the
    // other.
    const Rows rows = rows_of_block(problem, ROWS);
    const Interval part = columns_of_part(problem.n_k, arrays.width);
    const bool has_row = lane < WARP_ROWS && rows.contains(mine + lane);
    VisibleColumns visible;
    Interval interval, range;
    int tiles;
    auto look = [&](int number) {
        interval = has_row ? intersection(rows.interval(problem.begin, problem.end, number, mine + lane), part)
                           : Interval{0, 0};
        visible = visible_to_warp(interval, has_row);
        range = columns_to_visit<CANONICAL>(visible_to_block<WARPS>(visible).hull, KEYS);
        tiles = range.tiles(KEYS);
    };
    look(0);
    if (tiles == 0 && !SEVERAL && !arrays.fresh) return;

    // Q, and the first tiles of K and V, are on their way while the state is taken up.
    const int kv_heads = problem.kv_heads, dim = problem.dim, dim_v = problem.dim_v, stride_v = arrays.stride_v;
    T* const q_tile = reinterpret_cast<T*>(shared_memory());
    T* const stages = q_tile + ROWS * STRIDE;
    auto load = [&](int i) {
        const long long at = range.low + static_cast<long long>(i) * KEYS;
        const int count = columns_there<CANONICAL>(range, problem.n_k, static_cast<int>(at));
        T* const k_tile = stages + i % STAGES * STAGE;
        const T* const k_rows = k + (at * kv_heads + rows.kv_head) * dim;
        const T* const v_rows = v + (at * kv_heads + rows.kv_head) * stride_v;
        const int step = kv_heads * dim, step_v = kv_heads * stride_v;       // within a tile 32 bits are enough
        copy_tile<KEYS, DIM, STRIDE, BYTES, THREADS>(k_tile, [=](int r) { return k_rows + r * step; }, count, dim);
        copy_tile<KEYS, DIM_V, STRIDE_V, BYTES, THREADS>(
            k_tile + KEYS * STRIDE, [=](int r) { return v_rows + r * step_v; }, count, dim_v);
    };
    auto load_first = [&] {
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) {
            if (i < tiles) load(i);
            copy_commit();
        }
    };
    if (tiles || SEVERAL)
        copy_tile<ROWS, DIM, STRIDE, BYTES, THREADS>(
            q_tile, [&](int r) { return q + rows.state_row(r) * dim; }, rows.count(), dim);
    load_first();

    const S score(problem);
    WarpRows<T, DIM_V, HEIGHT, S, CANONICAL> state;
    state.see(interval);
    state.load(arrays, dim_v, rows, mine, score);

    if (S::PLAIN && (tiles || SEVERAL) && !(problem.scale > 0)) {
        copy_commit();
        copy_wait<0>();
        __syncthreads();                           // Q is here
        take_sign(q_tile, threadIdx.x, ROWS * STRIDE, THREADS, problem.scale);
    }

    for (int number = 0;;) {
        // Fold tile after tile, while the next ones come.
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
            if (!CANONICAL && visible.full(start, KEYS))
                state.template fold<false, DIM, KEYS>(q_tile, mine, k_tile, v_tile, start, problem, score);
            else
                state.template fold<true, DIM, KEYS>(q_tile, mine, k_tile, v_tile, start, problem, score);
        }
        if (!SEVERAL || ++number >= problem.intervals) break;
        __syncthreads();                           // all have read the last tile of the interval before
        look(number);
        state.see(interval);
        load_first();
    }
    state.store(arrays, dim_v, rows, mine);
}
