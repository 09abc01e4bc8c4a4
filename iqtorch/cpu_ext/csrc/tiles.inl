// Many rows of activations in bfloat16: weights are decoded a panel at a time and used from the first-level cache by all rows;
// activations wait in the second-level cache in the order in which they are used.
// (Row-major activations would put all 16 rows of a tile into one set of the first-level cache when K is a power of two.)
// What multiplies is a `Unit` (tiles_amx.inl, tiles_dot.inl): up to 32 rows of activations times 32 rows of weights.

namespace iqtorch { namespace IQTORCH_ISA {

constexpr int kTile = 16 * 32;      // bfloat16 numbers of a tile: 16 rows of 64 bytes
constexpr int kStepRows = 32;       // rows of activations, and of weights, per 2 x 2 tiles
constexpr int kResult = 4 * 256;    // floats of 2 x 2 tiles

static int64_t tiled_bytes(int64_t m, int64_t k) { return (m + kStepRows - 1) / kStepRows * kStepRows * k * 2; }

template <class Unit> static int64_t tiled_scratch() {
  return Unit::kChunkPairs * (Unit::kChunkRows / kStepRows) * kResult + Unit::kPanelColumns * kStepRows / 2;
}

// Where the cells of a step of rows from column k0 on start: a panel of columns is contiguous over all steps.
template <class Unit> IQ_FN int64_t tiled_at(int64_t steps, int64_t step, int64_t k, int64_t k0) {
  const int64_t columns = k - k0 < Unit::kPanelColumns ? k - k0 : Unit::kPanelColumns;
  return (steps * k0 + step * columns) * kStepRows;
}

// [panel of columns][step of 32 rows][cell of 32 columns][2 tiles][16 rows][32]; rows past m are zero.
template <class Unit> static void tile_rows(const void* x, DType dtype, int64_t m, int64_t k, uint16_t* tiled, int64_t step0, int64_t step1) {
  const int64_t size = element_bytes(dtype), steps = (m + kStepRows - 1) / kStepRows;
  for (int64_t s = step0; s < step1; ++s)
    for (int r = 0; r < kStepRows; ++r) {
      const int64_t row = s * kStepRows + r;
      uint16_t* p = nullptr;
      const uint8_t* in = (const uint8_t*)x + row * k * size;
      for (int64_t c = 0; c < k / kCell; ++c, p += 2 * kTile, in += kCell * size) {
        if (c % (Unit::kPanelColumns / kCell) == 0) p = tiled + tiled_at<Unit>(steps, s, k, c * kCell) + r / 16 * kTile + r % 16 * 32;
        if (row >= m) {
          _mm512_storeu_si512(p, _mm512_setzero_si512());
        } else if (dtype == kBFloat16) {
          _mm512_storeu_si512(p, _mm512_loadu_si512(in));
        } else {
          const bool wide = dtype == kFloat32;
          const F32 low = wide ? loadf((const float*)in) : from_half(load16(in));
          const F32 high = wide ? loadf((const float*)in + 16) : from_half(load16(in + 32));
          _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
        }
      }
    }
}

// Columns k0 .. k1 of row group g as tiles of pairs [k / 32][16 pairs of k][16 rows][2], every second tile of `panel`.
static void tile_weights(const Matrix& w, const Family& family, int64_t g, int64_t k0, int64_t k1, uint16_t* panel) {
  const Format& f = *w.format;
  const int block = f.i.block, per_group = 8 / f.i.groups;
  // 16 numbers of column k and 16 of column k + 1 -> pairs
  const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i pairs = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  const F32 d = header_d(w, g);
  Panel own;
  for (int64_t k = k0; k < k1; k += block) {
    const uint8_t* tile = w.tiles + (g * w.blocks + k / block) * f.i.tile_bytes;
    family.sides(f, tile, 1, d, own.side);
    family.expand(f, tile, 1, own.operand);
    for (int v = 0; v < block / 4; ++v) {
      const F32 s = loadf(own.side.scale + kRows * (v / per_group));
      F32 o = s * setf((float)-f.i.bias);
      if (f.i.affine) o = o - loadf(own.side.low + kRows * (v / per_group));
      const __m512i four = load(own.operand + kVector * v).v, byte = _mm512_set1_epi32(255);
      const F32 w0 = fma(to_float({_mm512_and_si512(four, byte)}), s, o);
      const F32 w1 = fma(to_float({_mm512_and_si512(_mm512_srli_epi32(four, 8), byte)}), s, o);
      const F32 w2 = fma(to_float({_mm512_and_si512(_mm512_srli_epi32(four, 16), byte)}), s, o);
      const F32 w3 = fma(to_float({_mm512_srli_epi32(four, 24)}), s, o);
      uint16_t* p = panel + (k - k0) / kCell * 2 * kTile + v / 8 * 2 * kTile + v % 8 * 64;
      _mm512_storeu_si512(p, _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(w1.v, w0.v)));
      _mm512_storeu_si512(p + 32, _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(w3.v, w2.v)));
    }
  }
}

