// local_slots of small calls, forward and backward, in double: the formula as it is written, with keys and values of
// every token. Where there are few numbers, nothing averages roundings out.
#include "attention_rows.h"
#include "../local_slots.h"
#include "direct.h"

namespace hici::cpu::HICI_PATH {
namespace {

constexpr int64_t kTokens = 4;  // that read a row of weights together

template <class T>
struct Direct {
  const LocalSlotsProblem& p;
  const int64_t dim, wide, width2, tokens;  // of a head; of a row of channels in double; keys and values; most of a segment
  const double scale;
  double *x, *kv, *change;   // [tokens][wide], [tokens][2 width] twice
  double *q, *grad, *s, *dp; // [slots][width] twice; [tokens] twice
  double *row;               // [width]
  double *dx, *dq, *dw;      // backward: [kTokens][wide]; [slots][width]; [2 width][wide]
  const T** weights;         // rows of both

  Direct(const LocalSlotsProblem& problem, int64_t most, bool backward, Carve& carve)
      : p(problem), dim(problem.width / problem.heads), wide(round_up(problem.channels, kLanes)),
        width2(2 * problem.width), tokens(round_up(most, kWideLanes)),
        scale(1 / __builtin_sqrt(static_cast<double>(dim))) {
    x = carve.take<double>(tokens * wide);
    kv = carve.take<double>(tokens * width2);
    q = carve.take<double>(round_up(p.slots * p.width, kLanes));
    s = carve.take<double>(tokens);
    row = carve.take<double>(round_up(p.width, kLanes));
    weights = carve.take<const T*>(width2);
    change = carve.take<double>(backward ? tokens * width2 : 0);
    grad = carve.take<double>(backward ? round_up(p.slots * p.width, kLanes) : 0);
    dp = carve.take<double>(backward ? tokens : 0);
    dx = carve.take<double>(backward ? kTokens * wide : 0);
    dq = carve.take<double>(backward ? p.slots * p.width : 0);
    dw = carve.take<double>(backward ? width2 * wide : 0);
  }

  // Rows of slots as doubles, without padding between them.
  void load_slots(const T* from, int64_t stride, double* to) const {
    for (int64_t m = 0; m < p.slots; ++m) {
      widen_row(from + m * stride, p.width, row);
      __builtin_memcpy(to + m * p.width, row, p.width * sizeof(double));
    }
  }

  void begin() const {
    load_slots(static_cast<const T*>(p.queries), p.queries_row, q);
    for (int64_t e = 0; e < p.width; ++e) {
      weights[e] = static_cast<const T*>(p.k_weight) + e * p.k_row;
      weights[p.width + e] = static_cast<const T*>(p.v_weight) + e * p.v_row;
    }
  }

  int64_t place(const SlotsSegment& of, int64_t i) const {
    return p.columns ? p.columns[of.batch * p.length + of.begin + i] : of.begin + i;
  }

  // Hidden rows of a segment, their keys and values.
  void load_tokens(const SlotsSegment& of) const {
    const int64_t n = of.end - of.begin;
    for (int64_t i = 0; i < n; ++i)
      widen_row(static_cast<const T*>(p.hidden) + of.batch * p.hidden_batch + place(of, i) * p.hidden_token, p.channels,
                x + i * wide);
    in_fours(n, [&](auto many, int64_t i) {
      for (int64_t e = 0; e < width2; ++e)
        dots<decltype(many)::value>(x + i * wide, wide, weights[e], p.channels, 1.0, kv + i * width2 + e, width2);
    });
  }

  // s becomes the weights of the n tokens for one slot and head.
  void weigh(const SlotsSegment& of, int64_t n, int64_t m, int64_t h) const {
    const double* const own = q + m * p.width + h * dim;
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      const double* const key = kv + i * width2 + h * dim;
      for (int64_t d = 0; d < dim; ++d) sum += own[d] * key[d];
      s[i] = of.equal ? 0.0 : scale * sum;
    }
    double total;
    soften_row(s, n, &total);
    for (int64_t i = 0; i < n; ++i) s[i] /= total;
  }

  void forward(const LocalSlotsPlan& plan, int64_t count, T* out) const {
    begin();
    for (int64_t i = 0; i < count; ++i) {
      const SlotsSegment& of = plan.segments[i];
      const int64_t n = of.end - of.begin;
      load_tokens(of);
      for (int64_t m = 0; m < p.slots; ++m) {
        __builtin_memset(row, 0, round_up(p.width, kLanes) * sizeof(double));
        for (int64_t h = 0; h < p.heads; ++h) {
          weigh(of, n, m, h);
          for (int64_t t = 0; t < n; ++t)
            for (int64_t d = 0; d < dim; ++d) row[h * dim + d] += s[t] * kv[t * width2 + p.width + h * dim + d];
        }
        narrow_row(row, p.width, out + ((of.batch * p.segment_total + of.segment) * p.slots + m) * p.width);
      }
    }
  }

