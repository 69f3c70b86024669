// Features of atoms rotated into the frames of edges and back (mlip/ops/rotation.py).
//
// For edges e with ends p, Wigner matrices D, scales s, features x of atoms and y in frames,
//
//   phi(x, y, D, s) = sum y_e[r, p, c] s_e[l(r), p, c] D_e[r, k] x_{end(p, e)}[k, c].
//
// rotate_gather is its derivative by y, rotate_scatter by x, matrix_slopes by D, scale_slopes by s.
// Every number is written by one thread, in a fixed order: no atomics, the same bits every time.
//
// A column is one channel of one end; columns are as many as n_ends * channels ("wide"). A frame has
// one array for each order, y0, y1, ..., [E, rows of the order, wide]. The nonzero entries of D are
// numbered degree by degree, row by row. What depends on the degrees is in rotation_table.h.
#include "lanes.cuh"
#include "rotation_table.h"

// A nonzero entry of the matrix of an edge.
template <typename T>
__device__ __forceinline__ T entry_of(const T* matrix, size_t e, int entry) {
  return matrix[e * (ROWS * COLUMNS) + place_of_entry[entry]];
}

// Copies all of them to shared memory, for all threads of the block.
template <typename T>
__device__ __forceinline__ void load_entries(const T* matrix, size_t e, T* entries) {
  for (int i = threadIdx.x; i < ENTRIES; i += blockDim.x) entries[i] = entry_of(matrix, e, i);
}

// Row i of those with degree l, in the array of its order.
template <int l, int i, typename P>
__device__ __forceinline__ P row_of(P const* orders, size_t e, int wide) {
  constexpr int row = row_of_degree(l, i), order = order_of_row(row);
  return orders[order] + (e * rows_of_order(order) + position_of_row(row)) * wide;
}

// One block for an edge and some columns.
template <typename T>
__global__ void __launch_bounds__(BLOCK) rotate_gather(
    const T* __restrict__ x, const T* __restrict__ matrix, const T* __restrict__ scale,
    const long long* __restrict__ ends, ORDERS(T* __restrict__), int n_edges, int n_ends,
    int channels, int n_scales) {
  SHARED_DYN(T, entries);
  T* const y[] = {ORDER_NAMES};
  const size_t e = blockIdx.x;
  const int wide = n_ends * channels, column = blockIdx.y * blockDim.x + threadIdx.x;
  load_entries(matrix, e, entries);
  __syncthreads();
  if (column >= wide) return;
  const int end = column / channels, c = column - end * channels;
  const T* of = x + (size_t)ends[(size_t)end * n_edges + e] * COLUMNS * channels + c;
  const T* scales = scale + e * n_scales * wide + column;
  unrolled<0, LMAX + 1>([&](auto degree) {
    constexpr int l = decltype(degree)::value, width = 2 * l + 1;
    T part[width];
    for (int j = 0; j < width; ++j) part[j] = of[(l * l + j) * channels];
    const T s = scales[n_scales > 1 ? l * wide : 0];
    unrolled<0, rows_of_degree(l)>([&](auto index) {
      constexpr int i = decltype(index)::value, entry = first_entry(l) + i * width;
      T sum = 0;
      for (int j = 0; j < width; ++j) sum += entries[entry + j] * part[j];
      row_of<l, i>(y, e, wide)[column] = s * sum;
    });
  });
}

// One block for an atom and some channels. slots: end * n_edges + edge of all that meet at an atom,
// atom after atom; those of atom n begin at first_slot[n]. Matrices come in tiles.
template <typename T>
__global__ void __launch_bounds__(BLOCK) rotate_scatter(
    T* __restrict__ x, const T* __restrict__ matrix, const T* __restrict__ scale,
    const long long* __restrict__ slots, const long long* __restrict__ first_slot,
    ORDERS(const T* __restrict__), int n_edges, int n_ends, int channels, int n_scales, int add) {
  SHARED_DYN(T, entries);
  const T* const y[] = {ORDER_NAMES};
  const size_t atom = blockIdx.x;
  const int c = blockIdx.y * blockDim.x + threadIdx.x, wide = n_ends * channels;
  const long long last = first_slot[atom + 1];
  T sums[COLUMNS];
  for (int k = 0; k < COLUMNS; ++k) sums[k] = 0;
  for (long long first = first_slot[atom]; first < last; first += TILE) {
    const int count = last - first < TILE ? (int)(last - first) : TILE;
    __syncthreads();  // the tile before is no longer read
    for (int i = threadIdx.x; i < count * ENTRIES; i += blockDim.x) {
      const unsigned slot = (unsigned)slots[first + i / ENTRIES];
      entries[i] = entry_of(matrix, slot % (unsigned)n_edges, i % ENTRIES);
    }
    __syncthreads();
    if (c < channels) {
      for (int t = 0; t < count; ++t) {
        const unsigned slot = (unsigned)slots[first + t], end = slot / (unsigned)n_edges;
        const size_t e = slot - end * (unsigned)n_edges;
        const int column = (int)end * channels + c;
        const T* scales = scale + e * n_scales * wide + column;
        const T* d = entries + t * ENTRIES;
        unrolled<0, LMAX + 1>([&](auto degree) {
          constexpr int l = decltype(degree)::value, width = 2 * l + 1;
          const T s = scales[n_scales > 1 ? l * wide : 0];
          T part[width];  // summed first: long sums of short ones lose fewer digits
          for (int j = 0; j < width; ++j) part[j] = 0;
          unrolled<0, rows_of_degree(l)>([&](auto index) {
            constexpr int i = decltype(index)::value, entry = first_entry(l) + i * width;
            const T value = s * row_of<l, i>(y, e, wide)[column];
            for (int j = 0; j < width; ++j) part[j] += d[entry + j] * value;
          });
          for (int j = 0; j < width; ++j) sums[l * l + j] += part[j];
        });
      }
    }
  }
  if (c < channels) {
    T* to = x + atom * COLUMNS * channels + c;
    for (int k = 0; k < COLUMNS; ++k) to[k * channels] = add ? to[k * channels] + sums[k] : sums[k];
  }
}

