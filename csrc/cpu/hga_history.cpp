#include "hga_history.h"

#include <algorithm>

namespace hici::cpu {
namespace {

// The chunks that the queries of one kv head of one row see.
class Seen {
 public:
  void add(int64_t chunk) {
    if (chunk >= static_cast<int64_t>(seen_.size())) seen_.resize(chunk + 1, 0);
    if (!seen_[chunk]) seen_[chunk] = 1, chunks_.push_back(chunk);
  }
  const std::vector<int64_t>& in_order() {
    std::sort(chunks_.begin(), chunks_.end());
    return chunks_;
  }
  void clear() {
    for (const int64_t chunk : chunks_) seen_[chunk] = 0;
    chunks_.clear();
  }

 private:
  std::vector<char> seen_;
  std::vector<int64_t> chunks_;
};

void see(const HistoryProblem& p, int64_t b, int64_t g, Seen& seen) {
  const int64_t group = p.heads / p.kv_heads;
  const uint32_t m = static_cast<uint32_t>(p.chunk_size / p.group_size);
  int64_t whole = -1;  // chunk whose window is there already
  for (int64_t t = 0; t < p.queries; ++t) {
    const int64_t position = p.positions[b * p.queries + t];
    if (position < 0) continue;
    const int64_t n = position / p.chunk_size, first = std::min(p.keep_first, n);
    const int64_t last = std::min(std::max(p.keep_first, n - p.keep_last), n);
    if (n != whole) {
      for (int64_t chunk = 0; chunk < first; ++chunk) seen.add(chunk);
      for (int64_t chunk = last; chunk <= n; ++chunk) seen.add(chunk);
      whole = n;
    }
    const int32_t* const routes = p.routes + ((b * p.queries + t) * p.heads + g * group) * p.width;
    for (int64_t i = 0; i < group * p.width; ++i) {
      if (routes[i] < 0) continue;
      const int64_t chunk = static_cast<uint32_t>(routes[i]) / m;
      if (chunk >= first && chunk < last) seen.add(chunk);
    }
  }
}

}  // namespace

HistoryPages hga_history_pages(const HistoryProblem& p) {
  HistoryPages out;
  Seen seen;
  out.offsets.push_back(0);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t g = 0; g < p.kv_heads; ++g) {
      see(p, b, g, seen);
      for (const int64_t chunk : seen.in_order()) {
        out.chunks.push_back(chunk);
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
        const int64_t skip = (sink ? chunk : chunk - base) * p.chunk_size * p.token;
        out.k.push_back(from[0].data + b * from[0].batch + g * from[0].head + skip);
        out.v.push_back(from[1].data + b * from[1].batch + g * from[1].head + skip);
      }
      out.offsets.push_back(static_cast<int64_t>(out.chunks.size()));
      seen.clear();
    }
  return out;
}

}  // namespace hici::cpu
