// A stand-in for the part of CUDA C++ that the kernels use: g++ compiles their unchanged text with it,
// and every thread of a block becomes a fiber of one CPU thread, so that barriers, shuffles and early
// returns mean what they mean on a GPU.
//
// It notices: wrong indices and wrong mathematics; missing barriers (threads run forwards, backwards
// or shuffled, and results must agree bit for bit); barriers and warp operations that only some threads
// reach; shared memory that nobody wrote (it holds NaN). It cannot notice: speed, memory order.
//
// With SHIM_THREADS (cuda_shim_threads.h) threads are threads of the system, for ThreadSanitizer.
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

#define __host__
#define __device__
#define __constant__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define SHARED_DYN(T, name) T* name = reinterpret_cast<T*>(shim::current().block->shared.data())

#ifdef SHIM_THREADS
#include "cuda_shim_threads.h"
#else
namespace shim {

constexpr size_t STACK = 128 << 10;
enum class State { ready, at_barrier, in_warp, done };

struct Block;
struct Fiber {
  uint3 thread{};
  unsigned lane = 0, warp = 0, exchanges = 0;
  State state = State::ready;
  uint32_t mask = 0;
  bool started = false;
  Block* block = nullptr;
  ucontext_t context;
  jmp_buf place;
};
struct Warp {
  uint32_t members = 0, arrived = 0;
  uint64_t slot[2][32];
};
struct Block {
  dim3 grid{}, size{};
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks, shared;
  unsigned alive = 0, waiting = 0;
  int barrier = 0;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;
};

inline thread_local Block* active = nullptr;
inline std::string last_error;

inline Fiber& current() { return *active->running; }

inline void yield() {
  if (_setjmp(current().place) == 0) _longjmp(active->scheduler, 1);
}

inline void release(Block& block) {
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_barrier) fiber.state = State::ready;
  }
  block.waiting = 0;
}

// Each barrier in the text has a number; all threads of a block must meet at the same one.
inline void barrier(int number) {
  Fiber& own = current();
  Block& block = *own.block;
  if (block.waiting == 0) block.barrier = number;
  if (block.barrier != number && block.error.empty()) {
    block.error = "threads of one block meet at different barriers";
  }
  if (++block.waiting == block.alive) return release(block);
  own.state = State::at_barrier;
  yield();
}

// Returns the lanes that take part: those of the mask that have not left the kernel.
inline uint32_t meet(uint32_t mask) {
  Fiber& own = current();
  Warp& warp = own.block->warps[own.warp];
  mask &= warp.members;
  if (!(mask >> own.lane & 1)) own.block->error = "a lane is not in its own mask";
  own.mask = mask;
  warp.arrived |= 1u << own.lane;
  if ((warp.arrived & mask) != mask) {
    own.state = State::in_warp;
    yield();
    return mask;
  }
  warp.arrived &= ~mask;
  for (Fiber& fiber : own.block->fibers) {
    const bool here = fiber.warp == own.warp && (mask >> fiber.lane & 1);
    if (here && fiber.state == State::in_warp) fiber.state = State::ready;
  }
  return mask;
}

// Two slots in turn: a fast lane may write its next value before a slow one has read this one.
template <typename T>
T exchange(uint32_t mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Fiber& own = current();
  Warp& warp = own.block->warps[own.warp];
  uint64_t* slot = warp.slot[own.exchanges++ & 1];
  std::memcpy(&slot[own.lane], &value, sizeof(T));
  mask = meet(mask);
  T result = value;
  if (from < 32 && (mask >> from & 1)) std::memcpy(&result, &slot[from], sizeof(T));
  return result;
}

inline void run_fiber() {
  Block& block = *active;
  block.body(block.arguments);
  Fiber& own = current();
  own.state = State::done;
  block.warps[own.warp].members &= ~(1u << own.lane);
  if (--block.alive && block.waiting == block.alive) release(block);
  _longjmp(block.scheduler, 1);
}

