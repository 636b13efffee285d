#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>

#include "attention_schedule.h"
#include "memory.h"
#include "hici/simd.h"

namespace hici::cpu {
namespace {

ForwardPath forward_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::forward_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::forward_path();
  }
}

FewPath few_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::few_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::few_path();
  }
}

DirectPath direct_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::direct_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::direct_path();
  }
}

BackwardPath backward_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::backward_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::backward_path();
  }
}

int64_t element_size(Element e) { return e == Element::kFloat32 ? 4 : 2; }

double precision(Element e) { return e == Element::kFloat32 ? 0x1p-23 : e == Element::kFloat16 ? 0x1p-10 : 0x1p-7; }

// How much the rounding of the largest of these numbers can be.
double rounding(const float* x, int64_t count) {
  float most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(x[i]);
    if (size <= std::numeric_limits<float>::max()) most = std::max(most, size);
  }
  return 0x1p-24 * most;
}

// Below this many multiplications a call is over before another thread has woken up.
constexpr double kWorthThreads = 5e5;

// What a call may cost in double to be computed directly: operations, and elements of gradients kept in double.
constexpr double kDirectWork = 1 << 19, kDirectElements = 1 << 18;

double direct_work(const AttentionProblem& p) {
  const double slots = p.global.count + p.local.count, each = 2.0 * p.dim + 40;  // 40: an exponential
  double work = 0;
  for (int64_t i = 0; i < p.segment_count; ++i) {
    const AttentionSegment& x = p.segments[i];
    work += (x.query_end - x.query_begin) * p.heads * (slots + x.key_end - x.key_begin) * each;
  }
  return work;
}

double gradient_elements(const AttentionProblem& p) {
  const auto rows = [&](const Slots& s) {
    return 1.0 * p.batch * (s.per_segment ? p.segment_total : 1) * s.count;
  };
  return (1.0 * p.batch * p.keys + rows(p.global) + rows(p.local)) * p.kv_heads * p.dim;
}

}  // namespace

void attention_forward(const AttentionProblem& given, const AttentionCut& cut, void* out, float* lse, Isa isa,
                       Execution execution) {
  const Ranks ranks(given, cut);
  const AttentionProblem problem = ranks.problem();
  const int64_t written = problem.batch * problem.queries * problem.heads * problem.dim * element_size(problem.element);
  const auto clear = [&] {
    std::memset(out, 0, written);
    std::fill_n(lse, problem.batch * problem.heads * problem.queries, -__builtin_inff());
  };
  // outputs of 16 bits hide what packed kernels round, and those take half the time at 64 keys
  const bool exact = problem.element == Element::kFloat32;
  if (exact && execution.direct && direct_work(problem) <= kDirectWork) {
    const DirectPath path = direct_path(isa);
    const Memory scratch(path.scratch(problem, false));
    if (ranks.some_masked()) clear();
    return path.forward(problem, out, lse, scratch.data());
  }
  const ForwardPath path = forward_path(isa);
  const ForwardSchedule schedule(problem, path.tile_rows(problem));

  const FewPath way = schedule.few ? few_path(isa) : FewPath{path.scratch, path.forward};
  const int64_t scratch_size = (way.scratch(problem, schedule.sizes) + 63) / 64 * 64;
  if (schedule.work < kWorthThreads) execution.threads = 1;
  const int64_t most = std::max(schedule.items.size(), schedule.merges.size());
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, most));
  const Memory scratch(workers * scratch_size);
  const Memory partials(schedule.partials * schedule.sizes.rows * path.partial_width(problem) * 4);
  const ForwardOutput output{out, lse, static_cast<float*>(partials.data())};

  prefer_large_pages(out, written);
  if (ranks.some_masked()) clear();
  const auto item = [&](int64_t i, int worker) {
    way.forward(problem, schedule.items[i], output, schedule.sizes,
                static_cast<char*>(scratch.data()) + worker * scratch_size);
  };
  const auto merge = [&](int64_t i, int) {
    path.merge(problem, schedule.merges[i].first, schedule.merges[i].count, output, schedule.sizes);
  };
  const int64_t items = schedule.items.size(), merges = schedule.merges.size();
  if (schedule.few) return parallel_twice(execution, items, item, merges, merge);
  parallel(execution, items, item);
  parallel(execution, merges, merge);
}

