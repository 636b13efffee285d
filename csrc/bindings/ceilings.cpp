#include "../cpu/ceilings.h"

#include <tvm/ffi/string.h>

#include "execution.h"

namespace hici::bindings {
namespace {

cpu::Work checked_work(const ffi::String& work) {
  if (work == "fma") return cpu::Work::kFma;
  if (work == "bfloat16") return cpu::Work::kBfloat16;
  if (work == "exp") return cpu::Work::kExp;
  TVM_FFI_THROW(ValueError) << "work must be fma, bfloat16 or exp, got " << work;
}

// Work done: floating-point operations, or values of exp.
double loop(ffi::String work, int64_t rounds, int64_t path, int64_t threads) {
  if (rounds < 0) TVM_FFI_THROW(ValueError) << "rounds must not be negative, got " << rounds;
  return cpu::ceiling_loop(checked_work(work), rounds, checked_path(path), checked_execution(threads));
}

ffi::String products(int64_t path) { return cpu::bfloat16_products(checked_path(path)); }

double read(TensorView data, int64_t path, int64_t threads) {
  check_cpu(data, "data");
  check_type(data, "data", DLDataType{kDLFloat, 32, 1});
  check_contiguous(data, "data");
  return cpu::read_all(pointer<const float>(data), data.numel() * 4, checked_path(path), checked_execution(threads));
}

// The addresses are believed.
double read_runs(TensorView addresses, int64_t bytes, int64_t path, int64_t threads) {
  check_cpu(addresses, "addresses");
  check_type(addresses, "addresses", DLDataType{kDLInt, 64, 1});
  check_contiguous(addresses, "addresses");
  if (bytes <= 0 || bytes % 64 != 0)
    TVM_FFI_THROW(ValueError) << "bytes must be a positive multiple of 64, got " << bytes;
  return cpu::read_runs(pointer<const int64_t>(addresses), addresses.numel(), bytes, checked_path(path),
                        checked_execution(threads));
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_loop, hici::bindings::loop);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_products, hici::bindings::products);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_read, hici::bindings::read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ceiling_read_runs, hici::bindings::read_runs);
