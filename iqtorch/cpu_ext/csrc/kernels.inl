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
template <int M, int Groups, bool Narrow>
IQ_FN void multiply_block(const Panel& panel, int cells, const int8_t* q, const float* scale, const float* sums, int64_t rows, float* acc) {
  constexpr int per_group = 8 / Groups;
  F32 a[M];
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) a[m] = loadf(acc + kRows * m);
  for (int c = 0; c < cells; ++c, q += rows * kCell, scale += rows, sums += rows * Groups) {
    IQ_UNROLL(4)
    for (int g = 0; g < Groups; ++g) {
      I32 d[M];
      IQ_UNROLL(8)
      for (int m = 0; m < M; ++m) d[m] = set(0);
      IQ_UNROLL(8)
      for (int v = 0; v < per_group; ++v) {
        const int at = g * per_group + v;
        const U8 operand = load(panel.operand + kVector * (c * 8 + at));
        IQ_UNROLL(8)
        for (int m = 0; m < M; ++m) d[m] = dot<Narrow>(d[m], operand, q + m * kCell + 4 * at);
      }
      const F32 s = loadf(panel.side.scale + kRows * (c * Groups + g)), o = loadf(panel.side.offset + kRows * (c * Groups + g));
      IQ_UNROLL(8)
      for (int m = 0; m < M; ++m) {
        a[m] = fma(to_float(d[m]) * s, setf(scale[m]), a[m]);
        a[m] = fma(o, setf(sums[m * Groups + g]), a[m]);
      }
    }
  }
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m) storef(acc + kRows * m, a[m]);
}