// One block for an edge and some columns; n_scales: degrees that have a scale of their own, or 1.
template <typename T>
__global__ void __launch_bounds__(BLOCK) scale_slopes(
    const T* __restrict__ x, const T* __restrict__ matrix, const long long* __restrict__ ends,
    ORDERS(const T* __restrict__), T* __restrict__ of_scale, int n_edges, int n_ends, int channels,
    int n_scales, int add) {
  SHARED_DYN(T, entries);
  const T* const y[] = {ORDER_NAMES};
  const size_t e = blockIdx.x;
  const int wide = n_ends * channels, column = blockIdx.y * blockDim.x + threadIdx.x;
  load_entries(matrix, e, entries);
  __syncthreads();
  if (column >= wide) return;
  const int end = column / channels, c = column - end * channels;
  const T* of = x + (size_t)ends[(size_t)end * n_edges + e] * COLUMNS * channels + c;
  T* slopes = of_scale + e * n_scales * wide + column;
  T slope = 0;
  unrolled<0, LMAX + 1>([&](auto degree) {
    constexpr int l = decltype(degree)::value, width = 2 * l + 1;
    T part[width];
    for (int j = 0; j < width; ++j) part[j] = of[(l * l + j) * channels];
    unrolled<0, rows_of_degree(l)>([&](auto index) {
      constexpr int i = decltype(index)::value, entry = first_entry(l) + i * width;
      T sum = 0;
      for (int j = 0; j < width; ++j) sum += entries[entry + j] * part[j];
      slope += row_of<l, i>(y, e, wide)[column] * sum;
    });
    if (n_scales > 1) {
      slopes[l * wide] = add ? slopes[l * wide] + slope : slope;
      slope = 0;
    }
  });
  if (n_scales == 1) *slopes = add ? *slopes + slope : slope;
}

// One block an edge. Entries are summed, 32 at a time, over the columns of a thread, over lanes, and
// over warps in shared memory.
template <typename T>
__global__ void __launch_bounds__(BLOCK, 3) matrix_slopes(
    const T* __restrict__ x, const T* __restrict__ scale, const long long* __restrict__ ends,
    ORDERS(const T* __restrict__), T* __restrict__ of_matrix, int n_edges, int n_ends, int channels,
    int n_scales, int add) {
  SHARED_DYN(T, by_warp);  // [warps][CHUNKS * 32]
  const T* const y[] = {ORDER_NAMES};
  const size_t e = blockIdx.x;
  const int wide = n_ends * channels, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unrolled<0, CHUNKS>([&](auto chunk) {
    constexpr int begin = 32 * decltype(chunk)::value;
    constexpr int size = ENTRIES - begin < 32 ? ENTRIES - begin : 32;
    T sums[32];
    for (int i = 0; i < 32; ++i) sums[i] = 0;
    for (int column = threadIdx.x; column < wide; column += blockDim.x) {
      const int end = column / channels, c = column - end * channels;
      const T* of = x + (size_t)ends[(size_t)end * n_edges + e] * COLUMNS * channels + c;
      const T* scales = scale + e * n_scales * wide + column;
      unrolled<0, size>([&](auto index) {
        constexpr int entry = begin + decltype(index)::value, l = degree_of_entry(entry);
        constexpr int i = (entry - first_entry(l)) / (2 * l + 1);
        constexpr int j = (entry - first_entry(l)) % (2 * l + 1);
        const T value = scales[n_scales > 1 ? l * wide : 0] * row_of<l, i>(y, e, wide)[column];
        sums[entry - begin] += value * of[(l * l + j) * channels];
      });
    }
    by_warp[warp * (CHUNKS * 32) + begin + lane] = sums_over_lanes(sums);
  });
  __syncthreads();
  T* to = of_matrix + e * (ROWS * COLUMNS);
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) {
    const int entry = entry_of_place[i];
    T sum = 0;
    if (entry >= 0) {
      for (int w = 0; w < blockDim.x / 32; ++w) sum += by_warp[w * (CHUNKS * 32) + entry];
    }
    to[i] = add ? to[i] + sum : sum;
  }
}
