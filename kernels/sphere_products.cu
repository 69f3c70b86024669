// Running products of functions on the sphere (mlip/ops/sphere_products.py).
//
// With f_i = to_grid u_i on the points of a grid, the products f_1 f_2, ..., f_1 ... f_ORDER, each
// multiplied by from_grid; and the gradient by u of a sum of them.
//
// One thread for a channel of an atom, with its coefficients and sums in registers; entries of both
// matrices come in tiles of points through shared memory, and nothing of the size of the grid is
// written. Sums go from point to point: no atomics, the same bits every time.
#include "columns.cuh"
#include "sphere_products_table.h"

// A point in shared memory: its row of to_grid, from FROM its column of from_grid. Steps of four
// let entries be read four at a time.
constexpr int FROM = (ROWS + 3) / 4 * 4, STEP = FROM + (OUT_ROWS + 3) / 4 * 4;

// Coefficients of all parts of the channels, from and to arrays [atoms, N, PARTS * channels].
template <int PARTS, int N, typename T>
__device__ __forceinline__ void load(const T* from, const Column& column, int channels,
                                     T (&values)[PARTS][N]) {
  const T* at = from + column.row * (N * PARTS) * channels + column.channel;
#pragma unroll
  for (int row = 0; row < N; ++row) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      values[part][row] = at[(row * PARTS + part) * channels];
    }
  }
}

template <int PARTS, int N, typename T>
__device__ __forceinline__ void store(T* to, const Column& column, int channels,
                                      const T (&values)[PARTS][N]) {
  if (!column.exists) return;
  T* at = to + column.row * (N * PARTS) * channels + column.channel;
#pragma unroll
  for (int row = 0; row < N; ++row) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      at[(row * PARTS + part) * channels] = values[part][row];
    }
  }
}

// Sums over coefficients at a point, for each part.
template <int PARTS, int N, typename T>
__device__ __forceinline__ void at_point(const T* entries, const T (&x)[PARTS][N],
                                         T (&sums)[PARTS]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) sums[part] = entries[0] * x[part][0];
#pragma unroll
  for (int row = 1; row < N; ++row) {
    const T entry = entries[row];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) sums[part] += entry * x[part][row];
  }
}

// Adds the values of a point to sums of coefficients.
template <int PARTS, int N, typename T>
__device__ __forceinline__ void from_point(const T* entries, const T (&values)[PARTS],
                                           T (&sums)[PARTS][N]) {
#pragma unroll
  for (int row = 0; row < N; ++row) {
    const T entry = entries[row];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) sums[part][row] += entry * values[part];
  }
}

template <int PARTS, int N, typename T>
__device__ __forceinline__ void clear(T (&sums)[PARTS][N]) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int row = 0; row < N; ++row) sums[part][row] = 0;
  }
}

// Calls f with the entries of each point, in tiles; all threads of the block come here.
template <typename T, typename F>
__device__ __forceinline__ void for_points(const T* to_grid, const T* from_grid, int points,
                                           T* tile, F&& f) {
  for (int first = 0; first < points; first += TILE) {
    const int count = points - first < TILE ? points - first : TILE;
    __syncthreads();  // the tile before is no longer read
    for (int i = threadIdx.x; i < count * STEP; i += BLOCK) {
      const int p = first + i / STEP, k = i % STEP;
      if (k < ROWS) tile[i] = to_grid[(size_t)p * ROWS + k];
      if (k >= FROM && k < FROM + OUT_ROWS) tile[i] = from_grid[(size_t)(k - FROM) * points + p];
    }
    __syncthreads();
#pragma unroll 1
    for (int p = 0; p < count; ++p) f(tile + p * STEP);
  }
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, 1) sphere_products(
    const T* __restrict__ u, const T* __restrict__ to_grid, const T* __restrict__ from_grid,
    T* __restrict__ out, int n_atoms, int channels, int points) {
  SHARED_DYN(T, tile);  // [TILE][STEP]
  const Column column(n_atoms, channels);
  T own[ORDER][ROWS], sums[ORDER - 1][OUT_ROWS];
  load(u, column, channels, own);
  clear(sums);
  for_points(to_grid, from_grid, points, tile, [&](const T* entries) {
    T factors[ORDER], products[ORDER - 1];
    at_point(entries, own, factors);
    T product = factors[0];
#pragma unroll
    for (int i = 1; i < ORDER; ++i) products[i - 1] = product *= factors[i];
    from_point(entries + FROM, products, sums);
  });
  store(out, column, channels, sums);
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, 1) sphere_slopes(
    const T* __restrict__ u, const T* __restrict__ gradient, const T* __restrict__ to_grid,
    const T* __restrict__ from_grid, T* __restrict__ out, int n_atoms, int channels, int points) {
  SHARED_DYN(T, tile);  // [TILE][STEP]
  const Column column(n_atoms, channels);
  T own[ORDER][ROWS], given[ORDER - 1][OUT_ROWS], sums[ORDER][ROWS];
  load(u, column, channels, own);
  load(gradient, column, channels, given);
  clear(sums);
  for_points(to_grid, from_grid, points, tile, [&](const T* entries) {
    T factors[ORDER], by_product[ORDER - 1], by_factor[ORDER];
    at_point(entries, own, factors);
    at_point(entries + FROM, given, by_product);
    T before[ORDER - 1];  // products of the factors before the next one
    before[0] = factors[0];
#pragma unroll
    for (int i = 1; i < ORDER - 1; ++i) before[i] = before[i - 1] * factors[i];
    T slope = by_product[ORDER - 2];  // by the product of the first i + 1 factors
#pragma unroll
    for (int i = ORDER - 1; i > 0; --i) {
      by_factor[i] = slope * before[i - 1];
      slope *= factors[i];
      if (i > 1) slope += by_product[i - 2];
    }
    by_factor[0] = slope;
    from_point(entries, by_factor, sums);
  });
  store(out, column, channels, sums);
}
