// Products of two functions on the sphere, times a gate (mlip/nn/sphere_product.py, gated_product).
//
// With coefficients a, b of two functions, latitudes t and orders mu (mlip/ops/sphere_tables.py),
//
//   A_mu = sum of P[t, row] a[row] over the rows of an order;  B_mu likewise
//   C_mu = sum of tau[mu, i, j] A_i B_j                        the product over the longitudes
//   out[row] = gate * sum of Q[t, row] C_mu(row) over t.
//
// tau is symmetric, so both gradients are such products with P and Q in other places. One thread
// for a channel of a row: coefficients and sums in registers, each number read and written once,
// nothing of the size of the grid anywhere. One thread makes each sum: no atomics, the same bits
// every time.
//
// A function has one array or one for each order, y0, y1, ...: [N, rows of the array, 2 width],
// halves a and b; the first begins with `extra` numbers. Tables are in gated_product_table.h.
#include "columns.cuh"
#include "gated_product_table.h"
#include "lanes.cuh"

// Where row i of half 0 or 1 begins for a thread, in the arrays of the two functions.
template <int i, typename P>
__device__ __forceinline__ P factor_at(P const* arrays, const Column& column, int half, int extra,
                                       int width) {
  constexpr int array = array_of_row(i), n = rows_of_array(array);
  const int first = array == 0 ? extra : 0;
  const size_t begin = column.row * ((size_t)2 * n * width + first) + first;
  return arrays[array] + begin + (2 * position_of_row(i) + half) * width + column.channel;
}

// The same in the arrays of their product, [N, rows of the array, width].
template <int i, typename P>
__device__ __forceinline__ P product_at(P const* arrays, const Column& column, int width) {
  constexpr int array = array_of_row(i), n = rows_of_array(array);
  return arrays[array] + (column.row * n + position_of_row(i)) * width + column.channel;
}

template <typename T>
__device__ __forceinline__ void load_factor(const T* const* arrays, const Column& column, int half,
                                            int extra, int width, T (&x)[ROWS]) {
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value;
    x[i] = *factor_at<i>(arrays, column, half, extra, width);
  });
}

// Amplitudes of the orders on one circle of latitude; the rows of an order follow each other.
template <int TABLE, typename T>
__device__ __forceinline__ void amplitudes(int latitude, const T (&x)[ROWS], T (&found)[ORDERS]) {
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value, order = order_of_row(i);
    const T term = tables<T>[TABLE][latitude][i] * x[i];
    if constexpr (i == first_row(order)) {
      found[order] = term;
    } else {
      found[order] += term;
    }
  });
}

// The product of two functions: X, Y are their tables on the way to circles, OUT that of the sums.
template <int X, int Y, int OUT, typename T>
__device__ __forceinline__ void product(const T (&x)[ROWS], const T (&y)[ROWS], T (&sums)[ROWS]) {
  unrolled<0, ROWS>([&](auto index) { sums[decltype(index)::value] = 0; });
#pragma unroll 1
  for (int latitude = 0; latitude < LATITUDES; ++latitude) {
    T a[ORDERS], b[ORDERS], c[ORDERS];
    amplitudes<X>(latitude, x, a);
    amplitudes<Y>(latitude, y, b);
    over_longitudes(a, b, c);
    unrolled<0, ROWS>([&](auto index) {
      constexpr int i = decltype(index)::value;
      sums[i] += tables<T>[OUT][latitude][i] * c[order_of_row(i)];
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(BLOCK, 1) gated_product(
    ARRAYS(const T* __restrict__, y), const T* __restrict__ gate, ARRAYS(T* __restrict__, out),
    int n_rows, int width, int extra) {
  const Column column(n_rows, width);
  if (!column.exists) return;
  const T* const factors[] = {NAMES(y)};
  T* const products[] = {NAMES(out)};
  T a[ROWS], b[ROWS], sums[ROWS];
  load_factor(factors, column, 0, extra, width, a);
  load_factor(factors, column, 1, extra, width, b);
  product<THERE, THERE, BACK>(a, b, sums);
  const T scale = gate[column.row * width + column.channel];
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value;
    *product_at<i>(products, column, width) = scale * sums[i];
  });
}

// Gradients by the first half and the gate, then by the second half, from those g by the product.
template <typename T>
__global__ void __launch_bounds__(BLOCK, 1) gated_slopes(
    ARRAYS(const T* __restrict__, y), const T* __restrict__ gate, ARRAYS(const T* __restrict__, g),
    ARRAYS(T* __restrict__, of_y), T* __restrict__ of_gate, int n_rows, int width, int extra) {
  const Column column(n_rows, width);
  if (!column.exists) return;
  const T* const factors[] = {NAMES(y)};
  const T* const gradients[] = {NAMES(g)};
  T* const slopes[] = {NAMES(of_y)};
  T by_product[ROWS], other[ROWS], sums[ROWS];
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value;
    by_product[i] = *product_at<i>(gradients, column, width);
  });
  load_factor(factors, column, 1, extra, width, other);
  product<BACK, THERE, THERE>(by_product, other, sums);
  load_factor(factors, column, 0, extra, width, other);
  const size_t own = column.row * width + column.channel;
  const T scale = gate[own];
  T slope = 0;
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value;
    slope += other[i] * sums[i];
    *factor_at<i>(slopes, column, 0, extra, width) = scale * sums[i];
  });
  of_gate[own] = slope;
  product<BACK, THERE, THERE>(by_product, other, sums);
  unrolled<0, ROWS>([&](auto index) {
    constexpr int i = decltype(index)::value;
    *factor_at<i>(slopes, column, 1, extra, width) = scale * sums[i];
  });
}
