// What is done to the state of the queries besides accumulating: reset, combine parts, finish; what the backward pass
// needs besides its products; and little things: widen, round, add.
//
// A state is a StateArrays of arguments.cuh, of which the arrays and stride_v count: acc (rows, stride_v), row_max and
// row_sum (rows,), with rows = n_q heads. A is float or double, of all three.

#include "softmax.cuh"

struct Combine { static constexpr int WARPS = 8, MOST_COLUMNS = 256; };

__device__ inline long long thread_number() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline long long thread_count() { return static_cast<long long>(gridDim.x) * blockDim.x; }

// Forget every key. `sinks`, null or (heads,), are scores that the rows of a head have besides. Any grid.
template <class A>
__global__ void reset(const __grid_constant__ StateArrays<A> state, const A* sinks, long long rows, int heads) {
    for (long long i = thread_number(); i < rows * state.stride_v; i += thread_count()) state.acc[i] = 0;
    for (long long i = thread_number(); i < rows; i += thread_count()) {
        state.row_max[i] = sinks ? sinks[i % heads] * static_cast<A>(LOG2_E) : -infinity(A{});
        state.row_sum[i] = sinks ? 1 : 0;
    }
}

// Fold `count` states of the same rows, one after the other in the arrays of `parts`, into one.
// grid (rows,) of 32 Combine::WARPS threads; dim_v <= Combine::MOST_COLUMNS.
template <class A>
__global__ void __launch_bounds__(32 * Combine::WARPS)
combine(const __grid_constant__ StateArrays<A> state, const __grid_constant__ StateArrays<A> parts, int count,
        long long rows) {
    constexpr int WARPS = Combine::WARPS, MOST_COLUMNS = Combine::MOST_COLUMNS, EACH = MOST_COLUMNS / 32;
    __shared__ A highs[WARPS], sums[WARPS], columns[WARPS][MOST_COLUMNS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim_v = state.stride_v;
    const long long row = blockIdx.x;

    // The largest maximum of all: each thread looks at some parts.
    A high = state.row_max[row];
    for (int p = threadIdx.x; p < count; p += 32 * WARPS) high = larger(high, parts.row_max[p * rows + row]);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) high = larger(high, __shfl_xor_sync(ALL_LANES, high, mask));
    if (lane == 0) highs[warp] = high;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) high = larger(high, highs[w]);
    const A base = finite_maximum(high);

    // Each warp adds up some parts, shrunk to that maximum.
    A more = 0, mine[EACH] = {};
#pragma unroll 4
    for (int p = warp; p < count; p += WARPS) {
        const long long at = p * rows + row;
        const A factor = power_of_two(parts.row_max[at] - base);
        more += factor * parts.row_sum[at];
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (lane + 32 * i < dim_v) mine[i] += factor * parts.acc[at * dim_v + lane + 32 * i];
    }
    if (lane == 0) sums[warp] = more;
#pragma unroll
    for (int i = 0; i < EACH; ++i) columns[warp][lane + 32 * i] = mine[i];
    const A shrink = power_of_two(state.row_max[row] - base);
    __syncthreads();

    // The state, shrunk as well, and the sums of all warps make the new state.
    for (int c = threadIdx.x; c < dim_v; c += 32 * WARPS) {
        A total = state.acc[row * dim_v + c] * shrink;
        for (int w = 0; w < WARPS; ++w) total += columns[w][c];
        state.acc[row * dim_v + c] = total;
    }
    if (threadIdx.x == 0) {
        A total = state.row_sum[row] * shrink;
        for (int w = 0; w < WARPS; ++w) total += sums[w];
        state.row_sum[row] = total;
        state.row_max[row] = high;
    }
}

// Normalise: out = acc / row_sum and lse = row_max ln 2 + log(row_sum); 0 and -inf for queries with seen = 0. Any grid.
template <class T, class A>
__global__ void finish(const __grid_constant__ StateArrays<A> state, const unsigned char* seen, T* out, A* lse,
                       long long rows, int heads) {
    for (long long i = thread_number(); i < rows * state.stride_v; i += thread_count()) {
        const long long row = i / state.stride_v;
        store(out + i, seen[row / heads] ? state.acc[i] / state.row_sum[row] : A{0});
    }
    for (long long row = thread_number(); row < rows; row += thread_count())
        lse[row] = seen[row / heads] ? state.row_max[row] * static_cast<A>(1 / LOG2_E) + log(state.row_sum[row])
                                     : -infinity(A{});
}

// Write `count` numbers of `source` as doubles. Any grid.
template <class T>
__global__ void widen(double* target, const T* source, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count()) target[i] = value(source[i]);
}

// Write `count` numbers of `source` as T. Any grid.
template <class T, class A>
__global__ void rounded(T* target, const A* source, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count()) store(target + i, source[i]);
}

template <class A>
__global__ void add(A* target, const A* source, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count()) target[i] += source[i];
}