void attention_backward(const AttentionProblem& given, const AttentionCut& cut, const Sequence4& grad_out,
                        const float* grad_lse, const void* out, const float* lse, const AttentionGradients& gradients,
                        Isa isa, Execution execution) {
  const Ranks ranks(given, cut);
  const AttentionProblem problem = ranks.problem();
  if (execution.direct && 2.5 * direct_work(problem) <= kDirectWork && gradient_elements(problem) <= kDirectElements) {
    const DirectPath path = direct_path(isa);
    const Memory scratch(path.scratch(problem, true));
    // of masked tokens
    std::memset(gradients.q, 0,
                problem.batch * problem.queries * problem.heads * problem.dim * element_size(problem.element));
    return path.backward(problem, grad_out, grad_lse, gradients, scratch.data());
  }
  const BackwardPath path = backward_path(isa);
  // weights from lse carry its rounding: a sixteenth of the element type's own is let pass
  const int64_t rows = problem.batch * problem.heads * problem.queries;
  const BackwardSchedule schedule(problem, path.block(problem), rounding(lse, rows) > precision(problem.element) / 16);

  const int64_t scratch_size = (path.scratch(problem, schedule.sizes) + 63) / 64 * 64;
  if (schedule.work < kWorthThreads) execution.threads = 1;
  const int64_t most = std::max(schedule.items.size(), schedule.later.size());
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, most));
  const Memory scratch(workers * scratch_size);

  // rows kept apart: [segment][kv_head][k, v][rows][dim]
  const bool shared = problem.global.count > 0 && !problem.global.per_segment;
  const int64_t recurrence = cut.recurrence_len, per_row = problem.segment_count * problem.kv_heads * 2 * problem.dim;
  const Memory shared_slots(shared ? per_row * problem.global.count * 4 : 0);
  const Memory carried(per_row * recurrence * 4), tail(per_row * recurrence * 4);

  const bool wanted = !schedule.later.empty();  // facts that some items form and others use
  const Memory formed(wanted ? 3 * rows * 4 : 0);
  float* const first = static_cast<float*>(formed.data());
  const Normalised facts = wanted ? Normalised{first, first + rows, first + 2 * rows} : Normalised{};
  const BackwardInput input{grad_out, grad_lse, wanted ? facts.shift : lse, facts.factor, facts.delta, out};
  const BackwardOutput output{gradients,
                              static_cast<float*>(shared_slots.data()),
                              static_cast<float*>(carried.data()),
                              static_cast<float*>(tail.data()),
                              recurrence > 0 ? schedule.tail_begin.data() : nullptr,
                              recurrence};

  // what no item writes: masked tokens, tokens and slots of segments without queries, slots nobody may see
  const int64_t size = element_size(problem.element) * problem.dim;
  const auto clear = [&](void* gradient, int64_t rows) {
    if (gradient) std::memset(gradient, 0, rows * size);
  };
  prefer_large_pages(gradients.q, problem.batch * problem.queries * problem.heads * size);
  for (void* const gradient : {gradients.k, gradients.v})
    prefer_large_pages(gradient, problem.batch * problem.keys * problem.kv_heads * size);
  if (ranks.some_masked()) clear(gradients.q, problem.batch * problem.queries * problem.heads);
  if (ranks.some_masked() || problem.queries < problem.keys) {
    clear(gradients.k, problem.batch * problem.keys * problem.kv_heads);
    clear(gradients.v, problem.batch * problem.keys * problem.kv_heads);
  }
  for (const auto& [slots, k, v] : {std::tuple{problem.global, gradients.global_k, gradients.global_v},
                                    std::tuple{problem.local, gradients.local_k, gradients.local_v}}) {
    const int64_t sets = problem.batch * (slots.per_segment ? problem.segment_total : 1);
    clear(k, sets * slots.count * problem.kv_heads);
    clear(v, sets * slots.count * problem.kv_heads);
  }

  for (const auto* items : {&schedule.items, &schedule.later})
    parallel(execution, items->size(), [&](int64_t i, int worker) {
      path.backward(problem, (*items)[i], input, facts, output, schedule.sizes,
                    static_cast<char*>(scratch.data()) + worker * scratch_size);
    });
  if (!shared && recurrence == 0) return;
  parallel(execution, problem.batch * problem.kv_heads, [&](int64_t i, int) {
    path.collect(problem, i / problem.kv_heads, i % problem.kv_heads, output);
  });
}

}  // namespace hici::cpu
