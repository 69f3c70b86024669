// The convolution (mlip/ops/convolution.py) with products of any degrees, read from tables.
//
//   out_n[path, m3, c] = sum over edges e of n of w_e[path, c] sum_{m1 m2} C[m1, m2, m3] x_e[m1, c] Y_e[m2]
//
// A thread has a channel c. Its registers hold a panel of pairs (m1, m2): while the edges of an atom pass,
// sums A[m1, m2] of w x Y, to which C is applied once at the end; or, for derivatives, P = sum_m3 C g[m3],
// made once for a tile of edges, with which the slope of a weight is x . P Y and that of Y is w x . P.
// So tables are read for each atom, not for each edge. The gradient by features is such a sum over the
// edges that leave an atom, with g in the place of x, and the tables of x <- (g, Y).
#include "convolution_tables.cuh"

// A block for each atom, owner (paths that add to the same rows), and blockDim.x channels.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) table_sums(
    const T* __restrict__ from, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ kernel, const int* __restrict__ table, const T* __restrict__ factors,
    const long long* __restrict__ first_edge, const long long* __restrict__ order,
    const long long* __restrict__ far, T* __restrict__ out, int n_atoms, int n_harmonics,
    int n_weights, int n_radial, int tile_size, int n_slots, int channels, int n_rows) {
  SHARED_DYN(T, memory);
  const Plan<T> plan(table, factors);
  const Edges<T> in{harmonics, radial, kernel, order, far, n_atoms, n_harmonics, n_weights, n_radial,
                    tile_size};
  const Tile<T> tile(memory, in, n_slots);
  T* const sums = tile.rest + threadIdx.x;  // own part of [n_rows, threads]
  const int c = blockIdx.z * blockDim.x + threadIdx.x;
  const bool on = c < channels;
  const size_t atom = blockIdx.x, end = first_edge[atom + 1];
  const int first_path = plan.owners[blockIdx.y], last_path = plan.owners[blockIdx.y + 1];

  for (int m = 0; m < n_rows; ++m) sums[m * blockDim.x] = 0;
  for (int p = first_path; p < last_path; ++p) {
    const Path path = plan.paths[p];
    for (int n = 0; n < path.n_panels; ++n) {
      const Panel panel = plan.panels[path.panel + n];
      with_size(panel, [&](auto rows_, auto columns_) {
        constexpr int A = decltype(rows_)::value, B = decltype(columns_)::value;
        int rows[A];
        T moments[A][B];
        find_rows(plan, path, panel, rows);
#pragma unroll
        for (int i = 0; i < A * B; ++i) moments[i / B][i % B] = 0;
        for (size_t first = first_edge[atom]; first < end; first += tile_size) {
          const int count = min((size_t)tile_size, end - first);
          __syncthreads();
          fill_tile(in, plan, path, first, count, tile);
          __syncthreads();
          if (!on) continue;
          fill_weights(in, path.weight + c, count, tile);
          for (int t = 0; t < count; ++t) {
            const T* const x = from + tile.from[t] + c;
            const T w = tile.column[t * blockDim.x];
            T y[PADDED<B>];
            read_harmonics(tile, path, panel, t, y);
#pragma unroll
            for (int i = 0; i < A; ++i) {
              const T v = w * x[rows[i]];
#pragma unroll
              for (int j = 0; j < B; ++j) moments[i][j] += v * y[j];
            }
          }
        }
        each_term<A, B>(plan, panel, [&](int i, int j, int m, T factor) {
          sums[m * blockDim.x] += factor * moments[i][j];
        });
      });
    }
  }
  if (!on) return;
  const Path& path = plan.paths[first_path];
  for (int m = 0; m < path.n_rows; ++m) {
    out[path.to.place(n_atoms, atom) + m * path.to.stride + c] = sums[m * blockDim.x];
  }
}

// Add sums over the lanes of a warp to the first numbers of its part.
template <typename T>
__device__ __forceinline__ void add_over_lanes(T (&values)[SLOTS], int n, T* part) {
  const int lane = threadIdx.x % 32;
  const T total = sums_over_lanes(values);
  if (lane < n) part[lane] += total;
}

// Gradients by the radial functions of a tile, slopes times kernel, added to parts [tile, warps, n_radial];
// ``weight`` is the place of the channel in a row of the kernel.
template <typename T>
__device__ __forceinline__ void add_radial(
    const Edges<T>& in, int weight, bool on, int count, const T* slopes, T* parts) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int r = 0; r < in.n_radial; r += SLOTS) {
    const int n = min(in.n_radial - r, SLOTS);
    T k[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      k[i] = on && i < n ? in.kernel[(size_t)(r + i) * in.n_weights + weight] : T(0);
    }
    for (int t = 0; t < count; ++t) {
      T values[SLOTS];
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) values[i] = slopes[t * blockDim.x] * k[i];
      add_over_lanes(values, n, parts + (t * warps + warp) * in.n_radial + r);
    }
  }
}

