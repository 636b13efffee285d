// local_slots.h against plain loops in double: both forms and the direct one, any strides, masks, packed documents, memory
// of masked tokens that is NaN, exact memory, and the same bits from any number of threads.

#include "../cpu/local_slots.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "checks.h"

namespace hici::driver {
namespace {

template <class T>
cpu::Element element();
template <>
cpu::Element element<float>() {
  return cpu::Element::kFloat32;
}
template <>
cpu::Element element<bfloat16>() {
  return cpu::Element::kBfloat16;
}
template <>
cpu::Element element<float16>() {
  return cpu::Element::kFloat16;
}

template <class T>
class Case {
 public:
  Case(cpu::Isa isa, Random& random) : isa_(isa), random_(random) {
    const bool large = random.chance(0.15), packed = random.chance(0.3);
    p_.element = element<T>();
    p_.batch = packed ? 1 : random.within(1, 2);
    p_.length = large ? random.within(500, 1300) : random.within(1, 70);
    p_.channels = large ? random.within(1, 90) : random.within(1, random.chance(0.1) ? 600 : 70);
    p_.heads = random.within(1, 4);
    dim_ = random.within(1, 20), p_.width = p_.heads * dim_;
    p_.slots = random.within(1, random.chance(0.3) ? 24 : 6);
    p_.uniform = random.chance(0.5);
    cut_.segment_len = random.chance(0.3) ? 0 : random.within(1, random.chance(0.5) ? 20 : 700);
    documents_ = {0};
    if (packed)
      for (int64_t i = random.below(3); i > 0; --i)
        documents_.push_back(static_cast<int32_t>(random.within(documents_.back(), p_.length)));
    documents_.push_back(static_cast<int32_t>(p_.length));
    if (packed) cut_.documents = documents_.data(), cut_.document_count = static_cast<int64_t>(documents_.size()) - 1;
    mask_.assign(static_cast<size_t>(p_.batch * p_.length), 1);
    if (random.chance(0.6)) {
      for (auto& m : mask_) m = random.chance(0.7) ? static_cast<unsigned char>(random.within(1, 255)) : 0;
      if (random.chance(0.5)) std::fill_n(mask_.begin(), (p_.length + 1) / 2, 0);
      cut_.mask = mask_.data(), cut_.mask_batch = p_.length, cut_.mask_column = 1;
    }
    for (size_t d = 0; d + 1 < documents_.size(); ++d) {
      const int64_t begin = documents_[d], end = documents_[d + 1];
      const int64_t step = cut_.segment_len > 0 ? cut_.segment_len : std::max<int64_t>(end - begin, 1);
      for (int64_t at = begin; at < end; at += step) spans_.push_back({at, std::min(end, at + step)});
    }
    p_.segment_total = static_cast<int64_t>(spans_.size());

    p_.hidden_token = p_.channels + random.below(5);
    p_.hidden_batch = p_.hidden_token * p_.length + random.below(9);
    p_.queries_row = p_.width + random.below(5), p_.k_row = p_.channels + random.below(5),
    p_.v_row = p_.channels + random.below(5);
    hidden_ = take((p_.batch - 1) * p_.hidden_batch + (p_.length - 1) * p_.hidden_token + p_.channels);
    p_.hidden = hidden_;
    for (int64_t b = 0; b < p_.batch; ++b)
      for (const auto& s : spans_) {
        const bool empty = none(b, s);
        for (int64_t t = s.begin; t < s.end; ++t)
          if (mask_[b * p_.length + t] || (empty && p_.uniform))
            for (int64_t c = 0; c < p_.channels; ++c) put(hidden_ + b * p_.hidden_batch + t * p_.hidden_token + c, random.normal());
      }
    const double size = 1 / std::sqrt(static_cast<double>(p_.channels));
    p_.queries = queries_ = matrix(p_.slots, p_.width, p_.queries_row, 1);
    p_.k_weight = k_weight_ = matrix(p_.width, p_.channels, p_.k_row, size);
    p_.v_weight = v_weight_ = matrix(p_.width, p_.channels, p_.v_row, size);
    grad_ = matrix(p_.batch * p_.segment_total * p_.slots, p_.width, p_.width, 1);
  }

