#include "attention_schedule.h"

#include <algorithm>
#include <utility>

namespace hici::cpu {
namespace {

// Enough items for the cores of a large machine. A constant, since the cut decides the order of additions.
constexpr int64_t kItems = 64;
// Keys below which splitting a tile's keys over items costs more than it gives.
constexpr int64_t kSplitKeys = 2048;
// The most rows of a kv head that are multiplied where keys lie (FewPath): with more, packing pays.
constexpr int64_t kFewRows = 16;
// The same where nothing is packed, and items below which the heads of a part are split too.
constexpr int64_t kSplitKeysFew = 256, kItemsFew = 16;

// Backward: a segment and kv head is one item, which computes each block of scores once, where there are enough of them
// or little to do, and where what it keeps in scratch stays below a limit; else keys and queries are separate items,
// which cut finer and compute the scores twice.
constexpr int64_t kWholeItems = 32;
constexpr double kLittleWork = 1e8;
constexpr int64_t kWholeRows = int64_t{1} << 23;  // elements of dim: about 30 bytes of scratch each
// Keys that stay packed in scratch, and in float32 their scores with kQueriesAhead queries: 4 KiB each.
constexpr int64_t kKeptKeys = 16384;

}  // namespace

Ranks::Ranks(const AttentionProblem& given, const AttentionCut& cut) : problem_(given) {
  const int64_t s = given.keys;
  // rank_of[row * (s + 1) + column]: unmasked columns before it
  std::vector<int64_t> rank_of;
  if (cut.mask) {
    bool masked = false;
    for (int64_t b = 0; b < given.batch && !masked; ++b)
      for (int64_t t = 0; t < s && !masked; ++t) masked = !cut.mask[b * cut.mask_batch + t * cut.mask_column];
    if (masked) {
      columns_.resize(given.batch * s);
      rank_of.resize(given.batch * (s + 1));
      for (int64_t b = 0; b < given.batch; ++b) {
        int64_t rank = 0;
        for (int64_t t = 0; t < s; ++t) {
          rank_of[b * (s + 1) + t] = rank;
          if (cut.mask[b * cut.mask_batch + t * cut.mask_column]) columns_[b * s + rank++] = t;
        }
        rank_of[b * (s + 1) + s] = rank;
      }
    }
  }
  const auto rank = [&](int64_t b, int64_t column) {
    return rank_of.empty() ? column : rank_of[b * (s + 1) + column];
  };

  const int64_t documents = cut.documents ? cut.document_count : 1;
  for (int64_t b = 0; b < given.batch; ++b) {
    int64_t number = 0;
    for (int64_t d = 0; d < documents; ++d) {
      const int64_t begin = cut.documents ? cut.documents[d] : 0, end = cut.documents ? cut.documents[d + 1] : s;
      const int64_t step = cut.segment_len > 0 ? cut.segment_len : std::max<int64_t>(end - begin, 1);
      for (int64_t start = begin, stop; start < end; start = stop, ++number) {
        stop = start + std::min(step, end - start);
        const int64_t first_query = std::max(start, s - given.queries);
        if (first_query >= stop) continue;
        AttentionSegment x;
        x.batch = b, x.segment = number;
        x.query_begin = rank(b, first_query), x.query_end = rank(b, stop);
        x.key_begin = rank(b, start == begin ? start : start - cut.recurrence_len);
        x.own_begin = rank(b, start), x.key_end = x.query_end;
        x.slots = !cut.prefix_mask || cut.prefix_mask[b * cut.prefix_batch + number * cut.prefix_segment];
        if (x.query_begin < x.query_end) segments_.push_back(x);
      }
    }
  }
}

AttentionProblem Ranks::problem() const {
  AttentionProblem p = problem_;
  p.columns = columns_.empty() ? nullptr : columns_.data();
  p.segments = segments_.data();
  p.segment_count = static_cast<int64_t>(segments_.size());
  return p;
}

ForwardSchedule::ForwardSchedule(const AttentionProblem& p, int64_t tile_rows) {
  const int64_t tokens = std::max<int64_t>(1, tile_rows / p.group());
  struct Tile {
    int64_t segment, begin, end, keys;
  };
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < p.segment_count; ++i) {
    const AttentionSegment& s = p.segments[i];
    const int64_t slots = s.slots ? p.global.count + p.local.count : 0;
    // tiles of equal size: a short last one would cost as much packing as a full one
    const int64_t count = s.query_end - s.query_begin, tiles_of = (count + tokens - 1) / tokens;
    for (int64_t t = tiles_of - 1; t >= 0; --t) {
      const int64_t begin = s.query_begin + count * t / tiles_of, end = s.query_begin + count * (t + 1) / tiles_of;
      const int64_t keys = slots + (p.causal ? end : s.key_end) - s.key_begin;
      tiles.push_back({i, begin, end, keys});
      sizes.rows = std::max(sizes.rows, (end - begin) * p.group()), sizes.keys = std::max(sizes.keys, keys);
      work += 2.0 * static_cast<double>(end - begin) * keys * p.heads * p.dim;
    }
  }

