// Division of work over threads.
//
// There is no pool of our own: the OpenMP runtime that is already in the process (torch brings one) lends its threads,
// so that the two never compete for cores. Without one, threads are started for the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace hici::cpu {

// How a call may use the machine. Results never depend on the number of threads.
struct Execution {
  int threads = 1;
  bool direct = true;  // small calls are computed directly, in double, where the operation can
};

// Calls body(context, worker) for worker = 0..threads-1, at the same time where possible, and returns when all are
// done. What the first body to fail has thrown (no memory) is thrown on then, to the caller.
void run_workers(int threads, void (*body)(void* context, int worker), void* context);

// Whether run_workers borrows the threads of an OpenMP runtime.
bool borrows_threads();

// Returns once `count` has reached `wanted`: at once, soon, or when the threads that are behind get a core again.
void await(const std::atomic<int64_t>& count, int64_t wanted);

// Calls body(item, worker) for item = 0..items-1, each once. Items are handed out in increasing order to whichever
// worker is free: put long ones first. `worker` numbers scratch memory; results must not depend on it.
template <class Body>
void parallel(Execution execution, int64_t items, Body&& body) {
  const int threads = static_cast<int>(items < execution.threads ? items : execution.threads);
  if (threads <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t items;
    std::remove_reference_t<Body>* body;
  } shared;
  shared.items = items;
  shared.body = &body;
  run_workers(
      threads,
      [](void* context, int worker) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) (*s.body)(i, worker);
      },
      &shared);
}

// Calls first(item, worker) for item = 0..firsts-1, each once, and when all are done second(item, worker) for item =
// 0..seconds-1. Every worker takes the items of its own share, then those that others have not begun: what first() has
// left in a core's cache, second() finds there, and so does the next call of the same shape. Neither may throw.
template <class First, class Second>
void parallel_twice(Execution execution, int64_t firsts, const First& first, int64_t seconds, const Second& second) {
  constexpr int kMost = 64;
  const int threads = static_cast<int>(std::min<int64_t>({std::max(firsts, seconds), execution.threads, kMost}));
  if (threads <= 1) {
    for (int64_t i = 0; i < firsts; ++i) first(i, 0);
    for (int64_t i = 0; i < seconds; ++i) second(i, 0);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next[2];
    int64_t end[2];
  };
  struct Shared {
    Share share[kMost];
    std::atomic<int64_t> done{0};
    int64_t firsts;
    int threads;
    const First* first;
    const Second* second;
  } shared;
  shared.firsts = firsts, shared.threads = threads, shared.first = &first, shared.second = &second;
  for (int64_t w = 0; w < threads; ++w) {
    Share& s = shared.share[w];
    s.next[0] = firsts * w / threads, s.end[0] = firsts * (w + 1) / threads;
    s.next[1] = seconds * w / threads, s.end[1] = seconds * (w + 1) / threads;
  }
  run_workers(
      threads,
      [](void* context, int worker) {
        Shared& s = *static_cast<Shared*>(context);
        const auto each = [&](int phase, const auto& body) {
          int64_t count = 0;
          for (int k = 0; k < s.threads; ++k) {
            Share& of = s.share[(worker + k) % s.threads];
            for (int64_t i; (i = of.next[phase].fetch_add(1, std::memory_order_relaxed)) < of.end[phase]; ++count)
              body(i, worker);
          }
          return count;
        };
        s.done.fetch_add(each(0, *s.first), std::memory_order_acq_rel);
        // whoever has begun an item is running: this ends, however many workers came
        await(s.done, s.firsts);
        each(1, *s.second);
      },
      &shared);
}

}  // namespace hici::cpu
