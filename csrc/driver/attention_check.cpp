// attention.h against plain loops in double: ragged segments, recurrence, slots, masks, packed documents, any strides,
// every input and output in memory of exactly its extent, and the same bits from any number of threads.

#include "../cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>

#include "checks.h"

namespace hici::driver {
namespace {

using cpu::AttentionCut;
using cpu::AttentionGradients;
using cpu::AttentionProblem;

// A tensor [batch, (segments,) rows, heads, dim] whose dim is contiguous and whose other strides are any.
template <class T>
class Tensor {
 public:
  Tensor(Random& random, std::vector<int64_t> shape, bool plain) : shape_(std::move(shape)) {
    const int last = static_cast<int>(shape_.size()) - 1;
    std::vector<int> order(last);
    std::iota(order.begin(), order.end(), 0);
    if (!plain)
      for (int i = last - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    strides_.assign(shape_.size(), 1);
    int64_t extent = 1, step = shape_[last] + (plain ? 0 : random.below(3));
    for (int i = last - 1; i >= 0; --i) {
      strides_[order[i]] = step;
      step = step * shape_[order[i]] + (plain ? 0 : random.below(5));
    }
    // one set of keys for all heads or rows: a stride of 0
    if (!plain && random.chance(0.1)) strides_[random.below(last)] = 0;
    bool empty = false;
    for (size_t i = 0; i < shape_.size(); ++i) {
      empty |= shape_[i] == 0;
      extent += (shape_[i] - 1) * strides_[i];
    }
    memory_ = std::make_unique<Exact>(empty ? 0 : extent * static_cast<int64_t>(sizeof(T)));
  }
  T* row(int64_t a, int64_t b, int64_t c) const { return data() + a * strides_[0] + b * strides_[1] + c * strides_[2]; }
  T* row(int64_t a, int64_t b, int64_t c, int64_t d) const { return row(a, b, c) + d * strides_[3]; }
  T* data() const { return static_cast<T*>(memory_->data()); }
  int64_t shape(int i) const { return shape_[i]; }
  int64_t stride(int i) const { return strides_[i]; }

 private:
  std::vector<int64_t> shape_, strides_;
  std::unique_ptr<Exact> memory_;
};

template <class T>
void fill_row(Random& random, T* row, int64_t dim, double size) {
  for (int64_t d = 0; d < dim; ++d) put(row + d, size * random.normal());
}

struct Shape {
  int64_t batch, queries, keys, heads, kv_heads, dim, segment_len, recurrence, global, local;
  bool causal, packed, global_per_segment, masked, prefix;
};

Shape random_shape(Random& random, int64_t number) {
  Shape s{};
  s.packed = random.chance(0.3);
  s.batch = s.packed ? 1 : random.within(1, 2);
  // every fifth is large enough for several threads and several blocks of keys and queries
  s.keys = number % 5 == 0 ? random.within(260, 420) : random.within(1, random.chance(0.5) ? 24 : 150);
  s.queries = s.packed || random.chance(0.6) ? s.keys : random.within(0, s.keys);
  s.kv_heads = random.within(1, 2), s.heads = s.kv_heads * (int64_t{1} << random.below(3));
  const int64_t dims[] = {1, 3, 8, 16, 24, 32, 40, 64, 65, 80};
  s.dim = dims[random.below(10)];
  if (number % 20 == 7) s.dim = random.chance(0.5) ? 256 : 192, s.keys = std::min<int64_t>(s.keys, 60);
  // every fifth decodes: few queries over keys that are split among items
  if (number % 5 == 3 && !s.packed) s.keys = random.within(200, 900), s.queries = random.within(1, 6);
  s.queries = std::min(s.queries, s.keys);
  const int64_t lengths[] = {0, 1, 5, 16, 33, 64, 100, 300};
  s.segment_len = lengths[random.below(8)];
  if (number % 5 == 3 && random.chance(0.7)) s.segment_len = 0;
  if (s.segment_len > 0 && s.keys > 40 * s.segment_len) s.segment_len = 33;
  s.recurrence = s.segment_len > 0 && random.chance(0.6) ? random.within(1, s.segment_len) : 0;
  s.global = random.chance(0.6) ? random.within(0, 5) : 0;
  s.global_per_segment = random.chance(0.5);
  s.local = random.chance(0.6) ? random.within(0, 18) : 0;
  s.causal = random.chance(0.7), s.masked = random.chance(0.5), s.prefix = random.chance(0.5);
  return s;
}

// Columns [begin, end) of one segment of a document that starts at column `document`.
struct Span {
  int64_t begin, end, document;
};

std::vector<Span> spans_of(const Shape& s, const std::vector<int32_t>& documents) {
  std::vector<Span> found;
  for (size_t d = 0; d + 1 < documents.size(); ++d) {
    const int64_t begin = documents[d], end = documents[d + 1];
    const int64_t step = s.segment_len > 0 ? s.segment_len : std::max<int64_t>(end - begin, 1);
    for (int64_t at = begin; at < end; at += step) found.push_back({at, std::min(at + step, end), begin});
  }
  return found;
}

template <class T>
class Call {
 public:
  Call(Random& random, const Shape& shape);
  void check(cpu::Isa isa, Random& random);

