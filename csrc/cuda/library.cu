// What every native library answers: its version and its errors.

#include <cuda_runtime.h>

#include "../mv2v.h"

extern "C" {

int mv2v_abi_version(void) { return MV2V_ABI_VERSION; }

const char* mv2v_error_string(int code) {
  if (code == MV2V_INVALID_ARGUMENT) return "invalid argument";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
}
