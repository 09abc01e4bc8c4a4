// The kernels, written once for a machine of 16 lanes (simd_*.h) and compiled once per instruction set (isa_*.cpp).

#include "decoders.inl"

namespace iqtorch { namespace IQTORCH_ISA {

#define IQ_ALIGNED alignas(64)

template <int N> struct Size {
  static constexpr int value = N;
};

// -- scales ----------------------------------------------------------------------------------------------------

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

// Per group of weights and row, [group][16]: a weight is scale * (operand + offset) - low.
struct Sides {
  IQ_ALIGNED float scale[kMaxGroups * kRows];
  IQ_ALIGNED float offset[kMaxGroups * kRows];  // for products: scale * offset - low, with runtime_scale in both
  IQ_ALIGNED float low[kMaxGroups * kRows];
};

// Element e of a field of `Bits` bits; like `element`, with the planes known when compiling.
template <int Bits, int First = 0> IQ_FN I32 known_element(const Field& field, const uint8_t* tile, int e) {
  constexpr int width = Bits & 8 ? 8 : Bits & 4 ? 4 : Bits & 2 ? 2 : 1;
  I32 v = load8(tile + field.plane[First].offset + kRows * (e * width / 8));
  if constexpr (width < 8) v = shift_right(v, e * width % 8) & set((1 << width) - 1);
  if constexpr (Bits > width) v = v | shift_left(known_element<Bits - width, First + 1>(field, tile, e), width);
  return v;
}

// How many small integers a format keeps, known when compiling: the kernels would spend longer on scales than on weights.
// `Groups` of a cell share scale, minimum and variant. `Scales` of a cell have a scale of their own, of `Bits` bits (0: only the
// block has one, -1: in the words of the codes), and a minimum of `MinBits`; `Variants` of a cell have a bit that shifts all values.
template <int Groups_, int Scales, int Bits, int MinBits = 0, int Variants = 0> struct Side {
  static constexpr int kGroups = Groups_;

  static bool fits(const Ints& i) {
    const auto counts = [&](const Field& field, int bits, int per_cell) {
      int width = 0;
      for (const Plane& plane : field.plane) width += plane.bits;
      return width == bits && (!bits || field.count * kCell == per_cell * i.block);
    };
    if (Bits < 0) return i.groups == Groups_ && i.decoder == kWords;
    return i.groups == Groups_ && counts(i.scale, Bits, Scales) && counts(i.min, MinBits, Scales) &&
           (i.delta ? counts(i.variant, 1, Variants) : !Variants);
  }

  // `Exact`: what the plain-torch decoder multiplies; else ready for products, see `Sides`.
  template <bool Exact> static void read(const Format& f, const uint8_t* tile, F32 d, int dot_bias, Sides& out) {
    const Ints& i = f.i;
    const int cells = i.block / kCell;
    if (!i.header_bytes) d = bits_to_float(element(i.d, tile, 0), i.d_bytes);
    d = d * setf(f.f.unit);
    F32 dmin = i.affine ? bits_to_float(element(i.dmin, tile, 0), i.d_bytes) : setf(0);
    if (!Exact) d = d * setf(f.f.runtime_scale), dmin = dmin * setf(f.f.runtime_scale);
    const F32 base = setf((float)(dot_bias - i.bias)), delta = setf((float)i.delta);
    F32 scale = d * setf(f.f.scale_b), low = dmin * setf(f.f.min_b), offset = base;
    const auto scale_of = [&](I32 stored) IQ_INLINE {
      if (!i.scale_linear) return d * gatherf(f.f.scale_values, stored);
      return d * fma(to_float(stored ^ set(i.scale_flip)), setf(f.f.scale_a), setf(f.f.scale_b));
    };
    const auto read_cell = [&](int c) IQ_INLINE {
      IQ_UNROLL(4)
      for (int g = 0; g < Groups_; ++g) {
        if constexpr (Bits < 0) {
          const I32 byte = WordsDecoder::scale_byte(tile, c);
          scale = scale_of(shift_right(byte, 1));
          offset = fma(to_float(byte & set(1)), delta, base);
        } else {
          if (Bits && g % (Groups_ / Scales) == 0)
            scale = scale_of(known_element<(Bits > 0 ? Bits : 1)>(i.scale, tile, (c * Groups_ + g) / (Groups_ / Scales)));
          if (MinBits && g % (Groups_ / Scales) == 0)
            low = dmin * to_float(known_element<(MinBits ? MinBits : 1)>(i.min, tile, (c * Groups_ + g) / (Groups_ / Scales)));
          if constexpr (Variants > 0) {
            if (g % (Groups_ / Variants) == 0)
              offset = fma(to_float(known_element<1>(i.variant, tile, (c * Groups_ + g) / (Groups_ / Variants))), delta, base);
          }
        }
        const int at = kRows * (c * Groups_ + g);
        storef(out.scale + at, scale);
        if (Exact) {
          storef(out.offset + at, offset);
          storef(out.low + at, low);
        } else {
          storef(out.offset + at, scale * offset - low);
        }
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

// -- one row of activations against packed weights ----------------------------------------------------------------

constexpr int kPrefetch = 2048;

IQ_FN void finish(const Output& out, int64_t rows, int64_t m, int64_t group, F32 acc) {
  const int64_t n0 = group * kRows, at = m * out.stride + n0;
  if (rows - n0 >= kRows) {
    if (out.bias) acc = acc + loadf(out.bias + n0);
    if (out.dtype == kFloat32) return storef((float*)out.data + at, acc);
    if (out.dtype == kBFloat16) return store_bfloat16((uint16_t*)out.data + at, acc);
    return store_half((uint16_t*)out.data + at, acc);
  }
  IQ_ALIGNED float value[kRows];
  const int count = (int)(rows - n0);
  storef(value, acc);
  if (out.bias)
    for (int r = 0; r < count; ++r) value[r] += out.bias[n0 + r];
  if (out.dtype == kFloat32) {
    __builtin_memcpy((float*)out.data + at, value, count * sizeof(float));
    return;
  }
  IQ_ALIGNED uint16_t half[kRows];
  if (out.dtype == kFloat16) {
    store_half(half, loadf(value));
  } else {
    store_bfloat16(half, loadf(value));
  }
  __builtin_memcpy((uint16_t*)out.data + at, half, count * sizeof(uint16_t));
}

template <class Decoder, class Side> static void gemv(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  constexpr bool narrow = Decoder::kNarrow || !kSignedDot;
  constexpr int per_group = 8 / Side::kGroups;
  const Format& f = *w.format;
  const int cells = f.i.block / kCell, cell_bytes = f.i.tile_bytes / cells;
  const Decoder decoder(f);
  Sides side;
  const uint8_t* tile = w.tiles + g0 * w.blocks * f.i.tile_bytes;
  for (int64_t g = g0; g < g1; ++g) {
    F32 acc = setf(0), rest = setf(0);
    const F32 d = header_d(w, g);
    const int8_t* q = x.q;
    const float *scale = x.scale, *sums = x.sums;
    for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
      Side::template read<false>(f, tile, d, narrow ? 0 : 128, side);
      const float *s = side.scale, *o = side.offset;
      for (int c = 0; c < cells; ++c, q += kCell) {
        const uint8_t* ahead = tile + c * cell_bytes + kPrefetch;
        for (int i = 0; i < cell_bytes; i += 64) __builtin_prefetch(ahead + i);
        const F32 dx = setf(*scale++);
        I32 even = set(0), odd = set(0);
        decoder.decode(tile, c, [&](int v, U8 operand) IQ_INLINE {
          if (v % 2) {
            odd = dot<narrow>(odd, operand, q + 4 * v);
          } else {
            even = dot<narrow>(even, operand, q + 4 * v);
          }
          if ((v + 1) % per_group == 0) {
            acc = fma(to_float(even + odd) * loadf(s), dx, acc);
            rest = fma(loadf(o), setf(*sums++), rest);
            s += kRows, o += kRows;
            even = set(0), odd = set(0);
          }
        });
      }
    }
    finish(out, w.rows, 0, g, acc + rest);
  }
}

// -- several rows: operands of a block are decoded once, then used from the first-level cache -------------------------

struct Panel {
  IQ_ALIGNED uint8_t operand[kMaxBlock * kRows];  // [cell][q][16 rows][4]
  Sides side;
};

template <class Decoder> static void expand(const Format& f, const uint8_t* tile, uint8_t* operand) {
  const Decoder decoder(f);
  const int cells = f.i.block / kCell;
  for (int c = 0; c < cells; ++c, operand += 8 * kVector)
    decoder.decode(tile, c, [&](int v, U8 value) IQ_INLINE { store(operand + kVector * v, value); });
}

// `q`, `scale` and `sums` point at the first of M rows in the first cell of the block; `rows` is the number of all rows.
// `Depth` neighbouring vectors may be summed in 16 bits where an instruction set does so.
template <int M, int Groups, bool Narrow, int Depth>
IQ_FN void multiply_block(const Panel& panel, int cells, const int8_t* q, const float* scale, const float* sums, int64_t rows, float* acc) {
  constexpr int per_group = 8 / Groups;
  F32 a[M];
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) a[m] = loadf(acc + kRows * m);
  for (int c = 0; c < cells; ++c, q += rows * kCell, scale += rows, sums += rows * Groups) {
    F32 cell[M];
    IQ_UNROLL(4)
    for (int g = 0; g < Groups; ++g) {
      I32 d[M];
      IQ_UNROLL(8)
      for (int m = 0; m < M; ++m) d[m] = set(0);
      IQ_UNROLL(8)
      for (int v = 0; v < per_group; v += Depth) {
        const int at = g * per_group + v;
        const uint8_t* operand = panel.operand + kVector * (c * 8 + at);
#ifdef IQ_PAIR_SUMS
        if constexpr (Depth > 1) {
          Pairs pairs[M];
          IQ_UNROLL(8)
          for (int m = 0; m < M; ++m) pairs[m] = pair_products(load(operand), q + m * kCell + 4 * at);
          IQ_UNROLL(8)
          for (int i = 1; i < Depth; ++i) {
            const U8 next = load(operand + kVector * i);
            IQ_UNROLL(8)
            for (int m = 0; m < M; ++m) pairs[m] = pairs[m] + pair_products(next, q + m * kCell + 4 * (at + i));
          }
          IQ_UNROLL(8)
          for (int m = 0; m < M; ++m) d[m] = add_pairs(d[m], pairs[m]);
          continue;
        }
#endif
        const U8 single = load(operand);
        IQ_UNROLL(8)
        for (int m = 0; m < M; ++m) d[m] = dot<Narrow>(d[m], single, q + m * kCell + 4 * at);
      }
      const F32 s = loadf(panel.side.scale + kRows * (c * Groups + g)), o = loadf(panel.side.offset + kRows * (c * Groups + g));
      IQ_UNROLL(8)
      for (int m = 0; m < M; ++m) {
        cell[m] = g ? fma(to_float(d[m]), s, cell[m]) : to_float(d[m]) * s;
        a[m] = fma(o, setf(sums[m * Groups + g]), a[m]);
      }
    }
    IQ_UNROLL(8)
    for (int m = 0; m < M; ++m) a[m] = fma(cell[m], setf(scale[m]), a[m]);
  }
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) storef(acc + kRows * m, a[m]);
}

template <int Groups, bool Narrow, int Depth = 1>
static void multiply(const Panel& panel, int cells, const Activations& x, int64_t m0, int64_t m1, int64_t cell, float* acc) {
  int64_t m = m0;
  const auto step = [&](auto size) {
    constexpr int M = decltype(size)::value;
    for (; m + M <= m1; m += M) {
      const int64_t at = cell * x.m + m;
      multiply_block<M, Groups, Narrow, Depth>(panel, cells, x.q + at * kCell, x.scale + at, x.sums + at * Groups, x.m, acc + kRows * (m - m0));
    }
  };
  if constexpr (kBatch >= 8) step(Size<8>{});
  step(Size<4>{});
  step(Size<2>{});
  step(Size<1>{});
}

// Weights of a block as float32, [k][16], from operands and exact sides.
IQ_FN void float_panel(const Format& f, const Panel& panel, float* out) {
  const int groups = f.i.groups, per_group = 8 / groups, vectors = f.i.block / 4;
  const F32 factor = setf(f.f.runtime_scale);
  for (int v = 0; v < vectors; ++v) {
    const int g = v / per_group;
    const F32 s = loadf(panel.side.scale + kRows * g), o = loadf(panel.side.offset + kRows * g), low = loadf(panel.side.low + kRows * g);
    I32 four = as_i32(load(panel.operand + kVector * v));
    IQ_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
      F32 value = s * (to_float(four & set(255)) + o);
      if (f.i.affine) value = value - low;
      storef(out + kRows * (4 * v + j), value * factor);
      four = shift_right(four, 8);
    }
  }
}

template <int M> IQ_FN void multiply_float(const float* panel, int count, const float* x, int64_t k, float* acc) {
  F32 a[M];
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) a[m] = loadf(acc + kRows * m);
  for (int i = 0; i < count; ++i) {
    const F32 w = loadf(panel + kRows * i);
    IQ_UNROLL(8)
    for (int m = 0; m < M; ++m) a[m] = fma(w, setf(x[m * k + i]), a[m]);
  }
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) storef(acc + kRows * m, a[m]);
}

