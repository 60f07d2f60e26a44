// decode_sm90_wide.cuh - decode attention on sm_90a where one group holds all KV heads that a block works on, with up to
// four query rows each, and rows have no other group: keys and values are unpacked once for all heads.
//
// Four warpgroups take 64 cells each, 256 in a pass:
//
//   keys    codes unpacked into the A registers of wgmma, once per pass; the decoder streams through a ring of slots, 64
//           columns (half a head) at a time, shared by the four warpgroups; keys rotated by their position, to f16; scores
//           by mma with the queries
//   softmax over the 256 cells of the pass, all heads, in shared memory
//   values  summed as codes by mma as in decode_sm90.cuh; the rows come through the same ring, 64 cells at a time
//
// Sums of values live in registers only while values are summed; a chunk of more than 256 cells adds to what it wrote to
// palu_cuda_attn.partial before.
#pragma once

#include "decode_sm90.cuh"

#ifdef PALU_SM90

static __device__ __forceinline__ void bulk_prefetch(const void * src, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(src), "r"(bytes) : "memory");
}

// By eight lanes: up to 64 rows to shared memory, eight rows each, announced at bar, where each of them arrives. Eight rows are
// whole 16 bytes but for the last ones, and 16 bytes are left after them: then rows that are eight apart start in different banks.
static __device__ __forceinline__ void load_rows(uint8_t * dst, const uint8_t * src, int n, int row_bytes, int group, uint32_t bar) {
    const uint32_t bytes = max(0, min(8, n - group*8))*row_bytes;
    const uint32_t whole = bytes & ~15u;
    dst += group*(8*row_bytes + 16);
    src += group*8*row_bytes;
    for (uint32_t i = whole; i < bytes; i += 4) {
        *(uint32_t *)(dst + i) = *(const uint32_t *)(src + i);
    }
    mbar_expect(bar, whole);
    if (whole) {
        bulk_copy(smem_u32(dst), src, whole, bar);
    }
}

