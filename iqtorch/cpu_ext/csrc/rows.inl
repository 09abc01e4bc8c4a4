// Weights and activations row by row: dequantize, embedding, the product with the transposed matrix, conversions, int8 activations.

namespace iqtorch { namespace IQTORCH_ISA {

// -- weights row by row --------------------------------------------------------------------------------------------------

// Operands of rows `first` .. `first + count` of a block, kMaxBlock apart. All before the first is read: a load would wait for
// the stores of its parts.
IQ_FN void operand_rows(const Format& f, const Panel& panel, int first, int count, uint8_t* out) {
  for (int r = 0; r < count; ++r)
    for (int v = 0; v < f.i.block / 4; ++v)
      __builtin_memcpy(out + kMaxBlock * r + 4 * v, panel.operand + kVector * v + 4 * (first + r), 4);
}

// Weights of a row of a block as the plain-torch decoder rounds them, times runtime_scale: put(k, weights k .. k + 15) for each 16.
template <class Put> IQ_FN void decode_row(const Format& f, const Sides& side, int row, const uint8_t* operand, Put put) {
  const F32 o = setf((float)-f.i.bias), factor = setf(f.f.runtime_scale);
  for (int k = 0; k < f.i.block; k += kRows) {
    const int at = kRows * (k * f.i.groups / kCell) + row;
    F32 value = setf(side.scale[at]) * (to_float(load8(operand + k)) + o);
    if (f.i.affine) value = value - setf(side.low[at]);
    put(k, value * factor);
  }
}

IQ_FN int64_t element_bytes(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

template <DType T> IQ_FN F32 load_as(const void* x, int64_t i) {
  if (T == kFloat32) return loadf((const float*)x + i);
  const I32 half = load16((const uint8_t*)x + 2 * i);
  return T == kFloat16 ? from_half(half) : as_float(shift_left(half, 16));
}

template <DType T> IQ_FN void store_as(void* out, int64_t i, F32 value) {
  if (T == kFloat32) return storef((float*)out + i, value);
  if (T == kFloat16) return store_half((uint16_t*)out + i, value);
  store_bfloat16((uint16_t*)out + i, value);
}

// run(Size<dtype>)
template <class Run> static void with_dtype(DType dtype, const Run& run) {
  if (dtype == kFloat32) return run(Size<kFloat32>{});
  if (dtype == kFloat16) return run(Size<kFloat16>{});
  run(Size<kBFloat16>{});
}

static void to_float(const void* x, DType dtype, float* out, int64_t count) {
  with_dtype(dtype, [&](auto type) {
    constexpr DType T = decltype(type)::value;
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) storef(out + i, load_as<T>(x, i));
    if (i < count) {
      IQ_ALIGNED float last[kRows] = {}, value[kRows];
      __builtin_memcpy(last, (const uint8_t*)x + element_bytes(T) * i, element_bytes(T) * (count - i));
      storef(value, load_as<T>(last, 0));
      __builtin_memcpy(out + i, value, 4 * (count - i));
    }
  });
}

static void from_float(const float* x, DType dtype, void* out, int64_t count) {
  with_dtype(dtype, [&](auto type) {
    constexpr DType T = decltype(type)::value;
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) store_as<T>(out, i, loadf(x + i));
    if (i < count) {
      IQ_ALIGNED float last[kRows] = {}, stored[kRows];
      __builtin_memcpy(last, x + i, 4 * (count - i));
      store_as<T>(stored, 0, loadf(last));
      __builtin_memcpy((uint8_t*)out + element_bytes(T) * i, stored, element_bytes(T) * (count - i));
    }
  });
}

static void dequantize(const Matrix& w, DType dtype, void* out, int64_t b0, int64_t b1, int64_t g0, int64_t g1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED uint8_t operand[kRows * kMaxBlock];
  with_dtype(dtype, [&](auto type) {
    for (int64_t g = g0; g < g1; ++g) {
      const F32 d = header_d(w, g);
      const int valid = w.rows - g * kRows < kRows ? (int)(w.rows - g * kRows) : kRows;
      for (int64_t b = b0; b < b1; ++b) {
        const uint8_t* tile = w.tiles + (g * w.blocks + b) * f.i.tile_bytes;
        family.exact_sides(f, tile, 1, d, panel.side);
        family.expand(f, tile, 1, panel.operand);
        operand_rows(f, panel, 0, valid, operand);
        for (int r = 0; r < valid; ++r) {
          const int64_t at = ((g * kRows + r) * (b1 - b0) + b - b0) * f.i.block;
          decode_row(f, panel.side, r, operand + kMaxBlock * r,
                     [&](int k, F32 value) IQ_INLINE { store_as<decltype(type)::value>(out, at + k, value); });
        }
      }
    }
  });
}

static void gather_rows(const Matrix& w, DType dtype, const int64_t* ids, void* out, int64_t i0, int64_t i1) {
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  Panel panel;
  IQ_ALIGNED uint8_t operand[kMaxBlock];
  with_dtype(dtype, [&](auto type) {
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t g = ids[i] / kRows;
      const int row = (int)(ids[i] % kRows);
      const F32 d = header_d(w, g);
      const uint8_t* tile = w.tiles + g * w.blocks * f.i.tile_bytes;
      for (int64_t b = 0; b < w.blocks; ++b, tile += f.i.tile_bytes) {
        family.exact_sides(f, tile, 1, d, panel.side);
        family.expand(f, tile, 1, panel.operand);
        operand_rows(f, panel, row, 1, operand);
        decode_row(f, panel.side, row, operand,
                   [&](int k, F32 value) IQ_INLINE { store_as<decltype(type)::value>(out, i * w.k + b * f.i.block + k, value); });
      }
    }
  });
}

