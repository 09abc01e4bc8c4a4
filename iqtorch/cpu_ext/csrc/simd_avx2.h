// AVX2 with FMA and F16C, and with AVX-VNNI if IQ_VNNI is defined: 16 rows are two registers.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace iqtorch { namespace IQTORCH_ISA {

#ifdef IQ_VNNI
constexpr bool kSignedDot = false;
#else
constexpr bool kSignedDot = true;
#define IQ_SIGNED_DOT
#endif
#define IQ_OWN_GRIDS "grids_avx2.inl"
constexpr bool kUnrolls = false;  // see each_cell
// Rows of activations, and groups of 16 rows of weights, whose sums fit the registers.
constexpr int kBatch = 3, kBatchGroups = 1;
constexpr int kFloatRows = 6, kFloatVectors = 1;  // the same in float32

struct U8 { __m256i v[2]; };
struct I32 { __m256i v[2]; };
struct F32 { __m256 v[2]; };

#define IQ_INLINE __attribute__((always_inline))
#define IQ_FN inline IQ_INLINE
#define IQ_PRAGMA(text) _Pragma(#text)
#define IQ_UNROLL(n) IQ_PRAGMA(GCC unroll n)

// Four bytes, again and again. From memory: GCC would go through an integer register.
IQ_FN __m256i every_four(const void* x) {
  __m256i v;
  __asm__("vpbroadcastd %1, %0" : "=x"(v) : "m"(*(const int32_t(*)[1])x));
  return v;
}
IQ_FN __m256i loadu(const void* p, int h) { return _mm256_loadu_si256((const __m256i*)p + h); }
IQ_FN U8 load(const void* p) { return {{loadu(p, 0), loadu(p, 1)}}; }
IQ_FN void store(void* p, U8 a) {
  _mm256_storeu_si256((__m256i*)p, a.v[0]);
  _mm256_storeu_si256((__m256i*)p + 1, a.v[1]);
}
IQ_FN __m256i bits1(__m256i a, int shift, int mask) {
  return _mm256_and_si256(shift ? _mm256_srli_epi16(a, shift) : a, _mm256_set1_epi8((char)mask));
}
IQ_FN U8 bits(U8 a, int shift, int mask) { return {{bits1(a.v[0], shift, mask), bits1(a.v[1], shift, mask)}}; }
// Lanes of 16 bits to the right, or to the left if `n` is negative; bits that cross bytes are for the caller to mask.
IQ_FN __m256i shifted1(__m256i a, int n) { return n > 0 ? _mm256_srli_epi16(a, n) : n < 0 ? _mm256_slli_epi16(a, -n) : a; }
IQ_FN U8 shifted(U8 a, int n) { return {{shifted1(a.v[0], n), shifted1(a.v[1], n)}}; }
// a | (b & mask)
IQ_FN U8 or_masked(U8 a, U8 b, int mask) {
  const __m256i m = _mm256_set1_epi8((char)mask);
  return {{_mm256_or_si256(a.v[0], _mm256_and_si256(b.v[0], m)), _mm256_or_si256(a.v[1], _mm256_and_si256(b.v[1], m))}};
}
IQ_FN U8 shifted_and(U8 a, int n, int mask) {
  const __m256i m = _mm256_set1_epi8((char)mask);
  return {{_mm256_and_si256(shifted1(a.v[0], n), m), _mm256_and_si256(shifted1(a.v[1], n), m)}};
}
IQ_FN U8 operator|(U8 a, U8 b) { return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}}; }
IQ_FN U8 flip(U8 a, int mask) {
  __m256i m = _mm256_set1_epi8((char)mask);
  return {{_mm256_xor_si256(a.v[0], m), _mm256_xor_si256(a.v[1], m)}};
}
IQ_FN __m256i abs_difference1(__m256i a, __m256i b) { return _mm256_sub_epi8(_mm256_max_epu8(a, b), _mm256_min_epu8(a, b)); }
IQ_FN U8 abs_difference(U8 a, int c) {
  __m256i b = _mm256_set1_epi8((char)c);
  return {{abs_difference1(a.v[0], b), abs_difference1(a.v[1], b)}};
}
IQ_FN U8 add(U8 a, U8 b) { return {{_mm256_add_epi8(a.v[0], b.v[0]), _mm256_add_epi8(a.v[1], b.v[1])}}; }
IQ_FN U8 fill(int c) { return {{_mm256_set1_epi8((char)c), _mm256_set1_epi8((char)c)}}; }
IQ_FN U8 add(U8 a, int c) {
  __m256i b = _mm256_set1_epi8((char)c);
  return {{_mm256_add_epi8(a.v[0], b), _mm256_add_epi8(a.v[1], b)}};
}

