#include "memory.h"

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hici::cpu {

Memory::Memory(int64_t bytes) {
  if (bytes <= 0) return;
  constexpr int64_t kPage = int64_t{1} << 21;
  const int64_t alignment = bytes >= 2 * kPage ? kPage : 64;
  const int64_t size = (bytes + alignment - 1) / alignment * alignment;
  data_ = std::aligned_alloc(alignment, size);
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kPage) madvise(data_, size, MADV_HUGEPAGE);  // a refusal costs speed only
#endif
}

Memory::~Memory() { std::free(data_); }

}  // namespace hici::cpu
