// Positioned reads and writes of one file, many at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace hici::io {

struct Transfer {
  bool write;
  char* data;
  int64_t bytes;
  int64_t offset;
  int64_t tag;     // the caller's
  int64_t result;  // bytes moved, or -errno
};

// Not safe for several threads, but for idle(). Every transfer given in comes back once; those in flight at destruction are waited for.
class Queue {
 public:
  virtual ~Queue() = default;
  // Transfers that may be in flight.
  virtual int depth() const = 0;
  // Begins a transfer; at most depth() may be in flight.
  virtual void submit(const Transfer& transfer) = 0;
  // Adds what has ended to `done`; with `wait`, at least one.
  virtual void reap(std::vector<Transfer>& done, bool wait) = 0;
  // Sends what submit() has kept back.
  virtual void flush() = 0;
  // Returns when reap() would find something, provided that something is in flight and nobody else reaps meanwhile. Other
  // threads may submit() and flush().
  virtual void idle() = 0;
  // In a forked child: lets go of everything without touching what the parent still uses.
  virtual void abandon() = 0;
};

// io_uring by plain system calls; null where the kernel refuses it.
std::unique_ptr<Queue> make_uring(int file, int depth);
// pread and pwrite on `depth` threads, which start with the first transfer.
std::unique_ptr<Queue> make_threads(int file, int depth);

}  // namespace hici::io
