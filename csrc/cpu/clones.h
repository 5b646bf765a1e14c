// The wider instruction sets are chosen when the library is loaded, so that it runs anywhere.

#ifndef MV2V_CPU_CLONES_H
#define MV2V_CPU_CLONES_H

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define MV2V_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MV2V_CLONES
#endif
#define MV2V_INLINE inline __attribute__((always_inline))

#endif
