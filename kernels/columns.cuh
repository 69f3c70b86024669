// One thread for a channel of a row, of which neighbouring threads have neighbouring channels.
// Kernels with so much in registers ask for one block at least, __launch_bounds__(BLOCK, 1):
// without it the compiler moves a few numbers to memory for the sake of one block more.
#pragma once

// exists: the thread has one; threads beyond the last one are given it again.
struct Column {
  bool exists;
  size_t row;
  int channel;
  __device__ __forceinline__ Column(int n_rows, int channels) {
    const size_t own = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t last = (size_t)n_rows * channels - 1, column = own <= last ? own : last;
    exists = own <= last;
    row = column / channels;
    channel = (int)(column - row * channels);
  }
};
