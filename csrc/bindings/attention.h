// attention: from tensors to the description the kernels take.
#pragma once

#include "../cpu/attention.h"
#include "execution.h"

namespace hici::bindings {

using MaybeTensor = ffi::Optional<TensorView>;

struct AttentionCall {
  cpu::AttentionProblem problem{};
  cpu::AttentionCut cut{};

  AttentionCall(const TensorView& q, const TensorView& k, const TensorView& v, int64_t segment_len,
                int64_t recurrence_len, const MaybeTensor& global_k, const MaybeTensor& global_v,
                const MaybeTensor& local_k, const MaybeTensor& local_v, const MaybeTensor& prefix_mask,
                const MaybeTensor& attention_mask, const MaybeTensor& cu_seqlens, bool causal, double scale);

  // x must be a tensor of q's shape and type, contiguous in its last dimension.
  cpu::Sequence4 like_q(const TensorView& x, const char* name) const;

 private:
  DLDataType type_;
};

}  // namespace hici::bindings
