// Runs the compiled kernels without torch on cases written by tests/test_cpu_native.py: under an emulator of another CPU,
// or with the sanitizers. Every buffer has exactly its size, so that a read or write past an end is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "pack.h"

using namespace iqtorch;

namespace {

FILE* input;

template <class T> std::vector<T> read(size_t count) {
  std::vector<T> v(count);
  if (count && fread(v.data(), sizeof(T), count, input) != count) {
    fprintf(stderr, "the case file ends early\n");
    exit(2);
  }
  return v;
}

double error(const std::vector<float>& actual, const std::vector<float>& expected) {
  double wrong = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    wrong += std::pow((double)actual[i] - expected[i], 2);
    norm += std::pow((double)expected[i], 2);
  }
  return std::sqrt(wrong / norm);
}

// Equal numbers; zeros of either sign are equal, because a negated zero has no sign in an integer product.
bool same(const float* a, const std::vector<float>& b, size_t count) {
  for (size_t i = 0; i < count; ++i)
    if (!(a[i] == b[i])) return false;
  return true;
}

int failures = 0;

void check(bool good, const char* isa, int type, const char* what, double value = 0) {
  if (good) return;
  ++failures;
  printf("FAILED %s type %d: %s %g\n", isa, type, what, value);
}

struct Case {
  std::vector<uint8_t> blocks, random;
  std::vector<float> x, g, dequant, product, product_int8, transposed;
  int64_t rows, k, m;
};

