#include "hga_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "hga_runs.h"
#include "memory.h"

namespace hici::cpu {
namespace {

RunPath run_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::run_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::run_path();
  }
}

// Rows of a list. More rows share what is packed; fewer keep their sums in the second-level cache.
constexpr int64_t kListRows = 512;
// Tokens of a part of a list of few rows at least.
constexpr int64_t kPartTokens = 512;
constexpr int64_t kItems = 64;
// Tokens times rows below which a call is over before another thread has woken up.
constexpr int64_t kWorthTokens = 1 << 12;

int64_t size_of(Element e) { return e == Element::kFloat32 ? 4 : 2; }

// Rows of queries that see nothing, which no list holds.
template <class Problem>
void clear(const Problem& p, const OrderedQueries& queries, void* out, float* lse) {
  if (static_cast<int64_t>(queries.queries.size()) == p.batch * p.queries) return;
  std::memset(out, 0, p.batch * p.queries * p.heads * p.dim * (wide_out(p) ? 4 : size_of(p.element)));
  std::fill(lse, lse + p.batch * p.heads * p.queries, -std::numeric_limits<float>::infinity());
}

template <class Problem>
void attend_few(const Problem& p, const OrderedQueries& queries, void* out, float* lse, const RunPath& path,
                Execution execution) {
  const int64_t lists = p.batch * p.kv_heads;
  std::vector<RunBuilder> builders(lists, RunBuilder(kFewTokens));
  parallel(execution, lists, [&](int64_t i, int) {
    const int64_t b = i / p.kv_heads, begin = queries.begin[b], count = queries.begin[b + 1] - begin;
    if (count > 0) builders[i].build(p, {b, i % p.kv_heads, queries.queries.data() + begin, count}, out, lse);
  });
  struct Item {
    int64_t list, begin, end, partial;
  };
  struct Merge {
    int64_t list, first, count;
  };
  std::vector<Item> items;
  std::vector<Merge> merges;
  int64_t partials = 0;
  // of the heads alone: what a row gets does not depend on the others of its batch
  const int64_t wanted = (kItems + p.kv_heads - 1) / p.kv_heads;
  for (int64_t i = 0; i < lists; ++i) {
    const RunList& list = builders[i].list();
    if (list.rows == 0) continue;
    const int64_t tokens = builders[i].tokens();
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, tokens / kPartTokens));
    int64_t run = 0, passed = 0;
    const int64_t first = partials;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = run;
      while (run < list.run_count && (part + 1 == parts || passed < tokens * (part + 1) / parts)) passed += list.runs[run++].count;
      items.push_back({i, begin, run, parts > 1 ? partials++ : -1});
    }
    if (parts > 1) merges.push_back({i, first, parts});
  }
  if (items.empty()) return;
  RunList largest = builders[items[0].list].list();
  const int64_t scratch_size = (path.scratch(largest, RunSizes{}) + 63) / 64 * 64;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, items.size()));
  const Memory scratch(workers * scratch_size);
  const int64_t partial_size = kFewRows * path.partial_width(p.dim);
  const Memory sums(partials * partial_size * 4);
  // a list's partial sums are as many rows apart as it has
  const auto at = [&](int64_t list, int64_t first, int64_t part) {
    return static_cast<float*>(sums.data()) + first * partial_size +
           (part - first) * builders[list].list().rows * path.partial_width(p.dim);
  };
  std::vector<int64_t> first_of(lists, 0);
  for (const Merge& m : merges) first_of[m.list] = m.first;
  parallel(execution, items.size(), [&](int64_t i, int worker) {
    const Item& x = items[i];
    path.few(builders[x.list].list(), x.begin, x.end, x.partial < 0 ? nullptr : at(x.list, first_of[x.list], x.partial),
             static_cast<char*>(scratch.data()) + worker * scratch_size);
  });
  parallel(execution, merges.size(), [&](int64_t i, int) {
    const Merge& m = merges[i];
    path.merge(builders[m.list].list(), at(m.list, m.first, m.first), m.count);
  });
}

// Blocks of queries of one row and kv head.
template <class Problem>
std::vector<RunRows> blocks_of(const Problem& p, const OrderedQueries& queries) {
  const int64_t most = std::max<int64_t>(1, kListRows / (p.heads / p.kv_heads));
  std::vector<RunRows> found;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t begin = queries.begin[b], count = queries.begin[b + 1] - begin, parts = (count + most - 1) / most;
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t from = count * i / parts, to = count * (i + 1) / parts;
        found.push_back({b, h, queries.queries.data() + begin + from, to - from});
      }
  }
  return found;
}

template <class Problem>
void attend_many(const Problem& p, const OrderedQueries& queries, void* out, float* lse, const RunPath& path,
                 Execution execution) {
  const std::vector<RunRows> blocks = blocks_of(p, queries);
  if (blocks.empty()) return;
  RunSizes sizes;
  for (const RunRows& x : blocks) sizes.rows = std::max(sizes.rows, x.count * (p.heads / p.kv_heads));
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, blocks.size()));
  std::vector<RunBuilder> builders(workers, RunBuilder(kRunTokens));
  RunList shape{};
  shape.element = p.element, shape.dim = p.dim;
  const int64_t scratch_size = (path.scratch(shape, sizes) + 63) / 64 * 64;
  const Memory scratch(workers * scratch_size);
  parallel(execution, blocks.size(), [&](int64_t i, int worker) {
    builders[worker].build(p, blocks[i], out, lse);
    path.many(builders[worker].list(), sizes, static_cast<char*>(scratch.data()) + worker * scratch_size);
  });
}