 private:
  struct Sums {  // gradients in double, contiguous
    std::vector<double> q, k, v, global_k, global_v, local_k, local_v;
  };
  // what the kernels write
  struct Written {
    std::unique_ptr<Exact> out, lse, q, k, v, global_k, global_v, local_k, local_v;
  };
  void poison();
  void expect(std::vector<double>& out, std::vector<double>& lse, Sums& sums);
  Written run(cpu::Isa isa, cpu::Execution execution) const;
  bool token(int64_t b, int64_t column) const {
    return !shape_.masked || mask_[static_cast<size_t>(b * mask_row_ + column * 2)];
  }
  bool slots_seen(int64_t b, int64_t segment) const {
    return !shape_.prefix || prefix_[static_cast<size_t>(prefix_row_ * b + segment)];
  }
  int64_t first() const { return shape_.keys - shape_.queries; }
  int64_t rows_q() const { return shape_.batch * shape_.queries * shape_.heads; }
  int64_t rows_k() const { return shape_.batch * shape_.keys * shape_.kv_heads; }
  int64_t rows_global() const {
    return shape_.batch * (shape_.global_per_segment ? segments_ : 1) * shape_.global * shape_.kv_heads;
  }
  int64_t rows_local() const { return shape_.batch * segments_ * shape_.local * shape_.kv_heads; }

