// What the kernels of the convolution share, after convolution_table.h.
#pragma once

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
