// Grids by loads of whole entries, two or four rows to a register: a gather of 8 takes as long as 16 loads on Zen, and an entry of
// 8 weights serves two vectors.

namespace iqtorch { namespace IQTORCH_ISA {

template <int Bits, int Vec, int Mode> class GridDecoder {
 public:
  static constexpr bool kSmall = false, kUnrolled = false;
  static constexpr int kMost = 127;
  const I32 variant;

  explicit IQ_FN GridDecoder(const Format& f, int = 0)
      : variant(bytes_of(f.i.delta)), table_(f.table), sign_(f.i.sign_bits.plane[0].offset), total_(2 * f.i.bias) {}

  template <class Variant, class Sink> IQ_FN void decode(const uint8_t* tile, int cell, Variant& own, Sink sink) const {
    U8 signs = fill(0);
    if constexpr (Mode == kSignBits) signs = load(tile + sign_ + kVector * cell);
    IQ_UNROLL(4)
    for (int part = 0; part < 4; ++part) {  // 8 weights
      U8 two[2];
      if constexpr (Vec == 8) {
        entries8(Codes(tile, 4 * cell + part), two);
      } else {
        two[0] = entries4(Codes(tile, 8 * cell + 2 * part));
        two[1] = entries4(Codes(tile, 8 * cell + 2 * part + 1));
      }
      U8 spread = fill(0);
      if constexpr (Mode == kSignParity) spread = row_signs(rows_bytes<7, 32>(tile + sign_, 4 * cell + part));
      IQ_UNROLL(2)
      for (int i = 0; i < 2; ++i) {
        const int q = 2 * part + i;
        U8 v = two[i];
        if constexpr (Mode == kSignBits) v = mirror(v, signs, bit_of(q), total_);
        if constexpr (Mode == kSignParity) v = mirror_bytes(v, spread, i, total_);
        sink(q, own.add(q, v));
      }
    }
  }

 private:
  // Element e of 16 rows: bytes where they are, or words. Those go through integer registers four at a time: single ones take two
  // vector instructions each, and by way of memory they wait for the store.
  class Codes {
   public:
    IQ_FN Codes(const uint8_t* tile, int e) : byte_(tile + kRows * e) {
      if constexpr (Bits > 8) {
        const Words words = rows_words<Bits, kMaxBlock / Vec>(tile, e);
        for (int h = 0; h < 2; ++h) four_[2 * h] = _mm_cvtsi128_si64(words.v[h]), four_[2 * h + 1] = _mm_extract_epi64(words.v[h], 1);
      }
    }
    IQ_FN size_t operator[](int row) const { return Bits > 8 ? (uint16_t)(four_[row / 4] >> (16 * (row % 4))) : byte_[row]; }

   private:
    const uint8_t* byte_;
    uint64_t four_[Bits > 8 ? kRows / 4 : 1];
  };

  // Entries of rows a and a + 1.
  IQ_FN __m128 pair(const Codes& code, int a) const {
    return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd((const double*)(table_ + 8 * code[a])), (const double*)(table_ + 8 * code[a + 1])));
  }
  IQ_FN void entries8(const Codes& code, U8* two) const {
    IQ_UNROLL(2)
    for (int h = 0; h < 2; ++h) {
      const int r = 8 * h;
      const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(pair(code, r)), pair(code, r + 4), 1);
      const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(pair(code, r + 2)), pair(code, r + 6), 1);
      two[0].v[h] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
      two[1].v[h] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
    }
  }
  IQ_FN __m128i four(const Codes& code, int a) const {
    const auto at = [&](int row) IQ_INLINE {
      int32_t entry;
      __builtin_memcpy(&entry, table_ + 4 * code[row], 4);
      return entry;
    };
    const __m128i first = _mm_insert_epi32(_mm_cvtsi32_si128(at(a)), at(a + 1), 1);
    const __m128i second = _mm_insert_epi32(_mm_cvtsi32_si128(at(a + 2)), at(a + 3), 1);
    return _mm_unpacklo_epi64(first, second);
  }
  IQ_FN U8 entries4(const Codes& code) const {
    return {{_mm256_inserti128_si256(_mm256_castsi128_si256(four(code, 0)), four(code, 4), 1),
             _mm256_inserti128_si256(_mm256_castsi128_si256(four(code, 8)), four(code, 12), 1)}};
  }

  // Seven signs of each row -> eight by parity, in the four bytes of the row's lane.
  static IQ_FN U8 row_signs(__m128i seven) {
    const __m128i odd = _mm_set_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0);
    const __m128i nibble = _mm_and_si128(_mm_xor_si128(seven, _mm_srli_epi16(seven, 4)), _mm_set1_epi8(15));
    const __m256i eight = _mm256_broadcastsi128_si256(_mm_or_si128(seven, _mm_shuffle_epi8(odd, nibble)));
    const __m256i rows = _mm256_set_epi32(0x07070707, 0x06060606, 0x05050505, 0x04040404, 0x03030303, 0x02020202, 0x01010101, 0);
    return {{_mm256_shuffle_epi8(eight, rows), _mm256_shuffle_epi8(eight, _mm256_add_epi8(rows, _mm256_set1_epi8(8)))}};
  }
  static IQ_FN __m256i mirror1(__m256i a, __m256i signs, __m256i bit, int total) {
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bit), bit);
    return _mm256_blendv_epi8(a, _mm256_sub_epi8(_mm256_set1_epi8((char)total), a), set);
  }
  static IQ_FN U8 mirror_bytes(U8 a, U8 signs, int half, int total) {
    const __m256i bit = _mm256_set1_epi32(half ? (int)0x80402010 : 0x08040201);
    return {{mirror1(a.v[0], signs.v[0], bit, total), mirror1(a.v[1], signs.v[1], bit, total)}};
  }

  const uint8_t* table_;
  int sign_, total_;
};

}}  // namespace iqtorch::IQTORCH_ISA
