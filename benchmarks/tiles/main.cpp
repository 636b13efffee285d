// tiles [threads] [rounds]: the time of attention on the path of tiles without its products, and what that leaves of the
// rate of tiles if products take their time afterwards, or beside it. tiles-still: where tiles are not moved either, less
// than any processor needs.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/attention.h"
#include "cpu/ceilings.h"

#if defined(HICI_TILES_STAY)
constexpr const char* kLeft = "neither products nor moves of tiles";
#else
constexpr const char* kLeft = "all but products";
#endif

namespace hici::cpu::amx {

// of all threads: csrc/cpu/kernels/tiles.h
std::atomic<int64_t>& tile_products() {
  static std::atomic<int64_t> count{0};
  return count;
}

}  // namespace hici::cpu::amx

namespace {

using namespace hici::cpu;

constexpr int64_t kSegments = 4, kTokens = 4096, kHeads = 32, kKvHeads = 8, kDim = 128;
// of a product of two tiles: Intel's manuals
constexpr double kFlops = 2.0 * 16 * 16 * 32, kCycles = 16;

double seconds(const std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

struct Spread {
  double median, least, most;
};

template <class Body>
Spread timed(int rounds, Body&& body) {
  std::vector<double> times;
  for (int i = 0; i <= rounds; ++i) {
    const auto began = std::chrono::steady_clock::now();
    body();
    if (i > 0) times.push_back(seconds(began));
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

// Cycles a second of one core: two units add 16 products of float32 each a cycle.
double frequency() {
  const CeilingPath path = amx::ceiling_path();
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    const auto began = std::chrono::steady_clock::now();
    const double flops = path.loop(Work::kFma, 20000);
    best = std::max(best, flops / seconds(began));
  }
  return best / 64;
}

void report(const char* what, double flops, double products, int threads, double hertz, const Spread& rest) {
  const double tiles = products * kCycles / hertz / threads, rate = threads * hertz * kFlops / kCycles;
  const auto share = [&](double time) { return 100 * flops / time / rate; };
  std::printf("%-22s %s %.3f s (%.3f to %.3f), products %.3f s: %.0f %% of the rate of tiles one after the other, %.0f %% "
              "at once\n",
              what, kLeft, rest.median, rest.least, rest.most, tiles, share(rest.median + tiles),
              share(std::max(rest.median, tiles)));
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2, rounds = argc > 2 ? std::atoi(argv[2]) : 7;
  const bool runs = __builtin_cpu_supports("avx512bf16");
  if (!runs || threads < 1 || rounds < 1) {
    std::fprintf(stderr, "tiles needs a processor with avx512_bf16, at least one thread and one round\n");
    return 2;
  }
  std::mt19937 random(0);
  const auto filled = [&](int64_t heads) {
    std::vector<uint16_t> x(kSegments * kTokens * heads * kDim);
    for (uint16_t& bits : x) bits = static_cast<uint16_t>(0x3c00 + random() % 0x400 + (random() & 0x8000));
    return x;
  };
  const std::vector<uint16_t> q = filled(kHeads), k = filled(kKvHeads), v = filled(kKvHeads), grad = filled(kHeads);
  std::vector<uint16_t> out(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> lse(kSegments * kTokens * kHeads), grad_lse(lse.size());
  const auto sequence = [](const std::vector<uint16_t>& x, int64_t heads) {
    return Sequence4{x.data(), kSegments * kTokens * heads * kDim, heads * kDim, kDim};
  };
  AttentionProblem problem{};
  problem.element = Element::kBfloat16, problem.batch = 1, problem.queries = problem.keys = kSegments * kTokens;
  problem.heads = kHeads, problem.kv_heads = kKvHeads, problem.dim = kDim, problem.segment_total = kSegments;
  problem.q = sequence(q, kHeads), problem.k = sequence(k, kKvHeads), problem.v = sequence(v, kKvHeads);
  problem.causal = true, problem.scale = 0.088388;
  AttentionCut cut{};
  cut.segment_len = kTokens;
  const Execution execution{threads, false};

  const double hertz = frequency(), pairs = 0.5 * kTokens * (kTokens + 1) * kSegments * kHeads;
  std::printf("%d threads, %.2f GHz, 4 x 4,096 tokens, 32/8 heads, D 128, bfloat16; median of %d (fastest to slowest)\n",
              threads, hertz * 1e-9, rounds);
  const auto forward = [&] { attention_forward(problem, cut, out.data(), lse.data(), Isa::kAmx, execution); };
  const AttentionGradients gradients{dq.data(), dk.data(), dv.data(), nullptr, nullptr, nullptr, nullptr};
  const auto backward = [&] {
    attention_backward(problem, cut, sequence(grad, kHeads), grad_lse.data(), out.data(), lse.data(), gradients, Isa::kAmx,
                       execution);
  };
  const auto counted = [&](auto&& body) {
    amx::tile_products() = 0;
    body();
    return static_cast<double>(amx::tile_products().load());
  };
  const double first = counted(forward), second = counted(backward);
  report("forward", 4 * kDim * pairs, first, threads, hertz, timed(rounds, forward));
  const auto both = [&] { forward(), backward(); };
  report("forward and backward", 14 * kDim * pairs, first + second, threads, hertz, timed(std::max(3, rounds / 2), both));
  return 0;
}