template <int KS, bool SCALE>
static __device__ __forceinline__ void decode_sm90_wide(const palu_cuda_attn & p) {
    constexpr int HD = 128;
    constexpr int GP = HD/16;
    constexpr int W_STRIDE = 33;       // words of two cells' weights: 8 of them are 8 modulo 32
    constexpr int N_SLOT = 3;          // of the ring
    constexpr int SLOT = PALU_CUDA_WIDE_SLOT(KS);
    constexpr float P_SCALE = 64.0f;   // weights this much larger: small ones stay normal in f16

    extern __shared__ __align__(16) uint8_t smem_sm90[];
    const int tid = threadIdx.x & 127;
    const int wg = threadIdx.x >> 7;
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int l4 = lane >> 2;
    const int quad = lane & 3;

    const int n_h = p.part.heads_per_cta;
    const int head0 = blockIdx.y*n_h;
    const int stream = blockIdx.z;
    const int gqa = p.n_head/p.k.n_head_kv;
    const int col_head = gqa*p.n_token;
    const palu_cuda_group gk = p.k.near_groups[0];
    const palu_cuda_group gv = p.v.near_groups[0];
    const uint32_t rows_bytes = max(16384, (64*p.k.row_bytes + 144 + 127)/128*128); // palu_cuda_wide_rows()

    uint8_t * ring = smem_sm90;                                  // [N_SLOT][SLOT]
    uint8_t * sm_rows = ring + N_SLOT*SLOT;                // [4][rows_bytes] key rows; then cos, sin: [GP][128] uint4
    uint2   * frag_q = (uint2 *)(sm_rows + 4*rows_bytes);        // [8][GP][16]
    uint4   * frag_b = (uint4 *)(frag_q + 8*GP*16);              // [4][GP][32]
    float   * sm_s = (float *)(frag_b + 4*GP*32);                // [256][32] at score_at(), then weights [128][W_STRIDE]
    uint4   * sm_seg = (uint4 *)(sm_s + 256*32);           // [KS*4]
    float   * sm_scale = (float *)(sm_seg + KS*4);               // [3][32]
    float   * sm_part = sm_scale + 96;                           // [3][16][32]: per warp: largest, sum, sum of weights times scales
    float   * sm_sums = sm_part + 3*512;                         // [4][32]: largest, sum, sum of weights times scales, correction
    float   * sm_slope = sm_sums + 128;                          // [32]
    int     * sm_token = (int *)(sm_slope + 32);                 // [32] -1: no query
    float   * sm_vscale = (float *)(sm_token + 32);              // [256]
    int64_t * sm_out = (int64_t *)(sm_vscale + 256);             // [32] where a column's sums go in partial; -1: no query
    uint64_t * sm_turn = (uint64_t *)(sm_out + 32);              // [HD/2]
    uint64_t * sm_bar = sm_turn + HD/2;                          // [N_SLOT] full, [N_SLOT] empty, [N_SLOT] values full, [4] key rows full
    const uint32_t bar_full = smem_u32(sm_bar);
    const uint32_t bar_empty = bar_full + N_SLOT*8;
    const uint32_t bar_values = bar_full + 2*N_SLOT*8;
    const uint32_t bar_rows = bar_full + 3*N_SLOT*8;

    const int tile0 = p.part.first_tile + blockIdx.x*p.part.chunk_tiles;
    const int n_tile = min(p.part.chunk_tiles, p.part.end_tile - tile0);
    const int n_pass = (n_tile + 3)/4;
    const int cell_end = min(p.n_kv, (tile0 + n_tile)*64);
    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;

    if (threadIdx.x == 0) {
        for (int i = 0; i < N_SLOT; i++) {
            mbar_init(bar_full + i*8, 1);
            mbar_init(bar_empty + i*8, 16);
            mbar_init(bar_values + i*8, 8);
        }
        for (int i = 0; i < 4; i++) {
            mbar_init(bar_rows + i*8, 8);
        }
        fence_async();
    }
    if (warp == 0) {
        __syncwarp();
    }

    // the first warp brings rows, asked for a pass before
    auto prefetch_pass = [&](int pass) {
        const int cell = (tile0 + pass*4)*64;
        const int n = min(256, cell_end - cell);
        if (n > 0 && warp == 0 && lane < 2) {
            const uint8_t * rows = lane ? rows_v : rows_k;
            const int bytes = lane ? p.v.row_bytes : p.k.row_bytes;
            if (n*bytes >= 16) {
                bulk_prefetch(rows + (int64_t) cell*bytes, (n*bytes) & ~15);
            }
        }
    };
    auto load_keys = [&](int pass) {
        const int to = lane >> 3;
        if (warp == 0 && pass*4 + to < n_tile) {
            const int cell = (tile0 + pass*4 + to)*64;
            load_rows(sm_rows + to*rows_bytes, rows_k + (int64_t) cell*p.k.row_bytes, cell_end - cell, p.k.row_bytes, lane & 7, bar_rows + to*8);
        }
    };
    auto load_values = [&](int pass, int step) {
        if (warp == 0 && lane < 8 && pass*4 + step < n_tile) {
            const int cell = (tile0 + pass*4 + step)*64;
            load_rows(ring + step%N_SLOT*SLOT, rows_v + (int64_t) cell*p.v.row_bytes, cell_end - cell, p.v.row_bytes, lane, bar_values + step%N_SLOT*8);
        }
    };

    // the decoder comes 64 columns at a time, asked for by one thread
    const int n_block = n_h*2;
    const uint32_t block_bytes = gk.rank_pad*64;
    const int8_t * dec = p.k.dec_tiles + gk.dec0 + (int64_t)(head0%p.k.group_size)*HD*gk.rank_pad;
    auto load_block = [&](int b, int slot) {
        mbar_expect(bar_full + slot*8, block_bytes);
        bulk_copy(smem_u32(ring) + slot*SLOT, dec + (int64_t) b*block_bytes, block_bytes, bar_full + slot*8);
    };
    auto load_first = [&]() {
        if (threadIdx.x == 0) {
            load_block(0, 0);
            load_block(1, 1);
        }
    };
    load_first();

    if (threadIdx.x < HD/2) {
        sm_turn[threadIdx.x] = p.rope.turn[threadIdx.x];
    }
    if (threadIdx.x < 32) {
        sm_sums[lane] = -INFINITY;
        sm_sums[32 + lane] = 0.0f;
        sm_sums[64 + lane] = 0.0f;
        const int h = lane/col_head;
        const bool real = h < n_h;
        sm_token[lane] = real ? lane%col_head/gqa : -1;
        sm_out[lane] = real ? ((((int64_t) stream*p.n_token + lane%col_head/gqa)*p.n_head + (head0 + h)*gqa + lane%gqa)*p.n_chunk + p.part.first_chunk + blockIdx.x)*(4 + p.rank_stride) + 4 : -1;
        sm_slope[lane] = real ? alibi_slope(p.max_bias, p.n_head, (head0 + h)*gqa + lane%gqa) : 1.0f;
    }

    //
    // Prologue: segments, queries
    //
    for (int i = threadIdx.x; i < KS*4; i += 512) {
        // .x: first word's byte, .y: shift within the word | bits << 8, .z, .w: as spread_s8 wants them
        const uint32_t seg = i < gk.rank/8 ? p.k.segs[gk.seg0 + i] : 0;
        const uint32_t bits = seg >> 24;
        const uint32_t at = seg & 0xffffff;
        sm_seg[i] = make_uint4(at & ~3u, (at & 3)*8 | bits << 8, ((1u << bits) - 1)*0x01010101u, (bits ? 128u - (1u << (bits - 1)) : 128u)*0x01010101u);
    }
    for (int i = threadIdx.x; i < 8*GP*16; i += 512) {
        frag_q[i] = make_uint2(0, 0);
    }
    // what never changes of what the queries meet is loaded before the kernel waits
    int2 dim[2];
    float mag[2], scale[2][2];
    float2 mean[2][2], half[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pair = i*32 + lane;
        dim[i] = ((const int2 *) p.rope.pair_dim)[pair];
        mag[i] = p.rope.mag[pair];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int64_t at = (int64_t)(head0 + min((warp + n*16)/col_head, n_h - 1))*HD;
            scale[n][i] = gk.rank ? p.k.dec_scale[at + dim[i].x] : 0.0f;
            mean[n][i] = make_float2(p.k.mean[at + dim[i].x], p.k.mean[at + dim[i].y]);
            half[n][i] = make_float2(scale[n][i]*p.k.dec_half[at + dim[i].x], scale[n][i]*p.k.dec_half[at + dim[i].y]);
        }
    }
    if (!p.part.beside) {
        grid_wait();
    }
    grid_next();
    load_keys(0);
    prefetch_pass(0);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < 2; n++) {
        // with the decoder's scales; with the mean; with the halves. To f16 range, with a factor for each
        const int col = warp + n*16;
        float2 v[3][2] = {};
        const int h = col/col_head;
        if (h < n_h) {
            const int qh = (head0 + h)*gqa + col%gqa;
            const float * q = (const float *) ((const char *) p.q + stream*p.q_nb_stream + col%col_head/gqa*p.q_nb_token + qh*p.q_nb_head);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float qa = q[dim[i].x]*mag[i];
                const float qb = q[dim[i].y]*mag[i];
                const float2 m = mean[n][i];
                const float2 ha = half[n][i];
                v[0][i] = make_float2(qa*scale[n][i], qb*scale[n][i]);
                v[1][i] = make_float2(qa*m.x + qb*m.y, qb*m.x - qa*m.y);
                v[2][i] = make_float2(qa*ha.x + qb*ha.y, qb*ha.x - qa*ha.y);
            }
        }
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const float top = warp_max(fmaxf(fmaxf(fabsf(v[j][0].x), fabsf(v[j][0].y)), fmaxf(fabsf(v[j][1].x), fabsf(v[j][1].y))));
            const float inv = top > 0.0f ? 1.0f/top : 0.0f;
            if (lane == 0) {
                sm_scale[j*32 + col] = j == 0 ? top*p.scale/p.trig_scale : top*p.scale;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = i*32 + lane;
                const int in_frag = pair >> 1 & 3;
                __half * to = nullptr;
                if (j > 0) {
                    to = (__half *)(frag_b + (col/8*GP + pair/8)*32 + col%8*4 + in_frag) + (j - 1)*4 + (pair & 1);
                } else if (h < n_h) {
                    to = (__half *)(frag_q + (h*GP + pair/8)*16 + col%col_head*4 + in_frag) + (pair & 1);
                }
                if (to) {
                    to[0] = __float2half_rn(v[j][i].x*inv);
                    to[2] = __float2half_rn(v[j][i].y*inv);
                }
            }
        }
    }
    __syncthreads();

    // a tile's cells in the rows of wgmma, so that the lanes of a warp read rows that are eight apart
    const int row0 = (warp & 3)*16 + l4;           // and row0 + 8
    const int my_cell = l4*8 + (warp & 3)*2;       // and my_cell + 1
    const int my_score = wg*64 + row0;             // where their scores stand, and 8 further
    // rows of 32 scores, each turned so that eight rows' pairs of columns hit different banks
    auto score_at = [](int row, int col) { return row*32 + (col ^ (row & 7)*4); };
    const uint32_t group_k = 8*p.k.row_bytes + 16; // bytes of eight rows
    const uint32_t group_v = 8*p.v.row_bytes + 16;
    const int part = warp & 1;   // half of a value step
    const int unit = warp >> 1;  // 64 channels of the values; a quarter of the ninth and tenth as well
    uint8_t * my_rows = sm_rows + wg*rows_bytes;
    uint4 * my_trig = (uint4 *) my_rows + tid;
    const uint64_t desc0 = (uint64_t)((smem_u32(ring) & 0x3ffff) >> 4) | (uint64_t)(1024 >> 4) << 16 | (uint64_t)(128 >> 4) << 32;
    uint32_t small_k = 0; // steps of 32 channels with at most 4 bits
    for (int i = 0; i < KS; i++) {
        small_k |= (uint32_t) __all_sync(0xffffffff, sm_seg[i*4 + quad].y >> 8 <= 4) << i;
    }
    uint32_t full_phase = 0;   // bit of each slot
    uint32_t empty_phase = 0;
    uint32_t values_phase = 0;

    for (int pass = 0; pass < n_pass; pass++) {
        const int tile = pass*4 + wg;
        const int cell0 = (tile0 + tile)*64;
        const bool busy = tile < n_tile;
        prefetch_pass(pass + 1);
        if (threadIdx.x < 256) {
            const int cell = min((tile0 + pass*4)*64 + (int) threadIdx.x, p.n_kv - 1);
            sm_vscale[threadIdx.x] = __half2float(__ushort_as_half(*(const uint16_t *)(rows_v + (int64_t) cell*p.v.row_bytes + gv.row_offset)));
        }
        uint32_t a[KS][4] = {}; // set in any case, or they would take up registers while values are summed
        float scale_k[2] = {};
        if (busy) {
            const uint8_t * my_row = my_rows + l4*group_k + (warp & 3)*2*p.k.row_bytes;
            const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
            const int at_pos[2] = { pos[min(cell0 + my_cell, p.n_kv - 1)], pos[min(cell0 + my_cell + 1, p.n_kv - 1)] };
            mbar_wait(bar_rows + wg*8, pass & 1);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                scale_k[i] = __half2float(*(const __half *)(my_row + i*p.k.row_bytes + gk.row_offset));
            }
#pragma unroll
            for (int s = 0; s < KS; s++) {
                const uint4 seg = sm_seg[s*4 + quad];
                const uint32_t bits = seg.y >> 8;
                if (small_k >> s & 1) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row + i*p.k.row_bytes + seg.x);
                        const uint32_t lo = __funnelshift_r(w[0], w[1], seg.y);
                        a[s][i] = spread_s8(lo, bits, seg.z, seg.w);
                        a[s][2 + i] = spread_s8(lo >> bits*4, bits, seg.z, seg.w);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row + i*p.k.row_bytes + seg.x);
                        const uint32_t w1 = w[1];
                        const uint32_t lo = __funnelshift_r(w[0], w1, seg.y);
                        const uint32_t hi = __funnelshift_rc(lo, __funnelshift_r(w1, w[2], seg.y), bits*4);
                        a[s][i] = spread_s8(lo, bits, seg.z, seg.w);
                        a[s][2 + i] = spread_s8(hi, bits, seg.z, seg.w);
                    }
                }
            }
            bar_sync(1 + wg, 128); // rows have been read
            {
                // cos and sin of this thread's cells and pairs, to where the rows were
#pragma unroll 2
                for (int gp = 0; gp < GP; gp++) {
                    const ulonglong2 turn = *(const ulonglong2 *)(sm_turn + gp*8 + quad*2);
                    uint32_t x[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float s[2], c[2];
                        sincos_turn((uint64_t)(int64_t) at_pos[i]*turn.x, s[0], c[0]);
                        sincos_turn((uint64_t)(int64_t) at_pos[i]*turn.y, s[1], c[1]);
                        x[i] = pack_f16(c[0], c[1]);
                        x[2 + i] = pack_f16(s[0], s[1]);
                    }
                    my_trig[gp*128] = make_uint4(x[0], x[1], x[2], x[3]);
                }
            }
        }
        uint32_t parity = 0; // of the times that a slot has been filled in this pass
        float sq[4] = {};
        int acc[32] = {};    // set for the same reason
