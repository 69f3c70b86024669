// Forces and virial from the derivatives g of the energy by edge vectors d (mlip/ops/edge_gradient.py).
//
//   forces_n = sum of g over edges with target n - sum of g over edges with source n
//   virial_b = symmetric part of the sum of g (x) d over edges of structure b
//
// Sums are double and made in a fixed order: no atomics, the same bits every time.
constexpr int BLOCK = 128;
constexpr unsigned FULL_WARP = 0xffffffffu;

// One warp an atom. slots: 0 ... n_edges - 1 edges by source, then by target, atom after atom; those of
// atom n begin at first_slot[n]. by_atom: [N, 6] double, virial of the atom: xx yy zz yz xz xy.
template <typename T>
__global__ void __launch_bounds__(BLOCK) atom_sums(
    const T* __restrict__ gradient, const T* __restrict__ vector,
    const long long* __restrict__ slots, const long long* __restrict__ first_slot,
    T* __restrict__ forces, double* __restrict__ by_atom, int n_edges, int n_atoms) {
  const int lane = threadIdx.x % 32;
  const long long atom = (long long)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  if (atom >= n_atoms) return;
  double sums[9];
  for (int i = 0; i < 9; ++i) sums[i] = 0;
  for (long long i = first_slot[atom] + lane; i < first_slot[atom + 1]; i += 32) {
    const bool is_target = slots[i] >= n_edges;
    const long long e = is_target ? slots[i] - n_edges : slots[i];
    const double g[3] = {(double)gradient[3 * e], (double)gradient[3 * e + 1],
                         (double)gradient[3 * e + 2]};
    for (int j = 0; j < 3; ++j) sums[j] += is_target ? g[j] : -g[j];
    if (is_target) {
      const double d[3] = {(double)vector[3 * e], (double)vector[3 * e + 1],
                           (double)vector[3 * e + 2]};
      for (int j = 0; j < 3; ++j) sums[3 + j] += g[j] * d[j];
      sums[6] += 0.5 * (g[1] * d[2] + g[2] * d[1]);
      sums[7] += 0.5 * (g[0] * d[2] + g[2] * d[0]);
      sums[8] += 0.5 * (g[0] * d[1] + g[1] * d[0]);
    }
  }
  for (int i = 0; i < 9; ++i) {
    for (int half = 16; half; half /= 2) sums[i] += __shfl_xor_sync(FULL_WARP, sums[i], half);
  }
  if (lane == 0) {
    for (int j = 0; j < 3; ++j) forces[3 * atom + j] = (T)sums[j];
    for (int j = 0; j < 6; ++j) by_atom[6 * atom + j] = sums[3 + j];
  }
}

// One block a structure. atoms: those of structure b begin at first_atom[b].
template <typename T>
__global__ void __launch_bounds__(BLOCK) structure_sums(
    const double* __restrict__ by_atom, const long long* __restrict__ atoms,
    const long long* __restrict__ first_atom, T* __restrict__ virial) {
  SHARED_DYN(double, parts);  // [6][BLOCK]
  double sums[6];
  for (int j = 0; j < 6; ++j) sums[j] = 0;
  for (long long i = first_atom[blockIdx.x] + threadIdx.x; i < first_atom[blockIdx.x + 1];
       i += BLOCK) {
    for (int j = 0; j < 6; ++j) sums[j] += by_atom[6 * atoms[i] + j];
  }
  for (int j = 0; j < 6; ++j) parts[j * BLOCK + threadIdx.x] = sums[j];
  for (int half = BLOCK / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      for (int j = 0; j < 6; ++j) {
        parts[j * BLOCK + threadIdx.x] += parts[j * BLOCK + threadIdx.x + half];
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < 9) {
    const int row = threadIdx.x / 3, column = threadIdx.x % 3;
    const int j = row == column ? row : 6 - row - column;
    virial[9 * (size_t)blockIdx.x + threadIdx.x] = (T)parts[j * BLOCK];
  }
}

// One thread an edge: for cotangents a of the forces and B of the virial, S the symmetric part of B,
// the derivatives a_target - a_source + S d by g and S g by d.
template <typename T>
__global__ void __launch_bounds__(BLOCK) edge_slopes(
    const T* __restrict__ force, const T* __restrict__ strain, const T* __restrict__ gradient,
    const T* __restrict__ vector, const long long* __restrict__ index,
    const long long* __restrict__ batch, T* __restrict__ of_gradient, T* __restrict__ of_vector,
    int n_edges) {
  const size_t e = (size_t)blockIdx.x * BLOCK + threadIdx.x;
  if (e >= n_edges) return;
  const T* from = force + 3 * index[e];
  const T* to = force + 3 * index[n_edges + e];
  const T* own = strain + 9 * batch[index[n_edges + e]];
  for (int i = 0; i < 3; ++i) {
    T by_gradient = to[i] - from[i], by_vector = 0;
    for (int j = 0; j < 3; ++j) {
      const T factor = (own[3 * i + j] + own[3 * j + i]) / 2;
      by_gradient += factor * vector[3 * e + j];
      by_vector += factor * gradient[3 * e + j];
    }
    of_gradient[3 * e + i] = by_gradient;
    of_vector[3 * e + i] = by_vector;
  }
}
