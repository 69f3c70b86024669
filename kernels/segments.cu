// Sums and softmax over consecutive rows (mlip/ops/cpu/segments.py): one thread for each segment and
// column goes through its rows in order, so that the bits are the same every time. Rows of segment n
// are first_row[n] ... first_row[n + 1] - 1.
constexpr int THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(THREADS) segment_sum(
    const T* __restrict__ values, const long long* __restrict__ first_row, T* __restrict__ sums,
    int n_segments, int columns) {
  const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= (size_t)n_segments * columns) return;
  const size_t segment = i / columns, column = i % columns;
  T sum = 0;
  for (long long row = first_row[segment]; row < first_row[segment + 1]; ++row) {
    sum += values[row * columns + column];
  }
  sums[i] = sum;
}

// exp(z - z_max) / (sum of w exp(z - z_max) + epsilon), z_max the largest z of the segment.
template <typename T>
__global__ void __launch_bounds__(THREADS) segment_shares(
    const T* __restrict__ logits, const T* __restrict__ weights,
    const long long* __restrict__ first_row, const T* __restrict__ epsilon, T* __restrict__ shares,
    int n_segments, int columns) {
  const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= (size_t)n_segments * columns) return;
  const size_t segment = i / columns, column = i % columns;
  const long long begin = first_row[segment], end = first_row[segment + 1];
  if (begin == end) return;
  T largest = logits[begin * columns + column];
  for (long long row = begin + 1; row < end; ++row) {
    largest = max(largest, logits[row * columns + column]);
  }
  T sum = 0;
  for (long long row = begin; row < end; ++row) {
    const T share = exp(logits[row * columns + column] - largest);
    shares[row * columns + column] = share;
    sum += weights[row] * share;
  }
  for (long long row = begin; row < end; ++row) {
    shares[row * columns + column] /= sum + epsilon[0];
  }
}
