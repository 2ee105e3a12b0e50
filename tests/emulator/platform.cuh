// The functions of kernels/platform.cuh with their meaning on a CPU; see emulator.h.
#pragma once

#include "emulator.h"
#include "types.cuh"

inline unsigned char* shared_memory() { return emulator::shared; }

template <int BYTES>
inline void copy_async(void* target, const void* source, bool there) {
    if (reinterpret_cast<uintptr_t>(target) % BYTES || reinterpret_cast<uintptr_t>(source) % BYTES)
        emulator::fail("a copy that is not aligned");
    const emulator::Copy copy{static_cast<unsigned char*>(target), static_cast<const unsigned char*>(source), BYTES,
                              there};
    if (copy.target < emulator::shared
        || copy.target + BYTES > emulator::shared_bytes.data() + emulator::shared_bytes.size() - 128)
        emulator::fail("a copy to outside shared memory");
    std::memset(target, 0xff, BYTES);
    emulator::current->groups.back().push_back(copy);
}

inline void copy_commit() { emulator::current->groups.emplace_back(); }

template <int PENDING>
inline void copy_wait() {
    auto& groups = emulator::current->groups;
    while (groups.size() > PENDING + 1) {
        for (const auto& copy : groups.front()) {
            if (copy.there) std::memcpy(copy.target, copy.source, copy.count);
            else std::memset(copy.target, 0, copy.count);
        }
        groups.erase(groups.begin());
    }
}

inline void named_barrier_sync(int number, int threads) { emulator::meet_at(number, threads, false); }
inline void named_barrier_arrive(int number, int threads) { emulator::meet_at(number, threads, false, false); }
inline bool named_barrier_or(int number, int threads, bool yes) { return emulator::meet_at(number, threads, yes); }

struct RowOfMatrix { const unsigned short* row; };

inline void load_matrices(unsigned (&r)[4], const void* row) {
    const int lane = threadIdx.x % 32;
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a row of a matrix that is not aligned");
    const auto* rows = emulator::meet(RowOfMatrix{static_cast<const unsigned short*>(row)}, "load_matrices");
    for (int m = 0; m < 4; ++m) std::memcpy(&r[m], rows[8 * m + lane / 4].row + lane % 4 * 2, 4);
}

inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    const int lane = threadIdx.x % 32;
    if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a row of a matrix that is not aligned");
    const auto* rows = emulator::meet(RowOfMatrix{static_cast<const unsigned short*>(row)}, "load_matrices_transposed");
    for (int m = 0; m < 4; ++m)
        r[m] = rows[8 * m + lane % 4 * 2].row[lane / 4] | unsigned(rows[8 * m + lane % 4 * 2 + 1].row[lane / 4]) << 16;
}

inline float wide(bfloat16, unsigned bits) {
    const uint32_t word = bits << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

inline float wide(float16, unsigned bits) {
    _Float16 x;
    const uint16_t half = bits;
    std::memcpy(&x, &half, 2);
    return x;
}

inline unsigned narrow(bfloat16, float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (x != x) return 0x7fff;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline unsigned narrow(float16, float x) {
    const _Float16 half = x;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

template <class T>
inline unsigned pack(T, float low, float high) { return narrow(T{}, low) | narrow(T{}, high) << 16; }

inline float value(bfloat16 x) { return wide(x, x.bits); }
inline float value(float16 x) { return wide(x, x.bits); }
inline float value(float x) { return x; }
inline double value(double x) { return x; }

inline void store(double* at, double x) { *at = x; }
inline void store(float* at, double x) { *at = float(x); }
inline void store(bfloat16* at, double x) { at->bits = narrow(bfloat16{}, float(x)); }
inline void store(float16* at, double x) { at->bits = narrow(float16{}, float(x)); }

struct Halves { unsigned a[4], b[2]; };

template <class T>
inline void multiply_add(T, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto* lanes = emulator::meet(Halves{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "multiply_add");
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const unsigned left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2] >> k % 2 * 16 & 0xffff;
            const unsigned right = lanes[column * 4 + k % 8 / 2].b[k / 8] >> k % 2 * 16 & 0xffff;
            sum += wide(T{}, left) * wide(T{}, right);
        }
        c[i] = sum;
    }
}

struct Doubles { double a[4], b[2]; };

inline void multiply_add(double, double (&c)[4], const double (&a)[4], double b0, double b1) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto* lanes = emulator::meet(Doubles{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "multiply_add");
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 8; ++k)
            c[i] += lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] * lanes[column * 4 + k % 4].b[k / 4];
    }
}

inline float rounded_product(float a, float b) { return a * b; }
inline double rounded_product(double a, double b) { return a * b; }
inline float magnitude(float x) { return std::fabs(x); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
constexpr double LOG2_E = 1.4426950408889634;
inline float power_of_two(float x) { return std::exp2(x); }
inline double power_of_two(double x) { return std::exp2(x); }
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }
inline float infinity(float) { return INFINITY; }
inline double infinity(double) { return INFINITY; }
inline float not_a_number(float) { return NAN; }
inline double not_a_number(double) { return NAN; }
