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

// MF: fragments of 16 cells per warp, WM: warps across the cells
template <int MF, int WM, bool KEYS>
static __device__ __forceinline__ void rebuild(const palu_cuda_rebuild & p) {
    constexpr int M = 16*MF*WM;
    constexpr int WN = 8/WM;
    constexpr int N = 64*WN;
    constexpr int UNITS = N/16;      // of a tile
    constexpr int CONST_STRIDE = 52; // floats per unit: 4 times 2 pairs, and 4 so that the units' banks differ
    enum { ANYWHERE, JOINED, APART };

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
    const Divisor uph((pairs + 7)/8); // units per head
    const int n_unit = s.group_size*uph.n;
    const int stream = blockIdx.z;
    const int cell0 = blockIdx.x*M;
    const int last_cell = p.n_kv - 1;
    const int n_tile = (n_unit + UNITS - 1)/UNITS;
    const int tile_begin = (int)((int64_t) n_tile*(blockIdx.y%p.n_split)/p.n_split);
    const int tile_end = (int)((int64_t) n_tile*(blockIdx.y%p.n_split + 1)/p.n_split);

    const int a_stride = p.slab + 16;
    const int trig_stride = uph.n*8 + 2;
    uint8_t  * codes = smem_rebuild;                                     // [M][a_stride]
    uint8_t  * stage = codes + M*a_stride;                               // [stages][N][64]
    uint32_t * trig  = (uint32_t *)(stage + p.stages*N*64);              // [M][trig_stride]
    float    * consts = (float *)(trig + (KEYS ? M*trig_stride : 0));    // [2][UNITS][CONST_STRIDE]
    float    * scale = consts + 2*UNITS*CONST_STRIDE;                    // [M]
    uint32_t * place = (uint32_t *)(scale + M);                          // [uph]: both dimensions of a unit's first pair, and how the others follow
    uint16_t * dims  = (uint16_t *)(place + uph.n);                      // [uph][16] dimensions of a head in the order of the columns

    const uint8_t * rows = p.rows + stream*p.rows_nb_stream;
    const uint32_t * segs = s.segs + g.seg0;
    const int8_t * dec = s.dec + g.dec0;
    const float * dec_half = s.dec_half + (int64_t) gi*s.group_size*hd;
    const float * dec_scale = s.dec_scale + (int64_t) gi*s.group_size*hd;
    const float * mean = s.mean + (int64_t) gi*s.group_size*hd;

    for (int i = tid; i < (int) uph.n*16; i += 256) {
        const int pair = min(i/2, pairs - 1);
        dims[i] = KEYS ? p.rope.pair_dim[2*pair + i%2] : 2*pair + i%2;
    }
    __syncthreads();
    if (tid < (int) uph.n) {
        const uint16_t * d = dims + tid*16;
        bool joined = d[0]%8 == 0;
        bool apart = d[0]%8 == 0 && d[1]%8 == 0;
        for (int i = 0; i < 8; i++) {
            joined &= d[2*i] == d[0] + 2*i && d[2*i + 1] == d[0] + 2*i + 1;
            apart &= d[2*i] == d[0] + i && d[2*i + 1] == d[1] + i;
        }
        const bool whole = tid*8 + 8 <= pairs && hd%8 == 0;
        place[tid] = d[0] | d[1] << 14 | (whole && joined ? JOINED : whole && apart ? APART : ANYWHERE) << 28;
    }

    // the decoder's way through shared memory: this thread copies 16 bytes of every 64th row
    uint32_t src[N/64] = {};
    const int load_chunk = tid%4;
    const int load_column = tid/32*2 + tid/4%2; // of a unit
    const uint32_t load_at = mma::smem(stage) + (tid/4)*64 + (load_chunk ^ (tid >> 3 & 3))*16;
    const int stages = g.rank_pad > 64 || s.planes > 1 ? p.stages : 2; // at least two loads per tile, or none ahead of the next
    const uint32_t stage_end = stages*N*64;
    const uint32_t next_plane = s.group_size*hd*g.rank_pad;
    int load_tile = tile_begin;
    int load_plane = 0;
    int load_k = 0;
    uint32_t load_stage = 0;
    auto load = [&] {
        if (load_tile < tile_end) {
            if (load_plane + load_k == 0) {
#pragma unroll
                for (int j = 0; j < N/64; j++) {
                    const int unit = min(load_tile*UNITS + 4*j + tid/8%4, n_unit - 1);
                    const int head = uph(unit);
                    src[j] = (head*hd + dims[(unit - head*uph.n)*16 + load_column])*g.rank_pad + load_chunk*16;
                }
            }
            if (load_k + load_chunk*16 < g.rank_pad) {
#pragma unroll
                for (int j = 0; j < N/64; j++) {
                    mma::copy16(load_at + load_stage + j*(64*64), dec + (src[j] + load_k));
                }
            }
            load_k += 64;
            if (load_k >= g.rank_pad) {
                load_k = 0;
#pragma unroll
                for (int j = 0; j < N/64; j++) {
                    src[j] += next_plane;
                }
                if (++load_plane == s.planes) {
                    load_plane = 0;
                    load_tile++;
                }
            }
        }
        load_stage = load_stage + N*64 == stage_end ? 0 : load_stage + N*64;
        mma::copy_commit();
    };
    // what the epilogue needs of each dimension of a tile: per two pairs half, scale, mean of the first dimensions and of the second
    auto load_consts = [&](int tile) {
        const int unit = min(tile*UNITS + tid/16, n_unit - 1);
        if (tid < UNITS*16 && tile < tile_end) {
            const int head = uph(unit);
            const int dim = head*hd + dims[(unit - head*uph.n)*16 + tid%16];
            float * to = consts + (tile & 1)*UNITS*CONST_STRIDE + tid/16*CONST_STRIDE + tid%16/4*12 + tid%2*2 + tid/2%2;
            if (g.rank) {
                mma::copy4(mma::smem(to), dec_half + dim);
                mma::copy4(mma::smem(to + 4), dec_scale + dim);
            } else {
                to[0] = 0.0f;
                to[4] = 0.0f;
            }
            mma::copy4(mma::smem(to + 8), mean + dim);
        }
    };
    // channels [c0, c0 + slab) of the tile's cells
    auto unpack = [&](int c0) {
        const int n_seg = min(p.slab, g.rank_pad - c0)/8;
        const Divisor by(n_seg);
        const int n = M*n_seg;
        constexpr int U = 4;
        for (int i0 = tid; i0 < n; i0 += 256*U) {
            mma::Segment seg[U];
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int i = min(i0 + 256*u, n - 1);
                const int t = by(i);
                // channels that pad the rank have weights of zero
                const uint32_t which = segs[min(c0/8 + i - t*n_seg, g.rank/8 - 1)];
                seg[u] = mma::Segment(rows + (int64_t) min(cell0 + t, last_cell)*s.row_bytes, which);
            }
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int i = i0 + 256*u;
                if (i < n) {
                    const int t = by(i);
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

    if (g.rank) {
        load_consts(tile_begin);
        for (int i = 0; i < stages - 1; i++) {
            load();
        }
    }
    for (int t = tid; t < M; t += 256) {
        const uint8_t * row = rows + (int64_t) min(cell0 + t, last_cell)*s.row_bytes + g.row_offset;
        scale[t] = g.rank ? __half2float(__ushort_as_half(row[0] | row[1] << 8)) : 0.0f;
    }
    const Trig turner(KEYS ? p.rope.mag : nullptr, KEYS ? pairs : 0);
    if (KEYS) {
        const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
        for (int pair = lane; pair < pairs; pair += 32) {
            const uint64_t turn = p.rope.turn[pair];
            const float mag = p.rope.mag[pair];
#pragma unroll 4
            for (int t = warp; t < M; t += 8) {
                float sn, cs;
                sincos_turn((uint64_t)(int64_t) pos[min(cell0 + t, last_cell)]*turn, sn, cs);
                trig[t*trig_stride + pair] = turner.pack(cs, sn, mag);
            }
        }
    }
    if (g.rank && p.slab >= g.rank_pad) {
        unpack(0);
    }

    const uint32_t a_at = mma::smem(codes) + (wm*MF*16 + lane%16)*a_stride + lane/16*16;
    const int b_row = lane%8 + lane/16*8;
    const uint32_t b_at = mma::smem(stage) + wn*(64*64) + b_row*64;
    const uint32_t b_chunk[2] = { ((lane >> 3 & 1) ^ (b_row >> 1 & 3))*16u, ((2 + (lane >> 3 & 1)) ^ (b_row >> 1 & 3))*16u };
    uint32_t b_stage = 0;

    for (int tile = tile_begin; tile < tile_end; tile++) {
        int acc[MF][8][4] = {};
        if (g.rank == 0) {
            load_consts(tile);
            mma::copy_commit();
            mma::copy_wait<0>();
            __syncthreads();
        }
        for (int plane = 0; plane < s.planes && g.rank > 0; plane++) {
            if (plane) {
#pragma unroll
                for (int i = 0; i < MF*32; i++) {
                    acc[i/32][i/4%8][i%4] *= 256;
                }
            }
            uint32_t a_k = a_at;
            int slab_left = 0;
            for (int k = 0; k < g.rank_pad; k += 64) {
                if (stages == 2) {
                    mma::copy_wait<0>();
                } else {
                    mma::copy_wait<1>();
                }
                __syncthreads();
                if (plane + k == 0) {
                    load_consts(tile + 1); // with what the next load() commits, which is there before the next tile's products
                }
                load();
                if (p.slab < g.rank_pad) {
                    if (slab_left == 0) {
                        unpack(k);
                        __syncthreads();
                        a_k = a_at;
                        slab_left = p.slab;
                    }
                    slab_left -= 64;
                }
                const uint32_t b_k = b_at + b_stage;
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
                a_k += 64;
                b_stage = b_stage + N*64 == stage_end ? 0 : b_stage + N*64;
            }
        }

        const int unit = tile*UNITS + wn*4 + lane%4;
        if (unit < n_unit) {
            const int head = uph(unit);
            const int in_head = unit - head*uph.n;
            const uint32_t where = place[in_head];
            const int dim0 = where & 0x3fff;
            const int dim1 = where >> 14 & 0x3fff;
            const int how = where >> 28;
            const uint32_t select[2] = { how == APART ? 0x5410u : 0x3210u, how == APART ? 0x7632u : 0x7654u };
            const float * c = consts + (tile & 1)*UNITS*CONST_STRIDE + (wn*4 + lane%4)*CONST_STRIDE;
            const int row0 = wm*MF*16 + lane/4;
            const uint32_t * turns = trig + row0*trig_stride + in_head*8;
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
                const float4 hs = make_float4(half.x*ds.x, half.y*ds.y, half.z*ds.z, half.w*ds.w);
#pragma unroll
                for (int i = 0; i < MF*2; i++) {
                    int (&lo)[4] = acc[i/2][f];
                    int (&hi)[4] = acc[i/2][f + 1];
                    const int e = i%2*2;
                    float x0 = fmaf(row_scale[i], fmaf((float) lo[e],     ds.x, hs.x), mean.x);
                    float x1 = fmaf(row_scale[i], fmaf((float) lo[e + 1], ds.z, hs.z), mean.z);
                    float y0 = fmaf(row_scale[i], fmaf((float) hi[e],     ds.y, hs.y), mean.y);
                    float y1 = fmaf(row_scale[i], fmaf((float) hi[e + 1], ds.w, hs.w), mean.w);
                    if (KEYS) {
                        const uint2 v = *(const uint2 *)(turns + 8*i*trig_stride + f);
                        const float cx = turner.cosine(v.x), sx = turner.sine(v.x);
                        const float cy = turner.cosine(v.y), sy = turner.sine(v.y);
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
            uint16_t * out = p.out + (((int64_t) stream*p.n_kv + cell0 + row0)*s.n_head_kv + gi*s.group_size + head)*hd;
            const int64_t step8 = (int64_t) 8*s.n_head_kv*hd;
#pragma unroll
            for (int i = 0; i < MF*2; i++) {
                if (cell0 + row0 + 8*i <= last_cell) {
                    const int e = i%2*2;
                    uint32_t w[8];
#pragma unroll
                    for (int f = 0; f < 4; f++) {
                        w[2*f]     = (uint32_t) acc[i/2][2*f][e];
                        w[2*f + 1] = (uint32_t) acc[i/2][2*f][e + 1];
                    }
                    if (how == APART) {
                        *(uint4 *)(out + dim0) = make_uint4(w[0], w[2], w[4], w[6]);
                        *(uint4 *)(out + dim1) = make_uint4(w[1], w[3], w[5], w[7]);
                    } else if (how == JOINED) {
                        *(uint4 *)(out + dim0) = make_uint4(w[0], w[1], w[2], w[3]);
                        *(uint4 *)(out + dim0 + 8) = make_uint4(w[4], w[5], w[6], w[7]);
                    } else {
#pragma unroll
                        for (int f = 0; f < 8; f++) {
                            if (in_head*8 + f < pairs) {
                                out[dims[in_head*16 + 2*f]] = (uint16_t) w[f];
                                out[dims[in_head*16 + 2*f + 1]] = (uint16_t)(w[f] >> 16);
                            }
                        }
                    }
                }
                out += step8;
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
