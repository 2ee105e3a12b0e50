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
// depends on the arguments alone.
//
//   dq         (n_q, heads, dim)       gradient so far, float (double for double), read and written
//   dk         (n_k, kv_heads, dim)    the same
//   dv         (n_k, kv_heads, dim_v)  the same
//   dout       (n_q, heads, dim_v)     gradient of the result, of q's type
//   lse, delta (n_q, heads)            log-sum-exp of all scores of the row; sum(dout out) - dlse; of dq's type
//   visible_columns     (tiles of rows,)        what the rows of each tile see, from `visible_columns` of state.cu
//   others                             as in accumulate_tensor.cu
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
    int n_q, heads, group, first_head, first_query, past, there_are;
    unsigned inverse;

    // Queries from the first of the tile to that of a row.
    __device__ int queries_on(int row) const {
        if (group == 1) return row;
        return static_cast<int>(static_cast<unsigned long long>(past + row) * inverse >> 32);
    }

public:
    __device__ TileRows(int n_q, int kv_heads, int group, int kv_head, int first)
        : n_q(n_q), heads(kv_heads * group), group(group), first_head(kv_head * group), first_query(first / group),
          past(first % group), there_are(n_q * group - first), inverse(0xffffffffu / group + 1) {}

    __device__ int count() const { return there_are; }
    __device__ bool contains(int row) const { return row < there_are; }
    __device__ int query(int row) const { return first_query + queries_on(row); }
    __device__ int head(int row) const { return first_head + past + row - queries_on(row) * group; }
    __device__ long long state_row(int row) const { return static_cast<long long>(query(row)) * heads + head(row); }
};

// Tiles of two arrays side by side in shared memory, Q and dout, or K and V; rows are ROW and ROW_V numbers apart.
template <class T, int DIM, int DIM_V, int ROWS, int ROW, int ROW_V>
struct TilePair {
    static constexpr int STRIDE = ROW, STRIDE_V = ROW_V, NUMBERS = ROWS * (STRIDE + STRIDE_V);
    T *tile, *tile_v;

    __device__ explicit TilePair(T* memory) : tile(memory), tile_v(memory + ROWS * STRIDE) {}

    // Start to copy rows; `row(i)` is the number of row i in arrays of `dim` and `dim_v` columns.
    template <int BYTES, int THREADS, class Row>
    __device__ void copy(const T* array, const T* array_v, Row row, int count, int dim, int dim_v) const {
        copy_tile<ROWS, DIM, STRIDE, BYTES, THREADS>(tile, [=](int r) { return array + row(r) * dim; }, count, dim);
        copy_tile<ROWS, DIM_V, STRIDE_V, BYTES, THREADS>(
            tile_v, [=](int r) { return array_v + row(r) * dim_v; }, count, dim_v);
    }
};

// What is known of a row.
template <class A>
struct RowStats {
    A lse, delta;
    Interval sees;

    __device__ RowStats() {}
    __device__ RowStats(A lse, A delta, Interval sees) : lse(lse + (delta - delta)), delta(delta), sees(sees) {}
};

// What is known of the rows of a tile, in shared memory.
template <class A, int ROWS>
struct TileRowStats {
    A lse[ROWS], delta[ROWS];
    int begin[ROWS], end[ROWS];

    // Start to copy it; a row that is not there sees nothing.
    template <int THREADS>
    __device__ void copy(const A* all_lse, const A* all_delta, const int* all_begin, const int* all_end,
                         const TileRows& rows) {
        for (int r = threadIdx.x; r < ROWS; r += THREADS) {
            const bool there = rows.contains(r);
            const long long at = there ? rows.state_row(r) : 0;
            const int query = there ? rows.query(r) : 0;
            copy_async<sizeof(A)>(lse + r, all_lse + at, there);
            copy_async<sizeof(A)>(delta + r, all_delta + at, there);
            copy_async<4>(begin + r, all_begin + query, there);
            copy_async<4>(end + r, all_end + query, there);
        }
    }

    __device__ RowStats<A> row(int r) const { return {lse[r], delta[r], {begin[r], end[r]}}; }
};

// Of a row and a key: turn q . k into the weight that dv has, and dout . v into ds. PARTIAL: the row may not see it.
template <bool PARTIAL, class A, class S>
__device__ inline void differentiate(A& qk, A& dout_v, const RowStats<A>& row, const typename S::Row& row_score, int column,
                                     int key, A scale, const S& score) {
    A derivative = 1;
    const A x = score.apply(rounded_product(qk, scale), row_score, key, derivative);
    const bool seen = !PARTIAL || row.sees.holds(column);
    const A shift = x - row.lse;               // above 0 by rounding alone, which is far where scores are huge
    const A p = exponential(shift > 0 ? A{0} : shift), dropout = score.dropout_factor(row_score, key);
    qk = seen ? p * dropout : A{0};
    dout_v = seen ? p * (dropout * dout_v - row.delta) * derivative : A{0};
}

// The first tile of rows from number `from` on of which any row may see one of the keys; `count` if there is none. All
// lanes of a warp.
__device__ inline int next_tile(const VisibleColumns* visible_columns, int from, int count, Interval keys) {
    for (int first = from; first < count; first += 32) {
        const int tile = first + threadIdx.x % 32;
        const bool sees = tile < count && !visible_columns[tile].skips(keys.low, keys.high - keys.low);
        const int found = __reduce_min_sync(ALL_LANES, sees ? tile : NOWHERE);
        if (found != NOWHERE) return found;
    }
    return count;
}

// Go through the tiles that `next` gives, which finds the first of `count` from a number on: `load(tile, stage)` starts
// to copy one to one of STAGES stages, 1 or 2, while `work(tile, stage)` is at the one before. All threads of the block.
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
