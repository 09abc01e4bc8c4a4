// The operators `iqtorch_cpu::*` on plain tensors, through PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "pack.h"

namespace {

using namespace iqtorch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSmall = 1 << 17;  // weights times rows below which threads cost more than they bring

// Gradients in bfloat16: rows from which a dense copy of some columns at a time pays, and its bytes, which a cache holds.
constexpr int64_t kDenseRows = 32, kDenseBytes = 4 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DType dtype_of(ScalarType type, const char* what) {
  if (type == ScalarType::Float) return kFloat32;
  if (type == ScalarType::BFloat16) return kBFloat16;
  IQ_CHECK(type == ScalarType::Half, what, " must be float32, bfloat16 or float16; convert it with .to(torch.float32)");
  return kFloat16;
}

// A dtype as operators take it: its place in KERNEL_DTYPES of ops.py.
ScalarType scalar_type_of(int64_t code) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  IQ_CHECK(code >= 0 && code < 3, "codes of dtypes are 0 (float32), 1 (bfloat16) and 2 (float16), got ", code);
  return types[code];
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Scratch memory, aligned for vectors, grown as needed and kept by each thread.
template <class T> T* scratch(int slot, int64_t count) {
  struct Buffer {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };
  static thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  // Large buffers are given back when they are more than twice too big: a prompt must not pin its size for ever.
  if (buffer.bytes < bytes || (buffer.bytes > (1 << 22) && buffer.bytes > 2 * bytes)) {
    buffer.data.reset(std::aligned_alloc(64, bytes));
    IQ_CHECK_AS(std::runtime_error, buffer.data, "out of memory: ", bytes, " bytes of scratch for a matrix product");
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.data.get());
}

template <class F> void parallel(int64_t count, int64_t work, const F& f) {
  if (work <= kSmall || count <= 1) return f(0, count);
  torch::stable::parallel_for(0, count, 1, f);
}

// A packed matrix (layout.py): full groups of 16 rows, then the rows left over as canonical bytes, which `tail_of` packs for each use.
struct Packed {
  Matrix full;
  const uint8_t* tail;
  int64_t tail_rows, row_bytes;
};

Packed packed_of(const Format& f, const uint8_t* data, int64_t bytes, int64_t rows, int64_t k) {
  IQ_CHECK(k > 0 && k % f.i.block == 0, "rows of GGUF type ", f.i.type, " are a positive multiple of ", f.i.block, " weights, got ", k);
  const int64_t blocks = k / f.i.block, row_bytes = f.i.header_bytes + blocks * f.i.block_bytes, groups = rows / kRows, tail_rows = rows % kRows;
  const int64_t headers = ceil_div(groups * kRows * f.i.header_bytes, 64) * 64, tiles = groups * blocks * f.i.tile_bytes;
  const int64_t expected = headers + tiles + tail_rows * row_bytes;
  IQ_CHECK(rows > 0 && bytes == expected, "a packed matrix of ", rows, " x ", k, " weights has ", expected, " bytes, got ", bytes,
                  "; pass the rows and columns it was packed with");
  return {{&f, data, data + headers, groups * kRows, k, blocks}, data + headers + tiles, tail_rows, row_bytes};
}

Matrix tail_of(const Packed& w) {
  const Format& f = *w.full.format;
  uint8_t* headers = scratch<uint8_t>(7, 64 + w.full.blocks * f.i.tile_bytes);
  for (int64_t r = 0; r < w.tail_rows; ++r) std::memcpy(headers + r * f.i.header_bytes, w.tail + r * w.row_bytes, f.i.header_bytes);
  std::memset(headers + w.tail_rows * f.i.header_bytes, 0, (kRows - w.tail_rows) * f.i.header_bytes);
  pack_tiles(f, w.tail + f.i.header_bytes, w.row_bytes, w.tail_rows, w.full.blocks, headers + 64, 0, 1);
  return {&f, headers, headers + 64, w.tail_rows, w.full.k, w.full.blocks};
}

int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

const Format& format_of(int64_t type, const Tensor& data) {
  IQ_CHECK(data.scalar_type() == ScalarType::Byte && data.is_contiguous(), "packed weights are a contiguous uint8 tensor");
  return find_format(type);
}

// bias as float32, or null.
const float* bias_of(const std::optional<Tensor>& bias, int64_t rows, std::optional<Tensor>& keep) {
  if (!bias) return nullptr;
  IQ_CHECK(bias->numel() == rows && bias->dim() == 1, "a bias must have one dimension and one number per row: ", rows, ", got ", bias->numel(), " in ",
           bias->dim(), " dimensions");
  keep = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
  const DType dtype = dtype_of(keep->scalar_type(), "bias");
  if (dtype == kFloat32) return static_cast<const float*>(keep->const_data_ptr());
  float* wide = scratch<float>(4, rows);
  kernels().to_float(keep->const_data_ptr(), dtype, wide, rows);
  return wide;
}

// One of the products of the same activations: y = x W^T + bias, y contiguous [m, rows].
struct Product {
  Packed w;
  const std::optional<Tensor>* bias;
  void* y;
};

// For contiguous x [m, k]; activations are prepared once for all products.
void multiply(const std::vector<Product>& products, const void* x, DType dtype, int64_t m, int64_t k, bool int8) {
  const Kernels& kern = kernels();
  const int64_t cells = k / kCell;
  Activations act{m, k, nullptr, nullptr, nullptr, nullptr, nullptr};
  // `run(matrix, output)` for the full groups of rows of a matrix and for the rest
  const auto each_part = [&](const Product& p, const auto& run) {
    const Packed& w = p.w;
    const int64_t rows = w.full.rows + w.tail_rows;
    std::optional<Tensor> keep;
    const float* bias = bias_of(*p.bias, rows, keep);
    if (w.full.rows) run(w.full, Output{p.y, dtype, rows, bias});
    if (w.tail_rows)
      run(tail_of(w), Output{static_cast<char*>(p.y) + w.full.rows * element_size(dtype), dtype, rows, bias ? bias + w.full.rows : nullptr});
  };
  if (m >= (int8 ? kern.tiled_int8_rows : kern.tiled_float_rows)) {
    uint16_t* tiled = scratch<uint16_t>(1, kern.tiled_bytes(m, k) / 2);
    parallel(ceil_div(m, 32), m * k, [&](int64_t a, int64_t b) { kern.tile(x, dtype, m, k, tiled, a, b); });
    act.tiled = tiled;
    for (const Product& product : products)
      each_part(product, [&](const Matrix& part, const Output& out) {
        const int64_t row_groups = ceil_div(part.rows, kRows);
        parallel(ceil_div(row_groups, 2), m * part.rows * k, [&](int64_t a, int64_t b) {
          kern.linear_tiled(part, act, out, scratch<float>(6, kern.tiled_scratch()), 2 * a, std::min(2 * b, row_groups));
        });
      });
    return;
  }
  if (!int8) {
    act.x = static_cast<const float*>(x);
    if (dtype != kFloat32) {
      float* converted = scratch<float>(0, m * k);
      parallel(m, m * k, [&](int64_t a, int64_t b) { kern.to_float(static_cast<const char*>(x) + 2 * a * k, dtype, converted + a * k, (b - a) * k); });
      act.x = converted;
    }
  }
  Sums prepared = {};  // what the sums at hand serve
  for (const Product& product : products) {
    const Sums kind = kern.sums(*product.w.full.format, m);
    if (int8 && (kind.groups != prepared.groups || kind.affine != prepared.affine || kind.start != prepared.start)) {
      int8_t* q = scratch<int8_t>(1, m * k);
      float* scale = scratch<float>(2, m * cells);
      int32_t* sums = scratch<int32_t>(3, m * cells * kind.groups);
      parallel(m, m * k, [&](int64_t a, int64_t b) {
        for (int64_t i = a; i < b; ++i) kern.quantize(x, dtype, k, kind, i, m, q, scale, sums);
      });
      act.q = q, act.scale = scale, act.sums = sums;
      prepared = kind;
    }
    each_part(product, [&](const Matrix& part, const Output& out) {
      parallel(ceil_div(part.rows, kRows), m * part.rows * k, [&](int64_t a, int64_t b) { kern.linear(part, act, out, a, b); });
    });
  }
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

// An uninitialised contiguous CPU tensor; `torch::stable::new_empty` looks its operator up by name, which takes half a microsecond.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), (int32_t)type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<Tensor> linear_many(const Tensor& x, const std::vector<Tensor>& data, const std::vector<int64_t>& formats,
                                const std::vector<int64_t>& rows, const std::vector<std::optional<Tensor>>& bias, int64_t precision) {
  const size_t count = data.size();
  IQ_CHECK(x.dim() >= 1, "activations need at least one dimension");
  IQ_CHECK(formats.size() == count && rows.size() == count && bias.size() == count, "as many formats, rows and biases as weights");
  const ScalarType type = x.scalar_type();
  const DType dtype = dtype_of(type, "activations");
  const int64_t k = x.size(-1);
  std::vector<Product> products;
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i) {
    const Format& f = format_of(formats[i], data[i]);
    const Packed w = packed_of(f, data[i].const_data_ptr<uint8_t>(), data[i].numel(), rows[i], k);
    results.push_back(empty(with_last(x, rows[i]), type));
    products.push_back({w, &bias[i], results[i].mutable_data_ptr()});
  }
  const int64_t m = x.numel() / k;
  if (m == 0) return results;
  std::optional<Tensor> keep_x;
  if (!x.is_contiguous()) keep_x = torch::stable::contiguous(x);
  multiply(products, (keep_x ? *keep_x : x).const_data_ptr(), dtype, m, k, precision != 0);
  return results;
}

