// hga_route. Rows are the query heads of one kv head, query by query; with share = kv a query's heads become one row as
// soon as they are scored. Chunks pass in blocks of kBlock: packed, multiplied (gemm.h, never on tiles, whose order of
// additions would depend on the number of rows), offered to every row's stream (select.h).
//
// The groups of what a row has picked belong to that row, so they are scored one row at a time from where they lie
// (dot.h), but for "prefix" and "block", where the queries of a run take part in each other's scores.

#include "../hga_route.h"
#include "attention_rows.h"
#include "dot.h"
#include "select.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr int64_t kBlock = 64, kRows = 128;
// Queries of few rows wait for memory: the candidates of the next row are asked for while one is scored.
constexpr int64_t kFewRows = 16;
// Blocks of chunk keys between the one multiplied and the one whose pages of memory are looked up.
constexpr int64_t kBlocksAhead = 4;

// Entries a stream may hold above what it keeps, before it is cut.
inline int64_t slack(int64_t keep) { return larger(keep, 32); }
inline int64_t capacity(int64_t keep, int64_t offered) { return keep + slack(keep) + offered + 16; }

template <class T>
struct Router {
  using Op = typename operand<T>::type;
  const RouteProblem& p;
  int64_t r, lanes, depth, most, keep, open, block_columns;
  Op *q, *keys;
  float *s, *stream_score, *running, *group_score;
  int32_t *stream_id, *group_id, *opened_id, *pick_count;
  Stream* streams;
  const T **rows, **next, **group_rows;
  unsigned char *wanted, *visible, *requested, *materialised;
  int64_t capacity_of_stream, supers, capacity_of_supers;
  float *super_score, *row_score;
  int32_t* super_id;
  Stream* super_streams;

  // most queries of an item, their rows, and what a query's group stage holds
  Router(const RouteProblem& problem, const RouteSizes& sizes, Carve& carve) : p(problem) {
    r = p.group(), lanes = p.share ? 1 : r, depth = round_up(p.dim, reduction<Op>::step), most = sizes.queries;
    keep = smaller(p.topk_chunks, p.chunks), open = keep * p.groups;
    const bool block = p.routing == Routing::kBlock;
    capacity_of_stream = capacity(keep, kBlock);
    // one more row: the maximum over a block
    const int64_t stream_count = (most + (block ? 1 : 0)) * lanes;
    block_columns = block ? round_up(open, kLanes) : 0;
    q = carve.take<Op>(most * r * depth);
    keys = carve.take<Op>(kBlock * depth);
    s = carve.take<float>(most * r * kBlock);
    running = carve.take<float>(p.routing == Routing::kPrefix ? most * lanes * open : block ? (most + 1) * block_columns : 0);
    stream_score = carve.take<float>(stream_count * capacity_of_stream);
    stream_id = carve.take<int32_t>(stream_count * capacity_of_stream);
    streams = carve.take<Stream>(stream_count);
    const int64_t group_room = round_up(open, kLanes) + 16;
    group_score = carve.take<float>(2 * group_room);
    group_id = carve.take<int32_t>(group_room);
    group_rows = carve.take<const T*>(group_room);
    opened_id = carve.take<int32_t>(block ? open : 0);
    pick_count = carve.take<int32_t>(most * lanes);
    rows = carve.take<const T*>(kBlock + 16);
    next = carve.take<const T*>(kBlock + 16);
    wanted = carve.take<unsigned char>(p.routing == Routing::kPrefix ? p.chunks : 0);
    visible = carve.take<unsigned char>(block ? keep : 0);
    requested = carve.take<unsigned char>(block ? open : 0);
    materialised = carve.take<unsigned char>(block ? open : 0);
    supers = p.super_chunk > 0 ? smaller(p.topk_supers, p.chunks / p.super_chunk) : 0;
    capacity_of_supers = capacity(supers, kBlock);
    const int64_t super_count = p.super_chunk > 0 ? most * lanes : 0;
    super_score = carve.take<float>(super_count * capacity_of_supers);
    super_id = carve.take<int32_t>(super_count * capacity_of_supers);
    super_streams = carve.take<Stream>(super_count);
    row_score = carve.take<float>(2 * kBlock);
  }