static void transposed(const Matrix& w, const float* g, int64_t stride, int64_t m, bool add, float* out, int64_t b0, int64_t b1) {
  constexpr int N = kFloatVectors, width = kRows * N, depth = 4 * kRows;
  const Format& f = *w.format;
  const Family family = find_family(f.i);
  const int block = f.i.block;
  Panel panel;
  IQ_ALIGNED uint8_t operand[kRows * kMaxBlock];
  IQ_ALIGNED float weights[depth * kMaxBlock];  // [block / width][depth rows][width]
  for (int64_t b = b0; b < b1; ++b) {
    float* own = out + b * block;
    if (!add)
      for (int64_t i = 0; i < m; ++i) __builtin_memset(own + i * w.k, 0, block * sizeof(float));
    for (int64_t n0 = 0; n0 < w.rows; n0 += depth) {
      const int rows = w.rows - n0 < depth ? (int)(w.rows - n0) : depth;
      for (int first = 0; first < rows; first += kRows) {
        const int64_t group = (n0 + first) / kRows;
        const uint8_t* tile = w.tiles + (group * w.blocks + b) * f.i.tile_bytes;
        const int valid = rows - first < kRows ? rows - first : kRows;
        family.exact_sides(f, tile, 1, header_d(w, group), panel.side);
        family.expand(f, tile, 1, panel.operand);
        operand_rows(f, panel, 0, valid, operand);
        for (int r = 0; r < valid; ++r)
          decode_row(f, panel.side, r, operand + kMaxBlock * r, [&](int k, F32 value) IQ_INLINE {
            storef(weights + k / width * (depth * width) + (first + r) * width + k % width, value);
          });
      }
      for (int k = 0; k < block; k += width)
        multiply_floats<N>(weights + k * depth, rows, g + n0, stride, m, own + k, w.k);
    }
  }
}

// -- activations -----------------------------------------------------------------------------------------------------------

