// The norms and sums that modulate tokens, a row of [tokens, width] after the other. What they
// compute, and in which precision, is said in mv2v_engine/ops/{adaln,residual_norm,gated_residual}.

#include "rows.h"

namespace {

using namespace mv2v;

struct Arguments {
  const float *x, *y, *gate, *scale, *weight, *shift, *camera;
  const int64_t *frame, *row;
  int64_t length, width, num_frames;
  float eps;
  float *summed, *normed;
};

struct Statistics {
  float mean[kBlock], scale[kBlock];
};

MV2V_INLINE void measure(const float* x, int64_t rows, const Arguments& a, Statistics& of) {
  const float count = static_cast<float>(a.width);
  for (int64_t r = 0; r < rows; r++) of.mean[r] = sum(x + r * a.width, a.width) / count;
  for (int64_t r = 0; r < rows; r++) {
    const float variance = squares(x + r * a.width, a.width, of.mean[r]) / count;
    of.scale[r] = 1 / __builtin_sqrtf(variance + a.eps);
  }
}

// (x - mean) * scale * (gain + one) + shift + added; `added` may be null.
MV2V_INLINE void modulate(const float* x, float mean, float scale, int64_t width,
                          const float* gain, float one, const float* shift, const float* added,
                          float* out) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes value, by, plus;
    load(value, x + c);
    load(by, gain + c);
    load(plus, shift + c);
    value = (value - mean) * scale * (by + one) + plus;
    if (added) {
      load(plus, added + c);
      value += plus;
    }
    store(out + c, value);
  }
  for (; c < width; c++) {
    const float value = (x[c] - mean) * scale * (gain[c] + one) + shift[c];
    out[c] = added ? value + added[c] : value;
  }
}

// x + y * gate; a null `gate` is one.
MV2V_INLINE void add(const float* x, const float* y, const float* gate, int64_t width,
                     float* out) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes value, other, by;
    load(value, x + c);
    load(other, y + c);
    if (gate) {
      load(by, gate + c);
      other *= by;
    }
    store(out + c, value + other);
  }
  for (; c < width; c++) out[c] = x[c] + (gate ? y[c] * gate[c] : y[c]);
}

// Where the vectors of a token begin.
MV2V_INLINE int64_t vector_of(const Arguments& a, int64_t token) {
  return a.width * (a.row ? a.row[token] : token / a.length);
}

MV2V_CLONES void adaln(const Arguments& a, int64_t begin, int64_t end) {
  Statistics of;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t rows = end - first < kBlock ? end - first : kBlock;
    measure(a.x + first * a.width, rows, a, of);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = first + r, at = t * a.width, vector = vector_of(a, t);
      const float* camera = nullptr;
      if (a.camera) camera = a.camera + a.width * (t / a.length * a.num_frames + a.frame[t]);
      modulate(a.x + at, of.mean[r], of.scale[r], a.width, a.scale + vector, 1, a.shift + vector,
               camera, a.normed + at);
    }
  }
}

MV2V_CLONES void residual_norm(const Arguments& a, int64_t begin, int64_t end) {
  Statistics of;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t rows = end - first < kBlock ? end - first : kBlock;
    for (int64_t t = first; t < first + rows; t++) {
      const int64_t at = t * a.width;
      add(a.x + at, a.y + at, a.gate ? a.gate + vector_of(a, t) : nullptr, a.width, a.summed + at);
    }
    measure(a.summed + first * a.width, rows, a, of);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t t = first + r, at = t * a.width, vector = a.weight ? 0 : vector_of(a, t);
      const float* gain = a.weight ? a.weight : a.scale + vector;
      modulate(a.summed + at, of.mean[r], of.scale[r], a.width, gain, a.weight ? 0 : 1,
               a.shift + vector, nullptr, a.normed + at);
    }
  }
}

MV2V_CLONES void gated_residual(const Arguments& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    const int64_t at = t * a.width;
    add(a.x + at, a.y + at, a.gate + vector_of(a, t), a.width, a.summed + at);
  }
}

int check(int64_t batch, int64_t length, int64_t width, int64_t num_vectors, const int64_t* row,
          int num_threads) {
  if (batch < 0 || length < 0 || width < 1 || num_threads < 1 || (!row && num_vectors != batch))
    return MV2V_INVALID_ARGUMENT;
  return are_within(row, batch * length, num_vectors) ? MV2V_OK : MV2V_INVALID_INDEX;
}

}  // namespace

extern "C" {

int mv2v_adaln_cpu(const float* x, const float* scale, const float* shift, const float* camera,
                   const int64_t* frame, const int64_t* row, int64_t batch, int64_t length,
                   int64_t width, int64_t num_frames, int64_t num_vectors, double eps,
                   int num_threads, float* out) {
  const int64_t tokens = batch * length;
  if (!camera != !frame) return MV2V_INVALID_ARGUMENT;
  if (const int code = check(batch, length, width, num_vectors, row, num_threads)) return code;
  if (!are_within(frame, tokens, num_frames)) return MV2V_INVALID_INDEX;
  Arguments a = {};
  a.x = x, a.scale = scale, a.shift = shift, a.camera = camera, a.frame = frame, a.row = row;
  a.length = length, a.width = width, a.num_frames = num_frames;
  a.eps = static_cast<float>(eps), a.normed = out;
  divide_rows(adaln, a, tokens, width, num_threads);
  return MV2V_OK;
}

int mv2v_residual_norm_cpu(const float* x, const float* y, const float* gate, const float* scale,
                           const float* weight, const float* shift, const int64_t* row,
                           int64_t batch, int64_t length, int64_t width, int64_t num_vectors,
                           double eps, int num_threads, float* summed, float* normed) {
  if (!scale == !weight) return MV2V_INVALID_ARGUMENT;
  if (const int code = check(batch, length, width, num_vectors, row, num_threads)) return code;
  Arguments a = {};
  a.x = x, a.y = y, a.gate = gate, a.scale = scale, a.weight = weight, a.shift = shift;
  a.row = row, a.length = length, a.width = width;
  a.eps = static_cast<float>(eps), a.summed = summed, a.normed = normed;
  divide_rows(residual_norm, a, batch * length, width, num_threads);
  return MV2V_OK;
}

int mv2v_gated_residual_cpu(const float* x, const float* y, const float* gate, const int64_t* row,
                            int64_t batch, int64_t length, int64_t width, int64_t num_vectors,
                            int num_threads, float* out) {
  if (const int code = check(batch, length, width, num_vectors, row, num_threads)) return code;
  Arguments a = {};
  a.x = x, a.y = y, a.gate = gate, a.row = row, a.length = length, a.width = width;
  a.summed = out;
  divide_rows(gated_residual, a, batch * length, width, num_threads);
  return MV2V_OK;
}
}
