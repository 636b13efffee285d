// Lists of runs: who sees which tokens, by window and routes, and where they lie.
#pragma once

#include <vector>

#include "hga_attention.h"

namespace hici::cpu {

// The rows of one list: query heads of one kv head, for some queries of one batch row.
struct RunRows {
  int64_t batch, kv_head;
  const int32_t* queries;  // in order of their index
  int64_t count;
};

// A list being built, with memory that is used again by the next.
class RunBuilder {
 public:
  // most tokens of a run; adjacent runs that the same rows see are joined up to it
  explicit RunBuilder(int64_t run_tokens) : run_tokens_(run_tokens) {}

  // Problem: RoutedProblem or PageProblem
  template <class Problem>
  void build(const Problem& problem, const RunRows& rows, void* out, float* lse);
  // valid until the next build()
  const RunList& list() const { return list_; }
  int64_t tokens() const { return tokens_; }  // of all runs

 private:
  template <class Problem>
  void start(const Problem& problem, const RunRows& rows, void* out, float* lse);
  void finish();
  // Tokens [start, start + count) at k, v, seen by `rows_count` rows from row_ids_[rows_begin] on.
  void add(const void* k, const void* v, const int64_t* columns, int64_t start, int64_t count, int32_t rows_begin,
           int32_t rows_count);
  bool joins(const void* k, const void* v, const int64_t* columns, int64_t start, int64_t count, int32_t rows_begin,
             int32_t rows_count) const;
  template <class Problem>
  void window(const Problem& problem, const RunRows& rows);
  template <class Problem>
  void routed(const Problem& problem, const RunRows& rows);
  void in_order(int64_t groups);

  int64_t run_tokens_, tokens_ = 0, size_ = 0;
  RunList list_{};
  std::vector<const void*> q_;
  std::vector<int64_t> index_;
  std::vector<void*> out_;
  std::vector<float*> lse_;
  std::vector<Run> runs_;
  std::vector<int32_t> row_ids_;
  std::vector<int32_t> touched_, row_of_, group_of_;
  std::vector<int32_t> places_;  // per group: how many rows, then where they go; all 0 between lists
};

// Queries that see something, row by row, in order of their index.
struct OrderedQueries {
  std::vector<int32_t> queries;
  std::vector<int64_t> begin;  // [batch + 1]

  template <class Index>
  OrderedQueries(int64_t batch, int64_t count, Index&& index);
};
OrderedQueries ordered_queries(const RoutedProblem& problem);
OrderedQueries ordered_queries(const PageProblem& problem);

}  // namespace hici::cpu