template <class Problem>
void attend(const Problem& p, void* out, float* lse, Isa isa, Execution execution) {
  if (p.batch == 0 || p.queries == 0) return;
  const RunPath path = run_path(isa);
  const OrderedQueries queries = ordered_queries(p);
  clear(p, queries, out, lse);
  if (p.queries * (p.heads / p.kv_heads) <= kFewRows)
    attend_few(p, queries, out, lse, path, execution);
  else
    attend_many(p, queries, out, lse, path, execution);
}

}  // namespace

void hga_attention_forward(const RoutedProblem& p, void* out, float* lse, Isa isa, Execution execution) {
  if (p.keys * p.queries * p.heads < kWorthTokens) execution.threads = 1;
  attend(p, out, lse, isa, execution);
}

void hga_pages_forward(const PageProblem& p, void* out, float* lse, Isa isa, Execution execution) {
  if (p.page_count * p.chunk_size * p.queries < kWorthTokens) execution.threads = 1;
  attend(p, out, lse, isa, execution);
}

void hga_attention_backward(const RoutedProblem& p, const Sequence4& grad_out, const float* grad_lse, const void* out,
                            const float* lse, const RoutedGradients& gradients, Isa isa, Execution execution) {
  const int64_t size = size_of(p.element), group = p.heads / p.kv_heads;
  std::memset(gradients.q, 0, p.batch * p.queries * p.heads * p.dim * size);
  std::memset(gradients.k, 0, p.batch * p.keys * p.kv_heads * p.dim * size);
  std::memset(gradients.v, 0, p.batch * p.keys * p.kv_heads * p.dim * size);
  if (p.batch == 0 || p.queries == 0) return;
  const RunPath path = run_path(isa);
  const OrderedQueries queries = ordered_queries(p);
  const std::vector<RunRows> blocks = blocks_of(p, queries);
  if (blocks.empty()) return;
  RunSizes sizes;
  for (const RunRows& x : blocks) sizes.rows = std::max(sizes.rows, x.count * group);
  const int64_t heads = p.batch * p.kv_heads;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, heads));
  std::vector<RunBuilder> builders(workers, RunBuilder(kRunTokens));
  RunList shape{};
  shape.element = p.element, shape.dim = p.dim;
  const int64_t scratch_size = (path.backward_scratch(shape, sizes) + 63) / 64 * 64;
  const int64_t sums_size = (p.keys * p.dim * 4 + 63) / 64 * 64;
  const Memory memory(workers * (scratch_size + 2 * sums_size));
  // blocks of one kv head come one after the other, and are added up in that order
  std::vector<int64_t> first(heads + 1, 0);
  for (const RunRows& x : blocks) ++first[x.batch * p.kv_heads + x.kv_head + 1];
  for (int64_t i = 0; i < heads; ++i) first[i + 1] += first[i];
  parallel(execution, heads, [&](int64_t head, int worker) {
    char* const base = static_cast<char*>(memory.data()) + worker * (scratch_size + 2 * sums_size);
    float *const dk = reinterpret_cast<float*>(base + scratch_size),
                 *const dv = reinterpret_cast<float*>(base + scratch_size + sums_size);
    std::memset(dk, 0, 2 * sums_size);
    std::vector<const void*> from;
    std::vector<const float*> from_lse;
    std::vector<void*> to;
    for (int64_t i = first[head]; i < first[head + 1]; ++i) {
      const RunRows& rows = blocks[i];
      builders[worker].build(p, rows, const_cast<void*>(out), const_cast<float*>(lse));
      from.clear(), from_lse.clear(), to.clear();
      for (int64_t t = 0; t < rows.count; ++t)
        for (int64_t h = 0; h < group; ++h) {
          const int64_t query = rows.queries[t], q_head = rows.kv_head * group + h;
          from.push_back(static_cast<const char*>(grad_out.data) +
                         (rows.batch * grad_out.batch + query * grad_out.seq + q_head * grad_out.head) * size);
          from_lse.push_back(grad_lse + (rows.batch * p.heads + q_head) * p.queries + query);
          to.push_back(static_cast<char*>(gradients.q) +
                       ((rows.batch * p.queries + query) * p.heads + q_head) * p.dim * size);
        }
      path.backward(builders[worker].list(), sizes, {from.data(), from_lse.data(), to.data(), dk, dv}, base);
    }
    const int64_t b = head / p.kv_heads, h = head % p.kv_heads;
    int64_t seen = 0;  // tokens up to the last query's
    if (first[head] < first[head + 1]) {
      const RunRows& last = blocks[first[head + 1] - 1];
      const int64_t query = last.queries[last.count - 1];
      seen = 1 + (p.positions ? p.positions[b * p.queries + query] : p.keys - p.queries + query);
    }
    for (int64_t j = 0; j < seen; ++j) {
      const int64_t column = p.columns ? p.columns[b * p.keys + j] : j;
      const int64_t at = ((b * p.keys + column) * p.kv_heads + h) * p.dim * size;
      path.narrow(p.element, dk + j * p.dim, p.dim, static_cast<char*>(gradients.k) + at);
      path.narrow(p.element, dv + j * p.dim, p.dim, static_cast<char*>(gradients.v) + at);
    }
  });
}

}  // namespace hici::cpu
