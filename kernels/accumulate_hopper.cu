// Fold one block of K and V into the running softmax of the queries, with what Hopper GPUs have for it: bfloat16 and
// float16. Arguments and promises are those of accumulate_tensor.cu, but for these:
//
//   k, v       tensor maps of (n_k, kv_heads, dim) and (n_k, kv_heads, dim_v), 16-bit numbers, in boxes of
//              (KEYS, 1, 64) with the 128-byte swizzle, zeros outside
//
// grid (ceil(n_q group / ROWS), kv_heads, parts) of 128 (GROUPS + 1) threads; ROWS = 64 GROUPS; dynamic shared memory:
// SharedLayout::BYTES. The caller guarantees: dim <= DIM, dim_v <= DIM_V, DIM and DIM_V 64 or 128; dim and dim_v
// multiples of 8; q, k and v aligned to 16 bytes, acc to 8; n_k + width < 2^31.
//
// The threads have roles, as in Shah et al. 2024, FlashAttention-3: one copies tiles of K and V into stages, in turns;
// each other warpgroup folds them into the state of its 64 rows, which stays in registers. Over tiles that all its
// rows see in full, a warpgroup starts the scores of the next tile before it adds the values of this one, and works
// out the weights of the next while the values are added; where all warpgroups do, they start their products in turns,
// so that one works out weights while another has the tensor cores. Tiles that some row sees in part are folded one by
// one.

#include "finite.cuh"
#include "panels.cuh"
#include "softmax.cuh"

constexpr int GROUP_ROWS = 64, WARP_ROWS = 16, WARPS = 4;       // of a warpgroup

// What lies where in shared memory.
template <int DIM, int DIM_V, int GROUPS, int KEYS, int STAGES>
struct SharedLayout {
    static constexpr int Q = GROUP_ROWS * DIM * 2, K = KEYS * DIM * 2, V = KEYS * DIM_V * 2;
    static constexpr int BARRIERS = 4 * static_cast<int>(sizeof(MBarrier));        // of a stage
    static constexpr int BYTES = PANEL_ALIGN + GROUPS * Q + STAGES * (K + V + BARRIERS);

    unsigned char *q, *k, *v;
    MBarrier *k_full, *v_full, *k_empty, *v_empty;      // of each stage

    __device__ explicit SharedLayout(unsigned char* start) {
        q = align_panel(start);
        k = q + GROUPS * Q;
        v = k + STAGES * K;
        k_full = reinterpret_cast<MBarrier*>(v + STAGES * V);
        v_full = k_full + STAGES;
        k_empty = v_full + STAGES;
        v_empty = k_empty + STAGES;
    }

    // One arrival says that a tile is under way, one of each warp that it is done with it.
    __device__ void make_barriers() const {
        for (int i = 0; i < STAGES; ++i) {
            k_full[i].make(1);
            v_full[i].make(1);
            k_empty[i].make(GROUPS * WARPS);
            v_empty[i].make(GROUPS * WARPS);
        }
        fence_async_proxy();
    }

    __device__ static int stage(int tile) { return tile % STAGES; }
    __device__ static int parity(int tile) { return tile / STAGES % 2; }
};

// Copy a tile of K or V into its stage, once all are done with the tile that was there.
template <int KEYS, int COLUMNS>
__device__ inline void copy_tile(unsigned char* tile, const TensorMap& map, int kv_head, int start, int parity,
                                 MBarrier& empty, MBarrier& full) {
    empty.wait(parity ^ 1);
    full.arrive_and_expect(KEYS * COLUMNS * 2);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += PANEL_COLUMNS) {
        tma_load(tile, map, c, kv_head, start, full);
        tile += KEYS * PANEL_ROW_BYTES;
    }
}

// This warp is done with a tile.
__device__ inline void release(MBarrier& empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) empty.arrive();
}

// Tiles of `keys` columns from `start` on that rows see in full: low <= tile < high.
__device__ inline Interval full_tiles(const VisibleColumns& visible, int start, int keys) {
    if (visible.hull.low >= visible.hull.high) return {0, 0};
    const Interval full{(visible.common.low - start + keys - 1) / keys, (visible.common.high - start) / keys};
    return intersection(full, {0, NOWHERE});
}

// The rows of a warpgroup, 16 in each warp: what they see, and their state in registers.
template <class T, int DIM, int DIM_V, int KEYS>
struct GroupRows {
    float acc[DIM_V / 8][4];
    float row_max[2], row_sum[2];
    Interval sees[2];
    float s[KEYS / 8][4];                      // scores, then weights
    unsigned p[KEYS / 16][4];                  // weights, as the left side of a product

