// decoder.cuh - what rebuilding rows and attention on tensor cores have in common: codes to bytes, the decoder's way through
// shared memory, the integer product, and the tables of the rotation.
//
// The columns of a product are the two dimensions of RoPE pairs, in such an order that a thread ends up with eight
// consecutive pairs of a head, a *unit*: column 8*f + 2*t + e of a warp's 64 is dimension e of pair f of the t-th of its four
// units.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "palu_cuda.h"

// Sine and cosine are kept as 16 bits each: units of 2^-14 (for magnitudes below 2), plus 2^15. Below 2^9 in a float's mantissa
// that is the float 2^9 + 2 + value.
struct Trig {
    uint32_t exponent;
    float bias;

    // the largest magnitude decides the unit
    __device__ __forceinline__ Trig(const float * mag, int pairs) : exponent(0x44000000u), bias(514.0f) {
        float most = 0.0f;
        for (int i = threadIdx.x & 31; i < pairs; i += 32) {
            most = fmaxf(most, fabsf(mag[i]));
        }
        most = warp_max(most);
        for (float limit = 2.0f; most >= limit && limit < 1e9f; limit *= 2.0f) {
            exponent += 0x00800000u;
            bias *= 2.0f;
        }
    }
    __device__ __forceinline__ uint32_t pack(float c, float s, float mag) const {
        return __byte_perm(__float_as_uint(fmaf(c, mag, bias)), __float_as_uint(fmaf(s, mag, bias)), 0x5410);
    }
    __device__ __forceinline__ float cosine(uint32_t v) const { return __uint_as_float(__byte_perm(v, exponent, 0x7610)) - bias; }
    __device__ __forceinline__ float sine(uint32_t v) const { return __uint_as_float(__byte_perm(v, exponent, 0x7632)) - bias; }
};

// Division of small numbers by one that does not change.
struct Divisor {
    uint32_t n, magic;

    __device__ __forceinline__ explicit Divisor(int n) : n(n), magic(n > 1 ? 0xffffffffu/n + 1 : 0) {}
    // i*n < 2^32
    __device__ __forceinline__ int operator()(int i) const { return magic ? __umulhi(i, magic) : i; }
};

// Segments seg0 to seg0 + n_seg of n_cell rows to bytes at codes[cell*stride]; row(cell) is where the row stands, and the
// segments from n_row on, which pad the rank, repeat the last. KEYS: signed, in the order of palu_cuda_key_channel().
template <bool KEYS, bool SIGNED, int THREADS, typename Row>
static __device__ __forceinline__ void unpack_codes(uint8_t * codes, int stride, int n_cell, int seg0, int n_seg, int n_row, const uint32_t * segs, Row row) {
    constexpr int U = 4; // at a time, for their loads not to wait for each other
    const Divisor by(n_seg);
    const int n = n_cell*n_seg;
    for (int i0 = threadIdx.x; i0 < n; i0 += THREADS*U) {
        mma::Segment seg[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int i = min(i0 + THREADS*u, n - 1);
            const int t = by(i);
            seg[u] = mma::Segment(row(t), segs[min(seg0 + i - t*n_seg, n_row - 1)]);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int i = i0 + THREADS*u;
            if (i < n) {
                const int t = by(i);
                const int sg = i - t*n_seg;
                const uint32_t lo = SIGNED ? seg[u].spread_signed(seg[u].lo) : seg[u].spread(seg[u].lo);
                const uint32_t hi = SIGNED ? seg[u].spread_signed(seg[u].hi) : seg[u].spread(seg[u].hi);
                if (KEYS) {
                    uint8_t * to = codes + t*stride + sg/4*32 + sg%4*4;
                    *(uint32_t *) to = lo;
                    *(uint32_t *)(to + 16) = hi;
                } else {
                    *(uint2 *)(codes + t*stride + sg*8) = make_uint2(lo, hi);
                }
            }
        }
    }
}

// Half, scale and mean of the dimensions of a tile, per unit and two pairs: each of the first dimensions and of the second.
#define PALU_CONST_STRIDE 52 // floats per unit: 4 times 12, and 4 so that the units' banks differ

// A group's decoder on its way through shared memory, in tiles of COLS columns and stages of 64 channels.
template <int COLS, int THREADS>
struct DecoderStream {
    static constexpr int UNITS = COLS/16;
    static constexpr int STAGE = COLS*64;      // bytes
    static constexpr int STEP = THREADS/4;     // a thread copies 16 bytes of every STEP-th column
    static constexpr int EACH = COLS/STEP;

    const int8_t * dec;
    const uint16_t * dims; // [per_head][16] dimensions of a head in the order of the columns
    Divisor per_head;      // units
    int pairs;             // of a head
    int n_unit;
    int rank_pad;
    int planes;
    uint32_t next_plane;   // bytes
    uint32_t to;           // of the first stage
    uint32_t stage_end;
    uint32_t src[EACH];
    int tile;              // next to be loaded
    int plane;
    int k;
    uint32_t stage;

