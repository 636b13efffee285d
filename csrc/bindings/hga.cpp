// hga_summaries, hga_route, hga_attention: from tensors to the descriptions the kernels take.
#include <algorithm>
#include <limits>

#include "../cpu/hga_attention.h"
#include "../cpu/hga_history.h"
#include "../cpu/hga_route.h"
#include "../cpu/hga_summaries.h"
#include "../cpu/memory.h"
#include "execution.h"

namespace hici::bindings {
namespace {

using MaybeTensor = ffi::Optional<TensorView>;
constexpr DLDataType kUInt8{kDLUInt, 8, 1}, kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1}, kFloat32{kDLFloat, 32, 1}, kFloat64{kDLFloat, 64, 1};

cpu::Element element_of(const TensorView& t, const char* name) {
  const DLDataType d = t.dtype();
  if (d == DLDataType{kDLFloat, 32, 1}) return cpu::Element::kFloat32;
  if (d == DLDataType{kDLBfloat, 16, 1}) return cpu::Element::kBfloat16;
  if (d == DLDataType{kDLFloat, 16, 1}) return cpu::Element::kFloat16;
  TVM_FFI_THROW(TypeError) << name << " must be float32, bfloat16 or float16";
}

// On the CPU, of this type, with adjacent elements in the last dimension.
void check_rows(const TensorView& t, const char* name, DLDataType type, int32_t dims) {
  if (t.ndim() != dims) TVM_FFI_THROW(ValueError) << name << " must have " << dims << " dimensions, got shape " << t.shape();
  check_cpu(t, name);
  check_type(t, name, type);
  bool empty = false;
  for (int32_t i = 0; i < dims; ++i) empty |= t.size(i) == 0;
  if (!empty && t.size(dims - 1) > 1 && t.stride(dims - 1) != 1)
    TVM_FFI_THROW(ValueError) << name << " must be contiguous in its last dimension";
}

cpu::Sequence4 sequence(const TensorView& t, const char* name, DLDataType type) {
  check_rows(t, name, type, 4);
  return {pointer<const void>(t), t.stride(0), t.stride(1), t.stride(2)};
}

void positive(int64_t x, const char* name) {
  if (x < 1) TVM_FFI_THROW(ValueError) << name << " must be at least 1, got " << x;
}
void natural(int64_t x, const char* name) {
  if (x < 0) TVM_FFI_THROW(ValueError) << name << " must not be negative, got " << x;
}

// int64 [batch, count], contiguous; null if absent.
const int64_t* indices(const MaybeTensor& x, const char* name, int64_t batch, int64_t count) {
  if (!x.has_value()) return nullptr;
  const TensorView t = x.value();
  check_cpu(t, name);
  check_type(t, name, kInt64);
  check_shape(t, name, {batch, count});
  check_contiguous(t, name);
  return pointer<const int64_t>(t);
}

// Columns are read as addresses.
const int64_t* columns_of(const MaybeTensor& x, int64_t batch, int64_t keys) {
  const int64_t* const found = indices(x, "columns", batch, keys);
  for (int64_t i = 0; found && i < batch * keys; ++i)
    if (found[i] < 0 || found[i] >= keys) TVM_FFI_THROW(ValueError) << "columns must be below " << keys;
  return found;
}

void summaries(TensorView k, TensorView inv_freq, MaybeTensor positions, MaybeTensor columns, int64_t chunk_size,
               int64_t group_size, TensorView chunk_keys, TensorView group_keys, int64_t path, int64_t threads) {
  cpu::SummaryProblem p{};
  const DLDataType type = k.dtype();
  p.element = element_of(k, "k");
  p.k = sequence(k, "k", type);
  p.batch = k.size(0), p.keys = k.size(1), p.heads = k.size(2), p.dim = k.size(3);
  positive(chunk_size, "chunk_size");
  positive(group_size, "group_size");
  if (chunk_size % group_size) TVM_FFI_THROW(ValueError) << "group_size must divide chunk_size";
  p.chunk = chunk_size, p.group = group_size;
  check_rows(inv_freq, "inv_freq", kFloat64, 1);
  p.inv_freq = pointer<const double>(inv_freq), p.half = inv_freq.size(0);
  if (p.dim < 1 || 2 * p.half > p.dim) TVM_FFI_THROW(ValueError) << "inv_freq has " << p.half << " entries, k head_dim " << p.dim;
  if (positions.has_value()) {
    const TensorView t = positions.value();
    check_cpu(t, "positions");
    check_type(t, "positions", kInt64);
    check_shape(t, "positions", {p.batch, p.keys});
    p.positions = pointer<const int64_t>(t), p.position_batch = t.stride(0), p.position_key = t.stride(1);
  }
  p.columns = columns_of(columns, p.batch, p.keys);
  check_rows(chunk_keys, "chunk_keys", type, 4);
  check_shape(chunk_keys, "chunk_keys", {p.batch, p.chunks(), p.heads, p.dim});
  check_rows(group_keys, "group_keys", type, 5);
  check_shape(group_keys, "group_keys", {p.batch, p.chunks(), p.groups(), p.heads, p.dim});
  p.chunk_keys = pointer<void>(chunk_keys), p.group_keys = pointer<void>(group_keys);
  p.chunk_batch = chunk_keys.stride(0), p.chunk_step = chunk_keys.stride(1), p.chunk_head = chunk_keys.stride(2);
  p.group_batch = group_keys.stride(0), p.group_chunk = group_keys.stride(1), p.group_step = group_keys.stride(2);
  p.group_head = group_keys.stride(3);
  cpu::hga_summaries(p, checked_path(path), checked_execution(threads));
}

void route(TensorView q, TensorView chunk_keys, TensorView group_keys, MaybeTensor positions, int64_t context,
           int64_t chunk_size, int64_t keep_first, int64_t keep_last, int64_t topk_chunks, int64_t topk_groups,
           int64_t routing, int64_t route_block, bool share_kv, MaybeTensor super_keys, int64_t super_chunk,
           int64_t topk_supers, TensorView routes, int64_t path, int64_t threads) {
  cpu::RouteProblem p{};
  const DLDataType type = q.dtype();
  p.element = element_of(q, "q");
  p.q = sequence(q, "q", type);
  p.batch = q.size(0), p.queries = q.size(1), p.heads = q.size(2), p.dim = q.size(3);
  check_rows(chunk_keys, "chunk_keys", type, 4);
  check_rows(group_keys, "group_keys", type, 5);
  p.chunks = chunk_keys.size(1), p.kv_heads = chunk_keys.size(2), p.groups = group_keys.size(2);
  check_shape(chunk_keys, "chunk_keys", {p.batch, p.chunks, p.kv_heads, p.dim});
  check_shape(group_keys, "group_keys", {p.batch, p.chunks, p.groups, p.kv_heads, p.dim});
  if (p.kv_heads < 1 || p.heads % p.kv_heads || p.dim < 1 || p.groups < 1)
    TVM_FFI_THROW(ValueError) << "q has " << p.heads << " heads of " << p.dim << ", chunk_keys " << p.kv_heads;
  p.chunk_keys = pointer<const void>(chunk_keys), p.group_keys = pointer<const void>(group_keys);
  p.chunk_batch = chunk_keys.stride(0), p.chunk_step = chunk_keys.stride(1), p.chunk_head = chunk_keys.stride(2);
  p.group_batch = group_keys.stride(0), p.group_chunk = group_keys.stride(1), p.group_step = group_keys.stride(2);
  p.group_head = group_keys.stride(3);
  p.positions = indices(positions, "positions", p.batch, p.queries);
  p.position_batch = p.queries, p.position_query = 1;
  positive(chunk_size, "chunk_size");
  positive(route_block, "route_block");
  for (const auto& [x, name] : {std::pair{context, "context"}, std::pair{keep_first, "keep_first"}, std::pair{keep_last, "keep_last"},
                                std::pair{topk_chunks, "topk_chunks"}, std::pair{topk_groups, "topk_groups"}})
    natural(x, name);
  if (context > p.queries) TVM_FFI_THROW(ValueError) << "context must be at most " << p.queries << ", got " << context;
  if (routing < 0 || routing > 2) TVM_FFI_THROW(ValueError) << "routing must be 0 to 2, got " << routing;
  if (p.chunks * p.groups > std::numeric_limits<int32_t>::max() || p.queries > std::numeric_limits<int32_t>::max())
    TVM_FFI_THROW(ValueError) << "group ids must fit 32 bits, got " << p.chunks * p.groups << " groups";
  p.context = context, p.chunk_size = chunk_size, p.keep_first = keep_first, p.keep_last = keep_last;
  p.topk_chunks = topk_chunks, p.topk_groups = topk_groups, p.routing = static_cast<cpu::Routing>(routing);
  p.route_block = route_block, p.share = share_kv;
  if (super_keys.has_value()) {
    const TensorView t = super_keys.value();
    positive(super_chunk, "super_chunk");
    natural(topk_supers, "topk_supers");
    if (routing != 0) TVM_FFI_THROW(ValueError) << "super_keys serve strict routing only";
    check_rows(t, "super_keys", type, 4);
    check_shape(t, "super_keys", {p.batch, p.chunks / super_chunk, p.kv_heads, p.dim});
    p.super_keys = pointer<const void>(t), p.super_chunk = super_chunk, p.topk_supers = topk_supers;
    p.super_batch = t.stride(0), p.super_step = t.stride(1), p.super_head = t.stride(2);
  }
  check_cpu(routes, "routes");
  check_type(routes, "routes", kInt32);
  check_contiguous(routes, "routes");
  check_shape(routes, "routes", {p.batch, p.queries - context, p.heads, p.width()});
  cpu::hga_route(p, pointer<int32_t>(routes), checked_path(path), checked_execution(threads));
}

struct RoutedCall {
  cpu::RoutedProblem problem{};
  DLDataType type;

