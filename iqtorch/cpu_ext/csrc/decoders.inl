// Decoders: one cell (16 rows x 32 weights) of a tile -> eight vectors of operands, value + bias as unsigned bytes.
// `decode(tile, cell, variant, sink)` calls sink(q, operands of weights 4 q .. 4 q + 3) for q = 0 .. 7, in order.
// The variant of the weights (`Side::Variant`) is added to their operands; it was made from the decoder's `variant`, bytes of what
// it is worth. kSmall: few instructions, and kLines lines of memory per cell. kNarrow promises operands below 128 (see dot1 in simd_avx2.h); a format may be registered only if it keeps it.

namespace iqtorch { namespace IQTORCH_ISA {

// The codes of a cell in the lanes arrangement (layout.py), each vector of memory loaded once.
template <int Bits> struct Lanes {
  U8 plane[Bits];
  explicit IQ_FN Lanes(const uint8_t* p) {
    IQ_UNROLL(8)
    for (int i = 0; i < Bits; ++i) plane[i] = kept(load(p + kVector * i));
  }
  // The codes of vector q, or-ed to v; planes of decreasing width, the widest plane is lowest.
  IQ_FN U8 of(int q, U8 v) const { return from<Bits, 0>(plane, q, v); }

 private:
  template <int Rest, int Low> static IQ_FN U8 from(const U8* p, int q, U8 v) {
    constexpr int width = Rest & 8 ? 8 : Rest & 4 ? 4 : Rest & 2 ? 2 : 1;
    if constexpr (width == 8) return p[q];
    v = or_masked(v, shifted(p[q * width / 8], q * width % 8 - Low), ((1 << width) - 1) << Low);
    if constexpr (Rest > width) v = from<Rest - width, Low + width>(p + width, q, v);
    return v;
  }
};

// Element e of a field of `Count` numbers of `Bits` bits in the rows arrangement (layout.py). `Loose` leaves bits above them.
template <int Bits, int Count, bool Loose = false> IQ_FN I32 rows_element(const uint8_t* p, int e) {
  constexpr int width = Bits & 16 ? 16 : Bits & 8 ? 8 : Bits & 4 ? 4 : Bits & 2 ? 2 : 1;
  I32 v;
  if constexpr (width == 16) {
    v = load16(p + 32 * e);
  } else {
    v = load8(p + kRows * (e * width / 8));
    if constexpr (width < 8) v = shift_right(v, e * width % 8);
    if constexpr (width < 8 && !(Loose && Bits == width)) v = v & set((1 << width) - 1);
  }
  if constexpr (Bits > width) v = v | shift_left(rows_element<Bits - width, Count, Loose>(p + kRows * Count * width / 8, e), width);
  return v;
}

// The low byte of a number, in every byte.
IQ_FN I32 bytes_of(int value) { return kept(set((int32_t)((value & 255u) * 0x01010101u))); }

template <int Bits> struct PlainDecoder {
  static constexpr bool kNarrow = Bits < 8, kSmall = true;
  static constexpr int kLines = Bits + 1;
  int mask;
  I32 variant = set(0);
  explicit IQ_FN PlainDecoder(const Format& f) : mask(f.i.flip) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant&, Sink sink) const {
    const Lanes<Bits> codes(tile + cell * kVector * Bits);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      U8 v = codes.of(q, fill(0));
      if constexpr (Bits == 8) v = iqtorch::IQTORCH_ISA::flip(v, mask);
      sink(q, v);
    }
  }
};

// Of codes of up to three bits the variant is one more bit: the table has both codebooks.
template <int Bits> struct LookupDecoder {
  static constexpr bool kNarrow = Bits < 4, kSmall = true, kBoth = Bits < 4;
  static constexpr int kLines = Bits + 1;
  static constexpr int kEntries = Bits <= 4 ? 16 : 1 << Bits;
  Table<kEntries> table;
  I32 variant;
  explicit IQ_FN LookupDecoder(const Format& f) : table(load_table<kEntries>(f.table)), variant(bytes_of(kBoth ? 1 << Bits : f.i.delta)) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    const Lanes<Bits> codes(tile + cell * kVector * Bits);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      if constexpr (kBoth) {
        sink(q, lookup(table, codes.of(q, own.of(q))));
      } else {
        sink(q, own.add(q, lookup(table, codes.of(q, fill(0)))));
      }
    }
  }
};

// 40 bits per 16-bit lane hold eight five-bit codes of pairs; the look-up ignores the bits above the code.
struct PairsDecoder {
  static constexpr bool kNarrow = true, kSmall = true;
  static constexpr int kLines = 3;
  PairTable table;
  I32 variant = set(0);
  explicit IQ_FN PairsDecoder(const Format& f) : table(load_pairs(f.table)) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant&, Sink sink) const {
    const uint8_t* p = tile + cell * 160;
    const U8 w0 = kept(load(p)), w1 = kept(load(p + kVector)), b = kept(widen16(p + 2 * kVector));
    sink(0, lookup_pairs(table, w0));
    sink(1, lookup_pairs(table, shift16(w0, 5)));
    sink(2, lookup_pairs(table, shift16(w0, 10)));
    sink(3, lookup_pairs(table, w1));
    sink(4, lookup_pairs(table, shift16(w1, 5)));
    sink(5, lookup_pairs(table, shift16(w1, 10)));
    sink(6, lookup_pairs(table, b));
    U8 last = and16_or(shift16(w1, 14), 2, shift16(w0, 15));
    sink(7, lookup_pairs(table, and16_or(shift16(b, 3), 0x1c, last)));
  }
};

