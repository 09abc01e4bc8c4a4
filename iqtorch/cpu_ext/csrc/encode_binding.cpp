// `iqtorch_cpu::encode`: the search of iqtorch/encode for units of weights that share a `d` (see encode.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __unix__
#include <sys/mman.h>
#endif

#include "check.h"
#include "dispatch.h"
#include "encode.h"

namespace {

using namespace iqtorch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Run = void (*)(const Encoder&, const EncodeData&, Step, void*, void*, int64_t, int64_t);

Run encoder_of(const char* isa) {
#ifdef IQTORCH_HAVE_AVX512
  if (vectors_of(isa) == Vectors::kAvx512) return encode_avx512;
#endif
#ifdef IQTORCH_HAVE_AVX2
  if (vectors_of(isa) == Vectors::kAvx2) return encode_avx2;
#endif
  (void)isa;
  return encode_scalar;
}

// Numbers and tables in the order in which compiled.py lists them.
struct Reader {
  const int32_t* ints;
  const float* floats;
  const int32_t* int_tables;
  const float* float_tables;

  const int32_t* int_table() { return at(int_tables); }
  const float* float_table() { return at(float_tables); }
  template <class T> const T* at(const T* tables) {
    const int32_t offset = *ints++;
    return offset < 0 ? nullptr : tables + offset;
  }
  Lookup lookup() {
    Lookup t{};
    t.cells = *ints++, t.index = int_table(), t.value = float_table(), t.low = *floats++, t.high = *floats++;
    return t;
  }
  ScaleGrid grid() {
    ScaleGrid g{};
    g.rank = lookup(), g.count = *ints++, g.value = float_table(), g.stored = int_table(), g.factor = *floats++, g.largest = *floats++;
    return g;
  }
};

Encoder read(Reader r, int64_t int_count, int64_t float_count) {
  const Reader start = r;
  Encoder e{};
  std::memcpy(&e.i, r.ints, sizeof(e.i));
  r.ints += sizeof(e.i) / sizeof(int32_t);
  e.reference = *r.floats++, e.smallest = *r.floats++, e.trial_depth = *r.floats++, e.depth = *r.floats++;
  e.values.cells = r.lookup();
  e.values.bits = *r.ints++, e.values.tree = r.float_table(), e.values.shift = r.float_table(), e.values.code = r.int_table();
  e.values.low = *r.floats++, e.values.high = *r.floats++, e.values.first = *r.floats++;
  e.book = r.float_table(), e.other = r.int_table(), e.odd = r.int_table(), e.order = r.int_table();
  e.halves = {r.int_table(), r.float_table(), r.int_table(), r.int_table(), r.int_table(), r.int_table()};
  e.boxes = {r.int_table(), r.int_table(), r.float_table(), r.float_table()};
  e.scale = r.grid(), e.minimum = r.grid();
  e.trial_count = *r.ints++, e.trials = r.float_table();
  e.offset_count = *r.ints++, e.offsets = r.float_table();
  e.reach_count = *r.ints++, e.reach = r.float_table();
  e.reach_minimum_count = *r.ints++, e.reach_minimum = r.float_table();
  IQ_CHECK(r.ints - start.ints == int_count && r.floats - start.floats == float_count,
                  "encode: the compiled module is of another version than iqtorch/encode/compiled.py; build it again");
  return e;
}

// Large blocks are pages of their own, which go back at once: malloc would keep them as holes, and others beside them for the next rows.
constexpr size_t kMapped = 1 << 20;

struct Free {
  size_t mapped = 0;
  void operator()(void* p) const {
#ifdef __unix__
    if (mapped) return (void)munmap(p, mapped);
#endif
    std::free(p);
  }
};
using Block = std::unique_ptr<void, Free>;

Block allocate(size_t bytes) {
#ifdef __unix__
  if (bytes >= kMapped) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    IQ_CHECK_AS(std::runtime_error, pages != MAP_FAILED, "out of memory: ", bytes, " bytes for encoding");
    return Block(pages, Free{bytes});
  }
#endif
  Block block(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  IQ_CHECK_AS(std::runtime_error, block, "out of memory: ", bytes, " bytes for encoding");
  return block;
}

void check(const Tensor& t, ScalarType type, int64_t elements, const char* name) {
  IQ_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == elements, "encode: ", name, " must be contiguous, with ",
                  elements, " elements of the right type; it has ", t.numel());
}