Tensor linear(const Tensor& x, const Tensor& data, int64_t format, int64_t rows, const std::optional<Tensor>& bias, int64_t precision) {
  return linear_many(x, {data}, {format}, {rows}, {bias}, precision)[0];
}

// Weights of blocks b0 .. b1 of all rows.
void dequantize_columns(const Packed& w, DType dtype, char* out, int64_t b0, int64_t b1) {
  const int64_t columns = (b1 - b0) * w.full.format->i.block;
  parallel(w.full.rows / kRows, w.full.rows * columns, [&](int64_t a, int64_t b) { kernels().dequantize(w.full, dtype, out, b0, b1, a, b); });
  if (w.tail_rows) kernels().dequantize(tail_of(w), dtype, out + w.full.rows * columns * element_size(dtype), b0, b1, 0, 1);
}

// y [m, k] = g [m, rows] W in bfloat16 by PyTorch's product with some columns of W at a time.
void multiply_transposed_bfloat16(const Packed& w, const Tensor& g, Tensor y) {
  const int64_t rows = g.size(1), block = w.full.format->i.block, blocks = w.full.blocks;
  const int64_t step = std::min(blocks, std::max<int64_t>(1, kDenseBytes / (2 * rows * block)));
  Tensor dense = empty({rows, step * block}, ScalarType::BFloat16);
  for (int64_t b0 = 0; b0 < blocks; b0 += step) {
    const int64_t b1 = std::min(blocks, b0 + step);
    if (b1 - b0 < step) dense = empty({rows, (b1 - b0) * block}, ScalarType::BFloat16);
    dequantize_columns(w, kBFloat16, static_cast<char*>(dense.mutable_data_ptr()), b0, b1);
    Tensor part = torch::stable::narrow(y, 1, b0 * block, (b1 - b0) * block);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(g), torch::stable::detail::from(dense), torch::stable::detail::from(part)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

Tensor linear_transposed(const Tensor& g, const Tensor& data, int64_t format, int64_t k) {
  IQ_CHECK(g.dim() >= 1, "gradients need at least one dimension");
  const Format& f = format_of(format, data);
  const DType dtype = dtype_of(g.scalar_type(), "gradients");
  const Kernels& kern = kernels();
  const int64_t rows = g.size(-1);
  const Packed w = packed_of(f, data.const_data_ptr<uint8_t>(), data.numel(), rows, k);
  Tensor y = empty(with_last(g, k), g.scalar_type());
  const int64_t m = g.numel() / rows;
  if (m == 0) return y;
  const Tensor flat = torch::stable::contiguous(g);
  if (dtype == kBFloat16 && m >= kDenseRows && kern.linear_tiled) {  // its bfloat16 products are fast where ours are
    multiply_transposed_bfloat16(w, torch::stable::view(flat, {m, rows}), torch::stable::view(y, {m, k}));
    return y;
  }
  const float* wide = static_cast<const float*>(flat.const_data_ptr());
  float* out = static_cast<float*>(y.mutable_data_ptr());
  if (dtype != kFloat32) {
    float* converted = scratch<float>(0, m * rows);
    kern.to_float(flat.const_data_ptr(), dtype, converted, m * rows);
    wide = converted;
    out = scratch<float>(1, m * k);
  }
  const auto part = [&](const Matrix& own, const float* columns, bool add) {
    parallel(own.blocks, m * own.rows * k, [&](int64_t a, int64_t b) { kern.transposed(own, columns, rows, m, add, out, a, b); });
  };
  if (w.full.rows) part(w.full, wide, false);
  if (w.tail_rows) part(tail_of(w), wide + w.full.rows, w.full.rows != 0);
  if (dtype != kFloat32) kern.from_float(out, dtype, y.mutable_data_ptr(), m * k);
  return y;
}

Tensor dequantize(const Tensor& data, int64_t format, int64_t rows, int64_t k, int64_t code) {
  const Format& f = format_of(format, data);
  const ScalarType type = scalar_type_of(code);
  const DType dtype = dtype_of(type, "weights");
  const int64_t bytes = data.size(-1), count = data.numel() / bytes;
  std::vector<int64_t> sizes(data.sizes().begin(), data.sizes().end() - 1);
  sizes.push_back(rows);
  sizes.push_back(k);
  Tensor y = empty(sizes, type);
  const uint8_t* p = data.const_data_ptr<uint8_t>();
  char* out = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t e = 0; e < count; ++e) {
    const Packed w = packed_of(f, p + e * bytes, bytes, rows, k);
    dequantize_columns(w, dtype, out + e * rows * k * element_size(dtype), 0, w.full.blocks);
  }
  return y;
}

Tensor embedding(const Tensor& ids, const Tensor& data, int64_t format, int64_t rows, int64_t k, int64_t code) {
  const Format& f = format_of(format, data);
  const ScalarType type = scalar_type_of(code);
  const DType dtype = dtype_of(type, "embeddings");
  const Packed w = packed_of(f, data.const_data_ptr<uint8_t>(), data.numel(), rows, k);
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(k);
  Tensor y = empty(sizes, type);
  const int64_t n = ids.numel();
  const Tensor flat = torch::stable::contiguous(ids);
  int64_t* id = scratch<int64_t>(5, n);
  if (flat.scalar_type() == ScalarType::Long) {
    std::memcpy(id, flat.const_data_ptr(), n * sizeof(int64_t));
  } else {
    IQ_CHECK(flat.scalar_type() == ScalarType::Int, "ids must be int64 or int32; convert them with .to(torch.int64)");
    std::copy_n(static_cast<const int32_t*>(flat.const_data_ptr()), n, id);
  }
  for (int64_t i = 0; i < n; ++i)
    IQ_CHECK_AS(std::out_of_range, id[i] >= 0 && id[i] < rows, "index out of range: id ", id[i], " of an embedding with ", rows, " rows (0 .. ", rows - 1, ")");
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const bool ends = std::any_of(id, id + n, [&](int64_t row) { return row >= w.full.rows; });
  const Matrix tail = ends ? tail_of(w) : Matrix{};
  parallel(n, n * k * kRows, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      const bool last = id[i] >= w.full.rows;
      const int64_t row = id[i] - (last ? w.full.rows : 0);
      kernels().gather(last ? tail : w.full, dtype, &row, out + i * k * element_size(dtype), 0, 1);
    }
  });
  return y;
}

