#include "ceilings.h"

#include <vector>

namespace hici::cpu {
namespace {

CeilingPath path_of(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::ceiling_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::ceiling_path();
  }
}

// Small enough to spread evenly, large enough that handing it out costs nothing.
constexpr int64_t kChunk = int64_t{1} << 18;  // floats
constexpr int64_t kRuns = 128;

}  // namespace

double ceiling_loop(Work work, int64_t rounds, Isa isa, Execution execution) {
  struct Call {
    double (*loop)(Work, int64_t);
    Work work;
    int64_t rounds;
    std::vector<double> done;
  } call{path_of(isa).loop, work, rounds, std::vector<double>(execution.threads)};
  run_workers(
      execution.threads,
      [](void* context, int worker) {
        Call& c = *static_cast<Call*>(context);
        c.done[worker] = c.loop(c.work, c.rounds);
      },
      &call);
  double total = 0;
  for (const double d : call.done) total += d;
  return total;
}

const char* bfloat16_products(Isa isa) { return path_of(isa).products; }

float read_all(const void* data, int64_t bytes, Isa isa, Execution execution) {
  const CeilingPath path = path_of(isa);
  const int64_t count = bytes / 64 * 16, chunks = (count + kChunk - 1) / kChunk;
  std::vector<float> sums(chunks);
  parallel(execution, chunks, [&](int64_t i, int) {
    const int64_t begin = i * kChunk, size = count - begin < kChunk ? count - begin : kChunk;
    sums[i] = path.read(static_cast<const float*>(data) + begin, size);
  });
  float total = 0;
  for (const float s : sums) total += s;
  return total;
}

float read_runs(const int64_t* addresses, int64_t count, int64_t bytes, Isa isa, Execution execution) {
  const CeilingPath path = path_of(isa);
  const int64_t pieces = (count + kRuns - 1) / kRuns;
  std::vector<float> sums(pieces);
  parallel(execution, pieces, [&](int64_t i, int) {
    const int64_t begin = i * kRuns, size = count - begin < kRuns ? count - begin : kRuns;
    sums[i] = path.read_runs(addresses + begin, size, bytes / 4);
  });
  float total = 0;
  for (const float s : sums) total += s;
  return total;
}

}  // namespace hici::cpu
