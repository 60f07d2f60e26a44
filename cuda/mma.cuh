// mma.cuh - the warp's matrix instructions and asynchronous copies, for every architecture from sm_75 on.
#pragma once

#include <cuda_fp16.h>
#include <stdint.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define PALU_SM80 1
#endif

namespace mma {

static __device__ __forceinline__ uint32_t smem(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

// 16 bytes from global to shared memory; before sm_80 the thread waits for them
static __device__ __forceinline__ void copy16(uint32_t dst, const void * src) {
#ifdef PALU_SM80
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(dst), "l"(src) : "memory");
#else
    const uint4 v = *(const uint4 *) src;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
static __device__ __forceinline__ void copy4(uint32_t dst, const void * src) {
#ifdef PALU_SM80
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(dst), "l"(src) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(dst), "r"(*(const uint32_t *) src) : "memory");
#endif
}
static __device__ __forceinline__ void copy_commit() {
#ifdef PALU_SM80
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// waits until at most N of the groups committed are under way
template <int N> static __device__ __forceinline__ void copy_wait() {
#ifdef PALU_SM80
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

// Four matrices of 8 rows of 16 bytes: lane i names row i%8 of matrix i/8, and gets bytes 4*(i%4).. of row i/4 of each.
static __device__ __forceinline__ void load_4(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// The same, every matrix of f16 transposed.
static __device__ __forceinline__ void load_4_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// c[16][8] += a[16][32] b[32][8], s8 to s32
static __device__ __forceinline__ void s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PALU_SM80
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2*i]), "+r"(c[2*i + 1]) : "r"(a[i]), "r"(b0));
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2*i]), "+r"(c[2*i + 1]) : "r"(a[i + 2]), "r"(b1));
    }
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PALU_SM90A 1

// Before registers that products use are written, and once products are under way.
static __device__ __forceinline__ void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// what this thread wrote to shared memory, its copies too, is seen by the products of any
static __device__ __forceinline__ void group_see() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Where a factor of 128 rows stands, 64 bytes each: chunk c of 16 bytes of row r at chunk c ^ (r/2%4), the hardware's 64-byte
// swizzle. at: of the row's first 32 bytes or the others.
static __device__ __forceinline__ uint64_t group_matrix(uint32_t at) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t) 1 << 16 | (uint64_t)(512 >> 4) << 32 | (uint64_t) 2 << 62;
}
// c[64][128] += a[64][32] b[32][128], s8 to s32, by four warps; fragments as in s8(), 16 columns of them
static __device__ __forceinline__ void group_s8(int (&c)[2][8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1;"
        : "+r"(c[0][0][0]), "+r"(c[0][0][1]), "+r"(c[0][0][2]), "+r"(c[0][0][3]), "+r"(c[0][1][0]), "+r"(c[0][1][1]), "+r"(c[0][1][2]), "+r"(c[0][1][3]),
           "+r"(c[0][2][0]), "+r"(c[0][2][1]), "+r"(c[0][2][2]), "+r"(c[0][2][3]), "+r"(c[0][3][0]), "+r"(c[0][3][1]), "+r"(c[0][3][2]), "+r"(c[0][3][3]),
           "+r"(c[0][4][0]), "+r"(c[0][4][1]), "+r"(c[0][4][2]), "+r"(c[0][4][3]), "+r"(c[0][5][0]), "+r"(c[0][5][1]), "+r"(c[0][5][2]), "+r"(c[0][5][3]),
           "+r"(c[0][6][0]), "+r"(c[0][6][1]), "+r"(c[0][6][2]), "+r"(c[0][6][3]), "+r"(c[0][7][0]), "+r"(c[0][7][1]), "+r"(c[0][7][2]), "+r"(c[0][7][3]),
           "+r"(c[1][0][0]), "+r"(c[1][0][1]), "+r"(c[1][0][2]), "+r"(c[1][0][3]), "+r"(c[1][1][0]), "+r"(c[1][1][1]), "+r"(c[1][1][2]), "+r"(c[1][1][3]),
           "+r"(c[1][2][0]), "+r"(c[1][2][1]), "+r"(c[1][2][2]), "+r"(c[1][2][3]), "+r"(c[1][3][0]), "+r"(c[1][3][1]), "+r"(c[1][3][2]), "+r"(c[1][3][3]),
           "+r"(c[1][4][0]), "+r"(c[1][4][1]), "+r"(c[1][4][2]), "+r"(c[1][4][3]), "+r"(c[1][5][0]), "+r"(c[1][5][1]), "+r"(c[1][5][2]), "+r"(c[1][5][3]),
           "+r"(c[1][6][0]), "+r"(c[1][6][1]), "+r"(c[1][6][2]), "+r"(c[1][6][3]), "+r"(c[1][7][0]), "+r"(c[1][7][1]), "+r"(c[1][7][2]), "+r"(c[1][7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

// c[16][8] += a[16][16] b[16][8], f16 to f32
static __device__ __forceinline__ void f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef PALU_SM80
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// c[16][8] += a[16][8] b[8][8], tf32 (the upper 19 bits of f32) to f32
static __device__ __forceinline__ void tf32(float (&c)[4], const uint32_t * a, uint32_t b0, uint32_t b1) {
#ifdef PALU_SM80
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Eight codes of one segment, as they stand in the row, and then as bytes.
struct Segment {
    uint32_t lo; // from code 0 on
    uint32_t hi; // from code 4 on
    uint32_t bits;

    Segment() = default;
    // row: 4-byte aligned, as is its end
    __device__ __forceinline__ Segment(const uint8_t * row, uint32_t seg) : bits(seg >> 24) {
        const uint32_t from = seg & 0xffffff;
        const uint32_t * words = (const uint32_t *) row + (from >> 2);
        const uint32_t last = ((from & 3) + bits - 1) >> 2; // word with the last byte
        const uint32_t a = words[0];
        const uint32_t b = last > 0 ? words[1] : 0;
        const uint32_t c = last > 1 ? words[2] : 0;
        const uint32_t shift = (from & 3)*8;
        const uint32_t at = shift + 4*bits;
        lo = __funnelshift_r(a, b, shift);
        hi = at < 32 ? __funnelshift_r(a, b, at) : __funnelshift_r(b, c, at - 32);
    }
    // Four codes to four bytes.
    __device__ __forceinline__ uint32_t spread(uint32_t x) const {
        const uint32_t y = (x & 0x0000ffffu) | (x << (16 - 2*bits) & 0xffff0000u);
        const uint32_t z = (y & 0x00ff00ffu) | (y << (8 - bits) & 0xff00ff00u);
        return z & ((1u << bits) - 1)*0x01010101u;
    }
    // Four codes to four signed bytes, less 2^(bits - 1).
    __device__ __forceinline__ uint32_t spread_signed(uint32_t x) const {
        return (spread(x) + (128u - (1u << bits >> 1))*0x01010101u) ^ 0x80808080u; // no carry between bytes
    }
};

} // namespace mma
