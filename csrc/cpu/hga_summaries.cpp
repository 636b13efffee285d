#include "hga_summaries.h"

#include <algorithm>
#include <cmath>

#include "memory.h"

namespace hici::cpu {
namespace {

SummaryPath summary_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::summary_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::summary_path();
  }
}

// Keys below which another thread would wake up too late.
constexpr int64_t kWorthThreads = 1 << 16;

// cos and sin of R(to - from), angles formed in float as the models form theirs.
void turn(const SummaryProblem& p, int64_t cut, int64_t difference, float* cosine, float* sine) {
  for (int64_t i = 0; i < p.half; ++i) {
    const float angle = static_cast<float>(difference) * static_cast<float>(p.inv_freq[i]);
    cosine[i] = i < cut ? 1.0f : static_cast<float>(std::cos(static_cast<double>(angle)));
    sine[i] = i < cut ? 0.0f : static_cast<float>(std::sin(static_cast<double>(angle)));
  }
}

struct Tables {
  float *token, *group;

  static int64_t size(const SummaryProblem& p) { return 2 * (p.chunk + p.groups()) * p.half; }
  Tables(const SummaryProblem& p, float* memory) : token(memory), group(memory + 2 * p.chunk * p.half) {}

  // at(j): position of the chunk's token j, up to a constant
  template <class At>
  void fill(const SummaryProblem& p, int64_t cut, At&& at) const {
    const int64_t anchor = at((p.chunk - 1) / 2);
    for (int64_t m = 0; m < p.groups(); ++m) {
      const int64_t first = m * p.group, own = at(first + (p.group - 1) / 2);
      for (int64_t j = first; j < first + p.group; ++j)
        turn(p, cut, own - at(j), token + j * p.half, token + (p.chunk + j) * p.half);
      turn(p, cut, anchor - own, group + m * p.half, group + (p.groups() + m) * p.half);
    }
  }
};

}  // namespace

void hga_summaries(const SummaryProblem& p, Isa isa, Execution execution) {
  const int64_t items = p.batch * p.chunks();
  if (items == 0) return;
  const SummaryPath path = summary_path(isa);
  int64_t cut = 0;
  for (int64_t i = 0; i < p.half; ++i)
    if (static_cast<double>(std::max<int64_t>(1, p.chunk - 1)) * p.inv_freq[i] > 0.5) cut = i + 1;

  if (items * p.chunk * p.heads < kWorthThreads) execution.threads = 1;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, items));
  const int64_t scratch_size = (path.scratch(p) + 63) / 64 * 64;
  const int64_t table_size = (Tables::size(p) * 4 + 63) / 64 * 64;
  const int64_t own_tables = p.positions ? workers : 0;
  const Memory memory(workers * scratch_size + (1 + own_tables) * table_size);
  char* const base = static_cast<char*>(memory.data());
  const auto tables = [&](int64_t i) {
    return Tables(p, reinterpret_cast<float*>(base + workers * scratch_size + i * table_size));
  };
  const Tables shared = tables(0);
  shared.fill(p, cut, [](int64_t j) { return j; });

  parallel(execution, items, [&](int64_t item, int worker) {
    const int64_t b = item / p.chunks(), c = item % p.chunks();
    Tables used = shared;
    if (p.positions) {
      const int64_t* const from = p.positions + b * p.position_batch + c * p.chunk * p.position_key;
      const auto at = [&](int64_t j) { return from[j * p.position_key]; };
      bool consecutive = true;
      for (int64_t j = 1; j < p.chunk && consecutive; ++j) consecutive = at(j) - at(j - 1) == 1;
      if (!consecutive) {
        used = tables(1 + worker);
        used.fill(p, cut, at);
      }
    }
    path.chunk(p, b, c, {used.token, used.group, cut}, base + worker * scratch_size);
  });
}

}  // namespace hici::cpu