#pragma unroll 1
        for (int b0 = 0; b0 < n_block; b0 += N_SLOT) {
#pragma unroll
            for (int slot = 0; slot < N_SLOT; slot++) {
                const int b = b0 + slot;
                if (b >= n_block) {
                    break;
                }
                if (threadIdx.x == 0 && b + 2 < n_block) {
                    // the block after the next, to where the last one was
                    constexpr int N = N_SLOT - 1;
                    const int to = (slot + N)%N_SLOT;
                    if (b > 0) {
                        mbar_wait(bar_empty + to*8, ((empty_phase >> to) ^ (slot == 0 ? parity ^ 1 : parity)) & 1);
                    }
                    load_block(b + 2, to);
                }
                mbar_wait(bar_full + slot*8, ((full_phase >> slot) ^ parity) & 1);
                if (busy) {
                    wgmma_fence();
#pragma unroll
                    for (int s = 0; s < KS; s++) {
                        wgmma_64(acc, a[s], desc0 + (slot*SLOT + s*2048)/16, s != 0);
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
                }
                if (lane == 0 && b + 3 < n_block) {
                    mbar_arrive(bar_empty + slot*8);
                }
                if (busy) {
                    const uint4 * trigs = my_trig + (b & 1)*4*128;
                    const uint2 * queries = frag_q + b*4*16 + lane;
                    float s0[4] = {}, s1[4] = {}; // in two, so that they need not wait for each other
#pragma unroll
                    for (int g = 0; g < 4; g++) {
                        const uint4 trig = trigs[g*128];
                        uint2 bq = make_uint2(0, 0);
                        if (lane < 16) {
                            bq = queries[g*16];
                        }
                        const __half2 cs[2] = { as_half2(trig.x), as_half2(trig.y) };
                        const __half2 sn[2] = { as_half2(trig.z), as_half2(trig.w) };
                        uint32_t x[4];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const int k = g*8 + i*2;
                            float f[4] = { (float) acc[k], (float) acc[k + 1], (float) acc[k + 4], (float) acc[k + 5] };
                            if (SCALE) {
#pragma unroll
                                for (int j = 0; j < 4; j++) {
                                    f[j] *= p.trig_scale;
                                }
                            }
                            const __half2 ka = __floats2half2_rn(f[0], f[1]);
                            const __half2 kb = __floats2half2_rn(f[2], f[3]);
                            x[i] = as_u32(__hfma2(ka, cs[i], __hneg2(__hmul2(kb, sn[i]))));
                            x[2 + i] = as_u32(__hfma2(ka, sn[i], __hmul2(kb, cs[i])));
                        }
                        mma_f16(g & 1 ? s1 : s0, x[0], x[1], x[2], x[3], bq.x, bq.y);
                    }
                    if (b & 1) {
                        if (quad*2 < col_head) {
                            const int col = (b >> 1)*col_head + quad*2;
                            sm_s[score_at(my_score, col)] = sq[0] + (s0[0] + s1[0]);
                            sm_s[score_at(my_score + 8, col)] = sq[2] + (s0[2] + s1[2]);
                            if (quad*2 + 1 < col_head) {
                                sm_s[score_at(my_score, col + 1)] = sq[1] + (s0[1] + s1[1]);
                                sm_s[score_at(my_score + 8, col + 1)] = sq[3] + (s0[3] + s1[3]);
                            }
                        }
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            sq[i] = s0[i] + s1[i];
                        }
                    }
                }
            }
            parity ^= 1;
        }
        if (busy) {
            __syncwarp();
            // what is the same for all cells but for the rotation
#pragma unroll 1
            for (int n = 0; n < 4; n++) {
                float sm[4] = {};
                float sh[4] = {};
                float sm1[4] = {};
                float sh1[4] = {};
#pragma unroll
                for (int gp = 0; gp < GP; gp++) {
                    const uint4 trig = my_trig[gp*128];
                    const uint4 bb = frag_b[(n*GP + gp)*32 + lane];
                    mma_f16(gp & 1 ? sm1 : sm, trig.x, trig.y, trig.z, trig.w, bb.x, bb.y);
                    mma_f16(gp & 1 ? sh1 : sh, trig.x, trig.y, trig.z, trig.w, bb.z, bb.w);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sm[i] += sm1[i];
                    sh[i] += sh1[i];
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const int col = n*8 + quad*2 + j;
                    const int token = sm_token[col];
                    const float fq = sm_scale[col];
                    const float fm = sm_scale[32 + col];
                    const float fh = sm_scale[64 + col];
                    const float slope = sm_slope[col];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int cell = cell0 + my_cell + i;
                        float mask = token < 0 || cell >= cell_end ? -INFINITY : 0.0f;
                        if (p.mask && mask == 0.0f) {
                            const char * from = (const char *) p.mask + stream*p.mask_nb_stream + token*p.mask_nb_token;
                            mask = p.mask_f16 ? __half2float(((const __half *) from)[cell]) : ((const float *) from)[cell];
                        }
                        float * to = sm_s + score_at(my_score + i*8, col);
                        float x = scale_k[i]*(*to*fq + sh[i*2 + j]*fh) + sm[i*2 + j]*fm;
                        if (p.softcap != 0.0f) {
                            x = p.softcap*tanhf(x/p.softcap);
                        }
                        *to = mask == -INFINITY ? -INFINITY : (x + slope*mask)*LOG2E;
                    }
                }
            }
        } else {
            for (int i = 0; i < 64; i += 4) {
                sm_s[score_at(wg*64 + i + (warp & 3), lane)] = -INFINITY;
            }
        }
