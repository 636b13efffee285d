// vector.h, gemm.h, tiles.h and pack.h against plain loops in double.

#include "../../cpu/kernels/pack.h"
#include "../driver.h"

namespace hici::cpu::HICI_PATH {
namespace {

using driver::Exact;
using driver::Random;
using driver::fail;
using driver::put;
using driver::value;

#define HICI_TEXT_(x) #x
#define HICI_TEXT(x) HICI_TEXT_(x)
constexpr const char* kPath = HICI_TEXT(HICI_PATH);

// `count` elements in memory of exactly that size.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : memory_(count * static_cast<int64_t>(sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  Exact memory_;
};

template <class T>
void fill(Random& random, T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) put(p + i, random.normal());
}

template <class T>
bool same_bits(const T& a, const T& b) {
  return __builtin_memcmp(&a, &b, sizeof(T)) == 0;
}

// ---- vector.h

template <class T>
void check_conversions() {
  // every 16-bit pattern; floats of this class are compared at random below
  if constexpr (sizeof(T) == 2) {
    for (int base = 0; base < 65536; base += kLanes) {
      Array<T> in(kLanes), out(kLanes);
      Array<float> wide(kLanes);
      for (int i = 0; i < kLanes; ++i) in[i].bits = static_cast<uint16_t>(base + i);
      store(wide.data(), widen(in.data()));
      narrow(out.data(), load(wide.data()));
      for (int i = 0; i < kLanes; ++i) {
        const double expected = value(in[i]);
#if defined(HICI_PATH_AVX512_BF16)
        // the rounding instruction takes subnormal floats for 0
        if (__builtin_fabs(expected) < 0x1p-126 && wide[i] == expected && value(out[i]) == 0) continue;
#endif
        if (expected != expected) {
          if (wide[i] == wide[i] || value(out[i]) == value(out[i])) fail("%s: NaN %04x became a number", kPath, in[i].bits);
        } else if (wide[i] != expected || out[i].bits != in[i].bits) {
          fail("%s: %04x read as %g, written as %04x", kPath, in[i].bits, wide[i], out[i].bits);
        }
      }
    }
  }
}

template <class T>
void check_parts(Random& random) {
  for (int64_t n = 0; n < kLanes; ++n) {
    Array<T> in(n), out(n);
    fill(random, in.data(), n);
    Array<float> wide(kLanes);
    store(wide.data(), widen_part(in.data(), n));
    for (int64_t i = 0; i < kLanes; ++i)
      if (wide[i] != (i < n ? value(in[i]) : 0.0)) fail("%s: widen_part of %d, lane %d", kPath, (int)n, (int)i);
    narrow_part(out.data(), load(wide.data()), n);
    for (int64_t i = 0; i < n; ++i)
      if (!same_bits(in[i], out[i])) fail("%s: narrow_part of %d, lane %d", kPath, (int)n, (int)i);
  }
  for (int round = 0; round < 2000; ++round) {
    Array<float> from(kLanes);
    Array<T> found(kLanes);
    for (int i = 0; i < kLanes; ++i) {
      // any float: ties, subnormals, overflow and infinities come up often enough
      uint32_t bits = random.bits();
      if (random.chance(0.3)) bits &= 0xfffff000u;
      if (random.chance(0.5)) bits = (bits & 0x807fffffu) | static_cast<uint32_t>(random.within(100, 145)) << 23;
      __builtin_memcpy(&from[i], &bits, 4);
    }
    narrow(found.data(), load(from.data()));
    for (int i = 0; i < kLanes; ++i) {
      T expected;
      put(&expected, from[i]);
#if defined(HICI_PATH_AVX512_BF16)
      if (sizeof(T) == 2 && from[i] > -0x1p-126f && from[i] < 0x1p-126f && value(found[i]) == 0) continue;
#endif
      if (from[i] != from[i] ? value(found[i]) == value(found[i]) : !same_bits(found[i], expected))
        fail("%s: %a rounded to %a, expected %a", kPath, from[i], value(found[i]), value(expected));
    }
  }
}

void check_vectors(Random& random) {
  check_conversions<bfloat16>();
  check_conversions<float16>();
  check_parts<float>(random);
  check_parts<bfloat16>(random);
  check_parts<float16>(random);

  Array<float> a(kLanes), b(kLanes), c(kLanes);
  for (int round = 0; round < 100; ++round) {
    fill(random, a.data(), kLanes);
    fill(random, b.data(), kLanes);
    const int64_t n = random.below(kLanes);
    store(c.data(), keep_first(n, load(a.data()), load(b.data())));
    double sum = 0, top = a[0];
    for (int i = 0; i < kLanes; ++i) {
      if (c[i] != (i < n ? a[i] : b[i])) fail("%s: keep_first of %d, lane %d", kPath, (int)n, i);
      sum += a[i];
      top = a[i] > top ? a[i] : top;
    }
    const double found = reduce_add(load(a.data()));
    if (found - sum > 1e-5 || sum - found > 1e-5) fail("%s: reduce_add %g, expected %g", kPath, found, sum);
    if (reduce_max(load(a.data())) != top) fail("%s: reduce_max", kPath);
    const float x = a[0], y = b[0];
    a[0] = __builtin_nanf("");
    store(c.data(), max(load(a.data()), load(b.data())));
    if (c[0] != y) fail("%s: max(NaN, %g) is %g", kPath, y, c[0]);
    store(c.data(), max(load(b.data()), load(a.data())));
    if (c[0] == c[0]) fail("%s: max(%g, NaN) lost the NaN", kPath, y);
    a[0] = y;
    if (!any_differs(load(a.data()), add(load(a.data()), splat(1.0f))) || any_differs(load(a.data()), load(a.data())))
      fail("%s: any_differs", kPath);
    store(c.data(), where_equal(load(a.data()), load(b.data()), splat(x), load(b.data())));
    if (c[0] != x) fail("%s: where_equal", kPath);
  }
}