// iq4_kss: 15 bits of a 16-bit word are the Gray code of four 4-bit codes of even parity, bit 0 belongs to the scale.
struct WordsDecoder {
  static constexpr bool kNarrow = false, kSmall = false;
  Table<16> table;
  I32 variant;
  explicit IQ_FN WordsDecoder(const Format& f) : table(load_table<16>(f.table)), variant(bytes_of(f.i.delta)) {}
  static IQ_FN U8 codes(const uint8_t* p) {
    I32 w = as_i32(load(p)) & set((int32_t)0xfffefffe);
    return as_bytes(w ^ as_i32(shift16(as_bytes(w), 1)));
  }
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    const uint8_t* p = tile + cell * kVector * 4;
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) sink(q, own.add(q, lookup(table, bits(codes(p + kVector * (q % 4)), q / 4 * 4, 15))));
  }
  // The eight bits 0 of a cell's words: the variant, then seven bits of scale.
  static IQ_FN I32 scale_byte(const uint8_t* tile, int cell) {
    const uint8_t* p = tile + cell * kVector * 4;
    I32 all = set(0);
    IQ_UNROLL(4)
    for (int v = 0; v < 4; ++v) all = all | shift_left(load32(p + kVector * v) & set(0x00010001), 2 * v);
    return (all | shift_right(all, 15)) & set(255);
  }
};

// Signs that are stored apart, applied to operands whose bias is half of `total`.
template <int Mode> struct Signs {
  int offset, total;
  explicit IQ_FN Signs(const Format& f) : offset(f.i.sign_bits.plane[0].offset), total(2 * f.i.bias) {}
  // Signs of the eight weights of group g of a block, in the low byte of each row's lane.
  IQ_FN I32 of_group(const uint8_t* tile, int g) const {
    I32 s = rows_element<7, 32>(tile + offset, g);
    I32 x = s ^ shift_right(s, 4);
    x = x ^ shift_right(x, 2);
    x = (x ^ shift_right(x, 1)) & set(1);
    return s | shift_left(x, 7);
  }
  IQ_FN U8 apply(const uint8_t* tile, int cell, int q, I32 group, U8 v) const {
    if constexpr (Mode == kSignBits) return mirror(v, load(tile + offset + kVector * cell), q, total);
    if constexpr (Mode == kSignParity) return mirror_rows(v, group, q % 2, total);
    return v;
  }
};

#ifndef IQ_OWN_GRIDS
// A code selects `Vec` neighbouring operands from a table in memory.
template <int Bits, int Vec, int Mode> struct GridDecoder {
  static constexpr bool kNarrow = true, kSmall = false;
  const uint8_t* table;
  Signs<Mode> signs;
  I32 variant;
  explicit IQ_FN GridDecoder(const Format& f) : table(f.table), signs(f), variant(bytes_of(f.i.delta)) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    I32 code = set(0), group = set(0);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      if (Vec == 4 || q % 2 == 0) code = rows_element<Bits, kMaxBlock / Vec>(tile, cell * (kCell / Vec) + (Vec == 4 ? q : q / 2));
      if (Mode == kSignParity && q % 2 == 0) group = signs.of_group(tile, cell * 4 + q / 2);
      U8 v = as_bytes(gather<Vec>(table + (Vec == 8 ? q % 2 * 4 : 0), code));
      sink(q, own.add(q, signs.apply(tile, cell, q, group, v)));
    }
  }
};
#endif

// Values are generated: each step multiplies by a constant, a value is the sum of the low six bits of the four bytes, minus 126.
template <int Bits, int Vec, int Mode> struct TrellisDecoder {
  static constexpr bool kNarrow = false, kSmall = false;
  Signs<Mode> signs;
  I32 multiplier, first;
  int variant_offset;
  I32 variant_step, variant = set(0);
  explicit IQ_FN TrellisDecoder(const Format& f)
      : signs(f), multiplier(set(f.i.multiplier)), first(set(f.i.generator_offset)), variant_offset(f.i.variant.plane[0].offset),
        variant_step(set(f.i.variant_in_code)) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant&, Sink sink) const {
    I32 x = first, start = first;
    // the variant bit chooses between two first values
    if constexpr (Vec == 4) start = first + where_bit(tile + variant_offset, cell, variant_step);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      if (Vec == 4 || q % 2 == 0) x = start + rows_element<Bits, kMaxBlock / Vec>(tile, cell * (kCell / Vec) + (Vec == 4 ? q : q / 2));
      I32 value[4];
      IQ_UNROLL(4)
      for (int j = 0; j < 4; ++j) {
        x = x * multiplier;
        value[j] = x & set(0x3f3f3f3f);
      }
      // a sum is at most 252: it fits the byte that shifting left has freed
      I32 four = byte_sums(set(0), value[3]);
      IQ_UNROLL(3)
      for (int j = 2; j >= 0; --j) four = byte_sums(shift_left(four, 8), value[j]);
      U8 v = as_bytes(four);
      if constexpr (Mode != kNoSign) v = add(abs_difference(v, 126), 128);
      sink(q, signs.apply(tile, cell, q, x, v));
    }
  }
};

}}  // namespace iqtorch::IQTORCH_ISA
