// Sixteen float or int lanes for the encoder. Every instruction set gives the same results: the lanes are fixed, sums are
// reduced in one order, and multiply-adds are rounded once.
#pragma once
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace iqtorch { namespace IQTORCH_ISA { namespace encoder {

#define IQ_FN static inline __attribute__((always_inline))
#define IQ_INLINE inline __attribute__((always_inline))
#define IQ_EACH for (int i = 0; i < 16; ++i)

#if defined(__AVX512F__)

struct F { __m512 v; };
struct I { __m512i v; };
IQ_FN F load(const float* p) { return {_mm512_loadu_ps(p)}; }
IQ_FN I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
IQ_FN void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
IQ_FN void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
IQ_FN F set(float c) { return {_mm512_set1_ps(c)}; }
IQ_FN I seti(int32_t c) { return {_mm512_set1_epi32(c)}; }
IQ_FN F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
IQ_FN F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
IQ_FN F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
IQ_FN I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
IQ_FN F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
IQ_FN F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
IQ_FN F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
IQ_FN I truncate(F a) { return {_mm512_cvttps_epi32(a.v)}; }
IQ_FN F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
// The power of two of the exponent, without a sign; 0 of numbers below 2^-126.
IQ_FN F power_of(F a) { return {_mm512_and_ps(a.v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)))}; }
IQ_FN I times256(I a) { return {_mm512_slli_epi32(a.v, 8)}; }
// The i-th byte of each lane; N times a lane (0 if negative); entry i of a table of 16 or 32; the low bytes.
IQ_FN I byte_of(I a, int i) { return {_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * i), _mm512_set1_epi32(255))}; }
template <int N> IQ_FN I scaled_index(I a) { return {_mm512_mullo_epi32(_mm512_max_epi32(a.v, _mm512_setzero_si512()), _mm512_set1_epi32(N))}; }
IQ_FN F lookup16(F table, I i) { return {_mm512_permutexvar_ps(i.v, table.v)}; }
IQ_FN I over256(I a) { return {_mm512_srai_epi32(a.v, 8)}; }
IQ_FN I load_bytes(const int32_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
IQ_FN void store_bytes(uint8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
IQ_FN F lookup32(const float* p, I i) { return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), i.v, _mm512_loadu_ps(p + 16))}; }
// Adds to each lane the product of four unsigned bytes and four signed bytes.
IQ_FN I dot4(I sum, I bytes, I with) { return {_mm512_dpbusd_epi32(sum.v, bytes.v, with.v)}; }
// Bit i: lane i of a is less than c.
IQ_FN int below(F a, float c) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(c), _CMP_LT_OQ); }
IQ_FN F gather(const float* p, I i) { return {_mm512_i32gather_ps(i.v, p, 4)}; }
IQ_FN I gather(const int32_t* p, I i) { return {_mm512_i32gather_epi32(i.v, p, 4)}; }
// Where a < best: best = a, which = index.
IQ_FN void keep_lower(F a, I index, F& best, I& which) {
  __mmask16 m = _mm512_cmp_ps_mask(a.v, best.v, _CMP_LT_OQ);
  best.v = _mm512_mask_mov_ps(best.v, m, a.v), which.v = _mm512_mask_mov_epi32(which.v, m, index.v);
}

IQ_FN float sum(F a) {
  const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
IQ_FN float lowest(F a) { return _mm512_reduce_min_ps(a.v); }
IQ_FN int equal_lanes(F a, float c) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(c), _CMP_EQ_OQ); }
// Stores the lanes of a whose bits are set, one after the other, and perhaps more behind them; returns their number.
IQ_FN int compress(int32_t* p, I a, int lanes) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)lanes, a.v));
  return __builtin_popcount(lanes);
}

