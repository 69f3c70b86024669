// Second derivatives of the convolution (mlip/ops/cpu/double_backward.py) for the paths of one input
// degree. With features x, harmonics Y, weights w, gradient g of the result, cotangents x', Y', w' of the
// gradients by the first three, and matrices M(Y), M' = M(Y') of an edge:
//
//   by g:  sum over edges M (w x' + w' x) + M' w x      by w:  x' . M^T g + x . M'^T g
//   by x:  w' M^T g + w M'^T g                          by Y:  C (w x' + w' x) g
//
// all in one pass, where sums of forward and backward passes would read everything six times. With
// RADIAL > 0 weights are made from radial functions b and their cotangents b' as they are needed,
// w = b K and w' = b' K, and the gradient by w is taken to b. That by K is made elsewhere
// (convolution_kernel_gradient.cu).
#include "lanes.cuh"
#include "convolution_table.h"
#include "convolution_tile.cuh"

// A block for each atom, BLOCK of its channels at a time. A null pointer: a cotangent that is zero, or a
// result that is not wanted. of_edges [E, DIM, CHANNELS] are gradients by x of each edge, of_radial
// those by weights [E, WEIGHTS] or radial functions [E, RADIAL]; slopes is the first derivative by weights
// that are given, x . M^T g. Those by harmonics and by radial functions are added to what an earlier
// group wrote with ``add``.
template <typename T>
__global__ void __launch_bounds__(BLOCK) convolution_double_backward(
    const T* __restrict__ features, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ kernel, const T* __restrict__ gradient,
    const T* __restrict__ along_features, const T* __restrict__ along_harmonics,
    const T* __restrict__ along_radial, const long long* __restrict__ rowptr,
    const long long* __restrict__ source, T* __restrict__ of_edges, T* __restrict__ of_harmonics,
    T* __restrict__ of_radial, T* __restrict__ slopes, T* __restrict__ of_gradient, int n_atoms,
    int add) {
  SHARED_DYN(T, matrices);                                  // [SECOND_TILE, STRIDE], M
  T* const along_matrices = matrices + SECOND_TILE<T> * STRIDE;  // the same, M'
  T* const parts = along_matrices + SECOND_TILE<T> * STRIDE;     // [SECOND_TILE, warps, WIDTH]
  constexpr int warps = BLOCK / 32, WIDTH = HARMONICS + RADIAL;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const size_t atom = blockIdx.x, end = rowptr[atom + 1];

  if (!along_harmonics) {
    for (int i = threadIdx.x; i < SECOND_TILE<T> * STRIDE; i += BLOCK) along_matrices[i] = 0;
  }
  for (int c_first = 0; c_first < CHANNELS; c_first += BLOCK) {
    const int c = c_first + threadIdx.x;
    const bool on = c < CHANNELS;
    T g[ROWS], sum[ROWS];
    for_rows(n_atoms, atom, [&](int row, size_t place) {
      g[row] = on ? gradient[place + c] : T(0);
      sum[row] = 0;
    });
    for (size_t first = rowptr[atom]; first < end; first += SECOND_TILE<T>) {
      const int count = min((size_t)SECOND_TILE<T>, end - first);
      fill_tile(harmonics, first, count, matrices);
      if (along_harmonics) fill_tile(along_harmonics, first, count, along_matrices);
      __syncthreads();
      for (int t = 0; t < count; ++t) {
        const size_t e = first + t;
        T dy[32], functions[SUMS], along_functions[SUMS], of_functions[SUMS];
#pragma unroll
        for (int j = 0; j < 32; ++j) dy[j] = 0;
#pragma unroll
        for (int r = 0; r < SUMS; ++r) along_functions[r] = of_functions[r] = 0;
        if (on) {
          read_functions(radial, e, functions);
          if (along_radial) read_functions(along_radial, e, along_functions);
          const size_t from = (size_t)BEFORE * n_atoms + (size_t)source[e] * (DIM * CHANNELS) + c;
          const size_t place = (RADIAL ? 0 : e * WEIGHTS) + FIRST_WEIGHT + c;
          T x[DIM], along[DIM], dx[DIM];
#pragma unroll
          for (int i = 0; i < DIM; ++i) {
            x[i] = features[from + i * CHANNELS];
            along[i] = along_features ? along_features[from + i * CHANNELS] : T(0);
            dx[i] = 0;
          }
          const auto weight = [&](int path) -> T {
            if constexpr (RADIAL == 0) return __ldcs(radial + place + path * CHANNELS);
            return weight_of(functions, kernel + place + path * CHANNELS);
          };
          const auto along_weight = [&](int path) -> T {
            if constexpr (RADIAL > 0) return weight_of(along_functions, kernel + place + path * CHANNELS);
            return along_radial ? __ldcs(along_radial + place + path * CHANNELS) : T(0);
          };
          const auto slope = [&](int path, T first_order, T second_order) {
            if constexpr (RADIAL > 0) {
              add_functions(second_order, kernel + place + path * CHANNELS, of_functions);
            } else {
              if (slopes) __stcs(slopes + place + path * CHANNELS, first_order);
              if (of_radial) __stcs(of_radial + place + path * CHANNELS, second_order);
            }
          };
          add_second(matrices + t * STRIDE, along_matrices + t * STRIDE, x, along, g, weight,
                     along_weight, slope, sum, dx, dy);
          if (of_edges) {
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
      const bool more = add || c_first;
      if (of_harmonics) {
        write_sums<HARMONICS, WIDTH>(parts, count, more, first, of_harmonics);
      }
      if constexpr (RADIAL > 0) {
        if (of_radial) {
          write_sums<RADIAL, WIDTH>(parts + HARMONICS, count, more, first, of_radial);
        }
      }
    }
    if (on && of_gradient) {
      for_rows(n_atoms, atom, [&](int row, size_t place) { of_gradient[place + c] = sum[row]; });
    }
  }
}
