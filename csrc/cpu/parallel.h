// Division of work over threads.
//
// There is no pool of our own: the OpenMP runtime that is already in the process (torch brings one) lends its threads,
// so that the two never compete for cores. Without one, threads are started for the call.
#pragma once

#include <atomic>
#include <cstdint>

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
    Body* body;
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

}  // namespace hici::cpu
