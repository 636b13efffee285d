// The instruction sets a kernel is compiled for, and which of them this processor runs.
//
// Files under kernels/ are compiled once per path with its compiler flags, each into a namespace of the path's name;
// everything else is compiled for the oldest machine the library may meet.
#pragma once

#include <vector>

// Calls run(namespace function) of every path that was built: X(enumerator, name, namespace).
#if defined(HICI_HAVE_AVX512)
#define HICI_PATHS_AVX512(X) X(kAvx512, "avx512", avx512)
#else
#define HICI_PATHS_AVX512(X)
#endif
#if defined(HICI_HAVE_AVX512_BF16)
#define HICI_PATHS_AVX512_BF16(X) X(kAvx512Bf16, "avx512_bf16", avx512_bf16)
#else
#define HICI_PATHS_AVX512_BF16(X)
#endif
#if defined(HICI_HAVE_AMX)
#define HICI_PATHS_AMX(X) X(kAmx, "amx", amx)
#else
#define HICI_PATHS_AMX(X)
#endif
#define HICI_PATHS(X) \
  X(kBase, "base", base) HICI_PATHS_AVX512(X) HICI_PATHS_AVX512_BF16(X) HICI_PATHS_AMX(X)

namespace hici::cpu {

// kBase: AVX2 with FMA on x86-64, the compiler's default elsewhere. Each path includes the ones before it.
enum class Isa : int { kBase = 0, kAvx512 = 1, kAvx512Bf16 = 2, kAmx = 3 };

const char* name(Isa isa);

// Paths that were built and that this processor and operating system run, slowest first. The first call asks the
// operating system for the use of tile registers.
const std::vector<Isa>& runnable();

}  // namespace hici::cpu
