// hga_summaries.h, hga_route.h and hga_attention.h (whole histories, pages, gradients) against plain loops in double: any
// strides, tokens in any columns, positions beyond both ends, memory of exact size, and the same bits from any number of
// threads. Routes are compared id by id: keys and queries are whole numbers, whose products are exact in any order, and of
// which many are equal.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <type_traits>

#include "../cpu/hga_attention.h"
#include "../cpu/hga_route.h"
#include "../cpu/hga_summaries.h"
#include "checks.h"

namespace hici::driver {
namespace {

template <class T>
constexpr cpu::Element element() {
  return std::is_same_v<T, float> ? cpu::Element::kFloat32 : std::is_same_v<T, bfloat16> ? cpu::Element::kBfloat16 : cpu::Element::kFloat16;
}

// [batch, seq, heads, dim]: heads or tokens outermost, gaps between rows.
template <class T>
struct Rows {
  std::unique_ptr<Exact> memory;
  int64_t batch, seq, head, dim;

  Rows(Random& random, int64_t b, int64_t s, int64_t h, int64_t d) : dim(d) {
    const int64_t row = d + random.below(4);
    if (random.chance(0.5))
      head = row, seq = row * h + random.below(3), batch = seq * s + random.below(5);
    else
      seq = row, head = row * s + random.below(3), batch = head * h + random.below(5);
    const int64_t extent = b * s * h == 0 ? 0 : (b - 1) * batch + (s - 1) * seq + (h - 1) * head + d;
    memory = std::make_unique<Exact>(extent * static_cast<int64_t>(sizeof(T)));
  }
  T* at(int64_t b, int64_t s, int64_t h) const {
    return static_cast<T*>(memory->data()) + b * batch + s * seq + h * head;
  }
  cpu::Sequence4 sequence() const { return {memory->data(), batch, seq, head}; }
  void draw(Random& random, int64_t b, int64_t s, int64_t h, bool whole) const {
    for (int64_t d = 0; d < dim; ++d)
      put(at(b, s, h) + d, whole ? static_cast<double>(random.within(-3, 3)) : random.normal());
  }
};

struct Config {
  int64_t chunk, group, first, last, topk_chunks, topk_groups, block, supers_of, topk_supers;
  cpu::Routing routing;
  bool share;
  int64_t groups() const { return chunk / group; }
  int64_t begin(int64_t p) const { return std::min(first, p / chunk); }
  int64_t end(int64_t p) const { return std::min(std::max(first, p / chunk - last), p / chunk); }
};

Config random_config(Random& random) {
  const int64_t chunks[] = {1, 4, 6, 8, 16, 64, 80};
  Config c{};
  c.chunk = chunks[random.below(7)];
  do c.group = random.within(1, c.chunk);
  while (c.chunk % c.group || c.groups() > 64);
  c.first = random.below(3), c.last = random.below(3), c.topk_chunks = random.below(6), c.topk_groups = random.below(14);
  c.block = random.within(1, 20), c.routing = static_cast<cpu::Routing>(random.below(3)), c.share = random.chance(0.4);
  if (c.routing == cpu::Routing::kStrict && random.chance(0.3))
    c.supers_of = random.within(1, 3), c.topk_supers = random.below(4);
  return c;
}

struct Call {
  Config config;
  int64_t batch, queries, keys, heads, kv_heads, dim;
  std::vector<int64_t> columns, positions;  // empty = as they stand
  int64_t group() const { return heads / kv_heads; }
  int64_t column(int64_t b, int64_t j) const { return columns.empty() ? j : columns[b * keys + j]; }
  // token a query is, or negative
  int64_t index(int64_t b, int64_t t) const { return positions.empty() ? keys - queries + t : positions[b * queries + t]; }
};

Call random_call(Random& random, int number) {
  Call c{};
  c.config = random_config(random);
  c.batch = random.within(1, 2), c.kv_heads = random.within(1, 2), c.heads = c.kv_heads * (int64_t{1} << random.below(4));
  const int64_t dims[] = {2, 5, 8, 16, 24, 33, 64, 80, 128};
  c.dim = dims[random.below(9)];
  // every fifth is long enough for several threads, lists and parts
  const bool large = number % 5 == 0;
  if (large) c.batch = c.kv_heads = 1, c.heads = int64_t{1} << random.below(4);
  c.keys = large ? random.within(260, 420) : random.within(0, 90);
  c.queries = random.chance(0.4) ? random.within(0, std::min<int64_t>(c.keys, 4)) : random.within(0, std::min<int64_t>(c.keys, 80));
  if (random.chance(0.3))
    for (int64_t b = 0; b < c.batch; ++b) {
      const size_t from = c.columns.size();
      for (int64_t j = 0; j < c.keys; ++j) c.columns.push_back(j);
      for (int64_t j = c.keys - 1; j > 0; --j) std::swap(c.columns[from + j], c.columns[from + random.below(j + 1)]);
    }
  if (random.chance(0.4))
    for (int64_t b = 0; b < c.batch; ++b) {
      const size_t from = c.positions.size();
      for (int64_t t = 0; t < c.queries; ++t) c.positions.push_back(random.within(-2, c.keys - 1));
      std::sort(c.positions.begin() + static_cast<int64_t>(from), c.positions.end());
    }
  return c;
}

int threads_of(Random& random) { return static_cast<int>(random.within(2, 4)); }

void near(double found, double expected, double tolerance, double size, cpu::Isa isa, const char* what) {
  if (!(std::fabs(found - expected) <= tolerance * std::max(1.0, size)))
    fail("%s on %s: %g, expected %g", what, cpu::name(isa), found, expected);
}

template <class T>
double tolerance() {
  return std::is_same_v<T, float> ? 2e-5 : std::is_same_v<T, bfloat16> ? 4e-2 : 5e-3;
}

// K(T): pairs that turn fast are averaged as they are, the others after being turned to the anchor.
template <class T>
std::vector<double> summary(const Call& c, const Rows<T>& k, const std::vector<double>& inv_freq, int64_t b, int64_t h,
                            int64_t from, int64_t count) {
  const int64_t half = static_cast<int64_t>(inv_freq.size()), anchor = from + (count - 1) / 2;
  int64_t cut = 0;
  for (int64_t i = 0; i < half; ++i)
    if (static_cast<double>(std::max<int64_t>(1, c.config.chunk - 1)) * inv_freq[i] > 0.5) cut = i + 1;
  std::vector<double> sum(c.dim, 0.0);
  for (int64_t j = from; j < from + count; ++j) {
    const T* const x = k.at(b, c.column(b, j), h);
    for (int64_t d = 0; d < c.dim; ++d) {
      const int64_t i = d % half;
      if (d >= 2 * half || i < cut) {
        sum[d] += value(x[d]);
        continue;
      }
      const double angle = static_cast<double>(anchor - j) * inv_freq[i], low = value(x[i]), high = value(x[i + half]);
      sum[d] += d < half ? low * std::cos(angle) - high * std::sin(angle) : high * std::cos(angle) + low * std::sin(angle);
    }
  }
  for (double& x : sum) x /= static_cast<double>(count);
  return sum;
}

template <class T>
void check_summaries(cpu::Isa isa, Random& random, const Call& c) {
  const int64_t n = c.keys / c.config.chunk, m = c.config.groups(), half = c.dim / 2;
  const Rows<T> k(random, c.batch, c.keys, c.kv_heads, c.dim);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t j = 0; j < c.keys; ++j)
      for (int64_t h = 0; h < c.kv_heads; ++h) k.draw(random, b, j, h, false);
  std::vector<double> inv_freq(half);
  for (int64_t i = 0; i < half; ++i) inv_freq[i] = std::pow(random.chance(0.5) ? 1e4 : 100.0, -static_cast<double>(i) / static_cast<double>(half));
  const auto run = [&](int threads, const Rows<T>& chunk_keys, const Rows<T>& group_keys) {
    cpu::SummaryProblem p{};
    p.element = element<T>(), p.batch = c.batch, p.keys = c.keys, p.heads = c.kv_heads, p.dim = c.dim;
    p.chunk = c.config.chunk, p.group = c.config.group, p.k = k.sequence();
    p.columns = c.columns.empty() ? nullptr : c.columns.data();
    p.inv_freq = inv_freq.data(), p.half = half;
    p.chunk_keys = chunk_keys.memory->data(), p.group_keys = group_keys.memory->data();
    p.chunk_batch = chunk_keys.batch, p.chunk_step = chunk_keys.seq, p.chunk_head = chunk_keys.head;
    p.group_batch = group_keys.batch, p.group_chunk = group_keys.seq * m, p.group_step = group_keys.seq, p.group_head = group_keys.head;
    cpu::hga_summaries(p, isa, cpu::Execution{threads});
  };
  const Rows<T> chunk_keys(random, c.batch, n, c.kv_heads, c.dim), group_keys(random, c.batch, n * m, c.kv_heads, c.dim);
  const Rows<T> more_chunks(random, c.batch, n, c.kv_heads, c.dim), more_groups(random, c.batch, n * m, c.kv_heads, c.dim);
  run(1, chunk_keys, group_keys);
  run(threads_of(random), more_chunks, more_groups);
  const auto compare = [&](const Rows<T>& x, const Rows<T>& y, int64_t count, int64_t length) {
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          if (std::memcmp(x.at(b, i, h), y.at(b, i, h), static_cast<size_t>(c.dim) * sizeof(T)) != 0)
            fail("hga_summaries on %s: other bits from more threads", cpu::name(isa));
          const std::vector<double> expected = summary(c, k, inv_freq, b, h, i * length, length);
          for (int64_t d = 0; d < c.dim; ++d) near(value(x.at(b, i, h)[d]), expected[d], tolerance<T>(), 1, isa, "hga_summaries");
        }
  };
  compare(chunk_keys, more_chunks, n, c.config.chunk);
  compare(group_keys, more_groups, n * m, c.config.group);
}

