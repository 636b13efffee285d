#include "block_reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>

#include "page_file.h"

namespace hici::io {

double read_blocks(const std::string& path, const int64_t* offsets, int64_t count, int64_t block, int depth,
                   const std::string& backend, bool direct) {
  int flags = O_RDONLY | O_CLOEXEC;
#ifdef O_DIRECT
  if (direct) flags |= O_DIRECT;
#endif
  const int file = ::open(path.c_str(), flags);
  if (file < 0) return -errno;
  std::unique_ptr<Queue> queue = backend == "threads" ? nullptr : make_uring(file, depth);
  if (!queue) queue = make_threads(file, depth);
  depth = std::min(depth, queue->depth());
  constexpr int64_t kLarge = int64_t{2} << 20;
  const int64_t bytes = (depth * block + kLarge - 1) / kLarge * kLarge;
  char* memory = static_cast<char*>(std::aligned_alloc(kLarge, static_cast<size_t>(bytes)));
  if (memory) {
    ask_for_large_pages(memory, bytes);
    for (int64_t i = 0; i < bytes; i += 4096) memory[i] = 0;
  }
  std::vector<int> free;
  for (int i = 0; i < depth; ++i) free.push_back(i);
  std::vector<Transfer> done;
  double failed = memory ? 0 : -ENOMEM;
  const auto began = std::chrono::steady_clock::now();
  int64_t next = 0, ended = 0;
  while (failed == 0 && ended < count) {
    for (; next < count && !free.empty(); ++next) {
      queue->submit({false, memory + free.back() * block, block, offsets[next], free.back(), 0});
      free.pop_back();
    }
    done.clear();
    queue->reap(done, true);
    for (const Transfer& t : done) {
      free.push_back(static_cast<int>(t.tag));
      ++ended;
      if (t.result != block) failed = t.result < 0 ? static_cast<double>(t.result) : -EIO;
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  queue.reset();
  std::free(memory);
  ::close(file);
  return failed < 0 ? failed : seconds;
}

}  // namespace hici::io
