#include "hga_history.h"

#include <algorithm>
#include <cstring>

namespace hici::cpu {
namespace {

// Places of chunks in a list that is being built.
class Places {
 public:
  int64_t& of(int64_t chunk) {
    if (chunk >= static_cast<int64_t>(place_.size())) place_.resize(chunk + 1, -1);
    if (place_[chunk] < 0) place_[chunk] = 0, touched_.push_back(chunk);
    return place_[chunk];
  }
  // Chunks in order, each with its place from `first` on.
  const std::vector<int64_t>& order(int64_t first) {
    std::sort(touched_.begin(), touched_.end());
    for (const int64_t chunk : touched_) place_[chunk] = first++;
    return touched_;
  }
  int64_t operator[](int64_t chunk) const { return place_[chunk]; }
  void clear() {
    for (const int64_t chunk : touched_) place_[chunk] = -1;
    touched_.clear();
  }

 private:
  std::vector<int64_t> place_, touched_;
};

struct Regions {
  int64_t first, last, own;  // sinks [0, first), window [last, own), own chunk
};

Regions regions_of(const HistoryProblem& p, int64_t position) {
  const int64_t n = position / p.chunk_size;
  return {std::min(p.keep_first, n), std::min(std::max(p.keep_first, n - p.keep_last), n), n};
}

// Every chunk a query sees as a whole, with the bits of its groups.
template <class See>
void windows(const HistoryProblem& p, int64_t b, const See& see) {
  const uint64_t all = ~uint64_t{0} >> (64 - p.chunk_size / p.group_size);
  for (int64_t t = 0; t < p.queries; ++t) {
    const int64_t position = p.positions[b * p.queries + t];
    if (position < 0) continue;
    const Regions r = regions_of(p, position);
    for (int64_t chunk = 0; chunk < r.first; ++chunk) see(t, chunk, all);
    for (int64_t chunk = r.last; chunk <= r.own; ++chunk) see(t, chunk, all);
  }
}

struct Open {
  int64_t chunk;
  int32_t place, group;  // query and head of the mask, and its bit
};

// What the routes of one kv head open, those outside the pool left out.
void opened(const HistoryProblem& p, int64_t b, int64_t g, std::vector<Open>& found) {
  const int64_t group = p.heads / p.kv_heads;
  const uint32_t m = static_cast<uint32_t>(p.chunk_size / p.group_size);
  found.clear();
  for (int64_t t = 0; t < p.queries; ++t) {
    const int64_t position = p.positions[b * p.queries + t];
    if (position < 0) continue;
    const Regions r = regions_of(p, position);
    for (int64_t i = 0; i < group; ++i) {
      const int32_t* const route = p.routes + ((b * p.queries + t) * p.heads + g * group + i) * p.width;
      for (int64_t j = 0; j < p.width; ++j) {
        if (route[j] < 0) continue;
        const uint32_t id = static_cast<uint32_t>(route[j]), chunk = id / m;
        if (chunk >= r.first && chunk < r.last)
          found.push_back({chunk, static_cast<int32_t>(t * group + i), static_cast<int32_t>(id - chunk * m)});
      }
    }
  }
}

}  // namespace

template <class Mask>
bool hga_history_pages(const HistoryProblem& p, HistoryPages& out, const Masks<Mask>& visible) {
  const int64_t group = p.heads / p.kv_heads, width = p.queries * group;
  Places places;
  std::vector<Open> open;
  out.offsets.push_back(0);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < p.kv_heads; ++g) {
      windows(p, b, [&](int64_t, int64_t chunk, uint64_t) { places.of(chunk); });
      opened(p, b, g, open);
      for (const Open& x : open) places.of(x.chunk);
      for (const int64_t chunk : places.order(static_cast<int64_t>(out.starts.size()))) {
        out.starts.push_back(chunk * p.chunk_size);
        const int64_t base = p.base[b];
        if (chunk >= p.keep_first && chunk < base) {
          const int64_t record = chunk < p.chunks ? p.records[b * p.chunks + chunk] : -1;
          out.missing |= record < 0;
          out.at.push_back(static_cast<int64_t>(out.k.size()));
          out.number.push_back(record * p.pages + g);
          out.k.push_back(0), out.v.push_back(0);
          continue;
        }
        const bool sink = chunk < base;
        const HistoryBuffer* const from = sink ? p.sinks : p.tail;
        const int64_t skip = b * from[0].batch + g * from[0].head + (sink ? chunk : chunk - base) * p.chunk_size * p.token;
        out.k.push_back(from[0].data + skip);
        out.v.push_back(from[1].data + skip + b * (from[1].batch - from[0].batch) + g * (from[1].head - from[0].head));
      }
      const int64_t before = out.offsets.back(), pages = static_cast<int64_t>(out.starts.size());
      if (pages > visible.room) return false;
      std::memset(visible.data + before * width, 0, (pages - before) * width * sizeof(Mask));
      windows(p, b, [&](int64_t t, int64_t chunk, uint64_t bits) {
        for (int64_t i = 0; i < group; ++i) visible.data[places[chunk] * width + t * group + i] |= static_cast<Mask>(bits);
      });
      for (const Open& x : open)
        visible.data[places[x.chunk] * width + x.place] |= static_cast<Mask>(uint64_t{1} << x.group);
      out.offsets.push_back(static_cast<int64_t>(out.starts.size()));
      places.clear();
    }
  return true;
}

template bool hga_history_pages(const HistoryProblem&, HistoryPages&, const Masks<uint8_t>&);
template bool hga_history_pages(const HistoryProblem&, HistoryPages&, const Masks<uint64_t>&);

}  // namespace hici::cpu
