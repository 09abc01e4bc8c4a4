// The kernels, written once for a machine of 16 lanes (simd_*.h) and compiled once per instruction set (isa_*.cpp).

#include "decoders.inl"
#ifdef IQ_OWN_GRIDS
#include IQ_OWN_GRIDS
#endif
#include "sides.inl"
#include "cells.inl"

namespace iqtorch { namespace IQTORCH_ISA {

template <auto N> struct Size {
  static constexpr auto value = N;
};

// -- one row of activations against packed weights ----------------------------------------------------------------

// How far ahead weights are asked for: what a core reads in the time that memory takes to answer.
constexpr int kPrefetch = 8192;

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

// The cells of a block in order. Unrolled where instructions are the limit: addresses and shifts are then by numbers. Elsewhere memory
// is, and what fetches ahead in hardware follows a loop better than eight times as many loads.
template <class Decoder, class Run> IQ_FN void each_cell(int cells, const Run& run) {
  if constexpr (kUnrolls && Decoder::kUnrolled) {
    if (cells == 8) {
      IQ_UNROLL(8)
      for (int c = 0; c < 8; ++c) run(c);
      return;
    }
  }
  for (int c = 0; c < cells; ++c) run(c);
}

// Asks for the bytes of cell c of a tile. Distances known when compiling are worth some lines too many.
template <class Decoder> IQ_FN void prefetch(const uint8_t* tile, int c, int cell_bytes) {
  if constexpr (Decoder::kSmall) {
    IQ_UNROLL(9)
    for (int line = 0; line < Decoder::kLines; ++line) prefetch_line(tile + 64 * (c * Decoder::kLines + line));
  } else {
    for (int line = 0; line < cell_bytes; line += 64) prefetch_line(tile + c * cell_bytes + line);
  }
}

template <class Decoder, class Side> static void gemv(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  using Sum = CellSum<Decoder, Side>;
  constexpr int groups = Side::kGroups;
  const Format& f = *w.format;
  const int cells = f.i.block / kCell, cell_bytes = f.i.tile_bytes / cells;
  const Decoder decoder(f, Sum::kFlip);
  const uint8_t* tile = w.tiles + g0 * w.blocks * f.i.tile_bytes;
  for (int64_t g = g0; g < g1; ++g) {
    F32 acc = setf(0), rest = setf(0);
    const F32 d = header_d(w, g);
    const int8_t* q = x.q;
    const float* scale = x.scale;
    const int32_t* sums = x.sums;
    for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes, q += cells * kCell, scale += cells, sums += cells * groups) {
      const typename Side::template Reader<true> side(f, tile, d);
      F32 part = setf(0), low = setf(0);  // of the block, in units of d and of dmin
      each_cell<Decoder>(cells, [&](int c) IQ_INLINE {
        prefetch<Decoder>(tile + kPrefetch, c, cell_bytes);
        Sum sum(f, tile, c, sums);
        typename Sum::Variant variant(f, tile, c, decoder.variant);
        decoder.decode(tile, c, variant, [&](int v, U8 operand) IQ_INLINE { sum.add(side, v, operand, q + c * kCell + 4 * v); });
        part = fma(sum.total(), setf(scale[c]), part);
        if constexpr (Side::kAffine)
          IQ_UNROLL(2)
          for (int e = c * groups; e < (c + 1) * groups; ++e) low = fma(side.low_number(e), as_float(set(sums[e])), low);
      });
      acc = fma(part, side.unit(), acc);
      if constexpr (Side::kAffine) rest = fma(low, side.low_unit(), rest);
    }
    finish(out, w.rows, 0, g, Side::kAffine ? acc + rest : acc);
  }
}

// -- several rows: operands of some blocks are decoded once, then used from the first-level cache -------------------------

struct Panel {
  IQ_ALIGNED uint8_t operand[kMaxBlock * kRows];  // [cell][q][16 rows][4]
#ifdef IQ_SIGNED_DOT
  IQ_ALIGNED uint8_t size[kMaxBlock * kRows];  // magnitudes of signed operands
#endif
  Sides side;
};

constexpr int kResults = 48;  // rows whose results leave together, a multiple of kBatch
constexpr int kChunk = 512;   // rows of activations: they and their sums stay in the second-level cache
// Groups of rows of weights that share what is read of activations, if those have as many rows; with fewer, fewer streams of weights pay.
constexpr int kPanelGroups = 2 * kBatchGroups, kManyRows = 64;

template <class Decoder, class Side> static void expand(const Format& f, const uint8_t* tile, int tiles, uint8_t* operand) {
  const Decoder decoder(f);
  const int cells = f.i.block / kCell;
  for (int i = 0; i < tiles * f.i.tile_bytes; i += 64) __builtin_prefetch(tile + i + kPrefetch / 2);
  for (int t = 0; t < tiles; ++t, tile += f.i.tile_bytes, operand += cells * 8 * kVector)
    each_cell<Decoder>(cells, [&](int c) IQ_INLINE {
      typename Side::Variant variant(f, tile, c, decoder.variant);
      decoder.decode(tile, c, variant, [&](int v, U8 value) IQ_INLINE { store(operand + kVector * (8 * c + v), value); });
    });
}

// Makes operands of scale times value, plus `folded_bias`, where all of these fit a byte: what is left is d, in side.scale.
template <class Decoder, class Side> static void fold(const Format& f, const uint8_t* tile, F32 d, Panel& panel) {
  constexpr int per_group = 8 / Side::kGroups;
  const typename Side::template Reader<true> side(f, tile, d);
  for (int e = 0; e < f.i.block / kCell * Side::kGroups; ++e) {
    // the low bytes of a float that large are the integer's; two bytes of a lane are multiplied at once: no product passes 16 bits
    const I32 scale = as_int(side.number(e) + setf(12582912.0f)) & set(255), two = set(0x00ff00ff);
    const U8 bias = as_bytes(((set(f.i.folded_bias) + scale * set(-f.i.bias)) & set(255)) * set(0x01010101));
    for (int v = e * per_group; v < (e + 1) * per_group; ++v) {
      const I32 operand = as_i32(load(panel.operand + kVector * v));
      const I32 even = ((operand & two) * scale) & two, odd = ((shift_right(operand, 8) & two) * scale) & two;
      store(panel.operand + kVector * v, add(as_bytes(even | shift_left(odd, 8)), bias));
    }
  }
  storef(panel.side.scale, side.unit());
}

// Operands as the instruction set multiplies them.
static void arrange([[maybe_unused]] Panel& panel, [[maybe_unused]] int cells, [[maybe_unused]] bool narrow) {
#ifdef IQ_ROW_PAIRS
  for (int v = 0; v < 8 * cells; v += 2) zip_vectors(panel.operand + kVector * v);
#endif
#ifdef IQ_SIGNED_DOT
  for (int v = 0; !narrow && v < 8 * cells; ++v) {
    const U8 operand = flip(load(panel.operand + kVector * v), 128);
    store(panel.operand + kVector * v, operand);
    store(panel.size + kVector * v, magnitude(operand));
  }
#endif
}

// M rows of activations times N groups of rows of weights, over the cells of a panel: `acc` is [N][kChunk][16].
// `q`, `scale` and `sums` point at the first of M rows of activations in the panel.
// `Depth` neighbouring vectors may be summed in 16 bits where an instruction set does so. `Folded`: see `fold`.
template <int M, int N, int Groups, bool Affine, bool Narrow, int Depth, bool Folded = false>
IQ_FN void multiply_cells(const Panel* panel, int cells, const int8_t* q, const float* scale, const int32_t* sums, float* acc) {
  constexpr int parts = Folded ? 1 : Groups, per_group = 8 / parts;  // of a cell, with a sum of their own
  F32 a[N][M], before[N][M];
  IQ_UNROLL(4)
  for (int n = 0; n < N; ++n)
    IQ_UNROLL(4)
    for (int m = 0; m < M; ++m) {
      a[n][m] = before[n][m] = loadf(acc + kRows * (kChunk * n + m));
      if (Folded) a[n][m] = setf(0);
    }
  const int64_t stride = cells * kCell, sums_stride = cells * Groups;
  for (int c = 0; c < cells; ++c, q += kCell, ++scale, sums += Groups) {
    F32 cell[N][M];
    IQ_UNROLL(4)
    for (int g = 0; g < parts; ++g) {
      I32 d[N][M];
#ifdef IQ_ROW_PAIRS
      IQ_UNROLL(2)
      for (int m = 0; m < M; m += 2) {
        const int next = m + 1 < M ? m + 1 : m;
        RowPairs two[N];
        for (int n = 0; n < N; ++n) two[n] = Affine ? start_pairs(0, 0) : start_pairs(sums[m * sums_stride + g], sums[next * sums_stride + g]);
        for (int at = g * per_group; at < (g + 1) * per_group; at += 2)
          for (int n = 0; n < N; ++n)
            add_pairs(two[n], panel[n].operand + kVector * (c * 8 + at), q + m * stride + 4 * at, q + next * stride + 4 * at);
        for (int n = 0; n < N; ++n) d[n][m] = first_of(two[n]), d[n][next] = next > m ? second_of(two[n]) : d[n][m];
      }
#else
      IQ_UNROLL(4)
      for (int n = 0; n < N; ++n)
        IQ_UNROLL(4)
        for (int m = 0; m < M; ++m) d[n][m] = Affine ? set(0) : set(sums[m * sums_stride + g]);
      IQ_UNROLL(8)
      for (int v = 0; v < per_group; v += Depth) {
        const int at = g * per_group + v;
        IQ_UNROLL(4)
        for (int n = 0; n < N; ++n) {
          const uint8_t* operand = panel[n].operand + kVector * (c * 8 + at);
#ifdef IQ_PAIR_SUMS
          if constexpr (Depth > 1) {
            Pairs pairs[M];
            IQ_UNROLL(4)
            for (int m = 0; m < M; ++m) pairs[m] = pair_products(load(operand), q + m * stride + 4 * at);
            IQ_UNROLL(8)
            for (int i = 1; i < Depth; ++i) {
              const U8 next = load(operand + kVector * i);
              IQ_UNROLL(4)
              for (int m = 0; m < M; ++m) pairs[m] = pairs[m] + pair_products(next, q + m * stride + 4 * (at + i));
            }
            IQ_UNROLL(4)
            for (int m = 0; m < M; ++m) d[n][m] = add_pairs(d[n][m], pairs[m]);
            continue;
          }
#endif
          const U8 single = load(operand);
#ifdef IQ_SIGNED_DOT
          if constexpr (!Narrow) {
            const U8 size = load(panel[n].size + kVector * (c * 8 + at));
            IQ_UNROLL(4)
            for (int m = 0; m < M; ++m) d[n][m] = dot_signed(d[n][m], single, size, q + m * stride + 4 * at);
            continue;
          }
#endif
          IQ_UNROLL(4)
          for (int m = 0; m < M; ++m) d[n][m] = dot<Narrow>(d[n][m], single, q + m * stride + 4 * at);
        }
      }
#endif
      IQ_UNROLL(4)
      for (int n = 0; n < N; ++n) {
        const F32 s = Folded ? setf(1) : loadf(panel[n].side.scale + kRows * (c * Groups + g));
        IQ_UNROLL(4)
        for (int m = 0; m < M; ++m) {
          const F32 own = to_float(d[n][m]);
          cell[n][m] = Folded ? own : g ? fma(own, s, cell[n][m]) : own * s;
        }
      }
    }
    if constexpr (Affine) {
      F32(&sum)[N][M] = Folded ? before : a;
      IQ_UNROLL(4)
      for (int g = 0; g < Groups; ++g)
        IQ_UNROLL(4)
        for (int n = 0; n < N; ++n) {
          const F32 low = loadf(panel[n].side.low + kRows * (c * Groups + g));
          IQ_UNROLL(4)
          for (int m = 0; m < M; ++m) sum[n][m] = fma(low, as_float(set(sums[m * sums_stride + g])), sum[n][m]);
        }
    }
    IQ_UNROLL(4)
    for (int n = 0; n < N; ++n)
      IQ_UNROLL(4)
      for (int m = 0; m < M; ++m) a[n][m] = fma(cell[n][m], setf(scale[m * cells]), a[n][m]);
  }
  IQ_UNROLL(4)
  for (int n = 0; n < N; ++n)
    IQ_UNROLL(4)
    for (int m = 0; m < M; ++m) {
      storef(acc + kRows * (kChunk * n + m), Folded ? fma(a[n][m], loadf(panel[n].side.scale), before[n][m]) : a[n][m]);
    }
}

template <int N, int Groups, bool Affine, bool Narrow, int Depth, bool Folded = false>
static void multiply(const Panel* panel, int groups, int cells, const Activations& x, int64_t m0, int64_t m1, int64_t cell, float* acc) {
  int64_t m = m0;
  const auto step = [&](auto size) {
    constexpr int M = decltype(size)::value;
    for (; m + M <= m1; m += M) {
      const int64_t at = cell * x.m + m * cells;
      for (int n = 0; n < groups; n += N)
        multiply_cells<M, N, Groups, Affine, Narrow, Depth, Folded>(panel + n, cells, x.q + at * kCell, x.scale + at, x.sums + at * Groups,
                                                                    acc + kRows * (kChunk * n + m - m0));
    }
  };
  step(Size<kBatch>{});
  if constexpr (kBatch > 3) step(Size<3>{});
  step(Size<2>{});
  step(Size<1>{});
}

// Weights of a block as float32, [k][16] with rows of `stride`, from operands and exact sides.
IQ_FN void float_panel(const Format& f, const Panel& panel, float* out, int stride) {
  const int per_group = 8 / f.i.groups, vectors = f.i.block / 4;
  const F32 factor = setf(f.f.runtime_scale), o = setf((float)-f.i.bias);
  for (int v = 0; v < vectors; ++v) {
    const int g = v / per_group;
    const F32 s = loadf(panel.side.scale + kRows * g), low = loadf(panel.side.low + kRows * g);
    I32 four = as_i32(load(panel.operand + kVector * v));
    IQ_UNROLL(4)
    for (int j = 0; j < 4; ++j) {
      F32 value = s * (to_float(four & set(255)) + o);
      if (f.i.affine) value = value - low;
      storef(out + stride * (4 * v + j), value * factor);
      four = shift_right(four, 8);
    }
  }
}

// acc [m][16 N] += x [m][count] times panel [count][16 N]; rows of x and of acc at distances.
template <int M, int N>
IQ_FN void multiply_float(const float* panel, int count, const float* x, int64_t x_stride, float* acc, int64_t acc_stride) {
  F32 a[N][M];
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m)
    IQ_UNROLL(4)
    for (int n = 0; n < N; ++n) a[n][m] = loadf(acc + m * acc_stride + kRows * n);
  for (int i = 0; i < count; ++i, panel += kRows * N) {
    F32 w[N];
    IQ_UNROLL(4)
    for (int n = 0; n < N; ++n) w[n] = loadf(panel + kRows * n);
    IQ_UNROLL(8)
    for (int m = 0; m < M; ++m) {
      const F32 one = setf(x[m * x_stride + i]);
      IQ_UNROLL(4)
      for (int n = 0; n < N; ++n) a[n][m] = fma(w[n], one, a[n][m]);
    }
  }
  IQ_UNROLL(8)
  for (int m = 0; m < M; ++m)
    IQ_UNROLL(4)
    for (int n = 0; n < N; ++n) storef(acc + m * acc_stride + kRows * n, a[n][m]);
}

