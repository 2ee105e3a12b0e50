// The functions of kernels/hopper.cuh with their meaning on a CPU; see emulator.h.
//
// What runs on its own on a GPU is late here. The box of a copy is NaN until it arrives, in any order, at some turn of
// the scheduler. The registers of a product are NaN until the wait for it, which each warp ends for itself; what it
// reads, in shared memory and in registers, must be the same then as when it was started. Descriptors are decoded from
// their 64 bits, and shared memory is addressed as a GPU does it. What a thread wrote must have been fenced by it, and
// the thread have come to a barrier since, before a product reads it.
#pragma once

#include <map>

#include "platform.cuh"

constexpr int WARPGROUP = 128;

namespace emulator {

constexpr unsigned FIRST_ADDRESS = 1024 + 384;          // of dynamic shared memory: aligned to no more than it must be

inline unsigned address_of(const void* pointer) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - shared) + FIRST_ADDRESS;
}

inline unsigned char* at_address(unsigned address, int bytes, const char* otherwise) {
    if (address < FIRST_ADDRESS || address - FIRST_ADDRESS + bytes > shared_bytes.size() - 256) fail(otherwise);
    return shared + (address - FIRST_ADDRESS);
}

// The 128-byte swizzle: bits 4 .. 6 of an address are turned by bits 7 .. 9.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

struct Phases {
    int arrivals = 0, pending = 0, bytes = 0;
    long phase = 0;
    unsigned maker = 0;
    bool fenced = false;

    void look() {
        if (pending < 0) fail("more arrivals at a barrier than it was made with");
        if (pending != 0 || bytes != 0) return;
        ++phase;
        pending = arrivals;
    }
};

struct Stored {
    unsigned thread;
    bool fenced;
};

// A product that the warps of a warpgroup start one after the other.
struct Product {
    unsigned long long a = 0, b = 0;
    bool a_in_registers = false, add = false;
    int width = 0, lanes = 0;
    std::vector<unsigned short> a_bits, b_bits;          // 64 x 16, width x 16, as the first warp found them
    std::vector<float> a_numbers, b_numbers;
};

struct Share {                                 // a lane's
    std::shared_ptr<Product> product;
    float* d;
    const unsigned* a;
    unsigned a_then[4];
    float (*number)(unsigned);
};

struct Lane {
    std::vector<std::vector<Share>> groups{1};
    std::map<float*, std::vector<float>> values;         // of registers that are under way
    bool started = false;
    long count = 0;
};

struct Hopper {
    long block = 0;
    std::map<unsigned, Phases> barriers;
    std::map<unsigned, Stored> stored;         // what a product must not read yet, by 16 bytes
    std::map<unsigned, Lane> lanes;
    std::map<std::pair<int, long>, std::shared_ptr<Product>> products;           // that not all warps have started
};

inline Hopper& hopper() {
    static Hopper state;
    if (state.block != block_number) {
        state = Hopper{};
        state.block = block_number;
        passed_barrier = [](unsigned thread) {
            auto& stored = hopper().stored;
            for (auto i = stored.begin(); i != stored.end();)
                i = i->second.thread == thread && i->second.fenced ? stored.erase(i) : std::next(i);
        };
        at_end = [] {
            if (!hopper().products.empty()) fail("a product that not all warps of a warpgroup started");
            for (const auto& lane : hopper().lanes)
                if (!lane.second.values.empty()) fail("a product that nobody waited for");
            if (!deeds.empty()) fail("a copy that nobody waited for");
        };
    }
    return state;
}

inline Phases& phases(const void* barrier) {
    const auto found = hopper().barriers.find(address_of(barrier));
    if (found == hopper().barriers.end()) fail("a barrier that was not made");
    return found->second;
}

// A 16-bit number of a descriptor.
inline unsigned short number_at(unsigned address) {
    const unsigned place = swizzled(address);
    if (hopper().stored.count(place / 16)) fail("a product reads what was not fenced, or not before a barrier");
    unsigned short bits;
    std::memcpy(&bits, at_address(place, 2, "a product reads outside of shared memory"), 2);
    return bits;
}

// Numbers (i, k) of a descriptor, i < width and k < 16: the canonical layouts of the 128-byte swizzle, for 16 bits.
inline std::vector<unsigned short> read(unsigned long long descriptor, bool along, int width) {
    const unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 14 & 3) || (descriptor >> 30 & 3) || (descriptor >> 46 & 0xffff))
        fail("a descriptor that is not of the 128-byte swizzle");
    std::vector<unsigned short> all;
    for (int i = 0; i < width; ++i)
        for (int k = 0; k < 16; ++k)
            all.push_back(number_at(along ? start + i % 8 * 128 + i / 8 * stride + k * 2
                                          : start + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride));
    return all;
}

