// One matrix K for each edge, applied to all channels (mlip/ops/shared_operator.py).
//
// For edges e with ends p, weights w, features x of atoms and y of edges,
//
//   phi(x, y, K, w) = sum y_e[r, c] w_e[c] K_e[r, i] x_{end(p, e)}[i, c].
//
// operator_gather is its derivative by y, operator_slopes by K and w; operator_scatter adds the same
// products to the ends of edges. Every number is written by one thread, in a fixed order: no atomics,
// the same bits every time. ROWS, COLUMNS, TILE and BLOCK come from operator_table.h. Matrices lie
// row by row in memory, or column by column (transposed).
#include "lanes.cuh"
#include "operator_table.h"

constexpr int SIZE = ROWS * COLUMNS;

// Where number i of a matrix in memory goes, row by row.
__device__ __forceinline__ int place_by_rows(int i, int transposed) {
  return transposed ? i % ROWS * COLUMNS + i / ROWS : i;
}

// One block an edge, threads over channels.
template <typename T>
__global__ void __launch_bounds__(BLOCK) operator_gather(
    const T* __restrict__ x, const T* __restrict__ matrix, const T* __restrict__ weights,
    const long long* __restrict__ ends, T* __restrict__ y, int n_edges, int n_ends, int channels,
    int transposed) {
  SHARED_DYN(T, k);
  const size_t e = blockIdx.x;
  for (int i = threadIdx.x; i < SIZE; i += blockDim.x) {
    k[place_by_rows(i, transposed)] = matrix[e * SIZE + i];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    T of[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) of[i] = 0;
    for (int p = 0; p < n_ends; ++p) {
      const T* from = x + (size_t)ends[(size_t)p * n_edges + e] * COLUMNS * channels + c;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) of[i] += from[i * channels];
    }
    const T w = weights[e * channels + c];
    T* to = y + e * ROWS * channels + c;
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
      T sum = 0;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) sum += k[r * COLUMNS + i] * of[i];
      to[r * channels] = w * sum;
    }
  }
}

// One block for an atom and some channels. slots: end * n_edges + edge of all that meet at an atom,
// atom after atom; those of atom n begin at first_slot[n]. Matrices come in tiles.
template <typename T>
__global__ void __launch_bounds__(BLOCK) operator_scatter(
    T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ matrix,
    const T* __restrict__ weights, const long long* __restrict__ slots,
    const long long* __restrict__ first_slot, int n_edges, int channels, int transposed, int add) {
  SHARED_DYN(T, k);
  const size_t atom = blockIdx.x;
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  const long long last = first_slot[atom + 1];
  T sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = 0;
  for (long long first = first_slot[atom]; first < last; first += TILE) {
    const int count = last - first < TILE ? (int)(last - first) : TILE;
    __syncthreads();  // the tile before is no longer read
    for (int i = threadIdx.x; i < count * SIZE; i += blockDim.x) {
      const size_t e = (unsigned)slots[first + i / SIZE] % (unsigned)n_edges;
      const int entry = i % SIZE;
      k[i - entry + place_by_rows(entry, transposed)] = matrix[e * SIZE + entry];
    }
    __syncthreads();
    if (c < channels) {
      for (int t = 0; t < count; ++t) {
        const size_t e = (unsigned)slots[first + t] % (unsigned)n_edges;
        const T w = weights[e * channels + c];
        const T* from = y + e * COLUMNS * channels + c;
        T of[COLUMNS];
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) of[i] = w * from[i * channels];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          T part = 0;  // summed first: long sums of short ones lose fewer digits
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) part += k[t * SIZE + r * COLUMNS + i] * of[i];
          sums[r] += part;
        }
      }
    }
  }
  if (c < channels) {
    T* to = x + atom * ROWS * channels + c;
    for (int r = 0; r < ROWS; ++r) to[r * channels] = add ? to[r * channels] + sums[r] : sums[r];
  }
}

// One block an edge, 32 channels at a time: lanes hold channels while features are read and the
// gradients of weights summed over rows; then threads hold entries of the gradient of the matrix.
template <typename T>
__global__ void __launch_bounds__(BLOCK, 3) operator_slopes(
    const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ matrix,
    const T* __restrict__ weights, const long long* __restrict__ ends, T* __restrict__ of_matrix,
    T* __restrict__ of_weights, int n_edges, int n_ends, int channels, int transposed) {
  constexpr int STRIDE = 33;  // one more than lanes, so that a column meets all banks
  constexpr int MINE = (SIZE + BLOCK - 1) / BLOCK;
  SHARED_DYN(T, k);
  T* of_ends = k + SIZE;                     // [COLUMNS][STRIDE] features, ends summed
  T* weighted = of_ends + COLUMNS * STRIDE;  // [ROWS][STRIDE] w y
  T* by_warp = weighted + ROWS * STRIDE;     // [warps][32] parts of gradients of weights
  const size_t e = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = BLOCK / 32;
  for (int i = threadIdx.x; i < SIZE; i += BLOCK) {
    k[place_by_rows(i, transposed)] = matrix[e * SIZE + i];
  }
  T sums[MINE];
  for (int m = 0; m < MINE; ++m) sums[m] = 0;
  for (int begin = 0; begin < channels; begin += 32) {
    const int c = begin + lane;
    const bool on = c < channels;
    __syncthreads();  // the channels before are no longer read
    for (int i = warp; i < COLUMNS; i += warps) {
      T sum = 0;
      for (int p = 0; on && p < n_ends; ++p) {
        sum += x[((size_t)ends[(size_t)p * n_edges + e] * COLUMNS + i) * channels + c];
      }
      of_ends[i * STRIDE + lane] = sum;
    }
    __syncthreads();
    const T w = on ? weights[e * channels + c] : T(0);
    T slope = 0;
    for (int r = warp; r < ROWS; r += warps) {
      const T value = on ? y[(e * ROWS + r) * channels + c] : T(0);
      weighted[r * STRIDE + lane] = w * value;
      T product = 0;
      for (int i = 0; i < COLUMNS; ++i) product += k[r * COLUMNS + i] * of_ends[i * STRIDE + lane];
      slope += value * product;
    }
    by_warp[warp * 32 + lane] = slope;
    __syncthreads();
    if (warp == 0 && on) {
      T total = 0;
      for (int other = 0; other < warps; ++other) total += by_warp[other * 32 + lane];
      of_weights[e * channels + c] = total;
    }
    T parts[MINE];  // summed first: long sums of short ones lose fewer digits
    for (int m = 0; m < MINE; ++m) parts[m] = 0;
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int m = 0; m < MINE; ++m) {
        const int entry = threadIdx.x + m * BLOCK;
        if (entry < SIZE) {
          const T left = weighted[entry / COLUMNS * STRIDE + i];
          parts[m] += left * of_ends[entry % COLUMNS * STRIDE + i];
        }
      }
    }
    for (int m = 0; m < MINE; ++m) sums[m] += parts[m];
  }
#pragma unroll
  for (int m = 0; m < MINE; ++m) {
    const int entry = threadIdx.x + m * BLOCK;
    if (entry < SIZE) {
      const int row = entry / COLUMNS, column = entry % COLUMNS;
      of_matrix[e * SIZE + (transposed ? column * ROWS + row : entry)] = sums[m];
    }
  }
}