template <int N>
static void multiply_floats(const float* panel, int count, const float* x, int64_t x_stride, int64_t rows, float* acc, int64_t acc_stride) {
  int64_t m = 0;
  const auto step = [&](auto size) {
    constexpr int M = decltype(size)::value;
    for (; m + M <= rows; m += M) multiply_float<M, N>(panel, count, x + m * x_stride, x_stride, acc + m * acc_stride, acc_stride);
  };
  step(Size<kFloatRows>{});
  if constexpr (kFloatRows > 4) step(Size<4>{});
  step(Size<2>{});
  step(Size<1>{});
}

// -- which code runs a format ------------------------------------------------------------------------------------------

struct Family {
  void (*expand)(const Format&, const uint8_t* tile, int tiles, uint8_t* operand);
  void (*sides)(const Format&, const uint8_t* tile, int tiles, F32 d, Sides&);
  void (*exact_sides)(const Format&, const uint8_t* tile, int tiles, F32 d, Sides&);
  void (*gemv)(const Matrix&, const Activations&, const Output&, int64_t, int64_t);
  void (*fold)(const Format&, const uint8_t* tile, F32 d, Panel&);
  int most;         // no operand is larger
  bool plain_sums;  // gemv wants sums of activations, without a factor
};

// Where bytes of all sizes are multiplied at one speed, and small codes times their scales are bytes.
template <class Decoder, class Side> static auto fold_of() -> decltype(Family::fold) {
#ifdef IQ_FOLDS
  if constexpr (Decoder::kMost <= 7 && Side::kGroups == 2) return fold<Decoder, Side>;
#endif
  return nullptr;
}

