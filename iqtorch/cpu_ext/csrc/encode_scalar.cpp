#define IQTORCH_ISA scalar
#include "encode.inl"

namespace iqtorch {
IQTORCH_ENCODER(scalar)

size_t encode_scratch(const Encoder& e) {
  scalar::encoder::Search s(e);
  return scalar::encoder::prepare(s, {reinterpret_cast<float*>(64)});
}
}