Tensor grouped_linear(const Tensor& x, const Tensor& data, const Tensor& offsets, int64_t format, int64_t rows, int64_t precision) {
  const Format& f = format_of(format, data);
  IQ_CHECK(x.dim() == 2 && data.dim() == 2, "activations are [T, K] and packed experts [E, bytes]");
  IQ_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) == data.size(0),
                  "offsets are int32, one per expert: the end of its rows of activations");
  const DType dtype = dtype_of(x.scalar_type(), "activations");
  const int64_t k = x.size(1), tokens = x.size(0), bytes = data.size(1), size = element_size(dtype);
  Tensor y = empty({tokens, rows}, x.scalar_type());
  const Tensor flat = torch::stable::contiguous(x), ends = torch::stable::contiguous(offsets);
  const int32_t* end = static_cast<const int32_t*>(ends.const_data_ptr());
  const char* in = static_cast<const char*>(flat.const_data_ptr());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const std::optional<Tensor> none;
  int64_t start = 0;
  for (int64_t e = 0; e < data.size(0); ++e) {
    const Packed w = packed_of(f, data.const_data_ptr<uint8_t>() + e * bytes, bytes, rows, k);
    IQ_CHECK(end[e] >= start && end[e] <= tokens, "offsets must not decrease nor pass ", tokens, ", got ", end[e], " after ", start);
    if (end[e] > start) multiply({{w, &none, out + start * rows * size}}, in + start * k * size, dtype, end[e] - start, k, precision != 0);
    start = end[e];
  }
  std::memset(out + start * rows * size, 0, (tokens - start) * rows * size);
  return y;
}