template <int N> struct Table { __m256i v[N / 16]; };
template <int N> IQ_FN Table<N> load_table(const uint8_t* p) {
  Table<N> t;
  for (int i = 0; i < N / 16; ++i) t.v[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p + i));
  return t;
}
// Shifting an index bit into the sign bit of its byte selects between the halves of a longer table.
IQ_FN __m256i choose(__m256i index, int bit, __m256i low, __m256i high) {
  return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(index, 7 - bit));
}
template <int N> IQ_FN __m256i lookup1(Table<N> t, __m256i a) {
  if (N == 16) return _mm256_shuffle_epi8(t.v[0], a);
  __m256i low = choose(a, 4, _mm256_shuffle_epi8(t.v[0], a), _mm256_shuffle_epi8(t.v[1 % (N / 16)], a));
  if (N == 32) return low;
  __m256i high = choose(a, 4, _mm256_shuffle_epi8(t.v[2 % (N / 16)], a), _mm256_shuffle_epi8(t.v[3 % (N / 16)], a));
  return choose(a, 5, low, high);
}
template <int N> IQ_FN U8 lookup(Table<N> t, U8 a) { return {{lookup1<N>(t, a.v[0]), lookup1<N>(t, a.v[1])}}; }
// The upper bits of an index stay where they are: bit `at` of the bytes of `high`, and the next one of tables of 64.
#define IQ_SPLIT_TABLES
template <int N> IQ_FN __m256i lookup_split1(const Table<N>& t, __m256i low, __m256i high, int at) {
  const __m256i first = choose(high, at, _mm256_shuffle_epi8(t.v[0], low), _mm256_shuffle_epi8(t.v[1], low));
  if (N == 32) return first;
  const __m256i second = choose(high, at, _mm256_shuffle_epi8(t.v[2 % (N / 16)], low), _mm256_shuffle_epi8(t.v[3 % (N / 16)], low));
  return choose(high, at + 1, first, second);
}
template <int N> IQ_FN U8 lookup_split(const Table<N>& t, U8 low, U8 high, int at) {
  return {{lookup_split1<N>(t, low.v[0], high.v[0], at), lookup_split1<N>(t, low.v[1], high.v[1], at)}};
}

// First and second members of the pairs apart, 16 entries a register.
struct PairTable { Table<32> first, second; };
IQ_FN PairTable load_pairs(const uint8_t* p) {
  alignas(16) uint8_t a[32], b[32];
  for (int i = 0; i < 32; ++i) a[i] = p[2 * i], b[i] = p[2 * i + 1];
  return {load_table<32>(a), load_table<32>(b)};
}
IQ_FN __m256i lookup_pairs1(const PairTable& t, __m256i a) {
  // the code into the low byte of the lane for the first table, into the high byte for the second
  __m256i code = _mm256_and_si256(a, _mm256_set1_epi16(31));
  code = _mm256_or_si256(code, _mm256_slli_epi16(code, 8));
  __m256i first = lookup1<32>(t.first, code), second = lookup1<32>(t.second, code);
  return _mm256_blendv_epi8(first, second, _mm256_set1_epi16((short)0xff00));
}
IQ_FN U8 lookup_pairs(const PairTable& t, U8 a) { return {{lookup_pairs1(t, a.v[0]), lookup_pairs1(t, a.v[1])}}; }
IQ_FN U8 shift16(U8 a, int n) { return {{_mm256_srli_epi16(a.v[0], n), _mm256_srli_epi16(a.v[1], n)}}; }
IQ_FN U8 widen16(const uint8_t* p) {
  return {{_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p + 1))}};
}
IQ_FN U8 and16_or(U8 a, int mask, U8 b) {
  __m256i m = _mm256_set1_epi16((short)mask);
  return {{_mm256_or_si256(_mm256_and_si256(a.v[0], m), b.v[0]), _mm256_or_si256(_mm256_and_si256(a.v[1], m), b.v[1])}};
}

