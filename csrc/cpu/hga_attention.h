// hga_attention: exact attention over lists of runs, where a run is a few consecutive tokens of one kv head and the set of
// rows (query heads of queries) that see it. A run's keys and values are read once for all of its rows.
//
// Two callers make such lists: routed attention over a history in one tensor (RoutedProblem), and a cache that keeps its
// history in pages anywhere in memory (PageProblem).
#pragma once

#include "attention.h"

namespace hici::cpu {

struct RoutedProblem {
  Element element;
  int64_t batch, queries, keys, heads, kv_heads, dim;
  Sequence4 q, k, v;
  const int64_t* columns = nullptr;    // [batch, keys]: column of every token; null = the token itself
  const int64_t* positions = nullptr;  // [batch, queries]: token a query is, negative = sees nothing; null = the last
  const int32_t* routes;               // [batch, queries, heads, width]: ids of opened groups, negative = none
  int64_t width;
  int64_t group_size, chunk_size, keep_first, keep_last;
  float scale;
};

// Attention over pages, the entry of caches. A page is one chunk of the history of one kv head, at any address: token i of
// it lies at k_pages[x] + i * k_token elements, contiguous in dim. Pages [offsets[b * kv_heads + g], offsets[b * kv_heads +
// g + 1]) are those of row b and kv head g, in ascending order of their chunks, each chunk once. A query attends what it
// sees by RoutedProblem's rules of the chunks that are there, and nothing of others: parts of a history are attended one
// after the other and merged. Memory of tokens that no query sees is not read. Nothing is written but out, in float32 where
// `wide` says so, and lse.
struct PageProblem {
  Element element;
  int64_t batch, queries, heads, kv_heads, dim;
  Sequence4 q;
  int64_t page_count, k_token, v_token;
  const int64_t *k_pages, *v_pages;  // [page_count] addresses
  const int64_t* chunks;             // [page_count] number of a page's chunk
  const int64_t* offsets;            // [batch * kv_heads + 1]
  const int64_t* positions;          // [batch, queries]; negative = sees nothing
  const int32_t* routes;             // [batch, queries, heads, width]
  int64_t width;
  int64_t group_size, chunk_size, keep_first, keep_last;
  float scale;
  bool wide = false;
};

inline bool wide_out(const RoutedProblem&) { return false; }
inline bool wide_out(const PageProblem& p) { return p.wide; }

// out [batch, queries, heads, dim] of the element type (but for `wide`) and lse [batch, heads, queries], contiguous, written whole.
// Throws std::bad_alloc before anything is written.
void hga_attention_forward(const RoutedProblem& problem, void* out, float* lse, Isa isa, Execution execution);
void hga_pages_forward(const PageProblem& problem, void* out, float* lse, Isa isa, Execution execution);

// Gradients with the routes held fixed, contiguous and written whole: q like q, k and v like k. grad_out like q with its
// strides; grad_lse and lse [batch, heads, queries] contiguous; out contiguous.
struct RoutedGradients {
  void *q, *k, *v;
};
void hga_attention_backward(const RoutedProblem& problem, const Sequence4& grad_out, const float* grad_lse,
                            const void* out, const float* lse, const RoutedGradients& gradients, Isa isa,
                            Execution execution);

// Tokens of a run at most.
constexpr int64_t kRunTokens = 64;
// Rows up to which a list is attended without packing keys: they are then read faster than they could be packed; and
// tokens of a run of such a list at most.
constexpr int64_t kFewRows = 16, kFewTokens = 16;

struct Run {
  // of its first token; with `columns`, of column 0: token i lies at column columns[i]
  const void *k, *v;
  const int64_t* columns;
  int64_t start;  // index of the first token
  int32_t count;
  int32_t rows_begin, rows_count;  // in RunList::row_ids, ascending
};

// Rows come in order of their index.
struct RunList {
  Element element;
  int64_t dim, k_step, v_step;  // elements from token to token (or column to column)
  float scale;
  bool wide;  // results in float32, whatever the element
  int64_t rows;
  const void* const* q;
  const int64_t* index;  // a row sees tokens up to it
  void* const* out;
  float* const* lse;
  const Run* runs;
  int64_t run_count;
  const int32_t* row_ids;
};

struct RunSizes {
  int64_t rows = 0;
};

// What a row's gradient is made of, beside RunList.
struct RunGradients {
  const void* const* grad_out;  // [rows]
  const float* const* grad_lse;
  void* const* q;               // [rows]
  float *k, *v;                 // [tokens][dim], added to
};

struct RunPath {
  int64_t (*partial_width)(int64_t dim);
  int64_t (*scratch)(const RunList&, const RunSizes&);
  // any number of rows up to sizes.rows
  void (*many)(const RunList&, const RunSizes&, void* scratch);
  // at most kFewRows rows over the list's runs [begin, end); partial null = results are final
  void (*few)(const RunList&, int64_t begin, int64_t end, float* partial, void* scratch);
  void (*merge)(const RunList&, float* partials, int64_t count);
  int64_t (*backward_scratch)(const RunList&, const RunSizes&);
  void (*backward)(const RunList&, const RunSizes&, const RunGradients&, void* scratch);
  // rows of floats to the element type
  void (*narrow)(Element, const float* from, int64_t count, void* to);
};

#define HICI_DECLARE(value, text, space) \
  namespace space {                      \
  RunPath run_path();                    \
  }
HICI_PATHS(HICI_DECLARE)
#undef HICI_DECLARE

}  // namespace hici::cpu