inline void prepare(Block& block) {
  const unsigned n = block.size.x * block.size.y * block.size.z;
  active = &block;
  block.alive = n;
  block.waiting = 0;
  block.error.clear();
  block.fibers.assign(n, Fiber());
  block.warps.assign((n + 31) / 32, Warp());
  block.stacks.resize(STACK * n);
  std::memset(block.shared.data(), 0xff, block.shared.size());  // NaN
  for (unsigned i = 0; i < n; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.thread = {i % block.size.x, i / block.size.x % block.size.y,
                    i / (block.size.x * block.size.y)};
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    block.warps[fiber.warp].members |= 1u << fiber.lane;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = block.stacks.data() + STACK * i;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

// order: 0 forwards, 1 backwards, others: shuffled anew in each round.
inline bool run_block(Block& block, int order, std::mt19937& random) {
  prepare(block);
  const unsigned n = block.fibers.size();
  std::vector<unsigned> sequence(n);
  for (unsigned i = 0; i < n; ++i) sequence[i] = order == 1 ? n - 1 - i : i;
  while (true) {
    if (order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
    volatile bool ran = false;
    for (volatile unsigned k = 0; k < n; k = k + 1) {
      Fiber& fiber = block.fibers[sequence[k]];
      if (fiber.state != State::ready) continue;
      ran = true;
      block.running = &fiber;
      if (_setjmp(block.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.context);
      }
    }
    if (block.alive == 0) return block.error.empty();
    if (!block.error.empty()) return false;
    if (!ran) {
      block.error = "deadlock: " + std::to_string(block.waiting) + " threads wait at a barrier, " +
                    std::to_string(block.alive - block.waiting) + " in a warp operation";
      return false;
    }
  }
}

}  // namespace shim

#define threadIdx (shim::current().thread)
#define blockIdx (shim::current().block->index)
#define blockDim (shim::current().block->size)
#define gridDim (shim::current().block->grid)
#define __syncthreads() shim::barrier(__COUNTER__)

namespace shim {

template <typename... P, size_t... I>
std::tuple<P...> read(void** arguments, std::index_sequence<I...>) {
  return {*static_cast<P*>(arguments[I])...};
}

// Runs a kernel; arguments are given by address, as cuLaunchKernel takes them.
template <typename... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t bytes, int order, void** arguments) {
  std::tuple<void (*)(P...), std::tuple<P...>> call{
      kernel, read<P...>(arguments, std::index_sequence_for<P...>())};
  Block block;
  block.grid = grid;
  block.size = size;
  block.shared.resize(bytes);
  block.arguments = &call;
  block.body = [](void* pointer) {
    auto& own = *static_cast<decltype(call)*>(pointer);
    std::apply(std::get<0>(own), std::get<1>(own));
  };
  std::mt19937 random(order);
  const unsigned n = grid.x * grid.y * grid.z;
  for (unsigned j = 0; j < n; ++j) {
    const unsigned i = order == 1 ? n - 1 - j : j;
    block.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    if (!run_block(block, order, random)) {
      last_error = block.error;
      return 1;
    }
  }
  return 0;
}

}  // namespace shim
#endif

inline void __syncwarp(uint32_t mask = 0xffffffffu) { shim::exchange(mask, 0, 32); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  const int lane = shim::current().lane;
  return shim::exchange(mask, value, (lane & ~(width - 1)) + (from & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  const int lane = shim::current().lane, from = lane ^ bits;
  return shim::exchange(mask, value, from / width == lane / width ? from : lane);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned steps, int width = 32) {
  const int lane = shim::current().lane, from = lane + steps;
  return shim::exchange(mask, value, from / width == lane / width ? from : lane);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned steps, int width = 32) {
  const int lane = shim::current().lane, from = lane - static_cast<int>(steps);
  return shim::exchange(mask, value, from >= 0 && from / width == lane / width ? from : lane);
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