// Comparisons lane by lane, and what is chosen by them.
struct M { __mmask16 v; };
IQ_FN F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
IQ_FN M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
IQ_FN M equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
IQ_FN M odd(I a) { return {_mm512_test_epi32_mask(a.v, _mm512_set1_epi32(1))}; }
IQ_FN M equal(I a, I b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
IQ_FN M operator&(M a, M b) { return {(__mmask16)(a.v & b.v)}; }
IQ_FN bool any(M m) { return m.v != 0; }
IQ_FN F select(M m, F yes, F no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
IQ_FN I select(M m, I yes, I no) { return {_mm512_mask_blend_epi32(m.v, no.v, yes.v)}; }
IQ_FN F lookup8(F table, I i) { return lookup16(table, i); }
IQ_FN F lookup32(F low, F high, I i) { return {_mm512_permutex2var_ps(low.v, i.v, high.v)}; }
// Rows become columns.
IQ_FN void transpose(F* t) {
  __m512 a[16];
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_ps(t[i].v, t[i + 1].v), a[i + 1] = _mm512_unpackhi_ps(t[i].v, t[i + 1].v);
  __m512d b[16];
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      const __m512d p = _mm512_castps_pd(a[i + h]), q = _mm512_castps_pd(a[i + 2 + h]);
      b[i + 2 * h] = _mm512_unpacklo_pd(p, q), b[i + 2 * h + 1] = _mm512_unpackhi_pd(p, q);
    }
  for (int i = 0; i < 4; ++i) {  // b[4 g + i]: columns i, i + 4, i + 8, i + 12 of rows 4 g to 4 g + 3, a quarter each
    const __m512 p = _mm512_castpd_ps(b[i]), q = _mm512_castpd_ps(b[4 + i]), r = _mm512_castpd_ps(b[8 + i]), s = _mm512_castpd_ps(b[12 + i]);
    const __m512 even = _mm512_shuffle_f32x4(p, q, 0x88), odd = _mm512_shuffle_f32x4(p, q, 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(r, s, 0x88), odd2 = _mm512_shuffle_f32x4(r, s, 0xdd);
    t[i].v = _mm512_shuffle_f32x4(even, even2, 0x88), t[8 + i].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    t[4 + i].v = _mm512_shuffle_f32x4(odd, odd2, 0x88), t[12 + i].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

#elif defined(__AVX2__) && defined(__FMA__)

struct F { __m256 v[2]; };
struct I { __m256i v[2]; };
IQ_FN F load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
IQ_FN I load(const int32_t* p) { return {{_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}}; }
IQ_FN void store(float* p, F a) { _mm256_storeu_ps(p, a.v[0]), _mm256_storeu_ps(p + 8, a.v[1]); }
IQ_FN void store(int32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a.v[0]), _mm256_storeu_si256((__m256i*)p + 1, a.v[1]); }
IQ_FN F set(float c) { return {{_mm256_set1_ps(c), _mm256_set1_ps(c)}}; }
IQ_FN I seti(int32_t c) { return {{_mm256_set1_epi32(c), _mm256_set1_epi32(c)}}; }
IQ_FN F operator+(F a, F b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
IQ_FN F operator-(F a, F b) { return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}}; }
IQ_FN F operator*(F a, F b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
IQ_FN I operator+(I a, I b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
IQ_FN F fma(F a, F b, F c) { return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}}; }
IQ_FN F min(F a, F b) { return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}}; }
IQ_FN F max(F a, F b) { return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}}; }
IQ_FN I truncate(F a) { return {{_mm256_cvttps_epi32(a.v[0]), _mm256_cvttps_epi32(a.v[1])}}; }
IQ_FN F to_float(I a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
IQ_FN F power_of(F a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  return {{_mm256_and_ps(a.v[0], mask), _mm256_and_ps(a.v[1], mask)}};
}
IQ_FN I times256(I a) { return {{_mm256_slli_epi32(a.v[0], 8), _mm256_slli_epi32(a.v[1], 8)}}; }
IQ_FN I byte_of(I a, int i) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {{_mm256_and_si256(_mm256_srli_epi32(a.v[0], 8 * i), mask), _mm256_and_si256(_mm256_srli_epi32(a.v[1], 8 * i), mask)}};
}
template <int N> IQ_FN I scaled_index(I a) {
  for (int h = 0; h < 2; ++h) a.v[h] = _mm256_mullo_epi32(_mm256_max_epi32(a.v[h], _mm256_setzero_si256()), _mm256_set1_epi32(N));
  return a;
}
IQ_FN I dot4(I sum, I bytes, I with) {
  for (int h = 0; h < 2; ++h) {  // even and odd bytes apart: 16-bit sums of two products could saturate
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(bytes.v[h], _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(with.v[h], 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes.v[h], 8), _mm256_srai_epi16(with.v[h], 8));
    sum.v[h] = _mm256_add_epi32(sum.v[h], _mm256_add_epi32(even, odd));
  }
  return sum;
}
IQ_FN int below(F a, float c) {
  const __m256 b = _mm256_set1_ps(c);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.v[0], b, _CMP_LT_OQ));
  return low | _mm256_movemask_ps(_mm256_cmp_ps(a.v[1], b, _CMP_LT_OQ)) << 8;
}
IQ_FN F gather(const float* p, I i) { return {{_mm256_i32gather_ps(p, i.v[0], 4), _mm256_i32gather_ps(p, i.v[1], 4)}}; }
IQ_FN I load_bytes(const int32_t* p) {
  int32_t t[16];
  IQ_EACH t[i] = ((const uint8_t*)p)[i];
  return load(t);
}
IQ_FN void store_bytes(uint8_t* p, I a) {
  int32_t t[16];
  store(t, a);
  IQ_EACH p[i] = (uint8_t)t[i];
}
IQ_FN I over256(I a) { return {{_mm256_srai_epi32(a.v[0], 8), _mm256_srai_epi32(a.v[1], 8)}}; }
IQ_FN F lookup32(const float* p, I i) { return gather(p, i); }
IQ_FN I gather(const int32_t* p, I i) { return {{_mm256_i32gather_epi32(p, i.v[0], 4), _mm256_i32gather_epi32(p, i.v[1], 4)}}; }
IQ_FN void keep_lower(F a, I index, F& best, I& which) {
  for (int h = 0; h < 2; ++h) {
    __m256 m = _mm256_cmp_ps(a.v[h], best.v[h], _CMP_LT_OQ);
    best.v[h] = _mm256_blendv_ps(best.v[h], a.v[h], m);
    which.v[h] = _mm256_blendv_epi8(which.v[h], index.v[h], _mm256_castps_si256(m));
  }
}
IQ_FN float sum(F a) {
  const __m256 t = _mm256_add_ps(a.v[0], a.v[1]);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
IQ_FN float lowest(F a) {
  const __m256 t = _mm256_min_ps(a.v[0], a.v[1]);
  __m128 q = _mm_min_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  q = _mm_min_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_min_ss(q, _mm_movehdup_ps(q)));
}
IQ_FN int equal_lanes(F a, float c) {
  const __m256 b = _mm256_set1_ps(c);
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v[0], b, _CMP_EQ_OQ)) | _mm256_movemask_ps(_mm256_cmp_ps(a.v[1], b, _CMP_EQ_OQ)) << 8;
}

