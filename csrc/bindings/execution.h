// The two arguments every native operation ends with: the path (csrc/cpu/isa.h) and the number of threads. A negative
// number of threads: small calls too take the kernels of large ones.
#pragma once

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "arguments.h"

namespace hici::bindings {

// A path that this processor runs; -1 = the fastest of them.
inline cpu::Isa checked_path(int64_t path) {
  const std::vector<cpu::Isa>& runnable = cpu::runnable();
  if (path == -1) return runnable.back();
  for (const cpu::Isa isa : runnable)
    if (static_cast<int64_t>(isa) == path) return isa;
  TVM_FFI_THROW(ValueError) << "path must be -1 or a number cpu_paths() lists, got " << path;
}

inline cpu::Execution checked_execution(int64_t threads) {
  const int64_t count = threads < 0 ? -threads : threads;
  if (count < 1 || count > 65536) TVM_FFI_THROW(ValueError) << "threads must be 1 to 65536, got " << threads;
  return cpu::Execution{static_cast<int>(count), threads > 0};
}

}  // namespace hici::bindings
