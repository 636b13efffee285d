#include "page_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <system_error>

#include "checksum.h"

namespace hici::io {
namespace {

constexpr const char* kPrefix = "hici-kv-";
constexpr int64_t kItemBits = 32;
constexpr int kTries = 2;  // a read that fails or does not verify is repeated once

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Files are removed as soon as they are open, so a leftover is what a process killed in that instant left behind: nobody
// holds its lock.
void sweep(const std::string& directory) {
  DIR* d = opendir(directory.c_str());
  if (!d) return;
  while (const dirent* entry = readdir(d)) {
    if (std::strncmp(entry->d_name, kPrefix, std::strlen(kPrefix)) != 0) continue;
    const std::string path = directory + "/" + entry->d_name;
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);  // a pipe would wait for a writer
    if (file < 0) continue;
    struct stat s{};
    if (fstat(file, &s) == 0 && S_ISREG(s.st_mode) && flock(file, LOCK_EX | LOCK_NB) == 0) unlink(path.c_str());
    ::close(file);
  }
  closedir(d);
}

// Whether direct transfers may begin at any block of kAlignment bytes. Disks with larger ones refuse that, one by one and
// not when the file is opened; then transfers are buffered.
bool takes_blocks(int file) {
#ifdef O_DIRECT
  alignas(PageFile::kAlignment) char block[PageFile::kAlignment] = {};
  if (pwrite(file, block, sizeof block, sizeof block) < 0 && errno == EINVAL) {
    fcntl(file, F_SETFL, fcntl(file, F_GETFL) & ~O_DIRECT);
    return false;
  }
  // whatever else is wrong shows where it is answered for
  [[maybe_unused]] const int emptied = ftruncate(file, 0);
#else
  (void)file;
#endif
  return true;
}

}  // namespace

