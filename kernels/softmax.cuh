// The running softmax of rows (Milakov & Gimelshein 2018): a step of it, and its state between global memory and the
// accumulators of tensor cores. There lane 4 g + t has rows g and g + 8 of 16, numbers 2 h and 2 h + 1 of each
// accumulator for h = 0 and 1; see platform.cuh. Of row_sum each lane has its own share.
#pragma once

#include "rows.cuh"

// What to subtract from scores whose maximum is `high`: -infinity - -infinity would be NaN.
template <class A>
__device__ inline A finite_maximum(A high) { return high == -infinity(A{}) ? A{0} : high; }

// Turn the scores of a row into weights, and move its maximum and sum on; gives the factor that acc is to shrink by.
template <class A, int N>
__device__ inline A online_softmax(A (&s)[N][4], int h, A& row_max, A& row_sum) {
    A high = row_max;
#pragma unroll
    for (int n = 0; n < N; ++n) high = larger(high, larger(s[n][2 * h], s[n][2 * h + 1]));
    high = larger(high, __shfl_xor_sync(ALL_LANES, high, 1));
    high = larger(high, __shfl_xor_sync(ALL_LANES, high, 2));
    const A base = finite_maximum(high);
    const A shrink = exponential(row_max - base);
    row_max = high;
    A more = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[n][i] = exponential(s[n][i] - base);
            more += s[n][i];
        }
    row_sum = row_sum * shrink + more;
    return shrink;
}

// Take up the maximum and the sum of row `at`, or those of no keys unless `known`. One lane of a row is the first.
template <class A>
__device__ inline void load_softmax(const StateArrays<A>& arrays, long long at, bool known, bool first_lane,
                                    A& row_max, A& row_sum) {
    row_max = known ? arrays.row_max[at] : -infinity(A{});
    row_sum = known && first_lane ? arrays.row_sum[at] : A{0};
}

// Put them back; `row_sum` is the whole sum.
template <class A>
__device__ inline void store_softmax(const StateArrays<A>& arrays, long long at, bool first_lane, A row_max,
                                     A row_sum) {
    if (first_lane) {
        arrays.row_max[at] = row_max;
        arrays.row_sum[at] = row_sum;
    }
}

template <class A>
struct alignas(2 * sizeof(A)) Two {
    A first, second;
};

// Take up the state of row `row` of the block, one of a lane's two. PAIRS: dim_v is even and the rows of acc are
// aligned to two numbers, which are read at a time.
template <bool PAIRS, class A, int N>
__device__ inline void load_state(const StateArrays<A>& arrays, const Rows& rows, int row, int dim_v, int h,
                                  A (&acc)[N][4], A& row_max, A& row_sum) {
    const bool known = !arrays.fresh && rows.contains(row);
    const long long at = known ? rows.state_row(row) : 0;
    load_softmax(arrays, at, known, threadIdx.x % 4 == 0, row_max, row_sum);
#pragma unroll
    for (int n = 0; n < N; ++n)
        if constexpr (PAIRS) {
            const int column = column_of(0, n, 0);
            Two<A> two{0, 0};
            if (known && column < dim_v)
                two = *reinterpret_cast<const Two<A>*>(arrays.acc + at * arrays.stride_v + column);
            acc[n][2 * h] = two.first;
            acc[n][2 * h + 1] = two.second;
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = column_of(0, n, i);
                acc[n][2 * h + i] = known && column < dim_v ? arrays.acc[at * arrays.stride_v + column] : A{0};
            }
        }
}

// Put it back, if there is such a row. All lanes of a warp.
template <bool PAIRS, class A, int N>
__device__ inline void store_state(const StateArrays<A>& arrays, const Rows& rows, int row, int dim_v, int h,
                                   const A (&acc)[N][4], A row_max, A row_sum) {
    row_sum += __shfl_xor_sync(ALL_LANES, row_sum, 1);
    row_sum += __shfl_xor_sync(ALL_LANES, row_sum, 2);
    if (!rows.contains(row)) return;
    const long long at = arrays.target_row(rows.state_row(row), rows.state_rows());
    store_softmax(arrays, at, threadIdx.x % 4 == 0, row_max, row_sum);
#pragma unroll
    for (int n = 0; n < N; ++n)
        if constexpr (PAIRS) {
            const int column = column_of(0, n, 0);
            if (column < dim_v)
                *reinterpret_cast<Two<A>*>(arrays.acc + at * arrays.stride_v + column) = {acc[n][2 * h],
                                                                                         acc[n][2 * h + 1]};
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = column_of(0, n, i);
                if (column < dim_v) arrays.acc[at * arrays.stride_v + column] = acc[n][2 * h + i];
            }
        }
}
