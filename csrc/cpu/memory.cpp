#include "memory.h"

#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hici::cpu {
namespace {

constexpr int64_t kPage = int64_t{1} << 21;

}  // namespace

Memory::Memory(int64_t bytes) {
  if (bytes <= 0) return;
  const int64_t alignment = bytes >= 2 * kPage ? kPage : 64;
  const int64_t size = (bytes + alignment - 1) / alignment * alignment;
  data_ = std::aligned_alloc(alignment, size);
  if (!data_) throw std::bad_alloc();
  if (alignment == kPage) prefer_large_pages(data_, size);
}

Memory::~Memory() { std::free(data_); }

void prefer_large_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (bytes >= 2 * kPage && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace hici::cpu
