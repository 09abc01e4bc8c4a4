#define IQTORCH_ISA avxvnni
#define IQ_VNNI
#include "format.h"
#include "simd_avx2.h"
#include "kernels.inl"

namespace iqtorch {
IQTORCH_KERNELS(avxvnni)
}