  const T* query(const RouteItem& item, int64_t i, int64_t h) const {
    return static_cast<const T*>(p.q.data) + item.batch * p.q.batch + item.queries[i] * p.q.seq +
           (item.kv_head * r + h) * p.q.head;
  }
  int64_t index(const RouteItem& item, int64_t i) const { return p.position(item.batch, item.queries[i]); }
  const T* chunk_key(const RouteItem& item, int64_t c) const {
    return static_cast<const T*>(p.chunk_keys) + item.batch * p.chunk_batch + c * p.chunk_step +
           item.kv_head * p.chunk_head;
  }
  const T* group_key(const RouteItem& item, int64_t g) const {
    return static_cast<const T*>(p.group_keys) + item.batch * p.group_batch + g / p.groups * p.group_chunk +
           g % p.groups * p.group_step + item.kv_head * p.group_head;
  }
  Stream& stream(int64_t row) const { return streams[row]; }

  // Where the pages of memory of chunk keys [c, c + n) are, which takes longer to find out than to read them.
  HICI_ASK void ask_for_pages(const RouteItem& item, int64_t c, int64_t n) const {
    const int64_t rows = larger(1, kPageBytes / larger(1, p.chunk_step * static_cast<int64_t>(sizeof(T))));
    for (const int64_t end = smaller(c + n, item.chunk_end); c < end; c += rows) __builtin_prefetch(chunk_key(item, c), 0, 2);
  }

  void open_streams(int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      streams[i] = {stream_score + i * capacity_of_stream, stream_id + i * capacity_of_stream, 0, -__builtin_inff()};
  }

