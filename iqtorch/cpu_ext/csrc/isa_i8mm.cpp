// NEON with 8-bit matrix products (i8mm).
#define IQTORCH_ISA i8mm
#define IQ_I8MM
#include "format.h"
#include "simd_neon.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(i8mm)
}
