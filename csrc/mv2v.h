/* The C ABI of the native libraries: raw pointers, sizes and strides in; an error code out.
 *
 * Nothing here knows torch or Python, allocates, or throws. Two libraries implement it, each
 * optional: libmv2v_cpu from csrc/cpu and libmv2v_cuda from csrc/cuda. Whoever changes a signature
 * or its meaning raises MV2V_ABI_VERSION here and in mv2v_engine/ops/native.py.
 */
#ifndef MV2V_H
#define MV2V_H

#include <stdint.h>

#ifndef MV2V_ABI_VERSION
#define MV2V_ABI_VERSION 3
#endif

#define MV2V_OK 0
#define MV2V_INVALID_ARGUMENT (-1) /* positive codes of libmv2v_cuda are cudaError_t */
#define MV2V_INVALID_INDEX (-2)

#define MV2V_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

MV2V_API int mv2v_abi_version(void);
MV2V_API const char* mv2v_error_string(int code);

/* libmv2v_cpu: 1 if it was compiled with OpenMP, else it runs on the calling thread alone. */
MV2V_API int mv2v_has_openmp(void);

/* VideoFOV: which of the points does any frame of a video see, and how many of them does the first
 * video see too (mv2v_engine/ops/fov_overlap.py).
 *
 * points         coordinate c of point i is points[i * point_stride + c * coordinate_stride]
 * planes         16 rows of plane_stride values, one per frame: component c of plane p of frame f
 *                is planes[(4 * p + c) * plane_stride + f]. A frame sees a point if
 *                ((x * n0 + y * n1) + z * n2) + n3, each operation rounded to a double, is >= 0 for
 *                planes 0 and 1, and > 0 for planes 2 and 3.
 * first_frame    num_videos + 1 offsets, rising: video v has frames first_frame[v] up to
 *                first_frame[v + 1]. In CUDA's case it lies on the device.
 * counts         [num_videos, 2], written whole: points that the first video and v see, points
 *                that v sees.
 */
MV2V_API int mv2v_fov_overlap_cpu(const double* points, int64_t num_points, int64_t point_stride,
                                  int64_t coordinate_stride, const double* planes,
                                  int64_t plane_stride, const int64_t* first_frame,
                                  int64_t num_videos, int num_threads, int64_t* counts);

/* All pointers on the current device; asynchronous on `stream`, a cudaStream_t. */
MV2V_API int mv2v_fov_overlap_cuda(const double* points, int64_t num_points, int64_t point_stride,
                                   int64_t coordinate_stride, const double* planes,
                                   int64_t plane_stride, const int64_t* first_frame,
                                   int64_t num_videos, int64_t* counts, void* stream);

/* Operations on rows of tokens: float32, dense, C contiguous values a token, float32 statistics.
 * Results are equal to the last bit for any num_threads.
 *
 * x, y, outputs        [batch, length, width]
 * gate, scale, shift   [num_vectors, width]: of a sample, so that num_vectors is batch, or with
 *                      `row` [batch, length] of the rows that tokens name. An index outside the
 *                      table is MV2V_INVALID_INDEX, and nothing is written.
 * NULL                 where an operation does without: gate, row, camera and frame, rope, and one
 *                      of scale and weight.
 */

/* out = LN(x) * (1 + scale) + shift + camera[frame] (mv2v_engine/ops/adaln.py); camera is
 * [batch, num_frames, width], frame [batch, length]. */
MV2V_API int mv2v_adaln_cpu(const float* x, const float* scale, const float* shift,
                            const float* camera, const int64_t* frame, const int64_t* row,
                            int64_t batch, int64_t length, int64_t width, int64_t num_frames,
                            int64_t num_vectors, double eps, int num_threads, float* out);

/* summed = x + y * gate; normed = LN(summed) * (1 + scale) + shift, or with weight [width] and
 * shift [width] LN(summed) * weight + shift (mv2v_engine/ops/residual_norm.py). */
MV2V_API int mv2v_residual_norm_cpu(const float* x, const float* y, const float* gate,
                                    const float* scale, const float* weight, const float* shift,
                                    const int64_t* row, int64_t batch, int64_t length,
                                    int64_t width, int64_t num_vectors, double eps,
                                    int num_threads, float* summed, float* normed);

/* out = x + y * gate (mv2v_engine/ops/gated_residual.py) */
MV2V_API int mv2v_gated_residual_cpu(const float* x, const float* y, const float* gate,
                                     const int64_t* row, int64_t batch, int64_t length,
                                     int64_t width, int64_t num_vectors, int num_threads,
                                     float* out);

/* RMSNorm over width = num_heads * head_dim, times weight [width], then the rotation of interleaved
 * pairs by rope [rope_batch, length, head_dim], cosines before sines; rope_batch is 1 or batch
 * (mv2v_engine/ops/qk_norm_rope.py). */
MV2V_API int mv2v_qk_norm_rope_cpu(const float* x, const float* weight, const float* rope,
                                   int64_t batch, int64_t length, int64_t num_heads,
                                   int64_t head_dim, int64_t rope_batch, double eps,
                                   int num_threads, float* out);

/* The first `channels` of every head, by fours, times the matrix of the token's frame, the others as
 * they are (mv2v_engine/ops/prope.py). x and out are [batch, length, num_heads, head_dim], matrix
 * [batch, num_frames, 4, 4], frame [batch, length]; a frame beyond the table is
 * MV2V_INVALID_INDEX. */
MV2V_API int mv2v_prope_cpu(const float* x, const float* matrix, const int64_t* frame,
                            int64_t batch, int64_t length, int64_t num_heads, int64_t head_dim,
                            int64_t channels, int64_t num_frames, int num_threads, float* out);

#ifdef __cplusplus
}
#endif
#endif
