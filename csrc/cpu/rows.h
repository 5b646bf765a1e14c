// What the operations on rows of tokens share: lanes, sums, and rows divided between threads.
//
// A sum always has the same 64 parts, added in the same order, whatever the instruction set and
// the number of threads: results are equal to the last bit. Lanes pass by reference alone, since
// how a function takes them by value depends on the instruction set.

#ifndef MV2V_CPU_ROWS_H
#define MV2V_CPU_ROWS_H

#include "../mv2v.h"
#include "clones.h"

namespace mv2v {

constexpr int kLanes = 16;
constexpr int kParts = 4;                // accumulators: shorter chains, and less rounding
constexpr int64_t kGrain = 1 << 15;      // values below which another thread costs more than it saves

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int kHalf = kLanes / 2;  // channels that are turned at once

typedef float Half __attribute__((vector_size(kHalf * sizeof(float))));

// A half's places in another order, which has to be constant.
#ifdef __clang__
#define MV2V_PLACES(lanes, ...) __builtin_shufflevector(lanes, lanes, __VA_ARGS__)
#else
typedef int Places __attribute__((vector_size(kHalf * sizeof(int))));
#define MV2V_PLACES(lanes, ...) __builtin_shuffle(lanes, ::mv2v::Places{__VA_ARGS__})
#endif

MV2V_INLINE void load(Lanes& lanes, const float* from) {
  __builtin_memcpy(&lanes, from, sizeof lanes);
}

MV2V_INLINE void store(float* to, const Lanes& lanes) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}

MV2V_INLINE float total(const Lanes* part, float rest) {
  typedef float Eight __attribute__((vector_size(8 * sizeof(float))));
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));
  const Lanes all = (part[0] + part[1]) + (part[2] + part[3]);
  Eight eight[2];
  __builtin_memcpy(eight, &all, sizeof all);
  const Eight halved = eight[0] + eight[1];
  Four four[2];
  __builtin_memcpy(four, &halved, sizeof halved);
  const Four sums = four[0] + four[1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]) + rest;
}

MV2V_INLINE float sum(const float* x, int64_t count) {
  Lanes part[kParts] = {}, value;
  int64_t c = 0;
  for (; c + kParts * kLanes <= count; c += kParts * kLanes)
    for (int p = 0; p < kParts; p++) {
      load(value, x + c + p * kLanes);
      part[p] += value;
    }
  for (; c + kLanes <= count; c += kLanes) {
    load(value, x + c);
    part[0] += value;
  }
  float rest = 0;
  for (; c < count; c++) rest += x[c];
  return total(part, rest);
}

// Sum of the squared distances to `centre`.
MV2V_INLINE float squares(const float* x, int64_t count, float centre) {
  Lanes part[kParts] = {}, value;
  int64_t c = 0;
  for (; c + kParts * kLanes <= count; c += kParts * kLanes)
    for (int p = 0; p < kParts; p++) {
      load(value, x + c + p * kLanes);
      value -= centre;
      part[p] += value * value;
    }
  for (; c + kLanes <= count; c += kLanes) {
    load(value, x + c);
    value -= centre;
    part[0] += value * value;
  }
  float rest = 0;
  for (; c < count; c++) rest += (x[c] - centre) * (x[c] - centre);
  return total(part, rest);
}

constexpr int64_t kBlock = 8;  // rows whose statistics are taken together: their latencies overlap

// run(arguments, begin, end) for all rows, each of them by one thread.
template <class Arguments>
void divide_rows(void (*run)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
                 int64_t num_rows, int64_t width, int num_threads) {
  const int64_t worth = num_rows * width / kGrain;
  const int64_t threads = worth < num_threads ? worth : num_threads;
  if (threads <= 1) return run(arguments, 0, num_rows);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t i = 0; i < threads; i++)
    run(arguments, num_rows * i / threads, num_rows * (i + 1) / threads);
}

// Is every index one of a table of `count` rows?
inline bool are_within(const int64_t* index, int64_t num_indices, int64_t count) {
  bool within = true;
  for (int64_t i = 0; index && i < num_indices; i++) within &= index[i] >= 0 && index[i] < count;
  return within;
}

}  // namespace mv2v
#endif