// Ids of the highest scores, equal ones by lowest id, highest first.
std::vector<int64_t> best(const std::map<int64_t, double>& scores, int64_t count) {
  std::vector<int64_t> ids;
  for (const auto& [id, score] : scores) ids.push_back(id);
  std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return scores.at(a) > scores.at(b); });
  ids.resize(std::min<size_t>(ids.size(), static_cast<size_t>(count)));
  return ids;
}

template <class T>
struct Tables {
  Rows<T> q, chunks, groups, supers;
  int64_t n;

  Tables(Random& random, const Call& c)
      : q(random, c.batch, c.queries, c.heads, c.dim),
        chunks(random, c.batch, c.keys / c.config.chunk, c.kv_heads, c.dim),
        groups(random, c.batch, c.keys / c.config.chunk * c.config.groups(), c.kv_heads, c.dim),
        supers(random, c.batch, c.config.supers_of ? c.keys / c.config.chunk / c.config.supers_of : 0, c.kv_heads, c.dim),
        n(c.keys / c.config.chunk) {
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t t = 0; t < c.queries; ++t) q.draw(random, b, t, h, true);
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        for (int64_t i = 0; i < n; ++i) chunks.draw(random, b, i, h, true);
        for (int64_t i = 0; i < n * c.config.groups(); ++i) groups.draw(random, b, i, h, true);
        for (int64_t i = 0; c.config.supers_of && i < n / c.config.supers_of; ++i) supers.draw(random, b, i, h, true);
      }
    }
  }
  static double dot(const T* x, const T* y, int64_t dim) {
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += value(x[d]) * value(y[d]);
    return sum;
  }
};

