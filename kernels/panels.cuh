// A tile in shared memory as Hopper's copies and products lay it out: a row of panels, each of 64 16-bit columns. A row
// of a panel is 128 bytes long, and its eight chunks of 16 bytes are swizzled, chunk c of row r lying at place
// c ^ r % 8. Panels begin at multiples of PANEL_ALIGN, so that the hardware, which takes the bits of r from the
// address, finds the same.
#pragma once

#include "hopper.cuh"

constexpr int PANEL_COLUMNS = 64, PANEL_ROW_BYTES = 128, PANEL_ALIGN = 1024;

// Where chunk `chunk`, of 16 bytes, of a row lies in a tile of `rows` rows.
__device__ inline int chunk_offset(int rows, int row, int chunk) {
    return (chunk / 8 * rows + row) * PANEL_ROW_BYTES + (chunk % 8 ^ row % 8) * 16;
}

// The first address from `pointer` on where a panel may begin.
__device__ inline unsigned char* align_panel(unsigned char* pointer) {
    return pointer + (PANEL_ALIGN - shared_address(pointer) % PANEL_ALIGN) % PANEL_ALIGN;
}

// What a product reads in shared memory: a place in a tile of ROWS rows, in 16-byte units, and how to go on from
// there. ALONG: the columns of the tile are the depth of the product. Else its rows are, and the product takes 64
// columns from each panel, as many panels as it needs.
template <bool ALONG, int ROWS>
__device__ inline SmemDescriptor smem_descriptor(const void* tile) {
    constexpr SmemDescriptor SWIZZLE_128 = SmemDescriptor{1} << 62, EIGHT_ROWS = 8 * PANEL_ROW_BYTES / 16;
    constexpr SmemDescriptor NEXT_PANEL = ALONG ? 1 : ROWS * PANEL_ROW_BYTES / 16;           // 1: not used
    return SWIZZLE_128 | EIGHT_ROWS << 32 | NEXT_PANEL << 16 | (shared_address(tile) & 0x3ffff) >> 4;
}

// The descriptor of what lies `bytes` further on, a multiple of 16.
__device__ inline SmemDescriptor advanced(SmemDescriptor from, int bytes) {
    return from + static_cast<SmemDescriptor>(bytes / 16);
}