// The first of `Sides` that fits; an empty family if none does.
template <class Decoder, class... SideTypes> static Family family_of(const Ints& i) {
  Family family = {};
  ((!family.gemv && SideTypes::fits(i)
        ? (void)(family = {expand<Decoder, SideTypes>, SideTypes::template read<true>, SideTypes::template read<false>, gemv<Decoder, SideTypes>,
                           fold_of<Decoder, SideTypes>(), Decoder::kMost, CellSum<Decoder, SideTypes>::kPlainSums})
        : (void)0),
   ...);
  return family;
}

static Family find_family(const Ints& i) {
  using None = Side<1, 0>;  // d alone
  using Minimum = Side<1, 0, 0, 0, true>;
  switch (i.decoder * 100 + i.code_width) {
    case kPlain * 100 + 2: return family_of<PlainDecoder<2>, Side<2, 4, 4>>(i);
    case kPlain * 100 + 3: return family_of<PlainDecoder<3>, Side<2, 6>>(i);
    case kPlain * 100 + 4: return family_of<PlainDecoder<4>, None, Minimum, Side<1, 6, 6>>(i);
    case kPlain * 100 + 5: return family_of<PlainDecoder<5>, None, Minimum, Side<1, 6, 6>>(i);
    case kPlain * 100 + 6: return family_of<PlainDecoder<6>, None, Side<2, 8>>(i);
    case kPlain * 100 + 8: return family_of<PlainDecoder<8>, None>(i);
    case kLookup * 100 + 2: return family_of<LookupDecoder<2>, Side<1, 5, 0, 1>, Side<2, 4, 0, 2>>(i);
    case kLookup * 100 + 3: return family_of<LookupDecoder<3>, Side<1, 5, 0, 1>, Side<2, 5, 0, 2>>(i);
    case kLookup * 100 + 4:
      return family_of<LookupDecoder<4>, None, Side<1, 6>, Side<1, 7, 0, 1>, Side<2, 6, 0, 2>>(i);
    case kLookup * 100 + 5: return family_of<LookupDecoder<5>, Side<1, 7, 0, 1>, Side<2, 6, 0, 2>>(i);
    case kLookup * 100 + 6: return family_of<LookupDecoder<6>, Side<2, 8, 0, 2>>(i);
    case kPairs * 100 + 5: return family_of<PairsDecoder, Side<1, 6>>(i);
    case kWords * 100 + 16: return family_of<WordsDecoder, Side<1, -1>>(i);
    case kGrid * 100 + 8:
      return i.vec == 4 ? family_of<GridDecoder<8, 4, kSignParity>, Side<1, 4>>(i)
                        : family_of<GridDecoder<8, 8, kSignParity>, Side<1, 4>>(i);
    case kGrid * 100 + 9:
      return i.vec == 4 ? family_of<GridDecoder<9, 4, kSignBits>, Side<1, 4>>(i)
                        : family_of<GridDecoder<9, 8, kSignParity>, Side<2, 4>>(i);
    case kGrid * 100 + 10: return family_of<GridDecoder<10, 8, kSignBits>, Side<2, 4>>(i);
    case kGrid * 100 + 11: return family_of<GridDecoder<11, 8, kNoSign>, Side<1, 3, 0, 1>, Side<2, 3, 0, 4>>(i);
    case kTrellis * 100 + 13: return family_of<TrellisDecoder<13, 8, kNoSign>, Side<1, 4>>(i);
    case kTrellis * 100 + 15: return family_of<TrellisDecoder<15, 4, kNoSign>, Side<1, 7>>(i);
    case kTrellis * 100 + 16:
      return i.sign ? family_of<TrellisDecoder<16, 8, kSignBits>, Side<1, 4>>(i)
                    : family_of<TrellisDecoder<16, 8, kNoSign>, Side<1, 4>>(i);
  }
  return {};
}

