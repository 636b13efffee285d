// hga_route: which groups every query opens. Scores stream past and only those that may still win are kept: no matrix of
// scores is formed.
#pragma once

#include "attention.h"

namespace hici::cpu {

enum class Routing : int { kStrict, kPrefix, kBlock };

struct RouteProblem {
  Element element;
  int64_t batch, queries, heads, kv_heads, dim;
  int64_t chunks, groups;  // n, and M of each
  Sequence4 q;
  // [batch, n, kv_heads, dim] and [batch, n, M, kv_heads, dim], strides in elements, contiguous in dim
  const void *chunk_keys, *group_keys;
  int64_t chunk_batch, chunk_step, chunk_head;
  int64_t group_batch, group_chunk, group_step, group_head;
  const int64_t* positions = nullptr;  // index of every query, negative = opens nothing; null = the last `queries`
  int64_t position_batch = 0, position_query = 0;
  int64_t context;  // the first queries get no route
  int64_t chunk_size, keep_first, keep_last, topk_chunks, topk_groups;
  Routing routing;
  int64_t route_block;
  bool share;
  // Super-chunks: [batch, n / super_chunk, kv_heads, dim] keys of so many whole chunks each; null = every chunk is scored
  const void* super_keys = nullptr;
  int64_t super_chunk = 0, topk_supers = 0;
  int64_t super_batch = 0, super_step = 0, super_head = 0;

  int64_t group() const { return heads / kv_heads; }
  int64_t width() const;  // entries of a route: min(topk_groups, n M)
  int64_t position(int64_t b, int64_t t) const {
    return positions ? positions[b * position_batch + t * position_query]
                     : (queries > chunks * chunk_size ? queries : chunks * chunk_size) - queries + t;
  }
  // pool [f, l) of a query at index p >= 0, within the n chunks
  int64_t pool_begin(int64_t p) const;
  int64_t pool_end(int64_t p) const;
};

// routes: int32 [batch, queries - context, heads, width()], contiguous, written whole. Throws std::bad_alloc before.
void hga_route(const RouteProblem& problem, int32_t* routes, Isa isa, Execution execution);

// Queries of one row and kv head that are scored together. kPrefix, kBlock: one whole run, in order.
struct RouteItem {
  int64_t batch, kv_head;
  const int32_t* queries;
  int64_t count;
  int64_t chunk_begin, chunk_end;  // what of the pool is scanned
  int64_t part = -1;               // kStrict: partial result number `part`; < 0: the routes are final
};

struct RouteSizes {
  int64_t queries = 0;  // the most of any item
};

// The best chunks of parts of a scan: [part][row][keep], rows query by query within an item.
struct RouteParts {
  float* score;
  int32_t* id;
  int32_t* count;  // [part][row]
  int64_t rows, keep;
};

struct RoutePath {
  int64_t (*tile_rows)(const RouteProblem&);
  int64_t (*scratch)(const RouteProblem&, const RouteSizes&);
  void (*route)(const RouteProblem&, const RouteItem&, const RouteSizes&, const RouteParts&, int32_t* routes,
                void* scratch);
  // routes of an item whose scan is `parts` partial results, in order of chunks, the first number `first`
  void (*merge)(const RouteProblem&, const RouteItem&, int64_t first, int64_t parts, const RouteSizes&,
                const RouteParts&, int32_t* routes, void* scratch);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  RoutePath route_path();                \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
