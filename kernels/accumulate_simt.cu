// Fold one block of K and V into the running softmax of the queries, in float32 throughout: no tensor cores, which
// would round the operands. Arguments, promises and grid as in accumulate_tensor.cu, with float for T.
//
// grid (ceil(n_q group / ROWS), kv_heads, parts) of 16 ROW_LANES threads; ROWS = HEIGHT ROW_LANES. Thread
// (lane % 16, row lane) has the scores of HEIGHT rows with KEYS / 16 keys, and of acc the same rows and DIM_V / 16
// columns. Dynamic shared memory: ROWS rows of Q, KEYS of K and of V, ROWS of weights, padded as below.
// The caller guarantees further: DIM, DIM_V and KEYS multiples of 16; ROW_LANES even.

#include "lanes.cuh"
#include "score.cuh"
#include "softmax.cuh"

template <int DIM, int DIM_V, int ROW_LANES, int HEIGHT, int KEYS, class S, bool CANONICAL>
struct ThreadRows : Lanes<ROW_LANES> {
    using Lanes<ROW_LANES>::lane;
    using Lanes<ROW_LANES>::row;
    using Lanes<ROW_LANES>::other;
    static constexpr int EACH = KEYS / 16;                                        // keys of a thread
    static constexpr int VECTOR = vector_of(DIM_V), VECTORS = vectors_of(DIM_V);
    static constexpr int STRIDE = padded(DIM), STRIDE_P = padded_weights(KEYS);
    static constexpr float UNSEEN = -1;       // in place of a weight

    float acc[HEIGHT][VECTORS][VECTOR] = {};
    float row_max[HEIGHT], row_sum[HEIGHT];           // of row_sum, this thread's share; see softmax.cuh
    Interval sees[HEIGHT];
    typename S::Row row_score[HEIGHT];

    __device__ static int column(int n, int i) { return Lanes<ROW_LANES>::template column<VECTOR>(n, i); }

    // Take what each of the rows sees of this part in an interval.
    __device__ void see(const Problem<float>& problem, int number, const Rows& rows, Interval part) {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i)
            sees[i] = rows.contains(row(i))
                ? intersection(rows.interval(problem.begin, problem.end, number, row(i)), part) : Interval{0, 0};
    }

    // Load the state of the rows.
    __device__ void load(const StateArrays<float>& arrays, const Problem<float>& problem, const Rows& rows,
                         const S& score) {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            const bool exists = rows.contains(row(i)), known = exists && !arrays.fresh;
            const long long at = exists ? rows.state_row(row(i)) : 0;
            row_score[i] = score.row(rows, row(i));
            load_softmax(arrays, at, known, lane() == 0, row_max[i], row_sum[i]);
#pragma unroll
            for (int n = 0; n < VECTORS; ++n)
#pragma unroll
                for (int c = 0; c < VECTOR; ++c)
                    if (known && column(n, c) < problem.dim_v)
                        acc[i][n][c] = arrays.acc[at * arrays.stride_v + column(n, c)];
        }
    }

    // Put the state back.
    __device__ void store(const StateArrays<float>& arrays, int dim_v, const Rows& rows) {
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            const float total = across_row(row_sum[i], added);
            if (!rows.contains(row(i))) continue;
            const long long at = arrays.target_row(rows.state_row(row(i)), rows.state_rows());
            store_softmax(arrays, at, lane() == 0, row_max[i], total);
#pragma unroll
            for (int n = 0; n < VECTORS; ++n)
#pragma unroll
                for (int c = 0; c < VECTOR; ++c)
                    if (column(n, c) < dim_v) arrays.acc[at * arrays.stride_v + column(n, c)] = acc[i][n][c];
        }
    }

    // Scores of a tile, turned into weights in `p_tile`; the state moves to the new maximum.
    template <bool PARTIAL>
    __device__ void weigh(const float* q_tile, const float* k_tile, float* p_tile, int start, float factor,
                          const S& score) {
        float s[HEIGHT][EACH] = {};
        ThreadRows::template multiply_transposed<DIM>(s, q_tile, k_tile, STRIDE);
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            float high = -infinity(0.0f);
            bool seen[EACH];
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const int column = start + other(j);
                seen[j] = !PARTIAL || sees[i].holds(column);
                s[i][j] = rounded_product(s[i][j], factor);
                if constexpr (!S::PLAIN)
                    s[i][j] = rounded_product(score.apply(s[i][j], row_score[i], score.key(column)),
                                              static_cast<float>(LOG2_E));
                if (!seen[j]) s[i][j] = -infinity(0.0f);
                high = larger(high, s[i][j]);
            }
            high = larger(row_max[i], across_row(high, larger));
            const float base = finite_maximum(high);
            const float shrink = shrinkage<CANONICAL>(row_max[i], high, base);
            row_max[i] = high;
            row_sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                const float p = power_of_two(s[i][j] - base);
                const float dropout = score.dropout_factor(row_score[i], score.key(start + other(j)));
                p_tile[row(i) * STRIDE_P + other(j)] = seen[j] ? p * dropout : UNSEEN;
                if (seen[j]) row_sum[i] += p;
            }
            if constexpr (CANONICAL) {
                const float whole = across_row(row_sum[i], added);
                row_sum[i] = lane() == 0 ? whole : 0;
            }
