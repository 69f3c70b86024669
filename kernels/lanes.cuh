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

constexpr int power_of_two(int n) { return n > 1 ? 2 * power_of_two((n + 1) / 2) : 1; }
constexpr int halvings(int n) { return n > 1 ? 1 + halvings(n / 2) : 0; }

// Sums N values, a power of two, over 32 lanes: lane i returns the sum of all values[i % N]. A lane keeps
// one half of its values and gives the other to its partner until one is left: 31 exchanges for N = 32.
template <typename T, int N>
__device__ __forceinline__ T sums_over_lanes(T (&values)[N]) {
  const int lane = threadIdx.x & 31;
  unrolled<0, halvings(N)>([&](auto step) {
    constexpr int half = N / 2 >> decltype(step)::value;
    const bool upper = lane & half;
    unrolled<0, half>([&](auto index) {
      constexpr int i = decltype(index)::value;
      const T given = upper ? values[i] : values[i + half];
      const T kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    });
  });
  T total = values[0];
#pragma unroll
  for (int other = N; other < 32; other *= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
  return total;
}
