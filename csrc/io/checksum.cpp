#include "checksum.h"

#include <array>
#include <cstring>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace hici::io {
namespace {

uint64_t load(const unsigned char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__SSE4_2__)
uint32_t step(uint32_t crc, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(crc, word)); }
uint32_t step(uint32_t crc, unsigned char byte) { return _mm_crc32_u8(crc, byte); }
#elif defined(__ARM_FEATURE_CRC32)
uint32_t step(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
uint32_t step(uint32_t crc, unsigned char byte) { return __crc32cb(crc, byte); }
#else
constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0x82f63b78u ^ (c >> 1) : c >> 1;
    table[i] = c;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kTable = make_table();
uint32_t step(uint32_t crc, unsigned char byte) { return kTable[(crc ^ byte) & 255] ^ (crc >> 8); }
uint32_t step(uint32_t crc, uint64_t word) {
  for (int i = 0; i < 8; ++i) crc = step(crc, static_cast<unsigned char>(word >> (8 * i)));
  return crc;
}
#endif

// A one-to-one scramble of 64 bits (the last steps of MurmurHash3). Lanes must not be joined by another CRC: it is linear,
// so two flipped bits could cancel.
uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdu;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53u;
  return h ^ (h >> 33);
}

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, int64_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; bytes >= 8; p += 8, bytes -= 8) crc = step(crc, load(p));
  for (; bytes > 0; ++p, --bytes) crc = step(crc, *p);
  return ~crc;
}

uint64_t checksum(const void* data, int64_t bytes, const int64_t* identity, int words) {
  const auto* p = static_cast<const unsigned char*>(data);
  const int64_t lane = bytes / 32 * 8;
  uint32_t c[4] = {~0u, ~0u, ~0u, ~0u};
  for (int64_t i = 0; i < lane; i += 8)
    for (int k = 0; k < 4; ++k) c[k] = step(c[k], load(p + k * lane + i));
  c[3] = crc32c(c[3], p + 4 * lane, bytes - 4 * lane);
  uint64_t h = static_cast<uint64_t>(bytes);
  for (int i = 0; i < words; ++i) h = mix(h ^ static_cast<uint64_t>(identity[i]));
  for (int k = 0; k < 4; ++k) h = mix(h ^ (static_cast<uint64_t>(c[k]) << 2 | static_cast<uint64_t>(k)));
  return h;
}

}  // namespace hici::io
