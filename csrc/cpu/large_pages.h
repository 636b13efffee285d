// Results that will be written for the first time.
#pragma once

#include <cstdint>

namespace hici::cpu {

// Asks the operating system to back [p, p + bytes) with large pages where nothing has been written yet: the first writing
// of 4 KiB pages costs several times what it costs to fill them. Changes no contents; a refusal costs speed only.
void prefer_large_pages(void* p, int64_t bytes);

}  // namespace hici::cpu
