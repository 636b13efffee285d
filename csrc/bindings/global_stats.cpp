#include "../cpu/global_stats.h"

#include "execution.h"

namespace hici::bindings {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 31;  // rows are numbered in 32 bits

cpu::StatsProblem problem(const TensorView& local, bool causal, const ffi::Optional<TensorView>& valid,
                          const ffi::Optional<TensorView>& offsets) {
  check_cpu(local, "local");
  if (local.ndim() != 4) TVM_FFI_THROW(ValueError) << "local must have 4 dimensions, got shape " << local.shape();
  cpu::StatsProblem p{};
  p.batch = local.size(0), p.segments = local.size(1), p.slots = local.size(2), p.channels = local.size(3);
  p.stride_batch = local.stride(0), p.stride_segment = local.stride(1), p.stride_slot = local.stride(2);
  p.causal = causal;
  if (p.channels > 1 && local.stride(3) != 1)
    TVM_FFI_THROW(ValueError) << "local must be contiguous in its last dimension";
  if (p.segments * p.slots >= kMaxRows) TVM_FFI_THROW(ValueError) << "local has 2^31 or more slots per batch row";
  if (valid.has_value()) {
    const TensorView v = valid.value();
    check_cpu(v, "valid");
    check_type(v, "valid", DLDataType{kDLBool, 8, 1});
    check_shape(v, "valid", {p.batch, p.segments});
    p.valid = pointer<const bool>(v);
    p.valid_batch = v.stride(0), p.valid_segment = v.stride(1);
  }
  if (offsets.has_value()) {
    const TensorView o = offsets.value();
    check_cpu(o, "cu_segments");
    check_type(o, "cu_segments", DLDataType{kDLInt, 32, 1});
    check_contiguous(o, "cu_segments");
    if (o.ndim() != 1 || o.size(0) < 1 || p.batch != 1)
      TVM_FFI_THROW(ValueError) << "cu_segments must be [docs+1] beside batch 1, got shape " << o.shape();
    p.offsets = pointer<const int32_t>(o);
    p.documents = o.size(0) - 1;
    for (int64_t d = 0; d < p.documents; ++d)
      if (p.offsets[d + 1] < p.offsets[d]) TVM_FFI_THROW(ValueError) << "cu_segments must not decrease";
    if (p.offsets[0] != 0 || p.offsets[p.documents] != p.segments)
      TVM_FFI_THROW(ValueError) << "cu_segments must run from 0 to " << p.segments;
  }
  return p;
}

void check_rows(const cpu::StatsProblem& p, const TensorView& local, const TensorView& rows, const char* name) {
  check_cpu(rows, name);
  check_type(rows, name, local.dtype());
  check_contiguous(rows, name);
  if (p.causal) return check_shape(rows, name, {p.batch, p.segments, 5, p.channels});
  check_shape(rows, name, {p.offsets ? p.documents : p.batch, 5, p.channels});
}

void forward(TensorView local, bool causal, ffi::Optional<TensorView> valid, ffi::Optional<TensorView> offsets,
             TensorView out, int64_t path, int64_t threads) {
  const cpu::StatsProblem p = problem(local, causal, valid, offsets);
  check_rows(p, local, out, "out");
  with_float_type(local, "local", [&](auto zero) {
    using T = decltype(zero);
    cpu::global_stats_forward(p, pointer<const T>(local), pointer<T>(out), checked_path(path),
                              checked_execution(threads));
  });
}

void backward(TensorView grad_out, TensorView local, bool causal, ffi::Optional<TensorView> valid,
              ffi::Optional<TensorView> offsets, TensorView grad_local, int64_t path, int64_t threads) {
  const cpu::StatsProblem p = problem(local, causal, valid, offsets);
  check_rows(p, local, grad_out, "grad_out");
  check_cpu(grad_local, "grad_local");
  check_type(grad_local, "grad_local", local.dtype());
  check_contiguous(grad_local, "grad_local");
  check_shape(grad_local, "grad_local", {p.batch, p.segments, p.slots, p.channels});
  with_float_type(local, "local", [&](auto zero) {
    using T = decltype(zero);
    cpu::global_stats_backward(p, pointer<const T>(local), pointer<const T>(grad_out), pointer<T>(grad_local),
                               checked_path(path), checked_execution(threads));
  });
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(global_stats_forward, hici::bindings::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(global_stats_backward, hici::bindings::backward);