#pragma unroll
        for (int s = 0; s < N_SLOT; s++) {
            const uint32_t n = (n_block + N_SLOT - 1 - s)/N_SLOT; // times that the slot has been filled, and emptied once less
            full_phase ^= (n & 1) << s;
            empty_phase ^= (n > 0 && ~n & 1) << s;
        }
        fence_async(); // rows come to where the decoder and the table were
        __syncthreads();
        load_values(pass, 0);
        load_values(pass, 1);
        load_values(pass, 2);
        load_keys(pass + 1);

        //
        // Softmax: a lane per column, 16 cells per warp
        //
        {
            float x[16];
            float top = -INFINITY;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                x[i] = sm_s[score_at(warp*16 + i, lane)];
                top = fmaxf(top, x[i]);
            }
            sm_part[warp*32 + lane] = top;
            __syncthreads();
            const int first = (warp >> 2)*64 + (warp & 3)*2; // this warp's cells: first + 8*i and the next
            const float old = sm_sums[lane];
            top = old;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                top = fmaxf(top, sm_part[i*32 + lane]);
            }
            const float base = top == -INFINITY ? 0.0f : top;
            float sum = 0.0f;
            float sum_v = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                __half w[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float e = exp2_fast(x[i + j*8] - base);
                    const bool hidden = x[i + j*8] == -INFINITY;
                    sum += hidden ? 0.0f : e;
                    w[j] = __float2half_rn(hidden ? 0.0f : e*sm_vscale[first + i*8 + j]*P_SCALE);
                    sum_v += __half2float(w[j]);
                }
                ((uint32_t *) sm_s)[(first/2 + i*4)*W_STRIDE + lane] = (uint32_t) __half_as_ushort(w[0]) | (uint32_t) __half_as_ushort(w[1]) << 16;
            }
            sm_part[512 + warp*32 + lane] = sum;
            sm_part[1024 + warp*32 + lane] = sum_v;
            __syncthreads();
            if (warp == 0) {
                const float fix = exp2_fast(old - base);
                sum = sm_sums[32 + lane]*fix;
                sum_v = sm_sums[64 + lane]*fix;
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    sum += sm_part[512 + i*32 + lane];
                    sum_v += sm_part[1024 + i*32 + lane];
                }
                sm_sums[lane] = top;
                sm_sums[32 + lane] = sum;
                sm_sums[64 + lane] = sum_v;
                sm_sums[96 + lane] = fix;
            }
        }

        //
        // Values
        //
        float u[5][4][4] = {}; // [four of the unit, one of the ninth and tenth][columns]
        const int s_unit = unit*8 + l4;
        const int s_more = (8 + unit/4)*8 + l4;
        const uint32_t seg0 = s_unit < gv.rank/8 ? p.v.segs[gv.seg0 + s_unit] : 0;
        const uint32_t seg1 = s_more < gv.rank/8 ? p.v.segs[gv.seg0 + s_more] : 0;
        const int rank_v = gv.rank;
        const bool small = __all_sync(0xffffffff, seg0 >> 24 <= 4);
        const bool more = gv.rank > (8 + unit/4)*64;
        const int n_step = min(4, n_tile - pass*4);
