#include "dispatch.h"

#include "pack.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace iqtorch {
namespace {

#if defined(__x86_64__)
std::string missing_features(std::initializer_list<std::pair<const char*, bool>> features) {
  std::string names;
  for (const auto& [name, present] : features)
    if (!present) names += (names.empty() ? "" : ", ") + std::string(name);
  return names.empty() ? "" : "this CPU lacks " + names;
}

std::string avx2_missing() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);  // not every compiler knows f16c by name
  return missing_features({{"avx2", __builtin_cpu_supports("avx2")}, {"fma", __builtin_cpu_supports("fma")}, {"f16c", c >> 29 & 1}});
}

std::string avxvnni_missing() {
  const std::string base = avx2_missing();
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return base.empty() ? missing_features({{"avx_vnni", a >> 4 & 1}}) : base;
}

std::string avx512_missing() {
  const std::string base = avx2_missing();
  if (!base.empty()) return base;
  return missing_features({{"avx512f", __builtin_cpu_supports("avx512f")},
                           {"avx512bw", __builtin_cpu_supports("avx512bw")},
                           {"avx512vl", __builtin_cpu_supports("avx512vl")},
                           {"avx512dq", __builtin_cpu_supports("avx512dq")},
                           {"avx512vnni", __builtin_cpu_supports("avx512vnni")},
                           {"avx512vbmi", __builtin_cpu_supports("avx512vbmi")}});
}

std::string avx512bf16_missing() {
  const std::string base = avx512_missing();
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  return base.empty() ? missing_features({{"avx512_bf16", a >> 5 & 1}}) : base;
}

// The kernel hands out the tile state (18 = XTILEDATA) only on request (0x1023 = ARCH_REQ_XCOMP_PERM).
std::string amx_missing() {
  const std::string base = avx512bf16_missing();
  if (!base.empty()) return base;
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const std::string own = missing_features({{"amx_tile", d >> 24 & 1}, {"amx_bf16", d >> 22 & 1}});
  if (!own.empty()) return own;
#if defined(__linux__)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return "the operating system does not grant the AMX tile state";
  return "";
#else
  return "AMX is used on Linux only";
#endif
}
#endif

#if defined(__aarch64__)
std::string neon_missing() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? "" : "this CPU lacks the dot-product instructions (asimddp)";
#else
  return "";
#endif
}

std::string i8mm_missing() {
  const std::string base = neon_missing();
  if (!base.empty()) return base;
  bool found = false;
#if defined(__linux__)
  found = getauxval(AT_HWCAP2) >> 13 & 1;  // HWCAP2_I8MM, which older headers do not have
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  found = sysctlbyname("hw.optional.arm.FEAT_I8MM", &value, &size, nullptr, 0) == 0 && value;
#endif
  return found ? "" : "this CPU lacks the 8-bit matrix products (i8mm)";
}
#endif

std::vector<Isa> find_instruction_sets() {
  std::vector<Isa> found;
#if defined(IQTORCH_HAVE_AMX)
  found.push_back({"amx", kernels_amx, amx_missing()});
#endif
#if defined(IQTORCH_HAVE_AVX512BF16)
  found.push_back({"avx512bf16", kernels_avx512bf16, avx512bf16_missing()});
#endif
#if defined(IQTORCH_HAVE_AVX512)
  found.push_back({"avx512", kernels_avx512, avx512_missing()});
#endif
#if defined(IQTORCH_HAVE_AVXVNNI)
  found.push_back({"avxvnni", kernels_avxvnni, avxvnni_missing()});
#endif
#if defined(IQTORCH_HAVE_AVX2)
  found.push_back({"avx2", kernels_avx2, avx2_missing()});
#endif
#if defined(IQTORCH_HAVE_I8MM)
  found.push_back({"i8mm", kernels_i8mm, i8mm_missing()});
#endif
#if defined(IQTORCH_HAVE_NEON)
  found.push_back({"neon", kernels_neon, neon_missing()});
#endif
  found.push_back({"scalar", kernels_scalar, ""});
  for (const char* name : {"amx", "avx512bf16", "avx512", "avxvnni", "avx2", "i8mm", "neon"}) {
    bool listed = false;
    for (const Isa& isa : found) listed |= !std::strcmp(isa.name, name);
    if (!listed) found.push_back({name, nullptr, "this build was made for another kind of CPU, or by a compiler without it"});
  }
  return found;
}

