// Arrays cut along their first axis or put together, for XLA's FFI. They are kernels for the sake of
// compilation: a search has hundreds of each, which XLA compiles one by one.

#include <cstring>

#include "common.h"

namespace darts_jax {
namespace {

template <ffi::DataType type>
ffi::Error Split(ffi::Buffer<type> whole, ffi::RemainingRets parts) {
  const auto* from = whole.typed_data();
  for (size_t i = 0; i < parts.size(); ++i) {
    auto part = parts.get<ffi::Buffer<type>>(i);
    if (part.has_error()) return part.error();
    std::memcpy((*part)->typed_data(), from, (*part)->size_bytes());
    from += (*part)->element_count();
  }
  return ffi::Error::Success();
}

template <ffi::DataType type>
ffi::Error Join(ffi::RemainingArgs parts, ffi::ResultBuffer<type> whole) {
  auto* to = whole->typed_data();
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto part = parts.get<ffi::Buffer<type>>(i);
    if (part.has_error()) return part.error();
    std::memcpy(to, part->typed_data(), part->size_bytes());
    to += part->element_count();
  }
  return ffi::Error::Success();
}

template <ffi::DataType type>
auto SplitBinding() {
  return ffi::Ffi::Bind().template Arg<ffi::Buffer<type>>().RemainingRets();
}
template <ffi::DataType type>
auto JoinBinding() {
  return ffi::Ffi::Bind().RemainingArgs().template Ret<ffi::Buffer<type>>();
}

}  // namespace
}  // namespace darts_jax

using namespace darts_jax;

XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_split_f32, Split<ffi::F32>, SplitBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_split_f64, Split<ffi::F64>, SplitBinding<ffi::F64>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_join_f32, Join<ffi::F32>, JoinBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(darts_jax_join_f64, Join<ffi::F64>, JoinBinding<ffi::F64>());
