// VideoFOV overlap on the CPU: bitsets of visible points, counted by popcount.
//
// A chunk of points is a task, a block of neighbours within it 16 bits. The box around either,
// against a frame's planes, settles most of it without looking at a point: all is outside, or all
// is inside and nothing else is asked. What is left is tested point by point, in exactly the
// operations that the reference uses, so the answer does not depend on the culling. Must be
// compiled with -ffp-contract=off: a fused multiply-add rounds once where the reference rounds
// twice, which moves points that lie on the border of an image.

#include "../mv2v.h"
#include "clones.h"

namespace {

constexpr int kBlock = 16;          // neighbouring points that are culled together
constexpr int kChunk = 512;         // points of one task
constexpr int kBlocks = kChunk / kBlock;
constexpr int kWords = kChunk / 64;
constexpr uint64_t kAll = (uint64_t{1} << kBlock) - 1;
constexpr int kFrames = 128;        // frames whose culling is decided at once
constexpr double kSlack = 1e-12;    // of the terms' magnitude; a distance is off by 1e-15 of it

struct Frames {
  const double* planes;
  int64_t stride, begin, end;
};

struct Box {
  double centre[3], extent[3];  // half of its size, with the slack for rounding
};

struct Chunk {
  double point[3][kChunk];
  Box whole, block[kBlocks];
  int num_blocks, in_last;  // blocks in use, points in the last of them
};

struct Side {
  int64_t outside[kFrames], inside[kFrames];  // all bits, or none
};

MV2V_INLINE double magnitude(double value) { return value < 0 ? -value : value; }

void set_box(Box& box, int c, const double* coordinate, int count) {
  double low = coordinate[0], high = coordinate[0], poison = 0;
  for (int i = 0; i < count; i++) {
    low = coordinate[i] < low ? coordinate[i] : low;
    high = coordinate[i] > high ? coordinate[i] : high;
    poison += coordinate[i] - coordinate[i];  // 0, or not a number where a point is not finite
  }
  const double middle = 0.5 * low + 0.5 * high, reach = 0.5 * high - 0.5 * low;
  box.centre[c] = middle + poison;
  box.extent[c] = reach + kSlack * (magnitude(middle) + reach);
}

void load_chunk(Chunk& chunk, const double* points, int64_t count, int64_t point_stride,
                int64_t coordinate_stride) {
  chunk.num_blocks = static_cast<int>((count + kBlock - 1) / kBlock);
  chunk.in_last = static_cast<int>(count - int64_t{kBlock} * (chunk.num_blocks - 1));
  const int padded = chunk.num_blocks * kBlock;
  for (int c = 0; c < 3; c++) {
    double* coordinate = chunk.point[c];
    for (int i = 0; i < padded; i++) {
      const int64_t source = i < count ? i : count - 1;
      coordinate[i] = points[source * point_stride + c * coordinate_stride];
    }
    set_box(chunk.whole, c, coordinate, padded);
    for (int b = 0; b < chunk.num_blocks; b++)
      set_box(chunk.block[b], c, coordinate + b * kBlock, kBlock);
  }
}

// For up to kFrames frames: is the box outside one of the planes, is it inside all of them? Where
// a value is not a number neither is true, and the points decide.
MV2V_INLINE void cull(const Box& box, const Frames& frames, int64_t first, int64_t count,
                      Side& side) {
  const double cx = box.centre[0], cy = box.centre[1], cz = box.centre[2];
  const double ex = box.extent[0], ey = box.extent[1], ez = box.extent[2];
  for (int64_t f = 0; f < count; f++) side.outside[f] = 0, side.inside[f] = -1;
  for (int p = 0; p < 4; p++) {
    const double* n0 = frames.planes + 4 * p * frames.stride + first;
    const double* n1 = n0 + frames.stride;
    const double* n2 = n1 + frames.stride;
    const double* n3 = n2 + frames.stride;
    for (int64_t f = 0; f < count; f++) {
      const double distance = cx * n0[f] + cy * n1[f] + cz * n2[f] + n3[f];
      const double margin = ex * magnitude(n0[f]) + ey * magnitude(n1[f]) +
                            ez * magnitude(n2[f]) + kSlack * magnitude(n3[f]);
      side.outside[f] |= -static_cast<int64_t>(distance < -margin);
      side.inside[f] &= -static_cast<int64_t>(distance > margin);
    }
  }
}

// Narrows `frames` to those from the first to the last that the box is not outside of; true if one
// of them sees all of the box.
MV2V_INLINE bool narrow(const Box& box, Frames& frames, Side& side) {
  int64_t begin = frames.end, end = frames.begin;
  for (int64_t first = frames.begin; first < frames.end; first += kFrames) {
    const int64_t left = frames.end - first, count = left < kFrames ? left : kFrames;
    cull(box, frames, first, count, side);
    int64_t any = 0;
    for (int64_t f = 0; f < count; f++) any |= side.inside[f];
    if (any) return true;
    for (int64_t f = 0; f < count; f++) {
      if (side.outside[f]) continue;
      begin = begin < first + f ? begin : first + f;
      end = first + f + 1;
    }
  }
  frames.begin = begin;
  frames.end = end;
  return false;
}

// Adds to `seen` the points of a block that one frame sees: all bits of a value, or none.
MV2V_INLINE void test_points(const Chunk& chunk, int block, const Frames& frames, int64_t frame,
                             int64_t* seen) {
  const double* x = chunk.point[0] + block * kBlock;
  const double* y = chunk.point[1] + block * kBlock;
  const double* z = chunk.point[2] + block * kBlock;
  int64_t inside[kBlock];
  for (int i = 0; i < kBlock; i++) inside[i] = -1;
  for (int p = 0; p < 4; p++) {
    const double* n = frames.planes + 4 * p * frames.stride + frame;
    const double n0 = n[0], n1 = n[frames.stride], n2 = n[2 * frames.stride];
    const double n3 = n[3 * frames.stride];
    for (int i = 0; i < kBlock; i++) {
      const double distance = ((x[i] * n0 + y[i] * n1) + z[i] * n2) + n3;
      inside[i] &= -static_cast<int64_t>(p < 2 ? distance >= 0 : distance > 0);
    }
  }
  for (int i = 0; i < kBlock; i++) seen[i] |= inside[i];
}

// One bit per point of the block: does any of the frames see it?
MV2V_INLINE uint64_t block_bits(const Chunk& chunk, int block, const Frames& frames, Side& side) {
  int64_t seen[kBlock] = {};
  for (int64_t first = frames.begin; first < frames.end; first += kFrames) {
    const int64_t left = frames.end - first, count = left < kFrames ? left : kFrames;
    cull(chunk.block[block], frames, first, count, side);
    int64_t any = 0;
    for (int64_t f = 0; f < count; f++) any |= side.inside[f];
    if (any) return kAll;
    for (int64_t f = 0; f < count; f++)
      if (!side.outside[f]) test_points(chunk, block, frames, first + f, seen);
  }
  uint64_t bits = 0;
  for (int i = 0; i < kBlock; i++) bits |= static_cast<uint64_t>(seen[i] & 1) << i;
  return bits;
}

MV2V_CLONES void visible(const Chunk& chunk, Frames frames, uint64_t* words) {
  for (int w = 0; w < kWords; w++) words[w] = 0;
  Side side;
  const bool all = narrow(chunk.whole, frames, side);
  if (frames.begin >= frames.end) return;
  for (int b = 0; b < chunk.num_blocks; b++) {
    uint64_t bits = all ? kAll : block_bits(chunk, b, frames, side);
    if (b == chunk.num_blocks - 1) bits &= (uint64_t{1} << chunk.in_last) - 1;
    words[b * kBlock / 64] |= bits << (b * kBlock % 64);
  }
}

MV2V_CLONES void popcounts(const uint64_t* wanted, const uint64_t* words, int64_t* shared,
                           int64_t* own) {
  int64_t both = 0, one = 0;
  for (int w = 0; w < kWords; w++) {
    both += __builtin_popcountll(wanted[w] & words[w]);
    one += __builtin_popcountll(words[w]);
  }
  *shared = both;
  *own = one;
}

}  // namespace

