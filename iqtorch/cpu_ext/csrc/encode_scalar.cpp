#define IQTORCH_ISA scalar
#include "encode.inl"

namespace iqtorch {
IQTORCH_ENCODER(scalar)

size_t encode_scratch(const Encoder& e) { return scalar::encoder::scratch_bytes(e); }
size_t encode_record(const Encoder& e) { return scalar::encoder::record_bytes(e); }
}
