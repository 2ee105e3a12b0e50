// Which rows a block of threads works on, what they see, and tiles of Q, K and V in shared memory.
//
// A row is a query with one of its heads. The rows of a key head are numbered query by query, so that the heads of
// a group, which share keys, lie side by side: row r is query r / group, head kv_head * group + r % group.
#pragma once

#include "arguments.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int CANONICAL_TILE = 192;          // keys, and queries, of a tile in canonical order; see README.rst
constexpr int NOWHERE = 0x7fffffff;

// Columns low <= j < high.
struct Interval {
    int low, high;
    __device__ bool holds(int column) const { return low <= column && column < high; }
    __device__ int tiles(int keys) const { return low < high ? (high - low + keys - 1) / keys : 0; }
};

// What both hold; {0, 0} if nothing.
__device__ inline Interval intersection(Interval a, Interval b) {
    const Interval both{max(a.low, b.low), min(a.high, b.high)};
    return both.low < both.high ? both : Interval{0, 0};
}

// The rows of a block of threads: those of a key head from `first` on.
struct Rows {
    int n_q, kv_heads, group, kv_head, first;

    __device__ int count() const { return n_q * group - first; }
    __device__ bool contains(int row) const { return row < count(); }
    __device__ int query(int row) const { return (first + row) / group; }
    __device__ int head(int row) const { return kv_head * group + (first + row) % group; }

    // Number of a row among all (query, head).
    __device__ long long state_row(int row) const {
        const int i = query(row);
        return static_cast<long long>(i) * (kv_heads * group) + kv_head * group + (first + row - i * group);
    }

    // How many there are of all heads.
    __device__ long long state_rows() const { return static_cast<long long>(n_q) * kv_heads * group; }

    // An interval of columns that a row sees: number `number` of its query.
    __device__ Interval interval(const int* begin, const int* end, int number, int row) const {
        const long long at = static_cast<long long>(number) * n_q + query(row);
        return {begin[at], end[at]};
    }
};

// The rows of this block of threads, `count` of them. The last rows, which see most, come first.
template <class A>
__device__ inline Rows rows_of_block(const Problem<A>& problem, int count) {
    return {problem.n_q, problem.kv_heads, problem.group, static_cast<int>(blockIdx.y),
            static_cast<int>(gridDim.x - 1 - blockIdx.x) * count};
}

// The columns of this block's part.
__device__ inline Interval columns_of_part(int n_k, int width) {
    return {static_cast<int>(blockIdx.z) * width, min(n_k, static_cast<int>(blockIdx.z + 1) * width)};
}

// The columns that any row of a block sees, in canonical order from the beginning of a tile on: then it depends on no
// other row which columns make a tile.
template <bool CANONICAL>
__device__ inline Interval columns_to_visit(Interval hull, int keys) {
    if (CANONICAL && hull.low < hull.high) hull.low -= hull.low % keys;
    return hull;
}

// Columns of a tile from `start` on that there are; in canonical order those too that no row of the block sees.
template <bool CANONICAL>
__device__ inline int columns_there(Interval visited, int n_k, int start) {
    return (CANONICAL ? n_k : visited.high) - start;
}

// Column of number i of this lane in accumulators that begin 8 n columns after `start`; see platform.cuh.
__device__ inline int column_of(int start, int n, int i) { return start + 8 * n + threadIdx.x % 4 * 2 + i % 2; }

// What a set of rows sees: nobody sees beyond `hull`, everybody sees all of `common`.
struct VisibleColumns {
    Interval hull, common;
    __device__ bool skips(int start, int count) const { return start >= hull.high || start + count <= hull.low; }
    __device__ bool full(int start, int count) const { return common.low <= start && start + count <= common.high; }
};

__device__ inline VisibleColumns merged(const VisibleColumns& a, const VisibleColumns& b) {
    return {{min(a.hull.low, b.hull.low), max(a.hull.high, b.hull.high)},
            {max(a.common.low, b.common.low), min(a.common.high, b.common.high)}};
}

// What no rows see.
__device__ inline VisibleColumns nothing_visible() { return {{NOWHERE, 0}, {0, NOWHERE}}; }

// What the rows of a warp see, one interval a lane; a lane that has no row does not count.
__device__ inline VisibleColumns visible_to_warp(Interval mine, bool has_row) {
    const bool sees = mine.low < mine.high;
    return {{__reduce_min_sync(ALL_LANES, sees ? mine.low : NOWHERE),
             __reduce_max_sync(ALL_LANES, sees ? mine.high : 0)},
            {__reduce_max_sync(ALL_LANES, has_row ? mine.low : 0),
             __reduce_min_sync(ALL_LANES, has_row ? mine.high : NOWHERE)}};
}

// What the rows of the whole block see. All threads of the block.
template <int WARPS>
__device__ inline VisibleColumns visible_to_block(const VisibleColumns& mine) {
    __shared__ VisibleColumns visible_columns[WARPS];
    if (threadIdx.x % 32 == 0) visible_columns[threadIdx.x / 32] = mine;
    __syncthreads();
    VisibleColumns all = nothing_visible();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all = merged(all, visible_columns[w]);
    return all;
}

// The largest power of two that is at most `most`, or the smallest that is at least `n`.
__device__ constexpr int lanes_for(int n, int most) {
    int lanes = 1;
    while (lanes < n && 2 * lanes <= most) lanes *= 2;
    return lanes;
}

// Start to copy ROWS rows of DIM numbers into a tile, BYTES at a time. `row(i)` points to row i of the array, of
// which there are `count`; what is not there, and columns from `dim` on, become zeros. The threads stand in rows of
// LANES, so that each has its columns for good, and little to reckon from row to row.
template <int ROWS, int DIM, int STRIDE, int BYTES, int THREADS, class T, class Row>
__device__ inline void copy_tile(T* tile, Row row, int count, int dim) {
    constexpr int EACH = BYTES / static_cast<int>(sizeof(T)), CHUNKS = DIM / EACH;
    constexpr int LANES = lanes_for(CHUNKS, THREADS), AT_ONCE = THREADS / LANES;
    const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += LANES) {
        const int c = (chunk + lane) * EACH;
        if (CHUNKS % LANES != 0 && c >= DIM) break;
#pragma unroll 8
        for (int r = first; r < first + (ROWS + AT_ONCE - 1) / AT_ONCE * AT_ONCE; r += AT_ONCE) {
            if (ROWS % AT_ONCE != 0 && r >= ROWS) break;
            copy_async<BYTES>(tile + r * STRIDE + c, row(r) + c, r < count && c < dim);
        }
    }
}

// For functions that are told so at compile time.
struct False { static constexpr bool value = false; };
struct True { static constexpr bool value = true; };

// The larger of two numbers; of a number and NaN, the number.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }
