// Faults on demand, so that tests can show what a store does when storage fails. No store has any unless told.
#pragma once

#include <cerrno>
#include <cstdint>
#include <string>
#include <vector>

#include "queue.h"

namespace hici::io {

struct Fault {
  enum class Kind { kError, kShort, kFlip };
  bool write;
  Kind kind;
  int64_t value;  // errno; bytes that do move; the bit that flips
  int64_t skip;   // transfers of this direction that pass before
  int64_t times;  // transfers hit
};

class Faults {
 public:
  void add(const Fault& fault) { faults_.push_back(fault); }
  void clear() { faults_.clear(); }

  // The fault that hits this transfer, or null; counts it.
  const Fault* next(bool write) {
    for (Fault& f : faults_) {
      if (f.write != write || f.times == 0) continue;
      if (f.skip > 0) {
        --f.skip;
        continue;
      }
      --f.times;
      return &f;
    }
    return nullptr;
  }

 private:
  std::vector<Fault> faults_;
};

}  // namespace hici::io
