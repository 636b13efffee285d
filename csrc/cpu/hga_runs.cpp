#include "hga_runs.h"

#include <algorithm>
#include <limits>

namespace hici::cpu {
namespace {

// A group costs about this many times less to look at than one of a few to sort.
constexpr int64_t kSortedShare = 16;

int64_t size_of(Element e) { return e == Element::kFloat32 ? 4 : 2; }

const char* moved(const void* p, int64_t elements, int64_t size) { return static_cast<const char*>(p) + elements * size; }

int64_t index_of(const RoutedProblem& p, int64_t b, int64_t t) {
  return p.positions ? p.positions[b * p.queries + t] : p.keys - p.queries + t;
}
int64_t index_of(const PageProblem& p, int64_t b, int64_t t) { return p.positions[b * p.queries + t]; }

// Where the tokens of one kv head of one batch row lie, chunk by chunk. Asked in ascending order.
class TensorChunks {
 public:
  TensorChunks(const RoutedProblem& p, const RunRows& rows)
      : k(moved(p.k.data, rows.batch * p.k.batch + rows.kv_head * p.k.head, size_of(p.element))),
        v(moved(p.v.data, rows.batch * p.v.batch + rows.kv_head * p.v.head, size_of(p.element))),
        columns(p.columns ? p.columns + rows.batch * p.keys : nullptr),
        groups(p.keys / p.group_size),
        chunk_size_(p.chunk_size) {}
  int64_t next(int64_t chunk) const { return chunk; }
  int64_t skipped(int64_t chunk) const { return chunk * chunk_size_; }  // tokens from k to the chunk

  const void *k, *v;
  const int64_t* columns;
  int64_t groups;

 private:
  int64_t chunk_size_;
};

class PageChunks {
 public:
  PageChunks(const PageProblem& p, const RunRows& rows) : pages_(p) {
    const int64_t list = rows.batch * p.kv_heads + rows.kv_head;
    at_ = p.offsets[list], end_ = p.offsets[list + 1];
    groups = at_ < end_ ? (p.chunks[end_ - 1] + 1) * (p.chunk_size / p.group_size) : 0;
  }
  // the first chunk from this one on that there is
  int64_t next(int64_t chunk) {
    while (at_ < end_ && pages_.chunks[at_] < chunk) ++at_;
    if (at_ == end_) return std::numeric_limits<int64_t>::max();
    k = reinterpret_cast<const void*>(pages_.k_pages[at_]), v = reinterpret_cast<const void*>(pages_.v_pages[at_]);
    return pages_.chunks[at_];
  }
  int64_t skipped(int64_t) const { return 0; }

  const void *k = nullptr, *v = nullptr;
  static constexpr const int64_t* columns = nullptr;
  int64_t groups;

 private:
  const PageProblem& pages_;
  int64_t at_, end_;
};

TensorChunks chunks_of(const RoutedProblem& p, const RunRows& rows) { return {p, rows}; }
PageChunks chunks_of(const PageProblem& p, const RunRows& rows) { return {p, rows}; }

struct Steps {
  int64_t k, v;
};
Steps steps_of(const RoutedProblem& p) { return {p.k.seq, p.v.seq}; }
Steps steps_of(const PageProblem& p) { return {p.k_token, p.v_token}; }

}  // namespace

template <class Problem>
void RunBuilder::start(const Problem& p, const RunRows& rows, void* out, float* lse) {
  size_ = size_of(p.element);
  const int64_t group = p.heads / p.kv_heads;
  q_.clear(), index_.clear(), out_.clear(), lse_.clear(), runs_.clear(), row_ids_.clear();
  tokens_ = 0;
  // a decode step makes few lists, each with memory of its own: as much of it as such a list fills, at once
  constexpr size_t kUsual = 512;
  for (auto* const x : {&row_ids_, &touched_, &row_of_, &group_of_}) x->reserve(kUsual);
  runs_.reserve(kUsual);
  const int64_t out_size = wide_out(p) ? 4 : size_;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t h = 0; h < group; ++h) {
      const int64_t t = rows.queries[i], head = rows.kv_head * group + h;
      q_.push_back(moved(p.q.data, rows.batch * p.q.batch + t * p.q.seq + head * p.q.head, size_));
      index_.push_back(index_of(p, rows.batch, t));
      out_.push_back(const_cast<char*>(moved(out, ((rows.batch * p.queries + t) * p.heads + head) * p.dim, out_size)));
      lse_.push_back(lse + (rows.batch * p.heads + head) * p.queries + t);
    }
  list_.element = p.element, list_.dim = p.dim, list_.scale = p.scale, list_.wide = wide_out(p);
  list_.k_step = steps_of(p).k, list_.v_step = steps_of(p).v;
}

