// Rounding of some groups of columns with error feedback: what a call works on, and its entry points per instruction set.
// Plain data only (see format.h). The method is in iqtorch/encode/feedback.py; everything is prepared in compiled.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace iqtorch {

// Neighbouring values of the integers that a stored scale (or minimum) may stand for.
struct Neighbours {
  const float* value;   // [count], by rank
  const int32_t* rank;  // [steps, count]
  int64_t steps, count;
};

// `columns` columns of `rows` rows, as [columns, rows]; groups of `group` columns, steps of `vec`.
struct FeedbackData {
  int64_t rows, columns, group, vec, entries, kinds, cells, signs, shortlist;
  const float *x, *w;           // targets, and the weights themselves
  const float *d, *dmin;        // [groups, rows]; dmin null: no minima
  const float* lower;           // [columns, columns]: row j is what errors before add to column j
  const float* form;            // [steps, vec, vec]
  const float* square;          // vec > 1, [steps, kinds * entries]: each entry's form (with signs: the diagonal's part)
  const float* book;            // [kinds, entries, vec]
  Neighbours scale, minimum;
  const int32_t* cell_code;     // vec 1: [kinds, cells], nearest code by cell floor(2 y) - low of the number y
  const float* cell_value;
  float low, high;
  const int32_t *other, *odd, *word;  // vec 1 with parity: code of the other parity by cell; parity by code; word by column
  int32_t *scale_rank, *minimum_rank, *kind;  // [groups, rows]; in: where to look around, out: what was chosen
  int32_t* code;                // [steps, rows]
  float *value, *error;         // [columns, rows]
  float* cost;                  // [rows], added to
};

constexpr int kFeedbackRows = 16;  // rows rounded together, one per lane
constexpr int kMaxGroup = 32;
constexpr int kMaxShortlist = 64;

// Bytes of scratch for one call, 64-byte aligned.
inline size_t feedback_scratch(const FeedbackData& b) { return (size_t)b.columns * kFeedbackRows * 3 * sizeof(float); }

void feedback_scalar(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);
void feedback_avx2(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);
void feedback_avx512(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);

}  // namespace iqtorch
