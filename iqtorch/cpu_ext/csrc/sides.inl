// Scales, minima and variants of the groups of a block -> floats per group and row.

namespace iqtorch { namespace IQTORCH_ISA {

#define IQ_ALIGNED alignas(64)

// 16 stored floats of 4, 2 or 1 bytes; 1 byte is the exponent format, 2^(p - 128), made of two factors that are never subnormal.
IQ_FN F32 load_floats(const uint8_t* p, int bytes) {
  if (bytes == 2) return from_half(load16(p));
  if (bytes == 4) return as_float(load32(p));
  const I32 exponent = load8(p), half = shift_right(exponent, 1);
  const I32 rest = exponent + (half ^ set(-1)) + set(1);
  return as_float(shift_left(half + set(63), 23)) * as_float(shift_left(rest + set(63), 23));
}

IQ_FN F32 header_d(const Matrix& w, int64_t group) {
  const Ints& i = w.format->i;
  return i.header_bytes ? load_floats(w.headers + group * kRows * i.header_bytes, i.d_bytes) : setf(0);
}

// Per group of weights and row, [group][16]: a weight is scale * (operand - bias) - low.
struct Sides {
  IQ_ALIGNED float scale[kMaxGroups * kRows];
  IQ_ALIGNED float low[kMaxGroups * kRows];  // of formats with minima
};

// How many small integers a format keeps, known when compiling: the kernels would spend longer on scales than on weights.
// `Groups_` of a cell have a scale of their own, of `Bits` bits (0: only the block has one, -1: in the words of the codes), and a
// minimum of `MinBits`; `Variants` of a cell have a bit that shifts all values.
template <int Groups_, int Bits, int MinBits = 0, int Variants = 0, bool Affine = (MinBits > 0)> class Side {
 public:
  static constexpr int kGroups = Groups_, kBits = Bits, kVariants = Variants;
  static constexpr bool kAffine = Affine, kInTable = Bits > 0 && Bits <= 5;  // scales that may be any numbers

  static bool fits(const Ints& i) {
    const auto counts = [&](const Field& field, int bits, int per_cell) {
      int width = 0;
      for (const Plane& plane : field.plane) width += plane.bits;
      return width == bits && (!bits || field.count * kCell == per_cell * i.block);
    };
    if (Bits < 0) return i.groups == Groups_ && i.decoder == kWords && i.scale_linear;
    if ((Bits > 0 && i.block != kMaxBlock) || (!kInTable && !i.scale_linear)) return false;
    return i.groups == Groups_ && (i.affine != 0) == Affine && counts(i.scale, Bits, Groups_) && counts(i.min, MinBits, Groups_) &&
           (i.delta ? counts(i.variant, 1, Variants) : !Variants);
  }

  // The scales and minima of a tile, with runtime_scale in them if `Scaled`.
  template <bool Scaled> class Reader {
   public:
    IQ_FN Reader(const Format& f, const uint8_t* of_tile, F32 header) : format(f), tile(of_tile) {
      const Ints& i = f.i;
      const float factor = Scaled ? f.f.runtime_scale : 1.0f;
      d = (i.header_bytes ? header : load_floats(tile + i.d.plane[0].offset, i.d_bytes)) * setf(f.f.unit * factor);
      dmin = Affine ? load_floats(tile + i.dmin.plane[0].offset, i.d_bytes) * setf(factor) : setf(0);
#ifdef IQ_FLOAT_TABLES
      IQ_ALIGNED static const int32_t numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                     16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
      if constexpr (kTables)
        for (int h = 0; h < Bits - 3; ++h) values.v[h] = value(load32((const uint8_t*)(numbers + 16 * h))).v;
      mins.v[0] = to_float(load32((const uint8_t*)numbers)).v;
#endif
#ifdef IQ_SCALE_PAIRS
      if constexpr (kInTable) table = load_table<kEntries>(i.scale_table), flip_table(table, 128);
#endif
    }
    // Of group e of the tile: scale and minimum, and the numbers that d and dmin are multiplied by.
    IQ_FN F32 scale(int e) const { return d * number(e); }
    IQ_FN F32 low(int e) const { return dmin * low_number(e); }
    IQ_FN F32 number(int e) const {
      if constexpr (Bits == 0) return setf(format.f.scale_b);
      if constexpr (Bits < 0) return value(shift_right(WordsDecoder::scale_byte(tile, e), 1));
#ifdef IQ_FLOAT_TABLES
      if constexpr (kTables) return lookup(values, rows_element<kWidth, kCount, true>(tile + format.i.scale.plane[0].offset, e));
#endif
      return value(rows_element<kWidth, kCount>(tile + format.i.scale.plane[0].offset, e));
    }
    IQ_FN F32 low_number(int e) const {
      if constexpr (MinBits == 0) return setf(format.f.min_b);
#ifdef IQ_FLOAT_TABLES
      if constexpr (MinBits == 4) return lookup(mins, rows_element<4, kCount, true>(tile + format.i.min.plane[0].offset, e));
#endif
      return to_float(rows_element<(MinBits ? MinBits : 1), kCount>(tile + format.i.min.plane[0].offset, e));
    }
#ifdef IQ_SCALE_PAIRS
    // The number of group e as 16 bits, twice in each lane; one if only the block has a scale.
    IQ_FN I32 pair(int e) const {
      if constexpr (Bits == 0) return set(0x00010001);
      const Ints& i = format.i;
      const Floats& n = format.f;
      if constexpr (Bits < 0) {
        const I32 x = shift_right(WordsDecoder::scale_byte(tile, e), 1) ^ set(i.scale_flip);
        return twice(x * set((int32_t)n.scale_a) + set((int32_t)n.scale_b));
      }
      const __m128i stored = rows_bytes<kWidth, kCount>(tile + i.scale.plane[0].offset, e);
      if constexpr (kInTable) return twice(scale_of(table, stored));
      __m128i x = _mm_xor_si128(stored, _mm_set1_epi8((char)i.scale_flip));
      x = _mm_add_epi8(x, _mm_and_si128(x, _mm_set1_epi8(n.scale_a == 2 ? -1 : 0)));
      return twice(_mm_add_epi8(x, _mm_set1_epi8((char)(int32_t)n.scale_b)));
    }
#endif
    // What is common to the block, for sums in units of it.
    IQ_FN F32 unit() const { return Bits ? d : d * setf(format.f.scale_b); }
    IQ_FN F32 low_unit() const { return dmin; }

   private:
    static constexpr int kWidth = Bits > 0 ? Bits : 1, kCount = kMaxBlock / kCell * Groups_;
    // What a stored scale stands for.
    IQ_FN F32 value(I32 stored) const {
      const Ints& i = format.i;
      if (kInTable && !i.scale_linear)
        return to_float((as_i32(lookup(load_table<32>(i.scale_table), as_bytes(stored))) & set(255)) + set(-128));
      return fma(to_float(stored ^ set(i.scale_flip)), setf(format.f.scale_a), setf(format.f.scale_b));
    }

    const Format& format;
    const uint8_t* tile;
    F32 d, dmin;
#ifdef IQ_FLOAT_TABLES
    static constexpr bool kTables = Bits == 4 || Bits == 5;
    FloatTable<(Bits == 5 ? 5 : 4)> values;
    FloatTable<4> mins;
#endif
#ifdef IQ_SCALE_PAIRS
    static constexpr int kEntries = Bits == 5 ? 32 : 16;
    Table<kEntries> table;
#endif
  };

  // Of `tiles` neighbouring tiles.
  template <bool Scaled> static void read(const Format& f, const uint8_t* tile, int tiles, F32 d, Sides& out) {
    const int groups = f.i.block / kCell * kGroups;
    float *scale = out.scale, *low = out.low;
    for (int t = 0; t < tiles; ++t, tile += f.i.tile_bytes) {
      const Reader<Scaled> reader(f, tile, d);
      const auto put = [&](int e) IQ_INLINE {
        storef(scale, reader.scale(e));
        if (Affine) storef(low, reader.low(e));
        scale += kRows, low += kRows;
      };
      if (groups == kMaxGroups) {
        IQ_UNROLL(16)
        for (int e = 0; e < kMaxGroups; ++e) put(e);
      } else {
        for (int e = 0; e < groups; ++e) put(e);
      }
    }
  }

  // The variants of a cell. Called with v = 0 .. 7 in order.
  class Variant {
   public:
    IQ_FN Variant(const Format& format, const uint8_t* of_tile, int of_cell, I32 of_value)
        : f(format), tile(of_tile), cell(of_cell), value(of_value), own(fill(0)) {}
    // The bytes of vector v: `value` in the rows whose variant bit is set, else 0.
    IQ_FN U8 of(int v) {
      if constexpr (Bits < 0) {
        if (v == 0) own = as_bytes((WordsDecoder::scale_byte(tile, cell) & set(1)) * value);
      } else if constexpr (Variants > 0) {
        constexpr int vectors = 8 / Variants;
        const int e = cell * Variants + v / vectors;
        if (v % vectors == 0) own = as_bytes(where_bit(tile + f.i.variant.plane[0].offset + kRows * (e / 8), e % 8, value));
      }
      return own;
    }
    IQ_FN U8 add(int v, U8 operand) {
      if constexpr (Bits < 0 || Variants > 0) return iqtorch::IQTORCH_ISA::add(operand, of(v));
      return operand;
    }

   private:
    const Format& f;
    const uint8_t* tile;
    int cell;
    I32 value;
    U8 own;
  };

};

}}  // namespace iqtorch::IQTORCH_ISA
