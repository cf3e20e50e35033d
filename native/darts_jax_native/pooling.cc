// 3x3 max pooling with one pixel of padding, by the position of each maximum, for XLA's FFI.
//
//   pool_index(x [N, H, W, C]) -> int8 [N, H', W', C]: the tap 3 i + j of the first maximum
//   pool_take(x, index) -> [N, H', W', C]: the pixels there
//   pool_put(y [N, H', W', C], index) -> [N, H, W, C]: its transpose

#include "common.h"

namespace darts_jax {
namespace {

struct Shape {
  int64_t count, in_height, in_width, out_height, out_width, channels, stride;

  int64_t in_size() const { return in_height * in_width * channels; }
  int64_t out_size() const { return out_height * out_width * channels; }
};

// Calls visit(place in the input, place in the output, their length, tap) for runs that meet, the taps
// of an output in their order.
template <typename Visit>
INLINE void taps(const Shape& s, const Visit& visit) {
  for (int64_t h = 0; h < s.out_height; ++h)
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t row = h * s.stride + i - 1;
      if (row < 0 || row >= s.in_height) continue;
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t first = j == 0;  // at stride 1 or 2, the first column's left is outside
        if (s.in_width < j) continue;
        const int64_t last = std::min(s.out_width, (s.in_width - j) / s.stride + 1);
        const int64_t in = (row * s.in_width + first * s.stride + j - 1) * s.channels;
        const int64_t out = (h * s.out_width + first) * s.channels;
        if (s.stride == 1) {
          visit(in, out, (last - first) * s.channels, 3 * i + j);
        } else {
          for (int64_t w = 0; w < last - first; ++w)
            visit(in + w * s.stride * s.channels, out + w * s.channels, s.channels, 3 * i + j);
        }
      }
    }
}

template <typename T>
INLINE void index_one(const T* x, const Shape& s, int8_t* index) {
  std::vector<T> best(s.out_size()), found(s.out_size(), T(-1));  // of one type, for vectors
  taps(s, [&](int64_t in, int64_t out, int64_t length, int64_t tap) {
    const T* __restrict from = x + in;
    T *__restrict most = best.data() + out, *__restrict to = found.data() + out;
    const T number = T(tap);
    for (int64_t c = 0; c < length; ++c) {
      // What is not a number is more than any, as it spoils a maximum; the first stays.
      const bool more = (to[c] < T(0)) | (!(from[c] <= most[c]) & (most[c] == most[c]));
      most[c] = more ? from[c] : most[c];
      to[c] = more ? number : to[c];
    }
  });
  for (int64_t i = 0; i < s.out_size(); ++i) index[i] = static_cast<int8_t>(found[i]);
}

template <typename T>
INLINE void take_one(const T* x, const int8_t* index, const Shape& s, T* y) {
  taps(s, [&](int64_t in, int64_t out, int64_t length, int64_t tap) {
    const T* __restrict from = x + in;
    const int8_t* __restrict where = index + out;
    T* __restrict to = y + out;
    for (int64_t c = 0; c < length; ++c) to[c] = where[c] == tap ? from[c] : to[c];
  });
}

template <typename T>
INLINE void put_one(const T* y, const int8_t* index, const Shape& s, T* x) {
  std::fill(x, x + s.in_size(), T(0));
  taps(s, [&](int64_t in, int64_t out, int64_t length, int64_t tap) {
    const T* __restrict from = y + out;
    const int8_t* __restrict where = index + out;
    T* __restrict to = x + in;
    for (int64_t c = 0; c < length; ++c) to[c] += where[c] == tap ? from[c] : T(0);
  });
}

CLONES void index_image(const float* x, const Shape& s, int8_t* index) { index_one(x, s, index); }
CLONES void index_image(const double* x, const Shape& s, int8_t* index) { index_one(x, s, index); }
CLONES void take_image(const float* x, const int8_t* index, const Shape& s, float* y) {
  take_one(x, index, s, y);
}
CLONES void take_image(const double* x, const int8_t* index, const Shape& s, double* y) {
  take_one(x, index, s, y);
}
CLONES void put_image(const float* y, const int8_t* index, const Shape& s, float* x) {
  put_one(y, index, s, x);
}
CLONES void put_image(const double* y, const int8_t* index, const Shape& s, double* x) {
  put_one(y, index, s, x);
}

template <typename In, typename Out>
Shape shape_of(const In& in, const Out& out, int64_t stride) {
  return {in[0], in[1], in[2], out[1], out[2], in[3], stride};
}

template <ffi::DataType type>
ffi::Error Index(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::ResultBuffer<ffi::S8> index,
                 int64_t stride) {
  const Shape s = shape_of(x.dimensions(), index->dimensions(), stride);
  const auto* from = x.typed_data();
  int8_t* to = index->typed_data();
  in_parallel(pool, s.count,
              [&](int64_t n) { index_image(from + n * s.in_size(), s, to + n * s.out_size()); });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Take(ffi::ThreadPool pool, ffi::Buffer<type> x, ffi::Buffer<ffi::S8> index,
                ffi::ResultBuffer<type> y, int64_t stride) {
  const Shape s = shape_of(x.dimensions(), y->dimensions(), stride);
  const auto* from = x.typed_data();
  const int8_t* where = index.typed_data();
  auto* to = y->typed_data();
  in_parallel(pool, s.count, [&](int64_t n) {
    take_image(from + n * s.in_size(), where + n * s.out_size(), s, to + n * s.out_size());
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Put(ffi::ThreadPool pool, ffi::Buffer<type> y, ffi::Buffer<ffi::S8> index,
               ffi::ResultBuffer<type> x, int64_t stride) {
  const Shape s = shape_of(x->dimensions(), y.dimensions(), stride);
  const auto* from = y.typed_data();
  const int8_t* where = index.typed_data();
  auto* to = x->typed_data();
  in_parallel(pool, s.count, [&](int64_t n) {
    put_image(from + n * s.out_size(), where + n * s.out_size(), s, to + n * s.in_size());
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto IndexBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<type>>()
      .template Ret<ffi::Buffer<ffi::S8>>()
      .template Attr<int64_t>("stride");
}

template <ffi::DataType type>
auto MoveBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<type>>()
      .template Arg<ffi::Buffer<ffi::S8>>()
      .template Ret<ffi::Buffer<type>>()
      .template Attr<int64_t>("stride");
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_index_f32, Index<ffi::F32>, IndexBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_index_f64, Index<ffi::F64>, IndexBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_take_f32, Take<ffi::F32>, MoveBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_take_f64, Take<ffi::F64>, MoveBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_put_f32, Put<ffi::F32>, MoveBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_pool_put_f64, Put<ffi::F64>, MoveBinding<ffi::F64>());