  Shape shape_;
  std::vector<int32_t> documents_;
  std::vector<Span> spans_;
  int64_t segments_;
  double scale_;
  std::unique_ptr<Tensor<T>> q_, k_, v_, global_k_, global_v_, local_k_, local_v_, grad_;
  std::vector<unsigned char> mask_, prefix_;
  int64_t mask_row_ = 0, prefix_row_ = 0;
  std::unique_ptr<Exact> grad_lse_;
  AttentionProblem problem_{};
  AttentionCut cut_{};
};

template <class T>
Call<T>::Call(Random& random, const Shape& shape) : shape_(shape) {
  const Shape& s = shape_;
  documents_ = {0, static_cast<int32_t>(s.keys)};
  if (s.packed) {
    for (int64_t i = random.below(4); i > 0; --i) documents_.push_back(static_cast<int32_t>(random.within(0, s.keys)));
    std::sort(documents_.begin(), documents_.end());
  }
  spans_ = spans_of(s, documents_);
  segments_ = static_cast<int64_t>(spans_.size());
  const double scales[] = {1.0, 0.3, -0.2, 0.0};
  scale_ = random.chance(0.7) ? 1 / std::sqrt(static_cast<double>(s.dim)) : scales[random.below(4)];

  const bool plain = random.chance(0.3);
  const auto make = [&](std::vector<int64_t> dims, bool may_share = true) {
    auto x = std::make_unique<Tensor<T>>(random, dims, plain || !may_share);
    return x;
  };
  q_ = make({s.batch, s.queries, s.heads, s.dim}), grad_ = make({s.batch, s.queries, s.heads, s.dim});
  k_ = make({s.batch, s.keys, s.kv_heads, s.dim}), v_ = make({s.batch, s.keys, s.kv_heads, s.dim});
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t t = 0; t < s.queries; ++t)
      for (int64_t h = 0; h < s.heads; ++h) {
        fill_row(random, q_->row(b, t, h), s.dim, 1.0);
        fill_row(random, grad_->row(b, t, h), s.dim, 1.0);
      }
    for (int64_t t = 0; t < s.keys; ++t)
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        fill_row(random, k_->row(b, t, h), s.dim, 1.0);
        fill_row(random, v_->row(b, t, h), s.dim, 1.0);
      }
  }
  const auto slots = [&](int64_t count, bool each) {
    auto x = make({s.batch, each ? segments_ : 1, count, s.kv_heads, s.dim});
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t i = 0; i < x->shape(1); ++i)
        for (int64_t j = 0; j < count; ++j)
          for (int64_t h = 0; h < s.kv_heads; ++h) fill_row(random, x->row(b, i, j, h), s.dim, 1.0);
    return x;
  };
  global_k_ = slots(s.global, s.global_per_segment), global_v_ = slots(s.global, s.global_per_segment);
  local_k_ = slots(s.local, true), local_v_ = slots(s.local, true);
  grad_lse_ = std::make_unique<Exact>(s.batch * s.heads * s.queries * 4);
  for (int64_t i = 0; i < s.batch * s.heads * s.queries; ++i)
    put(static_cast<float*>(grad_lse_->data()) + i, random.normal());

  if (s.masked) {
    // every second byte counts
    mask_row_ = 2 * s.keys + 1;
    mask_.assign(static_cast<size_t>((s.batch - 1) * mask_row_ + 2 * s.keys), 0);
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t kind = random.below(5), cut = random.within(0, s.keys);
      for (int64_t t = 0; t < s.keys; ++t) {
        const bool seen = kind == 0 ? t >= cut : kind == 1 ? t < cut : kind == 2 ? random.chance(0.6) : kind == 3;
        mask_[static_cast<size_t>(b * mask_row_ + t * 2)] = seen ? 1 : 0;
      }
    }
    cut_.mask = mask_.data(), cut_.mask_batch = mask_row_, cut_.mask_column = 2;
  }
  if (s.prefix) {
    prefix_row_ = random.chance(0.5) ? segments_ : 0;
    prefix_.resize(static_cast<size_t>(prefix_row_ ? s.batch * segments_ : segments_));
    for (unsigned char& x : prefix_) x = random.chance(0.6);
    cut_.prefix_mask = reinterpret_cast<const bool*>(prefix_.data());
    cut_.prefix_batch = prefix_row_, cut_.prefix_segment = 1;
  }
  cut_.segment_len = s.segment_len, cut_.recurrence_len = s.recurrence;
  if (s.packed) cut_.documents = documents_.data(), cut_.document_count = static_cast<int64_t>(documents_.size()) - 1;

  AttentionProblem& p = problem_;
  p.element = sizeof(T) == 4 ? cpu::Element::kFloat32
                             : std::is_same_v<T, bfloat16> ? cpu::Element::kBfloat16 : cpu::Element::kFloat16;
  p.batch = s.batch, p.queries = s.queries, p.keys = s.keys, p.heads = s.heads, p.kv_heads = s.kv_heads, p.dim = s.dim;
  p.segment_total = segments_;
  p.q = {q_->data(), q_->stride(0), q_->stride(1), q_->stride(2)};
  p.k = {k_->data(), k_->stride(0), k_->stride(1), k_->stride(2)};
  p.v = {v_->data(), v_->stride(0), v_->stride(1), v_->stride(2)};
  const auto describe = [](const Tensor<T>& k, const Tensor<T>& v, int64_t count, bool each) {
    cpu::Slots x;
    x.k = k.data(), x.v = v.data(), x.count = count, x.per_segment = each;
    x.k_batch = k.stride(0), x.k_segment = each ? k.stride(1) : 0, x.k_slot = k.stride(2), x.k_head = k.stride(3);
    x.v_batch = v.stride(0), x.v_segment = each ? v.stride(1) : 0, x.v_slot = v.stride(2), x.v_head = v.stride(3);
    return x;
  };
  if (s.global) p.global = describe(*global_k_, *global_v_, s.global, s.global_per_segment);
  if (s.local) p.local = describe(*local_k_, *local_v_, s.local, true);
  p.causal = s.causal, p.scale = scale_;
  scale_ = p.scale;
  poison();
}

