#define IQTORCH_ISA avx512
#include "feedback.inl"

namespace iqtorch {
IQTORCH_FEEDBACK(avx512)
}