// -- which code runs a format ------------------------------------------------------------------------------------------

struct Family {
  void (*expand)(const Format&, const uint8_t* tile, uint8_t* operand);
  void (*sides)(const Format&, const uint8_t* tile, F32 d, int dot_bias, Sides&);
  void (*exact_sides)(const Format&, const uint8_t* tile, F32 d, int dot_bias, Sides&);
  void (*gemv)(const Matrix&, const Activations&, const Output&, int64_t, int64_t);
  bool narrow;
};

// The first of `Sides` that fits; an empty family if none does.
template <class Decoder, class... SideTypes> static Family family_of(const Ints& i) {
  Family family = {};
  ((!family.gemv && SideTypes::fits(i)
        ? (void)(family = {expand<Decoder>, SideTypes::template read<false>, SideTypes::template read<true>, gemv<Decoder, SideTypes>,
                           Decoder::kNarrow || !kSignedDot})
        : (void)0),
   ...);
  return family;
}

static Family find_family(const Ints& i) {
  using None = Side<1, 1, 0>;  // d alone
  switch (i.decoder * 100 + i.code_width) {
    case kPlain * 100 + 2: return family_of<PlainDecoder<2>, Side<2, 2, 4, 4>>(i);
    case kPlain * 100 + 3: return family_of<PlainDecoder<3>, Side<2, 2, 6>>(i);
    case kPlain * 100 + 4: return family_of<PlainDecoder<4>, None, Side<1, 1, 6, 6>>(i);
    case kPlain * 100 + 5: return family_of<PlainDecoder<5>, None, Side<1, 1, 6, 6>>(i);
    case kPlain * 100 + 6: return family_of<PlainDecoder<6>, None, Side<2, 2, 8>>(i);
    case kPlain * 100 + 8: return family_of<PlainDecoder<8>, None>(i);
    case kLookup * 100 + 2: return family_of<LookupDecoder<2>, Side<1, 1, 5, 0, 1>, Side<2, 2, 4, 0, 2>>(i);
    case kLookup * 100 + 3: return family_of<LookupDecoder<3>, Side<1, 1, 5, 0, 1>, Side<2, 2, 5, 0, 2>>(i);
    case kLookup * 100 + 4:
      return family_of<LookupDecoder<4>, None, Side<1, 1, 6>, Side<1, 1, 7, 0, 1>, Side<2, 2, 6, 0, 2>>(i);
    case kLookup * 100 + 5: return family_of<LookupDecoder<5>, Side<1, 1, 7, 0, 1>, Side<2, 2, 6, 0, 2>>(i);
    case kLookup * 100 + 6: return family_of<LookupDecoder<6>, Side<2, 2, 8, 0, 2>>(i);
    case kPairs * 100 + 5: return family_of<PairsDecoder, Side<1, 1, 6>>(i);
    case kWords * 100 + 16: return family_of<WordsDecoder, Side<1, 1, -1>>(i);
    case kGrid * 100 + 8:
      return i.vec == 4 ? family_of<GridDecoder<8, 4, kSignParity>, Side<1, 1, 4>>(i)
                        : family_of<GridDecoder<8, 8, kSignParity>, Side<1, 1, 4>>(i);
    case kGrid * 100 + 9:
      return i.vec == 4 ? family_of<GridDecoder<9, 4, kSignBits>, Side<1, 1, 4>>(i)
                        : family_of<GridDecoder<9, 8, kSignParity>, Side<2, 2, 4>>(i);
    case kGrid * 100 + 10: return family_of<GridDecoder<10, 8, kSignBits>, Side<2, 2, 4>>(i);
    case kGrid * 100 + 11: return family_of<GridDecoder<11, 8, kNoSign>, Side<1, 1, 3, 0, 1>, Side<4, 2, 3, 0, 4>>(i);
    case kTrellis * 100 + 13: return family_of<TrellisDecoder<13, 8, kNoSign>, Side<1, 1, 4>>(i);
    case kTrellis * 100 + 15: return family_of<TrellisDecoder<15, 4, kNoSign>, Side<1, 1, 7>>(i);
    case kTrellis * 100 + 16:
      return i.sign ? family_of<TrellisDecoder<16, 8, kSignBits>, Side<1, 1, 4>>(i)
                    : family_of<TrellisDecoder<16, 8, kNoSign>, Side<1, 1, 4>>(i);
  }
  return {};
}

