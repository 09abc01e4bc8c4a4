// The matrix unit (AMX: tiles, bfloat16 products) in software, for machines without one. Put before every source (`-include`), it takes the
// place of the intrinsics and makes the processor look as if it had the unit; the kernels themselves are compiled as they are.
// Semantics: Intel's Software Developer's Manual, volume 2. A use without configuration or with sizes beyond it aborts, as a real unit
// would fault.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "the operand of ldtilecfg");

struct State {
  Config config;
  uint8_t tiles[8][16][64];
};

inline State& state() {
  static thread_local State of_thread = {};
  return of_thread;
}

inline void configure(const void* config) {
  memset(&state(), 0, sizeof(State));  // tiles too
  if (config) memcpy(&state().config, config, sizeof(Config));
  for (int t = 0; t < 8; ++t)
    if (state().config.palette > 1 || state().config.rows[t] > 16 || state().config.column_bytes[t] > 64) abort();
}

inline void store_config(void* config) { memcpy(config, &state().config, sizeof(Config)); }

inline uint8_t (*tile(int t))[64] {
  if (!state().config.palette || !state().config.rows[t] || !state().config.column_bytes[t]) abort();
  return state().tiles[t];
}

inline void zero(int t) { memset(tile(t), 0, sizeof(state().tiles[t])); }

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < state().config.rows[t]; ++r) memcpy(tile(t)[r], (const uint8_t*)from + r * stride, state().config.column_bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < state().config.rows[t]; ++r) memcpy((uint8_t*)to + r * stride, tile(t)[r], state().config.column_bytes[t]);
}

inline float number(const uint8_t* bfloat16) {
  uint32_t bits = 0;
  memcpy((uint8_t*)&bits + 2, bfloat16, 2);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// result[r][c] += sum over pairs p: left[r][p] * right[p][c], two numbers each
inline void multiply_bfloat16(int result, int left, int right) {
  const Config& config = state().config;
  uint8_t (*const y)[64] = tile(result), (*const a)[64] = tile(left), (*const b)[64] = tile(right);
  const int pairs = config.column_bytes[left] / 4, columns = config.column_bytes[result] / 4;
  if (config.rows[left] != config.rows[result] || config.rows[right] != pairs || config.column_bytes[right] != 4 * columns) abort();
  for (int r = 0; r < config.rows[result]; ++r)
    for (int c = 0; c < columns; ++c) {
      float sum;
      memcpy(&sum, y[r] + 4 * c, 4);
      for (int p = 0; p < pairs; ++p)
        for (int i = 0; i < 4; i += 2) sum += number(a[r] + 4 * p + i) * number(b[p] + 4 * c + i);
      memcpy(y[r] + 4 * c, &sum, 4);
    }
}

inline int cpuid_count(unsigned leaf, unsigned part, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  const int known = __get_cpuid_count(leaf, part, a, b, c, d);
  if (leaf == 7 && part == 0) *d |= 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  return known;
}

inline long system_call(long number, long a, long b) {
  return number == SYS_arch_prctl && a == 0x1023 ? 0 : syscall(number, a, b);  // ARCH_REQ_XCOMP_PERM: granted
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulated::configure(config)
#define _tile_storeconfig(config) amx_emulated::store_config(config)
#define _tile_release() amx_emulated::configure(nullptr)
#define _tile_zero(t) amx_emulated::zero(t)
#define _tile_loadd(t, from, stride) amx_emulated::load(t, from, stride)
#define _tile_stream_loadd(t, from, stride) amx_emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulated::store(t, to, stride)
#define _tile_dpbf16ps(result, left, right) amx_emulated::multiply_bfloat16(result, left, right)
#define __get_cpuid_count(...) amx_emulated::cpuid_count(__VA_ARGS__)
#define syscall(...) amx_emulated::system_call(__VA_ARGS__)
#endif
