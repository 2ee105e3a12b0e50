// The arguments of the kernels over tiles, in structs that are passed by value. ringmpi/backends/cuda/arguments.py has
// the same fields in the same order; a test compares the two layouts. Kernels take them as const __grid_constant__:
// fields are then read where the launch put them, and take no registers when they are not in use.
#pragma once

#include "platform.cuh"

constexpr int MOST_AXES = 4;       // as in ringmpi/relative.py

// Sizes, visible columns and scores of a block: n_q queries and n_k keys.
template <class A>
struct Problem {
    const int *begin, *end;        // (intervals, n_q): query i sees columns begin[.][i] <= j < end[.][i] of 0 .. n_k
    const void* packed_score;      // with FUNCTIONS: a PackedScore; see score.cuh
    A scale;                       // factor of the scores q . k
    A factor;                      // |scale| / ln 2, > 0: 1 / ln 2 if it is 0, or scores are not plain
    int n_q, n_k, kv_heads, group; // head h of kv_heads * group uses key head h / group
    int dim, dim_v;                // columns of q and k; columns of v that this launch works on
    const A* key_bias;             // with BIAS: (n_k, bias_heads), finite or -infinity
    int bias_heads;                // 1, or kv_heads * group
    int intervals;                 // 1, or with SEVERAL any number from 1 on
    int axes;                      // with RELATIVE: of positions
    int widths[MOST_AXES];         // of the tables, odd
    const A* tables;               // for each axis (heads, width), one after the other
    const int* coordinates;        // for each axis those of the queries, (n_q,), and of the keys, (n_k,)
};

// The state of the queries. If `fresh`, what the arrays hold is left out, and each part of the columns is written to
// arrays of its own, (parts, n_q, heads, ..), for combine of state.cu.
template <class A>
struct StateArrays {
    // Scores in units of ln 2.
    A* acc;                        // (n_q, heads, stride_v): sum of 2^(score - row_max) v, read and written
    A *row_max, *row_sum;          // (n_q, heads): running maximum and sum, read and written
    int stride_v;                  // columns of acc and v
    int width;                     // columns of a part: the grid's z has as many parts as cover n_k
    int fresh;

    // Where this block's part of row `state_row` is written, of `rows` in all.
    __device__ long long target_row(long long state_row, long long rows) const {
        return fresh ? blockIdx.z * rows + state_row : state_row;
    }
};

// What the backward pass reads.
template <class T>
struct GradientInputs {
    const T *q, *k, *v;            // (n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v)
    const T* dout;                 // (n_q, heads, dim_v): gradient of the result
    const Accumulator<T>* lse;     // (n_q, heads): log-sum-exp of all scores of the row
    const Accumulator<T>* delta;   // (n_q, heads): sum(dout out) - dlse
};