// What no query may read is NaN. Rows that share memory with others are left alone.
template <class T>
void Call<T>::poison() {
  const Shape& s = shape_;
  const auto shares = [](const Tensor<T>& x, int axes) {
    for (int i = 0; i < axes; ++i)
      if (x.stride(i) == 0) return true;
    return false;
  };
  const auto ruin = [&](T* row) { std::memset(row, 0xff, static_cast<size_t>(s.dim) * sizeof(T)); };
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.keys; ++t) {
      if (token(b, t)) continue;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        if (!shares(*k_, 3)) ruin(k_->row(b, t, h));
        if (!shares(*v_, 3)) ruin(v_->row(b, t, h));
      }
      for (int64_t h = 0; h < s.heads && t >= first(); ++h)
        if (!shares(*q_, 3)) ruin(q_->row(b, t - first(), h));
    }
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < segments_; ++i) {
      bool queries = false;
      for (int64_t t = std::max(spans_[i].begin, first()); t < spans_[i].end; ++t) queries |= token(b, t);
      if (queries && slots_seen(b, i)) continue;
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        for (int64_t j = 0; j < s.local; ++j) {
          if (!shares(*local_k_, 4)) ruin(local_k_->row(b, i, j, h));
          if (!shares(*local_v_, 4)) ruin(local_v_->row(b, i, j, h));
        }
        for (int64_t j = 0; j < s.global && s.global_per_segment; ++j) {
          if (!shares(*global_k_, 4)) ruin(global_k_->row(b, i, j, h));
          if (!shares(*global_v_, 4)) ruin(global_v_->row(b, i, j, h));
        }
      }
    }
}