static bool accepts(const Ints& i) {
  const Family family = find_family(i);
  // sums of folded operands with minima start from 0 (multiply_cells)
  if (family.fold && (i.folded_bias < 0 || (i.affine && i.folded_bias) || i.block != kMaxBlock)) return false;
  return family.gemv && i.largest <= family.most;  // larger ones would overflow the 16-bit sums of a kernel that was promised smaller ones
}

// -- products ------------------------------------------------------------------------------------------------------------

using Multiply = void (*)(const Panel*, int groups, int cells, const Activations&, int64_t m0, int64_t m1, int64_t cell, float* acc);

// For operands up to `largest`: 2 * Depth products with 127 at most fit 16 bits.
template <int N, int Groups, bool Affine> static Multiply multiply_with(bool narrow, [[maybe_unused]] int largest) {
#ifdef IQ_PAIR_SUMS
  constexpr int most = 8 / Groups;
  if (largest <= 15) return multiply<N, Groups, Affine, true, most>;
  if (largest <= 31) return multiply<N, Groups, Affine, true, most < 4 ? most : 4>;
  if (largest <= 63) return multiply<N, Groups, Affine, true, most < 2 ? most : 2>;
#endif
  return narrow ? multiply<N, Groups, Affine, true, 1> : multiply<N, Groups, Affine, !kSignedDot, 1>;
}

