// `iqtorch_cpu::feedback`: rounding of some groups of columns with error feedback, and `iqtorch_cpu::unit_factor`, the factor of their metric
// (see feedback.h; called from encode/compiled.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "feedback.h"

namespace {

using namespace iqtorch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Entries {
  void (*feedback)(const FeedbackData&, void*, int64_t, int64_t);
  bool (*factor)(const FactorData&, float*);
};

Entries entries_of(const char* isa) {
#ifdef IQTORCH_HAVE_AVX512
  if (vectors_of(isa) == Vectors::kAvx512) return {feedback_avx512, factor_avx512};
#endif
#ifdef IQTORCH_HAVE_AVX2
  if (vectors_of(isa) == Vectors::kAvx2) return {feedback_avx2, factor_avx2};
#endif
  (void)isa;
  return {feedback_scalar, factor_scalar};
}

void check(const Tensor& t, ScalarType type, int64_t elements, const char* name) {
  IQ_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == elements, "feedback: ", name, " must be contiguous, with ",
                  elements, " elements of the right type; it has ", t.numel());
}

const float* floats(const Tensor& t, int64_t elements, const char* name) {
  check(t, ScalarType::Float, elements, name);
  return elements ? t.const_data_ptr<float>() : nullptr;
}
const int32_t* ints(const Tensor& t, int64_t elements, const char* name) {
  check(t, ScalarType::Int, elements, name);
  return elements ? t.const_data_ptr<int32_t>() : nullptr;
}
const uint8_t* bytes_of(const Tensor& t, int64_t elements, const char* name) {
  check(t, ScalarType::Byte, elements, name);
  return elements ? t.const_data_ptr<uint8_t>() : nullptr;
}
float* floats(Tensor& t, int64_t elements, const char* name) {
  check(t, ScalarType::Float, elements, name);
  return t.mutable_data_ptr<float>();
}
int32_t* ints(Tensor& t, int64_t elements, const char* name) {
  check(t, ScalarType::Int, elements, name);
  return elements ? t.mutable_data_ptr<int32_t>() : nullptr;
}

Scales scales(const Tensor& unit, const Tensor& value, const Tensor& near, Tensor& rank, int64_t groups) {
  if (!unit.numel()) return {nullptr, nullptr, nullptr, nullptr, 1, 1, 0};
  const int64_t count = value.numel(), steps = near.numel() / count, stride = unit.numel() > groups ? groups : 0;
  return {floats(unit, stride ? steps * groups : groups, "units of scales"),
          floats(value, count, "values of scales"),
          ints(near, steps * count, "ranks near each rank"),
          ints(rank, groups, "ranks of scales"),
          steps,
          count,
          stride};
}

// Of single values; the tree has a level of 32 numbers per bit, the values and their codes, and `cells` serve without one.
ValueTable value_table(const Tensor& tree, const Tensor& shift, const Tensor& code, const Tensor& cell_value, int64_t kinds, int64_t bits,
                       int32_t cells, const std::vector<double>& bounds) {
  ValueTable t{};
  t.bits = (int32_t)bits, t.low = (float)bounds[0], t.high = (float)bounds[1];
  t.tree = floats(tree, bits >= 2 && bits <= 5 ? (bits + 2) * 32 : 0, "tree"), t.shift = floats(shift, kinds, "shift");
  t.code = ints(code, (int64_t)(t.high - t.low) + 1, "codes of values");
  t.cells = {nullptr, floats(cell_value, cells, "values of cells"), (float)bounds[2], (float)bounds[3], cells};
  return t;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> allocated(size_t bytes) {
  std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, bytes));
  IQ_CHECK_AS(std::runtime_error, scratch, "out of memory: ", bytes, " bytes of scratch for rounding");
  return scratch;
}

