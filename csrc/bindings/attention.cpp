#include "attention.h"

namespace hici::bindings {
namespace {

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

cpu::Sequence4 sequence(const TensorView& t, const char* name, DLDataType type) {
  if (t.ndim() != 4) TVM_FFI_THROW(ValueError) << name << " must have 4 dimensions, got shape " << t.shape();
  check_rows(t, name, type);
  return {pointer<const void>(t), t.stride(0), t.stride(1), t.stride(2)};
}

cpu::Slots slots(const MaybeTensor& k, const MaybeTensor& v, const char* k_name, const char* v_name, DLDataType type,
                 int64_t batch, int64_t segments, int64_t kv_heads, int64_t dim) {
  cpu::Slots s;
  if (k.has_value() != v.has_value()) TVM_FFI_THROW(ValueError) << k_name << " and " << v_name << " come together";
  if (!k.has_value()) return s;
  const TensorView tk = k.value(), tv = v.value();
  s.per_segment = tk.ndim() == 5;
  const int32_t at = s.per_segment ? 2 : 1;
  s.count = tk.ndim() > at ? tk.size(at) : 0;
  for (const auto& [t, name] : {std::pair{tk, k_name}, std::pair{tv, v_name}}) {
    if (s.per_segment)
      check_shape(t, name, {batch, segments, s.count, kv_heads, dim});
    else
      check_shape(t, name, {batch, s.count, kv_heads, dim});
    check_rows(t, name, type);
  }
  s.k = pointer<const void>(tk), s.v = pointer<const void>(tv);
  s.k_batch = tk.stride(0), s.v_batch = tv.stride(0);
  if (s.per_segment) s.k_segment = tk.stride(1), s.v_segment = tv.stride(1);
  s.k_slot = tk.stride(at), s.v_slot = tv.stride(at);
  s.k_head = tk.stride(at + 1), s.v_head = tv.stride(at + 1);
  return s;
}

}  // namespace

AttentionCall::AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v, int64_t segment_len,
                             int64_t recurrence_len, const MaybeTensor& global_k, const MaybeTensor& global_v,
                             const MaybeTensor& local_k, const MaybeTensor& local_v, const MaybeTensor& prefix_mask,
                             const MaybeTensor& attention_mask, const MaybeTensor& cu_seqlens, bool causal,
                             double scale)
    : type_(q.dtype()) {
  cpu::AttentionProblem& p = problem;
  p.element = element_of(q, "q");
  p.q = sequence(q, "q", type_), p.k = sequence(k, "k", type_), p.v = sequence(v, "v", type_);
  p.batch = q.size(0), p.queries = q.size(1), p.heads = q.size(2), p.dim = q.size(3);
  p.keys = k.size(1), p.kv_heads = k.size(2);
  check_shape(k, "k", {p.batch, p.keys, p.kv_heads, p.dim});
  check_shape(v, "v", {p.batch, p.keys, p.kv_heads, p.dim});
  if (p.queries > p.keys) TVM_FFI_THROW(ValueError) << "q has more positions than k";
  if (p.kv_heads < 1 || p.heads % p.kv_heads || p.dim < 1)
    TVM_FFI_THROW(ValueError) << "q has " << p.heads << " heads of " << p.dim << ", k " << p.kv_heads;
  p.causal = causal, p.scale = scale;

  if (segment_len < 0) TVM_FFI_THROW(ValueError) << "segment_len must not be negative";
  if (recurrence_len < 0 || (segment_len > 0 && recurrence_len > segment_len))
    TVM_FFI_THROW(ValueError) << "recurrence_len must be 0 to segment_len";
  cut.segment_len = segment_len;
  // without segments there is no previous one
  cut.recurrence_len = segment_len > 0 ? recurrence_len : 0;
  const auto count = [&](int64_t length) {
    return segment_len > 0 ? length / segment_len + (length % segment_len > 0) : static_cast<int64_t>(length > 0);
  };
  int64_t& segments = p.segment_total;
  segments = 0;
  if (cu_seqlens.has_value()) {
    const TensorView o = cu_seqlens.value();
    check_cpu(o, "cu_seqlens");
    check_type(o, "cu_seqlens", DLDataType{kDLInt, 32, 1});
    check_contiguous(o, "cu_seqlens");
    if (o.ndim() != 1 || o.size(0) < 1 || p.batch != 1 || p.queries != p.keys)
      TVM_FFI_THROW(ValueError) << "cu_seqlens must be [docs+1] beside batch 1, got shape " << o.shape();
    cut.documents = pointer<const int32_t>(o);
    cut.document_count = o.size(0) - 1;
    for (int64_t d = 0; d < cut.document_count; ++d) {
      if (cut.documents[d + 1] < cut.documents[d]) TVM_FFI_THROW(ValueError) << "cu_seqlens must not decrease";
      segments += count(cut.documents[d + 1] - cut.documents[d]);
    }
    if (cut.documents[0] != 0 || cut.documents[cut.document_count] != p.keys)
      TVM_FFI_THROW(ValueError) << "cu_seqlens must run from 0 to " << p.keys;
  } else {
    segments = count(p.keys);
  }

  p.global = slots(global_k, global_v, "global_k", "global_v", type_, p.batch, segments, p.kv_heads, p.dim);
  p.local = slots(local_k, local_v, "local_k", "local_v", type_, p.batch, segments, p.kv_heads, p.dim);
  if (local_k.has_value() && !p.local.per_segment)
    TVM_FFI_THROW(ValueError) << "local_k must have 5 dimensions, got shape " << local_k.value().shape();

  if (prefix_mask.has_value()) {
    const TensorView m = prefix_mask.value();
    check_cpu(m, "prefix_mask");
    check_type(m, "prefix_mask", DLDataType{kDLBool, 8, 1});
    if (m.ndim() == 1)
      check_shape(m, "prefix_mask", {segments});
    else
      check_shape(m, "prefix_mask", {p.batch, segments});
    cut.prefix_mask = pointer<const bool>(m);
    cut.prefix_batch = m.ndim() == 1 ? 0 : m.stride(0);
    cut.prefix_segment = m.stride(m.ndim() - 1);
  }
  if (attention_mask.has_value()) {
    const TensorView m = attention_mask.value();
    check_cpu(m, "attention_mask");
    check_type(m, "attention_mask", DLDataType{kDLBool, 8, 1});
    check_shape(m, "attention_mask", {p.batch, p.keys});
    cut.mask = pointer<const unsigned char>(m);
    cut.mask_batch = m.stride(0), cut.mask_column = m.stride(1);
  }
}

