#define IQTORCH_ISA scalar
#include "feedback.inl"

namespace iqtorch {
IQTORCH_FEEDBACK(scalar)
}