void check_exp(Random& random) {
  Array<float> x(kLanes), y(kLanes);
  for (int round = 0; round < 40000; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      x[i] = static_cast<float>(-110 + (88 + 110) * (random.bits() / 4294967296.0));
      if (round % 2) x[i] = static_cast<float>(random.normal());
    }
    if (round == 0) x[0] = 0, x[1] = -__builtin_inff(), x[2] = __builtin_nanf(""), x[3] = -0.0f, x[4] = -1e38f;
    store(y.data(), exp(load(x.data())));
    if (round == 0) {
      if (y[0] != 1 || y[1] != 0 || y[2] == y[2] || y[3] != 1 || y[4] != 0)
        fail("%s: exp of 0, -inf, NaN, -0, -1e38 is %g %g %g %g %g", kPath, y[0], y[1], y[2], y[3], y[4]);
      x[2] = 0, y[2] = 1;
    }
    for (int i = 0; i < kLanes; ++i) {
      const double expected = __builtin_exp(static_cast<double>(x[i])), gap = __builtin_fabs(y[i] - expected);
      // below the normal numbers a path may give 0
      const double allowed = expected < 0x1p-125 ? 0x1p-126 : expected * 0x1p-23;
      if (!(gap <= allowed)) fail("%s: exp(%a) = %a, expected %a", kPath, x[i], y[i], expected);
    }
  }
}

// ---- gemm.h

template <class Op>
void check_product(Random& random) {
  constexpr int step = reduction<Op>::step;
  // B is part of a packed matrix of n_all columns and k_all rows: its first n columns and k rows
  const int64_t m = random.within(1, 70), k = random.within(1, random.chance(0.2) ? 300 / step + 1 : 64 / step + 1) * step;
  const int64_t n_all = random.within(1, 12) * kLanes, k_all = k + random.below(3) * step;
  const int64_t n = random.chance(0.5) ? n_all : n_all / kPanel ? random.within(1, n_all / kPanel) * kPanel : n_all;
  const int64_t lda = k + random.below(5), ldc = n + random.below(9);
  const bool onto = random.chance(0.5);
  const int64_t chain = random.chance(0.5) ? chain_of<float> : chain_of<bfloat16>;
  Array<Op> a((m - 1) * lda + k), b(n_all * k_all);
  Array<float> c((m - 1) * ldc + n), before((m - 1) * ldc + n);
  fill(random, a.data(), (m - 1) * lda + k);
  fill(random, b.data(), n_all * k_all);
  fill(random, before.data(), (m - 1) * ldc + n);
  __builtin_memcpy(c.data(), before.data(), ((m - 1) * ldc + n) * sizeof(float));
  tiles_begin();
  if (onto)
    gemm<true>(m, n, k, a.data(), lda, b.data(), c.data(), ldc, k_all, chain);
  else
    gemm<false>(m, n, k, a.data(), lda, b.data(), c.data(), ldc, k_all, chain);
  tiles_end();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < (i + 1 < m ? ldc : n); ++j) {
      const float found = c[i * ldc + j];
      if (j >= n) {
        if (!same_bits(found, before[i * ldc + j])) fail("%s: gemm wrote beside C (%d, %d)", kPath, (int)i, (int)j);
        continue;
      }
      double sum = onto ? before[i * ldc + j] : 0, size = __builtin_fabs(sum);
      for (int64_t t = 0; t < k; ++t) {
        const double product = value(a[i * lda + t]) * value(b[packed_at<Op>(k_all, n_all, t, j)]);
        sum += product, size += __builtin_fabs(product);
      }
      if (!(__builtin_fabs(found - sum) <= size * 0x1p-20))
        fail("%s: gemm of %d x %d x %d (lda %d, ldc %d, of %d columns and %d rows), onto %d: C(%d, %d) = %g, expected %g",
             kPath, (int)m, (int)n, (int)k, (int)lda, (int)ldc, (int)n_all, (int)k_all, (int)onto, (int)i, (int)j, found,
             sum);
    }
  }
}

