// Sums over the pixels of a batch, channel by channel, for XLA's FFI. Images are [N, H, W, ...]: the
// axes behind W are the channels.
//
//   mean(a) -> mean over pixels
//   dot(a, b) -> sum over pixels of a b, where a's channels may be repeated over b's
//   moments(a, b) -> mean of b, and of (a - mean a) (b - mean b): piece by piece in the cache, put
//     together by the formula of Chan, Golub and LeVeque

#include "common.h"

namespace darts_jax {
namespace {

constexpr int64_t PIECE = 1 << 16;  // bytes of an image that stay in the cache

struct Shape {
  int64_t pixels, channels, each;

  int64_t pieces() const { return (pixels + each - 1) / each; }
  int64_t count(int64_t i) const { return std::min(each, pixels - i * each); }
};

template <ffi::DataType type>
Shape shape_of(const ffi::Buffer<type>& a) {
  const auto d = a.dimensions();
  int64_t channels = 1;
  for (size_t i = 3; i < d.size(); ++i) channels *= d[i];
  const int64_t each = PIECE / (sizeof(Native<type>) * std::max<int64_t>(channels, 1));
  return {d[0] * d[1] * d[2], channels, std::max<int64_t>(each, 1)};
}

template <typename T>
INLINE void add_sum(const T* a, int64_t pixels, int64_t channels, T* sums) {
  for (int64_t p = 0; p < pixels; ++p, a += channels)
    for (int64_t c = 0; c < channels; ++c) sums[c] += a[c];
}

template <typename T>
INLINE void add_products(const T* __restrict a, const T* __restrict b, int64_t pixels,
                         int64_t channels, T* __restrict sums) {
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += channels)
    for (int64_t c = 0; c < channels; ++c) sums[c] += a[c] * b[c];
}

template <typename T>
INLINE void add_repeated(const T* __restrict a, const T* __restrict b, int64_t pixels,
                         int64_t few, int64_t channels, T* __restrict sums) {
  for (int64_t p = 0; p < pixels; ++p, a += few, b += channels)
    for (int64_t e = 0; e < channels; e += few)
      for (int64_t c = 0; c < few; ++c) sums[e + c] += a[c] * b[e + c];
}

template <typename T>
INLINE void add_centered(const T* a, const T* b, const T* __restrict mean_a,
                         const T* __restrict mean_b, int64_t pixels, int64_t channels,
                         T* __restrict sums_a, T* __restrict sums_b, T* __restrict sums) {
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += channels)
    for (int64_t c = 0; c < channels; ++c) {
      const T from_a = a[c] - mean_a[c], from_b = b[c] - mean_b[c];
      sums_a[c] += from_a;
      sums_b[c] += from_b;
      sums[c] += from_a * from_b;
    }
}

CLONES void sum_piece(const float* a, int64_t pixels, int64_t channels, float* sums) {
  add_sum(a, pixels, channels, sums);
}
CLONES void sum_piece(const double* a, int64_t pixels, int64_t channels, double* sums) {
  add_sum(a, pixels, channels, sums);
}
template <typename T>
INLINE void add_dot(const T* a, const T* b, int64_t pixels, int64_t few, int64_t channels, T* sums) {
  if (few == channels) return add_products(a, b, pixels, channels, sums);
  if (few == 4) return add_repeated(a, b, pixels, 4, channels, sums);
  if (few == 8) return add_repeated(a, b, pixels, 8, channels, sums);
  add_repeated(a, b, pixels, few, channels, sums);
}
CLONES void dot_piece(const float* a, const float* b, int64_t pixels, int64_t few, int64_t channels,
                      float* sums) {
  add_dot(a, b, pixels, few, channels, sums);
}
CLONES void dot_piece(const double* a, const double* b, int64_t pixels, int64_t few,
                      int64_t channels, double* sums) {
  add_dot(a, b, pixels, few, channels, sums);
}
CLONES void centered_piece(const float* a, const float* b, const float* mean_a, const float* mean_b,
                           int64_t pixels, int64_t channels, float* sums_a, float* sums_b, float* sums) {
  add_centered(a, b, mean_a, mean_b, pixels, channels, sums_a, sums_b, sums);
}
CLONES void centered_piece(const double* a, const double* b, const double* mean_a, const double* mean_b,
                           int64_t pixels, int64_t channels, double* sums_a, double* sums_b, double* sums) {
  add_centered(a, b, mean_a, mean_b, pixels, channels, sums_a, sums_b, sums);
}

