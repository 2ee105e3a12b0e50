// What becomes of a product q . k before the softmax, and of a weight after it: score functions, as ringmpi/score.py
// defines them. A kernel takes a Score of one of two kinds: the plain one has nothing to keep and nothing to do.
#pragma once

#include "arguments.cuh"

// How a Score comes to the GPU. Arrays follow it, one after the other: slopes (heads,) of type A, and of 32 bits each
// dropout keys (heads,), positions of the queries (n_q,) and of the keys (n_k,); what the score does not use is 0.
template <class A>
struct PackedScore {
    A softcap, gain;           // 0 for none; gain: factor of the weights that are kept
    unsigned threshold;        // a weight is dropped if its random word is below
    int sloped;
};

// The first word of Philox-2x32-10 (Salmon et al. 2011) with counter (j, i) and key `key`.
__device__ inline unsigned random_word(unsigned key, int i, int j) {
    unsigned low = static_cast<unsigned>(j), high = static_cast<unsigned>(i);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long product = 0xd256d193ull * low;
        low = static_cast<unsigned>(product >> 32) ^ key ^ high;
        high = static_cast<unsigned>(product);
        key += 0x9e3779b9u;
    }
    return low;
}

template <class A, bool WITH_FUNCTIONS>
struct Score {
    static constexpr bool FUNCTIONS = false;
    struct Row {};
    __device__ explicit Score(const Problem<A>&) {}
    template <class R>
    __device__ Row row(const R&, int) const { return {}; }
    __device__ int key(int) const { return 0; }
    __device__ A apply(A x, const Row&, int) const { return x; }
    __device__ A apply(A x, const Row&, int, A&) const { return x; }
    __device__ A dropout_factor(const Row&, int) const { return 1; }
};

template <class A>
struct Score<A, true> {
    static constexpr bool FUNCTIONS = true;
    struct Row { A slope; unsigned dropout_key; int position; };
    PackedScore<A> header;
    A inverse;                 // of softcap
    const A* slopes;
    const unsigned* dropout_keys;
    const int *queries, *keys;
    int last_key;

    __device__ explicit Score(const Problem<A>& problem)
        : header(*static_cast<const PackedScore<A>*>(problem.packed_score)), inverse(1 / header.softcap),
          slopes(reinterpret_cast<const A*>(static_cast<const PackedScore<A>*>(problem.packed_score) + 1)),
          dropout_keys(reinterpret_cast<const unsigned*>(slopes + problem.kv_heads * problem.group)),
          queries(reinterpret_cast<const int*>(dropout_keys + problem.kv_heads * problem.group)),
          keys(queries + problem.n_q), last_key(problem.n_k - 1) {}

    // What the score of a row depends on; R: a kind of Rows.
    template <class R>
    __device__ Row row(const R& rows, int row) const {
        if (!rows.contains(row)) return {};
        const int head = rows.head(row);
        return {slopes[head], dropout_keys[head], queries[rows.query(row)]};
    }

    // Position of a key, of the last one if there is no such key.
    __device__ int key(int column) const { return keys[min(column, last_key)]; }

    // Score of a scaled product, and its derivative.
    __device__ A apply(A x, const Row& row, int key, A& derivative) const {
        derivative = 1;
        if (header.softcap != 0) {
            const A bent = hyperbolic_tangent(x * inverse);
            derivative = 1 - bent * bent;
            x = bent * header.softcap;
        }
        if (header.sloped) {
            const unsigned i = static_cast<unsigned>(row.position), j = static_cast<unsigned>(key);
            x -= row.slope * static_cast<A>(row.position < key ? j - i : i - j);
        }
        return x;
    }

    __device__ A apply(A x, const Row& row, int key) const {
        A derivative;
        return apply(x, row, key, derivative);
    }

    // Factor of a weight: 1 without dropout.
    __device__ A dropout_factor(const Row& row, int key) const {
        if (header.gain == 0) return 1;
        return random_word(row.dropout_key, row.position, key) < header.threshold ? A{0} : header.gain;
    }
};
