// The pages a call attends over a stored history: its chunks among sinks, opened records and tail.
#pragma once

#include <cstdint>
#include <vector>

namespace hici::cpu {

// Keys or values of all kv heads [batch][heads][tokens][dim]; strides in bytes.
struct HistoryBuffer {
  int64_t data, batch, head;
};

// Chunks [0, min(base, keep_first)) of a row lie in the sinks, [keep_first, base) in records, from base on in the tail.
struct HistoryProblem {
  int64_t batch, queries, heads, kv_heads, width, chunk_size, group_size, keep_first, keep_last;
  int64_t token;             // bytes from token to token, in every buffer and page
  const int32_t* routes;     // [batch][queries][heads][width], entries below 0 unused
  const int64_t* positions;  // [batch][queries], below 0 = sees nothing
  const int64_t* base;       // [batch], chunks
  const int64_t* records;    // [batch][chunks]
  int64_t chunks, pages;     // pages of a record, the first kv_heads of which are keys and values
  HistoryBuffer sinks[2], tail[2];  // keys, values
};

// Entry x of a list is a chunk of one kv head of one row; lists are those of PageProblem.
struct HistoryPages {
  std::vector<int64_t> k, v;  // addresses; 0 for a page of a record
  std::vector<int64_t> chunks, offsets;
  std::vector<int64_t> at, number;  // entries that are pages of records, and which
  bool missing = false;             // a route names a chunk that no record holds
};

HistoryPages hga_history_pages(const HistoryProblem& problem);

}  // namespace hici::cpu
