// The checks main.cpp runs. Each ends the program where something does not hold.
#pragma once

#include <vector>

#include "../cpu/isa.h"
#include "driver.h"

namespace hici::cpu {
#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  void check_foundation(uint64_t seed, int rounds); \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE
}  // namespace hici::cpu

namespace hici::driver {

void check_threads();
void check_io(uint64_t seed, int cases);
void check_hga_history(uint64_t seed, int cases);
void check_attention(cpu::Isa isa, uint64_t seed, int cases);
void check_local_slots(cpu::Isa isa, uint64_t seed, int cases);
void check_global_stats(cpu::Isa isa, uint64_t seed, int cases);
void check_merge_attention(cpu::Isa isa, uint64_t seed, int cases);
void check_hga(cpu::Isa isa, uint64_t seed, int cases);

}  // namespace hici::driver