void encode(const Tensor& x, const Tensor& w, const Tensor& exponent, const Tensor& ints, const Tensor& floats, const Tensor& int_tables,
            const Tensor& float_tables, Tensor heads, Tensor groups, Tensor codes, Tensor negative, Tensor products) {
  const Encoder e = read({ints.const_data_ptr<int32_t>(), floats.const_data_ptr<float>(), int_tables.const_data_ptr<int32_t>(),
                          float_tables.const_data_ptr<float>()},
                         ints.numel(), floats.numel());
  IQ_CHECK(e.i.group > 0 && e.i.group % 16 == 0 && (e.i.vec > 1 || e.i.group <= kMaxSingles) && e.i.groups > 0 && e.i.group % e.i.vec == 0 && e.i.keep <= kMaxKeep &&
                      2 * e.trial_count <= kMaxTrials && e.i.variants <= 2 &&
                      (!e.i.box_bits || ((e.i.vec == 4 || e.i.vec == 8) && e.i.group / e.i.vec <= kMaxPositions &&
                        e.i.box_bits <= kMaxBoxBits && e.i.entries <= kMaxBoxEntries)),
                  "encode: no room for groups of ", e.i.group, ", ", e.i.keep, " parabolas, ", e.trial_count, " trial scales and ",
                  e.i.box_bits, " bits of box; see encode.h");
  const int64_t units = exponent.numel(), count = (int64_t)e.i.group * e.i.groups;
  check(x, ScalarType::Float, units * count, "x");
  check(w, ScalarType::Float, w.numel() / count * count, "w");
  check(exponent, ScalarType::Int, units, "exponent");
  check(heads, ScalarType::Int, 2 * units, "heads");
  check(groups, ScalarType::Int, 3 * units * e.i.groups, "groups");
  check(codes, e.i.vec == 1 ? ScalarType::Byte : ScalarType::Int, units * count / e.i.vec, "codes");
  check(negative, ScalarType::Byte, e.i.signs == kUnsigned ? negative.numel() : units * count, "negative");
  check(products, ScalarType::Float, products.numel() ? units : 0, "products");
  int32_t* head = heads.mutable_data_ptr<int32_t>();
  int32_t* group = groups.mutable_data_ptr<int32_t>();
  const int64_t per = units * e.i.groups;
  const EncodeData data{x.const_data_ptr<float>(), w.const_data_ptr<float>(), exponent.const_data_ptr<int32_t>(), w.numel() / count, units,
                        head, head + units, group, group + per, group + 2 * per,
                        e.i.vec == 1 ? nullptr : codes.mutable_data_ptr<int32_t>(), e.i.vec == 1 ? codes.mutable_data_ptr<uint8_t>() : nullptr,
                        negative.mutable_data_ptr<uint8_t>(), products.numel() ? products.mutable_data_ptr<float>() : nullptr};
  const Run run = encoder_of(kernels().name);
  const size_t bytes = encode_scratch(e);
  const Block records = e.i.box_bits ? allocate(encode_record(e) * units + 64) : Block();
  const auto step = [&](Step step) {
    const auto part = [&](int64_t a, int64_t b) { run(e, data, step, allocate(bytes).get(), records.get(), a, b); };
    if (by_column(step)) torch::stable::parallel_for(0, data.weight_rows * e.i.groups, 1, part);
    else if (e.i.vec == 1) torch::stable::parallel_for(0, (units + kLanes - 1) / kLanes, std::max<int64_t>(1, 4096 / (kLanes * count)), part);
    else torch::stable::parallel_for(0, units, std::max<int64_t>(1, 4096 / count), part);
  };
  if (!e.i.box_bits) return step(kWhole);
  step(kPropose), step(kShare), step(kShortlist), step(kRefit);
  for (int round = 0; round < e.i.rounds; ++round) step(kNeighbours), step(kRefit);
  step(kWrite);
}

