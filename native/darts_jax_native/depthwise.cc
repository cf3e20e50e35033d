// Depthwise convolution on CPUs, and the two maps that are its transposes, for XLA's FFI.
//
// All three work on images [N, H, W, C] without edges ("few") and [N, H, W, K, C] with K edges
// ("many"), and on kernels [k, k, K, C]. Pixel h of an output meets pixel
// (h * stride + i * kernel_dilation - low) / input_dilation of the input at tap i of the kernel,
// where the division leaves no remainder and the pixel exists.
//
//   expand(few, kernel) -> many: out[n, h, w, e, c] = sum over taps of in[n, ., ., c] * kernel[., ., e, c]
//   contract(many, kernel) -> few: the same with in[n, ., ., e, c], summed over e
//   correlate(few, many) -> kernel: of few in place of the input and many in place of the output
//
// One image and one block of LANES channels at a time: its pixels are copied into a buffer with zeros
// around (and, if dilated, between) them, so that the loops over pixels and taps have no conditions
// and every step of them is one vector of a fixed width.

#include "common.h"

namespace darts_jax {
namespace {

constexpr int64_t TILE = 4;  // neighbouring pixels whose sums are kept in registers

struct Shape {
  int64_t count, in_height, in_width, out_height, out_width, edges, channels, size;
  int64_t stride, input_dilation, kernel_dilation, low;

