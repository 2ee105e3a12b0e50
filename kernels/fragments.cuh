// Tiles in shared memory multiplied by the warps of a block on tensor cores: bfloat16, float16, float64.
#pragma once

#include "finite.cuh"
#include "rows.cuh"

// How the lanes of a warp hold tiles of T for a product; the layouts are those of platform.cuh.
template <class T>
struct Fragments {
    using Register = unsigned;                // two numbers
    static constexpr int DEPTH = 16;          // of a product
    static constexpr int PAD = 8, PAD_V = 8;  // numbers after each row of a tile, so that lanes of a load share no bank
    __device__ static constexpr int stride(int dim) { return dim + PAD; }

    // Left side: rows row .. row + 16, columns column .. column + DEPTH.
    __device__ static void left(Register (&a)[4], const T* tile, int stride, int row, int column) {
        const int lane = threadIdx.x % 32;
        load_matrices(a, tile + (row + lane % 16) * stride + column + lane / 16 * 8);
    }

    // Right sides from the transposed of rows key .. key + 16: b[0..1] for the first eight, b[2..3] for the others.
    __device__ static void right_transposed(Register (&b)[4], const T* tile, int stride, int key, int column) {
        const int lane = threadIdx.x % 32;
        load_matrices(b, tile + (key + lane / 16 * 8 + lane % 8) * stride + column + lane / 8 % 2 * 8);
    }

    // Right sides: rows key .. key + DEPTH, b[0..1] of columns column .. column + 8, b[2..3] of eight more.
    __device__ static void right(Register (&b)[4], const T* tile, int stride, int key, int column) {
        const int lane = threadIdx.x % 32;
        load_matrices_transposed(b, tile + (key + lane % 16) * stride + column + lane / 16 * 8);
    }

    // Left side from the accumulators of keys DEPTH * step .. DEPTH * (step + 1).
    template <int N>
    __device__ static void weights(Register (&a)[4], const float (&p)[N][4], int step) {
        a[0] = pack(T{}, p[2 * step][0], p[2 * step][1]);
        a[1] = pack(T{}, p[2 * step][2], p[2 * step][3]);
        a[2] = pack(T{}, p[2 * step + 1][0], p[2 * step + 1][1]);
        a[3] = pack(T{}, p[2 * step + 1][2], p[2 * step + 1][3]);
    }

    using Finite = ::Finite<T>;
};

// A product of depth 8 sums over keys in any order, so accumulators serve as left side as they lie: place t of the
// product is key 2 t, place t + 4 is key 2 t + 1, and `right` takes the rows of V in that order.
template <>
struct Fragments<double> {
    using Register = double;
    static constexpr int DEPTH = 8;
    static constexpr int PAD = 4, PAD_V = 2;
    __device__ static constexpr int stride(int dim) { return dim + PAD; }

    __device__ static void left(double (&a)[4], const double* tile, int stride, int row, int column) {
        const double* at = tile + (row + threadIdx.x % 32 / 4) * stride + column + threadIdx.x % 4;
        a[0] = at[0];
        a[1] = at[8 * stride];
        a[2] = at[4];
        a[3] = at[8 * stride + 4];
    }

    __device__ static void right_transposed(double (&b)[4], const double* tile, int stride, int key, int column) {
        const double* at = tile + (key + threadIdx.x % 32 / 4) * stride + column + threadIdx.x % 4;
        b[0] = at[0];
        b[1] = at[4];
        b[2] = at[8 * stride];
        b[3] = at[8 * stride + 4];
    }

    __device__ static void right(double (&b)[4], const double* tile, int stride, int key, int column) {
        const double* at = tile + (key + 2 * (threadIdx.x % 4)) * stride + column + threadIdx.x % 32 / 4;
        b[0] = at[0];
        b[1] = at[stride];
        b[2] = at[8];
        b[3] = at[stride + 8];
    }

    template <int N>
    __device__ static void weights(double (&a)[4], const double (&p)[N][4], int step) {
        a[0] = p[step][0];
        a[1] = p[step][2];
        a[2] = p[step][1];
        a[3] = p[step][3];
    }

    struct Finite {
        __device__ static bool all(double x) { return x - x == 0; }
        __device__ static double only(double x) { return all(x) ? x : 0; }
        __device__ static double codes(double x) { return all(x) ? 0 : x != x ? NAN_SEEN : x < 0 ? MINUS : PLUS; }
    };
};

// s += left right^T over DEPTH columns: of `left` 16 HEIGHT rows from `row` on, of `right` 8 N rows. Accumulators
// s[m][n] have rows 16 m .. 16 m + 16 of the first, and 8 n .. 8 n + 8 of the others.
template <int DEPTH, class T, int HEIGHT, int N>
__device__ inline void multiply_transposed(Accumulator<T> (&s)[HEIGHT][N][4], const T* left, int row, const T* right,
                                           int stride) {
    using F = Fragments<T>;
#pragma unroll
    for (int step = 0; step < DEPTH / F::DEPTH; ++step) {
        typename F::Register a[HEIGHT][4], b[4];
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) F::left(a[m], left, stride, row + 16 * m, step * F::DEPTH);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            F::right_transposed(b, right, stride, n * 16, step * F::DEPTH);
#pragma unroll
            for (int m = 0; m < HEIGHT; ++m) {
                multiply_add(T{}, s[m][2 * n], a[m], b[0], b[1]);
                multiply_add(T{}, s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// acc += p right: the 8 N rows of `right`, and of them the columns from `start` on. With CLEAN, zeros in place of what
// is not finite, since 0 times NaN is NaN; gives whether, of what this lane has met, all was finite.
template <bool CLEAN, class T, int HEIGHT, int N, int COLUMNS>
__device__ inline bool multiply(Accumulator<T> (&acc)[HEIGHT][COLUMNS][4], const Accumulator<T> (&p)[HEIGHT][N][4],
                                const T* right, int stride, int start) {
    using F = Fragments<T>;
    bool all_finite = true;
#pragma unroll
    for (int step = 0; step < 8 * N / F::DEPTH; ++step) {
        typename F::Register a[HEIGHT][4], b[4];
#pragma unroll
        for (int m = 0; m < HEIGHT; ++m) F::weights(a[m], p[m], step);
#pragma unroll
        for (int n = 0; n < COLUMNS / 2; ++n) {
            F::right(b, right, stride, step * F::DEPTH, start + n * 16);
            if constexpr (CLEAN) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    all_finite &= F::Finite::all(b[i]);
                    b[i] = F::Finite::only(b[i]);
                }
            }
#pragma unroll
            for (int m = 0; m < HEIGHT; ++m) {
                multiply_add(T{}, acc[m][2 * n], a[m], b[0], b[1]);
                multiply_add(T{}, acc[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
    return all_finite;
}
