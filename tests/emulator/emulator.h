// CUDA's words for a CPU: runs a kernel of kernels/ block by block, its threads as fibres that take turns.
//
// Threads meet where CUDA lets them meet: at barriers and in operations of a whole warp. Between two meetings they
// run in an order shuffled by a seed, some warps more seldom than others, so that an order which only happens to work
// does not always. Shared memory begins as NaN. A copy that is under way reads as NaN until it is waited for. A meeting
// that not all come to ends the process with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

using std::max;
using std::min;

struct Index { unsigned x = 0, y = 0, z = 0; };
inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int LANES = 32, SLOT = 128;

struct Copy { unsigned char* target; const unsigned char* source; int count; bool there; };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    unsigned index = 0;
    bool done = false;
    long meetings = 0;             // of its warp that it has come to
    long barriers = 0;
    std::vector<std::vector<Copy>> groups{1};
    std::function<bool()> ready;   // what else it waits for
};

struct Warp {
    alignas(16) unsigned char slots[2][LANES][SLOT];
    const char* operation[2];
    int arrived = 0;
    long meetings = 0;             // that are complete
};

struct Meeting {
    int arrived = 0, threads = 0;
    long number = 0;
    bool any = false, result = false;
};

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline std::vector<unsigned char> shared_bytes;
inline unsigned char* shared = nullptr;
inline Fibre* current = nullptr;
inline std::function<void()> body;
inline int waiting = 0;
inline long barriers = 0;
inline std::mt19937 random_numbers;
inline long block_number = 0;
inline std::map<int, Meeting> meetings;                     // at barriers of some threads, by number
inline std::vector<std::function<void()>> deeds;            // what the hardware is yet to do for the block, in any order
inline std::function<void(unsigned)> passed_barrier;        // told of each thread
inline std::function<void()> at_end;                        // of the block

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s in block (%u, %u, %u), thread %u\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
                 current ? current->index : 0);
    std::abort();
}

inline void pause() { swapcontext(&current->context, &scheduler); }

// Let others run until it is so.
inline void wait_until(std::function<bool()> ready) {
    current->ready = std::move(ready);
    while (!current->ready()) pause();
    current->ready = nullptr;
}

inline void start() {
    body();
    current->done = true;
    pause();
}

// Wait for all threads of the block that have not ended.
inline void barrier() {
    const long mine = ++current->barriers;
    if (passed_barrier) passed_barrier(current->index);
    const auto alive = std::count_if(fibres.begin(), fibres.end(), [](const Fibre& f) { return !f.done; });
    if (++waiting == alive) {
        waiting = 0;
        barriers = mine;
    }
    while (barriers < mine) pause();
}

// Give `mine` to the other lanes of the warp, and get theirs.
template <class Item>
inline const Item* meet(const Item& mine, const char* operation) {
    static_assert(sizeof(Item) <= SLOT);
    Warp& warp = warps[current->index / LANES];
    const int lane = current->index % LANES;
    const long number = ++current->meetings;
    auto* const slots = warp.slots[number % 2];
    if (warp.arrived == 0) warp.operation[number % 2] = operation;
    if (std::strcmp(warp.operation[number % 2], operation) != 0) fail("lanes of a warp meet in different operations");
    // Items lie side by side, so that the caller can index them.
    std::memcpy(&slots[0][0] + lane * sizeof(Item), &mine, sizeof(Item));
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        warp.meetings = number;
    }
    while (warp.meetings < number) pause();
    return reinterpret_cast<const Item*>(&slots[0][0]);
}

// Meet at a barrier of some threads of the block.
inline bool meet_at(int number, int threads, bool yes, bool waits = true) {
    if (number < 1 || number > 15 || threads % LANES) fail("a barrier that does not exist");
    meet(number, "meet");
    Meeting& meeting = meetings[number];
    if (passed_barrier) passed_barrier(current->index);
    if (meeting.arrived && meeting.threads != threads) fail("threads meet at a barrier with different numbers of them");
    meeting.threads = threads;
    meeting.any |= yes;
    const long mine = meeting.number + 1;
    if (++meeting.arrived == threads) {
        meeting.result = meeting.any;
        meeting.arrived = 0;
        meeting.any = false;
        meeting.number = mine;
    }
    if (waits) wait_until([&meeting, mine] { return meeting.number >= mine; });
    return meeting.result;
}

