#include "local_slots.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"

namespace hici::cpu {
namespace {

// Tokens below which cutting a segment costs more, in sums to write and merge, than more cores give; and chunks that
// are enough for the cores of a large machine. Constants, since the cut decides the order of additions.
constexpr int64_t kChunkTokens = 512, kChunks = 32;
// Bytes of sums in memory at the same time: they should stay in the last cache.
constexpr int64_t kWaveBytes = int64_t{1} << 26;
// Below this many multiplications a call is over before another thread has woken up.
constexpr double kWorthThreads = 2e6;

LocalSlotsPath path_of(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::local_slots_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::local_slots_path();
  }
}

LocalSlotsDirect direct_of(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::local_slots_direct();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::local_slots_direct();
  }
}

// Multiplications that a call may cost to be computed directly.
constexpr double kDirectWork = 1 << 20;

int64_t element_size(Element e) { return e == Element::kFloat32 ? 4 : 2; }

class Plan {
 public:
  Plan(const LocalSlotsProblem& given, const LocalSlotsCut& cut, bool backward) : problem_(given) {
    const int64_t s = given.length;
    bool masked = false;
    if (cut.mask)
      for (int64_t b = 0; b < given.batch && !masked; ++b)
        for (int64_t t = 0; t < s && !masked; ++t) masked = !cut.mask[b * cut.mask_batch + t * cut.mask_column];
    if (masked) columns_.resize(given.batch * s);

    int64_t tokens = 0;
    const int64_t documents = cut.documents ? cut.document_count : 1;
    for (int64_t b = 0; b < given.batch; ++b) {
      int64_t number = 0, listed = 0;
      for (int64_t d = 0; d < documents; ++d) {
        const int64_t first = cut.documents ? cut.documents[d] : 0, last = cut.documents ? cut.documents[d + 1] : s;
        const int64_t step = cut.segment_len > 0 ? cut.segment_len : std::max<int64_t>(last - first, 1);
        for (int64_t start = first, stop; start < last; start = stop, ++number) {
          stop = start + std::min(step, last - start);
          SlotsSegment x{b, number, start, stop, 0, 0, false};
          if (masked) {
            x.begin = listed;
            const auto list = [&](bool all) {
              for (int64_t t = start; t < stop; ++t)
                if (all || cut.mask[b * cut.mask_batch + t * cut.mask_column]) columns_[b * s + listed++] = t;
            };
            list(false);
            if (listed == x.begin) {
              some_empty_ = true;
              if (!given.uniform) continue;
              list(true);
              x.equal = true;
            }
            x.end = listed;
          }
          tokens += x.end - x.begin;
          segments_.push_back(x);
        }
      }
    }
    some_masked_ = masked;
    if (masked) problem_.columns = columns_.data();

    const int64_t longest = std::max(kChunkTokens, (tokens + kChunks - 1) / kChunks);
    for (SlotsSegment& x : segments_) {
      const int64_t n = x.end - x.begin, pieces = (n + longest - 1) / longest;
      const int64_t step = ((n + pieces - 1) / pieces + 63) / 64 * 64;
      x.chunk_begin = chunks_.size();
      for (int64_t begin = x.begin; begin < x.end; begin += step)
        chunks_.push_back({&x - segments_.data(), begin, std::min(begin + step, x.end), 0});
      x.chunk_end = chunks_.size();
    }

    plan_.absorbed = absorbed_costs_less(given, tokens, segments_.size());
    cut_waves(backward);
    plan_.segments = segments_.data(), plan_.chunks = chunks_.data();
    plan_.waves = waves_.data(), plan_.wave_count = waves_.size();
    if (!plan_.absorbed) {
      for (const SlotsSegment& x : segments_)
        for (int64_t i = x.begin; i < x.end; ++i)
          places_.push_back(x.batch * s + (masked ? columns_[x.batch * s + i] : i));
      plan_.places = places_.data();
    }
    const double rows = static_cast<double>(given.heads) * given.slots;
    work_ = 4.0 * tokens * given.channels * std::min(rows, 1.0 * given.width);
    for (const SlotsSegment& x : segments_) longest_ = std::max(longest_, x.end - x.begin);
    // 40: an exponential
    direct_work_ = 2.0 * tokens * given.width * (given.channels + given.slots) + 40 * tokens * rows;
  }

  const LocalSlotsProblem& problem() const { return problem_; }
  const LocalSlotsPlan& plan() const { return plan_; }
  bool some_masked() const { return some_masked_; }
  bool some_empty() const { return some_empty_; }
  double work() const { return work_; }
  int64_t segment_count() const { return segments_.size(); }
  int64_t longest() const { return longest_; }
  double direct_work() const { return direct_work_; }

