// hga_summaries: every key is turned to the anchor of its group and added up; a group's sum is its summary, and turned on
// to the anchor of the chunk it is a part of the chunk's. So a key is read and turned once.

#include "../hga_summaries.h"
#include "attention_rows.h"

namespace hici::cpu::HICI_PATH {
namespace {

// Additions before a partial sum: the rounding of a chain grows with its length.
constexpr int64_t kTurned = 8;

template <class T>
inline Vec some(const T* p, int64_t there) {
  return there == kLanes ? widen(p) : widen_part(p, there);
}
inline Vec some_floats(const float* p, int64_t there) { return there == kLanes ? load(p) : load_part(p, there); }
template <class T>
inline void put_some(T* p, Vec v, int64_t there) {
  if (there == kLanes)
    narrow(p, v);
  else
    narrow_part(p, v, there);
}

// Lanes i < cut of a vector that starts at pair i are not turned, whatever stands in the other half of their pair.
inline Vec chosen(int64_t turned_from, Vec plain, Vec turned) {
  if (turned_from <= 0) return turned;
  return turned_from >= kLanes ? plain : keep_first(turned_from, plain, turned);
}

template <class T>
void summarise(const SummaryProblem& p, int64_t batch, int64_t chunk, const SummaryTurns& turns, void* memory) {
  const int64_t m_count = p.groups(), half = p.half;
  Carve carve(memory);
  float* const whole = carve.take<float>(round_up(p.dim, kLanes) + kLanes);
  const T** const rows = carve.take<const T*>(p.chunk);
  const Vec group_length = splat(static_cast<float>(p.group)), chunk_length = splat(static_cast<float>(p.chunk));
  for (int64_t h = 0; h < p.heads; ++h) {
    const T* const k = static_cast<const T*>(p.k.data) + batch * p.k.batch + h * p.k.head;
    for (int64_t j = 0; j < p.chunk; ++j) {
      const int64_t token = chunk * p.chunk + j;
      rows[j] = k + (p.columns ? p.columns[batch * p.keys + token] : token) * p.k.seq;
    }
    T* const to_groups = static_cast<T*>(p.group_keys) + batch * p.group_batch + chunk * p.group_chunk + h * p.group_head;
    T* const to_chunk = static_cast<T*>(p.chunk_keys) + batch * p.chunk_batch + chunk * p.chunk_step + h * p.chunk_head;
    for (int64_t m = 0; m < m_count; ++m) {
      const T* const* const from = rows + m * p.group;
      T* const out = to_groups + m * p.group_step;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t there = smaller(kLanes, half - i), turned_from = turns.cut - i;
        Vec low = zeros(), high = zeros();
        for (int64_t j = 0; j < p.group;) {
          Vec low_part = zeros(), high_part = zeros();
          for (const int64_t end = smaller(p.group, j + kTurned); j < end; ++j) {
            const Vec x = some(from[j] + i, there), y = some(from[j] + half + i, there);
            Vec a = x, b = y;
            if (turned_from < kLanes) {
              const float* const angle = turns.token + (m * p.group + j) * half + i;
              const Vec c = some_floats(angle, there), s = some_floats(angle + p.chunk * half, there);
              a = chosen(turned_from, x, sub(mul(x, c), mul(y, s)));
              b = chosen(turned_from, y, add(mul(y, c), mul(x, s)));
            }
            low_part = add(low_part, a), high_part = add(high_part, b);
          }
          low = add(low, low_part), high = add(high, high_part);
        }
        put_some(out + i, div(low, group_length), there);
        put_some(out + half + i, div(high, group_length), there);
        Vec a = low, b = high;
        if (turned_from < kLanes) {
          const float* const angle = turns.group + m * half + i;
          const Vec c = some_floats(angle, there), s = some_floats(angle + m_count * half, there);
          a = chosen(turned_from, low, sub(mul(low, c), mul(high, s)));
          b = chosen(turned_from, high, add(mul(high, c), mul(low, s)));
        }
        float *const at_low = whole + i, *const at_high = whole + half + i;
        if (m > 0) a = add(some_floats(at_low, there), a), b = add(some_floats(at_high, there), b);
        put_some(at_low, a, there);
        put_some(at_high, b, there);
      }
      for (int64_t i = 2 * half; i < p.dim; i += kLanes) {
        const int64_t there = smaller(kLanes, p.dim - i);
        Vec sum = zeros();
        for (int64_t j = 0; j < p.group;) {
          Vec part = zeros();
          for (const int64_t end = smaller(p.group, j + kTurned); j < end; ++j) part = add(part, some(from[j] + i, there));
          sum = add(sum, part);
        }
        put_some(out + i, div(sum, group_length), there);
        put_some(whole + i, m > 0 ? add(some_floats(whole + i, there), sum) : sum, there);
      }
    }
    for (int64_t i = 0; i < p.dim; i += kLanes) {
      const int64_t there = smaller(kLanes, p.dim - i);
      put_some(to_chunk + i, div(some_floats(whole + i, there), chunk_length), there);
    }
  }
}

int64_t scratch(const SummaryProblem& p) {
  Carve carve(nullptr);
  carve.take<float>(round_up(p.dim, kLanes) + kLanes);
  carve.take<const void*>(p.chunk);
  return carve.bytes();
}

void chunk(const SummaryProblem& p, int64_t batch, int64_t c, const SummaryTurns& turns, void* memory) {
  with_element(p.element, [&](auto zero) { summarise<decltype(zero)>(p, batch, c, turns, memory); });
}

}  // namespace

SummaryPath summary_path() { return {scratch, chunk}; }

}  // namespace hici::cpu::HICI_PATH
