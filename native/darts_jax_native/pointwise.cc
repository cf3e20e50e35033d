// Products of every edge's channels with a matrix of its own, and the transpose that gives the
// matrices, for XLA's FFI.
//
//   apply(x [..., K, C], m [K, C, D]) -> y [..., K, D]: y[., e, :] = x[., e, :] m[e], or by the
//     transposed of m [K, D, C]
//   outer(x [..., K, C], y [..., K, D]) -> m [K, C, D]: m[e] = sum over rows of x[., e, :]^T y[., e, :]
//
// As one product of block-diagonal matrices, it would be K times the arithmetic.

#include "common.h"

namespace darts_jax {
namespace {

constexpr int64_t ROWS = 128;  // of a piece of work
constexpr int64_t TILE = 8;    // rows, or channels, whose sums are kept in registers

struct Shape {
  int64_t rows, edges, in, out;
  bool transposed;

  // Of row c, column d of edge e's matrix.
  int64_t place(int64_t e, int64_t c, int64_t d) const {
    return transposed ? (e * out + d) * in + c : (e * in + c) * out + d;
  }

  int64_t pieces() const { return (rows + ROWS - 1) / ROWS; }
  // The channels of several edges, side by side, fill the lanes of a vector.
  bool packed() const { return in == out && (in == 4 || in == 8); }
};

// Lane l of the result is lane l / CHANNELS * CHANNELS + c.
template <typename T, int64_t CHANNELS>
INLINE Vector<T> spread(const Vector<T>& x, int64_t c) {
  Vector<T> y;
  for (int64_t l = 0; l < LANES; ++l) y[l] = x[l / CHANNELS * CHANNELS + c];
  return y;
}

template <typename T, int64_t CHANNELS>
INLINE void apply_packed(const T* x, const T* m, const Shape& s, int64_t rows, T* y) {
  const int64_t width = s.edges * CHANNELS;
  for (int64_t b = 0; b < width; b += LANES) {
    const int64_t used = std::min(LANES, width - b);
    Vector<T> factor[CHANNELS] = {};
    for (int64_t c = 0; c < CHANNELS; ++c)
      for (int64_t l = 0; l < used; ++l)
        factor[c][l] = m[s.place((b + l) / CHANNELS, c, l % CHANNELS)];
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<T> from = load(x + r * width + b, used);
      Vector<T> sum = {};
#pragma GCC unroll 8
      for (int64_t c = 0; c < CHANNELS; ++c) sum += spread<T, CHANNELS>(from, c) * factor[c];
      store(sum, used, y + r * width + b);
    }
  }
}

template <typename T, int64_t CHANNELS>
INLINE void outer_packed(const T* x, const T* y, const Shape& s, int64_t rows, T* m) {
  const int64_t width = s.edges * CHANNELS;
  for (int64_t b = 0; b < width; b += LANES) {
    const int64_t used = std::min(LANES, width - b);
    Vector<T> sums[CHANNELS] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<T> from = load(x + r * width + b, used), to = load(y + r * width + b, used);
#pragma GCC unroll 8
      for (int64_t c = 0; c < CHANNELS; ++c) sums[c] += spread<T, CHANNELS>(from, c) * to;
    }
    for (int64_t c = 0; c < CHANNELS; ++c)
      for (int64_t l = 0; l < used; ++l)
        m[s.place((b + l) / CHANNELS, c, l % CHANNELS)] = sums[c][l];
  }
}

// COUNT rows by a matrix of up to LANES columns, [in, LANES].
template <typename T, int64_t COUNT>
INLINE void apply_rows(const T* x, const T* matrix, const Shape& s, int64_t used, T* y) {
  const int64_t in = s.edges * s.in, out = s.edges * s.out;
  Vector<T> sums[COUNT] = {};
  for (int64_t c = 0; c < s.in; ++c) {
    const Vector<T> factor = at(matrix + c * LANES);
#pragma GCC unroll 8
    for (int64_t t = 0; t < COUNT; ++t) sums[t] += x[t * in + c] * factor;
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < COUNT; ++t) store(sums[t], used, y + t * out);
}

template <typename T>
INLINE void apply(const T* x, const T* m, const Shape& s, int64_t rows, T* y) {
  const int64_t in = s.edges * s.in, out = s.edges * s.out;
  std::vector<T> matrix(s.in * LANES);
  for (int64_t e = 0; e < s.edges; ++e) {
    for (int64_t b = 0; b < s.out; b += LANES) {
      const int64_t used = std::min(LANES, s.out - b);
      for (int64_t c = 0; c < s.in; ++c)
        for (int64_t l = 0; l < used; ++l)
          matrix[c * LANES + l] = m[s.place(e, c, b + l)];
      const T* from = x + e * s.in;
      T* to = y + e * s.out + b;
      int64_t r = 0;
      for (; r + TILE <= rows; r += TILE)
        apply_rows<T, TILE>(from + r * in, matrix.data(), s, used, to + r * out);
      for (; r < rows; ++r)
        apply_rows<T, 1>(from + r * in, matrix.data(), s, used, to + r * out);
    }
  }
}

