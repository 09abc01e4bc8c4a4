#define IQTORCH_ISA avx2
#include "feedback.inl"

namespace iqtorch {
IQTORCH_FEEDBACK(avx2)
}