// Add the parts of all warps, ``width`` numbers apart, to a number in global memory.
template <typename T>
__device__ __forceinline__ void add_warps(const T* part, int width, T& out) {
  T total = out;
  for (int w = 0; w < blockDim.x / 32; ++w) total += part[w * width];
  out = total;
}

// A block for each atom and share (paths with the same harmonics). Gradients by weights that are given
// go to of_weights; those by radial functions are added to of_radial [shares, E, n_radial], those by
// harmonics to of_harmonics: over lanes, panels, paths, then warps.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) table_slopes(
    const T* __restrict__ from, const T* __restrict__ harmonics, const T* __restrict__ radial,
    const T* __restrict__ kernel, const T* __restrict__ gradient, const int* __restrict__ table,
    const T* __restrict__ factors, const long long* __restrict__ first_edge,
    const long long* __restrict__ far, T* __restrict__ of_harmonics, T* __restrict__ of_weights,
    T* __restrict__ of_radial, int n_edges, int n_atoms, int n_harmonics, int n_weights, int n_radial,
    int tile_size, int n_slots, int channels) {
  SHARED_DYN(T, memory);
  const Plan<T> plan(table, factors);
  const Edges<T> in{harmonics, radial, kernel, nullptr, far, n_atoms, n_harmonics, n_weights, n_radial,
                    tile_size};
  const Tile<T> tile(memory, in, n_slots);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, n_parts = tile_size * warps;
  T* const slopes = tile.rest + threadIdx.x;                     // own part of [tile, threads]
  T* const parts = tile.rest + tile_size * blockDim.x;           // [tile, warps, n_slots]
  T* const radial_parts = parts + n_parts * n_slots;             // [tile, warps, n_radial]
  const size_t atom = blockIdx.x, end = first_edge[atom + 1];
  const int first_path = plan.shares[blockIdx.y], last_path = plan.shares[blockIdx.y + 1];

  for (size_t first = first_edge[atom]; first < end; first += tile_size) {
    const int count = min((size_t)tile_size, end - first);
    __syncthreads();
    fill_tile(in, plan, plan.paths[first_path], first, count, tile);
    for (int i = threadIdx.x; i < n_parts * (n_slots + n_radial); i += blockDim.x) parts[i] = 0;
    __syncthreads();
    for (int p = first_path; p < last_path; ++p) {
      const Path path = plan.paths[p];
      for (int c_first = 0; c_first < channels; c_first += blockDim.x) {
        const bool on = c_first + threadIdx.x < channels;
        const int c = on ? c_first + threadIdx.x : channels - 1;  // the others follow, so that all meet
        fill_weights(in, path.weight + c, count, tile);
        for (int t = 0; t < count; ++t) slopes[t * blockDim.x] = 0;
        for (int n = 0; n < path.n_panels; ++n) {
          const Panel panel = plan.panels[path.panel + n];
          with_size(panel, [&](auto rows_, auto columns_) {
            constexpr int A = decltype(rows_)::value, B = decltype(columns_)::value;
            int rows[A];
            T products[A][B];
            find_rows(plan, path, panel, rows);
            contract(plan, path, panel, gradient + path.to.place(n_atoms, atom) + c, products);
            for (int t = 0; t < count; ++t) {
              T s[B], y[PADDED<B>], values[SLOTS], slope = 0;
              apply(products, from + tile.from[t] + c, rows, s);
              read_harmonics(tile, path, panel, t, y);
              const T w = on ? tile.column[t * blockDim.x] : T(0);
#pragma unroll
              for (int j = 0; j < SLOTS; ++j) values[j] = j < B ? w * s[min(j, B - 1)] : T(0);
#pragma unroll
              for (int j = 0; j < B; ++j) slope += s[j] * y[j];
              slopes[t * blockDim.x] += slope;
              add_over_lanes(values, B, parts + (t * warps + warp) * n_slots + panel.column);
            }
          });
        }
        for (int t = 0; on && !n_radial && t < count; ++t) {
          __stcs(of_weights + (first + t) * n_weights + path.weight + c, slopes[t * blockDim.x]);
        }
        add_radial(in, path.weight + c, on, count, slopes, radial_parts);
      }
    }
    __syncthreads();
    const Path& path = plan.paths[first_path];
    for (int i = threadIdx.x; i < count * path.n_slots; i += blockDim.x) {
      const int t = i / path.n_slots, slot = i % path.n_slots, m = plan.slots[path.slot + slot];
      if (m < 0) continue;
      add_warps(parts + t * warps * n_slots + slot, n_slots, of_harmonics[(first + t) * n_harmonics + m]);
    }
    T* const place = of_radial + ((size_t)blockIdx.y * n_edges + first) * n_radial;
    for (int i = threadIdx.x; i < count * n_radial; i += blockDim.x) {
      const int t = i / n_radial, r = i % n_radial;
      add_warps(radial_parts + t * warps * n_radial + r, n_radial, place[i]);
    }
  }
}