IQ_FN U8 mirror(U8 a, U8 signs, int q, int total) {
  const U8 other = {{_mm256_sub_epi8(_mm256_set1_epi8((char)total), a.v[0]), _mm256_sub_epi8(_mm256_set1_epi8((char)total), a.v[1])}};
  return {{choose(signs.v[0], q, a.v[0], other.v[0]), choose(signs.v[1], q, a.v[1], other.v[1])}};
}
IQ_FN U8 as_bytes(I32 a) { return {{a.v[0], a.v[1]}}; }
IQ_FN I32 as_i32(U8 a) { return {{a.v[0], a.v[1]}}; }
IQ_FN I32 load8(const uint8_t* p) {
  return {{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))}};
}
IQ_FN I32 load16(const uint8_t* p) {
  return {{_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))}};
}
IQ_FN I32 load32(const uint8_t* p) { return {{loadu(p, 0), loadu(p, 1)}}; }
// `value` in the lanes of rows r whose byte p[r] has a bit, else 0.
IQ_FN __m256i where_bit1(const uint8_t* p, int bit, __m256i value) {
  const __m256i mask = _mm256_set1_epi32(1 << bit), bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  return _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(bytes, mask), mask), value);
}
IQ_FN I32 where_bit(const uint8_t* p, int bit, I32 value) { return {{where_bit1(p, bit, value.v[0]), where_bit1(p + 8, bit, value.v[1])}}; }
template <class T> IQ_FN T kept(T a) { return a; }
IQ_FN I32 set(int32_t c) { return {{_mm256_set1_epi32(c), _mm256_set1_epi32(c)}}; }
IQ_FN I32 shift_right(I32 a, int n) { return {{_mm256_srli_epi32(a.v[0], n), _mm256_srli_epi32(a.v[1], n)}}; }
IQ_FN I32 shift_left(I32 a, int n) { return {{_mm256_slli_epi32(a.v[0], n), _mm256_slli_epi32(a.v[1], n)}}; }
IQ_FN I32 operator&(I32 a, I32 b) { return {{_mm256_and_si256(a.v[0], b.v[0]), _mm256_and_si256(a.v[1], b.v[1])}}; }
IQ_FN I32 operator|(I32 a, I32 b) { return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}}; }
IQ_FN I32 operator^(I32 a, I32 b) { return {{_mm256_xor_si256(a.v[0], b.v[0]), _mm256_xor_si256(a.v[1], b.v[1])}}; }
IQ_FN I32 operator+(I32 a, I32 b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
IQ_FN I32 operator*(I32 a, I32 b) { return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}}; }
IQ_FN __m256i dot1(__m256i acc, __m256i w, __m256i x) {
#ifdef IQ_VNNI
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else  // operands of at most 128 times int8 sum in pairs within 16 bits; wider ones: dot_signed, signed_pairs
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
// A sum as it stands: GCC would make a tree of a chain of sums, whose leaves do not fit the 16 registers.
template <class T> IQ_FN T in_order(T a) {
  __asm__("" : "+x"(a.v[0]), "+x"(a.v[1]));
  return a;
}
template <bool Narrow> IQ_FN I32 dot(I32 acc, U8 w, const void* x) {
  __m256i b = every_four(x);
  return in_order(I32{{dot1(acc.v[0], w.v[0], b), dot1(acc.v[1], w.v[1], b)}});
}
IQ_FN void prefetch_line(const uint8_t* p) { __builtin_prefetch(p); }

// Numbers of 16 rows as bytes: element e of a field of `Count` numbers in the rows arrangement (layout.py).
template <int Bits, int Count, int Low = 0> IQ_FN __m128i rows_bytes(const uint8_t* p, int e) {
  constexpr int width = Bits & 8 ? 8 : Bits & 4 ? 4 : Bits & 2 ? 2 : 1;
  __m128i v = _mm_loadu_si128((const __m128i*)(p + 16 * (e * width / 8)));
  const int shift = e * width % 8 - Low;
  if constexpr (width < 8) {
    v = shift > 0 ? _mm_srli_epi16(v, shift) : shift < 0 ? _mm_slli_epi16(v, -shift) : v;
    v = _mm_and_si128(v, _mm_set1_epi8((char)(((1 << width) - 1) << Low)));
  }
  if constexpr (Bits > width) v = _mm_or_si128(v, rows_bytes<Bits - width, Count, Low + width>(p + 16 * Count * width / 8, e));
  return v;
}

// The same for numbers of 9 to 15 bits, as words of rows 0 .. 7 and 8 .. 15: parts are put together before they are widened.
#define IQ_ROWS_WORDS
struct Words { __m128i v[2]; };
template <int Bits, int Count> IQ_FN Words rows_words(const uint8_t* p, int e) {
  const __m128i low = _mm_loadu_si128((const __m128i*)(p + 16 * e)), high = rows_bytes<Bits - 8, Count>(p + 16 * Count, e);
  return {{_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)}};
}
IQ_FN I32 widened(Words a) { return {{_mm256_cvtepu16_epi32(a.v[0]), _mm256_cvtepu16_epi32(a.v[1])}}; }