void RunBuilder::finish() {
  list_.rows = static_cast<int64_t>(q_.size());
  list_.q = q_.data(), list_.index = index_.data(), list_.out = out_.data(), list_.lse = lse_.data();
  list_.runs = runs_.data(), list_.run_count = static_cast<int64_t>(runs_.size()), list_.row_ids = row_ids_.data();
}

bool RunBuilder::joins(const void* k, const void* v, const int64_t* columns, int64_t start, int64_t count,
                       int32_t rows_begin, int32_t rows_count) const {
  if (runs_.empty()) return false;
  const Run& last = runs_.back();
  if (last.start + last.count != start || last.count + count > run_tokens_ || last.rows_count != rows_count) return false;
  if (columns ? last.columns + last.count != columns
              : moved(last.k, last.count * list_.k_step, size_) != k || moved(last.v, last.count * list_.v_step, size_) != v)
    return false;
  return last.rows_begin == rows_begin || std::equal(row_ids_.begin() + rows_begin, row_ids_.begin() + rows_begin + rows_count,
                                                     row_ids_.begin() + last.rows_begin);
}

void RunBuilder::add(const void* k, const void* v, const int64_t* columns, int64_t start, int64_t count,
                     int32_t rows_begin, int32_t rows_count) {
  tokens_ += count;
  for (int64_t i = 0; i < count;) {
    const int64_t some = std::min(run_tokens_, count - i);
    const void* const at_k = columns ? k : moved(k, i * list_.k_step, size_);
    const void* const at_v = columns ? v : moved(v, i * list_.v_step, size_);
    const int64_t* const at = columns ? columns + i : nullptr;
    if (joins(at_k, at_v, at, start + i, some, rows_begin, rows_count))
      runs_.back().count += static_cast<int32_t>(some);
    else
      runs_.push_back({at_k, at_v, at, start + i, static_cast<int32_t>(some), rows_begin, rows_count});
    i += some;
  }
}

template <class Problem>
void RunBuilder::window(const Problem& p, const RunRows& rows) {
  const int64_t group = p.heads / p.kv_heads, c = p.chunk_size;
  auto chunks = chunks_of(p, rows);
  // row_ids_[i] = i, so that any range of rows is there
  for (int64_t i = 0; i < rows.count * group; ++i) row_ids_.push_back(static_cast<int32_t>(i));
  const auto chunk_of = [&](int64_t i) { return index_[i * group] / c; };
  const auto first_seen = [&](int64_t n) { return std::min(std::max(p.keep_first, n - p.keep_last), n); };
  const int64_t first = chunk_of(0), last = chunk_of(rows.count - 1), end = index_.back() + 1;
  int64_t from = 0, to = 0;  // queries [from, to) see chunk x
  const auto see = [&](int64_t x, int64_t a, int64_t b) {
    const int64_t start = x * c, count = std::min(c, end - start), skip = chunks.skipped(x);
    if (a >= b || count <= 0) return;
    add(chunks.columns ? chunks.k : moved(chunks.k, skip * list_.k_step, size_),
        chunks.columns ? chunks.v : moved(chunks.v, skip * list_.v_step, size_),
        chunks.columns ? chunks.columns + skip : nullptr, start, count, static_cast<int32_t>(a * group),
        static_cast<int32_t>((b - a) * group));
  };
  // queries of chunk x or later, from `from` on
  int64_t x = chunks.next(0);
  for (; x < std::min(p.keep_first, last + 1); x = chunks.next(x + 1)) {
    while (from < rows.count && chunk_of(from) < x) ++from;
    see(x, from, rows.count);
  }
  for (x = chunks.next(std::max(x, first_seen(first))); x <= last; x = chunks.next(x + 1)) {
    while (from < rows.count && chunk_of(from) < x) ++from;
    to = std::max(to, from);
    while (to < rows.count && first_seen(chunk_of(to)) <= x) ++to;
    see(x, from, to);
  }
}

