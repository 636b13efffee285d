#include "queue.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#ifdef IORING_FEAT_SINGLE_MMAP

namespace hici::io {
namespace {

class Uring final : public Queue {
 public:
  bool open(int file, int depth) {
    io_uring_params p{};
    ring_ = static_cast<int>(syscall(SYS_io_uring_setup, static_cast<unsigned>(depth), &p));
    if (ring_ < 0) return false;
    // without the first the rings are mapped one by one (Linux before 5.4); the second came with IORING_OP_READ and _WRITE
    constexpr unsigned kCurrentPosition = 1u << 3;  // IORING_FEAT_RW_CUR_POS, Linux 5.6
    if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & kCurrentPosition)) return false;
    file_ = file;
    depth_ = static_cast<int>(p.sq_entries);
    queue_bytes_ = std::max<size_t>(p.sq_off.array + p.sq_entries * sizeof(unsigned),
                                    p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe));
    entry_bytes_ = p.sq_entries * sizeof(io_uring_sqe);
    queue_ = map(queue_bytes_, IORING_OFF_SQ_RING);
    entries_ = static_cast<io_uring_sqe*>(map(entry_bytes_, IORING_OFF_SQES));
    if (!queue_ || !entries_) return false;
    char* q = static_cast<char*>(queue_);
    const auto at = [q](unsigned offset) { return reinterpret_cast<unsigned*>(q + offset); };
    sq_tail_ = at(p.sq_off.tail), sq_mask_ = at(p.sq_off.ring_mask), sq_array_ = at(p.sq_off.array);
    cq_head_ = at(p.cq_off.head), cq_tail_ = at(p.cq_off.tail), cq_mask_ = at(p.cq_off.ring_mask);
    done_ = reinterpret_cast<io_uring_cqe*>(q + p.cq_off.cqes);
    flying_.resize(depth_);
    for (int i = depth_; i-- > 0;) free_.push_back(i);
    return true;
  }

  ~Uring() override {
    std::vector<Transfer> done;
    while (!abandoned_ && queue_ && entries_ && static_cast<int>(free_.size()) < depth_) reap(done, true);
    if (queue_ && !abandoned_) munmap(queue_, queue_bytes_);
    if (entries_ && !abandoned_) munmap(entries_, entry_bytes_);
    if (ring_ >= 0) close(ring_);
  }

  int depth() const override { return depth_; }

  void submit(const Transfer& t) override {
    const int slot = free_.back();
    free_.pop_back();
    flying_[slot] = t;
    const unsigned tail = *sq_tail_, i = tail & *sq_mask_;
    io_uring_sqe& e = entries_[i];
    std::memset(&e, 0, sizeof e);
    e.opcode = t.write ? IORING_OP_WRITE : IORING_OP_READ;
    e.fd = file_;
    e.addr = reinterpret_cast<uint64_t>(t.data);
    e.len = static_cast<unsigned>(t.bytes);
    e.off = static_cast<uint64_t>(t.offset);
    e.user_data = static_cast<uint64_t>(slot);
    sq_array_[i] = i;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++unsent_;
    // a batch of system calls' worth; reap() sends the rest
    if (unsent_ == 16) send(0);
  }

  void reap(std::vector<Transfer>& done, bool wait) override {
    if (unsent_ > 0) send(0);
    if (collect(done) || !wait) return;
    while (static_cast<int>(free_.size()) < depth_) {
      send(1);
      if (collect(done)) return;
    }
  }

  void flush() override {
    while (unsent_ > 0) send(0);
  }

  void idle() override {
    while (*cq_head_ == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE) && !any_refused_.load(std::memory_order_relaxed))
      wait_only();
  }

  void abandon() override { abandoned_ = true; }

 private:
  void* map(size_t bytes, uint64_t offset) {
    void* m = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, static_cast<off_t>(offset));
    if (m == MAP_FAILED) return nullptr;
    madvise(m, bytes, MADV_DONTFORK);  // a child must not move the parent's ring
    return m;
  }

  void wait_only() { syscall(SYS_io_uring_enter, ring_, 0u, 1u, IORING_ENTER_GETEVENTS, nullptr, 0); }

  void send(unsigned wait) {
    const long sent = syscall(SYS_io_uring_enter, ring_, static_cast<unsigned>(unsent_), wait,
                              wait ? IORING_ENTER_GETEVENTS : 0u, nullptr, 0);
    if (sent > 0) unsent_ -= static_cast<int>(sent);
    if (sent >= 0 || errno == EINTR || errno == EAGAIN || errno == EBUSY) return;  // the next round tries again
    // anything else will not get better: what the system has not taken ends with that error
    const int error = errno;
    for (; unsent_ > 0; --unsent_) {
      const unsigned tail = *sq_tail_ - 1;
      const int slot = static_cast<int>(entries_[tail & *sq_mask_].user_data);
      flying_[slot].result = -error;
      refused_.push_back(slot);
      __atomic_store_n(sq_tail_, tail, __ATOMIC_RELEASE);
    }
    any_refused_.store(!refused_.empty(), std::memory_order_relaxed);
  }

  bool collect(std::vector<Transfer>& done) {
    unsigned head = *cq_head_;
    const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
    const bool some = head != tail || !refused_.empty();
    for (const int slot : refused_) done.push_back(flying_[slot]), free_.push_back(slot);
    refused_.clear();
    any_refused_.store(false, std::memory_order_relaxed);
    for (; head != tail; ++head) {
      const io_uring_cqe& c = done_[head & *cq_mask_];
      const int slot = static_cast<int>(c.user_data);
      done.push_back(flying_[slot]);
      done.back().result = c.res;
      free_.push_back(slot);
    }
    __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    return some;
  }

  int ring_ = -1, file_ = -1, depth_ = 0, unsent_ = 0;
  bool abandoned_ = false;
  void* queue_ = nullptr;
  size_t queue_bytes_ = 0, entry_bytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  io_uring_cqe* done_ = nullptr;
  unsigned *sq_tail_ = nullptr, *sq_mask_ = nullptr, *sq_array_ = nullptr;
  unsigned *cq_head_ = nullptr, *cq_tail_ = nullptr, *cq_mask_ = nullptr;
  std::vector<Transfer> flying_;
  std::vector<int> free_, refused_;
  std::atomic<bool> any_refused_{false};  // for idle(), beside which others send
};

}  // namespace

std::unique_ptr<Queue> make_uring(int file, int depth) {
  auto ring = std::make_unique<Uring>();
  if (!ring->open(file, depth)) return nullptr;
  return ring;
}

}  // namespace hici::io

#define HICI_HAVE_URING
#endif
#endif

#ifndef HICI_HAVE_URING
namespace hici::io {
std::unique_ptr<Queue> make_uring(int, int) { return nullptr; }
}  // namespace hici::io
#endif
