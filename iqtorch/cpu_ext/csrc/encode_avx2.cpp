#define IQTORCH_ISA avx2
#include "encode.inl"

namespace iqtorch {
IQTORCH_ENCODER(avx2)
}