template <class T>
void Call<T>::expect(std::vector<double>& out, std::vector<double>& lse, Sums& sums) {
  const Shape& s = shape_;
  const int64_t dim = s.dim, group = s.heads / s.kv_heads;
  out.assign(static_cast<size_t>(rows_q() * dim), 0);
  lse.assign(static_cast<size_t>(rows_q()), -INFINITY);
  sums.q.assign(static_cast<size_t>(rows_q() * dim), 0);
  for (auto* x : {&sums.k, &sums.v}) x->assign(static_cast<size_t>(rows_k() * dim), 0);
  for (auto* x : {&sums.global_k, &sums.global_v}) x->assign(static_cast<size_t>(rows_global() * dim), 0);
  for (auto* x : {&sums.local_k, &sums.local_v}) x->assign(static_cast<size_t>(rows_local() * dim), 0);
  struct Key {
    const T *k, *v;
    double *grad_k, *grad_v;
    int64_t column;  // -1 = slot
  };
  std::vector<double> weight, slope;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < segments_; ++i)
      for (int64_t g = 0; g < s.kv_heads; ++g) {
        std::vector<Key> keys;
        if (slots_seen(b, i)) {
          for (int64_t j = 0; j < s.global; ++j) {
            const int64_t set = s.global_per_segment ? b * segments_ + i : b, at = s.global_per_segment ? i : 0;
            const int64_t row = (set * s.global + j) * s.kv_heads + g;
            keys.push_back({global_k_->row(b, at, j, g), global_v_->row(b, at, j, g), &sums.global_k[row * dim],
                            &sums.global_v[row * dim], -1});
          }
          for (int64_t j = 0; j < s.local; ++j) {
            const int64_t row = ((b * segments_ + i) * s.local + j) * s.kv_heads + g;
            keys.push_back({local_k_->row(b, i, j, g), local_v_->row(b, i, j, g), &sums.local_k[row * dim],
                            &sums.local_v[row * dim], -1});
          }
        }
        const int64_t from = std::max(spans_[i].document, spans_[i].begin - s.recurrence);
        for (int64_t t = from; t < spans_[i].end; ++t) {
          if (!token(b, t)) continue;
          const int64_t row = (b * s.keys + t) * s.kv_heads + g;
          keys.push_back({k_->row(b, t, g), v_->row(b, t, g), &sums.k[row * dim], &sums.v[row * dim], t});
        }
        for (int64_t c = std::max(spans_[i].begin, first()); c < spans_[i].end; ++c) {
          if (!token(b, c)) continue;
          size_t seen = keys.size();
          while (s.causal && seen > 0 && keys[seen - 1].column > c) --seen;
          for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            const int64_t t = c - first(), row = (b * s.queries + t) * s.heads + h;
            const int64_t at = (b * s.heads + h) * s.queries + t;
            const T *const q = q_->row(b, t, h), *const grad = grad_->row(b, t, h);
            double top = -INFINITY, total = 0, delta = 0;
            weight.assign(seen, 0), slope.assign(seen, 0);
            for (size_t j = 0; j < seen; ++j) {
              double sum = 0;
              for (int64_t d = 0; d < dim; ++d) sum += value(q[d]) * value(keys[j].k[d]);
              weight[j] = scale_ * sum;
              top = std::max(top, weight[j]);
            }
            for (double& w : weight) total += w = std::exp(w - top);
            lse[at] = top + std::log(total);
            for (size_t j = 0; j < seen; ++j) {
              weight[j] /= total;
              for (int64_t d = 0; d < dim; ++d) {
                out[row * dim + d] += weight[j] * value(keys[j].v[d]);
                slope[j] += value(grad[d]) * value(keys[j].v[d]);
              }
              delta += weight[j] * slope[j];
            }
            const double arriving = static_cast<const float*>(grad_lse_->data())[at];
            for (size_t j = 0; j < seen; ++j) {
              const double ds = scale_ * weight[j] * (slope[j] - delta + arriving);
              for (int64_t d = 0; d < dim; ++d) {
                sums.q[row * dim + d] += ds * value(keys[j].k[d]);
                keys[j].grad_k[d] += ds * value(q[d]);
                keys[j].grad_v[d] += weight[j] * value(grad[d]);
              }
            }
          }
        }
      }
}

template <class T>
typename Call<T>::Written Call<T>::run(cpu::Isa isa, cpu::Execution execution) const {
  const int64_t size = shape_.dim * static_cast<int64_t>(sizeof(T));
  const auto rows = [&](int64_t n) { return std::make_unique<Exact>(n * size); };
  Written w{rows(rows_q()),      std::make_unique<Exact>(rows_q() * 4), rows(rows_q()),     rows(rows_k()),
            rows(rows_k()),      rows(rows_global()),                   rows(rows_global()), rows(rows_local()),
            rows(rows_local())};
  float* const lse = static_cast<float*>(w.lse->data());
  cpu::attention_forward(problem_, cut_, w.out->data(), lse, isa, execution);
  const AttentionGradients gradients{w.q->data(),
                                     w.k->data(),
                                     w.v->data(),
                                     shape_.global ? w.global_k->data() : nullptr,
                                     shape_.global ? w.global_v->data() : nullptr,
                                     shape_.local ? w.local_k->data() : nullptr,
                                     shape_.local ? w.local_v->data() : nullptr};
  const cpu::Sequence4 grad{grad_->data(), grad_->stride(0), grad_->stride(1), grad_->stride(2)};
  cpu::attention_backward(problem_, cut_, grad, static_cast<const float*>(grad_lse_->data()), w.out->data(), lse, gradients,
                          isa, execution);
  return w;
}