  int64_t total() const { return edges * channels; }
  int64_t blocks() const { return (total() + LANES - 1) / LANES; }
  int64_t height() const { return (out_height - 1) * stride + (size - 1) * kernel_dilation + 1; }
  // Whole tiles are computed, beyond the last pixel too.
  int64_t width() const {
    int64_t tiles = (out_width + TILE - 1) / TILE;
    return (tiles * TILE - 1) * stride + (size - 1) * kernel_dilation + 1;
  }
};

// What the lanes of a block are: `first` of all edges' channels, `used` lanes.
struct Block {
  int64_t first, used;
};

INLINE Block block_of(const Shape& s, int64_t b) {
  return {b * LANES, std::min(LANES, s.total() - b * LANES)};
}

// One pixel's lanes from an image of `channels` (repeated for each edge) or of edges * channels.
template <typename T>
INLINE void gather(const T* pixel, bool many, const Shape& s, Block block, T* lanes) {
  if (many) {
    if (block.used == LANES) {
      at(lanes) = at(pixel + block.first);
    } else {
      for (int64_t l = 0; l < block.used; ++l) lanes[l] = pixel[block.first + l];
    }
  } else if (s.channels % LANES == 0) {
    at(lanes) = at(pixel + block.first % s.channels);
  } else if (s.channels == 4 && block.used == LANES) {
    for (int64_t l = 0; l < LANES; ++l) lanes[l] = pixel[l % 4];
  } else if (s.channels == 8 && block.used == LANES) {
    for (int64_t l = 0; l < LANES; ++l) lanes[l] = pixel[l % 8];
  } else {
    int64_t c = block.first % s.channels;
    for (int64_t l = 0; l < block.used; ++l) {
      lanes[l] = pixel[c];
      c = c + 1 == s.channels ? 0 : c + 1;
    }
  }
}

// Adds one pixel's lanes to an image of `channels`, over the edges.
template <typename T>
INLINE void add(const T* lanes, const Shape& s, Block block, T* pixel) {
  if (s.channels % LANES == 0) {
    at(pixel + block.first % s.channels) += at(lanes);
  } else if (s.channels == 4 && block.used == LANES) {
    for (int64_t c = 0; c < 4; ++c)
      pixel[c] += (lanes[c] + lanes[c + 4]) + (lanes[c + 8] + lanes[c + 12]);
  } else if (s.channels == 8 && block.used == LANES) {
    for (int64_t c = 0; c < 8; ++c) pixel[c] += lanes[c] + lanes[c + 8];
  } else {
    int64_t c = block.first % s.channels;
    for (int64_t l = 0; l < block.used; ++l) {
      pixel[c] += lanes[l];
      c = c + 1 == s.channels ? 0 : c + 1;
    }
  }
}

template <typename T>
INLINE void pad(const T* image, bool many, const Shape& s, Block block, T* padded) {
  const int64_t pixel = many ? s.total() : s.channels;
  for (int64_t h = 0; h < s.in_height; ++h) {
    const int64_t row = h * s.input_dilation + s.low;
    if (row < 0 || row >= s.height()) continue;
    for (int64_t w = 0; w < s.in_width; ++w) {
      const int64_t column = w * s.input_dilation + s.low;
      if (column < 0 || column >= s.width()) continue;
      gather(image + (h * s.in_width + w) * pixel, many, s, block,
           padded + (row * s.width() + column) * LANES);
    }
  }
}

// The kernel's lanes, [k * k, LANES].
template <typename T>
INLINE void taps_of(const T* kernel, const Shape& s, Block block, T* taps) {
  for (int64_t t = 0; t < s.size * s.size; ++t)
    for (int64_t l = 0; l < block.used; ++l) taps[t * LANES + l] = kernel[t * s.total() + block.first + l];
}

// COUNT neighbouring pixels: the sum over the taps [size, size, LANES] of pixels times taps.
template <typename T, int64_t COUNT>
INLINE void sum_taps(const T* corner, const T* taps, const Shape& s, Vector<T>* result) {
  const int64_t width = s.width() * LANES, step = s.stride * LANES, tap = s.kernel_dilation * LANES;
  Vector<T> sums[COUNT] = {};
  for (int64_t i = 0; i < s.size; ++i, corner += s.kernel_dilation * width) {
    const T* pixel = corner;
    for (int64_t j = 0; j < s.size; ++j, pixel += tap, taps += LANES) {
      const Vector<T> factor = at(taps);
#pragma GCC unroll 8
      for (int64_t t = 0; t < COUNT; ++t) sums[t] += at(pixel + t * step) * factor;
    }
  }
#pragma GCC unroll 8
  for (int64_t t = 0; t < COUNT; ++t) result[t] = sums[t];
}

// expand and contract of one image. `padded` holds zeros where no pixel goes.
template <typename T>
INLINE void convolve(const T* image, const T* kernel, bool many, const Shape& s, T* padded, T* taps, T* out) {
  const int64_t width = s.width() * LANES, step = s.stride * LANES;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const Block block = block_of(s, b);
    // Without edges, few channels fill the lanes of every block alike.
    if (many || b == 0 || LANES % s.channels) pad(image, many, s, block, padded);
    taps_of(kernel, s, block, taps);
    for (int64_t h = 0; h < s.out_height; ++h) {
      const T* row = padded + h * s.stride * width;
      for (int64_t w = 0; w < s.out_width; w += TILE) {
        Vector<T> sums[TILE];
        sum_taps<T, TILE>(row + w * step, taps, s, sums);
        const int64_t valid = std::min(TILE, s.out_width - w);
        const int64_t pixel = h * s.out_width + w;
        for (int64_t t = 0; t < valid; ++t) {
          if (many) {
            add(reinterpret_cast<const T*>(&sums[t]), s, block, out + (pixel + t) * s.channels);
          } else {
            store(sums[t], block.used, out + (pixel + t) * s.total() + block.first);
          }
        }
      }
    }
  }
}

// SIZE taps of one row of the kernel at a time.
template <typename T, int64_t SIZE>
INLINE void correlate_row(const T* padded, const T* many, const Shape& s, Block block, T* sums) {
  const int64_t width = s.width() * LANES, step = s.stride * LANES, tap = s.kernel_dilation * LANES;
  Vector<T> total[SIZE] = {};
  for (int64_t h = 0; h < s.out_height; ++h) {
    const T* pixel = padded + h * s.stride * width;
    const T* other = many + h * s.out_width * s.total() + block.first;
    for (int64_t w = 0; w < s.out_width; ++w, pixel += step, other += s.total()) {
      const Vector<T> factor = load(other, block.used);
#pragma GCC unroll 8
      for (int64_t j = 0; j < SIZE; ++j) total[j] += at(pixel + j * tap) * factor;
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < SIZE; ++j) store(total[j], block.used, sums + j * s.total() + block.first);
}

template <typename T>
INLINE void correlate(const T* few, const T* many, const Shape& s, T* padded, T* kernel) {
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const Block block = block_of(s, b);
    if (b == 0 || LANES % s.channels)
      pad(few, false, s, block, padded);
    for (int64_t i = 0; i < s.size; ++i) {
      const T* rows = padded + i * s.kernel_dilation * s.width() * LANES;
      T* sums = kernel + i * s.size * s.total();
      const int64_t tap = s.kernel_dilation * LANES;
      int64_t j = 0;
      for (; j + 5 <= s.size; j += 5)
        correlate_row<T, 5>(rows + j * tap, many, s, block, sums + j * s.total());
      for (; j + 3 <= s.size; j += 3)
        correlate_row<T, 3>(rows + j * tap, many, s, block, sums + j * s.total());
      for (; j < s.size; ++j)
        correlate_row<T, 1>(rows + j * tap, many, s, block, sums + j * s.total());
    }
  }
}

CLONES void convolve_one(const float* image, const float* kernel, bool many, const Shape& s,
                         float* padded, float* taps, float* out) {
  convolve(image, kernel, many, s, padded, taps, out);
}
CLONES void convolve_one(const double* image, const double* kernel, bool many, const Shape& s,
                         double* padded, double* taps, double* out) {
  convolve(image, kernel, many, s, padded, taps, out);
}
CLONES void correlate_one(const float* few, const float* many, const Shape& s, float* padded,
                          float* kernel) {
  correlate(few, many, s, padded, kernel);
}
CLONES void correlate_one(const double* few, const double* many, const Shape& s, double* padded,
                          double* kernel) {
  correlate(few, many, s, padded, kernel);
}

template <ffi::DataType type>
ffi::Error Convolve(ffi::ThreadPool pool, bool many, ffi::Buffer<type> image, ffi::Buffer<type> kernel,
                    ffi::ResultBuffer<type> out, int64_t stride, int64_t input_dilation,
                    int64_t kernel_dilation, int64_t low) {
  using T = Native<type>;
  const auto in = image.dimensions(), taps_shape = kernel.dimensions(), to = out->dimensions();
  const Shape s{in[0], in[1], in[2], to[1], to[2], taps_shape[2], taps_shape[3], taps_shape[0],
                stride, input_dilation, kernel_dilation, low};
  const T *from = image.typed_data(), *weights = kernel.typed_data();
  T* result = out->typed_data();
  const int64_t in_size = s.in_height * s.in_width * (many ? s.total() : s.channels);
  const int64_t out_size = s.out_height * s.out_width * (many ? s.channels : s.total());
  if (many) std::fill(result, result + s.count * out_size, T(0));
  in_parallel(pool, s.count, [&](int64_t n) {
    std::vector<T> padded(s.height() * s.width() * LANES), taps(s.size * s.size * LANES);
    convolve_one(from + n * in_size, weights, many, s, padded.data(), taps.data(), result + n * out_size);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Expand(ffi::ThreadPool pool, ffi::Buffer<type> image, ffi::Buffer<type> kernel,
                  ffi::ResultBuffer<type> out, int64_t stride, int64_t input_dilation,
                  int64_t kernel_dilation, int64_t low) {
  return Convolve<type>(pool, false, image, kernel, out, stride, input_dilation, kernel_dilation, low);
}

template <ffi::DataType type>
ffi::Error Contract(ffi::ThreadPool pool, ffi::Buffer<type> image, ffi::Buffer<type> kernel,
                    ffi::ResultBuffer<type> out, int64_t stride, int64_t input_dilation,
                    int64_t kernel_dilation, int64_t low) {
  return Convolve<type>(pool, true, image, kernel, out, stride, input_dilation, kernel_dilation, low);
}

template <ffi::DataType type>
ffi::Error Correlate(ffi::ThreadPool pool, ffi::Buffer<type> few, ffi::Buffer<type> many,
                     ffi::ResultBuffer<type> kernel, int64_t stride, int64_t input_dilation,
                     int64_t kernel_dilation, int64_t low) {
  using T = Native<type>;
  const auto in = few.dimensions(), to = many.dimensions(), taps_shape = kernel->dimensions();
  const Shape s{in[0], in[1], in[2], to[1], to[2], taps_shape[2], taps_shape[3], taps_shape[0],
                stride, input_dilation, kernel_dilation, low};
  const T *from = few.typed_data(), *other = many.typed_data();
  const int64_t in_size = s.in_height * s.in_width * s.channels;
  const int64_t out_size = s.out_height * s.out_width * s.total();
  const int64_t size = s.size * s.size * s.total();
  // Summed image by image in their order, whatever the number of threads.
  std::vector<T> sums(s.count * size);
  in_parallel(pool, s.count, [&](int64_t n) {
    std::vector<T> padded(s.height() * s.width() * LANES);
    correlate_one(from + n * in_size, other + n * out_size, s, padded.data(), sums.data() + n * size);
  });
  T* result = kernel->typed_data();
  std::copy(sums.begin(), sums.begin() + size, result);
  for (int64_t n = 1; n < s.count; ++n)
    for (int64_t i = 0; i < size; ++i) result[i] += sums[n * size + i];
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto Binding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<type>>()
      .template Arg<ffi::Buffer<type>>()
      .template Ret<ffi::Buffer<type>>()
      .template Attr<int64_t>("stride")
      .template Attr<int64_t>("input_dilation")
      .template Attr<int64_t>("kernel_dilation")
      .template Attr<int64_t>("low");
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_expand_f32, Expand<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_expand_f64, Expand<ffi::F64>, Binding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_contract_f32, Contract<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_contract_f64, Contract<ffi::F64>, Binding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_correlate_f32, Correlate<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_correlate_f64, Correlate<ffi::F64>, Binding<ffi::F64>());
