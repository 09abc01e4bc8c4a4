// Which instruction set runs, and the registered formats. No torch here: the kernels can be tested without it.
#pragma once
#include <string>
#include <vector>

#include "format.h"

namespace iqtorch {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();  // null: not in this build
  std::string missing;          // why this machine cannot run it; empty if it can
};

// Every instruction set this build or this machine could have, the best first.
const std::vector<Isa>& instruction_sets();

// The one in use: IQTORCH_ISA if set, else the best. Throws std::runtime_error for an unknown or unavailable name.
const Kernels& kernels();

// Chooses again: an empty name means IQTORCH_ISA or the best.
void select_isa(const std::string& name);

// Encoders are compiled for fewer instruction sets than kernels: those that serve one in use. Throws std::logic_error if it is not listed.
enum class Vectors { kScalar, kAvx2, kAvx512 };
Vectors vectors_of(const char* isa);

// Throws std::runtime_error if the numbers describe a format no decoder reads.
// `units` and `terms` (four numbers each): see `Bits`.
void register_format(const int32_t* ints, size_t int_count, const float* floats, size_t float_count, const uint8_t* table, size_t table_bytes,
                     const int32_t* units, size_t unit_count, const int32_t* terms, size_t term_count);
const Format& find_format(int64_t type);

}  // namespace iqtorch