template <class T>
std::vector<int64_t> expected_route(const Call& c, const Tables<T>& x, int64_t b, int64_t t, int64_t head) {
  const Config& f = c.config;
  const int64_t r = c.group(), g = head / r, m = f.groups(), p = c.index(b, t);
  if (p < 0 || f.topk_chunks == 0) return {};
  const int64_t n = p / f.chunk;
  const auto score = [&](int64_t s, const Rows<T>& of, int64_t i) {
    double high = -INFINITY;
    for (int64_t h = f.share ? g * r : head; h < (f.share ? g * r + r : head + 1); ++h)
      high = std::max(high, Tables<T>::dot(x.q.at(b, s, h), of.at(b, i, g), c.dim));
    return high;
  };
  std::vector<int64_t> pool, seen;
  for (int64_t i = f.begin(p); i < std::min(f.end(p), x.n); ++i) pool.push_back(i);
  // what stands in for a window is there whatever its super-chunk scores
  const bool previous = !pool.empty() && std::find(pool.begin(), pool.end(), n - 1) != pool.end();
  if (f.supers_of) {
    std::map<int64_t, double> above;
    for (int64_t i = 0; i < x.n / f.supers_of; ++i)
      if (i * f.supers_of >= f.begin(p) && (i + 1) * f.supers_of <= f.end(p)) above[i] = score(t, x.supers, i);
    const std::vector<int64_t> kept = best(above, f.topk_supers);
    const auto lost = [&](int64_t i) {
      return above.count(i / f.supers_of) && std::find(kept.begin(), kept.end(), i / f.supers_of) == kept.end();
    };
    pool.erase(std::remove_if(pool.begin(), pool.end(), lost), pool.end());
  }
  if (f.routing == cpu::Routing::kStrict) seen = {t};
  if (f.routing == cpu::Routing::kPrefix)
    for (int64_t s = 0; s <= t; ++s)
      if (c.index(b, s) >= 0 && c.index(b, s) / f.chunk == n) seen.push_back(s);
  if (f.routing == cpu::Routing::kBlock)
    for (int64_t s = 0; s < c.queries; ++s) {
      if (c.index(b, s) < 0) continue;
      if (!seen.empty() && (c.index(b, seen[0]) / f.chunk != c.index(b, s) / f.chunk || static_cast<int64_t>(seen.size()) == f.block)) {
        if (std::find(seen.begin(), seen.end(), t) != seen.end()) break;
        seen.clear();
      }
      seen.push_back(s);
    }
  const auto scores = [&](const std::vector<int64_t>& of, const Rows<T>& table, const std::vector<int64_t>& ids) {
    std::map<int64_t, double> found;
    for (int64_t i : ids) {
      double high = -INFINITY;
      for (int64_t s : of) high = std::max(high, score(s, table, i));
      found[i] = high;
    }
    return found;
  };
  std::vector<int64_t> picks = best(scores(seen, x.chunks, pool), f.topk_chunks);
  if (f.last == 0 && !picks.empty() && previous && std::find(picks.begin(), picks.end(), n - 1) == picks.end()) picks.back() = n - 1;
  std::vector<int64_t> inside;
  for (int64_t i : picks)
    for (int64_t j = 0; j < m; ++j) inside.push_back(i * m + j);
  std::vector<int64_t> opened = best(scores(seen, x.groups, inside), f.topk_groups);
  if (f.routing == cpu::Routing::kBlock) {
    std::set<int64_t> visible, requested;
    for (int64_t s : seen) {
      if (s > t) break;
      for (int64_t i : best(scores({s}, x.chunks, pool), f.topk_chunks)) visible.insert(i);
      for (int64_t i : best(scores({s}, x.groups, inside), f.topk_groups / 2)) requested.insert(i);
    }
    if (f.last == 0 && previous) visible.insert(n - 1);
    opened.erase(std::remove_if(opened.begin(), opened.end(), [&](int64_t i) { return !requested.count(i) || !visible.count(i / m); }), opened.end());
  }
  std::sort(opened.begin(), opened.end());
  return opened;
}

