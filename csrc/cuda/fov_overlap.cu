// VideoFOV overlap on a GPU: a thread a point, a warp's ballot a word of the bitset.
//
// Every multiplication and addition is rounded by itself (__dmul_rn, __dadd_rn are never fused), so
// that a point on the border of an image falls on the same side as on a CPU. Counts are sums of
// integers: the same in any order.

#include <cuda_runtime.h>

#include "../mv2v.h"

namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;
constexpr int64_t kMaxGrid = 0x7fffffff;

struct Frames {
  const double* planes;
  int64_t stride, begin, end;
};

// Whether any frame sees the point. All lanes of a warp call it together: the loops end once the
// warp as a whole needs no more.
__device__ bool is_visible(double x, double y, double z, bool valid, const Frames frames) {
  bool seen = false;
  for (int64_t f = frames.begin; f < frames.end; f++) {
    bool inside = valid && !seen;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const double* n = frames.planes + 4 * p * frames.stride + f;
      double d = __dadd_rn(__dmul_rn(x, __ldg(n)), __dmul_rn(y, __ldg(n + frames.stride)));
      d = __dadd_rn(d, __dmul_rn(z, __ldg(n + 2 * frames.stride)));
      d = __dadd_rn(d, __ldg(n + 3 * frames.stride));
      inside = inside && (p < 2 ? d >= 0 : d > 0);
      if (!__any_sync(kWarp, inside)) break;
    }
    seen = seen || inside;
    if (__all_sync(kWarp, seen || !valid)) break;
  }
  return seen;
}

// grid (chunks of points, videos); a block that has no video left has none to count
__global__ void __launch_bounds__(kThreads)
    fov_overlap_kernel(const double* __restrict__ points, int64_t num_points, int64_t point_stride,
                       int64_t coordinate_stride, const double* __restrict__ planes,
                       int64_t plane_stride, const int64_t* __restrict__ first_frame,
                       int64_t num_videos, unsigned long long* __restrict__ counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool valid = i < num_points;
  const double* own = points + (valid ? i : 0) * point_stride;
  const double x = own[0], y = own[coordinate_stride], z = own[2 * coordinate_stride];
  const bool wanted =
      is_visible(x, y, z, valid, {planes, plane_stride, first_frame[0], first_frame[1]});
  for (int64_t v = blockIdx.y; v < num_videos; v += gridDim.y) {
    const Frames frames = {planes, plane_stride, first_frame[v], first_frame[v + 1]};
    const bool seen = v ? is_visible(x, y, z, valid, frames) : wanted;
    // a barrier that counts: the popcount over the block's words
    const int num_shared = __syncthreads_count(seen && wanted);
    const int num_seen = __syncthreads_count(seen);
    if (threadIdx.x == 0 && num_seen) {
      atomicAdd(counts + 2 * v, static_cast<unsigned long long>(num_shared));
      atomicAdd(counts + 2 * v + 1, static_cast<unsigned long long>(num_seen));
    }
  }
}

}  // namespace

extern "C" int mv2v_fov_overlap_cuda(const double* points, int64_t num_points, int64_t point_stride,
                                     int64_t coordinate_stride, const double* planes,
                                     int64_t plane_stride, const int64_t* first_frame,
                                     int64_t num_videos, int64_t* counts, void* stream) {
  const int64_t num_chunks = (num_points + kThreads - 1) / kThreads;
  if (num_points < 0 || num_chunks > kMaxGrid || num_videos < 1 || !first_frame || !counts ||
      !planes || (num_points && !points))
    return MV2V_INVALID_ARGUMENT;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  const cudaError_t zeroed = cudaMemsetAsync(counts, 0, 2 * num_videos * sizeof(int64_t), on);
  if (zeroed != cudaSuccess || !num_points) return static_cast<int>(zeroed);
  const dim3 grid(static_cast<unsigned>(num_chunks),
                  static_cast<unsigned>(num_videos < 65535 ? num_videos : 65535));
  fov_overlap_kernel<<<grid, kThreads, 0, on>>>(points, num_points, point_stride,
                                                coordinate_stride, planes, plane_stride,
                                                first_frame, num_videos,
                                                reinterpret_cast<unsigned long long*>(counts));
  return static_cast<int>(cudaGetLastError());
}
