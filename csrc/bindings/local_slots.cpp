#include "../cpu/local_slots.h"

#include "execution.h"

namespace hici::bindings {
namespace {

using MaybeTensor = ffi::Optional<TensorView>;

cpu::Element element_of(const TensorView& t, const char* name) {
  const DLDataType d = t.dtype();
  if (d == DLDataType{kDLFloat, 32, 1}) return cpu::Element::kFloat32;
  if (d == DLDataType{kDLBfloat, 16, 1}) return cpu::Element::kBfloat16;
  if (d == DLDataType{kDLFloat, 16, 1}) return cpu::Element::kFloat16;
  TVM_FFI_THROW(TypeError) << name << " must be float32, bfloat16 or float16";
}

void check_rows(const TensorView& t, const char* name, DLDataType type) {
  check_cpu(t, name);
  check_type(t, name, type);
  const int32_t last = t.ndim() - 1;
  bool empty = false;
  for (int32_t i = 0; i <= last; ++i) empty |= t.size(i) == 0;
  if (!empty && t.size(last) > 1 && t.stride(last) != 1)
    TVM_FFI_THROW(ValueError) << name << " must be contiguous in its last dimension";
}

struct Call {
  cpu::LocalSlotsProblem problem{};
  cpu::LocalSlotsCut cut{};
  DLDataType type;

  Call(const TensorView& hidden, const TensorView& queries, const TensorView& k_weight, const TensorView& v_weight,
       int64_t heads, int64_t segment_len, const MaybeTensor& attention_mask, const MaybeTensor& cu_seqlens,
       bool uniform)
      : type(hidden.dtype()) {
    cpu::LocalSlotsProblem& p = problem;
    p.element = element_of(hidden, "hidden");
    if (hidden.ndim() != 3) TVM_FFI_THROW(ValueError) << "hidden must have 3 dimensions, got shape " << hidden.shape();
    if (queries.ndim() != 2)
      TVM_FFI_THROW(ValueError) << "slot_queries must have 2 dimensions, got shape " << queries.shape();
    p.batch = hidden.size(0), p.length = hidden.size(1), p.channels = hidden.size(2);
    p.slots = queries.size(0), p.width = queries.size(1), p.heads = heads;
    if (p.channels < 1 || p.width < 1 || heads < 1 || p.width % heads)
      TVM_FFI_THROW(ValueError) << "num_heads must divide the width of slot_queries, got " << heads << " and "
                                << queries.shape();
    check_shape(k_weight, "k_weight", {p.width, p.channels});
    check_shape(v_weight, "v_weight", {p.width, p.channels});
    check_rows(hidden, "hidden", type);
    check_rows(queries, "slot_queries", type);
    check_rows(k_weight, "k_weight", type);
    check_rows(v_weight, "v_weight", type);
    p.hidden = pointer<const void>(hidden), p.queries = pointer<const void>(queries);
    p.k_weight = pointer<const void>(k_weight), p.v_weight = pointer<const void>(v_weight);
    p.hidden_batch = hidden.stride(0), p.hidden_token = hidden.stride(1);
    p.queries_row = queries.stride(0), p.k_row = k_weight.stride(0), p.v_row = v_weight.stride(0);
    p.uniform = uniform;

    if (segment_len < 0) TVM_FFI_THROW(ValueError) << "segment_len must not be negative, got " << segment_len;
    cut.segment_len = segment_len;
    const auto count = [&](int64_t length) {
      return segment_len > 0 ? length / segment_len + (length % segment_len > 0) : static_cast<int64_t>(length > 0);
    };
    if (cu_seqlens.has_value()) {
      const TensorView o = cu_seqlens.value();
      check_cpu(o, "cu_seqlens");
      check_type(o, "cu_seqlens", DLDataType{kDLInt, 32, 1});
      check_contiguous(o, "cu_seqlens");
      if (o.ndim() != 1 || o.size(0) < 1 || p.batch != 1)
        TVM_FFI_THROW(ValueError) << "cu_seqlens must be [docs+1] beside batch 1, got shape " << o.shape();
      cut.documents = pointer<const int32_t>(o);
      cut.document_count = o.size(0) - 1;
      for (int64_t d = 0; d < cut.document_count; ++d) {
        if (cut.documents[d + 1] < cut.documents[d]) TVM_FFI_THROW(ValueError) << "cu_seqlens must not decrease";
        p.segment_total += count(cut.documents[d + 1] - cut.documents[d]);
      }
      if (cut.documents[0] != 0 || cut.documents[cut.document_count] != p.length)
        TVM_FFI_THROW(ValueError) << "cu_seqlens must run from 0 to " << p.length;
    } else {
      p.segment_total = count(p.length);
    }
    if (attention_mask.has_value()) {
      const TensorView m = attention_mask.value();
      check_cpu(m, "attention_mask");
      check_type(m, "attention_mask", DLDataType{kDLBool, 8, 1});
      check_shape(m, "attention_mask", {p.batch, p.length});
      cut.mask = pointer<const unsigned char>(m);
      cut.mask_batch = m.stride(0), cut.mask_column = m.stride(1);
    }
  }

  void* written(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) const {
    check_cpu(t, name);
    check_type(t, name, type);
    check_contiguous(t, name);
    check_shape(t, name, shape);
    return pointer<void>(t);
  }
};

void forward(TensorView hidden, TensorView queries, TensorView k_weight, TensorView v_weight, int64_t heads,
             int64_t segment_len, MaybeTensor attention_mask, MaybeTensor cu_seqlens, bool uniform, TensorView out,
             int64_t path, int64_t threads) {
  const Call call(hidden, queries, k_weight, v_weight, heads, segment_len, attention_mask, cu_seqlens, uniform);
  const cpu::LocalSlotsProblem& p = call.problem;
  void* const to = call.written(out, "out", {p.batch, p.segment_total, p.slots, p.width});
  cpu::local_slots_forward(p, call.cut, to, checked_path(path), checked_execution(threads));
}

void backward(TensorView grad_out, TensorView hidden, TensorView queries, TensorView k_weight, TensorView v_weight,
              int64_t heads, int64_t segment_len, MaybeTensor attention_mask, MaybeTensor cu_seqlens, bool uniform,
              TensorView grad_hidden, TensorView grad_queries, TensorView grad_k_weight, TensorView grad_v_weight,
              int64_t path, int64_t threads) {
  const Call call(hidden, queries, k_weight, v_weight, heads, segment_len, attention_mask, cu_seqlens, uniform);
  const cpu::LocalSlotsProblem& p = call.problem;
  const void* const from = call.written(grad_out, "grad_out", {p.batch, p.segment_total, p.slots, p.width});
  const cpu::LocalSlotsGradients gradients{
      call.written(grad_hidden, "grad_hidden", {p.batch, p.length, p.channels}),
      call.written(grad_queries, "grad_queries", {p.slots, p.width}),
      call.written(grad_k_weight, "grad_k_weight", {p.width, p.channels}),
      call.written(grad_v_weight, "grad_v_weight", {p.width, p.channels}),
  };
  cpu::local_slots_backward(p, call.cut, from, gradients, checked_path(path), checked_execution(threads));
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(local_slots_forward, hici::bindings::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(local_slots_backward, hici::bindings::backward);
