#define IQTORCH_ISA avx512
#include "encode.inl"

namespace iqtorch {
IQTORCH_ENCODER(avx512)
}
