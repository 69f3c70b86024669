// Tables of the convolution of any degrees, and edges of an atom in shared memory a tile at a time.
// The tables are written by mlip/ops/cuda/table_plan.py.
#pragma once
#include "lanes.cuh"

constexpr int LARGEST_BLOCK = 128;
constexpr int SLOTS = 8;     // numbers of a panel's harmonics in shared memory, zeros included
constexpr int AT_ONCE = 16;  // edges whose weights a thread makes together; tiles are multiples

// Where the rows of an atom lie in packed features, one row for each component m.
struct Rows {
  int before, step, offset, stride;
  __device__ __forceinline__ size_t place(size_t n_atoms, size_t atom) const {
    return before * n_atoms + step * atom + offset;
  }
};

// A product from x Y -> to, n_rows of them; its harmonics are listed from ``slot`` on, n_slots with zeros.
struct Path {
  Rows from, to;
  int n_rows, weight, slot, n_slots, panel, n_panels;
};

// rows components of ``from`` (listed from ``row`` on) times columns harmonics (from slot ``column``
// of the path on). Each of the rows x columns pairs has two terms: component of ``to`` and factor.
struct Panel {
  int rows, columns, row, column, term;
};

template <typename T>
struct Plan {
  const int *owners, *shares, *components, *slots, *terms;
  const Path* paths;
  const Panel* panels;
  const T* factors;
  __device__ __forceinline__ Plan(const int* table, const T* factors)
      : owners(table + table[0]), shares(table + table[1]), components(table + table[2]),
        slots(table + table[3]), terms(table + table[4]),
        paths(reinterpret_cast<const Path*>(table + table[5])),
        panels(reinterpret_cast<const Panel*>(table + table[6])), factors(factors) {}
};

// What belongs to edges. Those of an atom are order[first ...], or first ... without an order; far is
// the atom at the other end. With radial functions (n_radial > 0) w = sum_r radial[e, r] kernel[r, :].
template <typename T>
struct Edges {
  const T *harmonics, *radial, *kernel;
  const long long *order, *far;
  int n_atoms, n_harmonics, n_weights, n_radial, tile;
  __device__ __forceinline__ size_t number(size_t i) const { return order ? order[i] : i; }
};

// A tile of edges in shared memory.
template <typename T>
struct Tile {
  size_t *edges, *from;               // [tile] number, place of the rows of the other end
  T *harmonics, *functions, *column;  // [tile, n_slots], [n_radial, tile], own part of [tile, threads]
  T* rest;                            // behind it
  __device__ __forceinline__ Tile(T* memory, const Edges<T>& edges_, int n_slots)
      : edges(reinterpret_cast<size_t*>(memory)), from(edges + edges_.tile),
        harmonics(reinterpret_cast<T*>(from + edges_.tile)),
        functions(harmonics + edges_.tile * n_slots),
        column(functions + edges_.tile * edges_.n_radial + threadIdx.x),
        rest(column - threadIdx.x + edges_.tile * blockDim.x) {}
};

// Fill a tile with edges first ... first + count - 1, all but the column.
template <typename T>
__device__ __forceinline__ void fill_tile(
    const Edges<T>& in, const Plan<T>& plan, const Path& path, size_t first, int count,
    const Tile<T>& tile) {
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    tile.edges[t] = in.number(first + t);
    tile.from[t] = path.from.place(in.n_atoms, in.far[tile.edges[t]]);
  }
  for (int i = threadIdx.x; i < count * path.n_slots; i += blockDim.x) {
    const int m = plan.slots[path.slot + i % path.n_slots];
    const size_t e = in.number(first + i / path.n_slots);
    tile.harmonics[i] = m < 0 ? T(0) : in.harmonics[e * in.n_harmonics + m];
  }
  for (int i = threadIdx.x; i < count * in.n_radial; i += blockDim.x) {
    const int t = i / in.n_radial, r = i % in.n_radial;
    tile.functions[r * in.tile + t] = in.radial[in.number(first + t) * in.n_radial + r];
  }
}

template <typename T>
struct alignas(16) Piece {
  T part[16 / sizeof(T)];
};