void run(const Format& f, const Case& c, const Kernels& kern, const char* isa) {
  const int64_t n = c.k / f.i.block, groups = (c.rows + kRows - 1) / kRows, row_bytes = f.i.header_bytes + n * f.i.block_bytes;
  std::vector<uint8_t> headers(groups * kRows * f.i.header_bytes), tiles(groups * n * f.i.tile_bytes, 0xa5);
  for (const std::vector<uint8_t>* source : {&c.random, &c.blocks}) {
    std::fill(headers.begin(), headers.end(), 0);
    for (int64_t r = 0; r < c.rows && f.i.header_bytes; ++r)
      memcpy(headers.data() + r * f.i.header_bytes, source->data() + r * row_bytes, f.i.header_bytes);
    pack_tiles(f, source->data() + f.i.header_bytes, row_bytes, c.rows, n, tiles.data(), 0, groups);
    std::vector<uint8_t> back(*source);
    for (int64_t r = 0; r < c.rows; ++r) memset(back.data() + r * row_bytes + f.i.header_bytes, 0xa5, n * f.i.block_bytes);
    unpack_tiles(f, tiles.data(), row_bytes, c.rows, n, back.data() + f.i.header_bytes, 0, groups);
    check(back == *source, isa, f.i.type, "pack and unpack");
    // random bytes: only that nothing is read or written out of bounds, and no undefined arithmetic
    const Matrix w{&f, headers.data(), tiles.data(), c.rows, c.k, n};
    std::vector<float> dequant(c.rows * c.k, NAN), y(c.m * c.rows, NAN), bias(c.rows, 0.0f);
    kern.dequantize(w, kFloat32, dequant.data(), 0, n, 0, groups);
    if (source == &c.blocks) check(same(dequant.data(), c.dequant, dequant.size()), isa, f.i.type, "dequantize");

    std::vector<uint16_t> half(c.rows * c.k);
    for (DType dtype : {kBFloat16, kFloat16}) {
      kern.dequantize(w, dtype, half.data(), 0, n, 0, groups);
      std::vector<float> wide(half.size());
      kern.to_float(half.data(), dtype, wide.data(), half.size());
      if (source == &c.blocks) check(error(wide, c.dequant) < 4e-3, isa, f.i.type, "16-bit weights", error(wide, c.dequant));
    }

    std::vector<int64_t> ids = {c.rows - 1, 0};
    std::vector<float> rows(2 * c.k, NAN);
    kern.gather(w, kFloat32, ids.data(), rows.data(), 0, 2);
    if (source == &c.blocks) check(same(rows.data() + c.k, c.dequant, c.k), isa, f.i.type, "gather");

    Activations act{c.m, c.k, nullptr, nullptr, nullptr, c.x.data(), nullptr};
    const Output out{y.data(), kFloat32, c.rows, bias.data()};
    kern.linear(w, act, out, 0, groups);
    if (source == &c.blocks) check(error(y, c.product) < 2e-6, isa, f.i.type, "float product", error(y, c.product));

    const int64_t cells = c.k / kCell;
    std::vector<int8_t> q(c.m * c.k);
    std::vector<float> scale(c.m * cells);
    std::vector<int32_t> sums(c.m * cells * f.i.groups);
    act.q = q.data(), act.scale = scale.data(), act.sums = sums.data();
    for (int64_t m : {c.m, (int64_t)1}) {
      std::vector<float> part(m * c.rows, NAN);
      for (int64_t i = 0; i < m; ++i) kern.quantize(c.x.data(), kFloat32, c.k, kern.sums(f, m), i, m, q.data(), scale.data(), sums.data());
      act.m = m;
      kern.linear(w, act, {part.data(), kFloat32, c.rows, nullptr}, 0, groups);
      const std::vector<float> expected(c.product_int8.begin(), c.product_int8.begin() + m * c.rows);
      if (source == &c.blocks) check(error(part, expected) < 1e-5, isa, f.i.type, "int8 product", error(part, expected));
    }

    std::vector<float> back_product(c.m * c.k, NAN);
    kern.transposed(w, c.g.data(), c.rows, c.m, false, back_product.data(), 0, n);
    if (source == &c.blocks) check(error(back_product, c.transposed) < 2e-6, isa, f.i.type, "transposed product", error(back_product, c.transposed));

    if (kern.linear_tiled) {
      struct Free { void operator()(void* p) const { free(p); } };
      const int64_t bytes = (kern.tiled_bytes(c.m, c.k) + 63) / 64 * 64, scratch_bytes = kern.tiled_scratch() * 4;
      std::unique_ptr<uint16_t, Free> tiled((uint16_t*)aligned_alloc(64, bytes));
      std::unique_ptr<float, Free> scratch((float*)aligned_alloc(64, scratch_bytes));
      kern.tile(c.x.data(), kFloat32, c.m, c.k, tiled.get(), 0, (c.m + 31) / 32);
      act.tiled = tiled.get(), act.m = c.m;
      memset(scratch.get(), 0, scratch_bytes);
      kern.linear_tiled(w, act, out, scratch.get(), 0, groups);
      if (source == &c.blocks) check(error(y, c.product) < 4e-3, isa, f.i.type, "tiled product", error(y, c.product));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !(input = fopen(argv[1], "rb"))) {
    fprintf(stderr, "usage: kernels_main CASES\n");
    return 2;
  }
  const int count = read<int32_t>(1)[0];
  int runs = 0;
  for (int i = 0; i < count; ++i) {
    const auto sizes = read<int32_t>(7);  // table bytes, units, terms, rows, k, m, row bytes
    const auto ints = read<int32_t>(sizeof(Ints) / 4);
    const auto floats = read<float>(sizeof(Floats) / 4);
    const auto table = read<uint8_t>(sizes[0]);
    const auto units = read<int32_t>(sizes[1]), terms = read<int32_t>(4 * sizes[2]);
    Case c;
    c.rows = sizes[3], c.k = sizes[4], c.m = sizes[5];
    c.blocks = read<uint8_t>(c.rows * sizes[6]);
    c.random = read<uint8_t>(c.rows * sizes[6]);
    c.x = read<float>(c.m * c.k);
    c.g = read<float>(c.m * c.rows);
    c.dequant = read<float>(c.rows * c.k);
    c.product = read<float>(c.m * c.rows);
    c.product_int8 = read<float>(c.m * c.rows);
    c.transposed = read<float>(c.m * c.k);
    register_format(ints.data(), ints.size(), floats.data(), floats.size(), table.data(), table.size(), units.data(), units.size(),
                    terms.data(), sizes[2]);
    for (const Isa& isa : instruction_sets())
      if (isa.kernels && isa.missing.empty()) run(find_format(ints[1]), c, *isa.kernels(), isa.name), ++runs;
  }
  for (const Isa& isa : instruction_sets())
    if (isa.kernels) printf("%s: %s\n", isa.name, isa.missing.empty() ? "checked" : isa.missing.c_str());
  printf("%d formats, %d runs, %d failures\n", count, runs, failures);
  return failures != 0;
}
