// The bfloat16 dot product of AVX-512: pairs of columns of 16 rows of weights times pairs of one row of activations.

#include "tiles.inl"

namespace iqtorch { namespace IQTORCH_ISA {

class DotUnit {
 public:
  static constexpr int kPanelColumns = 256;  // 16 KiB of weights
  static constexpr int kChunkRows = 256;     // rows of activations per pass: with the results below, less than half of a 1 MiB cache
  static constexpr int kChunkPairs = 8;      // 256 rows of weights

  void multiply(const uint16_t* x, int64_t count, const uint16_t* panel, int64_t cells, float* result, bool first) const {
    constexpr int M = 8;  // times two vectors of weights: 16 sums
    for (int m = 0; m < kStepRows && m < count; m += M) {
      const uint16_t* rows = x + m / 16 * kTile + m % 16 * 32;
      float* out = result + m / 16 * 512 + m % 16 * 16;
      __m512 a[2][M];
      IQ_UNROLL(8)
      for (int i = 0; i < M; ++i) {
        a[0][i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * i);
        a[1][i] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * i + 256);
      }
      const uint16_t* w = panel;
      for (int64_t c = 0; c < cells; ++c, rows += 2 * kTile, w += 2 * kTile) {
        IQ_UNROLL(4)
        for (int pair = 0; pair < 16; ++pair) {
          const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w + 32 * pair), w1 = (__m512bh)_mm512_loadu_si512(w + kTile + 32 * pair);
          IQ_UNROLL(8)
          for (int i = 0; i < M; ++i) {
            int32_t two;
            __builtin_memcpy(&two, rows + 32 * i + 2 * pair, 4);
            const __m512bh b = (__m512bh)_mm512_set1_epi32(two);
            a[0][i] = _mm512_dpbf16_ps(a[0][i], w0, b);
            a[1][i] = _mm512_dpbf16_ps(a[1][i], w1, b);
          }
        }
      }
      IQ_UNROLL(8)
      for (int i = 0; i < M; ++i) {
        _mm512_storeu_ps(out + 16 * i, a[0][i]);
        _mm512_storeu_ps(out + 16 * i + 256, a[1][i]);
      }
    }
  }
};

}}  // namespace iqtorch::IQTORCH_ISA