static bool accepts(const Ints& i) {
  const Family family = find_family(i);
  // operands of 128 and more would overflow the 16-bit sums of a kernel that was promised smaller ones
  return family.gemv && (i.largest < 128 || !family.narrow || !kSignedDot);
}

// -- products ------------------------------------------------------------------------------------------------------------

constexpr int kChunk = 128;  // rows of activations: accumulators stay in the first-level cache, activations in the second

// For operands up to `largest`: 2 * Depth products with 127 at most fit 16 bits.
template <int Groups> static auto multiply_with(bool narrow, [[maybe_unused]] int largest) {
#ifdef IQ_PAIR_SUMS
  constexpr int most = 8 / Groups;
  if (largest <= 15) return multiply<Groups, true, most>;
  if (largest <= 31) return multiply<Groups, true, most < 4 ? most : 4>;
  if (largest <= 63) return multiply<Groups, true, most < 2 ? most : 2>;
#endif
  return narrow ? multiply<Groups, true> : multiply<Groups, !kSignedDot>;
}

static void linear_int8(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  if (x.m == 1) return family.gemv(w, x, out, g0, g1);
  const int cells = f.i.block / kCell;
  const bool narrow = family.narrow || f.i.largest < 128;
  const auto run = f.i.groups == 1   ? multiply_with<1>(narrow, f.i.largest)
                   : f.i.groups == 2 ? multiply_with<2>(narrow, f.i.largest)
                                     : multiply_with<4>(narrow, f.i.largest);
  Panel panel;
  IQ_ALIGNED float acc[kChunk * kRows];
  for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
    const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
    for (int64_t g = g0; g < g1; ++g) {
      const F32 d = header_d(w, g);
      __builtin_memset(acc, 0, (m1 - m0) * kRows * sizeof(float));
      const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
      for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
        family.sides(f, tile, d, narrow ? 0 : 128, panel.side);
        family.expand(f, tile, panel.operand);
        run(panel, cells, x, m0, m1, b * cells, acc);
      }
      for (int64_t m = m0; m < m1; ++m) finish(out, w.rows, m, g, loadf(acc + kRows * (m - m0)));
    }
  }
}

