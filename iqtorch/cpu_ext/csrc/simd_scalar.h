// Portable C++: 16 rows as plain arrays. The compiler may vectorise the loops with whatever the base machine has.
#pragma once
#include <cstdint>

namespace iqtorch { namespace IQTORCH_ISA {

constexpr bool kSignedDot = false;
constexpr bool kUnrolls = false;  // see each_cell
// Rows of activations, and groups of 16 rows of weights, whose sums fit the registers.
constexpr int kBatch = 4, kBatchGroups = 1;
constexpr int kFloatRows = 4, kFloatVectors = 1;  // the same in float32

struct U8 {
  uint8_t v[64];
};
struct I32 {
  int32_t v[16];
};
struct F32 {
  float v[16];
};

#define IQ_EACH(n) for (int i = 0; i < (n); ++i)
// Not forced inline: loops over arrays, inlined and unrolled everywhere, would take minutes to compile.
#define IQ_FN inline
#define IQ_INLINE
#define IQ_UNROLL(n)

IQ_FN U8 load(const void* p) { U8 r; __builtin_memcpy(&r, p, 64); return r; }
IQ_FN void store(void* p, U8 a) { __builtin_memcpy(p, &a, 64); }
IQ_FN U8 bits(U8 a, int shift, int mask) { IQ_EACH(64) a.v[i] = (a.v[i] >> shift) & mask; return a; }
// Bytes to the right, or to the left if `shift` is negative.
IQ_FN U8 shifted(U8 a, int shift) { IQ_EACH(64) a.v[i] = shift < 0 ? a.v[i] << -shift : a.v[i] >> shift; return a; }
// a | (b & mask)
IQ_FN U8 or_masked(U8 a, U8 b, int mask) { IQ_EACH(64) a.v[i] |= b.v[i] & mask; return a; }
IQ_FN U8 flip(U8 a, int mask) { IQ_EACH(64) a.v[i] ^= mask; return a; }
IQ_FN U8 abs_difference(U8 a, int c) { IQ_EACH(64) a.v[i] = a.v[i] > c ? a.v[i] - c : c - a.v[i]; return a; }
IQ_FN U8 add(U8 a, U8 b) { IQ_EACH(64) a.v[i] += b.v[i]; return a; }
IQ_FN U8 fill(int c) { U8 r; IQ_EACH(64) r.v[i] = c; return r; }
IQ_FN U8 add(U8 a, int c) { IQ_EACH(64) a.v[i] += c; return a; }

template <int N> struct Table { const uint8_t* t; };
template <int N> IQ_FN Table<N> load_table(const uint8_t* p) { return {p}; }
template <int N> IQ_FN U8 lookup(Table<N> t, U8 a) { IQ_EACH(64) a.v[i] = t.t[a.v[i]]; return a; }

// Five-bit codes in 16-bit lanes (upper bits are ignored) -> the two bytes of entry `code` of a table of pairs.
struct PairTable { const uint8_t* t; };
IQ_FN PairTable load_pairs(const uint8_t* p) { return {p}; }
IQ_FN U8 lookup_pairs(PairTable t, U8 a) {
  U8 r;
  IQ_EACH(32) { int c = a.v[2 * i] & 31; r.v[2 * i] = t.t[2 * c]; r.v[2 * i + 1] = t.t[2 * c + 1]; }
  return r;
}
IQ_FN U8 shift16(U8 a, int shift) {
  IQ_EACH(32) { int w = (a.v[2 * i] | a.v[2 * i + 1] << 8) >> shift; a.v[2 * i] = w; a.v[2 * i + 1] = w >> 8; }
  return a;
}
IQ_FN U8 widen16(const uint8_t* p) { U8 r; IQ_EACH(32) { r.v[2 * i] = p[i]; r.v[2 * i + 1] = 0; } return r; }
// (a & mask) | b on 16-bit lanes; the masks used here fit the low byte.
IQ_FN U8 and16_or(U8 a, int mask, U8 b) { IQ_EACH(32) { b.v[2 * i] |= a.v[2 * i] & mask; } return b; }

// total - a where bit `q` of the byte of `signs` is set.
IQ_FN U8 mirror(U8 a, U8 signs, int q, int total) { IQ_EACH(64) if (signs.v[i] >> q & 1) a.v[i] = total - a.v[i]; return a; }
// The same, with the signs of weights 4 half .. 4 half + 3 of row r in the low byte of lane r.
IQ_FN U8 mirror_rows(U8 a, I32 signs, int half, int total) {
  IQ_EACH(64) if (signs.v[i / 4] >> (4 * half + i % 4) & 1) a.v[i] = total - a.v[i];
  return a;
}

IQ_FN U8 as_bytes(I32 a) { U8 r; __builtin_memcpy(&r, &a, 64); return r; }
IQ_FN I32 as_i32(U8 a) { I32 r; __builtin_memcpy(&r, &a, 64); return r; }
IQ_FN I32 load8(const uint8_t* p) { I32 r; IQ_EACH(16) r.v[i] = p[i]; return r; }
IQ_FN I32 load16(const uint8_t* p) { uint16_t t[16]; __builtin_memcpy(t, p, 32); I32 r; IQ_EACH(16) r.v[i] = t[i]; return r; }
IQ_FN I32 load32(const uint8_t* p) { I32 r; __builtin_memcpy(&r, p, 64); return r; }
IQ_FN I32 set(int32_t c) { I32 r; IQ_EACH(16) r.v[i] = c; return r; }
IQ_FN I32 shift_right(I32 a, int n) { IQ_EACH(16) a.v[i] = (uint32_t)a.v[i] >> n; return a; }
IQ_FN I32 shift_left(I32 a, int n) { IQ_EACH(16) a.v[i] = (uint32_t)a.v[i] << n; return a; }
IQ_FN I32 operator&(I32 a, I32 b) { IQ_EACH(16) a.v[i] &= b.v[i]; return a; }
IQ_FN I32 operator|(I32 a, I32 b) { IQ_EACH(16) a.v[i] |= b.v[i]; return a; }
IQ_FN I32 operator^(I32 a, I32 b) { IQ_EACH(16) a.v[i] ^= b.v[i]; return a; }
IQ_FN I32 operator+(I32 a, I32 b) { IQ_EACH(16) a.v[i] = (uint32_t)a.v[i] + (uint32_t)b.v[i]; return a; }
IQ_FN I32 operator*(I32 a, I32 b) { IQ_EACH(16) a.v[i] = (uint32_t)a.v[i] * (uint32_t)b.v[i]; return a; }
// `value` in the lanes of rows r whose byte p[r] has a bit, else 0.
IQ_FN I32 where_bit(const uint8_t* p, int bit, I32 value) { IQ_EACH(16) if (!(p[i] >> bit & 1)) value.v[i] = 0; return value; }
template <class T> IQ_FN T kept(T a) { return a; }
// Four bytes at base + Step * index.
template <int Step> IQ_FN I32 gather(const uint8_t* base, I32 index) {
  IQ_EACH(16) __builtin_memcpy(&index.v[i], base + Step * (int64_t)index.v[i], 4);
  return index;
}
// acc[r] += sum over j of w[4 r + j] * x[j]; x is four int8 in one word.
template <bool Narrow> IQ_FN I32 dot(I32 acc, U8 w, const void* x) {
  int8_t t[4];
  __builtin_memcpy(t, x, 4);
  IQ_EACH(16) acc.v[i] += w.v[4 * i] * t[0] + w.v[4 * i + 1] * t[1] + w.v[4 * i + 2] * t[2] + w.v[4 * i + 3] * t[3];
  return acc;
}
IQ_FN void prefetch_line(const uint8_t* p) { __builtin_prefetch(p); }
template <bool Narrow> IQ_FN I32 dot_once(I32 acc, U8 w, const void* x) { return dot<Narrow>(acc, w, x); }
IQ_FN I32 byte_sums(I32 acc, I32 a) {
  IQ_EACH(16) { uint32_t u = (uint32_t)a.v[i]; acc.v[i] += (u & 255) + (u >> 8 & 255) + (u >> 16 & 255) + (u >> 24); }
  return acc;
}

IQ_FN F32 loadf(const float* p) { F32 r; __builtin_memcpy(&r, p, 64); return r; }
IQ_FN void storef(float* p, F32 a) { __builtin_memcpy(p, &a, 64); }
IQ_FN F32 setf(float c) { F32 r; IQ_EACH(16) r.v[i] = c; return r; }
IQ_FN F32 operator+(F32 a, F32 b) { IQ_EACH(16) a.v[i] += b.v[i]; return a; }
IQ_FN F32 operator-(F32 a, F32 b) { IQ_EACH(16) a.v[i] -= b.v[i]; return a; }
IQ_FN F32 operator*(F32 a, F32 b) { IQ_EACH(16) a.v[i] *= b.v[i]; return a; }
IQ_FN F32 fma(F32 a, F32 b, F32 c) { IQ_EACH(16) c.v[i] += a.v[i] * b.v[i]; return c; }
IQ_FN F32 to_float(I32 a) { F32 r; IQ_EACH(16) r.v[i] = (float)a.v[i]; return r; }
IQ_FN F32 as_float(I32 a) { F32 r; __builtin_memcpy(&r, &a, 64); return r; }

// IEEE half <-> single by integer arithmetic, rounding to nearest even.
IQ_FN float half_to_float(uint32_t h) {
  uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff, u;
  float f;
  if (rest >= 0x7c00) {
    u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    u = sign | ((rest << 13) + 0x38000000);
  } else {
    f = (float)rest * 0x1p-24f;
    __builtin_memcpy(&u, &f, 4);
    u |= sign;
  }
  __builtin_memcpy(&f, &u, 4);
  return f;
}
IQ_FN uint16_t float_to_half(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00;
  if (a >= 0x477ff000) return sign | 0x7c00;
  if (a < 0x38800000) {  // subnormal half: adding 0.5 puts the rounded mantissa into the low bits
    float t;
    __builtin_memcpy(&t, &a, 4);
    t += 0.5f;
    __builtin_memcpy(&a, &t, 4);
    return sign | (a - 0x3f000000);
  }
  return sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
}
IQ_FN I32 as_int(F32 a) { I32 r; __builtin_memcpy(&r, &a, sizeof r); return r; }
IQ_FN I32 max(I32 a, I32 b) { IQ_EACH(16) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
IQ_FN int32_t largest_of(I32 a) { int32_t r = a.v[0]; IQ_EACH(16) r = a.v[i] > r ? a.v[i] : r; return r; }
IQ_FN void store_bytes(int8_t* p, I32 a) { IQ_EACH(16) p[i] = (int8_t)a.v[i]; }
IQ_FN int32_t sum_of(I32 a) { int32_t sum = 0; IQ_EACH(16) sum += a.v[i]; return sum; }
IQ_FN F32 from_half(I32 a) { F32 r; IQ_EACH(16) r.v[i] = half_to_float(a.v[i]); return r; }
IQ_FN void store_half(uint16_t* p, F32 a) { IQ_EACH(16) p[i] = float_to_half(a.v[i]); }
IQ_FN uint16_t float_to_bfloat16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
IQ_FN void store_bfloat16(uint16_t* p, F32 a) { IQ_EACH(16) p[i] = float_to_bfloat16(a.v[i]); }

}}  // namespace iqtorch::IQTORCH_ISA
