// The checksum of stored pages: CRC-32C in four lanes, bound to who the page is.
#pragma once

#include <cstdint>

namespace hici::io {

// CRC-32C (Castagnoli) of `bytes`, continuing from `crc` (0 to begin with).
uint32_t crc32c(uint32_t crc, const void* data, int64_t bytes);

// 64 bits over the contents and `words` numbers that identify them. Contents are cut into four lanes of equal length (the
// last one takes the rest), so that the processor's instruction, which waits three cycles for itself, runs four at a time.
// Any change within one lane that CRC-32C finds (all bursts of up to 32 bits) is found for certain, as is any change of one
// number of the identity; other changes pass with probability 2^-32 at most.
uint64_t checksum(const void* data, int64_t bytes, const int64_t* identity, int words);

}  // namespace hici::io
