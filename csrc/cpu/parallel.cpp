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

// What every OpenMP runtime offers to code compiled by GCC: run fn(data) on a team of `threads`, and the number of the
// calling thread in its team. The number is the same in every call: a core finds in its caches what it left there.
struct Runtime {
  void (*run)(void (*fn)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*number)() = nullptr;  // null = unknown
};

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime entries;
#if (defined(__unix__) || defined(__APPLE__)) && !defined(HICI_OWN_THREADS)
    void* const run = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    void* const number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    entries.run = reinterpret_cast<decltype(entries.run)>(run);
    // of two runtimes in one process, one does not number the other's threads
    Dl_info of_run, of_number;
    if (run && number && dladdr(run, &of_run) && dladdr(number, &of_number) && of_run.dli_fbase == of_number.dli_fbase)
      entries.number = reinterpret_cast<decltype(entries.number)>(number);
#endif
    return entries;
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

bool borrows_threads() { return runtime().run != nullptr && !forked.load(std::memory_order_relaxed); }

void await(const std::atomic<int64_t>& count, int64_t wanted) {
  constexpr int kSpins = 1 << 12;  // longer than small calls take, shorter than a time slice
  for (int spins = 0; count.load(std::memory_order_acquire) < wanted; ++spins) {
    if (spins >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }
}

void run_workers(int threads, void (*body)(void* context, int worker), void* context) {
  if (threads <= 1) return body(context, 0);
  Call call{body, context, threads};
  if (borrows_threads()) {
    runtime().run(
        [](void* data) {
          Call& c = *static_cast<Call*>(data);
          // a team may be smaller than asked for (nested regions, limits): what the missing ones would have done is
          // left to those present, since items are handed out dynamically
          const auto number = runtime().number;
          const int worker = number ? number() : c.joined.fetch_add(1, std::memory_order_relaxed);
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
