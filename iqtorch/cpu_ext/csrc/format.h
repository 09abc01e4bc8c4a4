// What the kernels know about a format, and the table of functions that each instruction set provides.
// Plain data only: this header is compiled into translation units with different machine flags, so it must not define
// inline functions that the linker could share between them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace iqtorch {

constexpr int kInterface = 4;  // `INTERFACE` of layout.py: a build that is older than the Python package must not run
constexpr int kRows = 16;      // rows interleaved in a tile
constexpr int kCell = 32;      // weights of a row that share an activation scale
constexpr int kVector = 64;    // bytes: four neighbouring weights of each of 16 rows
constexpr int kMaxBlock = 256; // weights per block
constexpr int kMaxPlanes = 4;
constexpr int kMaxGroups = kMaxBlock / 16;

// The numbers of iqtorch/cpu_ext/layout.py.
enum Decoder : int32_t { kPlain, kLookup, kPairs, kWords, kGrid, kTrellis };
enum Sign : int32_t { kNoSign, kSignBits, kSignParity };
enum DType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct Plane {
  int32_t offset, bits, low;
};

struct Field {
  int32_t count;
  Plane plane[kMaxPlanes];
};

// Same order as `Layout.ints` and `Layout.floats` in iqtorch/cpu_ext/layout.py.
struct Ints {
  int32_t interface;  // kInterface
  int32_t type, block, block_bytes, header_bytes, d_bytes, tile_bytes;
  int32_t decoder, sign, code_width, vec, largest, bias;
  int32_t delta;  // added to the operands of weights whose variant bit is set, modulo 256
  int32_t variant_in_code, flip;
  int32_t groups, affine;  // `groups` per cell (one or two) have a scale, and a minimum, of their own
  int32_t folded_bias;     // makes every scale times value an unsigned byte; -1 if they do not fit
  int32_t scale_flip, scale_linear;
  uint8_t scale_table[32];  // scales by what is stored, up to 32 of them, plus 128
  int32_t multiplier, generator_offset;
  Field code, sign_bits, d, dmin, scale, min, variant;
};

struct Floats {
  float unit, runtime_scale, scale_a, scale_b, min_b;
};

struct Bits;  // where the bits of a block go: pack.h

struct Format {
  Ints i;
  Floats f;
  const uint8_t* table;  // operands (value + bias) by code; padded so that 8 bytes may be read at any entry
  const Bits* bits;
};

// A packed matrix. Tiles of row group g start at `tiles + g * blocks * tile_bytes`.
struct Matrix {
  const Format* format;
  const uint8_t* headers;
  const uint8_t* tiles;
  int64_t rows, k, blocks;
};

// What a product needs of the sums of its int8 activations, per group. An operand is value + bias: integer products start from
// `start` (minus the bias) times the sum of q. Formats with minima have no bias, and multiply the minima by minus scale times the sum.
struct Sums {
  int32_t groups, affine, start;
};

// Activations of `m` rows: int8 with a scale per cell, or float32. A panel is 256 columns, 8 cells, the last one what is left.
struct Activations {
  int64_t m, k;
  const int8_t* q;       // [panel][m][cells][32]
  const float* scale;    // [panel][m][cells]
  const int32_t* sums;   // [panel][m][cells][groups]: see `Sums`; the bits of floats if `affine`
  const float* x;        // [m, k] when q is null
  const uint16_t* tiled; // bfloat16 in the order of tiles.inl, or null
};

struct Output {
  void* data;
  DType dtype;
  int64_t stride;     // elements between rows
  const float* bias;  // [rows] or null
};

struct Kernels {
  const char* name;
  bool (*accepts)(const Ints&);  // false: no decoder for such codes
  void (*to_float)(const void* x, DType dtype, float* out, int64_t count);
  void (*from_float)(const float* x, DType dtype, void* out, int64_t count);
  Sums (*sums)(const Format&, int64_t m);
  // Row `row` of `rows` of the activations x of a product.
  void (*quantize)(const void* x, DType dtype, int64_t k, Sums, int64_t row, int64_t rows, int8_t* q, float* scale, int32_t* sums);
  void (*linear)(const Matrix&, const Activations&, const Output&, int64_t g0, int64_t g1);
  // Columns of blocks b0 .. b1 alone, in the rows of groups g0 .. g1 of `out`.
  void (*dequantize)(const Matrix&, DType, void* out, int64_t b0, int64_t b1, int64_t g0, int64_t g1);
  void (*gather)(const Matrix&, DType, const int64_t* ids, void* out, int64_t i0, int64_t i1);
  // Columns of blocks b0 .. b1 of `g [m, rows] @ W`, in or added to float32 out [m, k]; rows of g are `stride` apart.
  void (*transposed)(const Matrix&, const float* g, int64_t stride, int64_t m, bool add, float* out, int64_t b0, int64_t b1);
  // Products in bfloat16 (tiles.inl), or null: bytes of `tiled` for m rows, floats of scratch of each thread, preparation (rows in
  // steps of 32), product; and how many rows of activations it takes for them to be the fastest way in float and in int8 precision.
  int64_t (*tiled_bytes)(int64_t m, int64_t k);
  int64_t (*tiled_scratch)();
  void (*tile)(const void* x, DType dtype, int64_t m, int64_t k, uint16_t* tiled, int64_t step0, int64_t step1);
  void (*linear_tiled)(const Matrix&, const Activations&, const Output&, float* scratch, int64_t g0, int64_t g1);
  int64_t tiled_float_rows, tiled_int8_rows;
};

// Kernels of one instruction set, defined by isa_<name>.cpp.
const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_amx();
const Kernels* kernels_neon();
const Kernels* kernels_i8mm();

}  // namespace iqtorch
