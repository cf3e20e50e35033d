// Depthwise convolutions on CPUs, and the gradients of their kernels, for XLA's FFI.
//
// Images are [N, H, W, K, C] of K edges ("many") or [N, H, W, C], the same for all ("few"); kernels are
// [K, k, k, C]. Row h of the output meets row (h * stride + i * kernel_dilation - low) / input_dilation
// of the input at tap i of the kernel, or of the reversed kernel, where the division leaves no
// remainder and the row exists; columns likewise.
//
//   convolve(image, kernel) -> image: few or many to many, or many to few, then summed over the edges
//   correlate(image, many) -> kernel: few or many in place of the input, many in place of the output
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
  bool many_in, many_out, reversed;

  int64_t in_pixel() const { return many_in ? total() : channels; }
  int64_t out_pixel() const { return many_out ? total() : channels; }
  int64_t in_size() const { return in_height * in_width * in_pixel(); }
  int64_t out_size() const { return out_height * out_width * out_pixel(); }
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
INLINE void gather(const T* pixel, const Shape& s, Block block, T* lanes) {
  if (s.many_in) {
    at(lanes) = load(pixel + block.first, block.used);
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
INLINE void pad(const T* image, const Shape& s, Block block, T* padded) {
  for (int64_t h = 0; h < s.in_height; ++h) {
    const int64_t row = h * s.input_dilation + s.low;
    if (row < 0 || row >= s.height()) continue;
    for (int64_t w = 0; w < s.in_width; ++w) {
      const int64_t column = w * s.input_dilation + s.low;
      if (column < 0 || column >= s.width()) continue;
      gather(image + (h * s.in_width + w) * s.in_pixel(), s, block,
           padded + (row * s.width() + column) * LANES);
    }
  }
}

// Calls visit(tap in the order of the loops, lane, place in the kernel).
template <typename Visit>
INLINE void kernel_lanes(const Shape& s, Block block, const Visit& visit) {
  const int64_t taps = s.size * s.size;
  for (int64_t l = 0; l < block.used; ++l) {
    const int64_t edge = (block.first + l) / s.channels, channel = (block.first + l) % s.channels;
    for (int64_t t = 0; t < taps; ++t)
      visit(t, l, (edge * taps + (s.reversed ? taps - 1 - t : t)) * s.channels + channel);
  }
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
INLINE void convolve(const T* image, const T* kernel, const Shape& s, T* padded, T* taps, T* out) {
  const int64_t width = s.width() * LANES, step = s.stride * LANES;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const Block block = block_of(s, b);
    // Without edges, few channels fill the lanes of every block alike.
    if (s.many_in || b == 0 || LANES % s.channels) pad(image, s, block, padded);
    kernel_lanes(s, block, [&](int64_t t, int64_t l, int64_t i) { taps[t * LANES + l] = kernel[i]; });
    for (int64_t h = 0; h < s.out_height; ++h) {
      const T* row = padded + h * s.stride * width;
      for (int64_t w = 0; w < s.out_width; w += TILE) {
        Vector<T> sums[TILE];
        sum_taps<T, TILE>(row + w * step, taps, s, sums);
        const int64_t valid = std::min(TILE, s.out_width - w);
        const int64_t pixel = h * s.out_width + w;
        for (int64_t t = 0; t < valid; ++t) {
          T* to = out + (pixel + t) * s.out_pixel();
          if (s.many_out) {
            store(sums[t], block.used, to + block.first);
          } else {
            add(reinterpret_cast<const T*>(&sums[t]), s, block, to);
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
  for (int64_t j = 0; j < SIZE; ++j) at(sums + j * LANES) = total[j];
}

template <typename T>
INLINE void correlate(const T* image, const T* many, const Shape& s, T* padded, T* taps, T* kernel) {
  const int64_t tap = s.kernel_dilation * LANES;
  for (int64_t b = 0; b < s.blocks(); ++b) {
    const Block block = block_of(s, b);
    if (s.many_in || b == 0 || LANES % s.channels) pad(image, s, block, padded);
    for (int64_t i = 0; i < s.size; ++i) {
      const T* rows = padded + i * s.kernel_dilation * s.width() * LANES;
      T* sums = taps + i * s.size * LANES;
      int64_t j = 0;
      for (; j + 5 <= s.size; j += 5)
        correlate_row<T, 5>(rows + j * tap, many, s, block, sums + j * LANES);
      for (; j + 3 <= s.size; j += 3)
        correlate_row<T, 3>(rows + j * tap, many, s, block, sums + j * LANES);
      for (; j < s.size; ++j)
        correlate_row<T, 1>(rows + j * tap, many, s, block, sums + j * LANES);
    }
    kernel_lanes(s, block, [&](int64_t t, int64_t l, int64_t i) { kernel[i] = taps[t * LANES + l]; });
  }
}

CLONES void convolve_one(const float* image, const float* kernel, const Shape& s, float* padded,
                         float* taps, float* out) {
  convolve(image, kernel, s, padded, taps, out);
}
CLONES void convolve_one(const double* image, const double* kernel, const Shape& s, double* padded,
                         double* taps, double* out) {
  convolve(image, kernel, s, padded, taps, out);
}
CLONES void correlate_one(const float* image, const float* many, const Shape& s, float* padded,
                          float* taps, float* kernel) {
  correlate(image, many, s, padded, taps, kernel);
}
CLONES void correlate_one(const double* image, const double* many, const Shape& s, double* padded,
                          double* taps, double* kernel) {
  correlate(image, many, s, padded, taps, kernel);
}

template <typename Dimensions>
Shape shape_of(const Dimensions& in, const Dimensions& out, const Dimensions& kernel, int64_t stride,
               int64_t input_dilation, int64_t kernel_dilation, int64_t low, bool reversed) {
  return {in[0], in[1], in[2], out[1], out[2], kernel[0], kernel[3], kernel[1], stride,
          input_dilation, kernel_dilation, low, in.size() == 5, out.size() == 5, reversed};
}

template <ffi::DataType type>
ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<type> image, ffi::Buffer<type> kernel,
                    ffi::ResultBuffer<type> out, int64_t stride, int64_t input_dilation,
                    int64_t kernel_dilation, int64_t low, bool reversed) {
  using T = Native<type>;
  const Shape s = shape_of(image.dimensions(), out->dimensions(), kernel.dimensions(), stride,
                           input_dilation, kernel_dilation, low, reversed);
  const T *from = image.typed_data(), *weights = kernel.typed_data();
  T* result = out->typed_data();
  in_parallel(pool, s.count, [&](int64_t n) {
    std::vector<T> padded(s.height() * s.width() * LANES), taps(s.size * s.size * LANES);
    T* to = result + n * s.out_size();
    if (!s.many_out) std::fill(to, to + s.out_size(), T(0));
    convolve_one(from + n * s.in_size(), weights, s, padded.data(), taps.data(), to);
  });
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Correlate(ffi::ThreadPool pool, ffi::Buffer<type> image, ffi::Buffer<type> many,
                     ffi::ResultBuffer<type> kernel, int64_t stride, int64_t input_dilation,
                     int64_t kernel_dilation, int64_t low, bool reversed) {
  using T = Native<type>;
  const Shape s = shape_of(image.dimensions(), many.dimensions(), kernel->dimensions(), stride,
                           input_dilation, kernel_dilation, low, reversed);
  const T *from = image.typed_data(), *other = many.typed_data();
  const int64_t taps = s.size * s.size, size = taps * s.total();
  // Summed image by image in their order, whatever the number of threads.
  std::vector<T> sums(s.count * size);
  in_parallel(pool, s.count, [&](int64_t n) {
    std::vector<T> padded(s.height() * s.width() * LANES), own(taps * LANES);
    correlate_one(from + n * s.in_size(), other + n * s.out_size(), s, padded.data(), own.data(),
                  sums.data() + n * size);
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
      .template Attr<int64_t>("low")
      .template Attr<bool>("reversed");
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_convolve_f32, Convolve<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_convolve_f64, Convolve<ffi::F64>, Binding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_correlate_f32, Correlate<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_correlate_f64, Correlate<ffi::F64>, Binding<ffi::F64>());
