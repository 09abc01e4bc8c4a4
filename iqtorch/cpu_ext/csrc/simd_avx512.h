// AVX-512 with BW, VL, DQ, VNNI and VBMI: 16 rows are one register.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace iqtorch { namespace IQTORCH_ISA {

constexpr bool kSignedDot = false;
#define IQ_OWN_GRIDS "grids_avx512.inl"
#define IQ_FOLDS
constexpr bool kUnrolls = true;  // see each_cell
// Rows of activations, and groups of 16 rows of weights, whose sums fit the registers.
constexpr int kBatch = 4, kBatchGroups = 2;
constexpr int kFloatRows = 8, kFloatVectors = 2;  // the same in float32

struct U8 { __m512i v; };
struct I32 { __m512i v; };
struct F32 { __m512 v; };

#define IQ_INLINE __attribute__((always_inline))
#define IQ_FN inline IQ_INLINE
#define IQ_PRAGMA(text) _Pragma(#text)
#define IQ_UNROLL(n) IQ_PRAGMA(GCC unroll n)

IQ_FN U8 load(const void* p) { return {_mm512_loadu_si512(p)}; }
IQ_FN void store(void* p, U8 a) { _mm512_storeu_si512(p, a.v); }
// Shifts are of 16-bit lanes; the mask removes what crosses from the neighbouring byte.
IQ_FN U8 bits(U8 a, int shift, int mask) {
  __m512i s = shift ? _mm512_srli_epi16(a.v, shift) : a.v;
  return {_mm512_and_si512(s, _mm512_set1_epi8((char)mask))};
}
// Lanes of 16 bits to the right, or to the left if `shift` is negative; bits that cross bytes are for the caller to mask.
IQ_FN U8 shifted(U8 a, int shift) {
  return {shift > 0 ? _mm512_srli_epi16(a.v, (unsigned)shift) : shift < 0 ? _mm512_slli_epi16(a.v, (unsigned)-shift) : a.v};
}
// a | (b & mask); b, which is a fresh number more often than a, is overwritten.
IQ_FN U8 or_masked(U8 a, U8 b, int mask) { return {_mm512_ternarylogic_epi32(b.v, _mm512_set1_epi8((char)mask), a.v, 0xEA)}; }
IQ_FN U8 flip(U8 a, int mask) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8((char)mask))}; }
IQ_FN U8 abs_difference(U8 a, int c) {
  __m512i b = _mm512_set1_epi8((char)c);
  return {_mm512_sub_epi8(_mm512_max_epu8(a.v, b), _mm512_min_epu8(a.v, b))};
}
IQ_FN U8 add(U8 a, U8 b) { return {_mm512_add_epi8(a.v, b.v)}; }
IQ_FN U8 add(U8 a, int c) { return {_mm512_add_epi8(a.v, _mm512_set1_epi8((char)c))}; }
IQ_FN U8 fill(int c) { return {_mm512_set1_epi8((char)c)}; }

template <int N> struct Table { __m512i v; };
template <int N> IQ_FN Table<N> load_table(const uint8_t* p) {
  if (N == 16) return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))};
  if (N == 32) return {_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p))};
  return {_mm512_loadu_si512(p)};
}
template <int N> IQ_FN U8 lookup(Table<N> t, U8 a) {
  return {N == 16 ? _mm512_shuffle_epi8(t.v, a.v) : _mm512_permutexvar_epi8(a.v, t.v)};
}

