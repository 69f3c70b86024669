// What kernels share: loops that the compiler writes out, and sums over the lanes of a warp.
#pragma once

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<BEGIN>), …, f(Constant<END − 1>): every index is a constant, so that arrays
// stay in registers and tables cost nothing.
template <int BEGIN, int END, typename F>
__device__ __forceinline__ void unrolled(F&& f) {
  if constexpr (BEGIN < END) {
    f(Constant<BEGIN>());
    unrolled<BEGIN + 1, END>(f);
  }
}

// Sums 32 values over 32 lanes with 31 exchanges: lane i returns the sum of all values[i].
// A lane keeps one half of its values and gives the other to its partner, five times.
template <typename T>
__device__ __forceinline__ T sums_over_lanes(T (&values)[32]) {
  const int lane = threadIdx.x & 31;
  unrolled<0, 5>([&](auto step) {
    constexpr int half = 16 >> decltype(step)::value;
    const bool upper = lane & half;
    unrolled<0, half>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const T given = upper ? values[i] : values[i + half];
      const T kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    });
  });
  return values[0];
}