  void backward(const LocalSlotsPlan& plan, int64_t count, const T* grad_out, const LocalSlotsGradients& to) const {
    begin();
    __builtin_memset(dq, 0, p.slots * p.width * sizeof(double));
    __builtin_memset(dw, 0, width2 * wide * sizeof(double));
    for (int64_t i = 0; i < count; ++i) {
      const SlotsSegment& of = plan.segments[i];
      const int64_t n = of.end - of.begin;
      load_tokens(of);
      load_slots(grad_out + (of.batch * p.segment_total + of.segment) * p.slots * p.width, p.width, grad);
      __builtin_memset(change, 0, n * width2 * sizeof(double));
      for (int64_t m = 0; m < p.slots; ++m)
        for (int64_t h = 0; h < p.heads; ++h) slope(of, n, m, h);
      in_fours(n, [&](auto many, int64_t t) {
        constexpr int R = decltype(many)::value;
        combine<R>(change + t * width2, width2, weights, width2, p.channels, dx, wide);
        for (int r = 0; r < R; ++r)
          narrow_row(dx + r * wide, p.channels,
                     static_cast<T*>(to.hidden) + (of.batch * p.length + place(of, t + r)) * p.channels);
        for (int64_t e = 0; e < width2; ++e)
          add_rows<R>(change + t * width2 + e, width2, x + t * wide, wide, dw + e * wide);
      });
    }
    for (int64_t e = 0; e < width2; ++e) {
      T* const weight = static_cast<T*>(e < p.width ? to.k_weight : to.v_weight);
      narrow_row(dw + e * wide, p.channels, weight + e % p.width * p.channels);
    }
    for (int64_t m = 0; m < p.slots; ++m) {
      __builtin_memcpy(row, dq + m * p.width, p.width * sizeof(double));
      narrow_row(row, p.width, static_cast<T*>(to.queries) + m * p.width);
    }
  }

  // What one slot and head send to keys, values and the slot's query.
  void slope(const SlotsSegment& of, int64_t n, int64_t m, int64_t h) const {
    const int64_t at = m * p.width + h * dim;
    weigh(of, n, m, h);
    double mean = 0;
    for (int64_t t = 0; t < n; ++t) {
      double sum = 0;
      const double* const value = kv + t * width2 + p.width + h * dim;
      for (int64_t d = 0; d < dim; ++d) sum += grad[at + d] * value[d];
      dp[t] = sum;
      mean += s[t] * sum;
    }
    for (int64_t t = 0; t < n; ++t) {
      // equal weights do not depend on the scores
      const double ds = of.equal ? 0.0 : scale * s[t] * (dp[t] - mean);
      const double* const key = kv + t * width2 + h * dim;
      double *const dk = change + t * width2 + h * dim, *const dv = dk + p.width;
      for (int64_t d = 0; d < dim; ++d) {
        dq[at + d] += ds * key[d];
        dk[d] += ds * q[at + d];
        dv[d] += s[t] * grad[at + d];
      }
    }
  }
};

int64_t direct_scratch(const LocalSlotsProblem& p, int64_t most, bool backward) {
  Carve carve(nullptr);
  Direct<float>(p, most, backward, carve);
  return carve.bytes();
}

void direct_forward(const LocalSlotsProblem& p, const LocalSlotsPlan& plan, int64_t count, int64_t most, void* out,
                    void* scratch) {
  with_element(p.element, [&](auto zero) {
    using T = decltype(zero);
    Carve carve(scratch);
    Direct<T>(p, most, false, carve).forward(plan, count, static_cast<T*>(out));
  });
}

void direct_backward(const LocalSlotsProblem& p, const LocalSlotsPlan& plan, int64_t count, int64_t most,
                     const void* grad_out, const LocalSlotsGradients& gradients, void* scratch) {
  with_element(p.element, [&](auto zero) {
    using T = decltype(zero);
    Carve carve(scratch);
    Direct<T>(p, most, true, carve).backward(plan, count, static_cast<const T*>(grad_out), gradients);
  });
}

}  // namespace

LocalSlotsDirect local_slots_direct() { return {direct_scratch, direct_forward, direct_backward}; }

}  // namespace hici::cpu::HICI_PATH