cpu::Sequence4 AttentionCall::like_q(const TensorView& x, const char* name) const {
  check_shape(x, name, {problem.batch, problem.queries, problem.heads, problem.dim});
  return sequence(x, name, type_);
}

namespace {

void check_lse(const TensorView& x, const char* name, const cpu::AttentionProblem& p) {
  check_cpu(x, name);
  check_type(x, name, DLDataType{kDLFloat, 32, 1});
  check_contiguous(x, name);
  check_shape(x, name, {p.batch, p.heads, p.queries});
}

void forward(TensorView q, TensorView k, TensorView v, int64_t segment_len, int64_t recurrence_len,
             MaybeTensor global_k, MaybeTensor global_v, MaybeTensor local_k, MaybeTensor local_v,
             MaybeTensor prefix_mask, MaybeTensor attention_mask, MaybeTensor cu_seqlens, bool causal, double scale,
             TensorView out, TensorView lse, int64_t path, int64_t threads) {
  const AttentionCall call(q, k, v, segment_len, recurrence_len, global_k, global_v, local_k, local_v, prefix_mask,
                           attention_mask, cu_seqlens, causal, scale);
  call.like_q(out, "out");
  check_contiguous(out, "out");
  check_lse(lse, "lse", call.problem);
  cpu::attention_forward(call.problem, call.cut, pointer<void>(out), pointer<float>(lse), checked_path(path),
                         checked_execution(threads));
}

// A gradient shaped like `input`, absent together with it.
void* gradient(const MaybeTensor& x, const char* name, const MaybeTensor& input, DLDataType type) {
  if (!input.has_value()) return nullptr;
  if (!x.has_value()) TVM_FFI_THROW(ValueError) << name << " is missing";
  const TensorView g = x.value(), like = input.value();
  check_cpu(g, name);
  check_type(g, name, type);
  check_contiguous(g, name);
  bool same = g.ndim() == like.ndim();
  for (int32_t i = 0; same && i < g.ndim(); ++i) same = g.size(i) == like.size(i);
  if (!same) TVM_FFI_THROW(ValueError) << name << " has shape " << g.shape() << ", expected " << like.shape();
  return pointer<void>(g);
}

void backward(TensorView grad_out, TensorView grad_lse, TensorView out, TensorView lse, TensorView q, TensorView k,
              TensorView v, int64_t segment_len, int64_t recurrence_len, MaybeTensor global_k, MaybeTensor global_v,
              MaybeTensor local_k, MaybeTensor local_v, MaybeTensor prefix_mask, MaybeTensor attention_mask,
              MaybeTensor cu_seqlens, bool causal, double scale, TensorView grad_q, TensorView grad_k,
              TensorView grad_v, MaybeTensor grad_global_k, MaybeTensor grad_global_v, MaybeTensor grad_local_k,
              MaybeTensor grad_local_v, int64_t path, int64_t threads) {
  const AttentionCall call(q, k, v, segment_len, recurrence_len, global_k, global_v, local_k, local_v, prefix_mask,
                           attention_mask, cu_seqlens, causal, scale);
  const cpu::Sequence4 grad = call.like_q(grad_out, "grad_out");
  call.like_q(out, "out");
  check_contiguous(out, "out");
  check_lse(lse, "lse", call.problem);
  check_lse(grad_lse, "grad_lse", call.problem);
  const DLDataType type = q.dtype();
  const cpu::AttentionGradients gradients{
      gradient(grad_q, "grad_q", q, type),
      gradient(grad_k, "grad_k", k, type),
      gradient(grad_v, "grad_v", v, type),
      gradient(grad_global_k, "grad_global_k", global_k, type),
      gradient(grad_global_v, "grad_global_v", global_v, type),
      gradient(grad_local_k, "grad_local_k", local_k, type),
      gradient(grad_local_v, "grad_local_v", local_v, type),
  };
  cpu::attention_backward(call.problem, call.cut, grad, pointer<const float>(grad_lse), pointer<const void>(out),
                          pointer<const float>(lse), gradients, checked_path(path), checked_execution(threads));
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_forward, hici::bindings::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_backward, hici::bindings::backward);