#pragma unroll 1
        for (int step = 0; step < n_step; step++) {
            const int slot = step == N_SLOT ? 0 : step;
            if (step == 1) {
                if (warp == 0 && n_step > 3) {
                    mbar_wait(bar_empty, empty_phase & 1);
                    load_values(pass, 3);
                }
                empty_phase ^= n_step > 3;
            }
            mbar_wait(bar_values + slot*8, values_phase >> slot & 1);
            values_phase ^= 1u << slot;
            const uint8_t * rows = ring + slot*SLOT + (quad*2 + part)*group_v;
#pragma unroll
            for (int kb = 0; kb < 2; kb++) {
                const uint8_t * row[2][2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        row[j][i] = rows + (kb*4 + j*2 + i)*p.v.row_bytes;
                    }
                }
                uint32_t bp[4][2];
                const uint32_t * w = (const uint32_t *) sm_s + (step*32 + (quad*2 + part)*4 + kb*2)*W_STRIDE + l4;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    bp[n][0] = w[n*8];
                    bp[n][1] = w[W_STRIDE + n*8];
                }
                {
                    const uint32_t bits = seg0 >> 24;
                    const uint32_t from = seg0 & 0xfffffc;
                    const uint32_t ones = ((1u << bits) - 1)*0x00010001u;
                    uint32_t y[4][2];
                    value_code_pairs(y, small, bits, seg0*8, [&](int j, int i) { return (const uint32_t *)(row[j][i] + from); });
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        const uint32_t x0 = y[m][0] & ones;
                        const uint32_t x1 = y[m][0] >> bits & ones;
                        const uint32_t x2 = y[m][1] & ones;
                        const uint32_t x3 = y[m][1] >> bits & ones;
#pragma unroll
                        for (int n = 0; n < 4; n++) {
                            mma_f16(u[m][n], x0, x1, x2, x3, bp[n][0], bp[n][1]);
                        }
                    }
                }
                if (more) {
                    // codes 2m and 2m + 1 of the segment, m = unit%4
                    const uint32_t bits = seg1 >> 24;
                    const uint32_t first = (seg1 & 0xffffff)*8 + (unit & 3)*2*bits;
                    const uint32_t ones = ((1u << bits) - 1)*0x00010001u;
                    uint32_t x[2][2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        uint32_t lo[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const uint32_t * at4 = (const uint32_t *)(row[j][i] + (first >> 5)*4);
                            lo[i] = __funnelshift_r(at4[0], at4[1], first);
                        }
                        const uint32_t y = __byte_perm(lo[0], lo[1], 0x5410);
                        x[0][j] = y & ones;
                        x[1][j] = y >> bits & ones;
                    }
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        mma_f16(u[4][n], x[0][0], x[1][0], x[0][1], x[1][1], bp[n][0], bp[n][1]);
                    }
                }
            }
            if (step == 0 && n_step > 3) {
                __syncwarp();
                if (lane == 0) {
                    mbar_arrive(bar_empty);
                }
            }
        }

        // both halves together, in the ring, as [column][channel]; then to what the passes before have written
        __syncthreads();
        auto sums_of = [&](int col) { return (float *) ring + col*648 + (col >> 1 & 3)*2; }; // a warp's columns in different banks
        const int first_more = s_more*8 + (unit & 3)*2;