template <int N> static Multiply multiply_of(const Ints& i, bool narrow, [[maybe_unused]] bool folded) {
#ifdef IQ_FOLDS
  if (folded) return i.affine ? multiply<N, 2, true, true, 1, true> : multiply<N, 1, false, true, 1, true>;
#endif
  if (i.affine) return i.groups == 1 ? multiply_with<N, 1, true>(narrow, i.largest) : multiply_with<N, 2, true>(narrow, i.largest);
  return i.groups == 1 ? multiply_with<N, 1, false>(narrow, i.largest) : multiply_with<N, 2, false>(narrow, i.largest);
}

// Whether the products of m rows take operands as they are; else minus 128.
static bool is_narrow(const Family& family, const Ints& i, int64_t m) { return !kSignedDot || (m > 1 ? i.largest : family.most) < 128; }

// Whether operands have scales in them: that takes as long as it saves in about 64 rows.
static bool is_folded(const Family& family, int64_t m) { return family.fold && m >= kManyRows; }

static Sums sums_of(const Format& f, int64_t m) {
  const Family family = find_family(f.i);
  if (is_folded(family, m) && !f.i.affine) return {1, 0, -f.i.folded_bias};
  return {f.i.groups, f.i.affine, m == 1 && family.plain_sums ? 1 : (is_narrow(family, f.i, m) ? 0 : 128) - f.i.bias};
}