    // Start s = Q K^T.
    __device__ void start_scores(SmemDescriptor q, SmemDescriptor k) {
        wgmma_fence();
#pragma unroll
        for (int column = 0; column < DIM; column += 16) {
            const int panel = column / PANEL_COLUMNS, inside = column % PANEL_COLUMNS * 2;
            wgmma(T{}, s, advanced(q, panel * GROUP_ROWS * PANEL_ROW_BYTES + inside),
                  advanced(k, panel * KEYS * PANEL_ROW_BYTES + inside), column > 0);
        }
        wgmma_commit();
    }

    // Start acc += p V.
    __device__ void start_values(SmemDescriptor v) {
        wgmma_fence();
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) wgmma(T{}, acc, p[key / 16], advanced(v, key * PANEL_ROW_BYTES));
        wgmma_commit();
    }

    // Make the scores of what is not seen -infinity.
    __device__ void hide_unseen(int start) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (!sees[i / 2].holds(column_of(start, n, i))) s[n][i] = -infinity(float{});
    }

    // Turn scores into weights, and move the maximum and the sum to what they are now; acc is to shrink by `shrink`.
    __device__ void weigh(float factor, float (&shrink)[2]) {
        online_softmax<true, false>(s, factor, row_max, row_sum, shrink);
    }

    // Take the weights and the maximum of a tile over, once no product reads the ones before.
    __device__ void take(const float (&shrink)[2]) {
#pragma unroll
        for (int n = 0; n < DIM_V / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] *= shrink[i / 2];
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                p[step][i] = pack(T{}, s[2 * step + i / 2][i % 2 * 2], s[2 * step + i / 2][i % 2 * 2 + 1]);
    }

    // Whether this thread's share of a tile of V has nothing but finite numbers.
    __device__ static bool finite_share(const unsigned char* v_tile) {
        bool finite = true;
#pragma unroll 4
        for (int at = threadIdx.x % WARPGROUP * 16; at < KEYS * DIM_V * 2; at += WARPGROUP * 16) {
            const Chunk chunk = *reinterpret_cast<const Chunk*>(v_tile + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) finite &= Finite<T>::all(chunk.words[i]);
        }
        return finite;
    }

    // Right sides of two products: rows key .. key + 16 of V, columns column .. column + 8 and eight more.
    __device__ static void right(unsigned (&b)[4], const unsigned char* v_tile, int key, int column) {
        const int lane = threadIdx.x % 32;
        load_matrices_transposed(b, v_tile + chunk_offset(KEYS, key + lane % 16, column / 8 + lane / 16));
    }

    // acc += p V, where a key that a row does not see may have NaN or infinity; a rare way.
    __device__ void add_carefully(const unsigned char* v_tile, int start) {
        constexpr int HALF = KEYS / 2;
        static_assert(HALF < MINUS, "codes must not run over");
#pragma unroll
        for (int n = 0; n < DIM_V / 8; n += 2) {
            unsigned b[4];
#pragma unroll
            for (int step = 0; step < KEYS / 16; ++step) {
                right(b, v_tile, step * 16, n * 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) b[i] = Finite<T>::only(b[i]);      // a weight of 0 times NaN would be NaN
                multiply_add(T{}, acc[n], p[step], b[0], b[1]);
                multiply_add(T{}, acc[n + 1], p[step], b[2], b[3]);
            }
#pragma unroll
            for (int half = 0; half < KEYS; half += HALF) {            // more codes could not be added up
                float found[2][4] = {};
#pragma unroll 1
                for (int key = half; key < half + HALF; key += 16) {
                    unsigned visible[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int column = column_of(start + key, i / 2, 0);
                        visible[i] = pack(T{}, sees[i % 2].holds(column), sees[i % 2].holds(column + 1));
                    }
                    right(b, v_tile, key, n * 8);
                    multiply_add(T{}, found[0], visible, Finite<T>::codes(b[0]), Finite<T>::codes(b[1]));
                    multiply_add(T{}, found[1], visible, Finite<T>::codes(b[2]), Finite<T>::codes(b[3]));
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) add_found(acc[n + i / 4][i % 4], found[i / 4][i % 4]);
            }
        }
    }
};

