// What becomes of a product q . k before the softmax, and of a weight after it: score functions, as ringmpi/score.py
// defines them, the bias of a key, and that of a distance. A kernel takes a Score with any of these: a plain one has
// nothing to keep and nothing to do.
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

// Softcap, slopes and dropout; nothing unless THERE.
template <class A, bool THERE>
struct ScoreFunctions {
    struct Row {};
    struct Key {};
    __device__ explicit ScoreFunctions(const Problem<A>&) {}
    template <class R>
    __device__ Row row(const R&, int) const { return {}; }
    __device__ Key key(int) const { return {}; }
    __device__ A apply(A x, const Row&, const Key&, A&) const { return x; }
    __device__ A dropout_factor(const Row&, const Key&) const { return 1; }
};

template <class A>
struct ScoreFunctions<A, true> {
    struct Row { A slope; unsigned dropout_key; int position; };
    struct Key { int position; };
    PackedScore<A> header;
    A inverse;                 // of softcap
    const A* slopes;
    const unsigned* dropout_keys;
    const int *queries, *keys;
    int last_key;

    __device__ explicit ScoreFunctions(const Problem<A>& problem)
        : header(*static_cast<const PackedScore<A>*>(problem.packed_score)), inverse(1 / header.softcap),
          slopes(reinterpret_cast<const A*>(static_cast<const PackedScore<A>*>(problem.packed_score) + 1)),
          dropout_keys(reinterpret_cast<const unsigned*>(slopes + problem.kv_heads * problem.group)),
          queries(reinterpret_cast<const int*>(dropout_keys + problem.kv_heads * problem.group)),
          keys(queries + problem.n_q), last_key(problem.n_k - 1) {}

    template <class R>
    __device__ Row row(const R& rows, int row) const {
        if (!rows.contains(row)) return {};
        const int head = rows.head(row);
        return {slopes[head], dropout_keys[head], queries[rows.query(row)]};
    }

    __device__ Key key(int column) const { return {keys[min(column, last_key)]}; }

    __device__ A apply(A x, const Row& row, const Key& key, A& derivative) const {
        derivative = 1;
        if (header.softcap != 0) {
            const A bent = hyperbolic_tangent(x * inverse);
            derivative = 1 - bent * bent;
            x = bent * header.softcap;
        }
        if (header.sloped) {
            const unsigned i = static_cast<unsigned>(row.position), j = static_cast<unsigned>(key.position);
            x -= row.slope * static_cast<A>(row.position < key.position ? j - i : i - j);
        }
        return x;
    }

    __device__ A dropout_factor(const Row& row, const Key& key) const {
        if (header.gain == 0) return 1;
        return random_word(row.dropout_key, row.position, key.position) < header.threshold ? A{0} : header.gain;
    }
};

// A number for each key, or key and head; nothing unless THERE. -infinity leaves a key out.
template <class A, bool THERE>
struct KeyBias {
    struct Row {};
    struct Key {};
    __device__ explicit KeyBias(const Problem<A>&) {}
    template <class R>
    __device__ Row row(const R&, int) const { return {}; }
    __device__ Key key(int) const { return {}; }
    __device__ A add_to(A x, const Row&, const Key&) const { return x; }
};

template <class A>
struct KeyBias<A, true> {
    struct Row { int head; };             // 0 where all heads have the same bias
    struct Key { const A* of_heads; };
    const A* bias;
    int heads, last_key;

    __device__ explicit KeyBias(const Problem<A>& problem)
        : bias(problem.key_bias), heads(problem.bias_heads), last_key(problem.n_k - 1) {}

    template <class R>
    __device__ Row row(const R& rows, int row) const { return {heads > 1 && rows.contains(row) ? rows.head(row) : 0}; }

    __device__ Key key(int column) const { return {bias + static_cast<long long>(min(column, last_key)) * heads}; }
    __device__ A add_to(A x, const Row& row, const Key& key) const { return x + key.of_heads[row.head]; }
};