// Asks for the lines that results of rows m0 .. m1 and of `count` groups from g on are written to.
static void expect_results(const Output& out, int64_t m0, int64_t m1, int64_t g, int count) {
  const int64_t size = out.dtype == kFloat32 ? 4 : 2;
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t i = 0; i < count * kRows * size; i += 64)
      __builtin_prefetch((const uint8_t*)out.data + (m * out.stride + g * kRows) * size + i, 1);
}

static void linear_int8(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  if (x.m == 1) return family.gemv(w, x, out, g0, g1);
  const int cells = f.i.block / kCell, most = kMaxBlock / f.i.block;
  const bool narrow = is_narrow(family, f.i, x.m), folded = is_folded(family, x.m);
  const Multiply run[2] = {multiply_of<1>(f.i, narrow, folded), multiply_of<kBatchGroups>(f.i, narrow, folded)};
  Panel panel[kPanelGroups];
  IQ_ALIGNED float acc[kPanelGroups * kChunk * kRows];
  for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
    const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
    int count = x.m < kManyRows ? kBatchGroups : kPanelGroups;
    for (int64_t g = g0; g < g1; g += count) {
      if (g1 - g < count) count = g1 - g < kBatchGroups ? 1 : kBatchGroups;
      const Multiply product = run[count > 1];
      for (int n = 0; n < count; ++n) __builtin_memset(acc + kRows * kChunk * n, 0, (m1 - m0) * kRows * sizeof(float));
      for (int64_t b = 0; b < w.blocks; b += most) {
        const int tiles = w.blocks - b < most ? (int)(w.blocks - b) : most;
        for (int n = 0; n < count; ++n) {
          const uint8_t* tile = w.tiles + ((g + n) * w.blocks + b) * f.i.tile_bytes;
          family.sides(f, tile, tiles, header_d(w, g + n), panel[n].side);
          family.expand(f, tile, tiles, panel[n].operand);
          if (folded) family.fold(f, tile, header_d(w, g + n), panel[n]);
          arrange(panel[n], tiles * cells, narrow);
        }
        if (b + tiles < w.blocks) {
          product(panel, count, tiles * cells, x, m0, m1, b * cells, acc);
          continue;
        }
        // Results leave row by row, and those of many rows may share a set of every cache: some at a time, asked for meanwhile.
        for (int64_t m = m0, end; m < m1; m = end) {
          end = m + kResults < m1 ? m + kResults : m1;
          expect_results(out, m, end, g, count);
          product(panel, count, tiles * cells, x, m, end, b * cells, acc + kRows * (m - m0));
          for (int64_t i = m; i < end; ++i)
            for (int n = 0; n < count; ++n) finish(out, w.rows, i, g + n, loadf(acc + kRows * (kChunk * n + i - m0)));
        }
      }
    }
  }
}