inline void start_product(const Product& wanted, float* d, const unsigned* a, float (*number)(unsigned)) {
    Lane& lane = hopper().lanes[current->index];
    if (!lane.started) fail("a product without wgmma_fence()");
    const std::pair<int, long> name{current->index / WARPGROUP, lane.count++};
    auto& kept = hopper().products[name];
    if (!kept) {
        kept = std::make_shared<Product>(wanted);
        if (!wanted.a_in_registers) kept->a_bits = read(wanted.a, true, 64);
        kept->b_bits = read(wanted.b, !wanted.a_in_registers, wanted.width);
        for (const unsigned short bits : kept->a_bits) kept->a_numbers.push_back(number(bits));
        for (const unsigned short bits : kept->b_bits) kept->b_numbers.push_back(number(bits));
    }
    const auto product = kept;
    if (product->a != wanted.a || product->b != wanted.b || product->add != wanted.add || product->width != wanted.width)
        fail("the threads of a warpgroup start different products");
    if (++product->lanes == WARPGROUP) hopper().products.erase(name);
    Share share{product, d, a, {}, number};
    if (a) std::copy(a, a + 4, share.a_then);
    lane.groups.back().push_back(share);
    if (!lane.values.count(d)) {
        lane.values[d].assign(d, d + wanted.width / 2);
        std::fill(d, d + wanted.width / 2, NAN);
    }
}

struct Registers { unsigned a[4]; };

// End this warp's share of a product: 16 rows.
inline void end_product(Lane& lane, const Share& share, bool last) {
    const Product& product = *share.product;
    const int l = current->index % LANES, first_row = current->index % WARPGROUP / LANES * 16;
    if (l == 0 && ((!product.a_in_registers && read(product.a, true, 64) != product.a_bits)
                   || read(product.b, !product.a_in_registers, product.width) != product.b_bits))
        fail("what a product reads changed while it ran");
    if (share.a && !std::equal(share.a, share.a + 4, share.a_then))
        fail("registers that a product reads changed while it ran");
    for (int i = 0; i < product.width / 2; ++i)
        if (share.d[i] == share.d[i]) fail("registers that a product writes changed while it ran");
    Registers mine{};
    if (share.a) std::copy(share.a, share.a + 4, mine.a);
    const Registers* all = meet(mine, "end_product");
    auto& values = lane.values[share.d];
    float a[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k)
            a[half][k] = share.a ? share.number(all[l / 4 * 4 + k % 8 / 2].a[half + k / 8 * 2] >> k % 2 * 16 & 0xffff)
                                 : product.a_numbers[(first_row + l / 4 + 8 * half) * 16 + k];
    for (int i = 0; i < product.width / 2; ++i) {
        const float* b = &product.b_numbers[(i / 4 * 8 + l % 4 * 2 + i % 2) * 16];
        float sum = product.add ? values[i] : 0;
        for (int k = 0; k < 16; ++k) sum += a[i % 4 / 2][k] * b[k];
        values[i] = sum;
    }
    if (last) {
        std::copy(values.begin(), values.end(), share.d);
        lane.values.erase(share.d);
    }
}

inline void wait_for_products(size_t pending) {
    Lane& lane = hopper().lanes[current->index];
    meet(0, "wgmma_wait");
    while (lane.groups.size() > pending + 1) {
        const auto group = lane.groups.front();
        lane.groups.erase(lane.groups.begin());
        for (size_t i = 0; i < group.size(); ++i) {
            const auto same = [&](const Share& other) { return other.d == group[i].d; };
            bool last = std::none_of(group.begin() + i + 1, group.end(), same);
            for (const auto& later : lane.groups) last &= std::none_of(later.begin(), later.end(), same);
            end_product(lane, group[i], last);
        }
    }
}

template <class T>
inline float number_of(unsigned bits) { return wide(T{}, bits); }

}  // namespace emulator

inline unsigned shared_address(const void* pointer) { return emulator::address_of(pointer); }

inline void fence_async_proxy() {
    for (auto& stored : emulator::hopper().stored)
        stored.second.fenced |= stored.second.thread == emulator::current->index;
    for (auto& barrier : emulator::hopper().barriers)
        barrier.second.fenced |= barrier.second.maker == emulator::current->index;
}

struct alignas(16) Chunk {
    unsigned words[4];
};