template <int Groups, bool Narrow>
static void multiply(const Panel& panel, int cells, const Activations& x, int64_t m0, int64_t m1, int64_t cell, float* acc) {
  int64_t m = m0;
  const auto step = [&](auto size) {
    constexpr int M = decltype(size)::value;
    for (; m + M <= m1; m += M) {
      const int64_t at = cell * x.m + m;
      multiply_block<M, Groups, Narrow>(panel, cells, x.q + at * kCell, x.scale + at, x.sums + at * Groups, x.m, acc + kRows * (m - m0));
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
  return family.gemv && (i.narrow || !family.narrow || !kSignedDot);
}

// -- products ------------------------------------------------------------------------------------------------------------

constexpr int kChunk = 128;  // rows of activations whose accumulators stay in the first-level cache

static void linear_int8(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  if (x.m == 1) return family.gemv(w, x, out, g0, g1);
  const int cells = f.i.block / kCell;
  const auto run = f.i.groups == 1 ? (family.narrow ? multiply<1, true> : multiply<1, !kSignedDot>)
                 : f.i.groups == 2 ? (family.narrow ? multiply<2, true> : multiply<2, !kSignedDot>)
                                   : (family.narrow ? multiply<4, true> : multiply<4, !kSignedDot>);
  Panel panel;
  IQ_ALIGNED float acc[kChunk * kRows];
  for (int64_t g = g0; g < g1; ++g) {
    const F32 d = header_d(w, g);
    for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
      const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
      __builtin_memset(acc, 0, (m1 - m0) * kRows * sizeof(float));
      const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
      for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
        family.sides(f, tile, d, family.narrow ? 0 : 128, panel.side);
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
  for (int64_t g = g0; g < g1; ++g) {
    const F32 d = header_d(w, g);
    for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
      const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
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

// -- weights row by row --------------------------------------------------------------------------------------------------

// One row of a block: `block` weights as the plain-torch decoder rounds them, times runtime_scale.
IQ_FN void decode_row(const Format& f, const Panel& panel, int row, float* out) {
  const Ints& i = f.i;
  const int fine = kCell / i.groups, count = i.block / fine;
  IQ_ALIGNED uint8_t operand[kMaxBlock];
  for (int v = 0; v < i.block / 4; ++v) __builtin_memcpy(operand + 4 * v, panel.operand + kVector * v + 4 * row, 4);
  for (int g = 0; g < count; ++g) {
    const float s = panel.side.scale[kRows * g + row], o = panel.side.offset[kRows * g + row], low = panel.side.low[kRows * g + row];
    if (i.affine) {
      for (int k = 0; k < fine; ++k) out[g * fine + k] = s * ((float)operand[g * fine + k] + o) - low;
    } else {
      for (int k = 0; k < fine; ++k) out[g * fine + k] = s * ((float)operand[g * fine + k] + o);
    }
  }
  if (f.f.runtime_scale != 1.0f)
    for (int k = 0; k < i.block; ++k) out[k] *= f.f.runtime_scale;
}

IQ_FN int64_t element_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

static void to_float(const void* x, DType dtype, float* out, int64_t count) {
  if (dtype == kFloat32) {
    __builtin_memcpy(out, x, count * sizeof(float));
  } else if (dtype == kBFloat16) {
    const uint16_t* p = (const uint16_t*)x;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t u = (uint32_t)p[i] << 16;
      __builtin_memcpy(out + i, &u, 4);
    }
  } else {
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) storef(out + i, from_half(load16((const uint8_t*)x + 2 * i)));
    if (i < count) {
      IQ_ALIGNED uint8_t last[32] = {};
      IQ_ALIGNED float value[kRows];
      __builtin_memcpy(last, (const uint8_t*)x + 2 * i, 2 * (count - i));
      storef(value, from_half(load16(last)));
      __builtin_memcpy(out + i, value, 4 * (count - i));
    }
  }
}

static void from_float(const float* x, DType dtype, void* out, int64_t count) {
  if (dtype == kFloat32) {
    __builtin_memcpy(out, x, count * sizeof(float));
    return;
  }
  const auto put = dtype == kFloat16 ? +[](uint16_t* p, const float* v) { store_half(p, loadf(v)); }
                                     : +[](uint16_t* p, const float* v) { store_bfloat16(p, loadf(v)); };
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) put((uint16_t*)out + i, x + i);
  if (i < count) {
    IQ_ALIGNED float last[kRows] = {};
    IQ_ALIGNED uint16_t half[kRows];
    __builtin_memcpy(last, x + i, 4 * (count - i));
    put(half, last);
    __builtin_memcpy((uint16_t*)out + i, half, 2 * (count - i));
  }
}

static void dequantize(const Matrix& w, DType dtype, void* out, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED float row[kMaxBlock];
  for (int64_t g = g0; g < g1; ++g) {
    const F32 d = header_d(w, g);
    const int valid = w.rows - g * kRows < kRows ? (int)(w.rows - g * kRows) : kRows;
    const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
    for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
      family.exact_sides(f, tile, d, 0, panel.side);
      family.expand(f, tile, panel.operand);
      for (int r = 0; r < valid; ++r) {
        decode_row(f, panel, r, row);
        from_float(row, dtype, (uint8_t*)out + ((g * kRows + r) * w.k + b * f.i.block) * element_bytes(dtype), f.i.block);
      }
    }
  }
}

static void gather_rows(const Matrix& w, DType dtype, const int64_t* ids, void* out, int64_t i0, int64_t i1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED float row[kMaxBlock];
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t g = ids[i] / kRows;
    const F32 d = header_d(w, g);
    const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
    for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
      family.exact_sides(f, tile, d, 0, panel.side);
      family.expand(f, tile, panel.operand);
      decode_row(f, panel, (int)(ids[i] % kRows), row);
      from_float(row, dtype, (uint8_t*)out + (i * w.k + b * f.i.block) * element_bytes(dtype), f.i.block);
    }
  }
}

