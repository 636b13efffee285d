// A nameless file of pages of one size, read and written many at a time, every page verified when it is read.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "faults.h"
#include "queue.h"

namespace hici::io {

// Numbers that say whose page it is; part of its checksum.
constexpr int kIdentity = 6;

struct Page {
  char* data;         // `stride` bytes, aligned to PageFile::kAlignment
  int64_t number;     // its place in the file
  int64_t identity[kIdentity];
  uint64_t checksum;  // what it must be (reading), what it is (writing)
};

struct Outcome {
  enum Code : int64_t { kOk = 0, kError = 1, kTruncated = 2, kChecksum = 3, kForked = 4, kClosed = 5, kUnknown = 6 };
  int64_t code = kOk;
  int64_t item = -1;  // which page of the request
  int64_t error = 0;  // errno
};

struct Counters {
  int64_t bytes_read = 0, bytes_written = 0, reads = 0, writes = 0, retries = 0, rejected = 0, file_bytes = 0;
  double busy_s = 0;   // some transfer was in flight
  double stall_s = 0;  // a caller waited
};

struct Options {
  std::string directory;
  int64_t page_bytes = 0;  // what the checksum covers
  int64_t stride = 0;      // page_bytes rounded up to kAlignment
  int depth = 32;
  std::string backend = "auto";  // "uring", "threads"
  bool direct = true;
};

// Asks for large pages under memory that has not been touched yet: direct transfers pin it page by page.
void ask_for_large_pages(char* memory, int64_t bytes);

// Safe for several threads: one call at a time. After a fork the child gets kForked and leaves the file to its parent.
class PageFile {
 public:
  static constexpr int64_t kAlignment = 512;

  // Throws std::runtime_error with a sentence, errno in `error`.
  PageFile(const Options& options, int& error);
  ~PageFile();
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  // Begins a request and returns its number. Memory must stay until wait() or close(). With `ahead`, a thread of the file
  // carries it on while the caller does something else.
  int64_t submit(std::vector<Page> pages, bool write, bool ahead);
  // Ends a request; of a write, fills `checksums`.
  Outcome wait(int64_t request, std::vector<uint64_t>* checksums);
  // Waits for all that has begun, of every request; each is still to be ended. For callers that lost a request's number.
  void drain();
  // Room for pages [0, count), so that a full disk is found before anything is written.
  Outcome reserve(int64_t count);
  void close();
  Counters counters();
  void inject(const Fault& fault);
  void clear_faults();

  const std::string& name() const { return name_; }
  const char* backend() const { return uring_ ? "io_uring" : "threads"; }
  bool direct() const { return direct_; }
  int depth() const { return depth_; }
  int descriptor() const { return file_; }

 private:
  struct Request {
    std::vector<Page> pages;
    std::vector<int64_t> moved;  // bytes so far
    std::vector<char> tried;     // times
    bool write, ahead;
    int64_t left;
    Outcome outcome;
  };

  // What a fork must leave alone: the thread is not in the child, and who waited still counts as waiting.
  struct Turns {
    std::mutex mutex;
    std::condition_variable changed;
    std::thread helper;
    bool taken = false;  // somebody waits for the queue: only they reap
    bool stop = false;
    int64_t ahead = 0;  // requests that the helper carries on
  };

  bool foreign() const;
  void open_queue(int& error);
  void pump();
  void progress(std::unique_lock<std::mutex>& lock);
  void help();
  void start(int64_t request, int64_t item);
  void finish(const Transfer& t);
  void settle(Request& r, int64_t item);
  void fail(Request& r, int64_t item, int64_t code, int64_t error);
  void done(Request& r);

  Options options_;
  std::string name_;
  int file_ = -1, depth_ = 1, flying_ = 0;
  int64_t owner_ = 0;
  bool uring_ = false, direct_ = false;
  std::unique_ptr<Queue> queue_;
  std::map<int64_t, Request> requests_;
  std::deque<std::pair<int64_t, int64_t>> waiting_;  // (request, item)
  int64_t next_request_ = 1;
  double busy_since_ = 0;
  Counters counters_;
  Faults faults_;
  std::unique_ptr<Turns> turns_;
};

}  // namespace hici::io
