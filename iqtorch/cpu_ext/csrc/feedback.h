// Rounding of some groups of columns with error feedback, and the factor it needs: what a call works on, and the entry points per instruction set.
// Plain data only (see format.h). The method is in iqtorch/encode/feedback.py; everything is prepared in compiled.py.
#pragma once
#include <cstddef>
#include <cstdint>

#include "encode.h"

namespace iqtorch {

// Scales (or minima) that a group may have: unit * value[rank]. Tried are the ranks near its own; where each has a unit of its own,
// `stride` leads from one unit to the next.
struct Scales {
  const float* unit;    // [1 or steps, groups, rows]; null: no minima
  const float* value;   // [count]
  const int32_t* near;  // [steps, count]
  int32_t* rank;        // [groups, rows]; in: where to look around, out: what was chosen
  int64_t steps, count, stride;
};

// `columns` columns of `rows` rows, as [columns, rows]; groups of `group` columns, steps of `vec`.
struct FeedbackData {
  int64_t rows, columns, group, vec, entries, kinds, signs, shortlist;
  const float* w;               // weights
  float* x;                     // in: targets, the weights with the errors of earlier calls; out: what remains of them
  const float* lower;           // [columns, columns]: row j is what errors before add to column j
  const float* form;            // [steps, vec, vec]
  const float* square;          // vec > 1, [steps, kinds * entries]: each entry's form (with signs: the diagonal's part)
  const float* book;            // [kinds, entries, vec]
  const float* tiles;           // [kinds, entries / 16, vec, 16]: the same, for comparing 16 entries with one row; null: few entries
  const uint8_t* bytes;         // [kinds, entries, 8]: the values, from 0 on; null unless vec is 8 and there are tiles
  const float* cuts;            // [kinds, 1 + kCells, kCells]: between slabs, and between the cells of each; null unless vec is 4 and there are tiles
  Scales scale, minimum;
  ValueTable values;            // vec 1
  const int32_t *other, *odd, *word;  // vec 1 with parity: code of the other parity by cell; parity by code; word by column
  int32_t* kind;                // [groups, rows]
  int32_t* code;                // [steps, rows]
  float *value, *error;         // [columns, rows]
};

constexpr int kFeedbackRows = 16;  // rows rounded together, one per lane
constexpr int kMaxGroup = 32;
constexpr int kCells = 16;     // entries are in order of kCells slabs by their first value, and of kCells cells by their second within each

// Bytes of scratch for one call, 64-byte aligned.
inline size_t feedback_scratch(const FeedbackData& b) { return (size_t)b.columns * kFeedbackRows * 3 * sizeof(float); }

void feedback_scalar(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);
void feedback_avx2(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);
void feedback_avx512(const FeedbackData&, void* scratch, int64_t tile0, int64_t tile1);

// A positive definite matrix [columns, columns], rows `stride` apart, of which the upper part is read and replaced by the factor U of U D U^T
// (the rest is left undefined); D in blocks of `step` columns, and the inverses of the blocks of `block` columns on the diagonal of U, the
// last of which may be smaller.
struct FactorData {
  int64_t columns, step, block, stride;
  float *form, *blocks, *inverse;  // blocks: [columns / step, step, step]; inverse: [columns, block]
};

// Floats of scratch for one call, 64-byte aligned.
inline size_t factor_scratch(const FactorData& f) { return (size_t)f.columns * (f.columns + kFeedbackRows); }

// False: the matrix is not positive definite.
bool factor_scalar(const FactorData&, float* scratch);
bool factor_avx2(const FactorData&, float* scratch);
bool factor_avx512(const FactorData&, float* scratch);

}  // namespace iqtorch