static void transposed(const Matrix& w, const float* g, int64_t m, float* out, int64_t b0, int64_t b1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  constexpr int chunk = 32;
  const int block = f.i.block;
  const int64_t groups = (w.rows + kRows - 1) / kRows;
  Panel panel;
  IQ_ALIGNED float weights[kRows * kMaxBlock];
  IQ_ALIGNED float acc[chunk * kMaxBlock];
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t m0 = 0; m0 < m; m0 += chunk) {
      const int64_t m1 = m0 + chunk < m ? m0 + chunk : m;
      __builtin_memset(acc, 0, (m1 - m0) * block * sizeof(float));
      for (int64_t n = 0; n < groups; ++n) {
        const uint8_t* tile = w.tiles + (n * w.blocks + b) * f.i.tile_bytes;
        const int valid = w.rows - n * kRows < kRows ? (int)(w.rows - n * kRows) : kRows;
        family.exact_sides(f, tile, header_d(w, n), 0, panel.side);
        family.expand(f, tile, panel.operand);
        for (int r = 0; r < valid; ++r) decode_row(f, panel, r, weights + r * block);
        for (int64_t i = m0; i < m1; ++i) {
          float* a = acc + (i - m0) * block;
          const float* gi = g + i * w.rows + n * kRows;
          int r = 0;
          for (; r + 4 <= valid; r += 4) {
            const float *w0 = weights + r * block, *w1 = w0 + block, *w2 = w1 + block, *w3 = w2 + block;
            const float x0 = gi[r], x1 = gi[r + 1], x2 = gi[r + 2], x3 = gi[r + 3];
            for (int k = 0; k < block; ++k) a[k] += x0 * w0[k] + x1 * w1[k] + x2 * w2[k] + x3 * w3[k];
          }
          for (; r < valid; ++r)
            for (int k = 0; k < block; ++k) a[k] += gi[r] * weights[r * block + k];
        }
      }
      for (int64_t i = m0; i < m1; ++i) __builtin_memcpy(out + i * w.k + b * block, acc + (i - m0) * block, block * sizeof(float));
    }
}

// -- activations -----------------------------------------------------------------------------------------------------------

// int8 with a scale per 32, rounded to nearest; a cell with NaN or Inf gets a NaN scale, so that its products are NaN.
// Neighbouring rows lie side by side, cell by cell: rows at a distance of K would share few sets of the first-level cache.
static void quantize(const float* x, int64_t k, int groups, int64_t row, int64_t rows, int8_t* q, float* scale, float* sums) {
  const int fine = kCell / groups;
  q += row * kCell, scale += row, sums += row * groups;
  for (int64_t c = 0; c < k / kCell; ++c, x += kCell, q += rows * kCell, scale += rows, sums += rows * groups) {
    IQ_ALIGNED int32_t whole[kCell];
    IQ_ALIGNED float copy[kCell];
    int32_t largest = 0;
    __builtin_memcpy(whole, x, sizeof whole);
    __builtin_memcpy(copy, x, sizeof copy);
    for (int i = 0; i < kCell; ++i) {
      const int32_t a = whole[i] & 0x7fffffff;
      largest = a > largest ? a : largest;
    }
    float top;
    __builtin_memcpy(&top, &largest, 4);
    const bool bad = largest >= 0x7f800000, tiny = top < 1e-30f;
    const float inverse = bad || tiny ? 0.0f : 127.0f / top;
    const float step = bad ? __builtin_nanf("") : tiny ? 0.0f : top / 127.0f;
    // adding 1.5 * 2^23 rounds to an integer, which then is the low bits; a NaN would leave its own there
    for (int i = 0; i < kCell; ++i) copy[i] = (bad ? 0.0f : copy[i] * inverse) + 12582912.0f;
    __builtin_memcpy(whole, copy, sizeof whole);
    for (int i = 0; i < kCell; ++i) {
      whole[i] -= 0x4b400000;
      q[i] = (int8_t)whole[i];
    }
    for (int g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int i = 0; i < fine; ++i) sum += whole[g * fine + i];
      sums[g] = step * (float)sum;
    }
    *scale = step;
  }
}

#ifndef IQTORCH_TILED
#define IQTORCH_TILED nullptr, nullptr, nullptr, nullptr
#endif

#define IQTORCH_KERNELS(isa)                                                                                                    \
  const Kernels* kernels_##isa() {                                                                                              \
    static const Kernels table = {#isa, isa::accepts,   isa::to_float,   isa::from_float, isa::quantize,   \
                                  isa::linear, isa::dequantize, isa::gather_rows, isa::transposed, IQTORCH_TILED};              \
    return &table;                                                                                                              \
  }

}}  // namespace iqtorch::IQTORCH_ISA