// For i of `count`: (element + i >> right & mask) << left goes into byte + i of a block.
struct Bits {
  int32_t byte, element, right, left, mask, count;
};

void write_runs(const uint32_t* from, const Bits* bits, int64_t runs, uint8_t* to) {
  for (const Bits* run = bits; run < bits + runs; ++run)
    for (int32_t i = 0; i < run->count; ++i) to[run->byte + i] |= (uint8_t)((from[run->element + i] >> run->right & run->mask) << run->left);
}

// Elements that are bytes go eight at a time: no bit gets into another byte but what the mask takes away.
void write_runs(const uint8_t* from, const Bits* bits, int64_t runs, uint8_t* to) {
  for (const Bits* run = bits; run < bits + runs; ++run) {
    const uint64_t mask = 0x0101010101010101u * (uint64_t)run->mask;
    const auto add = [&](int32_t at, size_t size) {
      uint64_t word = 0, old = 0;
      std::memcpy(&word, from + run->element + at, size), std::memcpy(&old, to + run->byte + at, size);
      old |= (word >> run->right & mask) << run->left;
      std::memcpy(to + run->byte + at, &old, size);
    };
    int32_t at = 0;
    for (; at + 8 <= run->count; at += 8) add(at, 8);
    if (at < run->count) add(at, run->count - at);
  }
}

// Adds the bits of one field: int32 or uint8 values [rows, blocks * count], into zeroed rows of `header` bytes and then `blocks` blocks.
// `plan` is [n, 6].
void write_field(const Tensor& values, const Tensor& plan, int64_t header, int64_t count, int64_t block_bytes, Tensor out) {
  static_assert(sizeof(Bits) == 24, "a plan is rows of six integers");
  const int64_t rows = out.size(0), row_bytes = out.size(1), blocks = (row_bytes - header) / block_bytes, runs = plan.numel() / 6;
  const bool bytes = values.scalar_type() == ScalarType::Byte;
  check(values, bytes ? ScalarType::Byte : ScalarType::Int, rows * blocks * count, "values");
  check(plan, ScalarType::Int, 6 * runs, "plan");
  check(out, ScalarType::Byte, rows * (header + blocks * block_bytes), "out");
  const Bits* bits = (const Bits*)plan.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < runs; ++i)
    IQ_CHECK(bits[i].byte >= 0 && bits[i].count > 0 && bits[i].byte + bits[i].count <= block_bytes && bits[i].element >= 0 &&
                        bits[i].element + bits[i].count <= count,
                    "write_field: the plan leaves the block");
  const void* from = values.const_data_ptr();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, rows * blocks, std::max<int64_t>(1, 65536 / count), [&](int64_t a, int64_t b) {
    int64_t row = a / blocks, place = a % blocks;
    for (int64_t block = a; block < b; ++block) {
      uint8_t* at = to + row * row_bytes + header + place * block_bytes;
      if (++place == blocks) place = 0, ++row;
      bytes ? write_runs((const uint8_t*)from + block * count, bits, runs, at) : write_runs((const uint32_t*)from + block * count, bits, runs, at);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iqtorch_cpu, m) {
  m.def(
      "encode(Tensor x, Tensor w, Tensor exponent, Tensor ints, Tensor floats, Tensor int_tables, Tensor float_tables, "
      "Tensor(a!) heads, Tensor(b!) groups, Tensor(c!) codes, Tensor(d!) negative, Tensor(e!) products) -> ()");
  m.def("write_field(Tensor values, Tensor plan, int header, int count, int block_bytes, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(iqtorch_cpu, CPU, m) { 
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("write_field", TORCH_BOX(&write_field));
}
