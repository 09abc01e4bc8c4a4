#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

// A tile is first taken apart into planes of 16 bytes, one of each row, where every bit run of the format moves by the same shift in
// all rows. Four tiles are taken side by side: the list of shifts and masks is read once for them. Vectors of 16 bytes are what
// every 64-bit CPU has, so this file needs no variants.

namespace iqtorch {
namespace {

constexpr int kTogether = 4;
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16)));

struct alignas(64) Plane4 {
  Bytes tile[kTogether];
};

Bytes load(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

void store(uint8_t* p, Bytes v) { std::memcpy(p, &v, sizeof v); }

// Elements (of 1 or 2 bytes) of two vectors in turn, from their lower or upper halves; and those at even or odd places of both.
#if defined(__clang__)
#define IQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif
Bytes low1(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
Bytes high1(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
Bytes low2(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23); }
Bytes high2(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31); }
Bytes even1(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
Bytes odd1(Bytes a, Bytes b) { return IQ_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }

// 16 x 16 bytes: four times, the first half of the vectors and the second are merged.
void transpose(Bytes v[kRows]) {
  for (int step = 0; step < 4; ++step) {
    Bytes w[kRows];
    for (int i = 0; i < kRows / 2; ++i) {
      w[2 * i] = low1(v[i], v[i + kRows / 2]);
      w[2 * i + 1] = high1(v[i], v[i + kRows / 2]);
    }
    std::copy(w, w + kRows, v);
  }
}

template <int Shift> void move_bits(const std::vector<Term>& terms, const Plane4* from, Plane4* to) {
  for (const Term& term : terms) {
    const Words mask = {term.mask, term.mask};
    const Plane4& source = from[term.from];
    Plane4& target = to[term.to];
    for (int t = 0; t < kTogether; ++t) {
      const Words v = (Words)source.tile[t];
      target.tile[t] |= (Bytes)((Shift > 0 ? v << std::max(Shift, 0) : v >> std::max(-Shift, 0)) & mask);
    }
  }
}

template <int... I> void move_all(const std::vector<Term> (&terms)[kShifts], const Plane4* from, Plane4* to, int count, std::integer_sequence<int, I...>) {
  std::memset(to, 0, count * sizeof *to);
  (move_bits<I - kShifts / 2>(terms[I], from, to), ...);
}

// Chunks of 16 bytes that cover a block; the last one overlaps the one before.
template <class F> void for_chunks(int size, const F& f) {
  for (int at = 0; at + kRows < size; at += kRows) f(at);
  f(size - kRows);
}

void planes_to_tile(const std::vector<int32_t>& units, const Plane4* planes, int t, uint8_t* tile) {
  for (const int stride : units) {
    const Bytes a = planes[0].tile[t];
    if (stride == 1) {
      store(tile, a);
    } else if (stride == 2) {
      const Bytes b = planes[1].tile[t];
      store(tile, low1(a, b)), store(tile + 16, high1(a, b));
    } else {
      const Bytes b = planes[1].tile[t], c = planes[2].tile[t], d = planes[3].tile[t];
      const Bytes ab = low1(a, b), cd = low1(c, d), ab8 = high1(a, b), cd8 = high1(c, d);
      store(tile, low2(ab, cd)), store(tile + 16, high2(ab, cd));
      store(tile + 32, low2(ab8, cd8)), store(tile + 48, high2(ab8, cd8));
    }
    planes += stride, tile += stride * kRows;
  }
}

void tile_to_planes(const std::vector<int32_t>& units, const uint8_t* tile, Plane4* planes, int t) {
  for (const int stride : units) {
    const Bytes a = load(tile);
    if (stride == 1) {
      planes[0].tile[t] = a;
    } else if (stride == 2) {
      const Bytes b = load(tile + 16);
      planes[0].tile[t] = even1(a, b), planes[1].tile[t] = odd1(a, b);
    } else {
      const Bytes b = load(tile + 16), c = load(tile + 32), d = load(tile + 48);
      const Bytes even = even1(a, b), odd = odd1(a, b), even8 = even1(c, d), odd8 = odd1(c, d);
      planes[0].tile[t] = even1(even, even8), planes[1].tile[t] = even1(odd, odd8);
      planes[2].tile[t] = odd1(even, even8), planes[3].tile[t] = odd1(odd, odd8);
    }
    planes += stride, tile += stride * kRows;
  }
}

using Shifts = std::make_integer_sequence<int, kShifts>;

}  // namespace

Bits::Bits(int block_bytes, const int32_t* unit, size_t unit_count, const int32_t* terms, size_t term_count) : units(unit, unit + unit_count) {
  int planes = 0, bits = 0;
  for (const int stride : units) planes += stride == 1 || stride == 2 || stride == 4 ? stride : kMaxBlock;
  std::vector<uint8_t> seen(2 * block_bytes);
  for (size_t i = 0; i < term_count; ++i, terms += 4) {
    const int plane = terms[0], byte = terms[1], shift = terms[2], mask = terms[3];
    const int back = shift > 0 ? mask >> shift : mask << -shift;
    if (plane < 0 || plane >= block_bytes || byte < 0 || byte >= block_bytes || shift <= -8 || shift >= 8 || mask <= 0 || mask > 255 || back > 255 ||
        seen[plane] & mask || seen[block_bytes + byte] & back)
      throw std::runtime_error("the layout moves a bit twice, or out of its block");
    seen[plane] |= mask, seen[block_bytes + byte] |= back;
    bits += __builtin_popcount(mask);
    to_tile[kShifts / 2 + shift].push_back({plane, byte, mask * 0x0101010101010101u});
    to_block[kShifts / 2 - shift].push_back({byte, plane, back * 0x0101010101010101u});
  }
  if (planes != block_bytes || bits != 8 * block_bytes || block_bytes < kRows || block_bytes > kMaxBlock)
    throw std::runtime_error("the layout leaves out bits of its blocks");
}

void pack_tiles(const Format& f, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t n_blocks, uint8_t* tiles, int64_t g0, int64_t g1) {
  const int size = f.i.block_bytes;
  Plane4 planes[kMaxBlock], moved[kMaxBlock];
  const uint8_t none[kMaxBlock] = {};
  for (int64_t g = g0; g < g1; ++g)
    for (int64_t b = 0; b < n_blocks; b += kTogether) {
      const int together = (int)std::min<int64_t>(kTogether, n_blocks - b);
      for (int t = 0; t < together; ++t)
        for_chunks(size, [&](int at) {
          Bytes v[kRows];
          for (int r = 0; r < kRows; ++r) v[r] = load(g * kRows + r < rows ? blocks + (g * kRows + r) * row_bytes + (b + t) * size + at : none);
          transpose(v);
          for (int i = 0; i < kRows; ++i) planes[at + i].tile[t] = v[i];
        });
      move_all(f.bits->to_tile, planes, moved, size, Shifts());
      for (int t = 0; t < together; ++t) planes_to_tile(f.bits->units, moved, t, tiles + (g * n_blocks + b + t) * f.i.tile_bytes);
    }
}

void unpack_tiles(const Format& f, const uint8_t* tiles, int64_t row_bytes, int64_t rows, int64_t n_blocks, uint8_t* blocks, int64_t g0, int64_t g1) {
  const int size = f.i.block_bytes;
  Plane4 planes[kMaxBlock], moved[kMaxBlock];
  for (int64_t g = g0; g < g1; ++g)
    for (int64_t b = 0; b < n_blocks; b += kTogether) {
      const int together = (int)std::min<int64_t>(kTogether, n_blocks - b), valid = (int)std::min<int64_t>(kRows, rows - g * kRows);
      for (int t = 0; t < together; ++t) tile_to_planes(f.bits->units, tiles + (g * n_blocks + b + t) * f.i.tile_bytes, planes, t);
      move_all(f.bits->to_block, planes, moved, size, Shifts());
      for (int t = 0; t < together; ++t)
        for_chunks(size, [&](int at) {
          Bytes v[kRows];
          for (int i = 0; i < kRows; ++i) v[i] = moved[at + i].tile[t];
          transpose(v);
          for (int r = 0; r < valid; ++r) store(blocks + (g * kRows + r) * row_bytes + (b + t) * size + at, v[r]);
        });
    }
}

}  // namespace iqtorch