  RoutedCall(const TensorView& q, const TensorView& k, const TensorView& v, const MaybeTensor& positions,
             const MaybeTensor& columns, const TensorView& routes, int64_t group_size, int64_t chunk_size,
             int64_t keep_first, int64_t keep_last, double scale)
      : type(q.dtype()) {
    cpu::RoutedProblem& p = problem;
    p.element = element_of(q, "q");
    p.q = sequence(q, "q", type), p.k = sequence(k, "k", type), p.v = sequence(v, "v", type);
    p.batch = q.size(0), p.queries = q.size(1), p.heads = q.size(2), p.dim = q.size(3);
    p.keys = k.size(1), p.kv_heads = k.size(2);
    check_shape(k, "k", {p.batch, p.keys, p.kv_heads, p.dim});
    check_shape(v, "v", {p.batch, p.keys, p.kv_heads, p.dim});
    if (p.kv_heads < 1 || p.heads % p.kv_heads || p.dim < 1)
      TVM_FFI_THROW(ValueError) << "q has " << p.heads << " heads of " << p.dim << ", k " << p.kv_heads;
    if (!positions.has_value() && p.queries > p.keys) TVM_FFI_THROW(ValueError) << "q has more positions than k";
    if (p.queries > std::numeric_limits<int32_t>::max() / p.heads) TVM_FFI_THROW(ValueError) << "q has too many positions";
    p.positions = indices(positions, "positions", p.batch, p.queries);
    p.columns = columns_of(columns, p.batch, p.keys);
    positive(chunk_size, "chunk_size");
    positive(group_size, "group_size");
    natural(keep_first, "keep_first");
    natural(keep_last, "keep_last");
    if (chunk_size % group_size) TVM_FFI_THROW(ValueError) << "group_size must divide chunk_size";
    p.group_size = group_size, p.chunk_size = chunk_size, p.keep_first = keep_first, p.keep_last = keep_last;
    p.scale = static_cast<float>(scale);
    check_cpu(routes, "routes");
    check_type(routes, "routes", kInt32);
    check_contiguous(routes, "routes");
    p.width = routes.ndim() == 4 ? routes.size(3) : 0;
    check_shape(routes, "routes", {p.batch, p.queries, p.heads, p.width});
    p.routes = pointer<const int32_t>(routes);
  }