template <class Problem>
void RunBuilder::routed(const Problem& p, const RunRows& rows) {
  const int64_t group = p.heads / p.kv_heads, per_chunk = p.chunk_size / p.group_size;
  auto chunks = chunks_of(p, rows);
  const int64_t groups = chunks.groups;
  if (static_cast<int64_t>(places_.size()) < groups) places_.resize(groups, 0);
  touched_.clear(), row_of_.clear(), group_of_.clear();
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t n = index_[i * group] / p.chunk_size;
    const int64_t f = std::min(p.keep_first, n), l = std::min(std::max(p.keep_first, n - p.keep_last), n);
    for (int64_t h = 0; h < group; ++h) {
      const int32_t* const route =
          p.routes + ((rows.batch * p.queries + rows.queries[i]) * p.heads + rows.kv_head * group + h) * p.width;
      int32_t before = -1;
      for (int64_t j = 0; j < p.width; ++j) {
        const int32_t id = route[j];
        // what a route may not name is left out: what is there is seen once
        if (id <= before) continue;
        before = id;
        if (id < f * per_chunk || id >= l * per_chunk || id >= groups) continue;
        if (places_[id]++ == 0) touched_.push_back(id);
        group_of_.push_back(id), row_of_.push_back(static_cast<int32_t>(i * group + h));
      }
    }
  }
  in_order(groups);
  int32_t at = static_cast<int32_t>(row_ids_.size());
  row_ids_.resize(row_ids_.size() + row_of_.size());
  for (const int32_t id : touched_) {
    const int32_t count = places_[id];
    places_[id] = at;
    at += count;
  }
  for (size_t i = 0; i < row_of_.size(); ++i) row_ids_[places_[group_of_[i]]++] = row_of_[i];
  int32_t begin = static_cast<int32_t>(row_ids_.size() - row_of_.size());
  for (const int32_t id : touched_) {
    const int64_t chunk = id / per_chunk, first = (id - chunk * per_chunk) * p.group_size;
    if (chunks.next(chunk) == chunk) {
      const int64_t skip = chunks.skipped(chunk) + first;
      add(chunks.columns ? chunks.k : moved(chunks.k, skip * list_.k_step, size_),
          chunks.columns ? chunks.v : moved(chunks.v, skip * list_.v_step, size_),
          chunks.columns ? chunks.columns + skip : nullptr, id * p.group_size, p.group_size, begin, places_[id] - begin);
    }
    begin = places_[id];
    places_[id] = 0;
  }
}

// The groups that rows have opened: read off where they are many, sorted where they are few.
void RunBuilder::in_order(int64_t groups) {
  if (static_cast<int64_t>(touched_.size()) * kSortedShare < groups) {
    std::sort(touched_.begin(), touched_.end());
    return;
  }
  touched_.clear();
  for (int64_t id = 0; id < groups; ++id)
    if (places_[id] != 0) touched_.push_back(static_cast<int32_t>(id));
}

template <class Problem>
void RunBuilder::build(const Problem& p, const RunRows& rows, void* out, float* lse) {
  start(p, rows, out, lse);
  window(p, rows);
  if (p.width > 0) routed(p, rows);
  finish();
}

template void RunBuilder::build(const RoutedProblem&, const RunRows&, void*, float*);
template void RunBuilder::build(const PageProblem&, const RunRows&, void*, float*);

template <class Index>
OrderedQueries::OrderedQueries(int64_t batch, int64_t count, Index&& index) {
  queries.reserve(batch * count);
  begin.push_back(0);
  for (int64_t b = 0; b < batch; ++b) {
    bool sorted = true;
    int64_t before = -1;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = index(b, t);
      if (at < 0) continue;
      sorted &= at >= before, before = at;
      queries.push_back(static_cast<int32_t>(t));
    }
    if (!sorted)
      std::stable_sort(queries.begin() + begin.back(), queries.end(),
                       [&](int32_t x, int32_t y) { return index(b, x) < index(b, y); });
    begin.push_back(static_cast<int64_t>(queries.size()));
  }
}

OrderedQueries ordered_queries(const RoutedProblem& p) {
  return OrderedQueries(p.batch, p.queries, [&](int64_t b, int64_t t) {
    const int64_t at = index_of(p, b, t);
    return at < p.keys ? at : -1;
  });
}

OrderedQueries ordered_queries(const PageProblem& p) {
  return OrderedQueries(p.batch, p.queries, [&](int64_t b, int64_t t) { return index_of(p, b, t); });
}

}  // namespace hici::cpu