template <class T>
void check_route(cpu::Isa isa, Random& random, const Call& c) {
  const Tables<T> x(random, c);
  cpu::RouteProblem p{};
  const Config& f = c.config;
  const int64_t m = f.groups();
  p.element = element<T>(), p.batch = c.batch, p.queries = c.queries, p.heads = c.heads, p.kv_heads = c.kv_heads, p.dim = c.dim;
  p.chunks = x.n, p.groups = m, p.q = x.q.sequence();
  p.chunk_keys = x.chunks.memory->data(), p.group_keys = x.groups.memory->data();
  p.chunk_batch = x.chunks.batch, p.chunk_step = x.chunks.seq, p.chunk_head = x.chunks.head;
  p.group_batch = x.groups.batch, p.group_chunk = x.groups.seq * m, p.group_step = x.groups.seq, p.group_head = x.groups.head;
  std::vector<int64_t> at;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.queries; ++t) at.push_back(c.index(b, t));
  p.positions = at.data(), p.position_batch = c.queries, p.position_query = 1;
  p.context = random.chance(0.2) ? random.below(c.queries + 1) : 0;
  p.chunk_size = f.chunk, p.keep_first = f.first, p.keep_last = f.last, p.topk_chunks = f.topk_chunks, p.topk_groups = f.topk_groups;
  p.routing = f.routing, p.route_block = f.block, p.share = f.share;
  if (f.supers_of) {
    p.super_keys = x.supers.memory->data(), p.super_chunk = f.supers_of, p.topk_supers = f.topk_supers;
    p.super_batch = x.supers.batch, p.super_step = x.supers.seq, p.super_head = x.supers.head;
  }
  const int64_t count = c.batch * (c.queries - p.context) * c.heads * p.width();
  const Exact found(count * 4), again(count * 4);
  cpu::hga_route(p, static_cast<int32_t*>(found.data()), isa, cpu::Execution{1});
  cpu::hga_route(p, static_cast<int32_t*>(again.data()), isa, cpu::Execution{threads_of(random)});
  if (std::memcmp(found.data(), again.data(), static_cast<size_t>(count) * 4) != 0)
    fail("hga_route on %s: other ids from more threads", cpu::name(isa));
  const int32_t* ids = static_cast<const int32_t*>(found.data());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = p.context; t < c.queries; ++t)
      for (int64_t h = 0; h < c.heads; ++h, ids += p.width()) {
        // the oracle is slow: of large calls some rows
        if ((t * c.heads + h) % (1 + c.queries * c.heads / 60)) continue;
        std::vector<int64_t> expected = expected_route(c, x, b, t, h);
        expected.resize(p.width(), -1);
        if (!std::equal(expected.begin(), expected.end(), ids))
          fail("hga_route on %s, %d-byte elements: other groups than expected (routing %d, query %d of %d, head %d)", cpu::name(isa),
               static_cast<int>(sizeof(T)), static_cast<int>(f.routing), static_cast<int>(t), static_cast<int>(c.queries), static_cast<int>(h));
      }
}

