// hga_history.h against the rule for one query, head and group: which chunks a list holds and where they lie.

#include <algorithm>

#include "../cpu/hga_history.h"
#include "checks.h"

namespace hici::driver {
namespace {

struct History {
  int64_t batch, queries, heads, kv_heads, width, chunk, group, first, last, token, chunks, pages;
  std::vector<int32_t> routes;
  std::vector<int64_t> positions, base, records;
  cpu::HistoryBuffer sinks[2], tail[2];

  int64_t groups() const { return chunk / group; }
  // Whether a query of this position sees a group as a whole or by a route.
  bool sees(int64_t b, int64_t t, int64_t h, int64_t at, int64_t m) const {
    const int64_t p = positions[b * queries + t], own = p / chunk;
    if (p < 0 || at > own) return false;
    if (at < first || at == own || at >= std::max(first, own - last)) return true;
    const int32_t* const from = routes.data() + ((b * queries + t) * heads + h) * width;
    return std::find(from, from + width, static_cast<int32_t>(at * groups() + m)) != from + width;
  }
};

History random_history(Random& random) {
  History x{};
  const int64_t groups[] = {1, 2, 4, 5, 8, 9, 64, 70};
  const int64_t m = groups[random.below(8)];
  x.group = random.within(1, 5), x.chunk = m * x.group;
  x.batch = random.within(1, 3), x.queries = random.below(6), x.kv_heads = random.within(1, 3);
  x.heads = x.kv_heads * random.within(1, 4), x.width = random.below(6);
  x.first = random.below(4), x.last = random.below(4), x.token = 2 * random.within(1, 9), x.chunks = random.below(14);
  x.pages = x.kv_heads + random.below(3);
  for (int i = 0; i < 2; ++i) {
    x.sinks[i] = {random.below(1 << 30), random.below(1 << 20), random.below(1 << 16)};
    x.tail[i] = {random.below(1 << 30), random.below(1 << 20), random.below(1 << 16)};
  }
  for (int64_t b = 0; b < x.batch; ++b) {
    x.base.push_back(random.below(x.chunks + 2));
    // routes reach a little beyond what there is, and below 0
    for (int64_t t = 0; t < x.queries; ++t) x.positions.push_back(random.within(-3, (x.chunks + 3) * x.chunk));
    for (int64_t i = 0; i < x.queries * x.heads * x.width; ++i)
      x.routes.push_back(static_cast<int32_t>(random.within(-2, (x.chunks + 4) * m)));
    for (int64_t i = 0; i < x.chunks; ++i) x.records.push_back(random.chance(0.9) ? random.below(1000) : -1);
  }
  return x;
}

cpu::HistoryProblem problem(const History& x) {
  cpu::HistoryProblem p{};
  p.batch = x.batch, p.queries = x.queries, p.heads = x.heads, p.kv_heads = x.kv_heads, p.width = x.width;
  p.chunk_size = x.chunk, p.group_size = x.group, p.keep_first = x.first, p.keep_last = x.last, p.token = x.token;
  p.routes = x.routes.data(), p.positions = x.positions.data(), p.base = x.base.data(), p.records = x.records.data();
  p.chunks = x.chunks, p.pages = x.pages;
  for (int i = 0; i < 2; ++i) p.sinks[i] = x.sinks[i], p.tail[i] = x.tail[i];
  return p;
}

void check_case(const History& x) {
  const int64_t group = x.heads / x.kv_heads, far = x.chunks + 6;
  std::vector<int64_t> k, v, chunks, offsets{0}, at, number;
  bool missing = false;
  for (int64_t b = 0; b < x.batch; ++b)
    for (int64_t g = 0; g < x.kv_heads; ++g) {
      for (int64_t chunk = 0; chunk < far; ++chunk) {
        bool any = false;
        for (int64_t t = 0; t < x.queries; ++t)
          for (int64_t i = 0; i < group; ++i)
            for (int64_t m = 0; m < x.groups(); ++m) any |= x.sees(b, t, g * group + i, chunk, m);
        if (!any) continue;
        chunks.push_back(chunk);
        if (chunk >= x.first && chunk < x.base[b]) {
          const int64_t record = chunk < x.chunks ? x.records[b * x.chunks + chunk] : -1;
          missing |= record < 0;
          at.push_back(static_cast<int64_t>(k.size())), number.push_back(record * x.pages + g);
          k.push_back(0), v.push_back(0);
          continue;
        }
        const bool sink = chunk < x.base[b];
        const int64_t skip = (sink ? chunk : chunk - x.base[b]) * x.chunk * x.token;
        const cpu::HistoryBuffer* const from = sink ? x.sinks : x.tail;
        k.push_back(from[0].data + b * from[0].batch + g * from[0].head + skip);
        v.push_back(from[1].data + b * from[1].batch + g * from[1].head + skip);
      }
      offsets.push_back(static_cast<int64_t>(k.size()));
    }
  const cpu::HistoryPages found = cpu::hga_history_pages(problem(x));
  if (found.chunks != chunks || found.offsets != offsets) fail("hga_history_pages: other chunks than are seen");
  if (found.k != k || found.v != v) fail("hga_history_pages: a page lies elsewhere");
  if (found.at != at || found.number != number || found.missing != missing) fail("hga_history_pages: other records");
}

}  // namespace

void check_hga_history(uint64_t seed, int cases) {
  Random random(seed + 29);
  for (int i = 0; i < 20 * cases; ++i) check_case(random_history(random));  // small and quick, unlike the kernels'
}

}  // namespace hici::driver
