// The path a file under kernels/ is being compiled for. The build defines HICI_PATH as the path's namespace and one of
// HICI_PATH_AVX512, HICI_PATH_AVX512_BF16, HICI_PATH_AMX for each instruction set it may use.
//
// Everything a kernel file defines lies in this namespace, and it uses no templates or inline functions of the standard
// library: the linker keeps one copy of such a function for the whole library, and could keep the one compiled for a
// processor this is not.
#pragma once

#if !defined(HICI_PATH)
#error "files under kernels/ are compiled once per path, with HICI_PATH defined"
#endif

#include <cstddef>
#include <cstdint>

// For functions that only prefetch: GCC takes such a function for one without effect and leaves out its calls.
#if defined(__GNUC__)
#define HICI_ASK __attribute__((always_inline)) inline
#else
#define HICI_ASK inline
#endif

namespace hici::cpu::HICI_PATH {

// The smallest page of memory an address is looked up by.
constexpr int64_t kPageBytes = 4096;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class T>
inline void swap(T& a, T& b) {
  const T c = a;
  a = b, b = c;
}

// Scratch memory, cut from one allocation: 64-byte aligned pieces.
class Carve {
 public:
  explicit Carve(void* base) : at_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    at_ = (at_ + 63) & ~uintptr_t{63};
    T* const p = reinterpret_cast<T*>(at_);
    at_ += static_cast<uintptr_t>(count) * sizeof(T);
    return p;
  }
  // bytes taken so far by a Carve that started at 0, with room to align a base that is not
  int64_t bytes() const { return static_cast<int64_t>(at_) + 64; }

 private:
  uintptr_t at_;
};

}  // namespace hici::cpu::HICI_PATH
