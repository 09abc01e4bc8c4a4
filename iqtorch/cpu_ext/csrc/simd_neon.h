// NEON with the dot-product instructions of ARMv8.2, and with 8-bit matrix products if IQ_I8MM is defined: 16 rows are four registers.
#pragma once
#include <arm_neon.h>
#include <cstdint>

namespace iqtorch { namespace IQTORCH_ISA {

#ifdef IQ_I8MM
constexpr bool kSignedDot = false;
#else
constexpr bool kSignedDot = true;
#define IQ_SIGNED_DOT
#endif
constexpr bool kUnrolls = false;  // see each_cell
// Rows of activations, and groups of 16 rows of weights, whose sums fit the registers.
#ifdef IQ_I8MM
constexpr int kBatch = 4, kBatchGroups = 1;
#else
constexpr int kBatch = 3, kBatchGroups = 1;
#endif
constexpr int kFloatRows = 6, kFloatVectors = 1;  // the same in float32

struct U8 { uint8x16_t v[4]; };
struct I32 { int32x4_t v[4]; };
struct F32 { float32x4_t v[4]; };

#define IQ_INLINE __attribute__((always_inline))
#define IQ_FN inline IQ_INLINE
#define IQ_PRAGMA(text) _Pragma(#text)
#define IQ_UNROLL(n) IQ_PRAGMA(GCC unroll n)
// One of the structures above, register by register.
#define IQ_FOUR(expression)                           \
  {{[&](int h) IQ_INLINE { return expression; }(0), [&](int h) IQ_INLINE { return expression; }(1), \
    [&](int h) IQ_INLINE { return expression; }(2), [&](int h) IQ_INLINE { return expression; }(3)}}

IQ_FN U8 load(const void* p) { return IQ_FOUR(vld1q_u8((const uint8_t*)p + 16 * h)); }
IQ_FN void store(void* p, U8 a) {
  for (int h = 0; h < 4; ++h) vst1q_u8((uint8_t*)p + 16 * h, a.v[h]);
}
IQ_FN U8 bits(U8 a, int shift, int mask) { return IQ_FOUR(vandq_u8(vshlq_u8(a.v[h], vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((uint8_t)mask))); }
// Bytes to the right, or to the left if `shift` is negative.
IQ_FN U8 shifted(U8 a, int shift) { return IQ_FOUR(vshlq_u8(a.v[h], vdupq_n_s8((int8_t)-shift))); }
// a | (b & mask)
IQ_FN U8 or_masked(U8 a, U8 b, int mask) { return IQ_FOUR(vorrq_u8(a.v[h], vandq_u8(b.v[h], vdupq_n_u8((uint8_t)mask)))); }
IQ_FN U8 flip(U8 a, int mask) { return IQ_FOUR(veorq_u8(a.v[h], vdupq_n_u8((uint8_t)mask))); }
IQ_FN U8 abs_difference(U8 a, int c) { return IQ_FOUR(vabdq_u8(a.v[h], vdupq_n_u8((uint8_t)c))); }
IQ_FN U8 add(U8 a, U8 b) { return IQ_FOUR(vaddq_u8(a.v[h], b.v[h])); }
IQ_FN U8 fill(int c) { return IQ_FOUR(((void)h, vdupq_n_u8((uint8_t)c))); }
IQ_FN U8 add(U8 a, int c) { return IQ_FOUR(vaddq_u8(a.v[h], vdupq_n_u8((uint8_t)c))); }

template <int N> struct Table { uint8x16_t v[N / 16]; };
template <int N> IQ_FN Table<N> load_table(const uint8_t* p) {
  Table<N> t;
  for (int i = 0; i < N / 16; ++i) t.v[i] = vld1q_u8(p + 16 * i);
  return t;
}
template <int N> IQ_FN uint8x16_t lookup1(const Table<N>& t, uint8x16_t a) {
  if constexpr (N == 16) return vqtbl1q_u8(t.v[0], a);
  else if constexpr (N == 32) return vqtbl2q_u8(uint8x16x2_t{{t.v[0], t.v[1]}}, a);
  else return vqtbl4q_u8(uint8x16x4_t{{t.v[0], t.v[1], t.v[2], t.v[3]}}, a);
}
template <int N> IQ_FN U8 lookup(const Table<N>& t, U8 a) { return IQ_FOUR(lookup1<N>(t, a.v[h])); }

using PairTable = Table<64>;
IQ_FN PairTable load_pairs(const uint8_t* p) { return load_table<64>(p); }
IQ_FN uint8x16_t pair_index(uint8x16_t a) {
  // 2 code in the low byte of the lane, 2 code + 1 in the high byte
  const uint16x8_t code = vandq_u16(vreinterpretq_u16_u8(a), vdupq_n_u16(31));
  return vreinterpretq_u8_u16(vmlaq_u16(vdupq_n_u16(0x0100), code, vdupq_n_u16(0x0202)));
}
IQ_FN U8 lookup_pairs(const PairTable& t, U8 a) { return IQ_FOUR(lookup1<64>(t, pair_index(a.v[h]))); }
IQ_FN U8 shift16(U8 a, int shift) {
  return IQ_FOUR(vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a.v[h]), vdupq_n_s16((int16_t)-shift))));
}
IQ_FN U8 widen16(const uint8_t* p) { return IQ_FOUR(vreinterpretq_u8_u16(vmovl_u8(vld1_u8(p + 8 * h)))); }
IQ_FN U8 and16_or(U8 a, int mask, U8 b) {
  return IQ_FOUR(vorrq_u8(vandq_u8(a.v[h], vreinterpretq_u8_u16(vdupq_n_u16((uint16_t)mask))), b.v[h]));
}