// Rows and blocks of canonical bytes, and their packed form.
Packed packed_of(const Format& f, const Tensor& blocks, const Tensor& data) {
  IQ_CHECK(blocks.scalar_type() == ScalarType::Byte && blocks.is_contiguous() && blocks.dim() == 2, "blocks are contiguous uint8 [rows, row_bytes]");
  const int64_t n = (blocks.size(1) - f.i.header_bytes) / f.i.block_bytes;
  return packed_of(f, data.const_data_ptr<uint8_t>(), data.numel(), blocks.size(0), n * f.i.block);
}

void pack(const Tensor& blocks, Tensor data, int64_t format) {
  const Format& f = format_of(format, data);
  const Packed w = packed_of(f, blocks, data);
  const uint8_t* in = blocks.const_data_ptr<uint8_t>();
  uint8_t* headers = data.mutable_data_ptr<uint8_t>();
  uint8_t* tiles = headers + (w.full.tiles - w.full.headers);
  parallel(w.full.rows / kRows, w.full.rows * w.full.k, [&](int64_t a, int64_t b) {
    for (int64_t r = a * kRows; r < b * kRows; ++r) std::memcpy(headers + r * f.i.header_bytes, in + r * w.row_bytes, f.i.header_bytes);
    pack_tiles(f, in + f.i.header_bytes, w.row_bytes, w.full.rows, w.full.blocks, tiles, a, b);
  });
  std::fill(headers + w.full.rows * f.i.header_bytes, tiles, 0);
  std::memcpy(headers + (w.tail - w.full.headers), in + w.full.rows * w.row_bytes, w.tail_rows * w.row_bytes);
}

