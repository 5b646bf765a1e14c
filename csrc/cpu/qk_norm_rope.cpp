// RMSNorm over a token's full width, then the rotation of its interleaved pairs, or none
// (mv2v_engine/ops/qk_norm_rope.py).

#include "rows.h"

namespace {

using namespace mv2v;

struct Arguments {
  const float *x, *weight, *rope;
  int64_t length, num_heads, head_dim, rope_batch;
  float eps;
  float* out;
};

// Pairs (a, b) become (a cos - b sin, b cos + a sin); cosines and sines lie twice.
MV2V_INLINE void turn_half(const float* x, const float* weight, float scale, const Half& cosine,
                           const Half& sine, float* out) {
  const Half signs = {-1, 1, -1, 1, -1, 1, -1, 1};
  Half value, by;
  __builtin_memcpy(&value, x, sizeof value);
  __builtin_memcpy(&by, weight, sizeof by);
  value = value * scale * by;
  value = value * cosine + MV2V_PLACES(value, 1, 0, 3, 2, 5, 4, 7, 6) * (sine * signs);
  __builtin_memcpy(out, &value, sizeof value);
}

MV2V_INLINE void turn_head(const float* x, const float* weight, float scale, const float* table,
                           int64_t head_dim, float* out) {
  const float* sines = table + head_dim / 2;
  int64_t c = 0;
  for (; c + kLanes <= head_dim; c += kLanes) {
    Half cosine, sine;
    __builtin_memcpy(&cosine, table + c / 2, sizeof cosine);
    __builtin_memcpy(&sine, sines + c / 2, sizeof sine);
    turn_half(x + c, weight + c, scale, MV2V_PLACES(cosine, 0, 0, 1, 1, 2, 2, 3, 3),
              MV2V_PLACES(sine, 0, 0, 1, 1, 2, 2, 3, 3), out + c);
    const int64_t next = c + kHalf;
    turn_half(x + next, weight + next, scale, MV2V_PLACES(cosine, 4, 4, 5, 5, 6, 6, 7, 7),
              MV2V_PLACES(sine, 4, 4, 5, 5, 6, 6, 7, 7), out + next);
  }
  for (; c < head_dim; c += 2) {
    const float a = x[c] * scale * weight[c], b = x[c + 1] * scale * weight[c + 1];
    const float cosine = table[c / 2], sine = sines[c / 2];
    out[c] = a * cosine - b * sine;
    out[c + 1] = b * cosine + a * sine;
  }
}

MV2V_INLINE void scale_row(const float* x, const float* weight, float scale, int64_t width,
                           float* out) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes value, by;
    load(value, x + c);
    load(by, weight + c);
    store(out + c, value * scale * by);
  }
  for (; c < width; c++) out[c] = x[c] * scale * weight[c];
}

MV2V_INLINE void normalise(const Arguments& a, int64_t token, float scale) {
  const int64_t width = a.num_heads * a.head_dim;
  const float* x = a.x + token * width;
  float* out = a.out + token * width;
  if (!a.rope) return scale_row(x, a.weight, scale, width, out);
  const float* table = a.rope + (a.rope_batch == 1 ? token % a.length : token) * a.head_dim;
  for (int64_t c = 0; c < width; c += a.head_dim)
    turn_head(x + c, a.weight + c, scale, table, a.head_dim, out + c);
}

MV2V_CLONES void qk_norm_rope(const Arguments& a, int64_t begin, int64_t end) {
  const int64_t width = a.num_heads * a.head_dim;
  const float count = static_cast<float>(width);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t rows = end - first < kBlock ? end - first : kBlock;
    float scale[kBlock];
    for (int64_t r = 0; r < rows; r++) {
      const float mean = squares(a.x + (first + r) * width, width, 0) / count;
      scale[r] = 1 / __builtin_sqrtf(mean + a.eps);
    }
    for (int64_t r = 0; r < rows; r++) normalise(a, first + r, scale[r]);
  }
}

}  // namespace

extern "C" int mv2v_qk_norm_rope_cpu(const float* x, const float* weight, const float* rope,
                                     int64_t batch, int64_t length, int64_t num_heads,
                                     int64_t head_dim, int64_t rope_batch, double eps,
                                     int num_threads, float* out) {
  if (batch < 0 || length < 0 || num_heads < 1 || head_dim < 2 || head_dim % 2 ||
      num_threads < 1 || (rope && rope_batch != 1 && rope_batch != batch))
    return MV2V_INVALID_ARGUMENT;
  const Arguments a = {x,        weight,     rope, length, num_heads,
                       head_dim, rope_batch, static_cast<float>(eps), out};
  divide_rows(qk_norm_rope, a, batch * length, num_heads * head_dim, num_threads);
  return MV2V_OK;
}