IQ_FN uint8x16_t mirror1(uint8x16_t a, uint8x16_t signs, uint8x16_t bit, int total) {
  return vbslq_u8(vtstq_u8(signs, bit), vsubq_u8(vdupq_n_u8((uint8_t)total), a), a);
}
IQ_FN U8 mirror(U8 a, U8 signs, int q, int total) { return IQ_FOUR(mirror1(a.v[h], signs.v[h], vdupq_n_u8((uint8_t)(1 << q)), total)); }
IQ_FN U8 mirror_rows(U8 a, I32 signs, int half, int total) {
  const uint8x16_t spread = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  const uint8x16_t bit = vreinterpretq_u8_u32(vdupq_n_u32(half ? 0x80402010u : 0x08040201u));
  return IQ_FOUR(mirror1(a.v[h], vqtbl1q_u8(vreinterpretq_u8_s32(signs.v[h]), spread), bit, total));
}

IQ_FN U8 as_bytes(I32 a) { return IQ_FOUR(vreinterpretq_u8_s32(a.v[h])); }
IQ_FN I32 as_i32(U8 a) { return IQ_FOUR(vreinterpretq_s32_u8(a.v[h])); }
IQ_FN I32 load16(const uint8_t* p) { return IQ_FOUR(vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * h))))); }
IQ_FN I32 load8(const uint8_t* p) {
  const uint8x16_t b = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(b)), high = vmovl_u8(vget_high_u8(b));
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
IQ_FN I32 load32(const uint8_t* p) { return as_i32(load(p)); }
IQ_FN I32 set(int32_t c) { return IQ_FOUR(((void)h, vdupq_n_s32(c))); }
IQ_FN int32x4_t shifted(int32x4_t a, int n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(n))); }
IQ_FN I32 shift_right(I32 a, int n) { return IQ_FOUR(shifted(a.v[h], -n)); }
IQ_FN I32 shift_left(I32 a, int n) { return IQ_FOUR(shifted(a.v[h], n)); }
IQ_FN I32 operator&(I32 a, I32 b) { return IQ_FOUR(vandq_s32(a.v[h], b.v[h])); }
IQ_FN I32 operator|(I32 a, I32 b) { return IQ_FOUR(vorrq_s32(a.v[h], b.v[h])); }
IQ_FN I32 operator^(I32 a, I32 b) { return IQ_FOUR(veorq_s32(a.v[h], b.v[h])); }
IQ_FN I32 operator+(I32 a, I32 b) { return IQ_FOUR(vaddq_s32(a.v[h], b.v[h])); }
IQ_FN I32 operator*(I32 a, I32 b) { return IQ_FOUR(vmulq_s32(a.v[h], b.v[h])); }
// `value` in the lanes of rows r whose byte p[r] has a bit, else 0.
IQ_FN I32 where_bit(const uint8_t* p, int bit, I32 value) {
  const I32 bytes = load8(p);
  return IQ_FOUR(vandq_s32(vreinterpretq_s32_u32(vtstq_s32(bytes.v[h], vdupq_n_s32(1 << bit))), value.v[h]));
}
template <class T> IQ_FN T kept(T a) { return a; }
template <int Step> IQ_FN I32 gather(const uint8_t* base, I32 index) {
  int32_t t[16];
  for (int h = 0; h < 4; ++h) vst1q_s32(t + 4 * h, index.v[h]);
  for (int i = 0; i < 16; ++i) __builtin_memcpy(t + i, base + Step * (int64_t)t[i], 4);
  return IQ_FOUR(vld1q_s32(t + 4 * h));
}
// Without IQ_I8MM the dot product is of signed bytes: operands of 128 and more are taken minus 128.
template <bool Narrow> IQ_FN int32x4_t dot1(int32x4_t acc, uint8x16_t w, int8x16_t x) {
#ifdef IQ_I8MM
  return vusdotq_s32(acc, w, x);
#endif
  if constexpr (!Narrow) w = veorq_u8(w, vdupq_n_u8(128));
  return vdotq_s32(acc, vreinterpretq_s8_u8(w), x);
}
template <bool Narrow> IQ_FN I32 dot(I32 acc, U8 w, const void* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(four));
  return IQ_FOUR(dot1<Narrow>(acc.v[h], w.v[h], b));
}
IQ_FN void prefetch_line(const uint8_t* p) { __builtin_prefetch(p); }
template <bool Narrow> IQ_FN I32 dot_once(I32 acc, U8 w, const void* x) { return dot<Narrow>(acc, w, x); }
#ifdef IQ_I8MM
// Sums of 16 rows of weights with two rows of activations: 2 x 2 to a register.
#define IQ_ROW_PAIRS
struct RowPairs { int32x4_t v[8]; };
IQ_FN RowPairs start_pairs(int32_t first, int32_t second) {
  const int32x4_t two = vzip1q_s32(vdupq_n_s32(first), vdupq_n_s32(second));
  return {{two, two, two, two, two, two, two, two}};
}
// Two neighbouring vectors of operands -> eight weights of row 0, eight of row 1, ..
IQ_FN void zip_vectors(uint8_t* p) {
  const U8 a = load(p), b = load(p + 64);
  for (int h = 0; h < 4; ++h) {
    const uint32x4_t low = vreinterpretq_u32_u8(a.v[h]), high = vreinterpretq_u32_u8(b.v[h]);
    vst1q_u8(p + 32 * h, vreinterpretq_u8_u32(vzip1q_u32(low, high)));
    vst1q_u8(p + 32 * h + 16, vreinterpretq_u8_u32(vzip2q_u32(low, high)));
  }
}
IQ_FN void add_pairs(RowPairs& acc, const uint8_t* w, const int8_t* first, const int8_t* second) {
  const int8x16_t x = vcombine_s8(vld1_s8(first), vld1_s8(second));
  for (int i = 0; i < 8; ++i) acc.v[i] = vusmmlaq_s32(acc.v[i], vld1q_u8(w + 16 * i), x);
}
IQ_FN I32 first_of(const RowPairs& a) { return IQ_FOUR(vuzp1q_s32(a.v[2 * h], a.v[2 * h + 1])); }
IQ_FN I32 second_of(const RowPairs& a) { return IQ_FOUR(vuzp2q_s32(a.v[2 * h], a.v[2 * h + 1])); }
#else
// Signed bytes; their magnitudes are not needed here.
IQ_FN U8 magnitude(U8 a) { return a; }
IQ_FN I32 dot_signed(I32 acc, U8 w, U8, const void* x) { return dot<true>(acc, w, x); }
#endif
IQ_FN I32 byte_sums(I32 acc, I32 a) {
  return IQ_FOUR(vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(acc.v[h]), vreinterpretq_u8_s32(a.v[h]), vdupq_n_u8(1))));
}

