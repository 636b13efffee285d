// parallel.h: every item once and in its phase, whatever the number of workers, and calls from several threads at once.

#include <atomic>
#include <new>
#include <thread>

#include "../cpu/parallel.h"
#include "checks.h"

namespace hici::driver {
namespace {

void every_item_once(int threads, int64_t items) {
  std::vector<int> done(items), by(items, -1);
  cpu::parallel(cpu::Execution{threads}, items, [&](int64_t i, int worker) { ++done[i], by[i] = worker; });
  for (int64_t i = 0; i < items; ++i) {
    if (done[i] != 1) fail("parallel: item %d of %d done %d times by %d threads", (int)i, (int)items, done[i], threads);
    if (by[i] < 0 || by[i] >= threads) fail("parallel: worker %d of %d", by[i], threads);
  }
}

// The second phase sees all of the first.
void both_phases(int threads, int64_t firsts, int64_t seconds) {
  std::vector<int> first(firsts), second(seconds), seen(seconds);
  cpu::parallel_twice(
      cpu::Execution{threads}, firsts, [&](int64_t i, int worker) { first[i] += worker < threads; }, seconds,
      [&](int64_t i, int worker) {
        second[i] += worker < threads;
        for (int64_t j = 0; j < firsts; ++j) seen[i] += first[j];
      });
  for (int64_t i = 0; i < firsts; ++i)
    if (first[i] != 1) fail("parallel_twice: first %d of %d done %d times", (int)i, (int)firsts, first[i]);
  for (int64_t i = 0; i < seconds; ++i)
    if (second[i] != 1 || seen[i] != firsts)
      fail("parallel_twice: second %d of %d done %d times after %d", (int)i, (int)seconds, second[i], seen[i]);
}

// What bodies throw reaches the caller once all workers have come back, and the next call is as any other.
void a_failing_body(int threads) {
  std::atomic<int> present{0};
  bool caught = false;
  try {
    cpu::parallel(cpu::Execution{threads}, 50, [&](int64_t i, int) {
      ++present;
      if (i % 7 == 3) {
        --present;
        throw std::bad_alloc();
      }
      --present;
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  if (!caught || present != 0) fail("parallel: %d threads, caught %d, %d still there", threads, caught, present.load());
  every_item_once(threads, 50);
}

}  // namespace

void check_threads() {
  for (int threads : {1, 2, 7}) a_failing_body(threads);
  for (int threads : {1, 2, 3, 7})
    for (int64_t items : {0, 1, 2, 6, 100}) {
      every_item_once(threads, items);
      for (int64_t more : {0, 1, 9, 40}) both_phases(threads, items, more);
    }
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([] {
      for (int j = 0; j < 20; ++j) every_item_once(3, 50), both_phases(3, 8, 16);
    });
  for (std::thread& t : callers) t.join();
  if (cpu::borrows_threads()) fail("the driver is to start its own threads");
}

}  // namespace hici::driver