struct Seen {
  std::vector<int64_t> tokens;
  std::vector<double> weights;
  double lse = -INFINITY;
};

// Histories of which a query sees sinks, window, own chunk and the groups given, in one tensor or in pages.
template <class T>
struct Attended {
  const Call& c;
  Rows<T> q, k, v;
  std::vector<int32_t> routes;
  int64_t width;
  double scale = 0.3;
  std::vector<char> held;  // [batch][kv_heads][chunks]: chunks that are there; empty = all

  Attended(Random& random, const Call& call)
      : c(call),
        q(random, call.batch, call.queries, call.heads, call.dim),
        k(random, call.batch, call.keys, call.kv_heads, call.dim),
        v(random, call.batch, call.keys, call.kv_heads, call.dim),
        width(random.below(8)) {
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t t = 0; t < c.queries; ++t)
        for (int64_t h = 0; h < c.heads; ++h) {
          q.draw(random, b, t, h, false);
          std::set<int64_t> opened;
          const int64_t p = c.index(b, t), m = c.config.groups();
          if (p >= 0 && c.config.end(p) > c.config.begin(p))
            for (int64_t i = 0; i < width; ++i) opened.insert(random.within(c.config.begin(p) * m, c.config.end(p) * m - 1));
          for (int64_t x : opened) routes.push_back(static_cast<int32_t>(x));
          routes.insert(routes.end(), static_cast<size_t>(width) - opened.size(), -1);
        }
      for (int64_t j = 0; j < c.keys; ++j)
        for (int64_t h = 0; h < c.kv_heads; ++h) k.draw(random, b, j, h, false), v.draw(random, b, j, h, false);
    }
  }

  bool opens(int64_t b, int64_t t, int64_t h, int64_t group) const {
    const int32_t* const from = routes.data() + ((b * c.queries + t) * c.heads + h) * width;
    return std::find(from, from + width, static_cast<int32_t>(group)) != from + width;
  }
  bool sees(int64_t b, int64_t t, int64_t h, int64_t j) const {
    const int64_t p = c.index(b, t), chunk = j / c.config.chunk, all = (c.keys + c.config.chunk - 1) / c.config.chunk;
    if (!held.empty() && !held[(b * c.kv_heads + h / c.group()) * all + chunk]) return false;
    return p >= 0 && j <= p && (chunk < c.config.begin(p) || chunk >= c.config.end(p) || opens(b, t, h, j / c.config.group));
  }
  Seen seen(int64_t b, int64_t t, int64_t h) const {
    Seen found;
    double highest = -INFINITY, total = 0;
    for (int64_t j = 0; j < c.keys; ++j)
      if (sees(b, t, h, j)) {
        found.tokens.push_back(j);
        found.weights.push_back(scale * Tables<T>::dot(q.at(b, t, h), k.at(b, c.column(b, j), h / c.group()), c.dim));
        highest = std::max(highest, found.weights.back());
      }
    for (double x : found.weights) total += std::exp(x - highest);
    if (!found.tokens.empty()) found.lse = highest + std::log(total);
    for (double& x : found.weights) x = std::exp(x - found.lse);
    return found;
  }
  cpu::RoutedProblem problem() const {
    cpu::RoutedProblem p{};
    p.element = element<T>(), p.batch = c.batch, p.queries = c.queries, p.keys = c.keys, p.heads = c.heads, p.kv_heads = c.kv_heads;
    p.dim = c.dim, p.q = q.sequence(), p.k = k.sequence(), p.v = v.sequence();
    p.columns = c.columns.empty() ? nullptr : c.columns.data();
    p.positions = c.positions.empty() ? nullptr : c.positions.data();
    p.routes = routes.data(), p.width = width, p.group_size = c.config.group, p.chunk_size = c.config.chunk;
    p.keep_first = c.config.first, p.keep_last = c.config.last, p.scale = static_cast<float>(scale);
    return p;
  }
};