void feedback(const Tensor& w, const Tensor& lower, const Tensor& form, const Tensor& square, const Tensor& book,
              const Tensor& tiles, const Tensor& bytes, const Tensor& cuts,
              const Tensor& scale_unit, const Tensor& scale_value, const Tensor& scale_near, Tensor scale_rank, const Tensor& min_unit,
              const Tensor& min_value, const Tensor& min_near, Tensor min_rank, const Tensor& tree, const Tensor& shift, const Tensor& value_code,
              const Tensor& cell_value, const Tensor& other, const Tensor& odd, const Tensor& word, Tensor x, Tensor kind, Tensor code, Tensor value, Tensor error,
              std::vector<int64_t> numbers, std::vector<double> bounds) {
  IQ_CHECK(numbers.size() == 8 && bounds.size() == 4 && x.dim() == 2,
                  "feedback: the compiled module is of another version than iqtorch/encode/compiled.py; build it again");
  FeedbackData b{};
  b.columns = x.size(0), b.rows = x.size(1);
  b.group = numbers[0], b.vec = numbers[1], b.entries = numbers[2], b.kinds = numbers[3], b.signs = numbers[4];
  b.shortlist = numbers[5];
  const bool vec_ok = b.vec == 1 || b.vec == 2 || b.vec == 4 || b.vec == 8;
  IQ_CHECK(vec_ok && b.group > 0 && b.group <= kMaxGroup && b.group % 16 == 0 && b.columns % b.group == 0 && b.shortlist > 0,
                  "feedback: no room for ", b.columns, " columns in groups of ", b.group, " and steps of ", b.vec, "; see feedback.h");
  const int64_t all = b.columns * b.rows, groups = b.columns / b.group * b.rows, steps = b.columns / b.vec;
  const bool parity = word.numel() > 0;
  b.x = floats(x, all, "x"), b.w = floats(w, all, "w");
  b.lower = floats(lower, b.columns * b.columns, "lower"), b.form = floats(form, steps * b.vec * b.vec, "form");
  b.square = floats(square, b.vec > 1 ? steps * b.kinds * b.entries : 0, "square");
  b.book = floats(book, b.kinds * b.entries * b.vec, "book");
  const bool tiled = tiles.numel() > 0, cells = tiled && b.vec == 4;
  IQ_CHECK(!tiled || (b.vec >= 4 && b.entries % (cells ? kCells * kCells * kFeedbackRows : kFeedbackRows) == 0),
                  "feedback: no tiles of ", b.entries, " entries of ", b.vec, " values");
  b.tiles = floats(tiles, tiled ? b.kinds * b.entries * b.vec : 0, "tiles");
  b.bytes = bytes_of(bytes, tiled && !cells ? b.kinds * b.entries * b.vec : 0, "bytes");
  b.cuts = floats(cuts, cells ? b.kinds * (kCells + 1) * kCells : 0, "cuts");
  b.scale = scales(scale_unit, scale_value, scale_near, scale_rank, groups);
  b.minimum = scales(min_unit, min_value, min_near, min_rank, groups);
  IQ_CHECK(b.scale.unit && (b.vec == 1 || !b.minimum.unit), "feedback: no scales, or minima of a codebook of vectors");
  if (b.vec == 1) b.values = value_table(tree, shift, value_code, cell_value, b.kinds, numbers[6], (int32_t)numbers[7], bounds);
  IQ_CHECK(!parity || b.values.bits == 4, "feedback: parity is for codebooks of 16 values");
  b.other = ints(other, parity ? b.values.cells.cells : 0, "other"), b.odd = ints(odd, parity ? b.entries : 0, "odd");
  b.word = ints(word, parity ? b.columns : 0, "word");
  b.kind = ints(kind, groups, "kind"), b.code = ints(code, steps * b.rows, "code");
  b.value = floats(value, all, "value"), b.error = floats(error, all, "error");
  const auto run = entries_of(kernels().name).feedback;
  const size_t scratch_bytes = feedback_scratch(b);
  const auto part = [&](int64_t first, int64_t last) {
    run(b, allocated(scratch_bytes).get(), first, last);
  };
  torch::stable::parallel_for(0, (b.rows + kFeedbackRows - 1) / kFeedbackRows, 1, part);
}

void unit_factor(Tensor form, int64_t step, Tensor blocks, Tensor inverse) {
  FactorData f{};
  IQ_CHECK(form.dim() == 2 && inverse.dim() == 2, "unit_factor: the matrix and the inverses must have two dimensions");
  f.columns = form.size(0), f.step = step, f.block = inverse.size(1);
  IQ_CHECK(f.columns > 0 && f.columns % kFeedbackRows == 0 && f.block > 0 && f.block % kFeedbackRows == 0 && step > 0 && step <= 8 && kFeedbackRows % step == 0,
                  "unit_factor: no factor of ", f.columns, " columns in steps of ", step, "; see feedback.h");
  IQ_CHECK(form.size(1) == f.columns && form.stride(1) == 1 && form.scalar_type() == ScalarType::Float,
                  "unit_factor: the matrix must be square, of float32, its rows contiguous");
  f.stride = form.stride(0), f.form = form.mutable_data_ptr<float>();
  f.blocks = floats(blocks, f.columns * step, "blocks"), f.inverse = floats(inverse, f.columns * f.block, "inverse");
  const auto scratch = allocated(factor_scratch(f) * sizeof(float));
  IQ_CHECK(entries_of(kernels().name).factor(f, (float*)scratch.get()), "unit_factor: the matrix is not positive definite");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iqtorch_cpu, m) {
  m.def(
      "feedback(Tensor w, Tensor lower, Tensor form, Tensor square, Tensor book, Tensor tiles, Tensor bytes, Tensor cuts, Tensor scale_unit, Tensor scale_value, "
      "Tensor scale_near, Tensor(a!) scale_rank, Tensor min_unit, Tensor min_value, Tensor min_near, Tensor(b!) min_rank, "
      "Tensor tree, Tensor shift, Tensor value_code, Tensor cell_value, Tensor other, Tensor odd, Tensor word, Tensor(c!) x, Tensor(d!) kind, Tensor(e!) code, "
      "Tensor(f!) value, Tensor(g!) error, int[] numbers, float[] bounds) -> ()");
  m.def("unit_factor(Tensor(a!) form, int step, Tensor(b!) blocks, Tensor(c!) inverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(iqtorch_cpu, CPU, m) { m.impl("feedback", TORCH_BOX(&feedback)), m.impl("unit_factor", TORCH_BOX(&unit_factor)); }
