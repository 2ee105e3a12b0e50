// The instructions of the GPU that C++ has no words for, each behind a function of one meaning.
//
// Only this file and hopper.cuh hold PTX, and no header of the CUDA toolkit is needed, so the sources compile with
// NVRTC alone. The tests put a file of the same name in place of this one that gives the functions their meaning on
// a CPU. sm_80 and later.
//
// Fragments of 16 x 8 tiles, as mma.sync defines them: lane 4 g + t holds, of an accumulator, rows g and g + 8 and
// columns 2 t and 2 t + 1, in the order (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
#pragma once

#include "types.cuh"

// Dynamic shared memory of the block, aligned to 128 bytes.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Start to copy BYTES (2, 4, 8 or 16, aligned to that) from global to shared memory; zeros unless `there`.
// Done, for this thread, after the wait for its group.
template <int BYTES>
__device__ inline void copy_async(void* target, const void* source, bool there) {
    if constexpr (BYTES == 2) {
        *static_cast<unsigned short*>(target) = there ? *static_cast<const unsigned short*>(source) : 0;
    } else if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(target)), "l"(source), "r"(there ? 16 : 0) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(target)), "l"(source), "n"(BYTES), "r"(there ? BYTES : 0) : "memory");
    }
}

// Close a group of copies.
__device__ inline void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most PENDING of this thread's latest groups are not done.
template <int PENDING>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// Barriers of some threads of the block, by number, from 1; 0 is __syncthreads. Whole warps.
__device__ inline void named_barrier_sync(int number, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

// Arrive at such a barrier, and go on.
__device__ inline void named_barrier_arrive(int number, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

// The same as the first; tells whether any thread says yes.
__device__ inline bool named_barrier_or(int number, int threads, bool yes) {
    int any;
    asm volatile("{\n"
                 ".reg .pred mine, any;\n"
                 "setp.ne.s32 mine, %3, 0;\n"
                 "barrier.cta.red.or.pred.aligned any, %1, %2, mine;\n"
                 "selp.s32 %0, 1, 0, any;\n"
                 "}" : "=r"(any) : "r"(number), "r"(threads), "r"(static_cast<int>(yes)) : "memory");
    return any != 0;
}

// Load four 8 x 8 matrices of 16-bit numbers; lane i points to row i % 8 of matrix i / 8.
// Register m of lane 4 g + t: of matrix m, row g, columns 2 t and 2 t + 1.
__device__ inline void load_matrices(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices: register m of lane 4 g + t has rows 2 t and 2 t + 1 of column g.
__device__ inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// c += a b, with a of 16 x 16 and b of 16 x 8: a (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); b (2t.., g), (2t+8.., g).
__device__ inline void multiply_add(bfloat16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_add(float16, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b, with a of 16 x 8 and b of 8 x 8: a (g, t), (g+8, t), (g, t+4), (g+8, t+4); b (t, g), (t+4, g).
__device__ inline void multiply_add(double, double (&c)[4], const double (&a)[4], double b0, double b1) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
                 : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b0), "d"(b1));
#else
    auto quarter = [](double& c0, double& c1, double a0, double b) {
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(c0), "+d"(c1) : "d"(a0), "d"(b));
    };
    quarter(c[0], c[1], a[0], b0);
    quarter(c[2], c[3], a[1], b0);
    quarter(c[0], c[1], a[2], b1);
    quarter(c[2], c[3], a[3], b1);
#endif
}

// Two numbers rounded to nearest even, the first in the low half.
__device__ inline unsigned pack(bfloat16, float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline unsigned pack(float16, float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ inline float value(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float value(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline float value(float x) { return x; }
__device__ inline double value(double x) { return x; }

// Rounded to the type it is stored as; to 16 bits by way of float.
__device__ inline void store(double* at, double x) { *at = x; }
__device__ inline void store(float* at, double x) { *at = static_cast<float>(x); }
__device__ inline void store(bfloat16* at, double x) {
    at->bits = static_cast<unsigned short>(pack(bfloat16{}, static_cast<float>(x), 0));
}
__device__ inline void store(float16* at, double x) {
    at->bits = static_cast<unsigned short>(pack(float16{}, static_cast<float>(x), 0));
}

// A product that is rounded: never one with the sum that follows it, so that what overflows does so everywhere.
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }

__device__ inline float magnitude(float x) { return fabsf(x); }

// a b + c, rounded once.
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

constexpr double LOG2_E = 1.4426950408889634;

// 2^x; exactly 1 at 0, 0 at -infinity. Relative error for float: 2^-22.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline double power_of_two(double x) { return exp2(x); }

// e^x; exactly 1 at 0, 0 at -infinity. Relative error for float: (2 + |x|) 2^-23.
__device__ inline float exponential(float x) { return power_of_two(x * static_cast<float>(LOG2_E)); }
__device__ inline double exponential(double x) { return exp(x); }

// Relative error for float: 2^-22.
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

__device__ inline float infinity(float) { return __int_as_float(0x7f800000); }
__device__ inline double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }
__device__ inline float not_a_number(float) { return __int_as_float(0x7fc00000); }
__device__ inline double not_a_number(double) { return __longlong_as_double(0x7ff8000000000000ll); }