IQ_FN F32 loadf(const float* p) { return IQ_FOUR(vld1q_f32(p + 4 * h)); }
IQ_FN void storef(float* p, F32 a) {
  for (int h = 0; h < 4; ++h) vst1q_f32(p + 4 * h, a.v[h]);
}
IQ_FN F32 setf(float c) { return IQ_FOUR(((void)h, vdupq_n_f32(c))); }
IQ_FN F32 operator+(F32 a, F32 b) { return IQ_FOUR(vaddq_f32(a.v[h], b.v[h])); }
IQ_FN F32 operator-(F32 a, F32 b) { return IQ_FOUR(vsubq_f32(a.v[h], b.v[h])); }
IQ_FN F32 operator*(F32 a, F32 b) { return IQ_FOUR(vmulq_f32(a.v[h], b.v[h])); }
IQ_FN F32 fma(F32 a, F32 b, F32 c) { return IQ_FOUR(vfmaq_f32(c.v[h], a.v[h], b.v[h])); }
IQ_FN F32 to_float(I32 a) { return IQ_FOUR(vcvtq_f32_s32(a.v[h])); }
IQ_FN F32 as_float(I32 a) { return IQ_FOUR(vreinterpretq_f32_s32(a.v[h])); }
IQ_FN I32 as_int(F32 a) { return IQ_FOUR(vreinterpretq_s32_f32(a.v[h])); }
IQ_FN I32 max(I32 a, I32 b) { return IQ_FOUR(vmaxq_s32(a.v[h], b.v[h])); }
IQ_FN int32_t largest_of(I32 a) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3]))); }
IQ_FN void store_bytes(int8_t* p, I32 a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1])), high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
IQ_FN int32_t sum_of(I32 a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]))); }
IQ_FN F32 from_half(I32 a) { return IQ_FOUR(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(a.v[h]))))); }
IQ_FN void store_half(uint16_t* p, F32 a) {
  for (int h = 0; h < 4; ++h) vst1_u16(p + 4 * h, vreinterpret_u16_f16(vcvt_f16_f32(a.v[h])));
}
IQ_FN uint16x4_t bfloat16_1(float32x4_t a) {
  const uint32x4_t u = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, vdupq_n_u32(0x7fc0)));
}
IQ_FN void store_bfloat16(uint16_t* p, F32 a) {
  for (int h = 0; h < 4; ++h) vst1_u16(p + 4 * h, bfloat16_1(a.v[h]));
}

}}  // namespace iqtorch::IQTORCH_ISA
