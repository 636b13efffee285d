#include "../io/page_file.h"

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <cstring>

#include "../io/block_reader.h"
#include "../io/checksum.h"
#include "arguments.h"

namespace hici::bindings {
namespace {

using io::PageFile;

constexpr DLDataType kInt64{kDLInt, 64, 1};

void check_numbers(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) {
  check_cpu(t, name);
  check_type(t, name, kInt64);
  check_shape(t, name, shape);
  check_contiguous(t, name);
}

// The functions of one open file over the memory of one bank [slots, stride]; the last one that is let go closes it.
struct File {
  File(const io::Options& options, int& error, ffi::Tensor memory)
      : bank(std::move(memory)), stride(options.stride), slots(bank.size(0)), pages(options, error) {}

  ffi::Tensor bank;
  int64_t stride, slots;
  PageFile pages;  // last: closed before the bank goes
};

std::vector<io::Page> request(const File& f, TensorView slots, TensorView numbers, TensorView identity,
                              const TensorView* checksums) {
  const int64_t n = slots.numel();
  check_numbers(slots, "slots", {n});
  check_numbers(numbers, "numbers", {n});
  check_numbers(identity, "identity", {n, io::kIdentity});
  if (checksums) check_numbers(*checksums, "checksums", {n});
  const auto* slot = pointer<const int64_t>(slots);
  const auto* number = pointer<const int64_t>(numbers);
  char* memory = static_cast<char*>(f.bank.data_ptr());
  std::vector<io::Page> pages(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    if (slot[i] < 0 || slot[i] >= f.slots) TVM_FFI_THROW(IndexError) << "slots has " << slot[i] << " of " << f.slots;
    if (number[i] < 0 || number[i] > (int64_t{1} << 40)) TVM_FFI_THROW(IndexError) << "numbers has " << number[i];
    io::Page& p = pages[static_cast<size_t>(i)];
    p.data = memory + slot[i] * f.stride;
    p.number = number[i];
    std::memcpy(p.identity, pointer<const int64_t>(identity) + i * io::kIdentity, sizeof p.identity);
    p.checksum = checksums ? static_cast<uint64_t>(pointer<const int64_t>(*checksums)[i]) : 0;
  }
  return pages;
}

// [code, item, errno]
void report(const io::Outcome& o, TensorView outcome) {
  check_numbers(outcome, "outcome", {3});
  auto* p = pointer<int64_t>(outcome);
  p[0] = o.code, p[1] = o.item, p[2] = o.error;
}

using Functions = ffi::Map<ffi::String, ffi::Any>;

Functions page_file_open(ffi::String directory, ffi::Tensor bank, int64_t page_bytes, int64_t depth, ffi::String backend,
                         bool direct, TensorView outcome) {
  const TensorView view(bank);
  check_cpu(view, "bank");
  check_type(view, "bank", DLDataType{kDLUInt, 8, 1});
  check_contiguous(view, "bank");
  if (view.ndim() != 2) TVM_FFI_THROW(ValueError) << "bank must have 2 dimensions, got shape " << view.shape();
  const int64_t slots = view.size(0), stride = view.size(1);
  if (page_bytes < 1 || page_bytes > stride || stride % PageFile::kAlignment)
    TVM_FFI_THROW(ValueError) << "pages of " << page_bytes << " bytes do not fit a bank of " << view.shape();
  if (reinterpret_cast<uintptr_t>(view.data_ptr()) % PageFile::kAlignment)
    TVM_FFI_THROW(ValueError) << "bank must be aligned to " << PageFile::kAlignment << " bytes";
  if (depth < 1 || depth > 4096) TVM_FFI_THROW(ValueError) << "depth must be 1 to 4096, got " << depth;
  if (backend != "auto" && backend != "uring" && backend != "threads")
    TVM_FFI_THROW(ValueError) << "backend must be auto, uring or threads, got " << backend;
  const io::Options options{directory, page_bytes, stride, static_cast<int>(depth), backend, direct};
  int error = 0;
  Functions functions;
  std::shared_ptr<File> file;
  try {
    file = std::make_shared<File>(options, error, bank);
  } catch (const std::runtime_error&) {
    report({io::Outcome::kError, -1, error}, outcome);
    return functions;
  }
  report({}, outcome);
  io::ask_for_large_pages(static_cast<char*>(view.data_ptr()), slots * stride);
  functions.Set("name", ffi::String(file->pages.name()));
  functions.Set("backend", ffi::String(file->pages.backend()));
  functions.Set("direct", file->pages.direct());
  functions.Set("descriptor", static_cast<int64_t>(file->pages.descriptor()));
  functions.Set("read", ffi::Function::FromTyped(
      [file](TensorView slots, TensorView numbers, TensorView identity, TensorView checksums, bool ahead) {
        return file->pages.submit(request(*file, slots, numbers, identity, &checksums), false, ahead);
      }));
  functions.Set("write", ffi::Function::FromTyped([file](TensorView slots, TensorView numbers, TensorView identity) {
    return file->pages.submit(request(*file, slots, numbers, identity, nullptr), true, false);
  }));
  functions.Set("wait", ffi::Function::FromTyped([file](int64_t number, TensorView checksums, TensorView outcome) {
    std::vector<uint64_t> sums;
    const io::Outcome o = file->pages.wait(number, &sums);
    report(o, outcome);
    if (checksums.numel() == 0 || o.code != io::Outcome::kOk) return;
    check_numbers(checksums, "checksums", {static_cast<int64_t>(sums.size())});
    std::memcpy(checksums.data_ptr(), sums.data(), sums.size() * sizeof(uint64_t));
  }));
  functions.Set("drain", ffi::Function::FromTyped([file]() { file->pages.drain(); }));
  functions.Set("reserve", ffi::Function::FromTyped([file](int64_t pages, TensorView outcome) {
    if (pages < 0 || pages > (int64_t{1} << 40)) TVM_FFI_THROW(ValueError) << "pages is " << pages;
    report(file->pages.reserve(pages), outcome);
  }));
  functions.Set("counters", ffi::Function::FromTyped([file]() {
    const io::Counters c = file->pages.counters();
    ffi::Map<ffi::String, double> found;
    found.Set("bytes_read", static_cast<double>(c.bytes_read));
    found.Set("bytes_written", static_cast<double>(c.bytes_written));
    found.Set("reads", static_cast<double>(c.reads));
    found.Set("writes", static_cast<double>(c.writes));
    found.Set("retries", static_cast<double>(c.retries));
    found.Set("rejected", static_cast<double>(c.rejected));
    found.Set("file_bytes", static_cast<double>(c.file_bytes));
    found.Set("busy_s", c.busy_s);
    found.Set("stall_s", c.stall_s);
    return found;
  }));
  functions.Set("close", ffi::Function::FromTyped([file]() { file->pages.close(); }));
  functions.Set("inject", ffi::Function::FromTyped(
      [file](bool write, ffi::String kind, int64_t value, int64_t skip, int64_t times) {
        using Kind = io::Fault::Kind;
        if (kind != "error" && kind != "short" && kind != "flip")
          TVM_FFI_THROW(ValueError) << "kind must be error, short or flip, got " << kind;
        const Kind k = kind == "error" ? Kind::kError : kind == "short" ? Kind::kShort : Kind::kFlip;
        file->pages.inject({write, k, value, skip, times});
      }));
  functions.Set("clear_faults", ffi::Function::FromTyped([file]() { file->pages.clear_faults(); }));
  return functions;
}

double read_blocks(ffi::String path, TensorView offsets, int64_t block, int64_t depth, ffi::String backend, bool direct) {
  check_numbers(offsets, "offsets", {offsets.numel()});
  if (block < 1 || block > (int64_t{1} << 30)) TVM_FFI_THROW(ValueError) << "block is " << block;
  if (depth < 1 || depth > 4096) TVM_FFI_THROW(ValueError) << "depth must be 1 to 4096, got " << depth;
  return io::read_blocks(path, pointer<const int64_t>(offsets), offsets.numel(), block, static_cast<int>(depth), backend,
                         direct);
}

int64_t page_checksum(TensorView data, TensorView identity) {
  check_cpu(data, "data");
  check_type(data, "data", DLDataType{kDLUInt, 8, 1});
  check_contiguous(data, "data");
  check_numbers(identity, "identity", {identity.numel()});
  return static_cast<int64_t>(io::checksum(pointer<const char>(data), data.numel(), pointer<const int64_t>(identity),
                                           static_cast<int>(identity.numel())));
}

int64_t page_crc32c(TensorView data) {
  check_cpu(data, "data");
  check_type(data, "data", DLDataType{kDLUInt, 8, 1});
  check_contiguous(data, "data");
  return io::crc32c(0, pointer<const char>(data), data.numel());
}

}  // namespace
}  // namespace hici::bindings

TVM_FFI_DLL_EXPORT_TYPED_FUNC(page_file_open, hici::bindings::page_file_open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_blocks, hici::bindings::read_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(page_checksum, hici::bindings::page_checksum);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(page_crc32c, hici::bindings::page_crc32c);
