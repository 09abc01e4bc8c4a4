#define IQTORCH_ISA neon
#include "format.h"
#include "simd_neon.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(neon)
}
