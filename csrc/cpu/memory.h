// Scratch memory of one call.
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

}  // namespace hici::cpu
