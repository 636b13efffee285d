// driver [cases] [seed] [check]: every check, or one, on every path this processor runs; status 0 if all hold.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace {

// The paths of csrc/cpu/isa.h, and amx where its tiles are emulated.
std::vector<hici::cpu::Isa> paths() {
  std::vector<hici::cpu::Isa> found = hici::cpu::runnable();
#if defined(HICI_HAVE_AMX) && defined(HICI_EMULATE_TILES)
  const auto has = [&](hici::cpu::Isa isa) { return std::find(found.begin(), found.end(), isa) != found.end(); };
  if (has(hici::cpu::Isa::kAvx512Bf16) && !has(hici::cpu::Isa::kAmx)) found.push_back(hici::cpu::Isa::kAmx);
#endif
  return found;
}

void check_foundation(hici::cpu::Isa isa, uint64_t seed, int rounds) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case hici::cpu::Isa::value:         \
    return hici::cpu::space::check_foundation(seed, rounds);
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const char* const only = argc > 3 ? argv[3] : nullptr;
  struct Check {
    const char* name;
    void (*run)(hici::cpu::Isa, uint64_t, int);
  };
  const Check checks[] = {
      {"foundation", check_foundation},
      {"attention", hici::driver::check_attention},
      {"local_slots", hici::driver::check_local_slots},
      {"global_stats", hici::driver::check_global_stats},
      {"merge_attention", hici::driver::check_merge_attention},
      {"hga", hici::driver::check_hga},
  };
  // what is the same on every path
  struct Common {
    const char* name;
    void (*run)(uint64_t, int);
  };
  const Common common[] = {{"io", hici::driver::check_io}, {"hga_history", hici::driver::check_hga_history}};
  int run = 0;
  if (cases > 0) hici::driver::check_threads();
  for (const Common& check : common) {
    if (cases < 1 || (only && std::strcmp(only, check.name) != 0)) continue;
    check.run(seed, cases);
    std::printf("%s: %d cases hold\n", check.name, cases);
    std::fflush(stdout);
    ++run;
  }
  for (const hici::cpu::Isa isa : paths())
    for (const Check& check : checks) {
      if (cases < 1 || (only && std::strcmp(only, check.name) != 0)) continue;
      check.run(isa, seed, cases);
      std::printf("%s on %s: %d cases hold\n", check.name, hici::cpu::name(isa), cases);
      std::fflush(stdout);
      ++run;
    }
  if (!run) hici::driver::fail("usage: driver [cases >= 1] [seed] [foundation | attention | local_slots | global_stats | merge_attention | hga | io | hga_history]");
  return 0;
}
