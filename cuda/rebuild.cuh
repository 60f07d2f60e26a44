// rebuild.cuh - rows back to f16 keys and values, with integer matrix products of warps (m16n8k32 on sm_80 and later) or, on
// sm_90a, of four warps (m64n128k32).
//
// A block unpacks a tile of cells once and multiplies it with the group's whole decoder (or its share of it), which comes
// from the L2 cache through a few stages of shared memory: 64 channels of N dimensions each.
//
// A thread rotates its units in registers (see decoder.cuh), and what it holds of a row is 16 or 32 consecutive bytes for
// NEOX, NORM and values.
#pragma once

#include "decoder.cuh"

// MF: fragments of 16 cells per warp, WM: warps across the cells, NH: times 64 columns per warp. With 2 of the latter, products
// of four warps.
template <int MF, int WM, int NH, bool KEYS>
static __device__ __forceinline__ void rebuild(const palu_cuda_rebuild & p) {
    grid_next();
    grid_wait();
    constexpr int M = 16*MF*WM;
    constexpr int WN = 8/WM;
    constexpr int N = 64*NH*WN;
    constexpr int UNITS = N/16;      // of a tile
    enum { ANYWHERE, JOINED, APART };

    extern __shared__ __align__(1024) uint8_t smem_rebuild[];
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
    float    * consts = (float *)(trig + (KEYS ? M*trig_stride : 0));    // [2][UNITS][PALU_CONST_STRIDE]
    float    * scale = consts + 2*UNITS*PALU_CONST_STRIDE;                    // [M]
    uint32_t * place = (uint32_t *)(scale + M);                          // [uph]: both dimensions of a unit's first pair, and how the others follow
    uint16_t * dims  = (uint16_t *)(place + uph.n);                      // [uph][16] dimensions of a head in the order of the columns

    const uint8_t * rows = p.rows + stream*p.rows_nb_stream;
    const uint32_t * segs = s.segs + g.seg0;
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

    const int stages = g.rank_pad > 64 || s.planes > 1 ? p.stages : 2; // at least two loads per tile, or none ahead of the next
    DecoderStream<N, 256> decoder(s, g, s.dec + g.dec0, dims, uph, n_unit, stage, stages);
    auto load = [&] {
        decoder.load(tile_end);
        mma::copy_commit();
    };
    auto load_consts = [&](int tile) {
        if (tile < tile_end) {
            decoder.load_consts(consts + (tile & 1)*UNITS*PALU_CONST_STRIDE, tile, dec_half, dec_scale, mean);
        }
    };
    // channels [c0, c0 + slab) of the tile's cells
    auto unpack = [&](int c0) {
        unpack_codes<KEYS, true, 256>(codes, a_stride, M, c0/8, min(p.slab, g.rank_pad - c0)/8, g.rank/8, segs,
            [&](int t) { return rows + (int64_t) min(cell0 + t, last_cell)*s.row_bytes; });
    };

    if (g.rank) {
        decoder.start(tile_begin);
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

    const DecoderProduct<MF*NH> product(codes, a_stride, stage, wm*MF*16, wn*64*NH);
    uint32_t b_stage = 0;

    for (int tile = tile_begin; tile < tile_end; tile++) {
        int acc[MF*NH][8][4] = {};
        if (g.rank == 0) {
            load_consts(tile);
            mma::copy_commit();
            mma::copy_wait<0>();
            __syncthreads();
        }
        for (int plane = 0; plane < s.planes && g.rank > 0; plane++) {
            if (plane) {
                product.next_plane(acc);
            }
            uint32_t a_k = 0;
            int slab_left = 0;
            for (int k = 0; k < g.rank_pad; k += 64) {
                if (stages == 2) {
                    mma::copy_wait<0>();
                } else {
                    mma::copy_wait<1>();
                }
#ifdef PALU_SM90A
                if (NH == 2) {
                    mma::group_see();
                }
#endif
                __syncthreads();
                if (plane + k == 0) {
                    load_consts(tile + 1); // with what the next load() commits, which is there before the next tile's products
                }
                // ahead of products of four warps if the load is needed right after them, else while they run
                const bool first = NH == 1 || stages == 2;
                if (first) {
                    load();
                }
                if (p.slab < g.rank_pad) {
                    if (slab_left == 0) {
                        unpack(k);
                        __syncthreads();
                        a_k = 0;
                        slab_left = p.slab;
                    }
                    slab_left -= 64;
                }
                if constexpr (NH == 2) {
#ifdef PALU_SM90A
                    uint32_t a[2][4];
                    const bool both = k + 32 < g.rank_pad;
                    mma::load_4(a[0], product.a_at + a_k);
                    if (both) {
                        mma::load_4(a[1], product.a_at + a_k + 32);
                    }
                    const uint32_t b = mma::smem(stage) + b_stage + wn*(NH*64*64);
                    mma::group_fence();
                    mma::group_s8(acc, a[0], mma::group_matrix(b));
                    if (both) {
                        mma::group_s8(acc, a[1], mma::group_matrix(b + 32));
                    }
                    mma::group_commit();
                    if (!first) {
                        load();
                    }
                    mma::group_wait();
#endif
                } else {
                    product.add(acc, a_stride, a_k, b_stage, k + 32 < g.rank_pad);
                }
                a_k += 64;
                b_stage = b_stage + N*64 == decoder.stage_end ? 0 : b_stage + N*64;
            }
        }

#pragma unroll
        for (int nh = 0; nh < NH; nh++) {
            const int unit_in_tile = (wn*NH + nh)*4 + lane%4;
            const int unit = tile*UNITS + unit_in_tile;
            if (unit >= n_unit) {
                continue;
            }
            const int head = uph(unit);
            const int in_head = unit - head*uph.n;
            const uint32_t where = place[in_head];
            const int dim0 = where & 0x3fff;
            const int dim1 = where >> 14 & 0x3fff;
            const int how = where >> 28;
            const uint32_t select[2] = { how == APART ? 0x5410u : 0x3210u, how == APART ? 0x7632u : 0x7654u };
            const float * c = consts + ((tile & 1)*UNITS + unit_in_tile)*PALU_CONST_STRIDE;
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
                    int (&lo)[4] = acc[nh*MF + i/2][f];
                    int (&hi)[4] = acc[nh*MF + i/2][f + 1];
                    const int e = i%2*2;
                    float x[2] = { (float) lo[e], (float) lo[e + 1] };
                    float y[2] = { (float) hi[e], (float) hi[e + 1] };
                    const uint2 turn = KEYS ? *(const uint2 *)(turns + 8*i*trig_stride + f) : make_uint2(0, 0);
                    rebuild_pairs<KEYS>(x, y, hs, ds, mean, row_scale[i], turner, turn);
                    const __half2 a = __floats2half2_rn(x[0], x[1]);
                    const __half2 b = __floats2half2_rn(y[0], y[1]);
                    const uint32_t ua = *(const uint32_t *) &a;
                    const uint32_t ub = *(const uint32_t *) &b;
                    lo[e]     = (int) __byte_perm(ua, ub, select[0]);
                    lo[e + 1] = (int) __byte_perm(ua, ub, select[1]);
                }
            }
            uint16_t * out = p.out + (((int64_t) stream*p.n_out + cell0 + row0)*s.n_head_kv + gi*s.group_size + head)*hd;
            const int64_t step8 = (int64_t) 8*s.n_head_kv*hd;
#pragma unroll
            for (int i = 0; i < MF*2; i++) {
                if (cell0 + row0 + 8*i <= last_cell) {
                    const int e = i%2*2;
                    uint32_t w[8];
#pragma unroll
                    for (int f = 0; f < 4; f++) {
                        w[2*f]     = (uint32_t) acc[nh*MF + i/2][2*f][e];
                        w[2*f + 1] = (uint32_t) acc[nh*MF + i/2][2*f][e + 1];
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
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_keys_##M(const __grid_constant__ palu_cuda_rebuild p) { rebuild<MF, WM, 1, true>(p); } \
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_values_##M(const __grid_constant__ palu_cuda_rebuild p) { rebuild<MF, WM, 1, false>(p); }
PALU_REBUILD(128, 2, 4)
PALU_REBUILD(64, 2, 2)
PALU_REBUILD(32, 1, 2)
#undef PALU_REBUILD

#if defined(PALU_SM90A) || !defined(__CUDA_ARCH__)
#define PALU_REBUILD_BODY(WM, KEYS) { rebuild<1, WM, 2, KEYS>(p); }
#else
#define PALU_REBUILD_BODY(WM, KEYS) {}
#endif
#define PALU_REBUILD(M, WM) \
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_sm90_keys_##M(const __grid_constant__ palu_cuda_rebuild p) PALU_REBUILD_BODY(WM, true) \
    extern "C" __global__ void __launch_bounds__(256, 2) palu_rebuild_sm90_values_##M(const __grid_constant__ palu_cuda_rebuild p) PALU_REBUILD_BODY(WM, false)
PALU_REBUILD(128, 8)
PALU_REBUILD(64, 4)
#undef PALU_REBUILD
#undef PALU_REBUILD_BODY
