#define IQTORCH_ISA avx2
#include "format.h"
#include "simd_avx2.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(avx2)
}
