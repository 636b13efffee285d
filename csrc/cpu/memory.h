// Scratch memory of one call, and pages of results.
#pragma once

#include <cstdint>

namespace hici::cpu {

// Uninitialised, aligned to 64 bytes, freed on leaving. Throws std::bad_alloc. Large pieces ask for large pages: kernels
// fill the second-level cache with scratch, and small pages, scattered in memory, would collide in it.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Asks the operating system to back [p, p + bytes) with large pages where nothing has been written yet: the first writing
// of 4 KiB pages costs several times what it costs to fill them. Changes no contents; a refusal costs speed only.
void prefer_large_pages(void* p, int64_t bytes);

}  // namespace hici::cpu
