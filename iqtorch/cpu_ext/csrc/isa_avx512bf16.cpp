// AVX-512 plus bfloat16 dot products for many rows of activations in float precision; in int8 precision it is as `avx512`.
#define IQTORCH_ISA avx512bf16
#include "format.h"
#include "simd_avx512.h"
#include "kernels.inl"
#include "tiles_dot.inl"

#undef IQTORCH_TILED
#define IQTORCH_TILED IQTORCH_TILES(avx512bf16::DotUnit, INT64_MAX)

namespace iqtorch {
IQTORCH_KERNELS(avx512bf16)
}