// A number of a table for each axis of positions, by how far the query is from the key along it; nothing unless THERE.
template <class A, bool THERE>
struct RelativeBias {
    struct Row {};
    struct Key {};
    __device__ explicit RelativeBias(const Problem<A>&) {}
    template <class R>
    __device__ Row row(const R&, int) const { return {}; }
    __device__ Key key(int) const { return {}; }
    __device__ A add_to(A x, const Row&, const Key&) const { return x; }
};

template <class A>
struct RelativeBias<A, true> {
    struct Row { int query, head; };
    struct Key { int column; };
    const Problem<A>& problem;

    __device__ explicit RelativeBias(const Problem<A>& problem) : problem(problem) {}

    template <class R>
    __device__ Row row(const R& rows, int row) const {
        if (!rows.contains(row)) return {0, 0};
        return {rows.query(row), rows.head(row)};
    }

    __device__ Key key(int column) const { return {min(column, problem.n_k - 1)}; }

    // Number of a pair's entry in the table of an axis.
    __device__ int entry(const Row& row, const Key& key, int axis) const {
        const long long first = static_cast<long long>(axis) * (problem.n_q + static_cast<long long>(problem.n_k));
        const long long i = problem.coordinates[first + row.query];
        const long long j = problem.coordinates[first + problem.n_q + key.column];
        const int reach = problem.widths[axis] / 2;
        return static_cast<int>(i - j < -reach ? -reach : i - j > reach ? reach : i - j) + reach;
    }

    __device__ A add_to(A x, const Row& row, const Key& key) const {
        const A* table = problem.tables;
#pragma unroll 1
        for (int axis = 0; axis < problem.axes; ++axis) {
            const long long width = problem.widths[axis];
            x += table[row.head * width + entry(row, key, axis)];
            table += problem.kv_heads * problem.group * width;
        }
        return x;
    }
};

template <class A, bool WITH_FUNCTIONS, bool WITH_BIAS, bool WITH_RELATIVE>
struct Score {
    static constexpr bool FUNCTIONS = WITH_FUNCTIONS, PLAIN = !WITH_FUNCTIONS && !WITH_BIAS && !WITH_RELATIVE;
    using Functions = ScoreFunctions<A, WITH_FUNCTIONS>;
    using Bias = KeyBias<A, WITH_BIAS>;
    using Relative = RelativeBias<A, WITH_RELATIVE>;
    struct Row {
        typename Functions::Row functions;
        typename Bias::Row bias;
        typename Relative::Row relative;
    };
    struct Key {
        typename Functions::Key functions;
        typename Bias::Key bias;
        typename Relative::Key relative;
    };
    Functions functions;
    Bias bias;
    Relative relative;

    __device__ explicit Score(const Problem<A>& problem) : functions(problem), bias(problem), relative(problem) {}

    // What the score of a row depends on; R: a kind of Rows.
    template <class R>
    __device__ Row row(const R& rows, int row) const {
        return {functions.row(rows, row), bias.row(rows, row), relative.row(rows, row)};
    }

    // What it depends on of a key; of the last one if there is no such key.
    __device__ Key key(int column) const { return {functions.key(column), bias.key(column), relative.key(column)}; }

    // Score of a scaled product, and its derivative, if that is not 1.
    __device__ A apply(A x, const Row& row, const Key& key, A& derivative) const {
        x = bias.add_to(functions.apply(x, row.functions, key.functions, derivative), row.bias, key.bias);
        return relative.add_to(x, row.relative, key.relative);
    }

    __device__ A apply(A x, const Row& row, const Key& key) const {
        A derivative;
        return apply(x, row, key, derivative);
    }

    // Factor of a weight: 1 without dropout.
    __device__ A dropout_factor(const Row& row, const Key& key) const {
        return functions.dropout_factor(row.functions, key.functions);
    }
};
