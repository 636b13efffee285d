#include "hga_route.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"

namespace hici::cpu {
namespace {

RoutePath route_path(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::route_path();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::route_path();
  }
}

// Enough items for the cores of a large machine, and chunks below which a part of a scan costs more than it gives.
constexpr int64_t kItems = 64, kPartChunks = 256;
// Multiplications below which a call is over before another thread has woken up.
constexpr double kWorthThreads = 1e6;

}  // namespace

int64_t RouteProblem::width() const { return std::min(topk_groups, chunks * groups); }

int64_t RouteProblem::pool_begin(int64_t p) const { return std::min({keep_first, p / chunk_size, chunks}); }

int64_t RouteProblem::pool_end(int64_t p) const {
  const int64_t n = p / chunk_size;
  return std::min({std::max(keep_first, n - keep_last), n, chunks});
}

void hga_route(const RouteProblem& p, int32_t* routes, Isa isa, Execution execution) {
  const int64_t wanted = p.queries - p.context;
  if (p.batch == 0 || wanted <= 0 || p.width() == 0) return;
  const RoutePath path = route_path(isa);
  const bool whole_runs = p.routing != Routing::kStrict;
  const int64_t tile = std::max<int64_t>(1, path.tile_rows(p) / p.group());

  std::vector<int32_t> queries;
  struct Tile {
    int64_t batch, begin, count, end;
  };
  std::vector<Tile> tiles;
  RouteSizes sizes;
  double work = 0;
  if (p.topk_chunks > 0) {
    queries.reserve(p.batch * p.queries);
    for (int64_t b = 0; b < p.batch; ++b) {
      Tile t{b, static_cast<int64_t>(queries.size()), 0, 0};
      int64_t chunk = -1;
      bool any = false;
      const auto close = [&] {
        if (any && t.end > p.keep_first) {
          tiles.push_back(t);
          sizes.queries = std::max(sizes.queries, t.count);
          work += static_cast<double>(t.count) * p.heads * p.dim * (t.end + std::min(p.topk_chunks, t.end) * p.groups);
        }
        t = {b, static_cast<int64_t>(queries.size()), 0, 0};
        any = false;
      };
      for (int64_t i = whole_runs ? 0 : p.context; i < p.queries; ++i) {
        const int64_t at = p.position(b, i);
        if (at < 0) continue;
        const int64_t n = at / p.chunk_size;
        const bool full = p.routing == Routing::kStrict  ? t.count == tile
                          : p.routing == Routing::kBlock ? n != chunk || t.count == p.route_block
                                                         : n != chunk;
        if (t.count > 0 && full) close();
        chunk = n;
        queries.push_back(static_cast<int32_t>(i));
        ++t.count;
        t.end = std::max(t.end, p.pool_end(at));
        any |= i >= p.context;
      }
      close();
    }
  }
  std::memset(routes, 0xff, p.batch * wanted * p.heads * p.width() * sizeof(int32_t));
  if (tiles.empty()) return;

  std::vector<RouteItem> items;
  struct Merge {
    int64_t item, first, parts;
  };
  std::vector<Merge> merges;
  int64_t parts = 0;
  const int64_t whole = static_cast<int64_t>(tiles.size()) * p.kv_heads;
  const int64_t splits_wanted = whole_runs || p.super_chunk > 0 ? 1 : (kItems + whole - 1) / whole;
  const auto add = [&](const Tile& t, int64_t h, int64_t begin, int64_t end, int64_t part) {
    items.push_back({t.batch, h, queries.data() + t.begin, t.count, begin, end, part});
  };
  if (splits_wanted <= 1) {
    // head by head, long tiles first
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.kv_heads; ++h)
        for (auto t = tiles.rbegin(); t != tiles.rend(); ++t)
          if (t->batch == b) add(*t, h, p.keep_first, t->end, -1);
  } else {
    for (const Tile& t : tiles) {
      const int64_t range = t.end - p.keep_first;
      const int64_t splits = std::max<int64_t>(1, std::min(splits_wanted, range / kPartChunks));
      for (int64_t i = 0; i < splits; ++i)
        for (int64_t h = 0; h < p.kv_heads; ++h)
          add(t, h, p.keep_first + range * i / splits, p.keep_first + range * (i + 1) / splits,
              splits > 1 ? parts + h * splits + i : -1);
      if (splits == 1) continue;
      for (int64_t h = 0; h < p.kv_heads; ++h)
        merges.push_back({static_cast<int64_t>(items.size()) - p.kv_heads + h, parts + h * splits, splits});
      parts += splits * p.kv_heads;
    }
  }

  if (work < kWorthThreads) execution.threads = 1;
  const int64_t scratch_size = (path.scratch(p, sizes) + 63) / 64 * 64;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(execution.threads, items.size()));
  const Memory scratch(workers * scratch_size);
  const int64_t rows = sizes.queries * p.group(), keep = std::min(p.topk_chunks, p.chunks);
  const Memory partial(parts * rows * (2 * keep + 1) * 4);
  float* const score = static_cast<float*>(partial.data());
  int32_t* const id = reinterpret_cast<int32_t*>(score + parts * rows * keep);
  const RouteParts found{score, id, id + parts * rows * keep, rows, keep};
  parallel(execution, items.size(), [&](int64_t i, int worker) {
    path.route(p, items[i], sizes, found, routes, static_cast<char*>(scratch.data()) + worker * scratch_size);
  });
  parallel(execution, merges.size(), [&](int64_t i, int worker) {
    path.merge(p, items[merges[i].item], merges[i].first, merges[i].parts, sizes, found, routes,
               static_cast<char*>(scratch.data()) + worker * scratch_size);
  });
}

}  // namespace hici::cpu
