// Grids by permutations of bytes instead of loads from a table in memory (a gather of 16 takes 20 cycles on Zen 5).
// A grid has at most four levels (8 weights per code) or eight (4 weights), so that 16 bits hold an entry: two tables of bytes,
// which are permuted 128 entries at a time. layout.py appends them to the operands, then the levels, then the signs of parity.

namespace iqtorch { namespace IQTORCH_ISA {

template <int Bits, int Vec, int Mode> class GridDecoder {
 public:
  static constexpr bool kSmall = false, kUnrolled = false;
  static constexpr int kMost = 127;
  const I32 variant;

  explicit IQ_FN GridDecoder(const Format& f, int = 0)
      : variant(bytes_of(f.i.delta)), low_(f.table + (Vec << Bits)), sign_(f.i.sign_bits.plane[0].offset), total_(2 * f.i.bias),
        levels_(_mm512_loadu_si512(low_ + (2 << Bits))) {
    if (Mode == kSignParity) {
      even_ = _mm512_loadu_si512(low_ + (2 << Bits) + 64);
      odd_ = _mm512_loadu_si512(low_ + (2 << Bits) + 128);
    }
  }

  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    __m512i signs = {};
    if constexpr (Mode == kSignParity) signs = parity_signs(tile + sign_, cell);
    if constexpr (Mode == kSignBits) signs = _mm512_loadu_si512(tile + sign_ + kVector * cell);
    IQ_UNROLL(2)
    for (int part = 0; part < 8 / Vec; ++part) {  // 64 codes: four elements of 16 rows
      const __m512i code = _mm512_loadu_si512(tile + 64 * (cell * (8 / Vec) + part));
      Masks bit;
      bit.m[0] = _mm512_movepi8_mask(code);
      if constexpr (Bits > 8) high_bits(tile, cell, part, bit);
      const __m512i low = find<Bits - 7>(low_, code, bit), high = find<Bits - 7>(low_ + (1 << Bits), code, bit);
      IQ_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        if constexpr (Vec == 4) {
          const int q = 4 * part + i;
          const __m512i word = _mm512_permutex2var_epi8(low, spread(i, 0x40004000), high);
          sink(q, own.add(q, finish(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2c2824200c080400), word), signs, q)));
        } else {
          const __m512i shifts = _mm512_set1_epi64(0x2624222006040200);
          const auto half = [&](int q, __m512i words) IQ_INLINE {
            sink(q, own.add(q, finish(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread(i), words)), signs, q)));
          };
          half(2 * i, low);
          half(2 * i + 1, high);
        }
      }
    }
  }

 private:
  struct Masks {
    __mmask64 m[4];  // bits 7, 8, 9, 10 of 64 codes
  };

  // Byte 16 i + r to the four bytes of lane r.
  static IQ_FN __m512i spread(int i, int32_t more = 0) {
    const __m512i rows = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01010101)), _mm512_set1_epi32(0x10101010 * i + more));
  }
  static IQ_FN __m512i four(int64_t a, int64_t b, int64_t c, int64_t d) { return _mm512_set_epi64(d, d, c, c, b, b, a, a); }
  static IQ_FN __m512i broadcast(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }

  // Codes of a cell are elements e = 32 / Vec * cell + 4 * part ..: bits 8 and 9 from a plane of two bits, bit 8 or 10 from one of one.
  static IQ_FN void high_bits(const uint8_t* tile, int cell, int part, Masks& bit) {
    constexpr int count = kMaxBlock / Vec;
    const uint8_t* plane = tile + kRows * count;
    int next = 1;
    if constexpr (Bits > 9) {
      const __m512i two = broadcast(plane + kRows * cell);
      bit.m[1] = _mm512_test_epi8_mask(two, four(0x0101010101010101, 0x0404040404040404, 0x1010101010101010, 0x4040404040404040));
      bit.m[2] = _mm512_test_epi8_mask(two, four(0x0202020202020202, 0x0808080808080808, 0x2020202020202020, (int64_t)0x8080808080808080));
      plane += kRows * count / 4;
      next = 3;
    }
    if constexpr (Bits != 10) {
      const int e = (cell * (8 / Vec) + part) * 4;
      const __m512i lowest = four(0x0101010101010101, 0x0202020202020202, 0x0404040404040404, 0x0808080808080808);
      bit.m[next] = _mm512_test_epi8_mask(broadcast(plane + kRows * (e / 8)), e % 8 ? _mm512_slli_epi16(lowest, 4) : lowest);
    }
  }

  // Entries of 128 << N.
  template <int N> static IQ_FN __m512i find(const uint8_t* table, __m512i code, const Masks& bit) {
    if constexpr (N == 0) {
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), code, _mm512_loadu_si512(table + 64));
    } else {
      return _mm512_mask_blend_epi8(bit.m[N - 1], find<N - 1>(table, code, bit), find<N - 1>(table + (64 << N), code, bit));
    }
  }

  // Signs of the eight weights of each of the four groups of a cell: seven bits (planes of 4, 2 and 1), the last by parity.
  IQ_FN __m512i parity_signs(const uint8_t* p, int cell) const {
    const __m512i bytes = _mm512_set1_epi64(0x3830282018100800);
    const __m512i pair = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0),
                                                  _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(p + 2 * kRows * cell))));
    const auto shifted = [&](__m512i v, int first, int step) IQ_INLINE {
      const auto by = [&](int i) IQ_INLINE { return (first + step * i) * 0x0101010101010101ll; };
      return _mm512_multishift_epi64_epi8(_mm512_add_epi8(bytes, four(by(0), by(1), by(2), by(3))), v);
    };
    const __m512i four_bits = _mm512_multishift_epi64_epi8(_mm512_add_epi8(bytes, four(0, 0x0404040404040404, 0, 0x0404040404040404)), pair);
    const __m512i two = shifted(broadcast(p + kRows * (16 + cell)), 60, 2);  // to bits 4 and 5
    const __m512i low = broadcast(p + kRows * (24 + cell / 2));              // to bit 6
    const __m512i one = cell % 2 ? shifted(low, 62, 1) : shifted(low, 58, 1);
    const __m512i six = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), four_bits, two, 0xCA);
    return _mm512_permutex2var_epi8(even_, _mm512_ternarylogic_epi32(_mm512_set1_epi8(63), six, one, 0xCA), odd_);
  }

  // Levels -> operands with their signs.
  IQ_FN U8 finish(__m512i level, __m512i signs, int q) const {
    const U8 v = {_mm512_permutexvar_epi8(level, levels_)};
    if constexpr (Mode == kSignBits) return mirror(v, {signs}, bit_of(q), total_);
    if constexpr (Mode == kSignParity) {
      const __mmask64 m = _mm512_test_epi8_mask(_mm512_permutexvar_epi8(spread(q / 2), signs), _mm512_set1_epi32(q % 2 ? (int)0x80402010 : 0x08040201));
      return {_mm512_mask_sub_epi8(v.v, m, _mm512_set1_epi8((char)total_), v.v)};
    }
    return v;
  }

  const uint8_t* low_;
  int sign_, total_;
  __m512i levels_, even_, odd_;
};

}}  // namespace iqtorch::IQTORCH_ISA
