// The instructions of Hopper GPUs that C++ has no words for, each behind a function of one meaning: barriers in
// shared memory, copies of whole tiles, and products of a warpgroup (four warps, of which the first has a number
// divisible by four), all of which run on their own while threads go on. Tiles lie as panels.cuh says. sm_90a.
//
// Shared memory has two proxies: threads read and write through one, copies of tiles and products through the other.
// What a thread has written is not there for the other proxy until that thread has called fence_async_proxy() and
// then met the others at a barrier; a barrier in shared memory orders all else.
//
// The tests put a file of the same name in place of this one that gives the functions their meaning on a CPU.
#pragma once

#include "platform.cuh"

constexpr int WARPGROUP = 128;

__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What a thread moves at a time.
struct alignas(16) Chunk {
    unsigned words[4];
};
__device__ inline void store_chunk(void* shared, const Chunk& chunk) { *static_cast<Chunk*>(shared) = chunk; }

// A barrier in shared memory. Its phases are 0, 1, 2 ..; a phase is over when as many arrivals as it was made with
// have come, and all the bytes that were announced.
struct MBarrier {
    unsigned long long opaque;

    // By one thread; then fence_async_proxy(), then a barrier of all who use it.
    __device__ void make(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(this)), "r"(arrivals) : "memory");
    }

    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(this)) : "memory");
    }

    // Arrive, and announce bytes that copies will bring.
    __device__ void arrive_and_expect(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(shared_address(this)), "r"(bytes) : "memory");
    }

    // Wait until the latest phase of this parity is over; of parity 1 there is one before the first.
    __device__ void wait(int parity) {
        asm volatile("{\n"
                     ".reg .pred over;\n"
                     "again:\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                     "@over bra done;\n"
                     "bra again;\n"
                     "done:\n"
                     "}" :: "r"(shared_address(this)), "r"(parity) : "memory");
    }
};

// An array of three dimensions, and a box that is copied at a time: what cuTensorMapEncodeTiled writes.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// Start to copy the box at (x, y, z), x counted fastest, to a panel; what is outside of the array becomes zeros. The
// bytes of the whole box count for the barrier. By one thread.
__device__ inline void tma_load(void* panel, const TensorMap& map, int x, int y, int z, MBarrier& arrived) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
                 "[%5];" :: "r"(shared_address(panel)), "l"(&map), "r"(x), "r"(y), "r"(z),
                 "r"(shared_address(&arrived)) : "memory");
}

// Give registers back, or take what others gave back, to have COUNT a thread. All warps of a warpgroup.
template <int COUNT>
__device__ inline void decrease_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT>
__device__ inline void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }

// What a product reads in shared memory, as panels.cuh makes it.
using SmemDescriptor = unsigned long long;

// Products run in the order in which they are started. Before the first, and whenever a thread has touched
// registers that they will read or write:
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close a group of products.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Work a number out before what comes next; it is not negative. The assembler moves arithmetic past the waits below,
// where it no longer overlaps with products, but not past a branch, which this is.
__device__ inline void settle(float number) {
    asm volatile("{\n"
                 ".reg .pred negative;\n"
                 "setp.lt.f32 negative, %0, 0f00000000;\n"
                 "@negative trap;\n"
                 "}" :: "f"(number) : "memory");
}

// Wait until at most PENDING of the latest groups run, and so `d` is there. Nothing may touch the registers of a
// product, and nobody may write to its tiles, before.
template <int PENDING, int N>
__device__ inline void wgmma_wait(float (&d)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; ++i)                // keeps the compiler from reading d before
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j]) :: "memory");
}

// The lists of registers of an asm statement, which takes literals only.
#define EIGHT(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), \
                    "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), "+f"(d[i + 1][3])
#define REGISTERS_32(d) EIGHT(d, 0), EIGHT(d, 2), EIGHT(d, 4), EIGHT(d, 6)
#define REGISTERS_64(d) REGISTERS_32(d), EIGHT(d, 8), EIGHT(d, 10), EIGHT(d, 12), EIGHT(d, 14)
#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a b + (add ? d : 0), with a of 64 x 16 and the transposed of b of 128 x 16, both in shared memory, ALONG.
#define WGMMA(TYPES) \
    asm volatile("{\n" \
                 ".reg .pred add;\n" \
                 "setp.ne.s32 add, %66, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES " {" NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n" \
                 "}" : REGISTERS_64(d) : "l"(a), "l"(b), "r"(static_cast<int>(add)))
__device__ inline void wgmma(bfloat16, float (&d)[16][4], SmemDescriptor a, SmemDescriptor b, bool add) {
    WGMMA("bf16.bf16");
}
__device__ inline void wgmma(float16, float (&d)[16][4], SmemDescriptor a, SmemDescriptor b, bool add) {
    WGMMA("f16.f16");
}
#undef WGMMA

// d += a b, with a of 64 x 16 in registers, 16 rows in each warp as in platform.cuh, and b of 16 x 128 or 16 x 64 in
// shared memory, not ALONG.
#define WGMMA(SHAPE, TYPES, NAMES, REGISTERS, A0, A1, A2, A3, B) \
    asm volatile("{\n" \
                 ".reg .pred add;\n" \
                 "setp.eq.s32 add, 0, 0;\n" \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPES " {" NAMES "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " \
                 B ", add, 1, 1, 1;\n" \
                 "}" : REGISTERS(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
__device__ inline void wgmma(bfloat16, float (&d)[16][4], const unsigned (&a)[4], SmemDescriptor b) {
    WGMMA("m64n128k16", "bf16.bf16", NAMES_64, REGISTERS_64, "%64", "%65", "%66", "%67", "%68");
}
__device__ inline void wgmma(float16, float (&d)[16][4], const unsigned (&a)[4], SmemDescriptor b) {
    WGMMA("m64n128k16", "f16.f16", NAMES_64, REGISTERS_64, "%64", "%65", "%66", "%67", "%68");
}
__device__ inline void wgmma(bfloat16, float (&d)[8][4], const unsigned (&a)[4], SmemDescriptor b) {
    WGMMA("m64n64k16", "bf16.bf16", NAMES_32, REGISTERS_32, "%32", "%33", "%34", "%35", "%36");
}
__device__ inline void wgmma(float16, float (&d)[8][4], const unsigned (&a)[4], SmemDescriptor b) {
    WGMMA("m64n64k16", "f16.f16", NAMES_32, REGISTERS_32, "%32", "%33", "%34", "%35", "%36");
}
#undef WGMMA
#undef NAMES_64
#undef NAMES_32
#undef REGISTERS_64
#undef REGISTERS_32
#undef EIGHT
