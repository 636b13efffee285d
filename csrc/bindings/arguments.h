// Checks of tensors that cross the Python boundary. The Python side has checked the call in the user's terms; these
// guard memory, so that no caller of the library can make a kernel read outside a tensor.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>

#include "hici/simd.h"

namespace hici::bindings {

namespace ffi = tvm::ffi;
using ffi::TensorView;

inline void check_cpu(const TensorView& t, const char* name) {
  if (t.device().device_type != kDLCPU) TVM_FFI_THROW(ValueError) << name << " must be on the CPU";
}

inline void check_shape(const TensorView& t, const char* name, std::initializer_list<int64_t> expected) {
  bool same = t.ndim() == static_cast<int32_t>(expected.size());
  int32_t i = 0;
  for (auto it = expected.begin(); same && it != expected.end(); ++it, ++i) same = t.size(i) == *it;
  if (!same) TVM_FFI_THROW(ValueError) << name << " has shape " << t.shape() << ", which does not fit the other arguments";
}

inline void check_type(const TensorView& t, const char* name, DLDataType expected) {
  if (!(t.dtype() == expected)) TVM_FFI_THROW(TypeError) << name << " has a wrong dtype";
}

inline void check_contiguous(const TensorView& t, const char* name) {
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " must be contiguous";
}

template <class T>
T* pointer(const TensorView& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

// Calls run(T{}) with the element type of `t`.
template <class Run>
void with_float_type(const TensorView& t, const char* name, Run&& run) {
  const DLDataType d = t.dtype();
  if (d == DLDataType{kDLFloat, 32, 1}) return run(float{});
  if (d == DLDataType{kDLBfloat, 16, 1}) return run(bfloat16{});
  if (d == DLDataType{kDLFloat, 16, 1}) return run(float16{});
  if (d == DLDataType{kDLFloat, 64, 1}) return run(double{});
  TVM_FFI_THROW(TypeError) << name << " must be float32, bfloat16, float16 or float64";
}

}  // namespace hici::bindings