  void* like(const TensorView& t, const char* name, const TensorView& other) const {
    check_cpu(t, name);
    check_type(t, name, type);
    check_contiguous(t, name);
    check_shape(t, name, {other.size(0), other.size(1), other.size(2), other.size(3)});
    return pointer<void>(t);
  }
};

float* lse_of(const TensorView& t, const char* name, int64_t batch, int64_t heads, int64_t queries) {
  check_cpu(t, name);
  check_type(t, name, kFloat32);
  check_contiguous(t, name);
  check_shape(t, name, {batch, heads, queries});
  return pointer<float>(t);
}

void attention_forward(TensorView q, TensorView k, TensorView v, MaybeTensor positions, MaybeTensor columns,
                       TensorView routes, int64_t group_size, int64_t chunk_size, int64_t keep_first,
                       int64_t keep_last, double scale, TensorView out, TensorView lse, int64_t path,
                       int64_t threads) {
  const RoutedCall call(q, k, v, positions, columns, routes, group_size, chunk_size, keep_first, keep_last, scale);
  const cpu::RoutedProblem& p = call.problem;
  cpu::hga_attention_forward(p, call.like(out, "out", q), lse_of(lse, "lse", p.batch, p.heads, p.queries),
                             checked_path(path), checked_execution(threads));
}

void attention_backward(TensorView grad_out, TensorView grad_lse, TensorView out, TensorView lse, TensorView q,
                        TensorView k, TensorView v, MaybeTensor positions, MaybeTensor columns, TensorView routes,
                        int64_t group_size, int64_t chunk_size, int64_t keep_first, int64_t keep_last, double scale,
                        TensorView grad_q, TensorView grad_k, TensorView grad_v, int64_t path, int64_t threads) {
  const RoutedCall call(q, k, v, positions, columns, routes, group_size, chunk_size, keep_first, keep_last, scale);
  const cpu::RoutedProblem& p = call.problem;
  check_shape(grad_out, "grad_out", {p.batch, p.queries, p.heads, p.dim});
  const cpu::Sequence4 grad = sequence(grad_out, "grad_out", call.type);
  const cpu::RoutedGradients gradients{call.like(grad_q, "grad_q", q), call.like(grad_k, "grad_k", k),
                                       call.like(grad_v, "grad_v", v)};
  cpu::hga_attention_backward(p, grad, lse_of(grad_lse, "grad_lse", p.batch, p.heads, p.queries),
                              call.like(out, "out", q), lse_of(lse, "lse", p.batch, p.heads, p.queries), gradients,
                              checked_path(path), checked_execution(threads));
}

const int64_t* list_of(const TensorView& t, const char* name, int64_t count) {
  check_cpu(t, name);
  check_type(t, name, kInt64);
  check_shape(t, name, {count});
  check_contiguous(t, name);
  return pointer<const int64_t>(t);
}

void pages_forward(TensorView q, TensorView k_pages, TensorView v_pages, TensorView chunks, TensorView offsets,
                   TensorView positions, TensorView routes, int64_t kv_heads, int64_t group_size, int64_t chunk_size,
                   int64_t keep_first, int64_t keep_last, int64_t k_token, int64_t v_token, double scale, TensorView out,
                   TensorView lse, int64_t path, int64_t threads) {
  cpu::PageProblem p{};
  const DLDataType type = q.dtype();
  p.element = element_of(q, "q");
  p.q = sequence(q, "q", type);
  p.batch = q.size(0), p.queries = q.size(1), p.heads = q.size(2), p.dim = q.size(3), p.kv_heads = kv_heads;
  if (kv_heads < 1 || p.heads % kv_heads || p.dim < 1)
    TVM_FFI_THROW(ValueError) << "q has " << p.heads << " heads of " << p.dim << ", expected a multiple of " << kv_heads;
  if (p.queries > std::numeric_limits<int32_t>::max() / p.heads) TVM_FFI_THROW(ValueError) << "q has too many positions";
  positive(chunk_size, "chunk_size");
  positive(group_size, "group_size");
  natural(keep_first, "keep_first");
  natural(keep_last, "keep_last");
  if (chunk_size % group_size) TVM_FFI_THROW(ValueError) << "group_size must divide chunk_size";
  p.group_size = group_size, p.chunk_size = chunk_size, p.keep_first = keep_first, p.keep_last = keep_last;
  if (k_pages.ndim() != 1) TVM_FFI_THROW(ValueError) << "k_pages must have 1 dimension, got shape " << k_pages.shape();
  p.page_count = k_pages.size(0), p.k_token = k_token, p.v_token = v_token;
  p.k_pages = list_of(k_pages, "k_pages", p.page_count), p.v_pages = list_of(v_pages, "v_pages", p.page_count);
  p.chunks = list_of(chunks, "chunks", p.page_count);
  p.offsets = list_of(offsets, "offsets", p.batch * kv_heads + 1);
  if (p.offsets[0] != 0 || p.offsets[p.batch * kv_heads] != p.page_count)
    TVM_FFI_THROW(ValueError) << "offsets must run from 0 to " << p.page_count;
  // groups of all chunks have ids in routes
  const int64_t most = std::numeric_limits<int32_t>::max() / (chunk_size / group_size);
  for (int64_t i = 0; i < p.batch * kv_heads; ++i) {
    if (p.offsets[i + 1] < p.offsets[i] || p.offsets[i + 1] > p.page_count)
      TVM_FFI_THROW(ValueError) << "offsets must not decrease";
    for (int64_t x = p.offsets[i], before = -1; x < p.offsets[i + 1]; before = p.chunks[x++])
      if (p.chunks[x] <= before || p.chunks[x] >= most)
        TVM_FFI_THROW(ValueError) << "chunks of a list must ascend from 0 to less than " << most << ", got " << p.chunks[x]
                                  << " after " << before;
  }
  p.positions = indices(positions, "positions", p.batch, p.queries);
  check_cpu(routes, "routes");
  check_type(routes, "routes", kInt32);
  check_contiguous(routes, "routes");
  p.width = routes.ndim() == 4 ? routes.size(3) : 0;
  check_shape(routes, "routes", {p.batch, p.queries, p.heads, p.width});
  p.routes = pointer<const int32_t>(routes);
  p.scale = static_cast<float>(scale);
  check_cpu(out, "out");
  p.wide = element_of(out, "out") == cpu::Element::kFloat32;
  if (!p.wide) check_type(out, "out", type);
  check_contiguous(out, "out");
  check_shape(out, "out", {p.batch, p.queries, p.heads, p.dim});
  cpu::hga_pages_forward(p, pointer<void>(out), lse_of(lse, "lse", p.batch, p.heads, p.queries), checked_path(path),
                         checked_execution(threads));
}

// [B, tokens, kv_heads, D] of a buffer, of which rows hold at least `needed` tokens.
cpu::HistoryBuffer buffer_of(const TensorView& t, const char* name, int64_t batch, int64_t kv_heads, int64_t needed,
                             int64_t token) {
  check_rows(t, name, t.dtype(), 4);
  if (t.size(0) != batch || t.size(2) != kv_heads || t.size(1) < needed)
    TVM_FFI_THROW(ValueError) << name << " has shape " << t.shape() << ", expected at least " << needed << " tokens";
  const int64_t size = t.dtype().bits / 8;
  if (needed > 1 && t.stride(1) * size != token) TVM_FFI_THROW(ValueError) << name << " must have tokens side by side";
  return {reinterpret_cast<int64_t>(pointer<char>(t)), t.stride(0) * size, t.stride(2) * size};
}

template <class T>
void fill(const TensorView& t, const char* name, const std::vector<T>& from) {
  check_cpu(t, name);
  check_type(t, name, kInt64);
  check_contiguous(t, name);
  if (t.numel() < static_cast<int64_t>(from.size())) TVM_FFI_THROW(ValueError) << name << " has no room for " << from.size();
  std::copy(from.begin(), from.end(), pointer<T>(t));
}

// counts: pages of all lists, of which in records.
void history_pages(TensorView routes, TensorView positions, TensorView base, TensorView records, int64_t pages,
                   int64_t chunk_size, int64_t group_size, int64_t keep_first, int64_t keep_last, MaybeTensor sinks_k,
                   MaybeTensor sinks_v, TensorView tail_k, TensorView tail_v, TensorView k, TensorView v, TensorView chunks,
                   TensorView offsets, TensorView at, TensorView number, TensorView counts) {
  cpu::HistoryProblem p{};
  check_cpu(routes, "routes");
  check_type(routes, "routes", kInt32);
  check_contiguous(routes, "routes");
  if (routes.ndim() != 4) TVM_FFI_THROW(ValueError) << "routes must have 4 dimensions, got shape " << routes.shape();
  p.batch = routes.size(0), p.queries = routes.size(1), p.heads = routes.size(2), p.width = routes.size(3);
  check_rows(tail_k, "tail_k", tail_k.dtype(), 4);
  p.kv_heads = tail_k.size(2);
  if (p.kv_heads < 1 || p.heads % p.kv_heads) TVM_FFI_THROW(ValueError) << "routes has " << p.heads << " heads";
  positive(chunk_size, "chunk_size");
  positive(group_size, "group_size");
  natural(keep_first, "keep_first");
  natural(keep_last, "keep_last");
  if (chunk_size % group_size) TVM_FFI_THROW(ValueError) << "group_size must divide chunk_size";
  p.chunk_size = chunk_size, p.group_size = group_size, p.keep_first = keep_first, p.keep_last = keep_last;
  p.token = tail_k.size(3) * tail_k.dtype().bits / 8;
  p.routes = pointer<const int32_t>(routes);
  p.positions = indices(positions, "positions", p.batch, p.queries);
  p.base = list_of(base, "base", p.batch);
  if (records.ndim() != 2) TVM_FFI_THROW(ValueError) << "records must have 2 dimensions, got shape " << records.shape();
  p.chunks = records.size(1), p.pages = pages;
  p.records = indices(records, "records", p.batch, p.chunks);
  int64_t in_sinks = 0, in_tail = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    natural(p.base[b], "base");
    in_sinks = std::max(in_sinks, std::min(p.base[b], keep_first) * chunk_size);
    for (int64_t t = 0; t < p.queries; ++t) {
      const int64_t position = p.positions[b * p.queries + t];
      if (position < 0) continue;
      const int64_t n = position / chunk_size, window = std::min(std::max(keep_first, n - keep_last), n);
      if (p.base[b] > n || (p.base[b] > keep_first && p.base[b] > window))
        TVM_FFI_THROW(ValueError) << "position " << position << " does not lie in a tail from chunk " << p.base[b];
      in_tail = std::max(in_tail, position + 1 - p.base[b] * chunk_size);
    }
  }
  p.tail[0] = buffer_of(tail_k, "tail_k", p.batch, p.kv_heads, in_tail, p.token);
  p.tail[1] = buffer_of(tail_v, "tail_v", p.batch, p.kv_heads, in_tail, p.token);
  if (in_sinks > 0) {
    if (!sinks_k.has_value() || !sinks_v.has_value()) TVM_FFI_THROW(ValueError) << "sinks are missing";
    p.sinks[0] = buffer_of(sinks_k.value(), "sinks_k", p.batch, p.kv_heads, in_sinks, p.token);
    p.sinks[1] = buffer_of(sinks_v.value(), "sinks_v", p.batch, p.kv_heads, in_sinks, p.token);
  }
  const cpu::HistoryPages found = cpu::hga_history_pages(p);
  if (found.missing) TVM_FFI_THROW(ValueError) << "routes name a chunk that no record holds";
  fill(k, "k", found.k), fill(v, "v", found.v), fill(chunks, "chunks", found.chunks);
  fill(offsets, "offsets", found.offsets);
  fill(at, "at", found.at), fill(number, "number", found.number);
  const std::vector<int64_t> sizes{static_cast<int64_t>(found.k.size()), static_cast<int64_t>(found.at.size())};
  fill(counts, "counts", sizes);
}

// Memory that is read in pieces from anywhere wants large pages.
void large_pages(TensorView memory) {
  check_cpu(memory, "memory");
  check_contiguous(memory, "memory");
  cpu::prefer_large_pages(pointer<void>(memory), memory.numel() * memory.dtype().bits / 8);
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_summaries, hici::bindings::summaries);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_route, hici::bindings::route);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_attention_forward, hici::bindings::attention_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_attention_backward, hici::bindings::attention_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_pages_forward, hici::bindings::pages_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_history_pages, hici::bindings::history_pages);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hga_large_pages, hici::bindings::large_pages);
