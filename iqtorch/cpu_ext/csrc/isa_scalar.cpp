#define IQTORCH_ISA scalar
#include "format.h"
#include "simd_scalar.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(scalar)
}