void unpack(const Tensor& data, Tensor blocks, int64_t format) {
  const Format& f = format_of(format, data);
  const Packed w = packed_of(f, blocks, data);
  uint8_t* out = blocks.mutable_data_ptr<uint8_t>();
  parallel(w.full.rows / kRows, w.full.rows * w.full.k, [&](int64_t a, int64_t b) {
    for (int64_t r = a * kRows; r < b * kRows; ++r) std::memcpy(out + r * w.row_bytes, w.full.headers + r * f.i.header_bytes, f.i.header_bytes);
    unpack_tiles(f, w.full.tiles, w.row_bytes, w.full.rows, w.full.blocks, out + f.i.header_bytes, a, b);
  });
  std::memcpy(out + w.full.rows * w.row_bytes, w.tail, w.tail_rows * w.row_bytes);
}

void register_one(const Tensor& ints, const Tensor& floats, const Tensor& table, const Tensor& units, const Tensor& terms) {
  const auto numbers = [](const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); };
  register_format(numbers(ints), ints.numel(), static_cast<const float*>(floats.const_data_ptr()), floats.numel(),
                  table.const_data_ptr<uint8_t>(), table.numel(), numbers(units), units.numel(), numbers(terms), terms.numel() / 4);
}

// "name=reason" per line, an empty reason for what can run; the one in use comes first.
std::string isa_list() {
  std::string text = std::string(kernels().name) + "\n";
  for (const Isa& isa : instruction_sets()) text += std::string(isa.name) + "=" + isa.missing + "\n";
  return text;
}

void isa_select(std::string name) { select_isa(name); }

}  // namespace

STABLE_TORCH_LIBRARY(iqtorch_cpu, m) {
  m.def("linear(Tensor x, Tensor data, int format, int rows, Tensor? bias, int precision) -> Tensor");
  m.def("linear_many(Tensor x, Tensor[] data, int[] formats, int[] rows, Tensor?[] bias, int precision) -> Tensor[]");
  m.def("linear_transposed(Tensor g, Tensor data, int format, int k) -> Tensor");
  m.def("dequantize(Tensor data, int format, int rows, int k, int dtype) -> Tensor");
  m.def("embedding(Tensor ids, Tensor data, int format, int rows, int k, int dtype) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor data, Tensor offsets, int format, int rows, int precision) -> Tensor");
  m.def("pack(Tensor blocks, Tensor(a!) data, int format) -> ()");
  m.def("unpack(Tensor data, Tensor(a!) blocks, int format) -> ()");
  m.def("register_format(Tensor ints, Tensor floats, Tensor table, Tensor units, Tensor terms) -> ()");
  m.def("isa_list() -> str");
  m.def("isa_select(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(iqtorch_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_many", TORCH_BOX(&linear_many));
  m.impl("linear_transposed", TORCH_BOX(&linear_transposed));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("register_format", TORCH_BOX(&register_one));
}

STABLE_TORCH_LIBRARY_IMPL(iqtorch_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_list", TORCH_BOX(&isa_list));
  m.impl("isa_select", TORCH_BOX(&isa_select));
}
