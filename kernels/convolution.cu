// The tensor-product convolution (mlip/ops/convolution.py) for the paths of one input degree.
//
//   out_n[path, m3, c] = sum over edges e with target n of w_e[path, c] sum_m1 M_e[path, m3, m1] x_source(e)[m1, c]
//
// M_e, Clebsch-Gordan coefficients times harmonics, does not depend on the channel c: a block builds
// it for a tile of edges in shared memory, then every thread, one a channel, goes through the tile with
// its sums in registers. Features are packed: degree after degree, each [N, 2l + 1, C_l].
// convolution_table.h is generated (mlip/ops/cuda/convolution_table.py).
#include "lanes.cuh"
#include "convolution_table.h"
#include "convolution_tile.cuh"

// A block for each atom and BLOCK channels. With RADIAL > 0 weights are sums over radial functions,
// w = sum_r radial[e, r] kernel[r, :], made as they are needed; the kernel is kept in shared memory if it
// fits there, KEPT.
template <typename T>
__global__ void __launch_bounds__(BLOCK) convolution_forward(
    const T* __restrict__ features, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ kernel, const long long* __restrict__ rowptr,
    const long long* __restrict__ source, T* __restrict__ out, int n_atoms) {
  SHARED_DYN(T, matrices);                             // [TILE, STRIDE]
  T* const functions = matrices + TILE<T> * STRIDE;    // [TILE, RADIAL]
  T* const columns = functions + TILE<T> * RADIAL;     // [RADIAL, PATHS, BLOCK] if KEPT
  const size_t atom = blockIdx.x;
  const int c = blockIdx.y * BLOCK + threadIdx.x;
  const bool on = c < CHANNELS;
  const T* const x_first = features + (size_t)BEFORE * n_atoms + c;

  if constexpr (KEPT<T>) {  // each thread reads its own column only
    for (int i = 0; on && i < RADIAL * PATHS; ++i) {
      const size_t place = (size_t)(i / PATHS) * WEIGHTS + FIRST_WEIGHT + (i % PATHS) * CHANNELS + c;
      columns[i * BLOCK + threadIdx.x] = kernel[place];
    }
  }
  T sum[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) sum[row] = 0;

  const size_t end = rowptr[atom + 1];
  for (size_t first = rowptr[atom]; first < end; first += TILE<T>) {
    const int count = min((size_t)TILE<T>, end - first);
    __syncthreads();
    fill_tile(harmonics, first, count, matrices);
    if constexpr (RADIAL > 0) {
      for (int i = threadIdx.x; i < count * RADIAL; i += BLOCK) {
        functions[i] = radial[first * RADIAL + i];
      }
    }
    __syncthreads();
    for (int t = 0; on && t < count; ++t) {
      const T* const from = x_first + (size_t)source[first + t] * (DIM * CHANNELS);
      T x[DIM];
#pragma unroll
      for (int i = 0; i < DIM; ++i) x[i] = from[i * CHANNELS];
      const T* const given = radial + (first + t) * WEIGHTS + FIRST_WEIGHT + c;
      const auto weight = [&](int path) -> T {
        if constexpr (RADIAL == 0) return __ldcs(given + path * CHANNELS);
        T w = 0;
#pragma unroll
        for (int r = 0; r < RADIAL; ++r) {
          const T* const from_radial = KEPT<T>
              ? columns + (r * PATHS + path) * BLOCK + threadIdx.x
              : kernel + r * WEIGHTS + FIRST_WEIGHT + path * CHANNELS + c;
          w += functions[t * RADIAL + r] * *from_radial;
        }
        return w;
      };
      add_products(matrices + t * STRIDE, x, weight, sum);
    }
  }
  if (on) {
    for_rows(n_atoms, atom, [&](int row, size_t place) { out[place + c] = sum[row]; });
  }
}

