#define IQTORCH_ISA avx512
#include "format.h"
#include "simd_avx512.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(avx512)
}
