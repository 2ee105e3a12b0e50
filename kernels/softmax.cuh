// The running softmax of rows (Milakov & Gimelshein 2018): a step of it, and its state between global memory and the
// accumulators of tensor cores. There lane 4 g + t has rows g and g + 8 of 16, numbers 2 h and 2 h + 1 of each
// accumulator for h = 0 and 1; see platform.cuh. Of row_sum each lane has its own share; in canonical order, after
// each tile, the first lane of a row has all of it. Scores are counted in units of ln 2, so that a weight is a power of
// two. They are made of products by a positive factor alone, so that the largest of these is found first; that is why Q
// takes the sign of the scale.
#pragma once

#include "finite.cuh"
#include "rows.cuh"

constexpr float MOST_UNROUNDED = 65536;      // of the scores' maximum

// What to subtract from scores whose maximum is `high`: -infinity - -infinity would be NaN.
template <class A>
__device__ inline A finite_maximum(A high) { return high == -infinity(A{}) ? A{0} : high; }

__device__ inline double signed_number(double x, double scale) { return scale < 0 ? -x : x * 0; }

template <class T>
__device__ inline T signed_number(T x, float scale) {
    const int bits = scale < 0 ? x.bits ^ 0x8000 : Finite<T>::one(x.bits) ? 0 : 0x7fff;
    return {static_cast<unsigned short>(bits)};
}

// Give every `step`th number of Q the sign of a scale that is not positive; of 0 it becomes 0, or NaN if not finite.
template <class T, class A>
__device__ inline void take_sign(T* numbers, int first, int count, int step, A scale) {
#pragma unroll 1
    for (int i = first; i < count; i += step) numbers[i] = signed_number(numbers[i], scale);
}

// What a row's sums are to be multiplied by as its maximum moves from `low` to `high`, and `base` is subtracted from
// scores. In canonical order a row that sees nothing of a tile stays as it is, whatever it was.
template <bool CANONICAL, class A>
__device__ inline A shrinkage(A low, A high, A base) {
    return CANONICAL && low == high ? A{1} : power_of_two(low - base);
}

// Move the maximum of a row on to that of its scores, which are s times `factor` > 0; gives what to subtract from them.
template <bool CANONICAL, class A, int N>
__device__ inline A move_maximum(const A (&s)[N][4], int h, A factor, A& row_max, A& shrink) {
    A high = -infinity(A{});
#pragma unroll
    for (int n = 0; n < N; ++n) high = larger(high, larger(s[n][2 * h], s[n][2 * h + 1]));
    high = larger(high, __shfl_xor_sync(ALL_LANES, high, 1));
    high = larger(high, __shfl_xor_sync(ALL_LANES, high, 2));
    high = larger(row_max, rounded_product(high, factor));
    const A base = finite_maximum(high);
    shrink = shrinkage<CANONICAL>(row_max, high, base);
    row_max = high;
    return base;
}

// Turn the scores of a row into weights; gives their sum.
template <class A, int N, class Weight>
__device__ inline A weigh_row(A (&s)[N][4], int h, Weight weight) {
    A sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[n][i] = weight(s[n][i]);
            sum += s[n][i];
        }
    return sum;
}

// Sum up what the lanes of a row have.
template <class A>
__device__ inline A sum_of_row(A share) {
    share += __shfl_xor_sync(ALL_LANES, share, 1);
    share += __shfl_xor_sync(ALL_LANES, share, 2);
    return share;
}

// Turn the scores of two rows, which are s times `factor` > 0, into weights, and move their maxima and sums on; gives
// the factors that acc is to shrink by. Scores are rounded, so that the largest minus itself is 0.
//
// FUSED, of float: one instruction makes an exponent, but the branch takes registers. What is not rounded is a factor
// of all weights of the row alike, which is of no account; where scores are huge it might be infinity or 0. The branch
// asks two rows, so there is none in canonical order.
template <bool FUSED, bool CANONICAL, class A, int N>
__device__ inline void online_softmax(A (&s)[N][4], A factor, A (&row_max)[2], A (&row_sum)[2], A (&shrink)[2]) {
    static_assert(!(FUSED && CANONICAL));
    A base[2], more[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) base[h] = move_maximum<CANONICAL>(s, h, factor, row_max[h], shrink[h]);
    auto weigh_rounded = [&] {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            more[h] = weigh_row(s, h, [&](A x) { return power_of_two(rounded_product(x, factor) - base[h]); });
    };
    if constexpr (!FUSED) {
        weigh_rounded();
    } else if (larger(magnitude(base[0]), magnitude(base[1])) > MOST_UNROUNDED) {
        weigh_rounded();
    } else {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            more[h] = weigh_row(s, h, [&](A x) { return power_of_two(fused(x, factor, -base[h])); });
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) row_sum[h] = row_sum[h] * shrink[h] + more[h];
    if constexpr (CANONICAL) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const A whole = sum_of_row(row_sum[h]);
            row_sum[h] = threadIdx.x % 4 == 0 ? whole : A{0};
        }
    }
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
    row_sum = sum_of_row(row_sum);
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