struct M { __m256 v[2]; };
IQ_FN F operator/(F a, F b) { return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}}; }
IQ_FN M less(F a, F b) { return {{_mm256_cmp_ps(a.v[0], b.v[0], _CMP_LT_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_LT_OQ)}}; }
IQ_FN M equal(F a, F b) { return {{_mm256_cmp_ps(a.v[0], b.v[0], _CMP_EQ_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_EQ_OQ)}}; }
IQ_FN M equal(I a, I b) {
  return {{_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v[0], b.v[0])), _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v[1], b.v[1]))}};
}
IQ_FN M odd(I a) {
  const __m256i one = _mm256_set1_epi32(1);
  return equal(I{{_mm256_and_si256(a.v[0], one), _mm256_and_si256(a.v[1], one)}}, I{{one, one}});
}
IQ_FN M operator&(M a, M b) { return {{_mm256_and_ps(a.v[0], b.v[0]), _mm256_and_ps(a.v[1], b.v[1])}}; }
IQ_FN bool any(M m) { return _mm256_movemask_ps(_mm256_or_ps(m.v[0], m.v[1])) != 0; }
IQ_FN F select(M m, F yes, F no) { return {{_mm256_blendv_ps(no.v[0], yes.v[0], m.v[0]), _mm256_blendv_ps(no.v[1], yes.v[1], m.v[1])}}; }
IQ_FN I select(M m, I yes, I no) {
  for (int h = 0; h < 2; ++h) no.v[h] = _mm256_blendv_epi8(no.v[h], yes.v[h], _mm256_castps_si256(m.v[h]));
  return no;
}
IQ_FN F lookup8(F table, I i) { return {{_mm256_permutevar8x32_ps(table.v[0], i.v[0]), _mm256_permutevar8x32_ps(table.v[0], i.v[1])}}; }
IQ_FN F lookup16(F table, I i) {
  F r;
  for (int h = 0; h < 2; ++h) {  // bit 3 of the index decides between the halves
    const __m256 low = _mm256_permutevar8x32_ps(table.v[0], i.v[h]), high = _mm256_permutevar8x32_ps(table.v[1], i.v[h]);
    r.v[h] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i.v[h], 28)));
  }
  return r;
}
IQ_FN F lookup32(F low, F high, I i) {
  const F a = lookup16(low, i), b = lookup16(high, i);
  F r;
  for (int h = 0; h < 2; ++h) r.v[h] = _mm256_blendv_ps(a.v[h], b.v[h], _mm256_castsi256_ps(_mm256_slli_epi32(i.v[h], 27)));
  return r;
}
IQ_FN void transpose8(__m256* t) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(t[i], t[i + 1]), a[i + 1] = _mm256_unpackhi_ps(t[i], t[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0x44), b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
    }
  for (int i = 0; i < 4; ++i) t[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20), t[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
}
IQ_FN void transpose(F* t) {
  __m256 q[4][8];
  for (int i = 0; i < 8; ++i) q[0][i] = t[i].v[0], q[1][i] = t[i].v[1], q[2][i] = t[8 + i].v[0], q[3][i] = t[8 + i].v[1];
  for (int k = 0; k < 4; ++k) transpose8(q[k]);
  for (int i = 0; i < 8; ++i) t[i] = {{q[0][i], q[2][i]}}, t[8 + i] = {{q[1][i], q[3][i]}};
}