 private:
  // The float and operand elements, 4 bytes at most, that chunks, tokens and segments keep in memory.
  void cut_waves(bool backward) {
    const double rows = static_cast<double>(problem_.heads) * problem_.slots, width = problem_.width;
    const double channels = problem_.channels;
    double per_chunk, per_token, per_segment;
    if (plan_.absorbed) {
      per_chunk = rows * channels * (backward ? 2 : 1);
      per_token = backward ? 2 * rows : 0;
      per_segment = backward ? 2 * rows * channels : 0;
    } else {
      per_chunk = problem_.slots * width;
      per_token = backward ? 2 * rows + 6 * width : 2 * width;
      per_segment = backward ? 2 * problem_.slots * width : 0;
    }
    double bytes = 0;
    int64_t place = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(segments_.size()); ++i) {
      const SlotsSegment& x = segments_[i];
      const double more =
          4 * ((x.chunk_end - x.chunk_begin) * per_chunk + (x.end - x.begin) * per_token + per_segment);
      if (waves_.empty() || bytes + more > kWaveBytes) {
        waves_.push_back({i, i, x.chunk_begin, x.chunk_begin, 0, place});
        bytes = 0;
      }
      bytes += more;
      SlotsWave& w = waves_.back();
      w.segment_end = i + 1, w.chunk_end = x.chunk_end;
      for (int64_t c = x.chunk_begin; c < x.chunk_end; ++c) {
        chunks_[c].offset = w.tokens;
        w.tokens += chunks_[c].end - chunks_[c].begin;
      }
      place += x.end - x.begin;
    }
    for (const SlotsWave& w : waves_) {
      plan_.most_tokens = std::max(plan_.most_tokens, w.tokens);
      plan_.most_chunks = std::max(plan_.most_chunks, w.chunk_end - w.chunk_begin);
      plan_.most_segments = std::max(plan_.most_segments, w.segment_end - w.segment_begin);
    }
  }

  LocalSlotsProblem problem_;
  LocalSlotsPlan plan_{};
  std::vector<int64_t> columns_, places_;
  std::vector<SlotsSegment> segments_;
  std::vector<SlotsChunk> chunks_;
  std::vector<SlotsWave> waves_;
  bool some_masked_ = false, some_empty_ = false;
  double work_ = 0, direct_work_ = 0;
  int64_t longest_ = 0;
};

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

bool absorbed_costs_less(const LocalSlotsProblem& p, int64_t tokens, int64_t segments) {
  const double t = tokens, n = segments, e = p.width, m = p.slots, rows = m * p.heads, h = p.channels;
  // scores and means of hidden rows; v_weight after the mean of each segment, k_weight before the first; sums are
  // written and read once, which takes as long as some products
  const double absorbed = 4 * t * rows * h + 2 * (n + 1) * m * e * h + 16 * n * rows * h;
  const double projected = 4 * t * e * h + 4 * t * m * e;
  return absorbed < projected;
}

void for_items(Execution execution, int64_t items, void (*body)(void* context, int64_t item, int worker),
               void* context) {
  parallel(execution, items, [&](int64_t item, int worker) { body(context, item, worker); });
}

void local_slots_forward(const LocalSlotsProblem& given, const LocalSlotsCut& cut, void* out, Isa isa,
                         Execution execution) {
  if (given.slots == 0 || given.batch == 0 || given.segment_total == 0) return;
  const Plan plan(given, cut, false);
  const bool some_zero = plan.some_empty() && !given.uniform;
  const auto clear = [&] {
    std::memset(out, 0, given.batch * given.segment_total * given.slots * given.width * element_size(given.element));
  };
  if (execution.direct && plan.direct_work() <= kDirectWork) {
    const LocalSlotsDirect direct = direct_of(isa);
    const Memory scratch(direct.scratch(plan.problem(), plan.longest(), false));
    if (some_zero) clear();
    return direct.forward(plan.problem(), plan.plan(), plan.segment_count(), plan.longest(), out, scratch.data());
  }
  const LocalSlotsPath path = path_of(isa);
  const LocalSlotsSizes sizes = path.forward_sizes(plan.problem(), plan.plan());
  if (plan.work() < kWorthThreads) execution.threads = 1;
  const int64_t scratch_size = aligned(sizes.scratch);
  const Memory shared(sizes.shared), scratch(execution.threads * scratch_size);
  if (some_zero) clear();
  path.forward(plan.problem(), plan.plan(), out,
               {shared.data(), static_cast<char*>(scratch.data()), scratch_size}, execution);
}

void local_slots_backward(const LocalSlotsProblem& given, const LocalSlotsCut& cut, const void* grad_out,
                          const LocalSlotsGradients& gradients, Isa isa, Execution execution) {
  const Plan plan(given, cut, true);
  const int64_t size = element_size(given.element);
  prefer_large_pages(gradients.hidden, given.batch * given.length * given.channels * size);
  if (given.slots == 0 || plan.plan().wave_count == 0) {
    std::memset(gradients.hidden, 0, given.batch * given.length * given.channels * size);
    std::memset(gradients.queries, 0, given.slots * given.width * size);
    std::memset(gradients.k_weight, 0, given.width * given.channels * size);
    std::memset(gradients.v_weight, 0, given.width * given.channels * size);
    return;
  }
  const auto clear = [&] {
    std::memset(gradients.hidden, 0, given.batch * given.length * given.channels * size);
  };
  if (execution.direct && 2.5 * plan.direct_work() <= kDirectWork) {
    const LocalSlotsDirect direct = direct_of(isa);
    const Memory scratch(direct.scratch(plan.problem(), plan.longest(), true));
    if (plan.some_masked()) clear();
    return direct.backward(plan.problem(), plan.plan(), plan.segment_count(), plan.longest(), grad_out, gradients,
                           scratch.data());
  }
  const LocalSlotsPath path = path_of(isa);
  const LocalSlotsSizes sizes = path.backward_sizes(plan.problem(), plan.plan());
  if (plan.work() < kWorthThreads) execution.threads = 1;
  const int64_t scratch_size = aligned(sizes.scratch);
  const Memory shared(sizes.shared), scratch(execution.threads * scratch_size);
  if (plan.some_masked()) clear();
  path.backward(plan.problem(), plan.plan(), grad_out, gradients,
                {shared.data(), static_cast<char*>(scratch.data()), scratch_size}, execution);
}

}  // namespace hici::cpu
