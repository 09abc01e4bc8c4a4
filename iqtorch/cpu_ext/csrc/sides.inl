// Scales, minima and variants of the groups of a block -> floats per group and row.

namespace iqtorch { namespace IQTORCH_ISA {

#define IQ_ALIGNED alignas(64)

IQ_FN I32 element(const Field& field, const uint8_t* tile, int e) {
  I32 v = set(0);
  for (int i = 0; i < kMaxPlanes && field.plane[i].bits; ++i) {
    const Plane& plane = field.plane[i];
    const uint8_t* p = tile + plane.offset;
    I32 part;
    if (plane.bits == 16) {
      part = load16(p + 32 * e);
    } else {
      part = load8(p + kRows * (e * plane.bits >> 3));
      if (plane.bits < 8) part = shift_right(part, e * plane.bits & 7) & set((1 << plane.bits) - 1);
    }
    v = plane.low ? v | shift_left(part, plane.low) : part;
  }
  return v;
}

// Bits of a stored float -> float; 1 byte is the exponent format, 2^(p - 128), made of two factors that are never subnormal.
IQ_FN F32 bits_to_float(I32 p, int bytes) {
  if (bytes == 2) return from_half(p);
  if (bytes == 4) return as_float(p);
  I32 half = shift_right(p, 1);
  I32 rest = p + (half ^ set(-1)) + set(1);
  return as_float(shift_left(half + set(63), 23)) * as_float(shift_left(rest + set(63), 23));
}

IQ_FN F32 header_d(const Matrix& w, int64_t group) {
  const Ints& i = w.format->i;
  if (!i.header_bytes) return setf(0);
  const uint8_t* p = w.headers + group * kRows * i.header_bytes;
  return bits_to_float(i.d_bytes == 2 ? load16(p) : load32(p), i.d_bytes);
}

// Per group of weights and row, [group][16]: a weight is scale * (operand - bias) - low.
struct Sides {
  IQ_ALIGNED float scale[kMaxGroups * kRows];
  IQ_ALIGNED float low[kMaxGroups * kRows];  // of formats with minima
};

// Element e of a field of `Bits` bits; like `element`, with the planes known when compiling. `Loose` leaves bits above them.
template <int Bits, bool Loose = false, int First = 0> IQ_FN I32 known_element(const Field& field, const uint8_t* tile, int e) {
  constexpr int width = Bits & 8 ? 8 : Bits & 4 ? 4 : Bits & 2 ? 2 : 1;
  I32 v = load8(tile + field.plane[First].offset + kRows * (e * width / 8));
  if constexpr (width < 8) v = shift_right(v, e * width % 8);
  if constexpr (width < 8 && !(Loose && Bits == width)) v = v & set((1 << width) - 1);
  if constexpr (Bits > width) v = v | shift_left(known_element<Bits - width, Loose, First + 1>(field, tile, e), width);
  return v;
}

// How many small integers a format keeps, known when compiling: the kernels would spend longer on scales than on weights.
// `Groups_` of a cell have a scale of their own, of `Bits` bits (0: only the block has one, -1: in the words of the codes), and a
// minimum of `MinBits`; `Variants` of a cell have a bit that shifts all values.
template <int Groups_, int Bits, int MinBits = 0, int Variants = 0, bool Affine = (MinBits > 0)> class Side {
 public:
  static constexpr int kGroups = Groups_;
  static constexpr bool kAffine = Affine;

  static bool fits(const Ints& i) {
    const auto counts = [&](const Field& field, int bits, int per_cell) {
      int width = 0;
      for (const Plane& plane : field.plane) width += plane.bits;
      return width == bits && (!bits || field.count * kCell == per_cell * i.block);
    };
    if (Bits < 0) return i.groups == Groups_ && i.decoder == kWords;
    return i.groups == Groups_ && (i.affine != 0) == Affine && counts(i.scale, Bits, Groups_) && counts(i.min, MinBits, Groups_) &&
           (i.delta ? counts(i.variant, 1, Variants) : !Variants);
  }

  // Of `tiles` neighbouring tiles, with runtime_scale in it if `Scaled`.
  template <bool Scaled> static void read(const Format& f, const uint8_t* tile, int tiles, F32 d, Sides& out) {
    const int count = f.i.block / kCell * kGroups * kRows;
    for (int t = 0; t < tiles; ++t, tile += f.i.tile_bytes) read_tile<Scaled>(f, tile, d, out.scale + t * count, out.low + t * count);
  }

  // The variants of a cell. Called with v = 0 .. 7 in order.
  class Variant {
   public:
    IQ_FN Variant(const Format& format, const uint8_t* of_tile, int of_cell, int of_value)
        : f(format), tile(of_tile), cell(of_cell), value((of_value & 255) * 0x01010101), own(fill(0)) {}
    // The bytes of vector v: `value` in the rows whose variant bit is set, else 0.
    IQ_FN U8 of(int v) {
      if constexpr (Bits < 0) {
        if (v == 0) own = as_bytes((WordsDecoder::scale_byte(tile, cell) & set(1)) * set(value));
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
    int32_t value;
    U8 own;
  };

 private:
  template <bool Scaled> static IQ_FN void read_tile(const Format& f, const uint8_t* tile, F32 d, float* scales, float* lows) {
    const Ints& i = f.i;
    const int cells = i.block / kCell;
    if (!i.header_bytes) d = bits_to_float(element(i.d, tile, 0), i.d_bytes);
    d = d * setf(f.f.unit);
    F32 dmin = Affine ? bits_to_float(element(i.dmin, tile, 0), i.d_bytes) : setf(0);
    if (Scaled) d = d * setf(f.f.runtime_scale), dmin = dmin * setf(f.f.runtime_scale);
    F32 scale = d * setf(f.f.scale_b), low = dmin * setf(f.f.min_b);
    const Table<32> table = load_table<32>(i.scale_table);
    const auto scale_of = [&](I32 stored) IQ_INLINE {
      if (!i.scale_linear) return to_float((as_i32(lookup(table, as_bytes(stored))) & set(255)) + set(-128));
      return fma(to_float(stored ^ set(i.scale_flip)), setf(f.f.scale_a), setf(f.f.scale_b));
    };
#ifdef IQ_FLOAT_TABLES
    constexpr bool tables = Bits == 4 || Bits == 5;
    FloatTable<Bits == 5 ? 5 : 4> scales_by_code, mins_by_code;
    IQ_ALIGNED static const int32_t numbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    if constexpr (tables) {
      scales_by_code.v[0] = scale_of(load32((const uint8_t*)numbers)).v;
      if constexpr (Bits == 5) scales_by_code.v[1] = scale_of(load32((const uint8_t*)(numbers + 16))).v;
      mins_by_code.v[0] = to_float(load32((const uint8_t*)numbers)).v;
    }
#endif
    const auto scale_at = [&](int e) IQ_INLINE {
      constexpr int own = Bits > 0 ? Bits : 1;
#ifdef IQ_FLOAT_TABLES
      if constexpr (tables) return d * lookup(scales_by_code, known_element<own, true>(i.scale, tile, e));
#endif
      return d * scale_of(known_element<own>(i.scale, tile, e));
    };
    const auto low_at = [&](int e) IQ_INLINE {
      constexpr int own = MinBits > 0 ? MinBits : 1;
#ifdef IQ_FLOAT_TABLES
      if constexpr (tables && MinBits == 4) return dmin * lookup(mins_by_code, known_element<own, true>(i.min, tile, e));
#endif
      return dmin * to_float(known_element<own>(i.min, tile, e));
    };
    const auto read_cell = [&](int c) IQ_INLINE {
      IQ_UNROLL(4)
      for (int g = 0; g < Groups_; ++g) {
        const int e = c * Groups_ + g, at = kRows * e;
        if constexpr (Bits < 0) scale = d * scale_of(shift_right(WordsDecoder::scale_byte(tile, c), 1));
        if constexpr (Bits > 0) scale = scale_at(e);
        if constexpr (MinBits > 0) low = low_at(e);
        storef(scales + at, scale);
        if (Affine) storef(lows + at, low);
      }
    };
    if (cells == 8) {
      IQ_UNROLL(8)
      for (int c = 0; c < 8; ++c) read_cell(c);
    } else {
      for (int c = 0; c < cells; ++c) read_cell(c);
    }
  }
};

}}  // namespace iqtorch::IQTORCH_ISA
