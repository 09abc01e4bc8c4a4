// One cell of 16 rows times one row of activations: what the vectors of a decoder sum to, in units of d.

#include <type_traits>

namespace iqtorch { namespace IQTORCH_ISA {

// No variant: its share is added to sums instead of operands.
struct NoVariant {
  IQ_FN NoVariant(const Format&, const uint8_t*, int, I32) {}
  IQ_FN U8 of(int) const { return fill(0); }
  IQ_FN U8 add(int, U8 operand) const { return operand; }
};

#ifdef IQ_SCALE_PAIRS

// Pairs of products are multiplied by 16-bit scales and summed as integers. Operands up to kMost < 128 are unsigned, and as many
// vectors as fit 16 bits (2 products with 127 each) are summed before that; wider ones are signed bytes. What their biases and
// variants contribute is their number times the sum of the activations, times the scale.
template <class Decoder, class Side> class CellSum {
  static constexpr bool kSigned = Decoder::kMost > 127, kScaled = Side::kBits != 0;
  static constexpr bool kShared = kScaled && Side::kVariants > 0 && Side::kVariants <= Side::kGroups;  // a variant serves a group
  static constexpr int kPerGroup = 8 / Side::kGroups, kRoom = Decoder::kMost > 63 ? 1 : Decoder::kMost > 31 ? 2 : Decoder::kMost > 15 ? 4 : 8;
  static constexpr int kDepth = kRoom < kPerGroup ? kRoom : kPerGroup;

 public:
  using Variant = std::conditional_t<kShared, NoVariant, typename Side::Variant>;
  static constexpr int kFlip = kSigned ? 128 : 0;
  static constexpr bool kPlainSums = kScaled;  // wants the sums of activations as they are

  IQ_FN CellSum(const Format& format, const uint8_t* of_tile, int of_cell, const int32_t* of_sums)
      : f(format), tile(of_tile), cell(of_cell), sums(of_sums) {}
  template <class Reader> IQ_FN void add(const Reader& side, int v, U8 operand, const int8_t* x) {
    const int e = cell * Side::kGroups + v / kPerGroup;
    if (v % kPerGroup == 0) start(side, e);
    Pairs next;
    if constexpr (kSigned) {
      next = signed_pairs(operand, x);
    } else {
      next = pair_products(operand, x);
    }
    pairs = v % kDepth == 0 ? next : pairs + next;
    if ((v + 1) % kDepth == 0) sum = scaled_pairs(sum, pairs, scale);
  }
  IQ_FN F32 total() const { return to_float(sum); }

 private:
  template <class Reader> IQ_FN void start(const Reader& side, int e) {
    scale = side.pair(e);
    if constexpr (Side::kAffine) return;
    const int bias = (kSigned ? 128 : 0) - f.i.bias;
    if constexpr (!kScaled) {
      sum = set(sums[e]);
    } else if constexpr (kShared) {
      constexpr int part = Side::kGroups / Side::kVariants;
      const I32 delta = where_bit(tile + f.i.variant.plane[0].offset + kRows * (e / part / 8), e / part % 8, set(f.i.delta & 0xffff));
      sum = add_scaled(sum, scale, bias ? (delta + set(bias)) & set(0xffff) : delta, sums + e);
    } else if (bias) {
      sum = add_scaled(sum, scale, set(bias & 0xffff), sums + e);
    }
  }

  const Format& f;
  const uint8_t* tile;
  int cell;
  const int32_t* sums;
  I32 sum = set(0), scale;
  Pairs pairs;
};

#else

// Sums of products as 32-bit integers, multiplied by scales in floating point.
template <class Decoder, class Side> class CellSum {
  // only NEON tells them apart: it takes wider operands minus 128
  static constexpr bool kNarrow = Decoder::kMost < 128 || !kSignedDot;
  static constexpr int kPerGroup = 8 / Side::kGroups;

 public:
  using Variant = typename Side::Variant;
  static constexpr int kFlip = 0;
  static constexpr bool kPlainSums = false;

  IQ_FN CellSum(const Format&, const uint8_t*, int of_cell, const int32_t* of_sums) : cell(of_cell), sums(of_sums) {}
  template <class Reader> IQ_FN void add(const Reader& side, int v, U8 operand, const int8_t* x) {
    const int e = cell * Side::kGroups + v / kPerGroup;
    if (v % kPerGroup == 0) even = Side::kAffine ? set(0) : set(sums[e]), odd = set(0);
    if (v % 2) {
      odd = dot_once<kNarrow>(odd, operand, x);
    } else {
      even = dot_once<kNarrow>(even, operand, x);
    }
    if ((v + 1) % kPerGroup) return;
    const F32 own = to_float(even + odd);
    if constexpr (Side::kBits == 0) {
      sum = own;
    } else {
      sum = v < kPerGroup ? own * side.number(e) : fma(own, side.number(e), sum);
    }
  }
  IQ_FN F32 total() const { return sum; }

 private:
  int cell;
  const int32_t* sums;
  I32 even, odd;
  F32 sum;
};

#endif

}}  // namespace iqtorch::IQTORCH_ISA
