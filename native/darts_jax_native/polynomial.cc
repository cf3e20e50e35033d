// Sums of products of arrays, element by element, for XLA's FFI. They are kernels for the sake of
// compilation: a search has thousands on a few numbers, which XLA compiles one by one.
//
//   polynomial(a_1, ...) -> sum over terms of coefficient times the product of some of the arrays.
//     Term after term, `lengths` says how many, and `places` which, counted from 0.
//   inverse_root(a) -> 1 / sqrt(a + epsilon)

#include <cmath>

#include "common.h"

namespace darts_jax {
namespace {

constexpr int64_t PIECE = 1 << 14, BLOCK = 1 << 9;  // elements: of a task, and of what it has in hand

template <typename T>
INLINE void add_term(const T* const* arrays, const int64_t* places, int64_t length, T coefficient,
                     int64_t first, int64_t size, bool begins, T* __restrict sum) {
  T block[BLOCK];
  const T* product = arrays[places[0]] + first;
  for (int64_t j = 1; j < length; ++j) {
    const T* __restrict factor = arrays[places[j]] + first;
    for (int64_t i = 0; i < size; ++i) block[i] = product[i] * factor[i];
    product = block;
  }
  if (begins)
    for (int64_t i = 0; i < size; ++i) sum[i] = coefficient * product[i];
  else
    for (int64_t i = 0; i < size; ++i) sum[i] += coefficient * product[i];
}
CLONES void term_piece(const float* const* arrays, const int64_t* places, int64_t length,
                       float coefficient, int64_t first, int64_t size, bool begins, float* sum) {
  add_term(arrays, places, length, coefficient, first, size, begins, sum);
}
CLONES void term_piece(const double* const* arrays, const int64_t* places, int64_t length,
                       double coefficient, int64_t first, int64_t size, bool begins, double* sum) {
  add_term(arrays, places, length, coefficient, first, size, begins, sum);
}

template <ffi::DataType type>
ffi::Error Polynomial(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::ResultBuffer<type> out,
                      ffi::Span<const double> coefficients, ffi::Span<const int64_t> lengths,
                      ffi::Span<const int64_t> places) {
  using T = Native<type>;
  std::vector<const T*> arrays;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto array = args.get<ffi::Buffer<type>>(i);
    if (array.has_error()) return array.error();
    arrays.push_back(array->typed_data());
  }
  const int64_t size = out->element_count();
  T* to = out->typed_data();
  in_parallel(pool, (size + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t end = std::min(size, (piece + 1) * PIECE);
    for (int64_t first = piece * PIECE; first < end; first += BLOCK) {
      const int64_t* place = places.begin();
      for (size_t t = 0; t < lengths.size(); place += lengths[t++])
        term_piece(arrays.data(), place, lengths[t], T(coefficients[t]), first,
                   std::min(BLOCK, end - first), t == 0, to + first);
    }
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error InverseRoot(ffi::ThreadPool pool, ffi::Buffer<type> a, ffi::ResultBuffer<type> out,
                       double epsilon) {
  using T = Native<type>;
  const int64_t size = a.element_count();
  const T* from = a.typed_data();
  T* to = out->typed_data();
  in_parallel(pool, (size + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t end = std::min(size, (piece + 1) * PIECE);
    for (int64_t i = piece * PIECE; i < end; ++i) to[i] = T(1) / std::sqrt(from[i] + T(epsilon));
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto PolynomialBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .template Ret<ffi::Buffer<type>>()
      .template Attr<ffi::Span<const double>>("coefficients")
      .template Attr<ffi::Span<const int64_t>>("lengths")
      .template Attr<ffi::Span<const int64_t>>("places");
}
template <ffi::DataType type>
auto InverseRootBinding() {
  return One<type>().template Attr<double>("epsilon");
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_polynomial_f32, Polynomial<ffi::F32>,
                              PolynomialBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_polynomial_f64, Polynomial<ffi::F64>,
                              PolynomialBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_inverse_root_f32, InverseRoot<ffi::F32>,
                              InverseRootBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_inverse_root_f64, InverseRoot<ffi::F64>,
                              InverseRootBinding<ffi::F64>());