const Kernels* choose(const std::string& asked) {
  std::string names;
  for (const Isa& isa : instruction_sets()) {
    const bool usable = isa.kernels && isa.missing.empty();
    if (asked.empty() && usable) return isa.kernels();
    if (asked == isa.name) {
      if (usable) return isa.kernels();
      throw std::runtime_error("IQTORCH_ISA=" + asked + " cannot run here: " + isa.missing);
    }
    names += std::string(names.empty() ? "" : ", ") + isa.name;
  }
  throw std::runtime_error("IQTORCH_ISA=" + asked + " is not an instruction set; known are " + names);
}

const Kernels* chosen = nullptr;

struct Entry {
  Format format;
  std::vector<uint8_t> table;
  std::unique_ptr<const Bits> bits;
};

std::mutex registry_mutex;
std::map<int64_t, std::unique_ptr<Entry>>& registry() {
  static std::map<int64_t, std::unique_ptr<Entry>> entries;
  return entries;
}
// Read without the lock in the kernels' entry points: GGUF type ids are small.
constexpr int64_t kTypes = 1024;
const Format* by_type[kTypes];

}  // namespace

Vectors vectors_of(const char* isa) {
  const std::string name = isa;
  if (name == "amx" || name == "avx512bf16" || name == "avx512") return Vectors::kAvx512;
  if (name == "avxvnni" || name == "avx2") return Vectors::kAvx2;
  if (name == "i8mm" || name == "neon" || name == "scalar") return Vectors::kScalar;
  throw std::logic_error("vectors_of: nothing is said of " + name);
}

const std::vector<Isa>& instruction_sets() {
  static const std::vector<Isa> sets = find_instruction_sets();
  return sets;
}

void select_isa(const std::string& name) {
  const char* forced = std::getenv("IQTORCH_ISA");
  chosen = choose(!name.empty() ? name : forced ? forced : "");
}

const Kernels& kernels() {
  if (!chosen) select_isa("");
  return *chosen;
}

void register_format(const int32_t* ints, size_t int_count, const float* floats, size_t float_count, const uint8_t* table, size_t table_bytes,
                     const int32_t* units, size_t unit_count, const int32_t* terms, size_t term_count) {
  if (int_count * sizeof(int32_t) != sizeof(Ints) || float_count * sizeof(float) != sizeof(Floats) || ints[0] != kInterface)
    throw std::runtime_error("the compiled kernels and the Python package are of different versions");
  auto entry = std::make_unique<Entry>();
  std::memcpy(&entry->format.i, ints, sizeof(Ints));
  std::memcpy(&entry->format.f, floats, sizeof(Floats));
  const int64_t type = entry->format.i.type;
  if (type < 0 || type >= kTypes) throw std::runtime_error("GGUF type ids go up to 1023, got " + std::to_string(type));
  if (!kernels().accepts(entry->format.i))
    throw std::runtime_error("no decoder for its codes of " + std::to_string(entry->format.i.code_width) + " bits");
  entry->table.assign(table, table + table_bytes);
  entry->table.resize(table_bytes + 64);
  entry->format.table = entry->table.data();
  entry->bits = std::make_unique<Bits>(entry->format.i.block_bytes, units, unit_count, terms, term_count);
  entry->format.bits = entry->bits.get();
  const std::lock_guard<std::mutex> lock(registry_mutex);
  auto& slot = registry()[type];
  if (slot) return;  // a second thread was first; records never change
  slot = std::move(entry);
  by_type[type] = &slot->format;
}

const Format& find_format(int64_t type) {
  if (type < 0 || type >= kTypes || !by_type[type])
    throw std::runtime_error("GGUF type id " + std::to_string(type) + " has no compiled CPU kernels");
  return *by_type[type];
}

}  // namespace iqtorch
