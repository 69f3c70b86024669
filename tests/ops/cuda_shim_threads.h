// The other half of cuda_shim.h: every thread of a block is a thread of the system, so that
// ThreadSanitizer sees races in shared and global memory, and AddressSanitizer what lies outside of
// them; fibers would confuse both. Used by sanitize.py; too slow for anything but small problems.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

namespace shim {

struct Warp {
  std::mutex mutex;
  std::condition_variable met;
  uint32_t members = 0, arrived = 0;
  unsigned round = 0;
  uint64_t slot[2][32];
};
struct Block {
  dim3 grid{}, size{};
  uint3 index{};
  std::mutex mutex;
  std::condition_variable met;
  unsigned alive = 0, waiting = 0, round = 0;
  std::vector<char> shared;
  std::vector<Warp> warps;
  explicit Block(size_t n_warps) : warps(n_warps) {}
};
struct Thread {
  uint3 thread{};
  unsigned lane = 0, warp = 0, exchanges = 0;
  Block* block = nullptr;
};

inline thread_local Thread* running = nullptr;
inline std::string last_error;

inline Thread& current() { return *running; }

inline void release(Block& block) {
  block.waiting = 0;
  ++block.round;
  block.met.notify_all();
}

inline void barrier() {
  Block& block = *current().block;
  std::unique_lock<std::mutex> lock(block.mutex);
  const unsigned round = block.round;
  if (++block.waiting == block.alive) return release(block);
  block.met.wait(lock, [&] { return block.round != round; });
}

inline void leave() {
  Thread& own = current();
  Block& block = *own.block;
  {
    Warp& warp = block.warps[own.warp];
    std::lock_guard<std::mutex> lock(warp.mutex);
    warp.members &= ~(1u << own.lane);
  }
  std::lock_guard<std::mutex> lock(block.mutex);
  if (--block.alive && block.waiting == block.alive) release(block);
}

// Two slots in turn: a fast lane may write its next value before a slow one has read this one.
template <typename T>
T exchange(uint32_t mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Thread& own = current();
  Warp& warp = own.block->warps[own.warp];
  uint64_t* slot = warp.slot[own.exchanges++ & 1];
  std::unique_lock<std::mutex> lock(warp.mutex);
  std::memcpy(&slot[own.lane], &value, sizeof(T));
  mask &= warp.members;
  warp.arrived |= 1u << own.lane;
  if ((warp.arrived & mask) == mask) {
    warp.arrived &= ~mask;
    ++warp.round;
    warp.met.notify_all();
  } else {
    const unsigned round = warp.round;
    warp.met.wait(lock, [&] { return warp.round != round; });
  }
  T result = value;
  if (from < 32 && (mask >> from & 1)) std::memcpy(&result, &slot[from], sizeof(T));
  return result;
}

template <typename... P, size_t... I>
std::tuple<P...> read(void** arguments, std::index_sequence<I...>) {
  return {*static_cast<P*>(arguments[I])...};
}

// Runs a kernel, ``at_once`` blocks at a time: one finds races inside of a block best, because the
// sanitizer remembers few accesses of a word; several find those between blocks.
template <typename... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t bytes, int at_once, void** arguments) {
  const std::tuple<P...> given = read<P...>(arguments, std::index_sequence_for<P...>());
  const unsigned n_blocks = grid.x * grid.y * grid.z, n = size.x * size.y * size.z;
  for (unsigned first = 0; first < n_blocks; first += at_once) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::thread> threads;
    for (unsigned i = first; i < min(first + at_once, n_blocks); ++i) {
      blocks.push_back(std::make_unique<Block>((n + 31) / 32));
      Block* block = blocks.back().get();
      block->grid = grid;
      block->size = size;
      block->index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
      block->shared.assign(bytes, static_cast<char>(0xff));  // NaN
      block->alive = n;
      for (unsigned t = 0; t < n; ++t) block->warps[t / 32].members |= 1u << t % 32;
      for (unsigned t = 0; t < n; ++t) {
        threads.emplace_back([=, &given] {
          Thread own{{t % size.x, t / size.x % size.y, t / (size.x * size.y)}, t % 32, t / 32, 0, block};
          running = &own;
          std::apply(kernel, given);
          leave();
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
  }
  return 0;
}

}  // namespace shim

#define threadIdx (shim::current().thread)
#define blockIdx (shim::current().block->index)
#define blockDim (shim::current().block->size)
#define gridDim (shim::current().block->grid)
#define __syncthreads() shim::barrier()