template <int N>
static void linear_floats(const Matrix& w, const Activations& x, const Output& out, int64_t m0, int64_t m1, int64_t g) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED float acc[N * kChunk * kRows];
  IQ_ALIGNED float weights[N * kMaxBlock * kRows];
  __builtin_memset(acc, 0, (m1 - m0) * N * kRows * sizeof(float));
  for (int64_t b = 0; b < w.blocks; ++b) {
    for (int n = 0; n < N; ++n) {
      const uint8_t* tile = w.tiles + ((g + n) * w.blocks + b) * f.i.tile_bytes;
      family.exact_sides(f, tile, 1, header_d(w, g + n), panel.side);
      family.expand(f, tile, 1, panel.operand);
      float_panel(f, panel, weights + kRows * n, N * kRows);
    }
    multiply_floats<N>(weights, f.i.block, x.x + m0 * x.k + b * f.i.block, x.k, m1 - m0, acc, N * kRows);
  }
  for (int64_t m = m0; m < m1; ++m)
    for (int n = 0; n < N; ++n) finish(out, w.rows, m, g + n, loadf(acc + kRows * (N * (m - m0) + n)));
}

static void linear_float(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  for (int64_t m0 = 0; m0 < x.m; m0 += kChunk) {
    const int64_t m1 = m0 + kChunk < x.m ? m0 + kChunk : x.m;
    int64_t g = g0;
    for (; g + kFloatVectors <= g1; g += kFloatVectors) linear_floats<kFloatVectors>(w, x, out, m0, m1, g);
    if constexpr (kFloatVectors > 1)
      for (; g < g1; ++g) linear_floats<1>(w, x, out, m0, m1, g);
  }
}

static void linear(const Matrix& w, const Activations& x, const Output& out, int64_t g0, int64_t g1) {
  x.q ? linear_int8(w, x, out, g0, g1) : linear_float(w, x, out, g0, g1);
}

}}  // namespace iqtorch::IQTORCH_ISA

#include "rows.inl"

#ifndef IQTORCH_TILED
#define IQTORCH_TILED nullptr, nullptr, nullptr, nullptr, INT64_MAX, INT64_MAX
#endif

#define IQTORCH_KERNELS(isa)                                                                                                    \
  const Kernels* kernels_##isa() {                                                                                              \
    static const Kernels table = {#isa, isa::accepts,   isa::to_float,   isa::from_float, isa::sums_of, isa::quantize,   \
                                  isa::linear, isa::dequantize, isa::gather_rows, isa::transposed, IQTORCH_TILED};              \
    return &table;                                                                                                              \
  }
