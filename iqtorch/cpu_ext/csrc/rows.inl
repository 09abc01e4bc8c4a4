// Weights and activations row by row: dequantize, embedding, the product with the transposed matrix, conversions, int8 activations.

namespace iqtorch { namespace IQTORCH_ISA {

// -- weights row by row --------------------------------------------------------------------------------------------------

// One row of a block: `block` weights as the plain-torch decoder rounds them, times runtime_scale.
IQ_FN void decode_row(const Format& f, const Panel& panel, int row, float* out) {
  const Ints& i = f.i;
  const int fine = kCell / i.groups, count = i.block / fine;
  IQ_ALIGNED uint8_t operand[kMaxBlock];
  for (int v = 0; v < i.block / 4; ++v) __builtin_memcpy(operand + 4 * v, panel.operand + kVector * v + 4 * row, 4);
  for (int g = 0; g < count; ++g) {
    const float s = panel.side.scale[kRows * g + row], o = (float)-i.bias, low = panel.side.low[kRows * g + row];
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
      family.exact_sides(f, tile, 1, d, panel.side);
      family.expand(f, tile, 1, panel.operand);
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
      family.exact_sides(f, tile, 1, d, panel.side);
      family.expand(f, tile, 1, panel.operand);
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
        family.exact_sides(f, tile, 1, header_d(w, n), panel.side);
        family.expand(f, tile, 1, panel.operand);
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

// Cells of a row of activations: int8 with a scale per 32, rounded to nearest; a cell with NaN or Inf gets a NaN scale, so that its
// products are NaN.
template <int Groups>
static void quantize_cells(const float* x, int cells, Sums kind, int8_t* q, float* scale, int32_t* sums) {
  for (int c = 0; c < cells; ++c, x += kCell, q += kCell, sums += Groups) {
    const I32 magnitude = set(0x7fffffff), low = load32((const uint8_t*)x), high = load32((const uint8_t*)(x + kRows));
    const int32_t largest = largest_of(max(low & magnitude, high & magnitude));
    float top;
    __builtin_memcpy(&top, &largest, 4);
    const bool bad = largest >= 0x7f800000, tiny = top < 1e-30f;
    const float step = bad ? __builtin_nanf("") : tiny ? 0.0f : top / 127.0f;
    const F32 inverse = setf(bad || tiny ? 0.0f : 127.0f / top), shift = setf(12582912.0f);
    const I32 keep = set(bad ? 0 : -1), back = set(-0x4b400000);
    // adding 1.5 * 2^23 rounds to an integer, which then is the low bits
    const I32 a = as_int(as_float(low & keep) * inverse + shift) + back, b = as_int(as_float(high & keep) * inverse + shift) + back;
    store_bytes(q, a);
    store_bytes(q + kRows, b);
    int32_t part[4];
    half_sums(a, part);
    half_sums(b, part + 2);
    for (int g = 0; g < Groups; ++g) {
      int32_t sum = 0;
      for (int i = 0; i < 4 / Groups; ++i) sum += part[g * 4 / Groups + i];
      const float product = -step * (float)sum;
      sum *= kind.start;
      __builtin_memcpy(sums + g, kind.affine ? (const void*)&product : &sum, 4);
    }
    scale[c] = step;
  }
}

// A panel of all rows lies together: rows at a distance of K would share few sets of the first-level cache.
static void quantize(const float* x, int64_t k, Sums kind, int64_t row, int64_t rows, int8_t* q, float* scale, int32_t* sums) {
  const auto run = kind.groups == 1 ? quantize_cells<1> : kind.groups == 2 ? quantize_cells<2> : quantize_cells<4>;
  constexpr int64_t panel = kMaxBlock / kCell;
  for (int64_t first = 0; first < k / kCell; first += panel) {
    const int64_t cells = k / kCell - first < panel ? k / kCell - first : panel, at = first * rows + row * cells;
    run(x + first * kCell, (int)cells, kind, q + at * kCell, scale + at, sums + at * kind.groups);
  }
}

}}  // namespace iqtorch::IQTORCH_ISA
