// AVX-512 plus the matrix unit with bfloat16 tiles for many rows of activations.
#define IQTORCH_ISA amx
#include "format.h"
#include "simd_avx512.h"
#include "kernels.inl"
#include "tiles_amx.inl"

#undef IQTORCH_TILED
#define IQTORCH_TILED IQTORCH_TILES(amx::AmxUnit, 16)

namespace iqtorch {
IQTORCH_KERNELS(amx)
}
