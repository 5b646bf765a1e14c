// Groups of four channels times the matrix of their token's camera (mv2v_engine/ops/prope.py).

#include "rows.h"

namespace {

using namespace mv2v;

constexpr int kGroup = 4;

struct Arguments {
  const float *x, *matrix;
  const int64_t* frame;
  int64_t length, num_heads, head_dim, channels, num_frames;
  float* out;
};

// Column j of the matrix, as often as groups fit a half.
MV2V_INLINE void read_columns(const float* matrix, Half* column) {
  for (int j = 0; j < kGroup; j++)
    for (int i = 0; i < kHalf; i++) column[j][i] = matrix[i % kGroup * kGroup + j];
}

MV2V_INLINE void multiply(const float* x, const Half* column, int64_t count, float* out) {
  int64_t c = 0;
  for (; c + kHalf <= count; c += kHalf) {
    Half value;
    __builtin_memcpy(&value, x + c, sizeof value);
    const Half sum = column[0] * MV2V_PLACES(value, 0, 0, 0, 0, 4, 4, 4, 4) +
                     column[1] * MV2V_PLACES(value, 1, 1, 1, 1, 5, 5, 5, 5) +
                     column[2] * MV2V_PLACES(value, 2, 2, 2, 2, 6, 6, 6, 6) +
                     column[3] * MV2V_PLACES(value, 3, 3, 3, 3, 7, 7, 7, 7);
    __builtin_memcpy(out + c, &sum, sizeof sum);
  }
  for (; c < count; c += kGroup)
    for (int i = 0; i < kGroup; i++)
      out[c + i] = column[0][i] * x[c] + column[1][i] * x[c + 1] + column[2][i] * x[c + 2] +
                   column[3][i] * x[c + 3];
}

MV2V_CLONES void prope(const Arguments& a, int64_t begin, int64_t end) {
  const int64_t width = a.num_heads * a.head_dim, rest = a.head_dim - a.channels;
  const float* before = nullptr;
  Half column[kGroup];
  for (int64_t token = begin; token < end; token++) {
    const int64_t row = token / a.length * a.num_frames + a.frame[token];
    const float* matrix = a.matrix + row * kGroup * kGroup;
    if (matrix != before) read_columns(matrix, column);
    before = matrix;  // tokens of a frame mostly follow each other
    for (int64_t c = token * width; c < (token + 1) * width; c += a.head_dim) {
      multiply(a.x + c, column, a.channels, a.out + c);
      __builtin_memcpy(a.out + c + a.channels, a.x + c + a.channels, rest * sizeof(float));
    }
  }
}

}  // namespace

extern "C" int mv2v_prope_cpu(const float* x, const float* matrix, const int64_t* frame,
                              int64_t batch, int64_t length, int64_t num_heads, int64_t head_dim,
                              int64_t channels, int64_t num_frames, int num_threads, float* out) {
  if (batch < 0 || length < 0 || num_heads < 1 || channels < kGroup || channels % kGroup ||
      head_dim < channels || num_threads < 1)
    return MV2V_INVALID_ARGUMENT;
  if (!are_within(frame, batch * length, num_frames)) return MV2V_INVALID_INDEX;
  const Arguments a = {x,        matrix,   frame,      length, num_heads,
                       head_dim, channels, num_frames, out};
  divide_rows(prope, a, batch * length, num_heads * head_dim, num_threads);
  return MV2V_OK;
}
