// What the encoder's search knows about a format, and its entry points per instruction set.
// Plain data only (see format.h). Everything here is prepared in iqtorch/encode/compiled.py; the method is in search.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace iqtorch {

// What the scratch memory has room for; binding checks it.
constexpr int kMaxTrials = 160;  // trial scales of a group, both signs
constexpr int kMaxKeep = 16;     // parabolas kept per group
constexpr int kMaxPositions = 8; // vectors of a group, if searched by boxes
constexpr int kMaxBoxBits = 12, kMaxBoxEntries = 1 << 16;
constexpr int kMaxSingles = 32;    // weights of a group of single values
constexpr int kLanes = 16;       // units of single values that are encoded at a time

// Nearest of a list of integers: cell floor(2 y) - low of the number y.
struct Lookup {
  const int32_t* index;
  const float* value;
  float low, high;
  int32_t cells;
};

// Codebook of single values. `bits` 0: all integers from `low` to `high`; 2 to 5: `tree` is a search tree of so many levels
// (encode_values.inl), 32 numbers per level, 32 values and their codes; else `cells` serve. `code`: of value - low, or null if it is
// the low byte of value - first. Variant v adds shift[v] to the values.
struct ValueTable {
  int32_t bits;
  float low, high, first;
  const float *tree, *shift;
  const int32_t* code;
  Lookup cells;
};

// Integers that a stored scale (or minimum) may stand for, times `factor`.
struct ScaleGrid {
  Lookup rank;            // of value / factor; `rank.value` is the integer
  const float* value;     // by rank, times factor
  const int32_t* stored;  // by rank
  int32_t count;
  float factor, largest;
};

// A large codebook as encode_boxes.inl takes it, per variant: values + 128 as bytes [entries, vec]; for each entry the quantile
// (of 16, four bits) of each of its values; the least and the largest value in each quantile [vec, 16].
struct BoxTables {
  const int32_t* bytes;
  const int32_t* rank;
  const float *low, *high;
};

constexpr int kMostQuarters = 32, kMostHalves = 192;

// A codebook of vectors put together from few halves of few quarters, per variant. `count`: of the four quarters and the two halves
// [16]; values of quarters [4, kMostQuarters, vec / 4]; quarters of halves [2, kMostHalves, 2]. Entries are sorted by their first half
// and repeated until each has a multiple of four: `first` entry of each [kMostHalves + 16]; `second`: 32 times their second half;
// `entry`: their code; both [entries + 4 kMostHalves].
struct HalfTables {
  const int32_t* count;
  const float* quarters;
  const int32_t *parts, *first, *second, *entry;
};

enum Signs : int32_t { kUnsigned, kFree, kEven };
enum FloatKind : int32_t { kHalf, kSingle, kExponent };

// Same order as `_prepared` in iqtorch/encode/compiled.py lists them.
struct EncodeInts {
  int32_t group, groups, vec, entries, variants, code_parity, signs, d_kind, affine, two_signs, free_minimum;
  int32_t keep, shortlist, rounds, box_bits;
  int32_t sure_trials;  // a later trial scale only where that before it is the best so far
};

struct Encoder {
  EncodeInts i;
  float reference;  // group maximum (vec 1) or root mean square over `reference` is the unit of the trial scales
  float smallest;   // smallest magnitude of the codebook
  float trial_depth, depth;  // boxes farther than this part of the best error are not opened; 1 is exact
  ValueTable values;      // vec 1
  const float* book;      // [variants, entries, vec]
  const int32_t* other;   // vec 1 with parity: by cell, the nearest code of the other parity (of variant 0)
  const int32_t* odd;     // by code
  const int32_t* order;   // codes of a group, word by word
  HalfTables halves;      // vec 4 and 8, without box_bits
  BoxTables boxes;        // with box_bits
  ScaleGrid scale, minimum;
  const float *trials, *offsets, *reach, *reach_minimum;
  int32_t trial_count, offset_count, reach_count, reach_minimum_count;
};

// Units u of `groups * group` weights; error weights of unit u are row u % weight_rows of `w`.
struct EncodeData {
  const float *x, *w;
  const int32_t* exponent;
  int64_t weight_rows, units;
  int32_t *d, *dmin, *scale, *minimum, *variant, *code;
  uint8_t *byte, *negative;  // single values have their codes in `byte`
  float* product;            // of each unit: sum w x q over its weights x and what is stored of them, q; or null
};

// Formats without boxes are encoded unit by unit, single values sixteen units at a time (kWhole). With boxes the work is cut into steps, each over units or over columns
// (groups of all units that share error weights), because boxes are made once per column.
enum Step : int32_t { kWhole, kPropose, kShare, kShortlist, kRefit, kNeighbours, kWrite };
constexpr bool by_column(Step s) { return s == kPropose || s == kShortlist || s == kNeighbours; }

// Bytes of scratch for one call of a step, and of what is kept of each unit between steps; 64-byte aligned.
size_t encode_scratch(const Encoder& e);
size_t encode_record(const Encoder& e);

void encode_scalar(const Encoder&, const EncodeData&, Step, void* scratch, void* records, int64_t i0, int64_t i1);
void encode_avx2(const Encoder&, const EncodeData&, Step, void* scratch, void* records, int64_t i0, int64_t i1);
void encode_avx512(const Encoder&, const EncodeData&, Step, void* scratch, void* records, int64_t i0, int64_t i1);

}  // namespace iqtorch