template <class T>
void Call<T>::check(cpu::Isa isa, Random& random) {
  const Shape& s = shape_;
  std::vector<double> out, lse;
  Sums sums;
  expect(out, lse, sums);
  const bool direct = random.chance(0.3);
  const Written found = run(isa, {1, direct}), again = run(isa, {static_cast<int>(random.within(2, 4)), direct});
  const auto describe = [&](const char* what, int64_t at, double x, double y) {
    fail("attention on %s, %d-byte elements: %s at %lld is %g, expected %g: batch %lld, %lld queries of %lld keys, "
         "%lld heads on %lld, dim %lld, segments of %lld, recurrence %lld, slots %lld (%s) + %lld, causal %d, packed %d, "
         "mask %d, prefix %d, scale %g",
         cpu::name(isa), (int)sizeof(T), what, (long long)at, x, y, (long long)s.batch, (long long)s.queries,
         (long long)s.keys, (long long)s.heads, (long long)s.kv_heads, (long long)s.dim, (long long)s.segment_len,
         (long long)s.recurrence, (long long)s.global, s.global_per_segment ? "each" : "shared", (long long)s.local,
         (int)s.causal, (int)s.packed, (int)s.masked, (int)s.prefix, scale_);
  };
  // an error in an address shows as an error of order 1; how precise the sums are is another test's business
  const double tolerance = std::is_same_v<T, float> ? 2e-5 : std::is_same_v<T, bfloat16> ? 4e-2 : 5e-3;
  const auto compare = [&](const char* what, const std::vector<double>& expected, const Exact& x, const Exact& y,
                           auto zero, double allowed) {
    using E = decltype(zero);
    const E *const a = static_cast<const E*>(x.data()), *const b = static_cast<const E*>(y.data());
    double largest = 1e-3;
    for (const double e : expected)
      if (std::isfinite(e)) largest = std::max(largest, std::fabs(e));
    for (size_t i = 0; i < expected.size(); ++i) {
      if (std::memcmp(a + i, b + i, sizeof(E)) != 0) {
        describe((std::string("other bits from more threads: ") + what).c_str(), (int64_t)i, value(b[i]), value(a[i]));
      }
      const bool same = std::isfinite(expected[i]) ? std::fabs(value(a[i]) - expected[i]) <= allowed * largest
                                                   : value(a[i]) == expected[i];
      if (!same) describe(what, (int64_t)i, value(a[i]), expected[i]);
    }
  };
  compare("out", out, *found.out, *again.out, T{}, tolerance);
  compare("lse", lse, *found.lse, *again.lse, float{}, 1e-5);
  compare("gradient of q", sums.q, *found.q, *again.q, T{}, tolerance);
  compare("gradient of k", sums.k, *found.k, *again.k, T{}, tolerance);
  compare("gradient of v", sums.v, *found.v, *again.v, T{}, tolerance);
  compare("gradient of global_k", sums.global_k, *found.global_k, *again.global_k, T{}, tolerance);
  compare("gradient of global_v", sums.global_v, *found.global_v, *again.global_v, T{}, tolerance);
  compare("gradient of local_k", sums.local_k, *found.local_k, *again.local_k, T{}, tolerance);
  compare("gradient of local_v", sums.local_v, *found.local_v, *again.local_v, T{}, tolerance);
}

template <class T>
void check_case(cpu::Isa isa, Random& random, int64_t number) {
  Call<T> call(random, random_shape(random, number));
  call.check(isa, random);
}

// Keys of one segment split over items, whose partial sums are merged.
template <class T>
void check_split(cpu::Isa isa, Random& random) {
  Shape s{};
  s.batch = 1, s.keys = random.within(4200, 4600), s.kv_heads = 1, s.heads = 2, s.dim = 24;
  s.queries = random.chance(0.5) ? random.within(1, 3) : random.within(9, 12);  // few rows, and more
  s.local = 3, s.causal = random.chance(0.5), s.masked = random.chance(0.5);
  Call<T> call(random, s);
  call.check(isa, random);
}

}  // namespace

void check_attention(cpu::Isa isa, uint64_t seed, int cases) {
  Random random(seed + 7);
  for (int i = 0; i < cases; ++i) {
    check_case<float>(isa, random, i);
    check_case<bfloat16>(isa, random, i);
    check_case<float16>(isa, random, i);
  }
  for (int i = 0; i < 2; ++i) {
    check_split<float>(isa, random);
    check_split<bfloat16>(isa, random);
  }
}

}  // namespace hici::driver