template <class T>
struct Result {
  Exact out, lse;
  Result(const Call& c)
      : out(c.batch * c.queries * c.heads * c.dim * static_cast<int64_t>(sizeof(T))), lse(c.batch * c.queries * c.heads * 4) {}
  const T* row(const Call& c, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(out.data()) + ((b * c.queries + t) * c.heads + h) * c.dim;
  }
  float level(const Call& c, int64_t b, int64_t t, int64_t h) const {
    return static_cast<const float*>(lse.data())[(b * c.heads + h) * c.queries + t];
  }
};

template <class T>
void compare(cpu::Isa isa, const Attended<T>& x, const Result<T>& found, const Result<T>& again, const char* what) {
  const Call& c = x.c;
  const size_t rows = static_cast<size_t>(c.batch * c.queries * c.heads);
  if (std::memcmp(found.out.data(), again.out.data(), rows * c.dim * sizeof(T)) != 0 || std::memcmp(found.lse.data(), again.lse.data(), rows * 4) != 0)
    fail("%s on %s: other bits from more threads", what, cpu::name(isa));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.queries; ++t)
      for (int64_t h = 0; h < c.heads; ++h) {
        const Seen seen = x.seen(b, t, h);
        const double lse = found.level(c, b, t, h);
        if (seen.tokens.empty() ? lse != -INFINITY : !(std::fabs(lse - seen.lse) <= 1e-4 * std::max(1.0, std::fabs(seen.lse))))
          fail("%s on %s: lse %g, expected %g", what, cpu::name(isa), lse, seen.lse);
        for (int64_t d = 0; d < c.dim; ++d) {
          double sum = 0;
          for (size_t i = 0; i < seen.tokens.size(); ++i)
            sum += seen.weights[i] * value(x.v.at(b, c.column(b, seen.tokens[i]), h / c.group())[d]);
          near(value(found.row(c, b, t, h)[d]), sum, tolerance<T>(), 1, isa, what);
        }
      }
}

