// Rounding with error feedback (see iqtorch/encode/feedback.py for the method), compiled once per instruction set: sixteen rows at a
// time, one per lane.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#include <type_traits>

#include "encode_values.inl"
#include "feedback.h"

namespace iqtorch { namespace IQTORCH_ISA { namespace rounding {

using namespace encoder;
constexpr int L = kFeedbackRows;
static_assert(L == kLanes, "a row in each lane");

// Rows of a tile; lanes beyond the last row hold zeros and are not written.
IQ_FN F load_lanes(const float* p, int64_t lanes) {
  float t[L] = {};
  if (lanes == L) return load(p);
  __builtin_memcpy(t, p, lanes * sizeof(float));
  return load(t);
}
IQ_FN I load_lanes(const int32_t* p, int64_t lanes) {
  int32_t t[L] = {};
  if (lanes == L) return load(p);
  __builtin_memcpy(t, p, lanes * sizeof(int32_t));
  return load(t);
}
template <class V, class T> IQ_FN void store_lanes(T* p, V v, int64_t lanes) {
  T t[L];
  if (lanes == L) return store(p, v);
  store(t, v), __builtin_memcpy(p, t, lanes * sizeof(T));
}

#include "factor.inl"
#include "feedback_singles.inl"
#include "feedback_vectors.inl"

// Adds what the errors of the columns a to a + group leave to the columns from `first` on: eight at a time, which hides the latency.
IQ_FN void propagate(const FeedbackData& b, int64_t a, int64_t first, const float* error, float* x) {
  constexpr int kColumns = 8;  // groups are multiples of 16 columns
  for (int64_t j = first; j < b.columns; j += kColumns) {
    const float* before = b.lower + j * b.columns + a;
    F t[kColumns];
    for (int i = 0; i < kColumns; ++i) t[i] = load(x + (j + i) * L);
    for (int64_t k = 0; k < b.group; ++k) {
      const F e = load(error + (a + k) * L);
      for (int i = 0; i < kColumns; ++i) t[i] = fma(e, set(before[i * b.columns + k]), t[i]);
    }
    for (int i = 0; i < kColumns; ++i) store(x + (j + i) * L, t[i]);
  }
}

template <class Group> static void round_tiles(const FeedbackData& b, const Group& round_group, float* x, int64_t tile0, int64_t tile1) {
  float *w = x + b.columns * L, *error = w + b.columns * L;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const int64_t row = tile * L, lanes = b.rows - row < L ? b.rows - row : L;
    for (int64_t j = 0; j < b.columns; ++j) {
      store(x + j * L, load_lanes(b.x + j * b.rows + row, lanes));
      store(w + j * L, load_lanes(b.w + j * b.rows + row, lanes));
    }
    for (int64_t group = 0; group < b.columns / b.group; ++group) {
      const int64_t a = group * b.group;
      round_group(group, row, lanes, x + a * L, w + a * L, error + a * L);
      propagate(b, a, a + b.group, error, x);
    }
  }
}

static void round_rows(const FeedbackData& b, void* scratch, int64_t tile0, int64_t tile1) {
  const auto run = [&](const auto& round_group) { round_tiles(b, round_group, (float*)scratch, tile0, tile1); };
  switch (b.vec) {
    case 2: return run(vectors::Vectors<2>{b});
    case 4: return run(vectors::Vectors<4>{b});
    case 8: return run(vectors::Vectors<8>{b});
  }
  if (b.word) return run(Singles<Tree<4>, true>(b));
  switch (b.values.bits) {
    case 0: return run(Singles<Whole, false>(b));
    case 2: return run(Singles<Tree<2>, false>(b));
    case 3: return run(Singles<Tree<3>, false>(b));
    case 4: return run(Singles<Tree<4>, false>(b));
    case 5: return run(Singles<Tree<5>, false>(b));
    default: return run(Singles<Cells, false>(b));
  }
}

}}}  // namespace iqtorch::IQTORCH_ISA::rounding

#define IQTORCH_FEEDBACK(isa)                                                                            \
  void feedback_##isa(const FeedbackData& b, void* scratch, int64_t tile0, int64_t tile1) {              \
    isa::rounding::round_rows(b, scratch, tile0, tile1);                                                 \
  }                                                                                                      \
  bool factor_##isa(const FactorData& f, float* scratch) { return isa::rounding::factor::run(f, scratch); }
