// Weighted sums of images, ReLU, and their transposes, for XLA's FFI. Images are [N, H, W, K, C]
// ("many"), or [N, H, W, 1, C] ("few"), which stands for K alike; factors are [K, C].
//
//   mix(x_1, ..., f_1, ..., bias) -> many: sum over i of x_i f_i, plus bias
//   fold(many, factors) -> few: their product summed over K
//   relu(x), and gate(x, t) -> t where x > 0 or is not a number, 0 elsewhere

#include "common.h"

namespace darts_jax {
namespace {

constexpr int64_t PIECE = 1 << 15;  // bytes of an image that stay in the cache

template <typename T>
INLINE void add_many(const T* __restrict x, const T* __restrict f, int64_t pixels, int64_t channels,
                     T* __restrict out) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels)
    for (int64_t c = 0; c < channels; ++c) out[c] += x[c] * f[c];
}

template <typename T>
INLINE void add_few(const T* __restrict x, const T* __restrict f, int64_t pixels, int64_t few,
                    int64_t channels, T* __restrict out) {
  for (int64_t p = 0; p < pixels; ++p, x += few, out += channels)
    for (int64_t e = 0; e < channels; e += few)
      for (int64_t c = 0; c < few; ++c) out[e + c] += x[c] * f[e + c];
}

template <typename T>
INLINE void add_scaled(const T* x, const T* f, int64_t pixels, int64_t few, int64_t channels, T* out) {
  if (few == channels) return add_many(x, f, pixels, channels, out);
  if (few == 4) return add_few(x, f, pixels, 4, channels, out);
  if (few == 8) return add_few(x, f, pixels, 8, channels, out);
  add_few(x, f, pixels, few, channels, out);
}

template <typename T>
INLINE void sum_edges(const T* __restrict x, const T* __restrict f, int64_t pixels, int64_t few,
                      int64_t channels, T* __restrict out) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += few) {
    for (int64_t c = 0; c < few; ++c) out[c] = x[c] * f[c];
    for (int64_t e = few; e < channels; e += few)
      for (int64_t c = 0; c < few; ++c) out[c] += x[e + c] * f[e + c];
  }
}

template <typename T>
INLINE void fold(const T* x, const T* f, int64_t pixels, int64_t few, int64_t channels, T* out) {
  if (few == 4) return sum_edges(x, f, pixels, 4, channels, out);
  if (few == 8) return sum_edges(x, f, pixels, 8, channels, out);
  sum_edges(x, f, pixels, few, channels, out);
}

template <typename T>
INLINE void gate(const T* x, const T* t, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = x[i] <= T(0) ? T(0) : t[i];
}

CLONES void scaled_piece(const float* x, const float* f, int64_t pixels, int64_t few,
                         int64_t channels, float* out) {
  add_scaled(x, f, pixels, few, channels, out);
}
CLONES void scaled_piece(const double* x, const double* f, int64_t pixels, int64_t few,
                         int64_t channels, double* out) {
  add_scaled(x, f, pixels, few, channels, out);
}
CLONES void fold_piece(const float* x, const float* f, int64_t pixels, int64_t few,
                       int64_t channels, float* out) {
  fold(x, f, pixels, few, channels, out);
}
CLONES void fold_piece(const double* x, const double* f, int64_t pixels, int64_t few,
                       int64_t channels, double* out) {
  fold(x, f, pixels, few, channels, out);
}
CLONES void gate_piece(const float* x, const float* t, int64_t size, float* out) {
  gate(x, t, size, out);
}
CLONES void gate_piece(const double* x, const double* t, int64_t size, double* out) {
  gate(x, t, size, out);
}

template <typename T>
struct Pieces {
  int64_t pixels, each;

  Pieces(int64_t pixels, int64_t channels)
      : pixels(pixels), each(std::max<int64_t>(PIECE / (sizeof(T) * channels), 1)) {}
  int64_t count() const { return (pixels + each - 1) / each; }
  int64_t size(int64_t i) const { return std::min(each, pixels - i * each); }
};

template <ffi::DataType type>
ffi::Error Mix(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::ResultBuffer<type> out) {
  using T = Native<type>;
  const int64_t terms = args.size() / 2;
  std::vector<const T*> images(terms), factors(terms);
  std::vector<int64_t> few(terms);
  const auto bias = args.get<ffi::Buffer<type>>(2 * terms);
  if (bias.has_error()) return bias.error();
  const T* start = bias->typed_data();
  const int64_t channels = bias->element_count(), pixels = out->element_count() / channels;
  for (int64_t i = 0; i < terms; ++i) {
    const auto x = args.get<ffi::Buffer<type>>(i), f = args.get<ffi::Buffer<type>>(terms + i);
    if (x.has_error()) return x.error();
    if (f.has_error()) return f.error();
    images[i] = x->typed_data();
    few[i] = x->element_count() / pixels;
    factors[i] = f->typed_data();
  }
  T* result = out->typed_data();
  const Pieces<T> pieces(pixels, channels);
  in_parallel(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = i * pieces.each, size = pieces.size(i);
    T* to = result + first * channels;
    for (int64_t p = 0; p < size; ++p) std::copy(start, start + channels, to + p * channels);
    for (int64_t t = 0; t < terms; ++t)
      scaled_piece(images[t] + first * few[t], factors[t], size, few[t], channels, to);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Fold(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::Buffer<type> f,
                ffi::ResultBuffer<type> out) {
  using T = Native<type>;
  const int64_t channels = f.element_count(), few = f.dimensions()[1];
  const T *from = x.typed_data(), *factors = f.typed_data();
  T* to = out->typed_data();
  const Pieces<T> pieces(x.element_count() / channels, channels);
  in_parallel(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = i * pieces.each;
    fold_piece(from + first * channels, factors, pieces.size(i), few, channels, to + first * few);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Gate(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::Buffer<type> t,
                ffi::ResultBuffer<type> out) {
  using T = Native<type>;
  const T *sign = x.typed_data(), *from = t.typed_data();
  T* to = out->typed_data();
  const Pieces<T> pieces(x.element_count(), 1);
  in_parallel(pool, pieces.count(), [&](int64_t i) {
    const int64_t first = i * pieces.each;
    gate_piece(sign + first, from + first, pieces.size(i), to + first);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Relu(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::ResultBuffer<type> out) {
  return Gate<type>(pool, x, x, out);
}

template <ffi::DataType type>
auto MixBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .template Ret<ffi::Buffer<type>>();
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_mix_f32, Mix<ffi::F32>, MixBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_mix_f64, Mix<ffi::F64>, MixBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_fold_f32, Fold<ffi::F32>, Two<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_fold_f64, Fold<ffi::F64>, Two<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_gate_f32, Gate<ffi::F32>, Two<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_gate_f64, Gate<ffi::F64>, Two<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_relu_f32, Relu<ffi::F32>, One<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_relu_f64, Relu<ffi::F64>, One<ffi::F64>());