static void linear_float(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED float acc[kChunk * kRows];
  IQ_ALIGNED float weights[kMaxBlock * kRows];
  for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
    const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
    for (int64_t g = g0; g < g1; ++g) {
      const F32 d = header_d(w, g);
      __builtin_memset(acc, 0, (m1 - m0) * kRows * sizeof(float));
      const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
      for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
        family.exact_sides(f, tile, d, 0, panel.side);
        family.expand(f, tile, panel.operand);
        float_panel(f, panel, weights);
        int64_t m = m0;
        const auto step = [&](auto size) {
          constexpr int M = decltype(size)::value;
          for (; m + M <= m1; m += M)
            multiply_float<M>(weights, f.i.block, x.x + m * x.k + b * f.i.block, x.k, acc + kRows * (m - m0));
        };
        if constexpr (kBatch >= 8) step(Size<8>{});
        step(Size<4>{});
        step(Size<2>{});
        step(Size<1>{});
      }
      for (int64_t m = m0; m < m1; ++m) finish(out, w.rows, m, g, loadf(acc + kRows * (m - m0)));
    }
  }
}

static void linear(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  x.q ? linear_int8(w, x, out, g0, g1) : linear_float(w, x, out, g0, g1);
}

}}  // namespace iqtorch::IQTORCH_ISA

#include "rows.inl"

#ifndef IQTORCH_TILED
#define IQTORCH_TILED nullptr, nullptr, nullptr, nullptr
#endif

#define IQTORCH_KERNELS(isa)                                                                                                    \
  const Kernels* kernels_##isa() {                                                                                              \
    static const Kernels table = {#isa, isa::accepts,   isa::to_float,   isa::from_float, isa::quantize,   \
                                  isa::linear, isa::dequantize, isa::gather_rows, isa::transposed, IQTORCH_TILED};              \
    return &table;                                                                                                              \
  }
