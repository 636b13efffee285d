#include "isa.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hici::cpu {
namespace {

#if defined(__x86_64__)
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4];
  if (!__get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3])) return false;
  return r[reg] >> bit & 1;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && cpuid_bit(7, 1, 0, 5); }

// Whether a product of bfloat16 pairs takes longer than the two of float32 that it stands for. Intel's processors that
// multiply tiles issue vdpbf16ps every other cycle (measured: family 6 model 207) and two products of float32 a cycle;
// where a virtual machine hides the tiles, those are the fast ones. Cooper Lake (model 85) has no tiles.
bool slow_bf16_pairs() {
  unsigned r[4];
  if (!__get_cpuid(0, &r[0], &r[1], &r[2], &r[3]) || r[1] != signature_INTEL_ebx) return false;
  if (!__get_cpuid(1, &r[0], &r[1], &r[2], &r[3])) return false;
  const unsigned model = (r[0] >> 4 & 0xf) | (r[0] >> 12 & 0xf0);
  return model != 85;
}

// Tile registers are off until a process asks for them.
bool has_amx() {
#if defined(__linux__)
  if (!has_avx512_bf16() || !cpuid_bit(7, 0, 3, 24) || !cpuid_bit(7, 0, 3, 22)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool slow_bf16_pairs() { return false; }
bool has_amx() { return false; }
#endif

bool runs(Isa isa) {
  switch (isa) {
    case Isa::kBase:
      return true;
    case Isa::kAvx512:
      return has_avx512();
    case Isa::kAvx512Bf16:
      return has_avx512_bf16();
    case Isa::kAmx:
      return has_amx();
  }
  return false;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
#define HICI_NAME(value, text, space) \
  case Isa::value:                    \
    return text;
    HICI_PATHS(HICI_NAME)
#undef HICI_NAME
    default:
      return "";
  }
}

const std::vector<Isa>& runnable() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list;
#define HICI_TRY(value, text, space) \
  if (runs(Isa::value)) list.push_back(Isa::value);
    HICI_PATHS(HICI_TRY)
#undef HICI_TRY
    const auto pairs = std::find(list.begin(), list.end(), Isa::kAvx512Bf16);
    if (pairs != list.end() && slow_bf16_pairs()) std::iter_swap(pairs, pairs - 1);
    return list;
  }();
  return found;
}

}  // namespace hici::cpu
