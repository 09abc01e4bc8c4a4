// Canonical blocks <-> tiles: bits change places, none is added or lost. One routine for all formats and instruction sets.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "format.h"

namespace iqtorch {

constexpr int kShifts = 15;  // -7 .. 7

// A byte of a block goes into a plane of a tile (one byte of each of its rows), or back: shifted, under a mask.
struct Term {
  int32_t to, from;
  uint64_t mask;  // of one byte, eight times
};

// `Layout.units` and `Layout.terms` of iqtorch/cpu_ext/layout.py, both ways and in order of their shifts.
struct Bits {
  std::vector<int32_t> units;
  std::vector<Term> to_tile[kShifts], to_block[kShifts];

  // Throws std::runtime_error unless each bit of a block goes to one place of a tile.
  Bits(int block_bytes, const int32_t* units, size_t unit_count, const int32_t* terms, size_t term_count);
};

// Row groups g0 .. g1 of a matrix of `rows` x `n_blocks` blocks; `blocks` points at the first block of row 0, `row_bytes` lead to the
// next row. Rows past the end become zeros.
void pack_tiles(const Format&, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t n_blocks, uint8_t* tiles, int64_t g0, int64_t g1);
void unpack_tiles(const Format&, const uint8_t* tiles, int64_t row_bytes, int64_t rows, int64_t n_blocks, uint8_t* blocks, int64_t g0, int64_t g1);

}  // namespace iqtorch