  void pack_queries(const RouteItem& item) const {
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t h = 0; h < r; ++h) {
        const T* const from = query(item, i, h);
        pack_rows(&from, 1, p.dim, depth, q + (i * r + h) * depth);
      }
  }

  // s[row][0, n): scores of the packed queries with the n keys at `from`, which NaN does not leave
  void multiply(int64_t count, const T* const* from, int64_t n, const T* const* ahead, int64_t ahead_count) const {
    const int64_t columns = round_up(n, kLanes);
    pack_columns(from, n, p.dim, keys, ahead, ahead_count);
    const Op* b = keys;
    for (int64_t j = 0; j < columns; j += kPanel, b += kPanel * depth)
      panel_of<false>(smaller(kPanel, columns - j), count * r, depth, q, depth, b, s + j, kBlock, kChain);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t l = 0; l < lanes; ++l)
        for (int64_t j = 0; j < columns; j += kLanes) {
          const float* const own = s + (i * r + l) * kBlock + j;
          Vec x = ordered(load(own));
          if (p.share)
            for (int64_t h = 1; h < r; ++h) x = max(x, ordered(load(own + h * kBlock)));
          store(s + (i * lanes + l) * kBlock + j, x);
        }
  }

  // s[i][lane] = max over the queries up to i
  void run_up(int64_t count, int64_t columns) const {
    for (int64_t i = lanes; i < count * lanes; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) {
        float* const own = s + i * kBlock + j;
        store(own, max(load(own), load(own - lanes * kBlock)));
      }
  }

  void offer(Stream& to, const float* scores, int64_t n, int64_t first_id) const {
    to.offer(scores, n, static_cast<int32_t>(first_id));
    if (to.count > keep + slack(keep)) to.cut(keep);
  }

  // Streams of all rows hold their best chunks of [chunk_begin, chunk_end); in "block", stream number count * lanes + l
  // those of the block.
  void scan(const RouteItem& item) const {
    const bool block = p.routing == Routing::kBlock;
    open_streams((item.count + (block ? 1 : 0)) * lanes);
    int64_t largest = 0;
    for (int64_t i = 0; i < item.count; ++i) {
      const int64_t at = index(item, i);
      largest = larger(largest, p.pool_end(at) - p.pool_begin(at));
    }
    if (largest <= keep && item.part < 0 && p.super_chunk == 0) {  // whatever the scores are, all of them are picked
      for (int64_t i = 0; i < item.count + (block ? 1 : 0); ++i) {
        const int64_t at = index(item, smaller(i, item.count - 1));
        for (int64_t l = 0; l < lanes; ++l) {
          Stream& to = stream(i * lanes + l);
          for (int64_t c = p.pool_begin(at); c < p.pool_end(at); ++c) to.score[to.count] = 0, to.id[to.count++] = static_cast<int32_t>(c);
        }
      }
      return;
    }
    if (p.super_chunk > 0) {
      pack_queries(item);
      return scan_supers(item);
    }
    const T **now = rows, **later = next;
    const auto point = [&](const T** to, int64_t c, int64_t n) {
      for (int64_t j = 0; j < n; ++j) to[j] = chunk_key(item, c + j);
    };
    const int64_t at_first = smaller(kBlock, item.chunk_end - item.chunk_begin);
    point(now, item.chunk_begin, at_first);
    ask_for_pages(item, item.chunk_begin, kBlocksAhead * kBlock);
    ask_for(now, 0, at_first, at_first, p.dim);
    pack_queries(item);
    for (int64_t c = item.chunk_begin; c < item.chunk_end; c += kBlock) {
      const int64_t n = smaller(kBlock, item.chunk_end - c);
      const int64_t following = larger(0, smaller(kBlock, item.chunk_end - c - kBlock));
      point(later, c + kBlock, following);
      ask_for_pages(item, c + kBlocksAhead * kBlock, kBlock);
      multiply(item.count, now, n, later, following);
      if (block) {
        for (int64_t i = 0; i < item.count * lanes; ++i) offer(stream(i), s + i * kBlock, n, c);
        run_up(item.count, round_up(n, kLanes));
        for (int64_t l = 0; l < lanes; ++l)
          offer(stream(item.count * lanes + l), s + ((item.count - 1) * lanes + l) * kBlock, n, c);
      } else {
        if (p.routing == Routing::kPrefix) run_up(item.count, round_up(n, kLanes));
        for (int64_t i = 0; i < item.count; ++i) {
          const int64_t seen = smaller(n, p.pool_end(index(item, i)) - c);
          if (seen <= 0) continue;
          for (int64_t l = 0; l < lanes; ++l) offer(stream(i * lanes + l), s + (i * lanes + l) * kBlock, seen, c);
        }
      }
      swap(now, later);
    }
  }

  // Super-chunks wholly inside the pool first; then, row by row, the chunks of the best of them and those in none.
  void scan_supers(const RouteItem& item) const {
    const int64_t x = p.super_chunk, begin = (item.chunk_begin + x - 1) / x, end = item.chunk_end / x;
    for (int64_t i = 0; i < item.count * lanes; ++i)
      super_streams[i] = {super_score + i * capacity_of_supers, super_id + i * capacity_of_supers, 0, -__builtin_inff()};
    const T **now = rows, **later = next;
    const auto point_supers = [&](const T** to, int64_t at, int64_t n) {
      for (int64_t j = 0; j < n; ++j)
        to[j] = static_cast<const T*>(p.super_keys) + item.batch * p.super_batch + (at + j) * p.super_step +
                item.kv_head * p.super_head;
    };
    point_supers(now, begin, smaller(kBlock, end - begin));
    for (int64_t at = begin; at < end; at += kBlock, swap(now, later)) {
      const int64_t n = smaller(kBlock, end - at), following = larger(0, smaller(kBlock, end - at - kBlock));
      point_supers(later, at + kBlock, following);
      multiply(item.count, now, n, later, following);
      for (int64_t i = 0; i < item.count; ++i) {
        const int64_t seen = smaller(n, p.pool_end(index(item, i)) / x - at);
        for (int64_t l = 0; l < lanes && seen > 0; ++l) {
          Stream& to = super_streams[i * lanes + l];
          to.offer(s + (i * lanes + l) * kBlock, seen, static_cast<int32_t>(at));
          if (to.count > supers + slack(supers)) to.cut(supers);
        }
      }
    }
    for (int64_t i = 0; i < item.count; ++i) {
      const int64_t from = p.pool_begin(index(item, i)), to = p.pool_end(index(item, i));
      if (to <= from) continue;
      // [first, last): what super-chunks of this pool cover
      const int64_t first = smaller(to, begin * x), last = larger(first, to / x * x);
      for (int64_t l = 0; l < lanes; ++l) {
        Stream& best = super_streams[i * lanes + l];
        best.cut(supers);
        score_range(item, i, l, from, first, best.count > 0 ? best.id[0] * x : last);
        for (int64_t j = 0; j < best.count; ++j)
          score_range(item, i, l, best.id[j] * x, (best.id[j] + 1) * x, j + 1 < best.count ? best.id[j + 1] * x : last);
        score_range(item, i, l, last, to, to);
      }
    }
  }

  // Offers chunks [from, to) to the stream of query i and lane l; chunks from `following` on are scored next.
  void score_range(const RouteItem& item, int64_t i, int64_t l, int64_t from, int64_t to, int64_t following) const {
    for (int64_t c = from; c < to; c += kBlock) {
      const int64_t n = smaller(kBlock, to - c);
      for (int64_t j = 0; j < n; ++j) rows[j] = chunk_key(item, c + j);
      const int64_t ahead_from = c + n < to ? c + n : following;
      const int64_t ahead = larger(0, smaller(n, item.chunk_end - ahead_from));
      for (int64_t j = 0; j < ahead; ++j) next[j] = chunk_key(item, ahead_from + j);
      for (int64_t h = 0; h < (p.share ? r : 1); ++h) {
        float* const found = row_score + (h ? kBlock : 0);
        dots(query(item, i, l + h), rows, n, p.dim, found, next, h ? 0 : ahead);
        for (int64_t j = 0; j < n; j += kLanes) {
          const Vec y = ordered(load(found + j));
          store(row_score + j, h ? max(load(row_score + j), y) : y);
        }
      }
      offer(stream(i * lanes + l), row_score, n, c);
    }
  }

  // Chunk n - 1 in place of the lowest pick where there is no window.
  void force_previous(Stream& picked, int64_t at) const {
    const int64_t previous = at / p.chunk_size - 1;
    if (p.keep_last > 0 || picked.count == 0 || previous < p.pool_begin(at) || previous >= p.chunks) return;
    if (picked.id[picked.count - 1] == previous) return;
    int64_t lowest = 0;
    for (int64_t i = 1; i < picked.count; ++i)
      if (picked.score[i] <= picked.score[lowest]) lowest = i;
    for (int64_t i = lowest; i + 1 < picked.count; ++i) picked.id[i] = picked.id[i + 1], picked.score[i] = picked.score[i + 1];
    picked.id[picked.count - 1] = static_cast<int32_t>(previous);
  }

  int32_t* route_of(const RouteItem& item, int64_t i, int64_t lane, int32_t* routes) const {
    const int64_t query = item.queries[i] - p.context;
    return routes + ((item.batch * (p.queries - p.context) + query) * p.heads + item.kv_head * r + lane) * p.width();
  }

  // Writes ids [0, n) as the route of a row, and of all heads it stands for.
  void write(const RouteItem& item, int64_t i, int64_t lane, const int32_t* ids, int64_t n, int32_t* routes) const {
    for (int64_t h = 0; h < (p.share ? r : 1); ++h) {
      int32_t* const to = route_of(item, i, lane + h, routes);
      for (int64_t j = 0; j < n; ++j) to[j] = ids[j];
    }
  }

  // Ids of the groups of the picks of a stream, in order.
  int64_t candidates(const Stream& picked) const {
    int64_t n = 0;
    for (int64_t i = 0; i < picked.count; ++i)
      for (int64_t m = 0; m < p.groups; ++m) group_id[n++] = static_cast<int32_t>(picked.id[i] * p.groups + m);
    return n;
  }

  HICI_ASK void ask_for_candidates(const RouteItem& item, const Stream& picked) const {
    for (int64_t i = 0; i < picked.count; ++i)
      for (int64_t m = 0; m < p.groups; ++m) {
        const T* const key = group_key(item, picked.id[i] * p.groups + m);
        for (int64_t at = 0; at < p.dim; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(key + at, 0, 3);
      }
  }

  void open_strictly(const RouteItem& item, int32_t* routes) const {
    const bool few = item.count * lanes <= kFewRows && p.topk_groups < open;
    for (int64_t i = 0; i < item.count * lanes; ++i) {
      stream(i).cut(keep);
      force_previous(stream(i), index(item, i / lanes));
    }
    if (few) {
      for (int64_t i = 0; i < item.count * lanes; ++i)
        for (int64_t j = 0; j < stream(i).count; ++j) __builtin_prefetch(group_key(item, stream(i).id[j] * p.groups), 0, 2);
      ask_for_candidates(item, stream(0));
    }
    for (int64_t i = 0; i < item.count; ++i)
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t row = i * lanes + l;
        if (few && row + 1 < item.count * lanes) ask_for_candidates(item, stream(row + 1));
        const int64_t n = candidates(stream(row));
        if (n == 0) continue;
        Stream best{group_score, group_id, n, -__builtin_inff()};
        if (n > p.topk_groups) {
          for (int64_t j = 0; j < n; ++j) group_rows[j] = group_key(item, group_id[j]);
          float* const other = group_score + round_up(open, kLanes) + 16;
          for (int64_t h = 0; h < (p.share ? r : 1); ++h) {
            dots(query(item, i, l + h), group_rows, n, p.dim, h ? other : group_score);
            for (int64_t j = 0; j < n; j += kLanes) {
              const Vec x = ordered(load((h ? other : group_score) + j));
              store(group_score + j, h ? max(load(group_score + j), x) : x);
            }
          }
          best.cut(p.topk_groups);
        }
        write(item, i, l, group_id, best.count, routes);
      }
  }

  // The queries of a run see each other's scores: every group that one of them picked is scored for all of them.
  void open_prefix(const RouteItem& item, int32_t* routes) const {
    __builtin_memset(wanted, 0, p.chunks);
    for (int64_t i = 0; i < item.count * lanes; ++i) {
      stream(i).cut(keep);
      force_previous(stream(i), index(item, i / lanes));
      for (int64_t j = 0; j < stream(i).count; ++j) wanted[stream(i).id[j]] = 1;
    }
    const bool scored = p.topk_groups < open;
    if (scored) {
      pack_queries(item);
      // the picks of all rows are passed in order of chunks, each row at its own place
      for (int64_t i = 0; i < item.count * lanes; ++i) pick_count[i] = 0;
      for (int64_t c = 0; c < p.chunks; ++c) {
        if (!wanted[c]) continue;
        for (int64_t m = 0; m < p.groups; m += kBlock) {
          const int64_t n = smaller(kBlock, p.groups - m);
          for (int64_t j = 0; j < n; ++j) rows[j] = group_key(item, c * p.groups + m + j);
          multiply(item.count, rows, n, nullptr, 0);
          run_up(item.count, round_up(n, kLanes));
          for (int64_t i = 0; i < item.count * lanes; ++i) {
            const int64_t at = pick_count[i];
            if (at == stream(i).count || stream(i).id[at] != c) continue;
            float* const to = running + i * open + at * p.groups + m;
            for (int64_t j = 0; j < n; ++j) to[j] = s[i * kBlock + j];
            if (m + n == p.groups) ++pick_count[i];
          }
        }
      }
    }
    for (int64_t i = 0; i < item.count; ++i) {
      if (item.queries[i] < p.context) continue;
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t row = i * lanes + l, n = candidates(stream(row));
        Stream best{scored ? running + row * open : group_score, group_id, n, -__builtin_inff()};
        if (n > p.topk_groups) best.cut(p.topk_groups);
        write(item, i, l, group_id, best.count, routes);
      }
    }
  }

  void open_block(const RouteItem& item, int32_t* routes) const {
    const int64_t at = index(item, item.count - 1), previous = at / p.chunk_size - 1;
    for (int64_t i = 0; i < (item.count + 1) * lanes; ++i) stream(i).cut(keep);
    pack_queries(item);
    for (int64_t l = 0; l < lanes; ++l) {
      Stream& picked = stream(item.count * lanes + l);
      force_previous(picked, at);
      const int64_t n = candidates(picked);
      if (n == 0) continue;
      // running: a row of scores of every query, then their maximum
      float* const highest = running + item.count * block_columns;
      for (int64_t g = 0; g < n; g += kBlock) {
        const int64_t count = smaller(kBlock, n - g);
        for (int64_t j = 0; j < count; ++j) rows[j] = group_key(item, group_id[g + j]);
        multiply(item.count, rows, count, nullptr, 0);
        for (int64_t i = 0; i < item.count; ++i)
          for (int64_t j = 0; j < count; j += kLanes) {
            const Vec x = load(s + (i * lanes + l) * kBlock + j);
            store(running + i * block_columns + g + j, x);
            store(highest + g + j, i ? max(load(highest + g + j), x) : x);
          }
      }
      mark(highest, n, p.topk_groups, materialised);
      __builtin_memset(requested, 0, n);
      for (int64_t j = 0; j < picked.count; ++j) visible[j] = p.keep_last == 0 && picked.id[j] == previous;
      for (int64_t i = 0; i < item.count; ++i) {
        const Stream& own = stream(i * lanes + l);
        for (int64_t j = 0, k = 0; j < picked.count; ++j) {
          while (k < own.count && own.id[k] < picked.id[j]) ++k;
          visible[j] |= k < own.count && own.id[k] == picked.id[j];
        }
        add_marks(running + i * block_columns, n, p.topk_groups / 2, requested);
        if (item.queries[i] < p.context) continue;
        int64_t opened = 0;
        for (int64_t g = 0; g < n; ++g)
          if (materialised[g] && requested[g] && visible[g / p.groups]) opened_id[opened++] = group_id[g];
        write(item, i, l, opened_id, opened, routes);
      }
    }
  }

  // marks[i] |= 1 for the `count` highest of n scores, which are spent
  void add_marks(const float* scores, int64_t n, int64_t count, unsigned char* marks) const {
    if (count >= n) {
      __builtin_memset(marks, 1, n);
      return;
    }
    if (count == 0) return;
    const float level = level_of(scores, n, count);
    int64_t above = 0;
    for (int64_t i = 0; i < n; ++i) above += scores[i] > level;
    int64_t equal = count - above;
    for (int64_t i = 0; i < n; ++i)
      if (scores[i] > level || (scores[i] == level && equal-- > 0)) marks[i] = 1;
  }
  void mark(const float* scores, int64_t n, int64_t count, unsigned char* marks) const {
    __builtin_memset(marks, 0, n);
    add_marks(scores, n, count, marks);
  }

  void finish(const RouteItem& item, int32_t* routes) const {
    switch (p.routing) {
      case Routing::kStrict:
        return open_strictly(item, routes);
      case Routing::kPrefix:
        return open_prefix(item, routes);
      default:
        return open_block(item, routes);
    }
  }

  void route(const RouteItem& item, const RouteParts& parts, int32_t* routes) const {
    scan(item);
    if (item.part < 0) return finish(item, routes);
    for (int64_t i = 0; i < item.count * lanes; ++i) {
      stream(i).cut(keep);
      const int64_t to = item.part * parts.rows + i;
      parts.count[to] = static_cast<int32_t>(stream(i).count);
      __builtin_memcpy(parts.score + to * parts.keep, stream(i).score, stream(i).count * sizeof(float));
      __builtin_memcpy(parts.id + to * parts.keep, stream(i).id, stream(i).count * sizeof(int32_t));
    }
  }

  void merge(const RouteItem& item, int64_t first, int64_t count, const RouteParts& parts, int32_t* routes) const {
    open_streams(item.count * lanes);
    for (int64_t i = 0; i < item.count * lanes; ++i) {
      Stream& to = stream(i);
      for (int64_t part = first; part < first + count; ++part) {
        const int64_t from = part * parts.rows + i;
        for (int64_t j = 0; j < parts.count[from]; ++j) {
          const float x = parts.score[from * parts.keep + j];
          if (x <= to.floor) continue;
          to.score[to.count] = x, to.id[to.count++] = parts.id[from * parts.keep + j];
          if (to.count > keep + slack(keep)) to.cut(keep);
        }
      }
    }
    finish(item, routes);
  }
};

int64_t tile_rows(const RouteProblem&) { return kRows; }

int64_t scratch(const RouteProblem& p, const RouteSizes& sizes) {
  return with_element(p.element, [&](auto zero) {
    Carve carve(nullptr);
    Router<decltype(zero)> router(p, sizes, carve);
    return carve.bytes();
  });
}

void route(const RouteProblem& p, const RouteItem& item, const RouteSizes& sizes, const RouteParts& parts,
           int32_t* routes, void* memory) {
  with_element(p.element, [&](auto zero) {
    Carve carve(memory);
    Router<decltype(zero)>(p, sizes, carve).route(item, parts, routes);
  });
}

void merge(const RouteProblem& p, const RouteItem& item, int64_t first, int64_t count, const RouteSizes& sizes,
           const RouteParts& parts, int32_t* routes, void* memory) {
  with_element(p.element, [&](auto zero) {
    Carve carve(memory);
    Router<decltype(zero)>(p, sizes, carve).merge(item, first, count, parts, routes);
  });
}

}  // namespace

RoutePath route_path() { return {tile_rows, scratch, route, merge}; }

}  // namespace hici::cpu::HICI_PATH