  few = sizes.rows <= kFewRows;
  const int64_t count = static_cast<int64_t>(tiles.size()), whole = count * p.kv_heads;
  if (!few && whole >= kItems) {
    // head by head and segment by segment, so that the tiles that share keys and values run at about the same time;
    // within a segment the long ones come first, so that the last items of all are short
    for (int64_t h = 0; h < p.kv_heads; ++h)
      for (const Tile& tile : tiles) items.push_back({tile.segment, h, 1, tile.begin, tile.end, 0, tile.keys, -1});
    return;
  }
  // few tiles: keys are split, and the heads of one part run together, since the rows of a token's heads share a page
  for (const Tile& tile : tiles) {
    const int64_t parts = few ? (kItems + count - 1) / count : (kItems + whole - 1) / whole * p.kv_heads;
    const int64_t splits = std::max<int64_t>(1, std::min(parts, tile.keys / (few ? kSplitKeysFew : kSplitKeys)));
    const int64_t shares = few ? std::min(p.kv_heads, std::max<int64_t>(1, kItemsFew / (splits * count))) : p.kv_heads;
    const ForwardItem of{tile.segment, 0, 1, tile.begin, tile.end, 0, tile.keys, -1};
    for (int64_t i = 0; i < splits; ++i)
      for (int64_t x = 0; x < shares; ++x) {
        ForwardItem item = of;
        item.kv_head = p.kv_heads * x / shares, item.heads = p.kv_heads * (x + 1) / shares - item.kv_head;
        item.key_begin = tile.keys * i / splits, item.key_end = tile.keys * (i + 1) / splits;
        if (splits > 1) item.partial = partials + i * p.kv_heads + item.kv_head;
        items.push_back(item);
        sizes.heads = std::max(sizes.heads, item.heads);
      }
    if (splits == 1) continue;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      merges.push_back({of, splits});
      merges.back().first.kv_head = h, merges.back().first.partial = partials + h;
    }
    partials += splits * p.kv_heads;
  }
}

BackwardSchedule::BackwardSchedule(const AttentionProblem& p, int64_t block, bool anew) {
  const auto slots_of = [&](const AttentionSegment& s) { return s.slots ? p.global.count + p.local.count : 0; };
  int64_t longest = 0, most_keys = 0;
  for (int64_t i = 0; i < p.segment_count; ++i) {
    const AttentionSegment& s = p.segments[i];
    const int64_t queries = s.query_end - s.query_begin;
    const int64_t keys = slots_of(s) + s.key_end - s.key_begin;
    longest = std::max(longest, queries), most_keys = std::max(most_keys, keys);
    if (keys <= kExactKeys) sizes.exact = std::max(sizes.exact, keys);
    work += 5.0 * static_cast<double>(queries) * keys * p.heads * p.dim;
    const bool seen_again = i + 1 < p.segment_count && p.segments[i + 1].batch == s.batch &&
                            p.segments[i + 1].own_begin == s.key_end && p.segments[i + 1].key_begin < s.key_end;
    tail_begin.push_back(seen_again ? p.segments[i + 1].key_begin : s.key_end);
  }
  const bool whole = (longest + most_keys) * p.dim <= kWholeRows &&
                     (work < kLittleWork || p.segment_count * p.kv_heads >= kWholeItems);
  const int64_t key_step = std::max(kExactKeys, 4 * block), query_step = 4 * block;
  sizes.keys = whole ? most_keys : std::min(most_keys, key_step);
  sizes.anew = anew && most_keys > kExactKeys;
  sizes.queries = std::min(longest, kQueriesAhead);
  const bool room = most_keys <= kKeptKeys;
  sizes.packed = room ? most_keys : whole ? 0 : sizes.keys;
  sizes.kept = sizes.anew && room;

  struct Costed {
    double cost;
    BackwardItem item;
  };
  std::vector<Costed> found, after;
  for (int64_t i = 0; i < p.segment_count; ++i) {
    const AttentionSegment& s = p.segments[i];
    const int64_t slots = slots_of(s), keys = slots + s.key_end - s.key_begin;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      if (whole) {
        found.push_back({static_cast<double>(s.query_end - s.query_begin) * keys,
                         {BackwardPart::kAll, i, h, 0, keys, s.query_begin, s.query_end}});
        continue;
      }
      for (int64_t j = 0; j < keys; j += key_step) {
        const int64_t end = std::min(j + key_step, keys);
        const int64_t first = p.causal ? std::max(s.query_begin, s.key_begin + j - slots) : s.query_begin;
        (sizes.anew ? after : found)
            .push_back({4.0 * (end - j) * (s.query_end - first),
                        {BackwardPart::kKeys, i, h, j, end, s.query_begin, s.query_end}});
      }
      for (int64_t t = s.query_begin; t < s.query_end; t += query_step) {
        const int64_t end = std::min(t + query_step, s.query_end);
        const int64_t seen = p.causal ? slots + end - s.key_begin : keys;
        found.push_back({3.0 * (end - t) * seen, {BackwardPart::kQueries, i, h, 0, seen, t, end}});
      }
    }
  }
  for (const auto& [costed, to] : {std::pair{&found, &items}, std::pair{&after, &later}}) {
    std::stable_sort(costed->begin(), costed->end(), [](const Costed& a, const Costed& b) { return a.cost > b.cost; });
    for (const Costed& x : *costed) to->push_back(x.item);
  }
}

}  // namespace hici::cpu
