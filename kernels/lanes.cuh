// Products in float32 of tiles in shared memory, without tensor cores: 16 lanes have the numbers of a row.
//
// Thread (lane % 16, row lane) of 16 ROW_LANES has, of HEIGHT rows, row i ROW_LANES + row lane, every 16th column of a
// product with other rows, or some columns side by side of a sum of other rows.
#pragma once

#include "rows.cuh"

struct alignas(16) Four { float x[4]; };

// Floats to a row of a tile: lanes that read the same columns of neighbouring rows meet in no bank.
__device__ constexpr int padded(int dim) { return (dim + 31) / 32 * 32 + 4; }
__device__ constexpr int padded_weights(int keys) { return keys % 32 == 0 ? keys + 16 : keys; }

// Columns side by side that a thread has of a sum, and how often.
__device__ constexpr int vector_of(int columns) { return columns % 64 == 0 ? 4 : columns % 32 == 0 ? 2 : 1; }
__device__ constexpr int vectors_of(int columns) { return columns / 16 / vector_of(columns); }

template <int VECTOR>
struct alignas(4 * VECTOR) Vector { float x[VECTOR]; };

// What both make of the numbers that the lanes of a row have.
__device__ inline float across_row(float x, float (*both)(float, float)) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) x = both(x, __shfl_xor_sync(ALL_LANES, x, mask));
    return x;
}

__device__ inline float added(float a, float b) { return a + b; }

template <int ROW_LANES>
struct Lanes {
    __device__ static constexpr int stride(int dim) { return padded(dim); }
    __device__ static int lane() { return threadIdx.x % 16; }
    __device__ static int row(int i) { return i * ROW_LANES + threadIdx.x / 16; }
    __device__ static int other(int j) { return lane() + 16 * j; }
    template <int VECTOR>
    __device__ static int column(int n, int i) { return (n * 16 + lane()) * VECTOR + i; }

    // s += left right^T over DEPTH columns, a multiple of 4.
    template <int DEPTH, int HEIGHT, int EACH>
    __device__ static void multiply_transposed(float (&s)[HEIGHT][EACH], const float* left, const float* right,
                                               int stride) {
#pragma unroll 4
        for (int d = 0; d < DEPTH; d += 4) {
            Four a[HEIGHT], b[EACH];
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) a[i] = *reinterpret_cast<const Four*>(left + row(i) * stride + d);
#pragma unroll
            for (int j = 0; j < EACH; ++j) b[j] = *reinterpret_cast<const Four*>(right + other(j) * stride + d);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
                    for (int j = 0; j < EACH; ++j) s[i][j] += a[i].x[e] * b[j].x[e];
        }
    }

    // acc += p right: OTHERS rows of `right`, and of them the columns from `start` on; p from a tile of their stride.
    // CLEAN: zeros in place of what is not finite, since 0 times NaN is NaN.
    template <bool CLEAN, int OTHERS, int HEIGHT, int VECTORS, int VECTOR>
    __device__ static void multiply(float (&acc)[HEIGHT][VECTORS][VECTOR], const float* p_tile, int stride_p,
                                    const float* right, int stride, int start) {
#pragma unroll 2
        for (int other = 0; other < OTHERS; other += 4) {
            Four p[HEIGHT];
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i)
                p[i] = *reinterpret_cast<const Four*>(p_tile + row(i) * stride_p + other);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int n = 0; n < VECTORS; ++n) {
                    Vector<VECTOR> b = *reinterpret_cast<const Vector<VECTOR>*>(
                        right + (other + e) * stride + start + column<VECTOR>(n, 0));
                    if (CLEAN)
#pragma unroll
                        for (int c = 0; c < VECTOR; ++c) b.x[c] = b.x[c] - b.x[c] == 0 ? b.x[c] : 0;
#pragma unroll
                    for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
                        for (int c = 0; c < VECTOR; ++c) acc[i][n][c] += p[i].x[e] * b.x[c];
                }
        }
    }
};