template <class T>
void check_backward(cpu::Isa isa, Random& random, const Attended<T>& x, const Result<T>& result) {
  const Call& c = x.c;
  const int64_t r = c.group();
  const Rows<T> grad(random, c.batch, c.queries, c.heads, c.dim);
  std::vector<float> grad_lse(static_cast<size_t>(c.batch * c.heads * c.queries));
  for (float& g : grad_lse) g = static_cast<float>(random.normal());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.queries; ++t)
      for (int64_t h = 0; h < c.heads; ++h) grad.draw(random, b, t, h, false);
  const int64_t sizes[] = {c.batch * c.queries * c.heads * c.dim, c.batch * c.keys * c.kv_heads * c.dim, c.batch * c.keys * c.kv_heads * c.dim};
  std::vector<std::unique_ptr<Exact>> memory;
  const auto run = [&](int threads) {
    void* to[3];
    for (int i = 0; i < 3; ++i) {
      memory.push_back(std::make_unique<Exact>(sizes[i] * static_cast<int64_t>(sizeof(T))));
      to[i] = memory.back()->data();
    }
    cpu::hga_attention_backward(x.problem(), grad.sequence(), grad_lse.data(), result.out.data(), static_cast<const float*>(result.lse.data()),
                                {to[0], to[1], to[2]}, isa, cpu::Execution{threads});
  };
  run(1);
  run(threads_of(random));
  std::vector<double> expected[3];
  for (int i = 0; i < 3; ++i) {
    if (std::memcmp(memory[i]->data(), memory[i + 3]->data(), static_cast<size_t>(sizes[i]) * sizeof(T)) != 0)
      fail("hga_attention backward on %s: other bits from more threads", cpu::name(isa));
    expected[i].assign(static_cast<size_t>(sizes[i]), 0.0);
  }
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.queries; ++t)
      for (int64_t h = 0; h < c.heads; ++h) {
        const Seen seen = x.seen(b, t, h);
        const int64_t g = h / r, own = ((b * c.queries + t) * c.heads + h) * c.dim;
        std::vector<double> dp(seen.tokens.size());
        double delta = 0;
        for (size_t i = 0; i < dp.size(); ++i) {
          dp[i] = Tables<T>::dot(grad.at(b, t, h), x.v.at(b, c.column(b, seen.tokens[i]), g), c.dim);
          delta += seen.weights[i] * dp[i];
        }
        delta -= grad_lse[(b * c.heads + h) * c.queries + t];
        for (size_t i = 0; i < dp.size(); ++i) {
          const int64_t column = c.column(b, seen.tokens[i]), other = ((b * c.keys + column) * c.kv_heads + g) * c.dim;
          const double ds = x.scale * seen.weights[i] * (dp[i] - delta);
          for (int64_t d = 0; d < c.dim; ++d) {
            expected[0][own + d] += ds * value(x.k.at(b, column, g)[d]);
            expected[1][other + d] += ds * value(x.q.at(b, t, h)[d]);
            expected[2][other + d] += seen.weights[i] * value(grad.at(b, t, h)[d]);
          }
        }
      }
  for (int i = 0; i < 3; ++i) {
    double size = 1;
    for (double y : expected[i]) size = std::max(size, std::fabs(y));
    for (int64_t j = 0; j < sizes[i]; ++j)
      near(value(static_cast<const T*>(memory[i]->data())[j]), expected[i][j], tolerance<T>(), size, isa, "hga_attention backward");
  }
}