#pragma unroll
        for (int turn = 1; turn >= 0; turn--) {
            if (part == turn) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float * to = sums_of(n*8 + quad*2 + j);
#pragma unroll
                        for (int m = 0; m < 5; m++) {
                            float2 * at2 = (float2 *)(to + (m < 4 ? s_unit*8 + m*2 : first_more));
                            float2 x = make_float2(u[m][n][j], u[m][n][2 + j]);
                            if (turn == 0) {
                                const float2 y = *at2;
                                x.x += y.x;
                                x.y += y.y;
                            }
                            *at2 = x;
                        }
                    }
                }
            }
            __syncthreads();
        }
        {
            // a warp has two columns, a lane four channels of every 128
            constexpr float f = 16777216.0f/P_SCALE;
            float4 old[2][5];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int64_t at = sm_out[warp*2 + i];
#pragma unroll
                for (int k = 0; k < 5; k++) {
                    const int c = k*128 + lane*4;
                    old[i][k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (pass > 0 && at >= 0 && c < rank_v) {
                        old[i][k] = *(const float4 *)(p.partial + at + c);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int64_t at = sm_out[warp*2 + i];
                const float fix = sm_sums[96 + warp*2 + i];
#pragma unroll
                for (int k = 0; k < 5; k++) {
                    const int c = k*128 + lane*4;
                    if (at >= 0 && c < rank_v) {
                        const float2 x = *(const float2 *)(sums_of(warp*2 + i) + c);
                        const float2 y = *(const float2 *)(sums_of(warp*2 + i) + c + 2);
                        *(float4 *)(p.partial + at + c) = make_float4(fmaf(fix, old[i][k].x, x.x*f), fmaf(fix, old[i][k].y, x.y*f),
                            fmaf(fix, old[i][k].z, y.x*f), fmaf(fix, old[i][k].w, y.y*f));
                    }
                }
            }
        }
        fence_async(); // the decoder comes to where the sums were
        if (pass + 1 < n_pass) {
            __syncthreads();
            load_first();
        }
    }
    if (warp == 0 && sm_out[lane] >= 0) {
        *(float4 *)(p.partial + sm_out[lane] - 4) = make_float4(sm_sums[lane], sm_sums[32 + lane], sm_sums[64 + lane]*(1.0f/P_SCALE), 0.0f);
    }
    if (p.part.beside && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
        grid_wait();
    }
}

#endif

#ifdef PALU_SM90
#define PALU_DECODE_WIDE(KS, SUFFIX, SCALE) \
    extern "C" __global__ void __launch_bounds__(512, 1) palu_decode_sm90_wide_##KS##SUFFIX(const __grid_constant__ palu_cuda_attn p) { decode_sm90_wide<KS, SCALE>(p); }
#else
#define PALU_DECODE_WIDE(KS, SUFFIX, SCALE) \
    extern "C" __global__ void palu_decode_sm90_wide_##KS##SUFFIX(const __grid_constant__ palu_cuda_attn p) {}
#endif
#define PALU_BOTH_WIDE(KS) PALU_DECODE_WIDE(KS, , false) PALU_DECODE_WIDE(KS, _scaled, true)
PALU_CUDA_WIDE_KERNELS(PALU_BOTH_WIDE)
