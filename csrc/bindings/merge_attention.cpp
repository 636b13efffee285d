#include "../cpu/merge_attention.h"

#include <tvm/ffi/any.h>

#include <vector>

#include "execution.h"

namespace hici::bindings {
namespace {

DLDataType lse_type(const TensorView& out) {
  const DLDataType d = out.dtype();
  return d.code == kDLFloat && d.bits == 64 ? d : DLDataType{kDLFloat, 32, 1};
}

void check_like(const TensorView& t, const char* name, const TensorView& first) {
  check_cpu(t, name);
  check_type(t, name, first.dtype());
  check_shape(t, name, {first.size(0), first.size(1), first.size(2), first.size(3)});
}

void check_lse(const TensorView& t, const char* name, const TensorView& first) {
  check_cpu(t, name);
  check_type(t, name, lse_type(first));
  check_shape(t, name, {first.size(0), first.size(2), first.size(1)});
}

template <class T>
cpu::MergeRows<T> rows(const TensorView& t, const char* name) {
  if (t.size(3) > 1 && t.stride(3) != 1)
    TVM_FFI_THROW(ValueError) << name << " must be contiguous in its last dimension";
  return {pointer<const T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// The arguments after the fixed ones: all outs, then all lses (then what a gradient adds, in the same order).
struct Lists {
  const ffi::AnyView* args;
  int64_t parts;

  Lists(const ffi::AnyView* a, int64_t count, int64_t lists) : args(a), parts(count / lists) {
    if (parts < 1 || parts * lists != count)
      TVM_FFI_THROW(TypeError) << "expected " << lists << " lists of equally many tensors, got " << count << " tensors";
  }
  TensorView at(int64_t list, int64_t part) const { return args[list * parts + part].cast<TensorView>(); }
};

template <class T>
struct Problem {
  using Acc = typename simd::accumulator<T>::type;
  std::vector<cpu::MergeRows<T>> outs;
  std::vector<cpu::MergeLse<Acc>> lses;
  cpu::MergeProblem<T> value;

  Problem(const Lists& lists, const TensorView& first) {
    for (int64_t i = 0; i < lists.parts; ++i) {
      const TensorView out = lists.at(0, i), lse = lists.at(1, i);
      check_like(out, "outs", first);
      check_lse(lse, "lses", first);
      outs.push_back(rows<T>(out, "outs"));
      lses.push_back({pointer<const Acc>(lse), lse.stride(0), lse.stride(1), lse.stride(2)});
    }
    value = {first.size(0), first.size(1), first.size(2), first.size(3), lists.parts, outs.data(), lses.data()};
  }
};

// path, threads, out, lse, outs..., lses...
void forward(const ffi::AnyView* args, int32_t count) {
  constexpr int kFixed = 4;
  if (count < kFixed) TVM_FFI_THROW(TypeError) << "expected at least " << kFixed << " arguments, got " << count;
  const cpu::Isa isa = checked_path(args[0].cast<int64_t>());
  const cpu::Execution execution = checked_execution(args[1].cast<int64_t>());
  const TensorView out = args[2].cast<TensorView>(), lse = args[3].cast<TensorView>();
  if (out.ndim() != 4) TVM_FFI_THROW(ValueError) << "out must have 4 dimensions, got shape " << out.shape();
  check_cpu(out, "out");
  check_contiguous(out, "out");
  check_lse(lse, "lse", out);
  check_contiguous(lse, "lse");
  const Lists lists(args + kFixed, count - kFixed, 2);
  with_float_type(out, "out", [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Problem<T>::Acc;
    const Problem<T> problem(lists, out);
    cpu::merge_attention_forward<T>(problem.value, pointer<T>(out), pointer<Acc>(lse), isa, execution);
  });
}

// path, threads, grad_out, grad_lse, outs..., lses..., gradients of outs..., gradients of lses...
void backward(const ffi::AnyView* args, int32_t count) {
  constexpr int kFixed = 4;
  if (count < kFixed) TVM_FFI_THROW(TypeError) << "expected at least " << kFixed << " arguments, got " << count;
  const cpu::Isa isa = checked_path(args[0].cast<int64_t>());
  const cpu::Execution execution = checked_execution(args[1].cast<int64_t>());
  const TensorView grad_out = args[2].cast<TensorView>(), grad_lse = args[3].cast<TensorView>();
  if (grad_out.ndim() != 4)
    TVM_FFI_THROW(ValueError) << "grad_out must have 4 dimensions, got shape " << grad_out.shape();
  check_cpu(grad_out, "grad_out");
  check_lse(grad_lse, "grad_lse", grad_out);
  check_contiguous(grad_lse, "grad_lse");
  const Lists lists(args + kFixed, count - kFixed, 4);
  with_float_type(grad_out, "grad_out", [&](auto zero) {
    using T = decltype(zero);
    using Acc = typename Problem<T>::Acc;
    const Problem<T> problem(lists, grad_out);
    std::vector<cpu::MergeGradient<T>> gradients;
    for (int64_t i = 0; i < lists.parts; ++i) {
      const TensorView out = lists.at(2, i), lse = lists.at(3, i);
      check_like(out, "gradients of outs", grad_out);
      check_contiguous(out, "gradients of outs");
      check_lse(lse, "gradients of lses", grad_out);
      check_contiguous(lse, "gradients of lses");
      gradients.push_back({pointer<T>(out), pointer<Acc>(lse)});
    }
    cpu::merge_attention_backward<T>(problem.value, rows<T>(grad_out, "grad_out"), pointer<const Acc>(grad_lse),
                                     gradients.data(), isa, execution);
  });
}

}  // namespace
}  // namespace hici::bindings

// Written out, because the library's macro exports functions of a fixed number of arguments only.
#define HICI_EXPORT_VARIADIC(name, function)                                                                        \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny*) {      \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                      \
    function(reinterpret_cast<const ::tvm::ffi::AnyView*>(args), count);                                            \
    TVM_FFI_SAFE_CALL_END();                                                                                        \
  }
HICI_EXPORT_VARIADIC(merge_attention_forward, hici::bindings::forward)
HICI_EXPORT_VARIADIC(merge_attention_backward, hici::bindings::backward)
