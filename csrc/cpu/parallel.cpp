#include "parallel.h"

#include <exception>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace hici::cpu {
namespace {

// The entry every OpenMP runtime offers to code compiled by GCC: run fn(data) on a team of `threads`.
using Team = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

Team team() {
  static const Team found = [] {
    Team entry = nullptr;
#if (defined(__unix__) || defined(__APPLE__)) && !defined(HICI_OWN_THREADS)
    entry = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
    return entry;
  }();
  return found;
}

// A child of fork() remembers the team of its parent, but has none of its threads, and would wait for them for ever.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watched =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

struct Call {
  void (*body)(void*, int);
  void* context;
  int threads;
  std::atomic<int> joined{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the first that failed

  void run(int worker) noexcept {
    try {
      body(context, worker);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

}  // namespace

bool borrows_threads() { return team() != nullptr && !forked.load(std::memory_order_relaxed); }

void run_workers(int threads, void (*body)(void* context, int worker), void* context) {
  if (threads <= 1) return body(context, 0);
  Call call{body, context, threads};
  if (borrows_threads()) {
    team()(
        [](void* data) {
          Call& c = *static_cast<Call*>(data);
          // a team may be smaller than asked for (nested regions, limits): workers are numbered as they come, and
          // what the missing ones would have done is left to those present, since items are handed out dynamically
          const int worker = c.joined.fetch_add(1, std::memory_order_relaxed);
          if (worker < c.threads) c.run(worker);
        },
        &call, static_cast<unsigned>(threads), 0);
    if (call.failed) std::rethrow_exception(call.error);
    return;
  }
  std::vector<std::thread> started;
  started.reserve(threads - 1);
  for (int worker = 1; worker < threads; ++worker) {
    try {
      started.emplace_back([&call, worker] { call.run(worker); });
    } catch (const std::exception&) {
      break;  // no thread or no memory for one: as with a smaller team
    }
  }
  call.run(0);
  for (std::thread& t : started) t.join();
  if (call.failed) std::rethrow_exception(call.error);
}

}  // namespace hici::cpu