// Read from shared memory, 16 bytes at a time.
template <int N, typename T>
__device__ __forceinline__ void read_pieces(const T* from, T (&to)[N]) {
  constexpr int each = 16 / sizeof(T);
  static_assert(N % each == 0);
#pragma unroll
  for (int i = 0; i < N / each; ++i) {
    const Piece<T> piece = reinterpret_cast<const Piece<T>*>(from)[i];
#pragma unroll
    for (int k = 0; k < each; ++k) to[i * each + k] = piece.part[k];
  }
}

// Write the weights of a path and channel, number ``weight`` of an edge, to the thread's column.
template <typename T>
__device__ __forceinline__ void fill_weights(
    const Edges<T>& in, int weight, int count, const Tile<T>& tile) {
  for (int first = 0; first < count; first += AT_ONCE) {
    T w[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) w[u] = 0;
    for (int r = 0; r < in.n_radial; ++r) {
      const T k = in.kernel[(size_t)r * in.n_weights + weight];
      T b[AT_ONCE];
      read_pieces(tile.functions + r * in.tile + first, b);
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) w[u] += b[u] * k;
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      if (first + u >= count) break;
      if (!in.n_radial) w[u] = __ldcs(in.radial + tile.edges[first + u] * in.n_weights + weight);
      tile.column[(first + u) * blockDim.x] = w[u];
    }
  }
}

// Call f(Constant<rows>, Constant<columns>) of a panel, widths that table_plan.py makes.
template <typename F>
__device__ __forceinline__ void with_width(int width, F&& f) {
  switch (width) {
    case 3: return f(Constant<3>());
    case 5: return f(Constant<5>());
    default: return f(Constant<7>());
  }
}
template <typename F>
__device__ __forceinline__ void with_size(const Panel& panel, F&& f) {
  with_width(panel.rows, [&](auto rows) {
    with_width(panel.columns, [&](auto columns) { f(rows, columns); });
  });
}

// Call f(i, j, component of ``to``, factor) for all terms of a panel.
template <int A, int B, typename T, typename F>
__device__ __forceinline__ void each_term(const Plan<T>& plan, const Panel& panel, F&& f) {
#pragma unroll
  for (int i = 0; i < A; ++i) {
#pragma unroll
    for (int j = 0; j < B; ++j) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int at = panel.term + (i * B + j) * 2 + n;
        const T factor = plan.factors[at];
        if (factor != 0) f(i, j, plan.terms[at], factor);
      }
    }
  }
}

// Rows of a panel among those of ``from``.
template <int A, typename T>
__device__ __forceinline__ void find_rows(
    const Plan<T>& plan, const Path& path, const Panel& panel, int (&rows)[A]) {
#pragma unroll
  for (int i = 0; i < A; ++i) rows[i] = plan.components[panel.row + i] * path.from.stride;
}

// Harmonics of edge t of a tile that belong to a panel; what goes beyond it is not used.
template <int B>
constexpr int PADDED = B > 4 ? SLOTS : 4;
template <int N, typename T>
__device__ __forceinline__ void read_harmonics(
    const Tile<T>& tile, const Path& path, const Panel& panel, int t, T (&y)[N]) {
  read_pieces(tile.harmonics + t * path.n_slots + panel.column, y);
}

// The products P = sum_m3 C g[m3] of a panel, with the rows g of a channel.
template <int A, int B, typename T>
__device__ __forceinline__ void contract(
    const Plan<T>& plan, const Path& path, const Panel& panel, const T* g, T (&products)[A][B]) {
#pragma unroll
  for (int i = 0; i < A * B; ++i) products[i / B][i % B] = 0;
  each_term<A, B>(plan, panel, [&](int i, int j, int m, T factor) {
    products[i][j] += factor * g[m * path.to.stride];
  });
}

// s[j] = sum_i x[i] P[i, j] for the features x of an edge.
template <int A, int B, typename T>
__device__ __forceinline__ void apply(
    const T (&products)[A][B], const T* x, const int (&rows)[A], T (&s)[B]) {
#pragma unroll
  for (int j = 0; j < B; ++j) s[j] = 0;
#pragma unroll
  for (int i = 0; i < A; ++i) {
    const T v = x[rows[i]];
#pragma unroll
    for (int j = 0; j < B; ++j) s[j] += v * products[i][j];
  }
}