#ifndef IQ_COMBINES
// Lane i of the result: the largest lane of v[i], or the sum of its lanes.
template <int N> IQ_FN I32 each_largest(const I32* v) {
  IQ_ALIGNED int32_t largest[kRows] = {};
  for (int i = 0; i < N; ++i) largest[i] = largest_of(v[i]);
  return load32((const uint8_t*)largest);
}
template <int N> IQ_FN I32 each_sum(const I32* v) {
  IQ_ALIGNED int32_t sum[kRows] = {};
  for (int i = 0; i < N; ++i) sum[i] = sum_of(v[i]);
  return load32((const uint8_t*)sum);
}
#endif

// Up to a block's cells of a row of activations: int8 with a scale per 32, rounded to nearest; a cell with NaN or Inf gets a NaN scale,
// so that its products are NaN.
template <int Groups, DType T>
static void quantize_cells(const void* x, int64_t at, int cells, Sums kind, int8_t* q, float* scale, int32_t* sums) {
  constexpr int most = kMaxBlock / kCell;
  I32 largest[most], part[kRows];
  IQ_UNROLL(8)
  for (int c = 0; c < most; ++c) {
    const I32 magnitude = set(0x7fffffff);
    largest[c] = c < cells ? max(as_int(load_as<T>(x, at + c * kCell)) & magnitude, as_int(load_as<T>(x, at + c * kCell + kRows)) & magnitude) : set(0);
  }
  IQ_ALIGNED int32_t top[kRows], keep[most];
  IQ_ALIGNED float step[most], inverse[most];
  store(top, as_bytes(each_largest<most>(largest)));
  for (int c = 0; c < most; ++c) {
    float value;
    __builtin_memcpy(&value, top + c, 4);
    const bool bad = top[c] >= 0x7f800000, tiny = value < 1e-30f;
    step[c] = bad ? __builtin_nanf("") : tiny ? 0.0f : value / 127.0f;
    inverse[c] = bad || tiny ? 0.0f : 127.0f / value;
    keep[c] = bad ? 0 : -1;
  }
  IQ_UNROLL(8)
  for (int c = 0; c < most; ++c) {
    I32 half[2] = {set(0), set(0)};
    if (c < cells)
      IQ_UNROLL(2)
      for (int h = 0; h < 2; ++h) {
        const int64_t i = c * kCell + h * kRows;
        // adding 1.5 * 2^23 rounds to an integer, which then is the low bits
        const F32 own = as_float(as_int(load_as<T>(x, at + i)) & set(keep[c]));
        half[h] = as_int(own * setf(inverse[c]) + setf(12582912.0f)) + set(-0x4b400000);
        store_bytes(q + i, half[h]);
      }
    if (Groups == 1) {
      part[c] = half[0] + half[1];
    } else {
      part[2 * c] = half[0], part[2 * c + 1] = half[1];
    }
  }
  IQ_ALIGNED int32_t sum[kRows];
  store(sum, as_bytes(each_sum<most * Groups>(part)));
  for (int e = 0; e < cells * Groups; ++e) {
    const float product = -step[e / Groups] * (float)sum[e];
    const int32_t start = sum[e] * kind.start;
    __builtin_memcpy(sums + e, kind.affine ? (const void*)&product : &start, 4);
  }
  __builtin_memcpy(scale, step, cells * sizeof(float));
}

// A panel of all rows lies together: rows at a distance of K would share few sets of the first-level cache.
static void quantize(const void* x, DType dtype, int64_t k, Sums kind, int64_t row, int64_t rows, int8_t* q, float* scale, int32_t* sums) {
  constexpr int64_t panel = kMaxBlock / kCell;
  with_dtype(dtype, [&](auto type) {
    constexpr DType T = decltype(type)::value;
    const auto run = kind.groups == 1 ? quantize_cells<1, T> : quantize_cells<2, T>;
    for (int64_t first = 0; first < k / kCell; first += panel) {
      const int64_t cells = k / kCell - first < panel ? k / kCell - first : panel, at = first * rows + row * cells;
      run(x, row * k + first * kCell, (int)cells, kind, q + at * kCell, scale + at, sums + at * kind.groups);
    }
  });
}

}}  // namespace iqtorch::IQTORCH_ISA