struct PairTable { __m512i v; };
IQ_FN PairTable load_pairs(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
IQ_FN U8 lookup_pairs(PairTable t, U8 a) { return {_mm512_permutexvar_epi16(a.v, t.v)}; }
IQ_FN U8 shift16(U8 a, int shift) { return {_mm512_srli_epi16(a.v, shift)}; }
IQ_FN U8 widen16(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
IQ_FN U8 and16_or(U8 a, int mask, U8 b) {
  return {_mm512_ternarylogic_epi32(a.v, _mm512_set1_epi16((short)mask), b.v, 0xEA)};
}

IQ_FN U8 mirror(U8 a, U8 signs, int q, int total) {
  __mmask64 m = _mm512_test_epi8_mask(signs.v, _mm512_set1_epi8((char)(1 << q)));
  return {_mm512_mask_sub_epi8(a.v, m, _mm512_set1_epi8((char)total), a.v)};
}
IQ_FN U8 as_bytes(I32 a) { return {a.v}; }
IQ_FN I32 as_i32(U8 a) { return {a.v}; }
IQ_FN I32 load8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
IQ_FN I32 load16(const uint8_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
IQ_FN I32 load32(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// `value` in the lanes of rows r whose byte p[r] has a bit, else 0.
IQ_FN I32 where_bit(const uint8_t* p, int bit, I32 value) {
  const __m128i top = _mm_slli_epi16(_mm_loadu_si128((const __m128i*)p), (unsigned)(7 - bit));
  return {_mm512_maskz_mov_epi32(_mm_movepi8_mask(top), value.v)};
}
// A number that stays in a register: GCC would load it, or broadcast it, again for every use.
IQ_FN U8 kept(U8 a) {
  __asm__("" : "+v"(a.v));
  return a;
}
IQ_FN I32 kept(I32 a) {
  __asm__("" : "+v"(a.v));
  return a;
}
IQ_FN I32 set(int32_t c) { return {_mm512_set1_epi32(c)}; }
IQ_FN I32 shift_right(I32 a, int n) { return {_mm512_srli_epi32(a.v, (unsigned)n)}; }
IQ_FN I32 shift_left(I32 a, int n) { return {_mm512_slli_epi32(a.v, (unsigned)n)}; }
IQ_FN I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
IQ_FN I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
IQ_FN I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
IQ_FN I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
IQ_FN I32 operator*(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <bool Narrow> IQ_FN I32 dot(I32 acc, U8 w, const void* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(four))};
}
// For x that is used once: one instruction, which GCC 12 does not make of the above. In order with prefetches, which GCC would bunch.
IQ_FN void prefetch_line(const uint8_t* p) { __asm__ volatile("prefetcht0 %0" ::"m"(*p)); }
template <bool Narrow> IQ_FN I32 dot_once(I32 acc, U8 w, const void* x) {
  __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*(const int32_t(*)[1])x));
  return acc;
}
IQ_FN I32 byte_sums(I32 acc, I32 a) { return {_mm512_dpbusd_epi32(acc.v, a.v, _mm512_set1_epi8(1))}; }

IQ_FN F32 loadf(const float* p) { return {_mm512_loadu_ps(p)}; }
IQ_FN void storef(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
IQ_FN F32 setf(float c) { return {_mm512_set1_ps(c)}; }
IQ_FN F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
IQ_FN F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
IQ_FN F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
IQ_FN F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
IQ_FN F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
IQ_FN F32 as_float(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
// Numbers by their low 4 or 5 bits.
#define IQ_FLOAT_TABLES
template <int Bits> struct FloatTable { __m512 v[Bits - 3]; };
template <int Bits> IQ_FN F32 lookup(const FloatTable<Bits>& t, I32 a) {
  return {Bits == 4 ? _mm512_permutexvar_ps(a.v, t.v[0]) : _mm512_permutex2var_ps(t.v[0], a.v, t.v[Bits - 4])};
}
IQ_FN I32 as_int(F32 a) { return {_mm512_castps_si512(a.v)}; }
IQ_FN I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
// Lane i of the result is what the lanes of v[i] combine to; N = 8 or 16 of them.
#define IQ_COMBINES
template <int N, class Op> IQ_FN I32 combined(const I32* v, Op op) {
  __m512i a[8], b[4], c[2];
  IQ_UNROLL(8)
  for (int i = 0; i < N / 2; ++i)
    a[i] = op(I32{_mm512_unpacklo_epi32(v[2 * i].v, v[2 * i + 1].v)}, I32{_mm512_unpackhi_epi32(v[2 * i].v, v[2 * i + 1].v)}).v;
  IQ_UNROLL(4)
  for (int i = 0; i < N / 4; ++i) b[i] = op(I32{_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1])}, I32{_mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1])}).v;
  IQ_UNROLL(2)
  for (int i = 0; i < N / 8; ++i)
    c[i] = op(I32{_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88)}, I32{_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xdd)}).v;
  const __m512i last = N == 16 ? c[1] : c[0];
  return op(I32{_mm512_shuffle_i32x4(c[0], last, 0x88)}, I32{_mm512_shuffle_i32x4(c[0], last, 0xdd)});
}
template <int N> IQ_FN I32 each_largest(const I32* v) {
  return combined<N>(v, [](I32 a, I32 b) IQ_INLINE { return max(a, b); });
}
template <int N> IQ_FN I32 each_sum(const I32* v) {
  return combined<N>(v, [](I32 a, I32 b) IQ_INLINE { return a + b; });
}
IQ_FN void store_bytes(int8_t* p, I32 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
IQ_FN F32 from_half(I32 a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
IQ_FN void store_half(uint16_t* p, F32 a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }
IQ_FN void store_bfloat16(uint16_t* p, F32 a) {
  const __m512i u = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0))));
}

}}  // namespace iqtorch::IQTORCH_ISA
