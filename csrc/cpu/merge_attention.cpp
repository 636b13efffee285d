#include "merge_attention.h"

#include <algorithm>

#include "memory.h"

namespace hici::cpu {
namespace {

// How work is cut: by shape alone.
constexpr int64_t kPositions = 16;   // lse is contiguous in positions: of a cache line of it, all is used
constexpr int64_t kRows = 1024;      // x parts: whose weights lie in the first-level cache
constexpr int64_t kLeast = 1 << 20;  // bytes: less is not worth waking a thread
constexpr int64_t kFar = 16 << 20;   // bytes written: more will not be in cache when it is read

template <class T>
MergePath<T> path_of(Isa isa) {
  switch (isa) {
#define HICI_CASE(value, text, space) \
  case Isa::value:                    \
    return space::merge_path<T>();
    HICI_PATHS(HICI_CASE)
#undef HICI_CASE
    default:
      return base::merge_path<T>();
  }
}

// Calls body(item, scratch) for all of the problem.
template <class T, class Body>
void each_item(const MergeProblem<T>& p, const MergePath<T>& path, Execution execution, Body&& body) {
  using Acc = typename MergeProblem<T>::Acc;
  if (p.batch * p.seq * p.heads == 0) return;
  const int64_t bytes = p.batch * p.seq * p.heads * p.dim * (p.parts + 1) * static_cast<int64_t>(sizeof(T));
  const Execution threads = bytes < kLeast ? Execution{} : execution;
  const int64_t positions = std::min(kPositions, p.seq);
  const int64_t heads = std::min(p.heads, std::max<int64_t>(1, kRows / p.parts / positions));
  const int64_t tiles = (p.seq + positions - 1) / positions, groups = (p.heads + heads - 1) / heads;
  const int64_t size = path.scratch(p.parts, positions * heads) + 16;
  const Memory memory(threads.threads * size * static_cast<int64_t>(sizeof(Acc)));
  parallel(threads, p.batch * tiles * groups, [&](int64_t i, int worker) {
    const int64_t h = i % groups * heads, t = i / groups % tiles * positions;
    const MergeItem item{i / groups / tiles, t, std::min(positions, p.seq - t), h, std::min(heads, p.heads - h)};
    body(item, static_cast<Acc*>(memory.data()) + worker * size);
  });
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Bytes of one part.
template <class T>
int64_t size_of(const MergeProblem<T>& p) {
  return p.batch * p.seq * p.heads * p.dim * static_cast<int64_t>(sizeof(T));
}

template <class T>
bool far(const MergeProblem<T>& p, int64_t results) {
  return p.dim * sizeof(T) % 64 == 0 && results * size_of(p) >= kFar;
}

}  // namespace

template <class T>
void merge_attention_forward(const MergeProblem<T>& p, T* out, typename simd::accumulator<T>::type* lse, Isa isa,
                             Execution execution) {
  const MergePath<T> path = path_of<T>(isa);
  const bool stream = far(p, 1) && aligned(out);
  prefer_large_pages(out, size_of(p));
  each_item(p, path, execution,
            [&](const MergeItem& item, auto* scratch) { path.forward(p, item, out, lse, stream, scratch); });
}

template <class T>
void merge_attention_backward(const MergeProblem<T>& p, const MergeRows<T>& grad_out,
                              const typename simd::accumulator<T>::type* grad_lse, const MergeGradient<T>* gradients,
                              Isa isa, Execution execution) {
  const MergePath<T> path = path_of<T>(isa);
  bool stream = far(p, p.parts);
  for (int64_t i = 0; i < p.parts; ++i) {
    stream = stream && aligned(gradients[i].out);
    prefer_large_pages(gradients[i].out, size_of(p));
  }
  each_item(p, path, execution, [&](const MergeItem& item, auto* scratch) {
    path.backward(p, item, grad_out, grad_lse, gradients, stream, scratch);
  });
}

#define HICI_INSTANTIATE(T)                                                                                        \
  template void merge_attention_forward<T>(const MergeProblem<T>&, T*, simd::accumulator<T>::type*, Isa, Execution); \
  template void merge_attention_backward<T>(const MergeProblem<T>&, const MergeRows<T>&,                            \
                                            const simd::accumulator<T>::type*, const MergeGradient<T>*, Isa,        \
                                            Execution);
HICI_INSTANTIATE(float)
HICI_INSTANTIATE(double)
HICI_INSTANTIATE(bfloat16)
HICI_INSTANTIATE(float16)
#undef HICI_INSTANTIATE

}  // namespace hici::cpu
