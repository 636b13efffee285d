#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "queue.h"

namespace hici::io {
namespace {

class Threads final : public Queue {
 public:
  Threads(int file, int depth) : file_(file), depth_(depth), shared_(std::make_shared<Shared>()) {}

  ~Threads() override {
    if (abandoned_) {  // the threads live in the parent only, and their locks may have been held when it forked
      new std::shared_ptr<Shared>(shared_);
      for (std::thread& t : workers_) new std::thread(std::move(t));
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(shared_->mutex);
      shared_->stop = true;
    }
    shared_->wanted.notify_all();
    for (std::thread& t : workers_) t.join();
  }

  int depth() const override { return depth_; }

  void submit(const Transfer& t) override {
    if (static_cast<int>(workers_.size()) < depth_) try {
        workers_.emplace_back([shared = shared_, file = file_] { work(*shared, file); });
      } catch (const std::system_error&) {
        // the system gives no more threads: those that are there do it
      }
    Transfer moved = t;
    const bool alone = workers_.empty();
    if (alone) move(moved, file_);
    {
      const std::lock_guard<std::mutex> lock(shared_->mutex);
      if (alone)
        shared_->done.push_back(moved);
      else
        shared_->todo.push_back(t);
    }
    shared_->wanted.notify_one();
    ++flying_;
  }

  void reap(std::vector<Transfer>& done, bool wait) override {
    std::unique_lock<std::mutex> lock(shared_->mutex);
    if (wait && flying_ > 0) shared_->ended.wait(lock, [&] { return !shared_->done.empty(); });
    flying_ -= static_cast<int>(shared_->done.size());
    done.insert(done.end(), shared_->done.begin(), shared_->done.end());
    shared_->done.clear();
  }

  void flush() override {}

  void idle() override {
    std::unique_lock<std::mutex> lock(shared_->mutex);
    shared_->ended.wait(lock, [&] { return !shared_->done.empty(); });
  }

  void abandon() override { abandoned_ = true; }

 private:
  struct Shared {
    std::mutex mutex;
    std::condition_variable wanted, ended;
    std::deque<Transfer> todo;
    std::vector<Transfer> done;
    bool stop = false;
  };

  static void move(Transfer& t, int file) {
    const size_t bytes = static_cast<size_t>(t.bytes);
    t.result = t.write ? pwrite(file, t.data, bytes, t.offset) : pread(file, t.data, bytes, t.offset);
    if (t.result < 0) t.result = -errno;
  }

  static void work(Shared& s, int file) {
    std::unique_lock<std::mutex> lock(s.mutex);
    for (;;) {
      s.wanted.wait(lock, [&] { return s.stop || !s.todo.empty(); });
      if (s.todo.empty()) return;  // what has been given in is finished before stopping
      Transfer t = s.todo.front();
      s.todo.pop_front();
      lock.unlock();
      move(t, file);
      lock.lock();
      s.done.push_back(t);
      s.ended.notify_one();
    }
  }

  int file_, depth_, flying_ = 0;
  bool abandoned_ = false;
  std::shared_ptr<Shared> shared_;
  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<Queue> make_threads(int file, int depth) { return std::make_unique<Threads>(file, depth); }

}  // namespace hici::io