extern "C" int mv2v_fov_overlap_cpu(const double* points, int64_t num_points, int64_t point_stride,
                                    int64_t coordinate_stride, const double* planes,
                                    int64_t plane_stride, const int64_t* first_frame,
                                    int64_t num_videos, int num_threads, int64_t* counts) {
  if (num_points < 0 || num_videos < 1 || num_threads < 1 || !first_frame || !counts ||
      !planes || (num_points && !points))
    return MV2V_INVALID_ARGUMENT;
  for (int64_t v = 0; v < num_videos; v++)
    if (first_frame[v] < 0 || first_frame[v + 1] < first_frame[v]) return MV2V_INVALID_ARGUMENT;
  for (int64_t i = 0; i < 2 * num_videos; i++) counts[i] = 0;

  const int64_t num_chunks = (num_points + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t c = 0; c < num_chunks; c++) {
    const int64_t start = c * kChunk, left = num_points - start;
    Chunk chunk;
    load_chunk(chunk, points + start * point_stride, left < kChunk ? left : kChunk, point_stride,
               coordinate_stride);
    uint64_t wanted[kWords], words[kWords];
    visible(chunk, {planes, plane_stride, first_frame[0], first_frame[1]}, wanted);
    for (int64_t v = 0; v < num_videos; v++) {
      if (v) visible(chunk, {planes, plane_stride, first_frame[v], first_frame[v + 1]}, words);
      int64_t shared, own;
      popcounts(wanted, v ? words : wanted, &shared, &own);
      // sums of integers: the same in any order
#pragma omp atomic
      counts[2 * v] += shared;
#pragma omp atomic
      counts[2 * v + 1] += own;
    }
  }
  return MV2V_OK;
}