void ask_for_large_pages(char* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kLarge * kLarge;
  // a refusal costs speed only
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

PageFile::PageFile(const Options& options, int& error) : options_(options), owner_(getpid()), turns_(std::make_unique<Turns>()) {
  sweep(options_.directory);
  std::random_device random;
  for (int tries = 0; file_ < 0; ++tries) {
    const uint64_t number = static_cast<uint64_t>(random()) << 32 | random();
    name_ = options_.directory + "/" + kPrefix + std::to_string(owner_) + "-" + std::to_string(number);
    const int flags = O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
#ifdef O_DIRECT
    if (options_.direct) {
      file_ = ::open(name_.c_str(), flags | O_DIRECT, 0600);
      direct_ = file_ >= 0;
      if (file_ < 0 && errno == EINVAL) {
        // some file systems create the file and then refuse the flag
        unlink(name_.c_str());
        errno = EINVAL;
      }
    }
    if (file_ < 0 && (!options_.direct || errno == EINVAL))
#endif
      file_ = ::open(name_.c_str(), flags, 0600);
    if (file_ < 0 && (errno != EEXIST || tries == 100)) {
      error = errno;
      throw std::runtime_error("cannot create a file in " + options_.directory + ": " + std::strerror(error));
    }
  }
  // a sweep of another process that takes the lock first removes the name a moment before we do
  flock(file_, LOCK_EX | LOCK_NB);
  unlink(name_.c_str());
  try {
    if (direct_ && !takes_blocks(file_)) direct_ = false;
    open_queue(error);
  } catch (...) {
    ::close(file_);
    throw;
  }
}

void PageFile::open_queue(int& error) {
  if (options_.backend != "threads") {
    queue_ = make_uring(file_, options_.depth);
    uring_ = queue_ != nullptr;
    if (!queue_ && options_.backend == "uring") {
      error = ENOSYS;
      throw std::runtime_error("this kernel does not allow io_uring");
    }
  }
  if (!queue_) queue_ = make_threads(file_, options_.depth);
  depth_ = std::min(options_.depth, queue_->depth());
}

PageFile::~PageFile() {
  if (foreign()) {
    if (queue_) queue_->abandon();
    queue_.reset();
    if (file_ >= 0) ::close(file_);
    turns_.release();
    return;
  }
  close();
}

bool PageFile::foreign() const { return getpid() != owner_; }

void PageFile::close() {
  if (foreign()) return;
  std::unique_lock<std::mutex> lock(turns_->mutex);
  waiting_.clear();
  turns_->stop = true;
  turns_->changed.notify_all();
  if (turns_->helper.joinable()) {
    std::thread helper = std::move(turns_->helper);
    lock.unlock();
    helper.join();
    lock.lock();
  }
  while (flying_ > 0) {
    waiting_.clear();
    progress(lock);
  }
  queue_.reset();
  for (auto& [number, r] : requests_)
    if (r.left > 0) r.outcome.code = Outcome::kClosed, r.left = 0;
  if (file_ >= 0) ::close(file_);
  file_ = -1;
  turns_->changed.notify_all();
}

int64_t PageFile::submit(std::vector<Page> pages, bool write, bool ahead) {
  if (foreign()) return 0;
  const int64_t count = static_cast<int64_t>(pages.size());
  Request r{std::move(pages), std::vector<int64_t>(count), std::vector<char>(count), write, ahead, count, {}};
  if (write)
    for (Page& p : r.pages) p.checksum = checksum(p.data, options_.page_bytes, p.identity, kIdentity);
  const std::lock_guard<std::mutex> lock(turns_->mutex);
  const int64_t number = next_request_++;
  const bool closed = file_ < 0 || turns_->stop;
  if (closed) r.outcome.code = Outcome::kClosed, r.left = 0;
  if (r.left == 0) r.ahead = false;
  if (r.ahead && !turns_->helper.joinable()) try {
      turns_->helper = std::thread([this] { help(); });
    } catch (const std::system_error&) {
      r.ahead = false;  // the system gives no thread: what is not done when wait() is called is done there
    }
  const bool carried = r.ahead;
  requests_.emplace(number, std::move(r));
  if (closed) return number;
  for (int64_t i = 0; i < count; ++i) waiting_.emplace_back(number, i);
  if (carried) {
    ++turns_->ahead;
    turns_->changed.notify_all();
  }
  pump();
  return number;
}

Outcome PageFile::wait(int64_t request, std::vector<uint64_t>* checksums) {
  Outcome outcome;
  if (foreign()) {
    outcome.code = Outcome::kForked;
    return outcome;
  }
  std::unique_lock<std::mutex> lock(turns_->mutex);
  const auto found = requests_.find(request);
  if (found == requests_.end()) {
    outcome.code = file_ < 0 ? Outcome::kClosed : Outcome::kUnknown;
    return outcome;
  }
  Request& r = found->second;
  const double began = now();
  while (r.left > 0) {
    progress(lock);
    // close() is about to end what will not begin any more, and needs the lock for it
    if (r.left > 0 && turns_->stop && flying_ == 0 && waiting_.empty()) turns_->changed.wait(lock);
  }
  if (!r.write) counters_.stall_s += now() - began;
  if (checksums)
    for (const Page& p : r.pages) checksums->push_back(p.checksum);
  outcome = r.outcome;
  requests_.erase(found);
  return outcome;
}

// One turn of waiting for the queue, or for whoever has the turn; none where nothing is in flight.
void PageFile::progress(std::unique_lock<std::mutex>& lock) {
  pump();
  if (turns_->taken) {
    turns_->changed.wait(lock);
    return;
  }
  if (flying_ == 0) return;  // pump() has just brought in the last: whoever called looks again
  turns_->taken = true;
  lock.unlock();
  queue_->idle();
  lock.lock();
  turns_->taken = false;
  pump();
  turns_->changed.notify_all();
}

void PageFile::help() {
  std::unique_lock<std::mutex> lock(turns_->mutex);
  for (;;) {
    turns_->changed.wait(lock, [this] { return turns_->stop || turns_->ahead > 0; });
    if (turns_->stop) return;
    progress(lock);
  }
}

void PageFile::drain() {
  if (foreign()) return;
  std::unique_lock<std::mutex> lock(turns_->mutex);
  while (file_ >= 0 && (flying_ > 0 || !waiting_.empty())) progress(lock);
}

Outcome PageFile::reserve(int64_t count) {
  Outcome outcome;
  if (foreign()) {
    outcome.code = Outcome::kForked;
    return outcome;
  }
  const std::lock_guard<std::mutex> lock(turns_->mutex);
  if (file_ < 0) {
    outcome.code = Outcome::kClosed;
    return outcome;
  }
  const int64_t needed = count * options_.stride;
  if (needed <= counters_.file_bytes) return outcome;
  if (const Fault* f = faults_.next(true); f && f->kind == Fault::Kind::kError) {
    outcome = {Outcome::kError, -1, f->value};
    return outcome;
  }
  // in steps, because a write that lengthens the file locks all others out
  const int64_t step = std::min<int64_t>(int64_t{64} << 20, std::max<int64_t>(counters_.file_bytes / 4, 1 << 20));
  for (const int64_t size : {std::max(needed, counters_.file_bytes + step), needed}) {
    int result = 0;
#if defined(__linux__)
    do result = fallocate(file_, 0, counters_.file_bytes, size - counters_.file_bytes);
    while (result != 0 && errno == EINTR);
    if (result != 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) result = ftruncate(file_, size);
#else
    result = ftruncate(file_, size);
#endif
    if (result == 0) {
      counters_.file_bytes = size;
      return outcome;
    }
  }
  outcome = {Outcome::kError, -1, errno};
  return outcome;
}

Counters PageFile::counters() {
  if (foreign()) return {};
  const std::lock_guard<std::mutex> lock(turns_->mutex);
  return counters_;
}

void PageFile::inject(const Fault& fault) {
  if (foreign()) return;
  const std::lock_guard<std::mutex> lock(turns_->mutex);
  faults_.add(fault);
}

void PageFile::clear_faults() {
  if (foreign()) return;
  const std::lock_guard<std::mutex> lock(turns_->mutex);
  faults_.clear();
}

void PageFile::pump() {
  std::vector<Transfer> ended;
  for (;;) {
    while (!waiting_.empty() && flying_ < depth_) {
      const auto [request, item] = waiting_.front();
      start(request, item);
      waiting_.pop_front();
    }
    if (flying_ > 0) queue_->flush();
    // verified with the next transfers on their way
    for (const Transfer& t : ended) finish(t);
    ended.clear();
    if (flying_ > 0 && !turns_->taken) queue_->reap(ended, false);
    flying_ -= static_cast<int>(ended.size());
    if (flying_ == 0 && !ended.empty()) counters_.busy_s += now() - busy_since_;
    if (ended.empty() && (waiting_.empty() || flying_ == depth_)) return;
  }
}

void PageFile::start(int64_t request, int64_t item) {
  const Request& r = requests_.at(request);
  const Page& p = r.pages[item];
  const int64_t moved = r.moved[item];
  const double began = now();
  // what throws here has not begun
  queue_->submit({r.write, p.data + moved, options_.stride - moved, p.number * options_.stride + moved,
                  request << kItemBits | item, 0});
  if (flying_++ == 0) busy_since_ = began;
}

void PageFile::finish(const Transfer& t) {
  const int64_t number = t.tag >> kItemBits, item = t.tag & ((int64_t{1} << kItemBits) - 1);
  const auto found = requests_.find(number);
  if (found == requests_.end()) return;
  Request& r = found->second;
  int64_t result = t.result;
  if (const Fault* f = faults_.next(r.write)) {
    if (f->kind == Fault::Kind::kError) result = -f->value;
    if (f->kind == Fault::Kind::kShort && result > f->value) result = f->value;
    if (f->kind == Fault::Kind::kFlip && !r.write && result > 0) t.data[f->value / 8 % result] ^= char(1 << f->value % 8);
  }
  // ECANCELED: the thread that handed the transfer to the system has ended, and with it what the system had not begun
  const bool again = result == -EINTR || result == -EAGAIN || result == -ECANCELED;
  if (result < 0 && !again) {
    if (!r.write && ++r.tried[item] < kTries) {
      ++counters_.retries;
      r.moved[item] = 0;
      waiting_.emplace_front(number, item);
      return;
    }
    return fail(r, item, Outcome::kError, -result);
  }
  if (result == 0) return fail(r, item, r.write ? Outcome::kError : Outcome::kTruncated, r.write ? ENOSPC : 0);
  if (result > 0) r.moved[item] += result;
  if (r.moved[item] < options_.stride) {
    // direct transfers begin at whole blocks only
    if (direct_) r.moved[item] -= r.moved[item] % kAlignment;
    if (!again) ++counters_.retries;
    waiting_.emplace_front(number, item);
    return;
  }
  settle(r, item);
  if (r.left > 0 && !r.write && r.moved[item] == 0) waiting_.emplace_front(number, item);
}

void PageFile::settle(Request& r, int64_t item) {
  const Page& p = r.pages[item];
  if (r.write) {
    ++counters_.writes;
    counters_.bytes_written += options_.stride;
  } else {
    ++counters_.reads;
    counters_.bytes_read += options_.stride;
    if (checksum(p.data, options_.page_bytes, p.identity, kIdentity) != p.checksum) {
      ++counters_.rejected;
      if (++r.tried[item] < kTries) {
        ++counters_.retries;
        r.moved[item] = 0;  // read once more
        return;
      }
      return fail(r, item, Outcome::kChecksum, 0);
    }
  }
#if defined(POSIX_FADV_DONTNEED)
  // one cache is enough, and it is not the kernel's; a page it has not written yet stays until it has
  if (!direct_) posix_fadvise(file_, p.number * options_.stride, options_.stride, POSIX_FADV_DONTNEED);
#endif
  done(r);
}

void PageFile::done(Request& r) {
  if (--r.left == 0 && r.ahead) --turns_->ahead;
}

void PageFile::fail(Request& r, int64_t item, int64_t code, int64_t error) {
  if (r.outcome.code == Outcome::kOk) r.outcome = {code, item, error};
  done(r);
}

}  // namespace hici::io
