// Gradients of the convolution by the kernel of its radial functions, with products of any degrees read
// from tables: what convolution.cu and convolution_tables.cu leave out. As there, P = sum_m3 C g[m3] of a
// panel is made once for a tile of edges, and the slope of a weight is x . P Y.
#include "convolution_tables.cuh"

// x . P y for the products of a panel, s = x . P.
template <int B, typename T>
__device__ __forceinline__ T slope_of(const T (&s)[B], const T (&y)[PADDED<B>]) {
  T slope = 0;
#pragma unroll
  for (int j = 0; j < B; ++j) slope += s[j] * y[j];
  return slope;
}

// The sum over edges of b[e, r] times the slope of the weight: a block for each path and blockDim.x channels
// takes every gridDim.x-th atom, and writes its own sum to of_kernel [gridDim.x, n_radial, n_weights]. With
// SECOND the gradient for cotangents x' (null: zero), and Y', b' in ``along``, of the gradients by the
// others: b (x' . P Y + x . P Y') + b' x . P Y.
template <bool SECOND, typename T>
__device__ __forceinline__ void sum_kernel_slopes(
    T* memory, const Plan<T>& plan, const Edges<T>& in, const Edges<T>& along,
    const T* __restrict__ from, const T* __restrict__ along_from, const T* __restrict__ gradient,
    const long long* __restrict__ first_edge, T* __restrict__ of_kernel, int n_slots, int channels) {
  const Tile<T> tile(memory, in, n_slots);  // its column holds slopes
  const Tile<T> turned(SECOND ? tile.rest : memory, along, n_slots);  // of x, Y, by the weights b'
  T* const sums = (SECOND ? turned.rest : tile.rest) + threadIdx.x;  // own part of [n_radial, threads]
  const Path path = plan.paths[blockIdx.y];
  const int c = blockIdx.z * blockDim.x + threadIdx.x;
  const bool on = c < channels;

  for (int r = 0; r < in.n_radial; ++r) sums[r * blockDim.x] = 0;
  for (size_t atom = blockIdx.x; atom < in.n_atoms; atom += gridDim.x) {
    const size_t end = first_edge[atom + 1];
    for (size_t first = first_edge[atom]; first < end; first += in.tile) {
      const int count = min((size_t)in.tile, end - first);
      __syncthreads();
      fill_tile(in, plan, path, first, count, tile);
      if constexpr (SECOND) fill_tile(along, plan, path, first, count, turned);
      __syncthreads();
      if (!on) continue;
      for (int t = 0; t < count; ++t) {
        tile.column[t * blockDim.x] = 0;
        if constexpr (SECOND) turned.column[t * blockDim.x] = 0;
      }
      for (int n = 0; n < path.n_panels; ++n) {
        const Panel panel = plan.panels[path.panel + n];
        with_size(panel, [&](auto rows_, auto columns_) {
          constexpr int A = decltype(rows_)::value, B = decltype(columns_)::value;
          int rows[A];
          T products[A][B];
          find_rows(plan, path, panel, rows);
          contract(plan, path, panel, gradient + path.to.place(in.n_atoms, atom) + c, products);
          for (int t = 0; t < count; ++t) {
            T s[B], y[PADDED<B>];
            apply(products, from + tile.from[t] + c, rows, s);
            read_harmonics(tile, path, panel, t, y);
            if constexpr (SECOND) {
              T along_y[PADDED<B>];
              read_harmonics(turned, path, panel, t, along_y);
              turned.column[t * blockDim.x] += slope_of<B>(s, y);
              T second = slope_of<B>(s, along_y);
              if (along_from) {
                apply(products, along_from + tile.from[t] + c, rows, s);
                second += slope_of<B>(s, y);
              }
              tile.column[t * blockDim.x] += second;
            } else {
              tile.column[t * blockDim.x] += slope_of<B>(s, y);
            }
          }
        });
      }
      for (int r = 0; r < in.n_radial; ++r) {
        T sum = sums[r * blockDim.x];
        for (int t = 0; t < count; ++t) {
          sum += tile.functions[r * in.tile + t] * tile.column[t * blockDim.x];
          if constexpr (SECOND) {
            sum += turned.functions[r * in.tile + t] * turned.column[t * blockDim.x];
          }
        }
        sums[r * blockDim.x] = sum;
      }
    }
  }
  for (int r = 0; on && r < in.n_radial; ++r) {
    const size_t row = (size_t)blockIdx.x * in.n_radial + r;
    of_kernel[row * in.n_weights + path.weight + c] = sums[r * blockDim.x];
  }
}

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) table_kernel_slopes(
    const T* __restrict__ from, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ gradient, const int* __restrict__ table, const T* __restrict__ factors,
    const long long* __restrict__ first_edge, const long long* __restrict__ far,
    T* __restrict__ of_kernel, int n_atoms, int n_harmonics, int n_weights, int n_radial, int tile_size,
    int n_slots, int channels) {
  SHARED_DYN(T, memory);
  const Edges<T> in{harmonics, radial, nullptr, nullptr, far, n_atoms, n_harmonics, n_weights, n_radial,
                    tile_size};
  sum_kernel_slopes<false, T>(memory, Plan<T>(table, factors), in, in, from, nullptr, gradient,
                              first_edge, of_kernel, n_slots, channels);
}

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) table_kernel_second(
    const T* __restrict__ from, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ along_from, const T* __restrict__ along_harmonics,
    const T* __restrict__ along_radial, const T* __restrict__ gradient, const int* __restrict__ table,
    const T* __restrict__ factors, const long long* __restrict__ first_edge,
    const long long* __restrict__ far, T* __restrict__ of_kernel, int n_atoms, int n_harmonics,
    int n_weights, int n_radial, int tile_size, int n_slots, int channels) {
  SHARED_DYN(T, memory);
  const Edges<T> in{harmonics, radial, nullptr, nullptr, far, n_atoms, n_harmonics, n_weights, n_radial,
                    tile_size};
  const Edges<T> along{along_harmonics, along_radial, nullptr, nullptr, far, n_atoms, n_harmonics,
                       n_weights, n_radial, tile_size};
  sum_kernel_slopes<true, T>(memory, Plan<T>(table, factors), in, along, from, along_from, gradient,
                             first_edge, of_kernel, n_slots, channels);
}
