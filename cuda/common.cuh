// common.cuh - what the kernels share.
#pragma once

#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

#include "palu_cuda.h"

#ifndef INFINITY
#define INFINITY CUDART_INF_F
#endif

static constexpr float LOG2E = 1.4426950408889634f;

// Programmatic dependent launch, from sm_90 on: a kernel may start while the one before it in the stream still runs, once all its
// blocks have let it (grid_next) or ended. No block touches what an earlier kernel writes or reads before all of them are done
// (grid_wait); tables that never change may be read sooner. And no kernel ends before all of them are done, not even where its
// blocks have nothing to do: so whoever waits for a kernel waits for all before it.
//
// Decoding waits before it lets the next kernel start. So what it waits for is done when that one starts, and a kernel that is only to
// come after that (`beside` in its parameters) does not wait at its beginning, but at its end: it runs on multiprocessors that
// decoding leaves idle. One block does so for all, as the others must make room. Each lets the next kernel start no sooner than itself.
//
// Projecting, too, waits before it lets the next kernel start. So where decoding reads no row that is written after what comes before
// projecting, its rows need not be waited for, only its queries (`beside` of palu_cuda_part, decode_sm90_cluster).
static __device__ __forceinline__ void grid_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

static __device__ __forceinline__ palu_cuda_group side_group(const palu_cuda_side & side, int i) {
    return side.n_group <= PALU_CUDA_NEAR_GROUPS ? side.near_groups[i] : side.groups[i];
}

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        x += __shfl_xor_sync(0xffffffff, x, i);
    }
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
    }
    return x;
}

// A lane has the sum of its own and all lower lanes' numbers.
static __device__ __forceinline__ int warp_ends(int x) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        const int before = __shfl_up_sync(0xffffffff, x, i);
        x += lane < i ? 0 : before;
    }
    return x;
}

// The compiler does not know this: what is made of it is made where it is used, and not kept in registers.
static __device__ __forceinline__ uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Sine and cosine of an angle in turns times 2^64; only the upper 32 bits matter (1.5e-9 radians).
static __device__ __forceinline__ void sincos_turn(uint64_t turn, float & s, float & c) {
    const float x = (float) (int32_t) (turn >> 32)*(6.283185307179586f/4294967296.0f); // -pi to pi
    __sincosf(x, &s, &c);
}

// As in ggml_soft_max_ext.
static __device__ __forceinline__ float alibi_slope(float max_bias, int n_head, int head) {
    if (max_bias <= 0.0f) {
        return 1.0f;
    }
    const int n = 1 << (31 - __clz(n_head));
    const float m0 = exp2f(-max_bias/n);
    const float m1 = exp2f(-max_bias/2/n);
    return head < n ? powf(m0, head + 1) : powf(m1, 2*(head - n) + 1);
}