    // dec: of the first of the heads that the units belong to
    __device__ __forceinline__ DecoderStream(const palu_cuda_side & s, const palu_cuda_group & g, const int8_t * dec, const uint16_t * dims, Divisor per_head, int n_unit, uint8_t * stages, int n_stage)
        : dec(dec), dims(dims), per_head(per_head), pairs(s.head_dim/2), n_unit(n_unit), rank_pad(g.rank_pad), planes(s.planes),
          next_plane(s.group_size*s.head_dim*g.rank_pad), stage_end(n_stage*STAGE), tile(0), plane(0), k(0), stage(0) {
        const int n = threadIdx.x/4;
        to = mma::smem(stages) + n*64 + (threadIdx.x%4 ^ (n >> 1 & 3))*16;
    }
    __device__ __forceinline__ void start(int first) {
        tile = first;
        plane = 0;
        k = 0;
        stage = 0;
    }
    // the next 64 channels, if a tile before `end` has them
    __device__ __forceinline__ void load(int end) {
        if (tile < end) {
            if (plane + k == 0) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int n = threadIdx.x/4 + j*STEP;
                    const int unit = min(tile*UNITS + n/64*4 + n%8/2, n_unit - 1);
                    const int head = per_head(unit);
                    src[j] = (head*(2*pairs) + dims[(unit - head*per_head.n)*16 + n%64/8*2 + n%2])*rank_pad + threadIdx.x%4*16;
                }
            }
            if (k + (int) threadIdx.x%4*16 < rank_pad) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    mma::copy16(to + stage + j*(STEP*64), dec + (src[j] + k));
                }
            }
            k += 64;
            if (k >= rank_pad) {
                k = 0;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    src[j] += next_plane;
                }
                if (++plane == planes) {
                    plane = 0;
                    tile++;
                }
            }
        }
        stage = stage + STAGE == stage_end ? 0 : stage + STAGE;
    }
    // half, scale, mean: of the first head; dimensions that do not exist are zero
    __device__ __forceinline__ void load_consts(float * consts, int tile, const float * half, const float * scale, const float * mean) const {
        if (threadIdx.x < COLS) {
            const int unit = tile*UNITS + threadIdx.x/16;
            const int head = per_head(unit);
            const int in_head = unit - head*per_head.n;
            float * to = consts + threadIdx.x/16*PALU_CONST_STRIDE + threadIdx.x%16/4*12 + threadIdx.x%2*2 + threadIdx.x/2%2;
            if (unit < n_unit && in_head*8 + (int) threadIdx.x%16/2 < pairs) {
                const int dim = head*(2*pairs) + dims[in_head*16 + threadIdx.x%16];
                if (rank_pad) {
                    mma::copy4(mma::smem(to), half + dim);
                    mma::copy4(mma::smem(to + 4), scale + dim);
                } else {
                    to[0] = 0.0f;
                    to[4] = 0.0f;
                }
                mma::copy4(mma::smem(to + 8), mean + dim);
            } else {
                to[0] = 0.0f;
                to[4] = 0.0f;
                to[8] = 0.0f;
            }
        }
    }
};

// A warp's part of the product: 16*MF cells and 64 columns.
template <int MF>
struct DecoderProduct {
    uint32_t a_at;   // of this lane in the codes of the warp's cells
    uint32_t b_at;   // of this lane in the first stage
    uint32_t b_chunk[2];

    __device__ __forceinline__ DecoderProduct(const uint8_t * codes, int a_stride, const uint8_t * stages, int cell, int col) {
        const int lane = threadIdx.x & 31;
        const int b_row = lane%8 + lane/16*8;
        a_at = mma::smem(codes) + (cell + lane%16)*a_stride + lane/16*16;
        b_at = mma::smem(stages) + (col + b_row)*64;
        b_chunk[0] = ((lane >> 3 & 1) ^ (b_row >> 1 & 3))*16;
        b_chunk[1] = ((2 + (lane >> 3 & 1)) ^ (b_row >> 1 & 3))*16;
    }
    // 64 channels, or the last 32
    __device__ __forceinline__ void add(int (&acc)[MF][8][4], int a_stride, uint32_t a_k, uint32_t stage, bool both) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == 0 || both) {
                uint32_t a[MF][4];
#pragma unroll
                for (int i = 0; i < MF; i++) {
                    mma::load_4(a[i], a_at + a_k + i*16*a_stride + half*32);
                }
#pragma unroll
                for (int f = 0; f < 8; f += 2) {
                    uint32_t b[4];
                    mma::load_4(b, b_at + stage + f*(8*64) + b_chunk[half]);
#pragma unroll
                    for (int i = 0; i < MF; i++) {
                        mma::s8(acc[i][f], a[i], b[0], b[1]);
                        mma::s8(acc[i][f + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }
    }
    static __device__ __forceinline__ void next_plane(int (&acc)[MF][8][4]) {
#pragma unroll
        for (int i = 0; i < MF*32; i++) {
            acc[i/32][i/4%8][i%4] *= 256;
        }
    }
};

// Two pairs of one row, rebuilt from their integers x (first and second dimension of one pair) and y, and turned.
template <bool TURN>
static __device__ __forceinline__ void rebuild_pairs(float (&x)[2], float (&y)[2], const float4 & hs, const float4 & ds, const float4 & mean, float scale, const Trig & turner, uint2 turn) {
    const float x0 = fmaf(scale, fmaf(x[0], ds.x, hs.x), mean.x);
    const float x1 = fmaf(scale, fmaf(x[1], ds.z, hs.z), mean.z);
    const float y0 = fmaf(scale, fmaf(y[0], ds.y, hs.y), mean.y);
    const float y1 = fmaf(scale, fmaf(y[1], ds.w, hs.w), mean.w);
    if (TURN) {
        const float cx = turner.cosine(turn.x), sx = turner.sine(turn.x);
        const float cy = turner.cosine(turn.y), sy = turner.sine(turn.y);
        x[0] = x0*cx - x1*sx;
        x[1] = x0*sx + x1*cx;
        y[0] = y0*cy - y1*sy;
        y[1] = y0*sy + y1*cy;
    } else {
        x[0] = x0;
        x[1] = x1;
        y[0] = y0;
        y[1] = y1;
    }
}