// The same for numbers in rows: of so many without a gap, and the rows so far apart. Any grid.
template <class A>
__global__ void add_rows(A* target, long long width, long long apart, const A* source, long long source_width,
                         long long source_apart, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count())
        target[i / width * apart + i % width] += source[i / source_width * source_apart + i % source_width];
}

// Add to each of `keys` numbers those of its heads, in their order: source (keys, heads). Any grid.
template <class A>
__global__ void add_heads(A* target, const A* source, long long keys, int heads) {
    for (long long i = thread_number(); i < keys; i += thread_count()) {
        A total = 0;
        for (int h = 0; h < heads; ++h) total += source[i * heads + h];
        target[i] += total;
    }
}

// Add to each of `count` numbers those of all parts, in their order: parts (how many, count). Any grid.
__global__ void add_parts(double* target, const double* parts, int how_many, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count()) {
        double total = 0;
        for (int part = 0; part < how_many; ++part) total += parts[part * count + i];
        target[i] += total;
    }
}

// lse, with infinity for -infinity: no weight is NaN then. Any grid.
template <class A>
__global__ void lse_for_weights(A* target, const A* lse, long long count) {
    for (long long i = thread_number(); i < count; i += thread_count())
        target[i] = lse[i] == -infinity(A{}) ? infinity(A{}) : lse[i];
}

// Set `found` if any number is not finite of the rows, `width` numbers each, that `chosen` has 1 for. Any grid.
template <class T>
__global__ void find_not_finite(int* found, const T* x, const unsigned char* chosen, long long count, long long width) {
    for (long long i = thread_number(); i < count; i += thread_count())
        if (chosen[i / width] && value(x[i]) - value(x[i]) != 0) *found = 1;
}

// Fill such rows with zeros. Any grid.
template <class T>
__global__ void clear_rows(T* x, const unsigned char* chosen, long long count, long long width) {
    for (long long i = thread_number(); i < count; i += thread_count())
        if (chosen[i / width]) store(x + i, 0);
}

// COUNT numbers that one thread loads at a time.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Numbers {
    T at[COUNT];
};

// This lane's part of the product of two rows of `dim` numbers.
template <class A, class T, int COUNT>
__device__ inline A lane_product(const T* x, const T* y, int dim) {
    using Loaded = Numbers<T, COUNT>;
    A total = 0;
    for (int i = threadIdx.x % 32; i < dim / COUNT; i += 32) {
        const Loaded a = reinterpret_cast<const Loaded*>(x)[i], b = reinterpret_cast<const Loaded*>(y)[i];
#pragma unroll
        for (int n = 0; n < COUNT; ++n) total += static_cast<A>(value(a.at[n])) * static_cast<A>(value(b.at[n]));
    }
    return total;
}

// delta = sum(dout out) - dlse, for each row; `dlse` null for 0. Any grid of whole warps, one to a row at a time.
template <class T, class A>
__global__ void row_delta(A* delta, const T* dout, const T* out, const A* dlse, long long rows, int dim_v) {
    const int lane = threadIdx.x % 32;
    const auto both = reinterpret_cast<unsigned long long>(dout) | reinterpret_cast<unsigned long long>(out);
    const bool by_fours = dim_v % 4 == 0 && both % alignof(Numbers<T, 4>) == 0;
    for (long long row = thread_number() / 32; row < rows; row += thread_count() / 32) {
        const T *x = dout + row * dim_v, *y = out + row * dim_v;
        A total = by_fours ? lane_product<A, T, 4>(x, y, dim_v) : lane_product<A, T, 1>(x, y, dim_v);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) total += __shfl_xor_sync(ALL_LANES, total, mask);
        if (lane == 0) delta[row] = dlse ? total - dlse[row] : total;
    }
}

// What the rows of each tile see, (intervals, tiles), in numbers of rows of a key head; rows that are not there see
// nothing. Any grid of whole warps, one to a tile at a time.
__global__ void visible_columns(VisibleColumns* tile_columns, const int* begin, const int* end, int n_q, int group,
                                int rows_of_tile, int tiles, int intervals) {
    for (long long i = thread_number() / 32; i < static_cast<long long>(tiles) * intervals; i += thread_count() / 32) {
        const int number = static_cast<int>(i / tiles);
        const Rows rows{n_q, 1, group, 0, static_cast<int>(i % tiles) * rows_of_tile};
        VisibleColumns all = nothing_visible();
        for (int first = 0; first < rows_of_tile; first += 32) {
            const int row = first + threadIdx.x % 32;
            const bool of_tile = row < rows_of_tile;
            const Interval sees =
                of_tile && rows.contains(row) ? rows.interval(begin, end, number, row) : Interval{0, 0};
            all = merged(all, visible_to_warp(sees, of_tile));
        }
        if (threadIdx.x % 32 == 0) tile_columns[i] = all;
    }
}