inline void run_block(unsigned threads, size_t shared_size) {
    shared_bytes.assign(shared_size + 256, 0xff);
    shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_bytes.data()) + 127) / 128 * 128);
    warps.assign((threads + LANES - 1) / LANES, Warp{});
    waiting = 0;
    barriers = 0;
    ++block_number;
    deeds.clear();
    meetings.clear();
    fibres.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& f = fibres[i];
        constexpr size_t STACK = 1 << 18;
        if (!f.stack) f.stack = std::make_unique<char[]>(STACK);
        f.index = i;
        f.done = false;
        f.meetings = f.barriers = 0;
        f.groups.assign(1, {});
        f.ready = nullptr;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    std::vector<int> order(threads);
    for (unsigned i = 0; i < threads; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers);
    std::vector<unsigned> slowness(warps.size());        // a warp takes one turn in so many
    for (unsigned& each : slowness) each = 1u << random_numbers() % 4;
    std::vector<bool> sleeps(warps.size());
    size_t alive = threads;
    bool moved = true;
    while (alive) {
        bool all_awake = !moved;
        for (size_t w = 0; w < warps.size(); ++w) sleeps[w] = !all_awake && random_numbers() % slowness[w] != 0;
        moved = false;
        for (int i : order) {
            Fibre& f = fibres[i];
            if (f.done || sleeps[f.index / LANES]) continue;
            const Warp& warp = warps[f.index / LANES];
            if (f.meetings > warp.meetings || f.barriers > barriers || (f.ready && !f.ready())) continue;  // still waits
            current = &f;
            threadIdx = {f.index, 0, 0};
            swapcontext(&scheduler, &f.context);
            moved = true;
            alive -= f.done;
        }
        std::shuffle(deeds.begin(), deeds.end(), random_numbers);
        while (!deeds.empty() && (random_numbers() % 4 == 0 || (all_awake && !moved))) {
            const auto deed = std::move(deeds.back());
            deeds.pop_back();
            deed();
            moved = true;
        }
        if (all_awake && !moved) fail("not all threads come to a meeting");
    }
    current = nullptr;
    for (const auto& meeting : meetings)
        if (meeting.second.arrived) fail("a meeting that not all came to");
    if (at_end) at_end();
}

template <class... Arguments, size_t... I>
inline void run(const unsigned* grid, unsigned threads, size_t shared_size, unsigned seed,
                void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
    random_numbers.seed(seed);
    body = [=] { kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...); };
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    std::vector<Index> blocks;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) blocks.push_back({x, y, z});
    std::shuffle(blocks.begin(), blocks.end(), random_numbers);
    for (const Index& block : blocks) {
        blockIdx = block;
        run_block(threads, shared_size);
    }
}

template <class... Arguments>
inline void run(const unsigned* grid, unsigned threads, size_t shared_size, unsigned seed,
                void (*kernel)(Arguments...), void** arguments) {
    run(grid, threads, shared_size, seed, kernel, arguments, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned = 0) { emulator::meet(0, "__syncwarp"); }

template <class T>
inline T __shfl_sync(unsigned, T value, int lane) { return emulator::meet(value, "__shfl_sync")[lane % 32]; }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = threadIdx.x % 32;
    return emulator::meet(value, "__shfl_xor_sync")[lane ^ mask];
}

inline int __reduce_min_sync(unsigned, int value) {
    const int* all = emulator::meet(value, "__reduce_min_sync");
    return *std::min_element(all, all + 32);
}

inline int __reduce_max_sync(unsigned, int value) {
    const int* all = emulator::meet(value, "__reduce_max_sync");
    return *std::max_element(all, all + 32);
}

inline unsigned __match_any_sync(unsigned, int value) {
    const int* all = emulator::meet(value, "__match_any_sync");
    unsigned same = 0;
    for (int lane = 0; lane < 32; ++lane) same |= unsigned(all[lane] == value) << lane;
    return same;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float __fmul_rn(float a, float b) { return a * b; }

inline int __all_sync(unsigned, int value) {
    const int* all = emulator::meet(int(value != 0), "__all_sync");
    return std::all_of(all, all + 32, [](int x) { return x; });
}