template <typename T>
void combine(const std::vector<T>& sums, const Shape& s, T factor, T* result) {
  std::fill(result, result + s.channels, T(0));
  for (int64_t i = 0; i < s.pieces(); ++i)
    for (int64_t c = 0; c < s.channels; ++c) result[c] += sums[i * s.channels + c];
  for (int64_t c = 0; c < s.channels; ++c) result[c] *= factor;
}

template <ffi::DataType type>
ffi::Error Mean(ffi::ThreadPool pool, ffi::Buffer<type> a, ffi::ResultBuffer<type> out) {
  using T = Native<type>;
  const Shape s = shape_of(a);
  const T* from = a.typed_data();
  std::vector<T> sums(s.pieces() * s.channels);
  in_parallel(pool, s.pieces(), [&](int64_t i) {
    sum_piece(from + i * s.each * s.channels, s.count(i), s.channels, sums.data() + i * s.channels);
  });
  combine(sums, s, T(1) / T(s.pixels), out->typed_data());
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Dot(ffi::ThreadPool pool, ffi::Buffer<type> a, ffi::Buffer<type> b,
               ffi::ResultBuffer<type> out) {
  using T = Native<type>;
  const Shape s = shape_of(b);
  const T *x = a.typed_data(), *y = b.typed_data();
  const int64_t few = a.element_count() / s.pixels;
  std::vector<T> sums(s.pieces() * s.channels);
  in_parallel(pool, s.pieces(), [&](int64_t i) {
    dot_piece(x + i * s.each * few, y + i * s.each * s.channels, s.count(i), few, s.channels,
              sums.data() + i * s.channels);
  });
  combine(sums, s, T(1), out->typed_data());
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Moments(ffi::ThreadPool pool, ffi::Buffer<type> a, ffi::Buffer<type> b,
                   ffi::ResultBuffer<type> mean, ffi::ResultBuffer<type> covariance) {
  using T = Native<type>;
  const Shape s = shape_of(a);
  const T *x = a.typed_data(), *y = b.typed_data();
  const int64_t size = s.pieces() * s.channels;
  std::vector<T> mean_x(size), mean_y(size), sums(size);
  in_parallel(pool, s.pieces(), [&](int64_t i) {
    const int64_t first = i * s.each * s.channels, own = i * s.channels;
    const T factor = T(1) / T(s.count(i));
    T *mx = mean_x.data() + own, *my = mean_y.data() + own;
    sum_piece(x + first, s.count(i), s.channels, mx);
    for (int64_t c = 0; c < s.channels; ++c) mx[c] *= factor;
    if (x == y) {
      std::copy(mx, mx + s.channels, my);
    } else {
      sum_piece(y + first, s.count(i), s.channels, my);
      for (int64_t c = 0; c < s.channels; ++c) my[c] *= factor;
    }
    std::vector<T> left_x(s.channels), left_y(s.channels);
    T* sum = sums.data() + own;
    centered_piece(x + first, y + first, mx, my, s.count(i), s.channels, left_x.data(),
                   left_y.data(), sum);
    // What rounding left of the means, which counts where they are large beside the deviations.
    for (int64_t c = 0; c < s.channels; ++c) {
      sum[c] -= left_x[c] * left_y[c] * factor;
      mx[c] += left_x[c] * factor;
      my[c] += left_y[c] * factor;
    }
  });
  T* whole_y = mean->typed_data();
  std::vector<T> whole_x(s.channels);
  std::fill(whole_y, whole_y + s.channels, T(0));
  for (int64_t i = 0; i < s.pieces(); ++i)
    for (int64_t c = 0; c < s.channels; ++c) {
      whole_x[c] += mean_x[i * s.channels + c] * T(s.count(i)) / T(s.pixels);
      whole_y[c] += mean_y[i * s.channels + c] * T(s.count(i)) / T(s.pixels);
    }
  for (int64_t i = 0; i < s.pieces(); ++i)
    for (int64_t c = 0; c < s.channels; ++c)
      sums[i * s.channels + c] += T(s.count(i)) * (mean_x[i * s.channels + c] - whole_x[c]) *
                                  (mean_y[i * s.channels + c] - whole_y[c]);
  combine(sums, s, T(1) / T(s.pixels), covariance->typed_data());
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto MomentsBinding() {
  return Two<type>().template Ret<ffi::Buffer<type>>();
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_mean_f32, Mean<ffi::F32>, One<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_mean_f64, Mean<ffi::F64>, One<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_dot_f32, Dot<ffi::F32>, Two<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_dot_f64, Dot<ffi::F64>, Two<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_moments_f32, Moments<ffi::F32>, MomentsBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_moments_f64, Moments<ffi::F64>, MomentsBinding<ffi::F64>());
