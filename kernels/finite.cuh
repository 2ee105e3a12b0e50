// Infinity and NaN in V: how a product gets by without them, and how sums of codes over up to 127 keys tell afterwards
// what was among the keys.
#pragma once

#include "platform.cuh"

constexpr int PLUS = 1, MINUS = 128, NAN_SEEN = 16384;

// Add to `x` what a sum of codes says was there.
template <class A>
__device__ inline void add_found(A& x, A sum) {
    const int count = static_cast<int>(sum);
    if (count >= NAN_SEEN) x = not_a_number(A{});
    if (count % NAN_SEEN >= MINUS) x -= infinity(A{});
    if (count % MINUS != 0) x += infinity(A{});
}

// 16-bit numbers, two of them in a register.
template <class T>
struct Finite {
    __device__ static bool one(unsigned half) { return (half & T::EXPONENT) != T::EXPONENT; }
    __device__ static bool all(unsigned two) { return one(two) && one(two >> 16); }
    __device__ static unsigned only(unsigned two) {
        return (one(two) ? two & 0xffffu : 0u) | (one(two >> 16) ? two & 0xffff0000u : 0u);
    }
    __device__ static float code(unsigned half) {
        if (one(half)) return 0;
        return half & 0x7fff & ~T::EXPONENT ? NAN_SEEN : half & 0x8000 ? MINUS : PLUS;
    }
    __device__ static unsigned codes(unsigned two) { return pack(T{}, code(two), code(two >> 16)); }
};