// A block for each atom. Gradients by weights go to of_radial [E, WEIGHTS], those by features of
// each edge to of_edges [E, DIM, CHANNELS]; by harmonics, and with RADIAL > 0 by radial functions,
// of_radial [E, RADIAL], they are added over lanes, warps and, with ``add``, to what an earlier group wrote.
template <typename T>
__global__ void __launch_bounds__(BLOCK) convolution_backward(
    const T* __restrict__ features, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ kernel, const T* __restrict__ gradient,
    const long long* __restrict__ rowptr, const long long* __restrict__ source,
    T* __restrict__ of_edges, T* __restrict__ of_harmonics, T* __restrict__ of_radial,
    int n_atoms, int want_features, int want_edges, int add) {
  SHARED_DYN(T, matrices);                               // [BACKWARD_TILE, STRIDE]
  T* const parts = matrices + BACKWARD_TILE<T> * STRIDE;  // [BACKWARD_TILE, warps, WIDTH]
  constexpr int warps = BLOCK / 32, WIDTH = HARMONICS + RADIAL;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t atom = blockIdx.x, end = rowptr[atom + 1];

  for (size_t first = rowptr[atom]; first < end; first += BACKWARD_TILE<T>) {
    const int count = min((size_t)BACKWARD_TILE<T>, end - first);
    fill_tile(harmonics, first, count, matrices);
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const size_t e = first + t;
      const size_t atom_first = (size_t)BEFORE * n_atoms + (size_t)source[e] * (DIM * CHANNELS);
      T dy[32], functions[SUMS], of_functions[SUMS];
#pragma unroll
      for (int j = 0; j < 32; ++j) dy[j] = 0;
#pragma unroll
      for (int r = 0; r < SUMS; ++r) of_functions[r] = 0;
      read_functions(radial, e, functions);
      for (int c = threadIdx.x; c < CHANNELS; c += BLOCK) {
        T x[DIM], g[ROWS], dx[DIM];
#pragma unroll
        for (int i = 0; i < DIM; ++i) {
          x[i] = features[atom_first + i * CHANNELS + c];
          dx[i] = 0;
        }
        for_rows(n_atoms, atom, [&](int row, size_t place) { g[row] = gradient[place + c]; });
        const size_t place = (RADIAL ? 0 : e * WEIGHTS) + FIRST_WEIGHT + c;
        const auto weight = [&](int path) -> T {
          if constexpr (RADIAL == 0) return __ldcs(radial + place + path * CHANNELS);
          return weight_of(functions, kernel + place + path * CHANNELS);
        };
        const auto slope = [&](int path, T value) {
          if constexpr (RADIAL == 0) {
            if (want_edges) __stcs(of_radial + place + path * CHANNELS, value);
          }
          add_functions(value, kernel + place + path * CHANNELS, of_functions);
        };
        add_slopes(matrices + t * STRIDE, x, g, weight, slope, dx, dy);
        if (want_features) {
#pragma unroll
          for (int i = 0; i < DIM; ++i) of_edges[(e * DIM + i) * CHANNELS + c] = dx[i];
        }
      }
      const T total = sums_over_lanes(dy);
      T* const part = parts + (t * warps + warp) * WIDTH;
      if (lane < HARMONICS) part[lane] = total;
      if constexpr (RADIAL > 0) {
        const T of_function = sums_over_lanes(of_functions);
        if (lane < RADIAL) part[HARMONICS + lane] = of_function;
      }
    }
    __syncthreads();
    const int n = want_edges ? count : 0;
    write_sums<HARMONICS, WIDTH>(parts, n, add, first, of_harmonics);
    if constexpr (RADIAL > 0) write_sums<RADIAL, WIDTH>(parts + HARMONICS, n, add, first, of_radial);
  }
}

// Gradient by the features of each atom: the sum over the edges that leave it, in the order ``slots``.
template <typename T>
__global__ void __launch_bounds__(128) sum_of_sources(
    const T* __restrict__ of_edges, const long long* __restrict__ slots,
    const long long* __restrict__ first_slot, T* __restrict__ of_features, int n_atoms) {
  constexpr int WIDTH = DIM * CHANNELS;
  const size_t i = (size_t)blockIdx.x * 128 + threadIdx.x;
  if (i >= (size_t)n_atoms * WIDTH) return;
  const size_t atom = i / WIDTH, column = i % WIDTH;
  T sum = 0;
  for (long long s = first_slot[atom]; s < first_slot[atom + 1]; ++s) {
    sum += of_edges[slots[s] * WIDTH + column];
  }
  of_features[(size_t)BEFORE * n_atoms + i] = sum;
}
