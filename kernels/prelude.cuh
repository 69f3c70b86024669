// Included before every source file. What lies in shared memory is declared by SHARED_DYN, so that the
// same text also compiles for the host, where a test runs it (HOST_SHIM).
#pragma once

#ifdef HOST_SHIM
#include "cuda_shim.h"
#else
// The dynamic shared memory of a block as an array of T, 16-byte aligned.
#define SHARED_DYN(T, name)                                              \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_memory)
#endif