  void check() {
    expect();
    const bool direct = random_.chance(0.4);
    const Written a = run({1, direct}), b = run({static_cast<int>(random_.within(2, 4)), direct});
    const std::vector<double>* const expected[] = {&out_, &d_hidden_, &d_queries_, &d_k_, &d_v_};
    const char* const names[] = {"slots", "gradient of hidden", "gradient of slot_queries", "gradient of k_weight",
                                 "gradient of v_weight"};
    const double tolerance = std::is_same_v<T, float> ? 5e-5 : std::is_same_v<T, bfloat16> ? 5e-2 : 8e-3;
    for (int i = 0; i < 5; ++i) {
      const std::vector<double>& e = *expected[i];
      if (std::memcmp(a.data[i], b.data[i], e.size() * sizeof(T)) != 0) describe("other bits from more threads:", names[i], direct);
      double largest = 1e-3;
      for (const double x : e) largest = std::max(largest, std::fabs(x));
      for (size_t j = 0; j < e.size(); ++j)
        if (!(std::fabs(value(a.data[i][j]) - e[j]) <= tolerance * largest)) describe("wrong:", names[i], direct);
    }
  }

 private:
  struct Span {
    int64_t begin, end;
  };
  struct Written {
    T* data[5];
  };

  T* take(int64_t count) {
    memory_.push_back(std::make_unique<Exact>(count * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(memory_.back()->data());
  }
  T* matrix(int64_t rows, int64_t columns, int64_t row, double size) {
    T* const to = take(rows > 0 ? (rows - 1) * row + columns : 0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) put(to + i * row + j, size * random_.normal());
    return to;
  }
  bool none(int64_t b, const Span& s) const {
    for (int64_t t = s.begin; t < s.end; ++t)
      if (mask_[b * p_.length + t]) return false;
    return true;
  }

  Written run(cpu::Execution execution) {
    const int64_t weights = p_.width * p_.channels;
    Written w{{take(p_.batch * p_.segment_total * p_.slots * p_.width), take(p_.batch * p_.length * p_.channels),
               take(p_.slots * p_.width), take(weights), take(weights)}};
    cpu::local_slots_forward(p_, cut_, w.data[0], isa_, execution);
    cpu::local_slots_backward(p_, cut_, grad_, {w.data[1], w.data[2], w.data[3], w.data[4]}, isa_, execution);
    return w;
  }

  void expect() {
    const int64_t width = p_.width, channels = p_.channels;
    out_.assign(static_cast<size_t>(p_.batch * p_.segment_total * p_.slots * width), 0);
    d_hidden_.assign(static_cast<size_t>(p_.batch * p_.length * channels), 0);
    d_queries_.assign(static_cast<size_t>(p_.slots * width), 0);
    d_k_.assign(static_cast<size_t>(width * channels), 0);
    d_v_ = d_k_;
    const double scale = 1 / std::sqrt(static_cast<double>(dim_));
    for (int64_t b = 0; b < p_.batch; ++b)
      for (int64_t i = 0; i < p_.segment_total; ++i) {
        const bool equal = none(b, spans_[i]);
        if (equal && !p_.uniform) continue;
        std::vector<int64_t> tokens;
        for (int64_t t = spans_[i].begin; t < spans_[i].end; ++t)
          if (equal || mask_[b * p_.length + t]) tokens.push_back(t);
        const size_t n = tokens.size();
        const auto row = [&](size_t t) { return hidden_ + b * p_.hidden_batch + tokens[t] * p_.hidden_token; };
        const auto project = [&](const T* weight, int64_t stride, size_t t, int64_t e) {
          double sum = 0;
          for (int64_t c = 0; c < channels; ++c) sum += value(row(t)[c]) * value(weight[e * stride + c]);
          return sum;
        };
        std::vector<double> k(n * width), v(n * width), dk(n * width, 0), dv(n * width, 0), s(n), dp(n);
        for (size_t t = 0; t < n; ++t)
          for (int64_t e = 0; e < width; ++e)
            k[t * width + e] = project(k_weight_, p_.k_row, t, e), v[t * width + e] = project(v_weight_, p_.v_row, t, e);
        for (int64_t m = 0; m < p_.slots; ++m)
          for (int64_t h = 0; h < p_.heads; ++h) {
            double total = 0, top = -INFINITY, mean = 0;
            const int64_t at = ((b * p_.segment_total + i) * p_.slots + m) * width;
            for (size_t t = 0; t < n; ++t) {
              s[t] = dp[t] = 0;
              for (int64_t e = h * dim_; e < (h + 1) * dim_; ++e) {
                if (!equal) s[t] += scale * value(queries_[m * p_.queries_row + e]) * k[t * width + e];
                dp[t] += value(grad_[at + e]) * v[t * width + e];
              }
              top = std::max(top, s[t]);
            }
            for (size_t t = 0; t < n; ++t) total += s[t] = std::exp(s[t] - top);
            for (size_t t = 0; t < n; ++t) s[t] /= total, mean += s[t] * dp[t];
            for (size_t t = 0; t < n; ++t) {
              const double ds = equal ? 0 : scale * s[t] * (dp[t] - mean);
              for (int64_t e = h * dim_; e < (h + 1) * dim_; ++e) {
                out_[at + e] += s[t] * v[t * width + e];
                d_queries_[m * width + e] += ds * k[t * width + e];
                dk[t * width + e] += ds * value(queries_[m * p_.queries_row + e]);
                dv[t * width + e] += s[t] * value(grad_[at + e]);
              }
            }
          }
        for (size_t t = 0; t < n; ++t)
          for (int64_t e = 0; e < width; ++e)
            for (int64_t c = 0; c < channels; ++c) {
              const double a = dk[t * width + e], g = dv[t * width + e], x = value(row(t)[c]);
              d_k_[e * channels + c] += a * x, d_v_[e * channels + c] += g * x;
              d_hidden_[(b * p_.length + tokens[t]) * channels + c] +=
                  a * value(k_weight_[e * p_.k_row + c]) + g * value(v_weight_[e * p_.v_row + c]);
            }
      }
  }

  [[noreturn]] void describe(const char* what, const char* name, bool direct) const {
    fail("local_slots on %s, %d-byte elements, direct %d: %s %s; batch %lld, length %lld, channels %lld, heads %lld, dim "
         "%lld, slots %lld, segments of %lld, documents %lld, mask %d, uniform %d",
         cpu::name(isa_), (int)sizeof(T), (int)direct, what, name, (long long)p_.batch, (long long)p_.length,
         (long long)p_.channels, (long long)p_.heads, (long long)dim_, (long long)p_.slots,
         (long long)cut_.segment_len, (long long)cut_.document_count, (int)(cut_.mask != nullptr), (int)p_.uniform);
  }

  const cpu::Isa isa_;
  Random& random_;
  cpu::LocalSlotsProblem p_{};
  cpu::LocalSlotsCut cut_;
  int64_t dim_;
  std::vector<int32_t> documents_;
  std::vector<unsigned char> mask_;
  std::vector<Span> spans_;
  std::vector<std::unique_ptr<Exact>> memory_;
  T *hidden_, *queries_, *k_weight_, *v_weight_, *grad_;
  std::vector<double> out_, d_hidden_, d_queries_, d_k_, d_v_;
};

}  // namespace

void check_local_slots(cpu::Isa isa, uint64_t seed, int cases) {
  Random random(seed + 23);
  for (int i = 0; i < cases; ++i) {
    Case<float>(isa, random).check();
    Case<bfloat16>(isa, random).check();
    Case<float16>(isa, random).check();
  }
}

}  // namespace hici::driver
