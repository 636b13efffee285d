// The ceiling that PageFile is measured against: blocks read at given offsets, nothing verified, nothing kept.
#pragma once

#include <cstdint>
#include <string>

namespace hici::io {

// Seconds it took; negative errno on failure. With `direct`, past the page cache where the file system can.
double read_blocks(const std::string& path, const int64_t* offsets, int64_t count, int64_t block, int depth,
                   const std::string& backend, bool direct);

}  // namespace hici::io
