// Decoders: one cell (16 rows x 32 weights) of a tile -> eight vectors of operands, value + bias as unsigned bytes.
// `decode(tile, cell, variant, sink)` calls sink(q, operands of weights 4 q .. 4 q + 3) for q = 0 .. 7, in order.
// The variant of the weights (`Side::Variant`) is added to their operands; it was made from the decoder's `variant`, bytes of what
// it is worth. A decoder of kMost > 127 made with `flip` xors operands with it. kSmall: kLines lines of memory per cell; kUnrolled: see `each_cell`.
// kMost promises that no operand is larger: sums of several fit 16 bits (cells.inl); a format may be registered only if it keeps it.

namespace iqtorch { namespace IQTORCH_ISA {

// Where planes of one bit have vector q: vectors 2 apart lie 4 bits apart, as two planes of two bits have them.
constexpr int bit_of(int q) { return (q & 1) | (q & 2) << 1 | (q & 4) >> 1; }

// The codes of a cell in the lanes arrangement (layout.py), each vector of memory loaded once.
template <int Bits> struct Lanes {
  U8 plane[Bits];
  explicit IQ_FN Lanes(const uint8_t* p) {
    IQ_UNROLL(8)
    for (int i = 0; i < Bits; ++i) plane[i] = kept(load(p + kVector * i));
  }
  // The codes of vector q, or-ed to v; planes of decreasing width, the widest plane is lowest.
  IQ_FN U8 of(int q, U8 v) const { return from<Bits, 0>(plane, q, v); }
  // What a table has for the codes of vector q, or-ed to v.
  template <int N> IQ_FN U8 entries(const Table<N>& table, int q, U8 v) const {
#ifdef IQ_SPLIT_TABLES  // an index has four bits, what is above them does not matter
    if constexpr (Bits > 4) {
      constexpr int rest = Bits - 4;
      return lookup_split(table, from<4, 0>(plane, q, v), plane[4 + q * rest / 8], Bits == 5 ? bit_of(q) : q * rest % 8);
    }
    if constexpr (Bits < 4) {  // vectors q and q + 2 together
      U8 two = shifted_and(plane[q / 4], q % 2 * 2, 0x33);
      if constexpr (Bits == 3) two = or_masked(two, shifted(plane[2], bit_of(q & ~2) - 2), 0x44);
      return lookup(table, q % 4 < 2 ? two | v : shifted(two, 4) | v);
    }
#endif
    return lookup(table, of(q, v));
  }

 private:
  template <int Rest, int Low> static IQ_FN U8 from(const U8* p, int q, U8 v) {
    constexpr int width = Rest & 8 ? 8 : Rest & 4 ? 4 : Rest & 2 ? 2 : 1;
    if constexpr (width == 8) return p[q];
    v = or_masked(v, shifted(p[q * width / 8], (width == 1 ? bit_of(q) : q * width % 8) - Low), ((1 << width) - 1) << Low);
    if constexpr (Rest > width) v = from<Rest - width, Low + width>(p + width, q, v);
    return v;
  }
};

// Element e of a field of `Count` numbers of `Bits` bits in the rows arrangement (layout.py). `Loose` leaves bits above them.
template <int Bits, int Count, bool Loose = false> IQ_FN I32 rows_element(const uint8_t* p, int e) {
  constexpr int width = Bits & 16 ? 16 : Bits & 8 ? 8 : Bits & 4 ? 4 : Bits & 2 ? 2 : 1;
#ifdef IQ_ROWS_WORDS
  if constexpr (Bits > 8 && Bits < 16) return widened(rows_words<Bits, Count>(p, e));
#endif
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

#ifndef IQ_SCALE_PAIRS  // no kernel takes operands xor-ed
template <int N> IQ_FN void flip_table(Table<N>&, int) {}
#endif
#ifndef IQ_FOUR_SUMS
// Byte j of a lane: the sum of the bytes of value[j], at most 255.
IQ_FN I32 four_sums(const I32* value) {
  I32 four = byte_sums(set(0), value[3]);
  IQ_UNROLL(3)
  for (int j = 2; j >= 0; --j) four = byte_sums(shift_left(four, 8), value[j]);
  return four;
}
#endif

// The low byte of a number, in every byte.
IQ_FN I32 bytes_of(int value) { return kept(set((int32_t)((value & 255u) * 0x01010101u))); }

template <int Bits> struct PlainDecoder {
  static constexpr bool kSmall = true, kUnrolled = Bits == 2;
  static constexpr int kLines = Bits + 1, kMost = (1 << Bits) - 1;
  int mask;
  I32 variant = set(0);
  explicit IQ_FN PlainDecoder(const Format& f, int flip = 0) : mask(f.i.flip ^ flip) {}
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
  static constexpr bool kSmall = true, kBoth = Bits < 4, kUnrolled = Bits < 4;
  static constexpr int kLines = Bits + 1, kMost = Bits == 2 ? 63 : Bits == 3 ? 127 : 255;
  static constexpr int kEntries = Bits <= 4 ? 16 : 1 << Bits;
  Table<kEntries> table;
  I32 variant;
  explicit IQ_FN LookupDecoder(const Format& f, int flip = 0)
      : table(load_table<kEntries>(f.table)), variant(bytes_of(kBoth ? 1 << Bits : f.i.delta)) {
    flip_table(table, flip);
  }
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    const Lanes<Bits> codes(tile + cell * kVector * Bits);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      if constexpr (kBoth) {
        sink(q, codes.entries(table, q, own.of(q)));
      } else {
        sink(q, own.add(q, codes.entries(table, q, fill(0))));
      }
    }
  }
};

// 40 bits per 16-bit lane hold eight five-bit codes of pairs; the look-up ignores the bits above the code.
struct PairsDecoder {
  static constexpr bool kSmall = true, kUnrolled = true;
  static constexpr int kLines = 3, kMost = 127;
  PairTable table;
  I32 variant = set(0);
  explicit IQ_FN PairsDecoder(const Format& f, int = 0) : table(load_pairs(f.table)) {}
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
  static constexpr bool kSmall = false, kUnrolled = false;
  static constexpr int kMost = 255;
  Table<16> table;
  I32 variant;
  explicit IQ_FN WordsDecoder(const Format& f, int flip = 0) : table(load_table<16>(f.table)), variant(bytes_of(f.i.delta)) {
    flip_table(table, flip);
  }
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

// Signs that are stored apart, a bit for each weight, applied to operands whose bias is half of `total`.
template <int Mode> struct Signs {
  int offset, total;
  explicit IQ_FN Signs(const Format& f) : offset(f.i.sign_bits.plane[0].offset), total(2 * f.i.bias) {}
  IQ_FN U8 apply(const uint8_t* tile, int cell, int q, U8 v) const {
    if constexpr (Mode == kSignBits) return mirror(v, load(tile + offset + kVector * cell), bit_of(q), total);
    return v;
  }
};

#ifndef IQ_OWN_GRIDS
// Seven signs of group g of a block and an eighth that makes their number even, in the low byte of each row's lane.
IQ_FN I32 parity_signs(const uint8_t* p, int g) {
  const I32 s = rows_element<7, 32>(p, g);
  I32 x = s ^ shift_right(s, 4);
  x = x ^ shift_right(x, 2);
  x = (x ^ shift_right(x, 1)) & set(1);
  return s | shift_left(x, 7);
}

// A code selects `Vec` neighbouring operands from a table in memory.
template <int Bits, int Vec, int Mode> struct GridDecoder {
  static constexpr bool kSmall = false, kUnrolled = false;
  static constexpr int kMost = 127;
  const uint8_t* table;
  Signs<Mode> signs;
  I32 variant;
  explicit IQ_FN GridDecoder(const Format& f, int = 0) : table(f.table), signs(f), variant(bytes_of(f.i.delta)) {}
  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    I32 code = set(0), group = set(0);
    IQ_UNROLL(8)
    for (int q = 0; q < 8; ++q) {
      if (Vec == 4 || q % 2 == 0) code = rows_element<Bits, kMaxBlock / Vec>(tile, cell * (kCell / Vec) + (Vec == 4 ? q : q / 2));
      if (Mode == kSignParity && q % 2 == 0) group = parity_signs(tile + signs.offset, cell * 4 + q / 2);
      U8 v = as_bytes(gather<Vec>(table + (Vec == 8 ? q % 2 * 4 : 0), code));
      if constexpr (Mode == kSignParity) {
        v = mirror_rows(v, group, q % 2, signs.total);
      } else {
        v = signs.apply(tile, cell, q, v);
      }
      sink(q, own.add(q, v));
    }
  }
};
#endif

// Values are generated: each step multiplies by a constant, a value is the sum of the low six bits of the four bytes, minus 126.
template <int Bits, int Vec, int Mode> struct TrellisDecoder {
  static constexpr bool kSmall = false, kUnrolled = false;
  static constexpr int kMost = 255;
  Signs<Mode> signs;
  I32 multiplier, first;
  int variant_offset, flip;
  I32 variant_step, variant = set(0);
  explicit IQ_FN TrellisDecoder(const Format& f, int flipped = 0)
      : signs(f), multiplier(set(f.i.multiplier)), first(set(f.i.generator_offset)), variant_offset(f.i.variant.plane[0].offset),
        flip(flipped), variant_step(set(f.i.variant_in_code)) {}
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
      U8 v = as_bytes(four_sums(value));
      if constexpr (Mode != kNoSign) v = add(abs_difference(v, 126), 128);
      v = signs.apply(tile, cell, q, v);
      sink(q, flip ? iqtorch::IQTORCH_ISA::flip(v, 128) : v);
    }
  }
};

}}  // namespace iqtorch::IQTORCH_ISA
