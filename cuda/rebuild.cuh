// rebuild.cuh - rows back to f16 keys and values, with the warps' integer matrix products (m16n8k32 on sm_80 and later).
//
// A block unpacks a tile of cells once and multiplies it with the group's whole decoder (or its share of it), which comes
// from the L2 cache through a few stages of shared memory: 64 channels of N dimensions each.
//
// The columns of a product are the two dimensions of RoPE pairs, in such an order that a thread ends up with eight
// consecutive pairs of a head, a *unit*: column 8*f + 2*t + e of a warp's 64 is dimension e of pair f of the t-th of its four
// units. So it rotates in registers, and what it holds of a row is 16 or 32 consecutive bytes for NEOX, NORM and values.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "palu_cuda.h"

// MF: fragments of 16 cells per warp, WM: warps across the cells
template <int MF, int WM, bool KEYS>
static __device__ __forceinline__ void rebuild(const palu_cuda_rebuild & p) {
    constexpr int M = 16*MF*WM;
    constexpr int WN = 8/WM;
    constexpr int N = 64*WN;
    constexpr int UNITS = N/16;      // of a tile
    constexpr int CONST_STRIDE = 52; // floats per unit: 4 times 2 pairs, and 4 so that the units' banks differ
    constexpr float TRIG = 32767.0f;

    extern __shared__ __align__(16) uint8_t smem_rebuild[];
    const int tid = threadIdx.x;
    const int lane = tid & 31;
    const int warp = tid >> 5;
    const int wm = warp%WM;
    const int wn = warp/WM;
    const palu_cuda_side & s = p.side;
    const int gi = blockIdx.y/p.n_split;
    const palu_cuda_group g = s.groups[gi];
    const int hd = s.head_dim;
    const int pairs = hd/2;
    const int uph = (pairs + 7)/8;   // units per head
    const int n_unit = s.group_size*uph;
    const int stream = blockIdx.z;
    const int cell0 = blockIdx.x*M;
    const int n_tile = (n_unit + UNITS - 1)/UNITS;
    const int tile_begin = (int)((int64_t) n_tile*(blockIdx.y%p.n_split)/p.n_split);
    const int tile_end = (int)((int64_t) n_tile*(blockIdx.y%p.n_split + 1)/p.n_split);

    const int a_stride = p.slab + 16;
    const int trig_stride = uph*8 + 2;
    uint8_t  * codes = smem_rebuild;                                             // [M][a_stride]
    uint8_t  * stage = codes + M*a_stride;                               // [stages][N][64]
    uint32_t * trig  = (uint32_t *)(stage + p.stages*N*64);              // [M][trig_stride]: cos, sin in 16 bits each
    float    * consts = (float *)(trig + (KEYS ? M*trig_stride : 0));    // [2][UNITS][CONST_STRIDE]
    float    * scale = consts + 2*UNITS*CONST_STRIDE;                    // [M]

    const uint8_t * rows = p.rows + stream*p.rows_nb_stream;
    const uint32_t * segs = s.segs + g.seg0;
    const int8_t * dec = s.dec + g.dec0;
    const int64_t plane_bytes = (int64_t) s.group_size*hd*g.rank_pad;
    const int k_chunks = (g.rank_pad + 63)/64;
    const int steps = s.planes*k_chunks; // per tile

    // the decoder's way through shared memory: this thread copies 16 bytes of every 64th row
    const int8_t * src[N/64] = {};
    const int load_chunk = tid%4;
    const uint32_t load_at = mma::smem(stage) + (tid/4)*64 + (load_chunk ^ (tid >> 3 & 3))*16;
    int load_tile = tile_begin;
    int load_step = 0;
    int load_stage = 0;
    auto load = [&] {
        if (load_tile < tile_end && steps > 0) {
            if (load_step == 0) {
                const int n = tid/4;
#pragma unroll
                for (int j = 0; j < N/64; j++) {
                    const int unit = load_tile*UNITS + 4*j + n%8/2;
                    const int pair = unit%uph*8 + n/8;
                    int row = 0;
                    if (unit < n_unit && pair < pairs) {
                        row = unit/uph*hd + (KEYS ? p.rope.pair_dim[2*pair + n%2] : 2*pair + n%2);
                    }
                    src[j] = dec + (int64_t) row*g.rank_pad + load_chunk*16;
                }
            }
            const int plane = load_step >= k_chunks;
            const int k = (load_step - plane*k_chunks)*64;
            if (k + load_chunk*16 < g.rank_pad) {
#pragma unroll
                for (int j = 0; j < N/64; j++) {
                    mma::copy16(load_at + load_stage*(N*64) + j*(64*64), src[j] + plane*plane_bytes + k);
                }
            }
            if (++load_step == steps) {
                load_step = 0;
                load_tile++;
            }
        }
        load_stage = load_stage + 1 == p.stages ? 0 : load_stage + 1;
        mma::copy_commit();
    };
    // channels [c0, c0 + slab) of the tile's cells
    auto unpack = [&](int c0) {
        const int n_seg = min(p.slab, g.rank_pad - c0)/8;
        const int s0 = c0/8;
        const uint32_t magic = n_seg ? 0xffffffffu/n_seg + 1 : 0; // i/n_seg for i below 2^16, n_seg at most 2^9
        const int n = M*n_seg;
        constexpr int U = 4;
        for (int i0 = tid; i0 < n; i0 += 256*U) {
            mma::Segment seg[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int i = min(i0 + 256*u, n - 1);
                const int t = n_seg == 1 ? i : __umulhi(i, magic);
                const int sg = s0 + i - t*n_seg;
                // channels that pad the rank have weights of zero
                const uint32_t which = segs[min(sg, g.rank/8 - 1)];
                seg[u] = mma::Segment(rows + (int64_t) min(cell0 + t, p.n_kv - 1)*s.row_bytes, which);
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int i = i0 + 256*u;
                if (i < n) {
                    const int t = n_seg == 1 ? i : __umulhi(i, magic);
                    const int sg = i - t*n_seg;
                    const uint32_t lo = seg[u].spread_signed(seg[u].lo);
                    const uint32_t hi = seg[u].spread_signed(seg[u].hi);
                    if (KEYS) { // as palu_cuda_key_channel() says
                        uint8_t * to = codes + t*a_stride + sg/4*32 + sg%4*4;
                        *(uint32_t *) to = lo;
                        *(uint32_t *)(to + 16) = hi;
                    } else {
                        *(uint2 *)(codes + t*a_stride + sg*8) = make_uint2(lo, hi);
                    }
                }
            }
        }
    };

    for (int i = 0; i < p.stages - 1; i++) {
        load();
    }
    for (int t = tid; t < M; t += 256) {
        const uint8_t * row = rows + (int64_t) min(cell0 + t, p.n_kv - 1)*s.row_bytes + g.row_offset;
        scale[t] = g.rank ? __half2float(__ushort_as_half(row[0] | row[1] << 8)) : 0.0f;
    }
    if (KEYS) {
        for (int i = tid; i < M*pairs; i += 256) {
            const int t = i/pairs;
            const int pair = i - t*pairs;
            const int64_t pos = p.pos[(int64_t) stream*p.n_kv + min(cell0 + t, p.n_kv - 1)];
            float sn, cs;
            sincos_turn((uint64_t) pos*p.rope.turn[pair], sn, cs);
            trig[t*trig_stride + pair] = (uint32_t)(__float2int_rn(cs*TRIG) + 32768) | (uint32_t)(__float2int_rn(sn*TRIG) + 32768) << 16;
        }
    }
    if (g.rank && p.slab >= g.rank_pad) {
        unpack(0);
    }

    const uint32_t a_at = mma::smem(codes) + (wm*MF*16 + lane%16)*a_stride + lane/16*16;
    const int b_row = lane%8 + lane/16*8;
    const uint32_t b_at = mma::smem(stage) + wn*(64*64) + b_row*64;
    const uint32_t b_chunk[2] = { ((lane >> 3 & 1) ^ (b_row >> 1 & 3))*16u, ((2 + (lane >> 3 & 1)) ^ (b_row >> 1 & 3))*16u };
    int stage_i = 0;

    for (int tile = tile_begin; tile < tile_end; tile++) {
        // what the epilogue needs of each dimension; the other half may still be read
        float * tile_consts = consts + (tile & 1)*UNITS*CONST_STRIDE;
        for (int i = tid; i < UNITS*16; i += 256) {
            const int unit = tile*UNITS + i/16;
            const int pair = unit%uph*8 + i%16/2;
            const int e = i & 1;
            if (unit < n_unit && pair < pairs) {
                const int64_t dim = (int64_t)(gi*s.group_size + unit/uph)*hd + (KEYS ? p.rope.pair_dim[2*pair + e] : 2*pair + e);
                const float mag = KEYS ? p.rope.mag[pair]/TRIG : 1.0f;
                // per two pairs: half, scale, mean of the first dimensions and of the second
                float * to = tile_consts + i/16*CONST_STRIDE + i%16/4*12 + e*2 + (i/2 & 1);
                to[0] = g.rank ? s.dec_half[dim] : 0.0f;
                to[4] = g.rank ? s.dec_scale[dim]*mag : 0.0f;
                to[8] = s.mean[dim]*mag;
            }
        }
        int acc[MF][8][4] = {};
        if (steps == 0) {
            __syncthreads();
        }
        for (int step = 0; step < steps; step++) {
            const int plane = step >= k_chunks;
            const int k = (step - plane*k_chunks)*64;
            if (p.stages == 2) {
                mma::copy_wait<0>();
            } else {
                mma::copy_wait<1>();
            }
            __syncthreads();
            load();
            if (p.slab < g.rank_pad && k%p.slab == 0) {
                unpack(k);
                __syncthreads();
            }
            if (plane && k == 0) {
#pragma unroll
                for (int i = 0; i < MF*32; i++) {
                    acc[i/32][i/4%8][i%4] *= 256;
                }
            }
            const uint32_t a_k = a_at + k%p.slab;
            const uint32_t b_k = b_at + stage_i*(N*64);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == 0 || k + 32 < g.rank_pad) {
                    uint32_t a[MF][4];
#pragma unroll
                    for (int i = 0; i < MF; i++) {
                        mma::load_4(a[i], a_k + i*16*a_stride + half*32);
                    }
#pragma unroll
                    for (int f = 0; f < 8; f += 2) {
                        uint32_t b[4];
                        mma::load_4(b, b_k + f*(8*64) + b_chunk[half]);
#pragma unroll
                        for (int i = 0; i < MF; i++) {
                            mma::s8(acc[i][f], a[i], b[0], b[1]);
                            mma::s8(acc[i][f + 1], a[i], b[2], b[3]);
                        }
                    }
                }
            }
            stage_i = stage_i + 1 == p.stages ? 0 : stage_i + 1;
        }

        const int unit = tile*UNITS + wn*4 + lane%4;
        if (unit < n_unit) {
            const int pair0 = unit%uph*8;
            const float * c = tile_consts + (wn*4 + lane%4)*CONST_STRIDE;
            // where the eight pairs stand: side by side, half a head apart, or anywhere
            int dim0 = 2*pair0;
            int dim1 = dim0 + 1;
            bool joined = true;
            bool apart = false;
            if (KEYS) {
                dim0 = p.rope.pair_dim[2*pair0];
                dim1 = p.rope.pair_dim[2*pair0 + 1];
                joined = dim0%8 == 0 && dim1 == dim0 + 1;
                apart = dim0%8 == 0 && dim1%8 == 0;
                for (int i = 1; i < 8 && pair0 + i < pairs; i++) {
                    const int a = p.rope.pair_dim[2*(pair0 + i)];
                    const int b = p.rope.pair_dim[2*(pair0 + i) + 1];
                    joined &= a == dim0 + 2*i && b == a + 1;
                    apart &= a == dim0 + i && b == dim1 + i;
                }
            }
            const bool whole = pair0 + 8 <= pairs && hd%8 == 0;
            joined &= whole;
            apart &= whole;
            const uint32_t select[2] = { apart ? 0x5410u : 0x3210u, apart ? 0x7632u : 0x7654u };
            const int row0 = wm*MF*16 + lane/4;
            float row_scale[MF*2];
#pragma unroll
            for (int i = 0; i < MF*2; i++) {
                row_scale[i] = scale[row0 + 8*i];
            }
#pragma unroll
            for (int f = 0; f < 8; f += 2) {
                const float4 half = *(const float4 *)(c + f*6);
                const float4 ds = *(const float4 *)(c + f*6 + 4);
                const float4 mean = *(const float4 *)(c + f*6 + 8);
#pragma unroll
                for (int i = 0; i < MF*2; i++) {
                    int (&lo)[4] = acc[i/2][f];
                    int (&hi)[4] = acc[i/2][f + 1];
                    const int e = i%2*2;
                    float x0 = fmaf((float) lo[e]     + half.x, row_scale[i]*ds.x, mean.x);
                    float x1 = fmaf((float) lo[e + 1] + half.z, row_scale[i]*ds.z, mean.z);
                    float y0 = fmaf((float) hi[e]     + half.y, row_scale[i]*ds.y, mean.y);
                    float y1 = fmaf((float) hi[e + 1] + half.w, row_scale[i]*ds.w, mean.w);
                    if (KEYS) {
                        const uint2 cs = *(const uint2 *)(trig + (row0 + 8*i)*trig_stride + pair0 + f);
                        // 2^23 + 32768 + v as a float, less the former two
                        auto low  = [](uint32_t v) { return __uint_as_float(__byte_perm(v, 0x4b000000u, 0x7610)) - 8421376.0f; };
                        auto high = [](uint32_t v) { return __uint_as_float(__byte_perm(v, 0x4b000000u, 0x7632)) - 8421376.0f; };
                        const float cx = low(cs.x), sx = high(cs.x), cy = low(cs.y), sy = high(cs.y);
                        const float u0 = x0*cx - x1*sx;
                        x1 = x0*sx + x1*cx;
                        x0 = u0;
                        const float v0 = y0*cy - y1*sy;
                        y1 = y0*sy + y1*cy;
                        y0 = v0;
                    }
                    const __half2 a = __floats2half2_rn(x0, x1);
                    const __half2 b = __floats2half2_rn(y0, y1);
                    const uint32_t ua = *(const uint32_t *) &a;
                    const uint32_t ub = *(const uint32_t *) &b;
                    lo[e]     = (int) __byte_perm(ua, ub, select[0]);
                    lo[e + 1] = (int) __byte_perm(ua, ub, select[1]);
                }
            }
            const int head = gi*s.group_size + unit/uph;
            uint16_t * out = p.out + (((int64_t) stream*p.n_kv + cell0 + row0)*s.n_head_kv + head)*hd;
            const int64_t step8 = (int64_t) 8*s.n_head_kv*hd;
#pragma unroll
            for (int i = 0; i < MF*2; i++) {
                if (cell0 + row0 + 8*i < p.n_kv) {
                    const int e = i%2*2;
                    uint32_t w[8];
#pragma unroll
                    for (int f = 0; f < 4; f++) {
                        w[2*f]     = (uint32_t) acc[i/2][2*f][e];
                        w[2*f + 1] = (uint32_t) acc[i/2][2*f][e + 1];
                    }
                    uint16_t * to = out + i*step8;
                    if (apart) {
                        *(uint4 *)(to + dim0) = make_uint4(w[0], w[2], w[4], w[6]);
                        *(uint4 *)(to + dim1) = make_uint4(w[1], w[3], w[5], w[7]);
                    } else if (joined) {
                        *(uint4 *)(to + dim0) = make_uint4(w[0], w[1], w[2], w[3]);
                        *(uint4 *)(to + dim0 + 8) = make_uint4(w[4], w[5], w[6], w[7]);
                    } else {
#pragma unroll
                        for (int f = 0; f < 8; f++) {
                            if (pair0 + f < pairs) {
                                to[KEYS ? p.rope.pair_dim[2*(pair0 + f)] : 2*(pair0 + f)] = (uint16_t) w[f];
                                to[KEYS ? p.rope.pair_dim[2*(pair0 + f) + 1] : 2*(pair0 + f) + 1] = (uint16_t)(w[f] >> 16);
                            }
                        }
                    }
                }
            }
        }
    }
    mma::copy_wait<0>();
}

#define PALU_REBUILD(M, MF, WM) \
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_keys_##M(const __grid_constant__ palu_cuda_rebuild p) { rebuild<MF, WM, true>(p); } \
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_values_##M(const __grid_constant__ palu_cuda_rebuild p) { rebuild<MF, WM, false>(p); }
PALU_REBUILD(128, 2, 4)
PALU_REBUILD(64, 2, 2)
PALU_REBUILD(32, 1, 2)
#undef PALU_REBUILD