#ifdef IQ_VNNI
template <bool Narrow> IQ_FN I32 dot_once(I32 acc, U8 w, const void* x) { return dot<Narrow>(acc, w, x); }
IQ_FN I32 byte_sums(I32 acc, I32 a) {
  __m256i one = _mm256_set1_epi8(1);
  return {{dot1(acc.v[0], a.v[0], one), dot1(acc.v[1], a.v[1], one)}};
}
#else
// Sums of pairs of products in 16 bits, for small operands (see multiply_with).
#define IQ_PAIR_SUMS
struct Pairs { __m256i v[2]; };
IQ_FN Pairs pair_products(U8 w, const void* x) {
  const __m256i b = every_four(x);
  return {{_mm256_maddubs_epi16(w.v[0], b), _mm256_maddubs_epi16(w.v[1], b)}};
}
IQ_FN Pairs operator+(Pairs a, Pairs b) { return in_order(Pairs{{_mm256_add_epi16(a.v[0], b.v[0]), _mm256_add_epi16(a.v[1], b.v[1])}}); }
IQ_FN I32 add_pairs(I32 acc, Pairs a) {
  const __m256i one = _mm256_set1_epi16(1);
  return {{_mm256_add_epi32(acc.v[0], _mm256_madd_epi16(a.v[0], one)), _mm256_add_epi32(acc.v[1], _mm256_madd_epi16(a.v[1], one))}};
}
#endif

#ifdef IQ_PAIR_SUMS
// Scales are 16-bit integers, twice in each lane: one instruction multiplies sums of pairs by them and adds the two (cells.inl).
#define IQ_SCALE_PAIRS
template <int N> IQ_FN void flip_table(Table<N>& t, int mask) {
  for (int i = 0; i < N / 16; ++i) t.v[i] = _mm256_xor_si256(t.v[i], _mm256_set1_epi8((char)mask));
}
IQ_FN I32 scaled_pairs(I32 total, Pairs a, I32 scale) {
  return in_order(I32{{_mm256_add_epi32(total.v[0], _mm256_madd_epi16(a.v[0], scale.v[0])),
                       _mm256_add_epi32(total.v[1], _mm256_madd_epi16(a.v[1], scale.v[1]))}});
}
// Pairs of products with signed bytes (operands minus 128): their magnitudes times x with their signs, 2 * 128 * 127 at most.
IQ_FN Pairs signed_pairs(U8 w, const void* x) {
  const __m256i b = every_four(x);
  return {{_mm256_maddubs_epi16(_mm256_abs_epi8(w.v[0]), _mm256_sign_epi8(b, w.v[0])),
           _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[1]), _mm256_sign_epi8(b, w.v[1]))}};
}
// total + scale * factor * x, for x of 16 bits; factors have a zero above each number.
IQ_FN I32 add_scaled(I32 total, I32 scale, I32 factor, const int32_t* x) {
  const __m256i b = every_four(x);
  return {{_mm256_add_epi32(total.v[0], _mm256_madd_epi16(_mm256_mullo_epi16(scale.v[0], factor.v[0]), b)),
           _mm256_add_epi32(total.v[1], _mm256_madd_epi16(_mm256_mullo_epi16(scale.v[1], factor.v[1]), b))}};
}
// Signed bytes of 16 rows, twice in each lane.
IQ_FN I32 twice(__m128i a) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_shuffle_epi32(a, 0xd8));
  return {{_mm256_unpacklo_epi16(words, words), _mm256_unpackhi_epi16(words, words)}};
}
// Numbers of 16 bits, twice in each lane.
IQ_FN I32 twice(I32 a) { return (a & set(0xffff)) | shift_left(a, 16); }
IQ_FN __m128i scale_of(Table<16> t, __m128i stored) { return _mm_shuffle_epi8(_mm256_castsi256_si128(t.v[0]), stored); }
IQ_FN __m128i scale_of(Table<32> t, __m128i stored) { return _mm256_castsi256_si128(lookup1<32>(t, _mm256_castsi128_si256(stored))); }

