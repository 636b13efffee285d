#include "execution.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/string.h>

namespace hici::bindings {
namespace {

// "number name" of every path this processor runs, slowest first.
ffi::Array<ffi::String> cpu_paths() {
  ffi::Array<ffi::String> found;
  for (const cpu::Isa isa : cpu::runnable())
    found.push_back(ffi::String(std::to_string(static_cast<int>(isa)) + " " + cpu::name(isa)));
  return found;
}

bool cpu_borrows_threads() { return cpu::borrows_threads(); }

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_paths, hici::bindings::cpu_paths);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_borrows_threads, hici::bindings::cpu_borrows_threads);