#else

struct F { float v[16]; };
struct I { int32_t v[16]; };
IQ_FN F load(const float* p) { F r; __builtin_memcpy(&r, p, 64); return r; }
IQ_FN I load(const int32_t* p) { I r; __builtin_memcpy(&r, p, 64); return r; }
IQ_FN void store(float* p, F a) { __builtin_memcpy(p, &a, 64); }
IQ_FN void store(int32_t* p, I a) { __builtin_memcpy(p, &a, 64); }
IQ_FN F set(float c) { F r; IQ_EACH r.v[i] = c; return r; }
IQ_FN I seti(int32_t c) { I r; IQ_EACH r.v[i] = c; return r; }
IQ_FN F operator+(F a, F b) { IQ_EACH a.v[i] += b.v[i]; return a; }
IQ_FN F operator-(F a, F b) { IQ_EACH a.v[i] -= b.v[i]; return a; }
IQ_FN F operator*(F a, F b) { IQ_EACH a.v[i] *= b.v[i]; return a; }
IQ_FN I operator+(I a, I b) { IQ_EACH a.v[i] += b.v[i]; return a; }
// One rounding without the instruction: the product is exact in double, and the sum is rounded to odd before it becomes a float.
IQ_FN float fused(float a, float b, float c) {
  const double p = (double)a * b, s = p + c, t = s - p, error = (p - (s - t)) + (c - t);
  int64_t bits;
  __builtin_memcpy(&bits, &s, 8);
  if (error != 0 && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : -1;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return (float)odd;
}
IQ_FN F fma(F a, F b, F c) { IQ_EACH c.v[i] = fused(a.v[i], b.v[i], c.v[i]); return c; }
IQ_FN F min(F a, F b) { IQ_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
IQ_FN F max(F a, F b) { IQ_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
IQ_FN I truncate(F a) { I r; IQ_EACH r.v[i] = (int32_t)a.v[i]; return r; }
IQ_FN F to_float(I a) { F r; IQ_EACH r.v[i] = (float)a.v[i]; return r; }
IQ_FN F power_of(F a) {
  IQ_EACH {
    uint32_t bits;
    __builtin_memcpy(&bits, &a.v[i], 4);
    bits &= 0x7f800000;
    __builtin_memcpy(&a.v[i], &bits, 4);
  }
  return a;
}
IQ_FN I times256(I a) { IQ_EACH a.v[i] = (int32_t)((uint32_t)a.v[i] << 8); return a; }
IQ_FN I byte_of(I a, int n) { IQ_EACH a.v[i] = (int32_t)((uint32_t)a.v[i] >> 8 * n & 255); return a; }
template <int N> IQ_FN I scaled_index(I a) { IQ_EACH a.v[i] = N * (a.v[i] < 0 ? 0 : a.v[i]); return a; }
IQ_FN I dot4(I sum, I bytes, I with) {
  IQ_EACH for (int b = 0; b < 32; b += 8) sum.v[i] += (int32_t)((uint32_t)bytes.v[i] >> b & 255) * (int8_t)((uint32_t)with.v[i] >> b & 255);
  return sum;
}
IQ_FN int below(F a, float c) { int m = 0; IQ_EACH m |= (a.v[i] < c) << i; return m; }
IQ_FN F gather(const float* p, I n) { F r; IQ_EACH r.v[i] = p[n.v[i]]; return r; }
IQ_FN F lookup16(F table, I i) {
  float t[16];
  store(t, table);
  return gather(t, i);
}
IQ_FN I load_bytes(const int32_t* p) {
  int32_t t[16];
  IQ_EACH t[i] = ((const uint8_t*)p)[i];
  return load(t);
}
IQ_FN void store_bytes(uint8_t* p, I a) {
  int32_t t[16];
  store(t, a);
  IQ_EACH p[i] = (uint8_t)t[i];
}
IQ_FN I over256(I a) { IQ_EACH a.v[i] >>= 8; return a; }
IQ_FN F lookup32(const float* p, I n) { return gather(p, n); }
IQ_FN I gather(const int32_t* p, I n) { I r; IQ_EACH r.v[i] = p[n.v[i]]; return r; }
IQ_FN void keep_lower(F a, I index, F& best, I& which) {
  IQ_EACH {
    which.v[i] = a.v[i] < best.v[i] ? index.v[i] : which.v[i];
    best.v[i] = a.v[i] < best.v[i] ? a.v[i] : best.v[i];
  }
}
IQ_FN float sum(F a) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] += a.v[i + step];
  return a.v[0];
}
IQ_FN float lowest(F a) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) a.v[i] = a.v[i + step] < a.v[i] ? a.v[i + step] : a.v[i];
  return a.v[0];
}
IQ_FN int equal_lanes(F a, float c) { int m = 0; IQ_EACH m |= (a.v[i] == c) << i; return m; }

