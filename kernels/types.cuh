// The 16-bit numbers, as bits, and the type that each type is summed in.
#pragma once

// EXPONENT: all ones there mean an infinity, or NaN if anything but the sign stands beside it.
struct float16 {
    unsigned short bits;
    static constexpr unsigned EXPONENT = 0x7c00;
};
struct bfloat16 {
    unsigned short bits;
    static constexpr unsigned EXPONENT = 0x7f80;
};

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;
