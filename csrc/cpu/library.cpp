// What every native library answers: its version, its errors, how it was built.

#include "../mv2v.h"

extern "C" {

int mv2v_abi_version(void) { return MV2V_ABI_VERSION; }

const char* mv2v_error_string(int code) {
  switch (code) {
    case MV2V_OK:
      return "no error";
    case MV2V_INVALID_ARGUMENT:
      return "invalid argument";
    case MV2V_INVALID_INDEX:
      return "an index lies outside of its table";
    default:
      return "unknown error";
  }
}

int mv2v_has_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
}