template <class Op>
void check_column_dots(Random& random) {
  constexpr int step = reduction<Op>::step;
  const int64_t n = random.within(1, 9) * kLanes, k = random.within(1, 150 / step + 1) * step, m = random.within(1, 40);
  Array<Op> a(n * k), b(n * k), rows(m * k);
  Array<float> found(n), c(m * n);
  fill(random, a.data(), n * k);
  fill(random, b.data(), n * k);
  const int64_t chain = random.chance(0.5) ? chain_of<float> : chain_of<bfloat16>;
  column_dots(n, k, a.data(), b.data(), found.data(), chain);
  // row i of `rows` is column i % n of a
  for (int64_t i = 0; i < m; ++i)
    for (int64_t t = 0; t < k; ++t) rows[i * k + t] = a[packed_at<Op>(k, n, t, i % n)];
  tiles_begin();
  gemm<false>(m, n, k, rows.data(), k, b.data(), c.data(), n, k, chain);
  tiles_end();
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0, size = 0;
    for (int64_t t = 0; t < k; ++t) {
      const double product = value(a[packed_at<Op>(k, n, t, j)]) * value(b[packed_at<Op>(k, n, t, j)]);
      sum += product, size += __builtin_fabs(product);
    }
    if (!(__builtin_fabs(found[j] - sum) <= size * 0x1p-20))
      fail("%s: column_dots (%d of %d, k %d) = %g, expected %g", kPath, (int)j, (int)n, (int)k, found[j], sum);
    if (j < m && !same_bits(found[j], c[j * n + j]))
      fail("%s: column_dots (%d of %d, k %d) = %a, gemm gives %a", kPath, (int)j, (int)n, (int)k, found[j], c[j * n + j]);
  }
}

// ---- pack.h

// n rows of d elements, each in memory of its own.
template <class T>
class Rows {
 public:
  Rows(Random& random, int64_t n, int64_t d) : pointers_(n), n_(n) {
    for (int64_t i = 0; i < n; ++i) {
      T* const row = static_cast<T*>(__builtin_malloc(d * sizeof(T)));
      fill(random, row, d);
      pointers_[i] = row;
    }
  }
  ~Rows() {
    for (int64_t i = 0; i < n_; ++i) __builtin_free(const_cast<T*>(pointers_[i]));
  }
  const T* const* data() const { return pointers_.data(); }
  double at(int64_t i, int64_t j) const { return value(pointers_[i][j]); }

 private:
  Array<const T*> pointers_;
  int64_t n_;
};

template <class Op, class T>
void check_packing(Random& random) {
  constexpr int step = reduction<Op>::step;
  const int64_t n = random.within(1, random.chance(0.2) ? 270 : 40), d = random.within(1, random.chance(0.2) ? 260 : 70);
  const Rows<T> rows(random, n, d);
  const auto expect = [&](double found, double expected, const char* what, int64_t i, int64_t j) {
    if (found != expected)
      fail("%s: %s of %d rows of %d (%d-byte elements to %d): (%d, %d) = %g, expected %g", kPath, what, (int)n, (int)d,
           (int)sizeof(T), (int)sizeof(Op), (int)i, (int)j, found, expected);
  };
  {
    const int64_t k_total = round_up(d, step), columns = round_up(n, kLanes);
    Array<Op> out(k_total * columns);
    pack_columns(rows.data(), n, d, out.data());
    for (int64_t k = 0; k < k_total; ++k)
      for (int64_t j = 0; j < columns; ++j)
        expect(value(out[packed_at<Op>(k_total, columns, k, j)]), k < d && j < n ? rows.at(j, k) : 0, "pack_columns", k, j);
  }
  {
    const int64_t k_total = round_up(n, step), columns = round_up(d, kLanes);
    Array<Op> out(k_total * columns);
    pack_depth(rows.data(), n, d, out.data());
    for (int64_t k = 0; k < k_total; ++k)
      for (int64_t j = 0; j < columns; ++j)
        expect(value(out[packed_at<Op>(k_total, columns, k, j)]), k < n && j < d ? rows.at(k, j) : 0, "pack_depth", k, j);
  }
  {
    const int64_t ld = d + random.below(40);
    Array<Op> out(n * ld);
    pack_rows(rows.data(), n, d, ld, out.data());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < ld; ++j) expect(value(out[i * ld + j]), j < d ? rows.at(i, j) : 0, "pack_rows", i, j);
  }
  {
    const int64_t ld = round_up(n, step) + random.below(3) * step;
    Array<Op> out(d * ld);
    pack_rows_transposed(rows.data(), n, d, ld, out.data());
    for (int64_t i = 0; i < d; ++i)
      for (int64_t k = 0; k < ld; ++k)
        expect(value(out[i * ld + k]), k < n ? rows.at(k, i) : 0, "pack_rows_transposed", i, k);
  }
}

}  // namespace

void check_foundation(uint64_t seed, int rounds) {
  Random random(seed);
  check_vectors(random);
  check_exp(random);
  for (int i = 0; i < rounds; ++i) {
    check_product<float>(random);
    check_column_dots<float>(random);
    check_packing<float, float>(random);
    check_packing<typename operand<bfloat16>::type, bfloat16>(random);
    check_packing<float, float16>(random);
#if defined(HICI_PATH_AVX512_BF16)
    check_product<bfloat16>(random);
    check_column_dots<bfloat16>(random);
#endif
  }
}

}  // namespace hici::cpu::HICI_PATH