struct M { bool v[16]; };
IQ_FN F operator/(F a, F b) { IQ_EACH a.v[i] /= b.v[i]; return a; }
IQ_FN M less(F a, F b) { M m; IQ_EACH m.v[i] = a.v[i] < b.v[i]; return m; }
IQ_FN M equal(F a, F b) { M m; IQ_EACH m.v[i] = a.v[i] == b.v[i]; return m; }
IQ_FN M equal(I a, I b) { M m; IQ_EACH m.v[i] = a.v[i] == b.v[i]; return m; }
IQ_FN M odd(I a) { M m; IQ_EACH m.v[i] = a.v[i] & 1; return m; }
IQ_FN M operator&(M a, M b) { IQ_EACH a.v[i] = a.v[i] && b.v[i]; return a; }
IQ_FN bool any(M m) { bool r = false; IQ_EACH r |= m.v[i]; return r; }
IQ_FN F select(M m, F yes, F no) { IQ_EACH no.v[i] = m.v[i] ? yes.v[i] : no.v[i]; return no; }
IQ_FN I select(M m, I yes, I no) { IQ_EACH no.v[i] = m.v[i] ? yes.v[i] : no.v[i]; return no; }
IQ_FN F lookup8(F table, I i) { return lookup16(table, i); }
IQ_FN F lookup32(F low, F high, I n) { F r; IQ_EACH r.v[i] = n.v[i] < 16 ? low.v[n.v[i]] : high.v[n.v[i] - 16]; return r; }
IQ_FN void transpose(F* t) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) { const float a = t[i].v[j]; t[i].v[j] = t[j].v[i], t[j].v[i] = a; }
}

#endif

#if !defined(__AVX512F__)
IQ_FN int compress(int32_t* p, I a, int lanes) {
  int32_t t[16];
  store(t, a);
  int n = 0;
  for (; lanes; lanes &= lanes - 1) p[n++] = t[__builtin_ctz(lanes)];
  return n;
}
#endif

}}}  // namespace iqtorch::IQTORCH_ISA::encoder