#pragma unroll
            for (int n = 0; n < VECTORS; ++n)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) acc[i][n][e] *= shrink;
        }
    }

    // Add weights times values.
    template <bool PARTIAL>
    __device__ void add_values(const float* p_tile, const float* v_tile) {
#pragma unroll 2
        for (int key = 0; key < KEYS; key += 4) {
            Four p[HEIGHT];
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) p[i] = *reinterpret_cast<const Four*>(p_tile + row(i) * STRIDE_P + key);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int n = 0; n < VECTORS; ++n) {
                    const Vector<VECTOR> v =
                        *reinterpret_cast<const Vector<VECTOR>*>(v_tile + (key + e) * DIM_V + column(n, 0));
#pragma unroll
                    for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
                        for (int c = 0; c < VECTOR; ++c)
                            if (!PARTIAL || p[i].x[e] != UNSEEN) acc[i][n][c] += p[i].x[e] * v.x[c];
                }
        }
    }
};

template <int DIM, int DIM_V, int ROW_LANES, int HEIGHT, int KEYS, int BYTES, bool FUNCTIONS, bool BIAS, bool RELATIVE,
          bool SEVERAL, bool CANONICAL>
__global__ void __launch_bounds__(16 * ROW_LANES)
accumulate(const __grid_constant__ StateArrays<float> arrays, const float* q, const float* k, const float* v,
           const __grid_constant__ Problem<float> problem) {
    constexpr int THREADS = 16 * ROW_LANES, WARPS = THREADS / 32, ROWS = HEIGHT * ROW_LANES;
    using S = Score<float, FUNCTIONS, BIAS, RELATIVE>;
    using State = ThreadRows<DIM, DIM_V, ROW_LANES, HEIGHT, KEYS, S, CANONICAL>;
    static_assert(ROWS <= THREADS, "one interval a thread");
    static_assert(!CANONICAL || CANONICAL_TILE % KEYS == 0, "blocks begin at whole tiles");

    // The tiles of keys that any row of the block sees of this part, in one interval after the other.
    const Rows rows = rows_of_block(problem, ROWS);
    const Interval part = columns_of_part(problem.n_k, arrays.width);
    const int mine = threadIdx.x;
    const bool has_row = mine < ROWS && rows.contains(mine);
    VisibleColumns visible;
    Interval range;
    int tiles;
    auto look = [&](int number) {
        const Interval interval = has_row
            ? intersection(rows.interval(problem.begin, problem.end, number, mine), part) : Interval{0, 0};
        visible = visible_to_block<WARPS>(visible_to_warp(interval, has_row));
        range = columns_to_visit<CANONICAL>(visible.hull, KEYS);
        tiles = range.tiles(KEYS);
    };
    look(0);
    if (tiles == 0 && !SEVERAL && !arrays.fresh) return;

    // Q, and the first tiles of K and V, are on their way while the state is loaded.
    const int kv_heads = problem.kv_heads, dim = problem.dim, dim_v = problem.dim_v, stride_v = arrays.stride_v;
    float* const q_tile = reinterpret_cast<float*>(shared_memory());
    float* const k_tile = q_tile + ROWS * State::STRIDE;
    float* const v_tile = k_tile + KEYS * State::STRIDE;
    float* const p_tile = v_tile + KEYS * DIM_V;
    auto load = [&](float* tile, const float* array, int stride, int i) {
        const long long at = range.low + static_cast<long long>(i) * KEYS;
        const float* const first = array + (at * kv_heads + rows.kv_head) * stride;
        const int step = kv_heads * stride;        // within a tile 32 bits are enough
        const int count = columns_there<CANONICAL>(range, problem.n_k, static_cast<int>(at));
        auto row = [=](int r) { return first + r * step; };
        if (tile == k_tile) copy_tile<KEYS, DIM, State::STRIDE, BYTES, THREADS>(tile, row, count, dim);
        else copy_tile<KEYS, DIM_V, DIM_V, BYTES, THREADS>(tile, row, count, dim_v);
    };
    auto load_first = [&] {
        if (tiles) load(k_tile, k, dim, 0);
        copy_commit();
        if (tiles) load(v_tile, v, stride_v, 0);
        copy_commit();
    };
    if (tiles || SEVERAL)
        copy_tile<ROWS, DIM, State::STRIDE, BYTES, THREADS>(
            q_tile, [&](int r) { return q + rows.state_row(r) * dim; }, rows.count(), dim);
    load_first();

    const S score(problem);
    const float factor = S::PLAIN ? rounded_product(problem.scale, static_cast<float>(LOG2_E)) : problem.scale;
    State state;
    state.see(problem, 0, rows, part);
    state.load(arrays, problem, rows, score);

    for (int number = 0;;) {
        // Fold tile after tile: the next one of K comes while V is read, the next one of V while K is.
        for (int i = 0; i < tiles; ++i) {
            const int start = range.low + i * KEYS;
            const bool full = !CANONICAL && visible.full(start, KEYS);
            copy_wait<1>();
            __syncthreads();                           // K is here
            if (full) state.template weigh<false>(q_tile, k_tile, p_tile, start, factor, score);
            else state.template weigh<true>(q_tile, k_tile, p_tile, start, factor, score);
            __syncthreads();                           // all have read K, and the weights are there
            if (i + 1 < tiles) load(k_tile, k, dim, i + 1);
            copy_commit();
            copy_wait<1>();
            __syncthreads();                           // V is here
            if (full) state.template add_values<false>(p_tile, v_tile);
            else state.template add_values<true>(p_tile, v_tile);
            __syncthreads();                           // all have read V and the weights
            if (i + 1 < tiles) load(v_tile, v, stride_v, i + 1);
            copy_commit();
        }
        if (!SEVERAL || ++number >= problem.intervals) break;
        __syncthreads();                           // all know what was seen of the interval before
        look(number);
        state.see(problem, number, rows, part);
        load_first();
    }

    state.store(arrays, dim_v, rows);
}