inline void store_chunk(void* shared, const Chunk& chunk) {
    const unsigned address = emulator::address_of(shared);
    if (address % 16) emulator::fail("a chunk that is not aligned");
    std::memcpy(emulator::at_address(address, 16, "a chunk outside of shared memory"), &chunk, 16);
    emulator::hopper().stored[address / 16] = {emulator::current->index, false};
}

struct MBarrier {
    unsigned long long opaque;

    void make(int arrivals) {
        if (emulator::address_of(this) % 8) emulator::fail("a barrier that is not aligned");
        auto& made = emulator::hopper().barriers[emulator::address_of(this)];
        made.arrivals = made.pending = arrivals;
        made.maker = emulator::current->index;
    }

    void arrive() {
        auto& barrier = emulator::phases(this);
        --barrier.pending;
        barrier.look();
    }

    void arrive_and_expect(int bytes) {
        emulator::phases(this).bytes += bytes;
        arrive();
    }

    void wait(int parity) {
        auto& barrier = emulator::phases(this);
        emulator::wait_until([&barrier, parity] { return barrier.phase % 2 != parity; });
    }
};

// As tests/emulate.py makes it.
struct TensorMap {
    unsigned long long address, sizes[3], strides[3];    // x first; strides in bytes
    unsigned box[3], unused;
    unsigned char rest[56];
};

inline void tma_load(void* panel, const TensorMap& map, int x, int y, int z, MBarrier& arrived) {
    static_assert(sizeof(TensorMap) == 128);
    const unsigned bytes = map.box[0] * map.box[1] * map.box[2] * 2, target = emulator::address_of(panel);
    if (target % 128) emulator::fail("a box that is not aligned");
    auto& barrier = emulator::phases(&arrived);
    if (!barrier.fenced) emulator::fail("a barrier that the hardware may not see yet");
    std::memset(emulator::at_address(target, bytes, "a box outside of shared memory"), 0xff, bytes);
    emulator::deeds.push_back([=, &barrier] {
        const unsigned row = map.box[0] * 2;
        for (unsigned at = 0; at < bytes; at += 2) {
            const long long place[3] = {x + at % row / 2, y + at / row % map.box[1], z + at / row / map.box[1]};
            const unsigned char* source = reinterpret_cast<const unsigned char*>(map.address);
            bool inside = true;
            for (int i = 0; i < 3; ++i) {
                inside &= 0 <= place[i] && place[i] < static_cast<long long>(map.sizes[i]);
                source += place[i] * map.strides[i];
            }
            unsigned short bits = 0;
            if (inside) std::memcpy(&bits, source, 2);
            std::memcpy(emulator::at_address(emulator::swizzled(target + at), 2, "a box outside"), &bits, 2);
        }
        barrier.bytes -= bytes;
        barrier.look();
    });
}

template <int COUNT>
inline void decrease_registers() {}
template <int COUNT>
inline void increase_registers() {}

using SmemDescriptor = unsigned long long;

// All four warps come here before any goes on.
inline void wgmma_fence() {
    emulator::hopper().lanes[emulator::current->index].started = true;
    auto& meeting = emulator::meetings[-1 - static_cast<int>(threadIdx.x / WARPGROUP)];
    const long mine = meeting.number + 1;
    if (++meeting.arrived == WARPGROUP) {
        meeting.arrived = 0;
        meeting.number = mine;
    }
    emulator::wait_until([&meeting, mine] { return meeting.number >= mine; });
}

inline void wgmma_commit() {
    auto& lane = emulator::hopper().lanes[emulator::current->index];
    lane.groups.emplace_back();
    lane.started = false;
}

inline void settle(float number) {
    if (number < 0) emulator::fail("a sum of weights below 0");
}

template <int PENDING, int N>
inline void wgmma_wait(float (&)[N][4]) { emulator::wait_for_products(PENDING); }

template <class T>
inline void wgmma(T, float (&d)[16][4], SmemDescriptor a, SmemDescriptor b, bool add) {
    emulator::Product product;
    product.a = a;
    product.b = b;
    product.add = add;
    product.width = 128;
    emulator::start_product(product, &d[0][0], nullptr, emulator::number_of<T>);
}

template <class T, int N>
inline void wgmma(T, float (&d)[N][4], const unsigned (&a)[4], SmemDescriptor b) {
    emulator::Product product;
    product.b = b;
    product.add = true;
    product.width = 8 * N;
    product.a_in_registers = true;
    emulator::start_product(product, &d[0][0], a, emulator::number_of<T>);
}