template <class T, int DIM, int DIM_V, int GROUPS, int KEYS, int STAGES>
__global__ void __launch_bounds__(WARPGROUP * (GROUPS + 1), 1)
accumulate(const __grid_constant__ StateArrays<float> arrays, const T* q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v, const __grid_constant__ Problem<float> problem) {
    static_assert(GROUPS == 2 || GROUPS == 3, "the registers of a multiprocessor are shared out for these");
    static_assert(STAGES >= 2, "scores are started a tile ahead");
    static_assert(KEYS == 128, "products are of this width");
    constexpr int ROWS = GROUP_ROWS * GROUPS;
    constexpr int COPIER_REGISTERS = GROUPS == 2 ? 24 : 32, REGISTERS = GROUPS == 2 ? 240 : 160;
    const SharedLayout<DIM, DIM_V, GROUPS, KEYS, STAGES> layout(shared_memory());

    // The first warpgroup copies. The same for all lanes of a warp, which the compiler does not see by itself.
    const int warp = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / 32, 0) - WARPS, lane = threadIdx.x % 32;
    const int mine = warp * WARP_ROWS;
    const Rows rows = rows_of_block(problem, ROWS);
    const Interval part = columns_of_part(problem.n_k, arrays.width);

    // What each row sees of this part, each warpgroup, and the tiles of keys that any row of the block sees.
    __shared__ VisibleColumns of_warps[GROUPS * WARPS];
    const bool has_row = warp >= 0 && lane < WARP_ROWS && rows.contains(mine + lane);
    const Interval interval = has_row ? intersection(rows.interval(problem.begin, problem.end, 0, mine + lane), part)
                                      : Interval{0, 0};
    const VisibleColumns of_this_warp = visible_to_warp(interval, has_row);
    if (warp >= 0 && lane == 0) of_warps[warp] = of_this_warp;
    if (threadIdx.x == 0) layout.make_barriers();
    __syncthreads();
    VisibleColumns of_groups[GROUPS];
    Interval range{NOWHERE, 0};
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        of_groups[g] = of_warps[g * WARPS];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) of_groups[g] = merged(of_groups[g], of_warps[g * WARPS + w]);
        range = {min(range.low, of_groups[g].hull.low), max(range.high, of_groups[g].hull.high)};
    }
    const int tiles = range.tiles(KEYS);
    if (tiles == 0 && !arrays.fresh) return;

    if (warp < 0) {
        decrease_registers<COPIER_REGISTERS>();
        if (threadIdx.x == 0) {
            auto start_of = [&](int i) { return range.low + i * KEYS; };
            auto load_k = [&](int i) {
                const int stage = layout.stage(i);
                copy_tile<KEYS, DIM>(layout.k + stage * layout.K, k, rows.kv_head, start_of(i), layout.parity(i),
                                     layout.k_empty[stage], layout.k_full[stage]);
            };
            auto load_v = [&](int i) {
                const int stage = layout.stage(i);
                copy_tile<KEYS, DIM_V>(layout.v + stage * layout.V, v, rows.kv_head, start_of(i), layout.parity(i),
                                       layout.v_empty[stage], layout.v_full[stage]);
            };
            if (tiles) load_k(0);
            for (int i = 0; i < tiles; ++i) {
                if (i + 1 < tiles) load_k(i + 1);              // scores are wanted a tile ahead of values
                load_v(i);
            }
        }
    } else {
        increase_registers<REGISTERS>();
        const int warpgroup = warp / WARPS;
        unsigned char* const q_tile = layout.q + warpgroup * layout.Q;
        constexpr int CHUNKS = DIM / 8;
#pragma unroll
        for (int i = 0; i < GROUP_ROWS * CHUNKS; i += WARPGROUP) {
            const int chunk = i + threadIdx.x % WARPGROUP, r = chunk / CHUNKS, c = chunk % CHUNKS;
            const int row = warpgroup * GROUP_ROWS + r;
            Chunk numbers{};
            if (rows.contains(row) && c * 8 < problem.dim)
                numbers = *reinterpret_cast<const Chunk*>(q + rows.state_row(row) * problem.dim + c * 8);
            store_chunk(q_tile + chunk_offset(GROUP_ROWS, r, c), numbers);
        }
        if (!(problem.scale > 0)) {
            named_barrier_sync(1 + warpgroup, WARPGROUP);
            take_sign(reinterpret_cast<T*>(q_tile), threadIdx.x % WARPGROUP, GROUP_ROWS * DIM, WARPGROUP,
                      problem.scale);
        }
        fence_async_proxy();
        named_barrier_sync(1 + warpgroup, WARPGROUP);

        GroupRows<T, DIM, DIM_V, KEYS> state;
        const int own_row = mine + lane / 4;       // the other is 8 further on
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = own_row + 8 * h;
            state.sees[h] = {__shfl_sync(ALL_LANES, interval.low, row - mine),
                             __shfl_sync(ALL_LANES, interval.high, row - mine)};
            load_state<true>(arrays, rows, row, problem.dim_v, h, state.acc, state.row_max[h], state.row_sum[h]);
        }

        const SmemDescriptor q_descriptor = smem_descriptor<true, GROUP_ROWS>(q_tile);
        const SmemDescriptor k_descriptor = smem_descriptor<true, KEYS>(layout.k);
        const SmemDescriptor v_descriptor = smem_descriptor<false, KEYS>(layout.v);
        auto start_scores = [&](int i) {
            layout.k_full[layout.stage(i)].wait(layout.parity(i));
            state.start_scores(q_descriptor, advanced(k_descriptor, layout.stage(i) * layout.K));
        };
        auto start_values = [&](int i) {
            layout.v_full[layout.stage(i)].wait(layout.parity(i));
            state.start_values(advanced(v_descriptor, layout.stage(i) * layout.V));
        };
        auto release_k = [&](int i) { release(layout.k_empty[layout.stage(i)]); };
        auto release_v = [&](int i) { release(layout.v_empty[layout.stage(i)]); };
        // Tiles that the other rows see and these don't: only when one is here is it the turn of its phase.
        auto pass = [&](int from, int to) {
            for (int i = from; i < to; ++i) {
                layout.k_full[layout.stage(i)].wait(layout.parity(i));
                release_k(i);
                layout.v_full[layout.stage(i)].wait(layout.parity(i));
                release_v(i);
            }
        };

        VisibleColumns visible = of_groups[0];
        Interval all_run{0, NOWHERE};
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            if (g == warpgroup) visible = of_groups[g];
            all_run = intersection(all_run, full_tiles(of_groups[g], range.low, KEYS));
        }
        const bool sees_any = visible.hull.low < visible.hull.high;
        const int first = sees_any ? (visible.hull.low - range.low) / KEYS : tiles;
        const int last = sees_any ? (visible.hull.high - range.low + KEYS - 1) / KEYS : tiles;
        const Interval full = full_tiles(visible, range.low, KEYS);
        const Interval turns{all_run.low, all_run.high - 1};       // the last tile of a run starts no scores
        auto await_turn = [&](int i) {
            if (turns.holds(i) && (warpgroup > 0 || i > turns.low))
                named_barrier_sync(1 + GROUPS + warpgroup, 2 * WARPGROUP);
        };
        auto pass_turn_on = [&](int i) {
            if (turns.holds(i) && (warpgroup < GROUPS - 1 || i + 1 < turns.high))
                named_barrier_arrive(1 + GROUPS + (warpgroup + 1) % GROUPS, 2 * WARPGROUP);
        };
        float shrink[2];
        pass(0, first);
        for (int i = first; i < last;) {
            const int start = range.low + i * KEYS;
            start_scores(i);
            wgmma_wait<0>(state.s);
            release_k(i);
            if (full.holds(i)) {
                state.weigh(problem.factor, shrink);
                state.take(shrink);
                for (; i + 1 < full.high; ++i) {
                    await_turn(i);
                    start_scores(i + 1);
                    start_values(i);
                    pass_turn_on(i);
                    wgmma_wait<1>(state.s);
                    release_k(i + 1);
                    state.weigh(problem.factor, shrink);
                    settle(state.row_sum[0] + state.row_sum[1]);
                    wgmma_wait<0>(state.acc);
                    release_v(i);
                    state.take(shrink);
                }
                start_values(i);
                wgmma_wait<0>(state.acc);
            } else {
                state.hide_unseen(start);
                state.weigh(problem.factor, shrink);
                state.take(shrink);
                layout.v_full[layout.stage(i)].wait(layout.parity(i));
                const unsigned char* const v_tile = layout.v + layout.stage(i) * layout.V;
                if (!named_barrier_or(1 + warpgroup, WARPGROUP, !state.finite_share(v_tile))) {
                    start_values(i);
                    wgmma_wait<0>(state.acc);
                } else {
                    state.add_carefully(v_tile, start);
                }
                fence_async_proxy();                       // the next tile comes after what threads have read of this
            }
            release_v(i);
            ++i;
        }
        pass(last, tiles);

#pragma unroll
        for (int h = 0; h < 2; ++h)
            store_state<true>(arrays, rows, own_row + 8 * h, problem.dim_v, h, state.acc, state.row_max[h],
                              state.row_sum[h]);
    }
}