// The same history in pages, tokens k_token apart, some of them left out.
template <class T>
void check_pages(cpu::Isa isa, Random& random, Attended<T>& x) {
  const Call& c = x.c;
  const int64_t n = (c.keys + c.config.chunk - 1) / c.config.chunk;
  const int64_t k_token = c.dim + random.below(4), v_token = c.dim + random.below(4);
  const double there = random.chance(0.5) ? 1 : 0.7;
  std::vector<std::unique_ptr<Exact>> memory;
  std::vector<int64_t> k_pages, v_pages, chunks, offsets{0}, positions;
  const auto page = [&](const Rows<T>& from, int64_t b, int64_t g, int64_t first, int64_t step) {
    const int64_t count = std::min(c.config.chunk, c.keys - first);
    memory.push_back(std::make_unique<Exact>(((count - 1) * step + c.dim) * static_cast<int64_t>(sizeof(T))));
    T* const to = static_cast<T*>(memory.back()->data());
    for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * step, from.at(b, c.column(b, first + j), g), static_cast<size_t>(c.dim) * sizeof(T));
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(to));
  };
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t g = 0; g < c.kv_heads; ++g) {
      for (int64_t chunk = 0; chunk < n; ++chunk) {
        x.held.push_back(random.chance(there));
        if (!x.held.back()) continue;
        k_pages.push_back(page(x.k, b, g, chunk * c.config.chunk, k_token));
        v_pages.push_back(page(x.v, b, g, chunk * c.config.chunk, v_token));
        chunks.push_back(chunk);
      }
      offsets.push_back(static_cast<int64_t>(k_pages.size()));
    }
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.queries; ++t) positions.push_back(c.index(b, t));
  const cpu::RoutedProblem whole = x.problem();
  cpu::PageProblem p{};
  p.element = element<T>(), p.batch = c.batch, p.queries = c.queries, p.heads = c.heads, p.kv_heads = c.kv_heads, p.dim = c.dim;
  p.q = x.q.sequence(), p.page_count = static_cast<int64_t>(k_pages.size());
  p.k_token = k_token, p.v_token = v_token, p.k_pages = k_pages.data(), p.v_pages = v_pages.data();
  p.chunks = chunks.data(), p.offsets = offsets.data(), p.positions = positions.data();
  p.routes = whole.routes, p.width = whole.width, p.group_size = whole.group_size, p.chunk_size = whole.chunk_size;
  p.keep_first = whole.keep_first, p.keep_last = whole.keep_last, p.scale = whole.scale;
  const Result<T> found(c), again(c);
  cpu::hga_pages_forward(p, found.out.data(), static_cast<float*>(found.lse.data()), isa, cpu::Execution{1});
  cpu::hga_pages_forward(p, again.out.data(), static_cast<float*>(again.lse.data()), isa, cpu::Execution{threads_of(random)});
  compare(isa, x, found, again, "pages");
  const Result<float> broad(c);
  p.wide = true;
  cpu::hga_pages_forward(p, broad.out.data(), static_cast<float*>(broad.lse.data()), isa, cpu::Execution{1});
  if (std::memcmp(found.lse.data(), broad.lse.data(), static_cast<size_t>(c.batch * c.queries * c.heads) * 4) != 0)
    fail("pages on %s: another lse beside results in float32", cpu::name(isa));
  for (int64_t i = 0; i < c.batch * c.queries * c.heads * c.dim; ++i) {
    const double exact = static_cast<const float*>(broad.out.data())[i], rounded = value(static_cast<const T*>(found.out.data())[i]);
    if (!(std::fabs(exact - rounded) <= std::ldexp(std::fabs(exact), sizeof(T) == 4 ? -99 : -8) + 1e-7))
      fail("pages on %s: %g is not %g rounded", cpu::name(isa), rounded, exact);
  }
}

template <class T>
void check_case(cpu::Isa isa, Random& random, int number) {
  const Call c = random_call(random, number);
  check_summaries<T>(isa, random, c);
  check_route<T>(isa, random, c);
  Attended<T> x(random, c);
  const Result<T> found(c), again(c);
  cpu::hga_attention_forward(x.problem(), found.out.data(), static_cast<float*>(found.lse.data()), isa, cpu::Execution{1});
  cpu::hga_attention_forward(x.problem(), again.out.data(), static_cast<float*>(again.lse.data()), isa, cpu::Execution{threads_of(random)});
  compare(isa, x, found, again, "hga_attention");
  check_backward(isa, random, x, found);
  check_pages(isa, random, x);  // leaves chunks out of it
}

}  // namespace

void check_hga(cpu::Isa isa, uint64_t seed, int cases) {
  Random random(seed + 23);
  for (int i = 0; i < cases; ++i) {
    check_case<float>(isa, random, i);
    check_case<bfloat16>(isa, random, i + 1);
    check_case<float16>(isa, random, i + 2);
  }
}

}  // namespace hici::driver
