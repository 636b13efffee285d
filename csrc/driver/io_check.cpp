// csrc/io on both backends: pages written and read by several threads at once, ahead and waited for, with faults between;
// every byte is compared, memory has its exact size, and a file is closed under those who still wait,
// and over reads that nobody waits for.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../io/block_reader.h"
#include "../io/checksum.h"
#include "../io/page_file.h"
#include "checks.h"

namespace hici::driver {
namespace {

using io::Outcome;
using io::Page;
using io::PageFile;

class Directory {
 public:
  Directory() {
    std::string name = std::filesystem::temp_directory_path() / "hici-driver-XXXXXX";
    if (!mkdtemp(name.data())) fail("io: no directory %s", name.c_str());
    path_ = name;
  }
  ~Directory() { rmdir(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Aligned memory that ends with its last byte.
class Slots {
 public:
  Slots(int64_t count, int64_t stride) : stride_(stride), memory_(std::aligned_alloc(PageFile::kAlignment, count * stride)) {
    if (!memory_) fail("io: no memory");
    std::memset(memory_, 0xff, count * stride);
  }
  ~Slots() { std::free(memory_); }
  Slots(const Slots&) = delete;
  Slots& operator=(const Slots&) = delete;
  char* operator[](int64_t i) const { return static_cast<char*>(memory_) + i * stride_; }

 private:
  int64_t stride_;
  void* memory_;
};

struct Case {
  io::Options options;
  PageFile* file;
  bool faults;  // some calls may fail, but none may give wrong bytes
};

char content(int64_t page, int64_t generation, int64_t i) {
  const uint64_t x = static_cast<uint64_t>(page * 31 + generation * 7 + 1) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(i) * 0x2545f4914f6cdd1du;
  return static_cast<char>(x >> 56);
}

Page page_of(char* data, int64_t number, int64_t generation, uint64_t checksum) {
  return {data, number, {1, 2, 3, number, 5, generation}, checksum};
}

// One thread's pages [first, first + count), which nobody else writes: random requests, two of them in flight at a time.
void client(const Case& c, uint64_t seed, int64_t first, int64_t count, int rounds) {
  Random random(seed);
  const Slots memory(2 * count, c.options.stride);
  std::vector<int64_t> generation(count, 0);
  std::vector<uint64_t> sums(count, 0);
  for (int round = 0; round < rounds; ++round) {
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < count; ++i)
      if (random.chance(0.6)) chosen.push_back(i);
    std::vector<Page> writing;
    for (const int64_t i : chosen) {
      ++generation[i];
      for (int64_t j = 0; j < c.options.stride; ++j) memory[i][j] = content(first + i, generation[i], j);
      writing.push_back(page_of(memory[i], first + i, generation[i], 0));
    }
    Outcome o = c.file->reserve(first + count);
    if (o.code == Outcome::kClosed) return;
    if (o.code != Outcome::kOk && !c.faults) fail("io: no room for %d pages", (int)(first + count));
    std::vector<uint64_t> found;
    o = c.file->wait(c.file->submit(writing, true, false), &found);
    if (o.code == Outcome::kClosed) return;
    if (o.code != Outcome::kOk && !c.faults) fail("io: writing gave %d, errno %d", (int)o.code, (int)o.error);
    if (o.code != Outcome::kOk) continue;  // what is in the file now is unknown, what was written next is not
    for (size_t x = 0; x < chosen.size(); ++x) sums[chosen[x]] = found[x];
    std::vector<Page> reading, other;
    for (size_t x = 0; x < chosen.size(); ++x) {
      const int64_t i = chosen[x];
      std::memset(memory[count + i], 0xff, c.options.stride);
      (x % 2 ? reading : other).push_back(page_of(memory[count + i], first + i, generation[i], sums[i]));
    }
    const int64_t one = c.file->submit(reading, false, random.chance(0.5)), two = c.file->submit(other, false, random.chance(0.5));
    const Outcome a = c.file->wait(one, nullptr), b = c.file->wait(two, nullptr);
    const auto compare = [&](const Outcome& outcome, const std::vector<Page>& pages) {
      if (outcome.code == Outcome::kClosed) return;
      if (outcome.code != Outcome::kOk && !c.faults) fail("io: reading gave %d, errno %d", (int)outcome.code, (int)outcome.error);
      if (outcome.code != Outcome::kOk) return;
      for (const Page& p : pages)
        for (int64_t j = 0; j < c.options.page_bytes; ++j)
          if (p.data[j] != content(p.number, p.identity[5], j)) fail("io: byte %d of page %d is wrong", (int)j, (int)p.number);
    };
    compare(a, reading), compare(b, other);
    // what nobody wrote under this name is refused
    if (!chosen.empty() && !c.faults) {
      const int64_t i = chosen[0];
      o = c.file->wait(c.file->submit({page_of(memory[count + i], first + i, generation[i] + 1, sums[i])}, false, false), nullptr);
      if (o.code != Outcome::kChecksum && o.code != Outcome::kClosed) fail("io: another's page gave %d", (int)o.code);
    }
  }
}

void check_file(const std::string& directory, const char* backend, uint64_t seed, bool faults, bool closing) {
  Random random(seed);
  Case c{};
  c.options.directory = directory, c.options.backend = backend, c.options.direct = random.chance(0.5);
  c.options.page_bytes = random.within(1, 5000);
  c.options.stride = (c.options.page_bytes + PageFile::kAlignment - 1) / PageFile::kAlignment * PageFile::kAlignment;
  c.options.depth = static_cast<int>(random.within(1, 20));
  int error = 0;
  PageFile file(c.options, error);
  c.file = &file, c.faults = faults;
  constexpr int kClients = 4;
  const int64_t count = random.within(1, 24);
  std::atomic<bool> over{false};
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i) clients.emplace_back([&, i] { client(c, seed * 10 + i, i * count, count, closing ? 1000 : 6); });
  // one who counts and breaks things meanwhile
  std::thread other([&] {
    Random own(seed + 1000);
    while (!over) {
      const io::Counters counters = file.counters();
      if (counters.bytes_read < 0) fail("io: counters");
      if (faults) {
        const bool write = own.chance(0.3);
        const int64_t kind = own.below(4);
        if (kind == 0) file.inject({write, io::Fault::Kind::kError, EINTR, own.below(9), own.within(1, 3)});
        if (kind == 1) file.inject({write, io::Fault::Kind::kError, EIO, own.below(9), own.within(1, 3)});
        if (kind == 2) file.inject({write, io::Fault::Kind::kShort, own.below(c.options.stride), own.below(9), own.within(1, 3)});
        if (kind == 3) file.inject({false, io::Fault::Kind::kFlip, own.below(8 * c.options.page_bytes), own.below(9), own.within(1, 3)});
        if (own.chance(0.1)) file.clear_faults();
      }
      std::this_thread::yield();
    }
  });
  if (closing) {
    usleep(static_cast<unsigned>(random.below(3000)));
    file.close();
  }
  for (std::thread& t : clients) t.join();
  over = true;
  other.join();
  file.close();
  const io::Counters counters = file.counters();
  if (!faults && !closing && counters.bytes_read != counters.reads * c.options.stride) fail("io: bytes do not add up");
}

// A file is closed at any moment of reads that nobody waits for.
void check_unread(const std::string& directory, const char* backend, uint64_t seed) {
  Random random(seed);
  io::Options options;
  options.directory = directory, options.backend = backend, options.direct = random.chance(0.5);
  options.page_bytes = random.within(1, 5000);
  options.stride = (options.page_bytes + PageFile::kAlignment - 1) / PageFile::kAlignment * PageFile::kAlignment;
  options.depth = static_cast<int>(random.within(1, 20));
  const int64_t count = random.within(1, 24);
  const Slots memory(count, options.stride);
  int error = 0;
  PageFile file(options, error);
  std::vector<Page> pages;
  for (int64_t i = 0; i < count; ++i) {
    std::memset(memory[i], static_cast<int>(i), options.stride);
    pages.push_back(page_of(memory[i], i, 0, 0));
  }
  std::vector<uint64_t> sums;
  if (file.reserve(count).code != Outcome::kOk || file.wait(file.submit(pages, true, false), &sums).code != Outcome::kOk)
    fail("io: %d pages cannot be written", (int)count);
  for (int64_t i = 0; i < count; ++i) pages[i].checksum = sums[i];
  file.submit(pages, false, random.chance(0.5));
  usleep(static_cast<unsigned>(random.below(150)));
  file.close();
}

void check_reader(const std::string& directory, const char* backend, uint64_t seed) {
  Random random(seed);
  const std::string path = directory + "/blocks";
  const int64_t block = 512 * random.within(1, 9), count = random.within(1, 40);
  const int made = ::open(path.c_str(), O_CREAT | O_RDWR | O_TRUNC, 0600);
  if (made < 0 || ftruncate(made, block * count) != 0) fail("io: no file %s", path.c_str());
  ::close(made);
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < 3 * count; ++i) offsets.push_back(random.below(count) * block);
  const int depth = static_cast<int>(random.within(1, 16));
  const double seconds = io::read_blocks(path, offsets.data(), static_cast<int64_t>(offsets.size()), block, depth, backend, false);
  if (!(seconds >= 0)) fail("io: the block reader gave %g", seconds);
  offsets.push_back(count * block);
  if (io::read_blocks(path, offsets.data(), static_cast<int64_t>(offsets.size()), block, depth, backend, false) >= 0)
    fail("io: the block reader read past the end");
  unlink(path.c_str());
}

void check_checksum(uint64_t seed) {
  Random random(seed);
  const int64_t bytes = random.below(400);
  const Exact data(bytes);
  char* const p = static_cast<char*>(data.data());
  for (int64_t i = 0; i < bytes; ++i) p[i] = static_cast<char>(random.bits());
  uint32_t crc = ~0u;  // bit by bit
  for (int64_t i = 0; i < bytes; ++i) {
    crc ^= static_cast<unsigned char>(p[i]);
    for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
  }
  if (io::crc32c(0, p, bytes) != ~crc) fail("io: crc32c of %d bytes", (int)bytes);
  int64_t identity[io::kIdentity] = {1, 2, 3, 4, 5, 6};
  const uint64_t sum = io::checksum(p, bytes, identity, io::kIdentity);
  ++identity[random.below(io::kIdentity)];
  if (io::checksum(p, bytes, identity, io::kIdentity) == sum) fail("io: the checksum forgets the identity");
}

}  // namespace

void check_io(uint64_t seed, int cases) {
  const Directory directory;
  for (int i = 0; i < cases; ++i) {
    check_checksum(seed + i);
    for (const char* backend : {"auto", "threads"}) {
      check_reader(directory.path(), backend, seed + i);
      check_file(directory.path(), backend, seed + i, i % 3 == 1, i % 3 == 2);
      for (int j = 0; j < 8; ++j) check_unread(directory.path(), backend, seed + i * 8 + j);
    }
  }
}

}  // namespace hici::driver
