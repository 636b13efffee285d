#include "hga_runs.h"

#include <algorithm>
#include <cstring>

namespace hici::cpu {
namespace {

const char* moved(const void* p, int64_t elements, int64_t size) { return static_cast<const char*>(p) + elements * size; }

int64_t index_of(const RoutedProblem& p, int64_t b, int64_t t) {
  return p.positions ? p.positions[b * p.queries + t] : p.keys - p.queries + t;
}
int64_t index_of(const PageProblem& p, int64_t b, int64_t t) { return p.positions[b * p.queries + t]; }

}  // namespace

template <class Problem>
void RunBuilder::start(const Problem& p, const RunRows& rows, void* out, float* lse) {
  size_ = p.element == Element::kFloat32 ? 4 : 2;
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

void RunBuilder::window(const RoutedProblem& p, const RunRows& rows) {
  const int64_t group = p.heads / p.kv_heads, c = p.chunk_size;
  const void* const kb = moved(p.k.data, rows.batch * p.k.batch + rows.kv_head * p.k.head, size_);
  const void* const vb = moved(p.v.data, rows.batch * p.v.batch + rows.kv_head * p.v.head, size_);
  const int64_t* const columns = p.columns ? p.columns + rows.batch * p.keys : nullptr;
  // row_ids_[i] = i, so that any range of rows is there
  for (int64_t i = 0; i < rows.count * group; ++i) row_ids_.push_back(static_cast<int32_t>(i));
  const auto chunk_of = [&](int64_t i) { return index_[i * group] / c; };
  const auto first_seen = [&](int64_t n) { return std::min(std::max(p.keep_first, n - p.keep_last), n); };
  const int64_t first = chunk_of(0), last = chunk_of(rows.count - 1), end = index_.back() + 1;
  int64_t from = 0, to = 0;  // queries [from, to) see chunk x
  const auto see = [&](int64_t x, int64_t a, int64_t b) {
    const int64_t start = x * c, count = std::min(c, end - start);
    if (a >= b || count <= 0) return;
    const void* const at_k = columns ? kb : moved(kb, start * p.k.seq, size_);
    const void* const at_v = columns ? vb : moved(vb, start * p.v.seq, size_);
    add(at_k, at_v, columns ? columns + start : nullptr, start, count, static_cast<int32_t>(a * group),
        static_cast<int32_t>((b - a) * group));
  };
  // queries of chunk x or later, from `from` on
  int64_t x = 0;
  for (; x < std::min(p.keep_first, last + 1); ++x) {
    while (from < rows.count && chunk_of(from) < x) ++from;
    see(x, from, rows.count);
  }
  for (x = std::max(x, first_seen(first)); x <= last; ++x) {
    while (from < rows.count && chunk_of(from) < x) ++from;
    to = std::max(to, from);
    while (to < rows.count && first_seen(chunk_of(to)) <= x) ++to;
    see(x, from, to);
  }
}

void RunBuilder::routed(const RoutedProblem& p, const RunRows& rows) {
  const int64_t group = p.heads / p.kv_heads, per_chunk = p.chunk_size / p.group_size;
  const int64_t groups = p.keys / p.group_size;
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
  std::sort(touched_.begin(), touched_.end());
  int32_t at = static_cast<int32_t>(row_ids_.size());
  row_ids_.resize(row_ids_.size() + row_of_.size());
  for (const int32_t id : touched_) {
    const int32_t count = places_[id];
    places_[id] = at;
    at += count;
  }
  for (size_t i = 0; i < row_of_.size(); ++i) row_ids_[places_[group_of_[i]]++] = row_of_[i];
  const void* const kb = moved(p.k.data, rows.batch * p.k.batch + rows.kv_head * p.k.head, size_);
  const void* const vb = moved(p.v.data, rows.batch * p.v.batch + rows.kv_head * p.v.head, size_);
  const int64_t* const columns = p.columns ? p.columns + rows.batch * p.keys : nullptr;
  int32_t begin = static_cast<int32_t>(row_ids_.size() - row_of_.size());
  for (const int32_t id : touched_) {
    const int64_t start = id * p.group_size;
    add(columns ? kb : moved(kb, start * p.k.seq, size_), columns ? vb : moved(vb, start * p.v.seq, size_),
        columns ? columns + start : nullptr, start, p.group_size, begin, places_[id] - begin);
    begin = places_[id];
    places_[id] = 0;
  }
}

void RunBuilder::build(const RoutedProblem& p, const RunRows& rows, void* out, float* lse) {
  start(p, rows, out, lse);
  list_.k_step = p.k.seq, list_.v_step = p.v.seq;
  window(p, rows);
  if (p.width > 0) routed(p, rows);
  finish();
}

template <class Mask>
void RunBuilder::pages(const PageProblem& p, const RunRows& rows, const Mask* visible) {
  const int64_t group = p.heads / p.kv_heads, list = rows.batch * p.kv_heads + rows.kv_head;
  for (int64_t x = p.offsets[list]; x < p.offsets[list + 1]; ++x) {
    for (int64_t m = 0; m < p.page_tokens / p.group_size; ++m) {
      const int64_t first = m * p.group_size, start = p.starts[x] + first;
      const int32_t begin = static_cast<int32_t>(row_ids_.size());
      int64_t highest = -1;
      for (int64_t i = 0; i < rows.count; ++i) {
        if (index_[i * group] < start) continue;
        const Mask* const bits = visible + (x * p.queries + rows.queries[i]) * group;
        for (int64_t h = 0; h < group; ++h)
          if (bits[h] >> m & 1) row_ids_.push_back(static_cast<int32_t>(i * group + h)), highest = index_[i * group];
      }
      const int32_t count = static_cast<int32_t>(row_ids_.size()) - begin;
      if (count == 0) continue;
      const void* const k = reinterpret_cast<const void*>(p.k_pages[x]);
      const void* const v = reinterpret_cast<const void*>(p.v_pages[x]);
      add(moved(k, first * p.k_token, size_), moved(v, first * p.v_token, size_), nullptr, start,
          std::min(p.group_size, highest - start + 1), begin, count);
    }
  }
}

void RunBuilder::build(const PageProblem& p, const RunRows& rows, void* out, float* lse) {
  start(p, rows, out, lse);
  list_.k_step = p.k_token, list_.v_step = p.v_token;
  if (p.mask_bytes == 1)
    pages(p, rows, static_cast<const uint8_t*>(p.visible));
  else
    pages(p, rows, static_cast<const uint64_t*>(p.visible));
  finish();
}

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