// COUNT rows of a matrix, up to LANES columns of them.
template <typename T, int64_t COUNT>
INLINE void outer_rows(const T* x, const T* y, const Shape& s, int64_t rows, int64_t used, T* m) {
  const int64_t in = s.edges * s.in, out = s.edges * s.out;
  Vector<T> sums[COUNT] = {};
  for (int64_t r = 0; r < rows; ++r, x += in, y += out) {
    const Vector<T> factor = load(y, used);
#pragma GCC unroll 8
    for (int64_t t = 0; t < COUNT; ++t) sums[t] += x[t] * factor;
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < COUNT; ++t) store(sums[t], used, m + t * s.out);
}

template <typename T>
INLINE void outer(const T* x, const T* y, const Shape& s, int64_t rows, T* m) {
  for (int64_t e = 0; e < s.edges; ++e) {
    for (int64_t b = 0; b < s.out; b += LANES) {
      const int64_t used = std::min(LANES, s.out - b);
      const T *from = x + e * s.in, *to = y + e * s.out + b;
      T* matrix = m + e * s.in * s.out + b;
      int64_t c = 0;
      for (; c + TILE <= s.in; c += TILE)
        outer_rows<T, TILE>(from + c, to, s, rows, used, matrix + c * s.out);
      for (; c < s.in; ++c)
        outer_rows<T, 1>(from + c, to, s, rows, used, matrix + c * s.out);
    }
  }
}

template <typename T>
INLINE void apply_any(const T* x, const T* m, const Shape& s, int64_t rows, T* y) {
  if (s.packed() && s.in == 4) return apply_packed<T, 4>(x, m, s, rows, y);
  if (s.packed()) return apply_packed<T, 8>(x, m, s, rows, y);
  apply(x, m, s, rows, y);
}

template <typename T>
INLINE void outer_any(const T* x, const T* y, const Shape& s, int64_t rows, T* m) {
  if (s.packed() && s.in == 4) return outer_packed<T, 4>(x, y, s, rows, m);
  if (s.packed()) return outer_packed<T, 8>(x, y, s, rows, m);
  outer(x, y, s, rows, m);
}

CLONES void apply_piece(const float* x, const float* m, const Shape& s, int64_t rows, float* y) {
  apply_any(x, m, s, rows, y);
}
CLONES void apply_piece(const double* x, const double* m, const Shape& s, int64_t rows, double* y) {
  apply_any(x, m, s, rows, y);
}
CLONES void outer_piece(const float* x, const float* y, const Shape& s, int64_t rows, float* m) {
  outer_any(x, y, s, rows, m);
}
CLONES void outer_piece(const double* x, const double* y, const Shape& s, int64_t rows, double* m) {
  outer_any(x, y, s, rows, m);
}

template <typename Dimensions>
int64_t product(const Dimensions& d, size_t first, size_t last) {
  int64_t size = 1;
  for (size_t i = first; i < last; ++i) size *= d[i];
  return size;
}

template <ffi::DataType type>
ffi::Error Apply(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::Buffer<type> m,
                 ffi::ResultBuffer<type> y, bool transposed) {
  using T = Native<type>;
  const auto from = x.dimensions(), to = y->dimensions();
  const size_t last = from.size() - 1;
  const Shape s{product(from, 0, last - 1), from[last - 1], from[last], to[last], transposed};
  const T *in = x.typed_data(), *factors = m.typed_data();
  T* out = y->typed_data();
  in_parallel(pool, s.pieces(), [&](int64_t i) {
    const int64_t first = i * ROWS, rows = std::min(ROWS, s.rows - first);
    apply_piece(in + first * s.edges * s.in, factors, s, rows, out + first * s.edges * s.out);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Outer(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::Buffer<type> y,
                 ffi::ResultBuffer<type> m) {
  using T = Native<type>;
  const auto from = x.dimensions(), matrix = m->dimensions();
  const Shape s{product(from, 0, from.size() - 2), matrix[0], matrix[1], matrix[2], false};
  const T *in = x.typed_data(), *out = y.typed_data();
  const int64_t size = s.edges * s.in * s.out;
  // Few sums, in an order that does not depend on the number of threads.
  const int64_t groups = std::min<int64_t>(16, s.pieces());
  const int64_t each = (s.rows + groups - 1) / groups;
  std::vector<T> sums(groups * size);
  in_parallel(pool, groups, [&](int64_t i) {
    const int64_t first = i * each, rows = std::min(each, s.rows - first);
    if (rows > 0)
      outer_piece(in + first * s.edges * s.in, out + first * s.edges * s.out, s, rows,
                  sums.data() + i * size);
  });
  T* result = m->typed_data();
  std::copy(sums.begin(), sums.begin() + size, result);
  for (int64_t g = 1; g < groups; ++g)
    for (int64_t i = 0; i < size; ++i) result[i] += sums[g * size + i];
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto ApplyBinding() {
  return Two<type>().template Attr<bool>("transposed");
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_apply_f32, Apply<ffi::F32>, ApplyBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_apply_f64, Apply<ffi::F64>, ApplyBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_outer_f32, Outer<ffi::F32>, Two<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_outer_f64, Outer<ffi::F64>, Two<ffi::F64>());