#define IQ_FOUR_SUMS
// Byte j of a lane: the sum of the bytes of value[j].
IQ_FN __m256i four_sums1(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i one = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  const auto two = [&](__m256i low, __m256i high) IQ_INLINE {
    const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(low, one), _mm256_slli_epi16(_mm256_maddubs_epi16(high, one), 8));
    return _mm256_madd_epi16(sums, words);
  };
  return _mm256_or_si256(two(a, b), _mm256_slli_epi32(two(c, d), 16));
}
IQ_FN I32 four_sums(const I32* value) {
  return {{four_sums1(value[0].v[0], value[1].v[0], value[2].v[0], value[3].v[0]),
           four_sums1(value[0].v[1], value[1].v[1], value[2].v[1], value[3].v[1])}};
}
#endif

#ifdef IQ_SIGNED_DOT
IQ_FN U8 magnitude(U8 a) { return {{_mm256_abs_epi8(a.v[0]), _mm256_abs_epi8(a.v[1])}}; }
// The same, where magnitudes are known.
IQ_FN I32 dot_signed(I32 acc, U8 w, U8 size, const void* x) {
  const __m256i b = every_four(x);
  return in_order(I32{{dot1(acc.v[0], size.v[0], _mm256_sign_epi8(b, w.v[0])), dot1(acc.v[1], size.v[1], _mm256_sign_epi8(b, w.v[1]))}});
}
#endif

IQ_FN F32 loadf(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
IQ_FN void storef(float* p, F32 a) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
IQ_FN F32 setf(float c) { return {{_mm256_set1_ps(c), _mm256_set1_ps(c)}}; }
IQ_FN F32 operator+(F32 a, F32 b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
IQ_FN F32 operator-(F32 a, F32 b) { return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}}; }
IQ_FN F32 operator*(F32 a, F32 b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
IQ_FN F32 fma(F32 a, F32 b, F32 c) { return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}}; }
IQ_FN F32 to_float(I32 a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
IQ_FN F32 as_float(I32 a) { return {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}}; }
IQ_FN I32 as_int(F32 a) { return {{_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}}; }
IQ_FN I32 max(I32 a, I32 b) { return {{_mm256_max_epi32(a.v[0], b.v[0]), _mm256_max_epi32(a.v[1], b.v[1])}}; }
IQ_FN int32_t largest_of(I32 a) {
  const __m256i m = _mm256_max_epi32(a.v[0], a.v[1]);
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
IQ_FN __m128i words(__m256i a) { return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
IQ_FN void store_bytes(int8_t* p, I32 a) { _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(words(a.v[0]), words(a.v[1]))); }
IQ_FN int32_t sum_of(I32 a) {
  const __m256i t = _mm256_add_epi32(a.v[0], a.v[1]);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
IQ_FN __m256 from_half1(__m256i a) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
IQ_FN F32 from_half(I32 a) { return {{from_half1(a.v[0]), from_half1(a.v[1])}}; }
IQ_FN void store_half(uint16_t* p, F32 a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT));
}
IQ_FN __m128i bfloat16_1(__m256 a) {
  const __m256i u = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i fixed = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(fixed, fixed), 0x08));
}
IQ_FN void store_bfloat16(uint16_t* p, F32 a) {
  _mm_storeu_si128((__m128i*)p, bfloat16_1(a.v[0]));
  _mm_storeu_si128((__m128i*)(p + 8), bfloat16_1(a.v[1]));
}

}}  // namespace iqtorch::IQTORCH_ISA
