// The backward pass of one block of K and V in float32 throughout, without tensor cores. Arguments and promises are in
// gradient.cuh, with float for T.
//
// gradient_queries: grid (ceil(n_q group / ROWS), kv_heads) of 16 LANES threads; ROWS = HEIGHT LANES.
// gradient_keys: grid (ceil(n_k / KEYS), kv_heads); KEYS = HEIGHT LANES. Threads have what Lanes says. Dynamic shared
// memory: of Q and dout, or K and V, the rows of the block; PLACES times the tile of the others; ds, and for
// gradient_keys the weights and PLACES KnownRows; padded as in lanes.cuh.
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

template <int DIM, int DIM_V, int LANES, int HEIGHT, int KEYS, int PLACES, int BYTES, bool FUNCTIONS>
__global__ void __launch_bounds__(16 * LANES)
gradient_queries(float* dq, const float* dout, const float* lse, const float* delta, const float* q, const float* k,
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
    const bool has_row = mine < ROWS && rows.there(mine);
    const Interval interval = has_row ? rows.interval(begin, end, mine) : Interval{0, 0};
    const Sight sight = sight_of_block<WARPS>(sight_of(interval, has_row));
    const Interval range = sight.any;
    const int tiles = range.tiles(KEYS);
    if (tiles == 0) return;

    float* const memory = reinterpret_cast<float*>(shared_memory());
    float* const ds_tile = memory + Mine::NUMBERS + PLACES * Other::NUMBERS;
    const Mine own(memory);
    own.template copy<BYTES, THREADS>(
        q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    KnownRow<float> known[HEIGHT];
    typename S::Row what[HEIGHT];
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
        const bool there = rows.there(L::row(i));
        const long long at = there ? rows.state_row(L::row(i)) : 0;
        known[i] = {lse[at], delta[at], there ? rows.interval(begin, end, L::row(i)) : Interval{0, 0}};
        what[i] = score.row(rows, L::row(i));
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
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], known[i], what[i], column, key, scale, score);
                ds_tile[L::row(i) * STRIDE_P + L::other(j)] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, KEYS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto load = [&](int i, int place) {
        const long long at = range.low + static_cast<long long>(i) * KEYS;
        const long long first = at * kv_heads + rows.kv_head;
        Other(memory + Mine::NUMBERS + place * Other::NUMBERS).template copy<BYTES, THREADS>(
            k, v, [=](int r) { return first + r * kv_heads; }, range.high - static_cast<int>(at), dim, dim_v);
    };
    for_tiles<PLACES>(tiles, [](int i) { return i; }, load, [&](int i, int place) {
        const int start = range.low + i * KEYS;
        const Other other(memory + Mine::NUMBERS + place * Other::NUMBERS);
        if (sight.full(start, KEYS)) add(False{}, other, start);
        else add(True{}, other, start);
    });
    sums.add_to([&](int r) { return rows.there(r) ? dq + rows.state_row(r) * dim : nullptr; }, dim, scale);
}

template <int DIM, int DIM_V, int LANES, int HEIGHT, int ROWS, int PLACES, int BYTES, bool FUNCTIONS>
__global__ void __launch_bounds__(16 * LANES)
gradient_keys(float* dk, float* dv, const float* dout, const float* lse, const float* delta, const float* q,
              const float* k, const float* v, const int* begin, const int* end, const Sight* sights, int n_q, int n_k,
              int kv_heads, int group, int dim, int dim_v, float scale, const void* packed_score) {
    using S = Score<float, FUNCTIONS>;
    using L = Lanes<LANES>;
    constexpr int THREADS = 16 * LANES, KEYS = HEIGHT * LANES, EACH = ROWS / 16, STRIDE_P = padded_weights(ROWS);
    using Mine = Pair<DIM, DIM_V, KEYS>;
    using Other = Pair<DIM, DIM_V, ROWS>;
    using Known = KnownRows<float, ROWS>;
    const int kv_head = blockIdx.y, first = blockIdx.x * KEYS, tiles = (n_q * group + ROWS - 1) / ROWS;
    const Interval keys{first, min(first + KEYS, n_k)};

    float* const memory = reinterpret_cast<float*>(shared_memory());
    float* const ds_tile = memory + Mine::NUMBERS + PLACES * Other::NUMBERS;
    float* const p_tile = ds_tile + KEYS * STRIDE_P;
    Known* const known = reinterpret_cast<Known*>(p_tile + KEYS * STRIDE_P);
    const Mine own(memory);
    const long long first_row = static_cast<long long>(first) * kv_heads + kv_head;
    own.template copy<BYTES, THREADS>(
        k, v, [=](int r) { return first_row + r * kv_heads; }, n_k - first, dim, dim_v);

    const S score(packed_score, n_q, n_k, kv_heads * group);
    auto rows_of = [&](int tile) { return NearRows(n_q, kv_heads, group, kv_head, tile * ROWS); };
    Sums<LANES, HEIGHT, DIM> sums;
    Sums<LANES, HEIGHT, DIM_V> sums_v;
    auto add = [&](auto partial, const Other& other, const Known& those, const NearRows& rows) {
        constexpr bool PARTIAL = decltype(partial)::value;
        float qk[HEIGHT][EACH] = {}, dout_v[HEIGHT][EACH] = {};
        L::template multiply_transposed<DIM>(qk, own.tile, other.tile, Mine::STRIDE);
        L::template multiply_transposed<DIM_V>(dout_v, own.tile_v, other.tile_v, Mine::STRIDE_V);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const KnownRow<float> row = those.row(L::other(j));
            const typename S::Row what = score.row(rows, L::other(j));
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
                const int column = first + L::row(i), place = L::row(i) * STRIDE_P + L::other(j);
                differentiate<PARTIAL>(qk[i][j], dout_v[i][j], row, what, column, score.key(column), scale, score);
                p_tile[place] = qk[i][j];
                ds_tile[place] = dout_v[i][j];
            }
        }
        __syncwarp();                              // the lanes of a row are all in one warp
        L::template multiply<PARTIAL, ROWS>(sums_v.acc, p_tile, STRIDE_P, other.tile_v, Other::STRIDE_V, 0);
        L::template multiply<PARTIAL, ROWS>(sums.acc, ds_tile, STRIDE_P, other.tile, Other::STRIDE, 0);
    };
    auto load = [&](int tile, int place) {
        const NearRows rows = rows_of(tile);
        Other(memory + Mine::NUMBERS + place * Other::NUMBERS).template copy<BYTES, THREADS>(
            q, dout, [&](int r) { return rows.state_row(r); }, rows.count(), dim, dim_v);
        known[place].template copy<THREADS>(lse, delta, begin, end, rows);
    };
    for_tiles<PLACES>(tiles, [&](int from) { return next_tile(sights, from, tiles, keys); }, load,
                      [&](int tile, int place) {
        const Other other(memory + Mine::NUMBERS + place * Other::NUMBERS);
        if (sights[tile].full(keys.low, keys.high - keys.low)) add(False{}, other, known[place], rows_of(tile));
        else add(True{}, other, known[place], rows_of(tile));
    });
    auto there = [&](float* array, int columns) {
        return [=](int r) {
            return first + r < n_k ? array + (static_cast<long long>(first + r) * kv_heads + kv_head) * columns
                                   : nullptr;
        };
    };
    sums.add_to(there(dk, dim), dim, scale);
    sums_v.add_to(there(dv, dim_v), dim_v, 1.0f);
}
