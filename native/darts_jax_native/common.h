// What the kernels share: vectors of a fixed width, code for several processors, and threads.

#ifndef DARTS_JAX_NATIVE_COMMON_H_
#define DARTS_JAX_NATIVE_COMMON_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace darts_jax {

namespace ffi = xla::ffi;

constexpr int64_t LANES = 16;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
INLINE Vector<T>& at(T* p) { return *reinterpret_cast<Vector<T>*>(p); }
template <typename T>
INLINE const Vector<T>& at(const T* p) { return *reinterpret_cast<const Vector<T>*>(p); }

// The first `used` lanes to or from memory. What is beyond them is not touched, and is 0.
template <typename T>
INLINE void store(const Vector<T>& lanes, int64_t used, T* to) {
  if (used == LANES) {
    at(to) = lanes;
  } else {
    T all[LANES];
    at(all) = lanes;
    for (int64_t l = 0; l < used; ++l) to[l] = all[l];
  }
}
template <typename T>
INLINE Vector<T> load(const T* from, int64_t used) {
  if (used == LANES) return at(from);
  T all[LANES] = {};
  for (int64_t l = 0; l < used; ++l) all[l] = from[l];
  return at(all);
}

// Calls work(i) for i < count, on the pool's threads and on this one. This one takes what no other
// has begun, so it never waits for a thread that waits for it.
template <typename Work>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable ended;
  };
  auto state = std::make_shared<State>();
  auto run = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->ended.notify_all();
      }
    }
  };
  const int64_t helpers = std::min(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(run));
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->ended.wait(lock, [&] { return state->done.load() == count; });
}

template <ffi::DataType type>
using Native = ffi::NativeType<type>;

// A kernel of one array, or of two.
template <ffi::DataType type>
auto One() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<type>>()
      .template Ret<ffi::Buffer<type>>();
}
template <ffi::DataType type>
auto Two() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<type>>()
      .template Arg<ffi::Buffer<type>>()
      .template Ret<ffi::Buffer<type>>();
}

}  // namespace darts_jax

#endif  // DARTS_JAX_NATIVE_COMMON_H_