template <class Unit>
static void linear_tiled(const Matrix& w, const Activations& x, const Output& out, float* scratch, int64_t g0, int64_t g1) {
  constexpr int64_t kPanelColumns = Unit::kPanelColumns, kChunkRows = Unit::kChunkRows, kChunkPairs = Unit::kChunkPairs;
  const Family family = find_family(w.format->i);
  const Unit unit;
  float* results = scratch;
  uint16_t* panel = (uint16_t*)(scratch + kChunkPairs * (kChunkRows / kStepRows) * kResult);
  for (int64_t n0 = g0; n0 < g1; n0 += 2 * kChunkPairs)
    for (int64_t m0 = 0; m0 < x.m; m0 += kChunkRows) {
      const int64_t n1 = n0 + 2 * kChunkPairs < g1 ? n0 + 2 * kChunkPairs : g1, m1 = m0 + kChunkRows < x.m ? m0 + kChunkRows : x.m;
      const int64_t steps = (m1 - m0 + kStepRows - 1) / kStepRows;
      for (int64_t k0 = 0; k0 < w.k; k0 += kPanelColumns) {
        const int64_t k1 = k0 + kPanelColumns < w.k ? k0 + kPanelColumns : w.k;
        for (int64_t n = n0; n < n1; n += 2) {
          tile_weights(w, family, n, k0, k1, panel);
          // an odd last group leaves its partner's tiles as they are: their results are never read
          if (n + 1 < n1) tile_weights(w, family, n + 1, k0, k1, panel + kTile);
          float* result = results + (n - n0) / 2 * (kChunkRows / kStepRows) * kResult;
          for (int64_t s = 0; s < steps; ++s)
            unit.multiply(x.tiled + tiled_at<Unit>((x.m + kStepRows - 1) / kStepRows, m0 / kStepRows + s, w.k, k0), m1 - m0 - s * kStepRows, panel,
                          (k1 - k0) / kCell, result + s * kResult, k0 == 0);
        }
      }
      // pairs within rows within steps: rows of results are far apart, and a line is written once as a whole
      for (int64_t m = m0; m < m1; m += kStepRows)
        for (int64_t n = n0; n < n1; n += 2) {
          const float* result = results + ((n - n0) / 2 * (kChunkRows / kStepRows) + (m - m0) / kStepRows) * kResult;
          for (int64_t r = 0; r < kStepRows && m + r < m1; ++r) {
            const float* row = result + r / 16 * 512 + r % 16 * 16;
            finish(out, w.rows, m + r, n, loadf(row));
            if (n + 1 < n1) finish(out, w.rows, m + r, n + 1, loadf(row + 256));
          }
        }
    }
}

}}  // namespace iqtorch::IQTORCH_ISA

// The last of `Kernels`; rows of int8 activations from which the unit is faster than int8 dot products.
#define IQTORCH_TILES(unit, int8_rows) \
  IQTORCH_ISA::tiled_bytes, IQTORCH_ISA::tiled_scratch<unit>, IQTORCH_ISA::tile_rows<unit>, IQTORCH_ISA::linear_tiled<unit>, 16, int8_rows
