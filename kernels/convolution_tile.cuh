// What the kernels of the convolution share, after convolution_table.h.
#pragma once

constexpr int SUMS = power_of_two(RADIAL);  // numbers that hold one for each radial function

// Build the matrices of edges first ... first + count - 1: a lane for each edge, a warp for each share.
template <typename T>
__device__ __forceinline__ void fill_tile(
    const T* __restrict__ harmonics, size_t first, int count, T* matrices) {
  const int warps = blockDim.x / 32, edge = threadIdx.x % 32;
  if (edge >= count) return;
  for (int part = threadIdx.x / 32; part < PARTS; part += warps) {
    edge_matrix(part, harmonics + (first + edge) * HARMONICS, matrices + edge * STRIDE);
  }
}

// Read the radial functions of an edge.
template <typename T>
__device__ __forceinline__ void read_functions(
    const T* __restrict__ radial, size_t e, T (&functions)[SUMS]) {
#pragma unroll
  for (int r = 0; r < SUMS; ++r) functions[r] = r < RADIAL ? radial[e * RADIAL + r] : T(0);
}

// The weight that they make, sum_r functions[r] kernel[r, :]; ``column`` is its place in the first row.
template <typename T>
__device__ __forceinline__ T weight_of(const T (&functions)[SUMS], const T* __restrict__ column) {
  T w = 0;
#pragma unroll
  for (int r = 0; r < RADIAL; ++r) w += functions[r] * column[r * WEIGHTS];
  return w;
}

// Add the gradients by them, for the gradient by the weight.
template <typename T>
__device__ __forceinline__ void add_functions(
    T value, const T* __restrict__ column, T (&of_functions)[SUMS]) {
#pragma unroll
  for (int r = 0; r < RADIAL; ++r) of_functions[r] += value * column[r * WEIGHTS];
}

// Write sums over the warps of a block to out [E, N] of edges first ... first + count - 1, or add them with
// ``add``; each warp begins its part in parts [count, warps, WIDTH].
template <int N, int WIDTH, typename T>
__device__ __forceinline__ void write_sums(
    const T* parts, int count, bool add, size_t first, T* __restrict__ out) {
  constexpr int warps = BLOCK / 32;
  for (int i = threadIdx.x; i < count * N; i += BLOCK) {
    T& sum = out[first * N + i];
    T total = add ? sum : T(0);
    for (int w = 0; w < warps; ++w) total += parts[(i / N * warps + w) * WIDTH + i % N];
    sum = total;
  }
}
