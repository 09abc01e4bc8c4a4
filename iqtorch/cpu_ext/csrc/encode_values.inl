// Nearest value of a codebook of single values, sixteen numbers at a time, mostly in registers; at a tie the upper one, or for integers
// the even one. Part of encode.inl and feedback.inl.
#include "encode.h"
#include "encode_simd.h"

namespace iqtorch { namespace IQTORCH_ISA { namespace encoder {

IQ_FN I cell_of(const Lookup& t, F twice) { return truncate(min(max(twice, set(t.low)), set(t.high)) - set(t.low)); }

// Codes of values, which are integers, in the low byte.
IQ_FN I code_of(const ValueTable& t, F value) {
  return t.code ? gather(t.code, truncate(value - set(t.low))) : truncate(value - set(t.first));
}

struct Whole {  // integers low to high
  const ValueTable& t;
  F low, high;
  explicit Whole(const ValueTable& t) : t(t), low(set(t.low)), high(set(t.high)) {}
  IQ_INLINE I code(F y) const { return code_of(t, (*this)(y)); }
  IQ_INLINE F operator()(F y) const {
    const F round = set(12582912.0f);  // the sum rounds to an integer
    return (min(max(y, low), high) + round) - round;
  }
};

// At most 2^BITS values: a search tree of thresholds. Those of a level are sorted by the way that leads to them, first turn lowest; so
// are the values, and their codes.
template <int BITS> struct Tree {
  const float* codes;
  F level[BITS], value[2];
  explicit Tree(const ValueTable& t) : codes(t.tree + 32 * (BITS + 1)) {
    level[0] = set(t.tree[0]);
    for (int l = 1; l < BITS; ++l) level[l] = load(t.tree + 32 * l);
    value[0] = load(t.tree + 32 * BITS), value[1] = load(t.tree + 32 * BITS + 16);
  }
  static IQ_INLINE F at(F low, F high, I way) { return BITS <= 3 ? lookup8(low, way) : BITS == 4 ? lookup16(low, way) : lookup32(low, high, way); }
  IQ_INLINE F operator()(F y) const { return at(value[0], value[1], way(y)); }
  IQ_INLINE I code(F y) const { return truncate(at(load(codes), load(codes + 16), way(y))); }
  IQ_INLINE I way(F y) const {
    I way = seti(0);
#pragma GCC unroll 8
    for (int l = 0; l < BITS; ++l) {
      const F threshold = l == 0 ? level[0] : l < 4 ? lookup8(level[l], way) : lookup16(level[l], way);
      way = select(less(y, threshold), way, way + seti(1 << l));
    }
    return way;
  }
};

struct Cells {
  const ValueTable& t;
  explicit Cells(const ValueTable& t) : t(t) {}
  IQ_INLINE F operator()(F y) const { return gather(t.cells.value, cell_of(t.cells, y + y)); }
  IQ_INLINE I code(F y) const { return code_of(t, (*this)(y)); }
};

}}}  // namespace iqtorch::IQTORCH_ISA::encoder
