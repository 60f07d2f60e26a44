// decode_sm90_cheb.cuh - decode attention for one query row per KV head on sm_90a, four heads of 128 dimensions per key group.
//
// The score of a cell with codes z at position p is a sum over RoPE pairs i of cos(t_i p) a_i.z + sin(t_i p) b_i.z. Over 128
// consecutive positions, x = p - c in [-64, 64), a slowly turning pair is a polynomial of x of low degree: in Chebyshev
// polynomials, exp(i t x) = J_0(64 t) + 2 sum over n of i^n J_n(64 t) T_n(x/64) (Jacobi, Anger), where J_8(2.6) is 2e-4. So all
// slow pairs together are eight products w_n.z with vectors that are the same for 128 cells, and only the fast pairs of a key
// are rebuilt and rotated. Everything is f16 with codes centred exactly; all of the decoder stays in shared memory.
//
//   prepare  a warpgroup, one pass per 128 cells: queries turned to the centre c and times the Bessel factors, times the slow
//            part of the decoder (wgmma): w_n. A pass covers the cells within 128 positions of the smallest that is not yet
//            covered; usually that is all of them, and else more passes follow. Then the softmax of the cells before, a head
//            per warp.
//   score    two warpgroups, 64 cells each: codes to f16 in the layout that wgmma wants for A; fast pairs by products with
//            the decoder, rotation, and products with the queries; the slow ones by w_n.
//   value    six warps for each 64 cells, 64 channels each: values summed as codes by mma, codes as f16 subnormals.
//   copy     a warpgroup: rows, and what is needed of single cells, to shared memory.
// No registers may be spilled in the loops: nearly all of the L1 is shared memory, and local memory takes hundreds of cycles.
#pragma once

#include "decode_sm90.cuh"

#ifdef PALU_SM90

// d[64][64] (+)= a[64][16] b[64][16], f16 sums
static __device__ __forceinline__ void wgmma_h64(uint32_t (&d)[16], const uint32_t (&a)[4], uint64_t desc_b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]),
          "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));
}
// d[64][32] (+)= a[64][16] b[32][16], f16 sums
static __device__ __forceinline__ void wgmma_h32(uint32_t (&d)[8], const uint32_t (&a)[4], uint64_t desc_b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f16.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));
}
// d[64][8] (+)= a[64][16] b[8][16], f32 sums, both from shared memory
static __device__ __forceinline__ void wgmma_f8(float (&d)[4], uint64_t desc_a, uint64_t desc_b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(desc_a), "l"(desc_b), "r"(accumulate));
}
// Of a factor in shared memory, 8 rows of 16 bytes after each other: at, bytes to the next 16 of a row, bytes to the next 8 rows.
static __device__ __forceinline__ uint64_t wgmma_factor(uint32_t at, uint32_t next_16, uint32_t next_rows) {
    return (uint64_t)((at & 0x3ffff) >> 4) | (uint64_t)(next_16 >> 4) << 16 | (uint64_t)(next_rows >> 4) << 32;
}

// Copies a span of many rows to shared memory, 16 bytes at a time, as Stager does. Rows at a time are a multiple of four, so that
// a thread's bytes stand at the same place modulo 16 in all of its rows.
template <int THREADS> struct RowCopy {
    int32_t from;    // of this thread's first 16 bytes, from the first row's span on
    uint32_t to;
    uint32_t row;    // its first row
    uint32_t step;   // rows at a time

    // dst: where the first row goes
    __device__ __forceinline__ RowCopy(int tid, const uint8_t * src, int span, int row_bytes, int stride, uint32_t dst) {
        const uint32_t n_unit = (span + 30)/16;
        row = tid/n_unit;
        step = THREADS/n_unit & ~3u;
        const uint32_t unit16 = tid%n_unit*16;
        const uint32_t in16 = (uint32_t)((uintptr_t) src + row*row_bytes) & 15;
        from = row*row_bytes - in16 + unit16;
        to = dst + row*stride + unit16;
        if (row >= step || unit16 >= in16 + span) {
            row = 0x40000000;
        }
    }
    // n rows from src on, in memory that ends at end, to dst from the first row's place on
    __device__ __forceinline__ void copy(uint32_t dst, const uint8_t * src, int n, int row_bytes, int stride, const uint8_t * end) const {
        const uint8_t * at = src + from;
        dst += to;
        if (src + (int64_t) n*row_bytes + 16 <= end) {
#pragma unroll 4
            for (int i = row; i < n; i += step) {
                cp_async16_cg(dst, at);
                at += step*row_bytes;
                dst += step*stride;
            }
            return;
        }
#pragma unroll 1
        for (int i = row; i < n; i += step) {
            if (at + 16 <= end) {
                cp_async16_cg(dst, at);
            } else {
#pragma unroll 1
                for (int j = 0; j < 16 && at + j < end; j += 4) {
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(dst + j), "l"(at + j) : "memory");
                }
            }
            at += step*row_bytes;
            dst += step*stride;
        }
    }
};
// arrives once this thread's copies are done
static __device__ __forceinline__ void mbar_arrive_copies(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
}

// GF: blocks of 8 fast pairs; NS: tiles of 64 cells at a time
template <int GF, int NS> static __device__ __forceinline__ void decode_sm90_cheb(const palu_cuda_attn & p) {
    constexpr int HD = 128;
    constexpr int HS = 4;
    constexpr int F = GF*8;            // fast pairs
    constexpr int KC = (64 - F)*2/8;   // slow dimensions/8
    constexpr int THREADS = (NS + 5)*128;
    constexpr int REACH = NS*64;       // positions that a pass covers
    constexpr int VT = 32;             // cells of a value stage
    constexpr int VSTAGES = 2;
    constexpr float NONE = -1e30f;     // lower than any score, and a number
    constexpr float P_SCALE = 64.0f;   // weights this much larger: small ones stay normal in f16
    constexpr int SCORE_REGS = 104;    // 504 of all warpgroups together
    constexpr int VALUE_REGS = 64;
    constexpr int PREP_REGS = 64;
    constexpr int COPY_REGS = 40;

    // shared memory
    constexpr int W_NEXT = 528;                        // of w_n: bytes to the next 8 channels
    constexpr int Q_NEXT = 144;                        // of the turned queries: bytes to the next 8 dimensions
    constexpr int AT_FAST = 0;                         // [GF][16][8][8][8] f16: 8 channels, head and side, pair
    constexpr int S_NEXT = 2064;                       // of the slow dimensions: bytes to the next 8
    constexpr int AT_SLOW = AT_FAST + GF*16384;        // [HS][KC][S_NEXT], of that [16][8][8] f16: channels, dimension
    constexpr int AT_SLOT = AT_SLOW + HS*KC*S_NEXT;    // [2]: w_n [16][W_NEXT], then as follows
    constexpr int SLOT_Q = 16*W_NEXT;                  // fast queries [NS][GF][HS][4] uint2
    constexpr int SLOT_M = SLOT_Q + NS*GF*128;         // the same with the mean
    constexpr int SLOT_MC = SLOT_M + NS*GF*128;           // mean's coefficients f16 [HS][8]
    constexpr int SLOT_HEAD = SLOT_MC + 64;            // smallest position, more passes, all cells in sequence
    constexpr int SLOT = (SLOT_HEAD + 16 + 127)/128*128;
    constexpr int AT_Q = AT_SLOT + 2*SLOT;             // turned queries f16 [HS][KC][Q_NEXT]
    constexpr int AT_VM = AT_Q + HS*KC*Q_NEXT;         // turned means f16 [8][56]
    constexpr int AT_J = AT_VM + 896;                  // Bessel factors as fragments [3][32] uint2
    constexpr int AT_TRIG = AT_J + 768;                // [GF][128] uint4
    constexpr int AT_W = AT_TRIG + GF*2048;            // weights f16 [NS][2][64][8]
    constexpr int AT_TOP = AT_W + NS*2048;             // [2][8] largest score so far that weights refer to
    constexpr int AT_FIN = AT_TOP + 64;                // [HS] float4
    constexpr int X_NEXT = REACH + 8;
    constexpr int AT_X = AT_FIN + 64;                  // scores [2][HS][X_NEXT]
    constexpr int AT_SEG = AT_X + 2*HS*X_NEXT*4;             // [16] uint4
    constexpr int AT_SCALE = AT_SEG + 256;             // [3][8]
    constexpr int AT_BAR = AT_SCALE + 96;              // 14 + 4*NS barriers
    constexpr int AT_VEC = AT_BAR + 256;               // query vectors [HS][64] float4
    constexpr int AT_BESSEL = AT_VEC + 4096;           // Bessel factors f16 [64 - F][8]
    constexpr int AT_CELL = AT_BESSEL + 768;           // [4]: scales of keys and values f16 [REACH][2], masks [REACH], positions [REACH]
    constexpr int AT_K = AT_CELL + 4*REACH*12;                // [REACH][k_stage_words], then [NS][VSTAGES][VT][v_stage_words]
    static_assert(NS == 2, "threads that copy have a cell each");
    static_assert(AT_K == PALU_CUDA_CHEB_FIXED(GF, NS), "as the host counts it");

    extern __shared__ __align__(16) uint8_t smem_sm90[];
    uint8_t * smem = smem_sm90;
    const uint32_t base_u32 = smem_u32(smem);
    int tid = threadIdx.x & 127;
    int wg = threadIdx.x >> 7;
    int lane = threadIdx.x & 31;
    int warp = tid >> 5;

    const int head0 = blockIdx.y*HS;
    const int stream = blockIdx.z;
    const palu_cuda_group & gk = p.k.groups[head0/p.k.group_size];
    const palu_cuda_group & gv = p.v.groups[head0/p.v.group_size];
    uint8_t * sm_k = smem + AT_K;
    uint8_t * sm_v = sm_k + REACH*p.k_stage_words*4;
    uint4 * sm_seg = (uint4 *)(smem + AT_SEG);
    float * sm_scale = (float *)(smem + AT_SCALE);
    float4 * sm_vec = (float4 *)(smem + AT_VEC);
    const uint32_t bar_full = base_u32 + AT_BAR;         // [2] w_n are ready
    const uint32_t bar_empty = bar_full + 16;            // [2] w_n have been used
    const uint32_t bar_ready = bar_full + 32;            // [2] weights are ready
    const uint32_t bar_used = bar_full + 48;             // [2] weights have been used
    const uint32_t bar_rows = bar_full + 64;             // keys' rows are here
    const uint32_t bar_read = bar_rows + 8;              // keys' rows have been read
    const uint32_t bar_values = bar_rows + 16;           // [NS][VSTAGES] values' rows are here
    const uint32_t bar_summed = bar_values + NS*16;      // [NS][VSTAGES] values' rows have been read
    const uint32_t bar_cells = bar_summed + NS*16;       // [4] scales, masks and positions are here

    const int tile0 = blockIdx.x*p.part.chunk_tiles;
    const int n_tile = min(p.part.chunk_tiles, (p.n_kv + 63)/64 - tile0);
    const int n_unit = (n_tile + NS - 1)/NS;

    // rows
    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;
    const int k_offset = gk.row_offset;
    const int v_offset = gv.row_offset;
    if (threadIdx.x < 14 + 4*NS) {
        const int i = threadIdx.x;
        mbar_init(bar_full + i*8, i < 2 ? 1 : i < 4 ? 4*NS : i < 6 ? 4 : i < 8 ? 6*NS : i == 8 ? 64 : i == 9 ? 4*NS : i < 10 + 2*NS ? 64 : i < 10 + 4*NS ? 6 : 64);
    }

    // Decoder as f16. Of 32 channels, codes j and 4 + j of four segments become 8 neighbours, as unpacking leaves them.
    uint4 raw[2][2][2] = {};
    const int i0 = threadIdx.x;
    if (i0 < 512) {
        const int2 dims = __ldg((const int2 *) p.rope.pair_dim + (i0 & 63));
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int i = n*512 + i0;
            const int8_t * src = p.k.dec + gk.dec0 + (int64_t)(head0%p.k.group_size + (i >> 8))*HD*gk.rank_pad + (i >> 6 & 3)*32;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const uint4 * at = (const uint4 *)(src + (s ? dims.y : dims.x)*gk.rank_pad);
                if ((i >> 6 & 3)*32 < gk.rank_pad) {
                    raw[n][s][0] = __ldg(at);
                    raw[n][s][1] = __ldg(at + 1);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int i = n*512 + i0;
        if (i0 >= 512) {
            break;
        }
        const int pair = i & 63;
        const int block = i >> 6 & 3;
        const int h = i >> 8;
        uint32_t w[2][8];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const uint4 a = raw[n][s][0];
            const uint4 b = raw[n][s][1];
            w[s][0] = a.x; w[s][1] = a.y; w[s][2] = a.z; w[s][3] = a.w;
            w[s][4] = b.x; w[s][5] = b.y; w[s][6] = b.z; w[s][7] = b.w;
#pragma unroll
            for (int q = 0; q < 8; q++) {
                w[s][q] ^= 0x80808080u;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t x[2][4]; // channels of segments 0 to 3, pairs of codes j and 4 + j
#pragma unroll
            for (int s = 0; s < 2; s++) {
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    // the bytes as 1024 + 128 + weight
                    const uint32_t two = __byte_perm(w[s][q], w[s][4 + q], j | (4 + j) << 4);
                    x[s][q] = as_u32(__hsub2(as_half2(__byte_perm(two, 0x64646464u, 0x4140)), as_half2(0x64806480u)));
                }
            }
            const int core = block*4 + j;
            if (pair < F) {
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    *(uint4 *)(smem + AT_FAST + (pair >> 3)*16384 + core*1024 + (h*2 + s)*128 + (pair & 7)*16) = make_uint4(x[s][0], x[s][1], x[s][2], x[s][3]);
                }
            } else {
                const int d = (pair - F)*2;
                uint8_t * to = smem + AT_SLOW + h*KC*S_NEXT + (d >> 3)*S_NEXT + (d & 7)*2;
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    // channel kp of the order in which codes are unpacked is row m, so that a thread's four sums are neighbours
                    const int kp = core*8 + e;
                    const int m = (kp >> 1 & 1)*64 + (kp >> 5)*16 + (kp & 1)*8 + (kp >> 2 & 7);
                    *(uint32_t *)(to + (m >> 3)*128 + (m & 7)*16) = __byte_perm(x[0][e >> 1], x[1][e >> 1], e & 1 ? 0x7632 : 0x5410);
                }
            }
        }
    }
    for (int i = (int) threadIdx.x - (THREADS - 16); i >= 0 && i < 16; i += THREADS) {
        // .x: first word's byte, .y: shift within the word | bits << 8, .z: 2^bits - 1, .w: -(2^bits - 1)/2 as f16, twice
        const uint32_t seg = i < gk.rank/8 ? p.k.segs[gk.seg0 + i] : gk.row_offset;
        const uint32_t bits = seg >> 24;
        const uint32_t at = (seg & 0xffffff) - (gk.row_offset & ~3);
        const float middle = -0.5f*((1u << bits) - 1)*(1.0f/512);
        sm_seg[i] = make_uint4(at & ~3u, (at & 3)*8 | bits << 8, ((1u << bits) - 1)*0x00010001u, pack_f16(middle, middle));
    }
    // what a fast pair of a key at cell i of a tile is rotated by
    for (int i = (int) threadIdx.x - 512; i >= 0 && i < GF*128; i += THREADS - 512) {
        const int row = (i & 127) >> 5 << 4 | (i & 31) >> 2;
        uint32_t x[4];
        for (int j = 0; j < 2; j++) {
            float sn[2], cs[2];
            for (int k = 0; k < 2; k++) {
                sincos_turn((uint64_t)(row + j*8)*p.rope.turn[(i >> 7)*8 + (i & 3)*2 + k], sn[k], cs[k]);
            }
            x[j] = pack_f16(cs[0], cs[1]);
            x[2 + j] = pack_f16(sn[0], sn[1]);
        }
        ((uint4 *)(smem + AT_TRIG))[i] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    // columns that are no heads
    for (int i = threadIdx.x; i < NS*128; i += THREADS) {
        *(uint4 *)(smem + AT_W + i*16) = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x < 16) {
        *(float *)(smem + AT_TOP + threadIdx.x*4) = NONE;
    }
    // where no pair's means come to stand
    for (int i = threadIdx.x; i < 896/16; i += THREADS) {
        *(uint4 *)(smem + AT_VM + i*16) = make_uint4(0, 0, 0, 0);
    }
    // Bessel factors of the slow pairs J_n(REACH/2*t), with what i^n does to the sign; also as fragments of a product over pairs
    if (wg == NS + 4 && tid < 48) {
        const float x = tid < 64 - F ? (float)(int64_t) p.rope.turn[F + tid]*(float)(2*3.14159265358979*REACH/2/18446744073709551616.0)*0.5f : 0.0f;
        float lead = tid < 64 - F ? 1.0f : 0.0f;
        for (int n = 0; n < 8; n++) {
            float term = 1.0f;
            float sum = 1.0f;
#pragma unroll 1
            for (int k = 1; k < 10; k++) {
                term *= __fdividef(-x*x, (float)(k*(n + k)));
                sum += term;
            }
            const __half j = __float2half_rn(lead*sum*(n == 0 ? 1.0f : 2.0f)*(n & 2 ? -1.0f : 1.0f));
            lead *= __fdividef(x, n + 1.0f);
            *(__half *)(smem + AT_J + ((tid >> 4)*32 + n*4 + (tid >> 1 & 3))*8 + (tid >> 3 & 1)*4 + (tid & 1)*2) = j;
            *(__half *)(smem + AT_BESSEL + tid*16 + n*2) = j; // 768 bytes are enough for 48
        }
    }
    // query vectors, a warp per head: with the decoder's scales, all magnitudes together 1; with the mean, the largest 1
    if (wg == NS + 3) {
        const int qh = head0 + warp;
        const float * q = (const float *)((const char *) p.q + stream*p.q_nb_stream + qh*p.q_nb_head);
        const int64_t at = (int64_t) qh*HD;
        int2 dims[2];
        float4 fixed[2]; // scale, mean, magnitude
#pragma unroll
        for (int i = 0; i < 2; i++) {
            dims[i] = __ldg((const int2 *) p.rope.pair_dim + i*32 + lane);
            fixed[i] = make_float4(gk.rank ? p.k.dec_scale[at + dims[i].x] : 0.0f, p.k.mean[at + dims[i].x], p.k.mean[at + dims[i].y], p.rope.mag[i*32 + lane]);
        }
        grid_wait();
        grid_next();
        float4 v[2];
        float all = 0.0f;
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float qa = q[dims[i].x]*fixed[i].w;
            const float qb = q[dims[i].y]*fixed[i].w;
            v[i] = make_float4(qa*fixed[i].x, qb*fixed[i].x, qa*fixed[i].y + qb*fixed[i].z, qb*fixed[i].y - qa*fixed[i].z);
            all += fabsf(v[i].x) + fabsf(v[i].y);
            top = fmaxf(top, fmaxf(fabsf(v[i].z), fabsf(v[i].w)));
        }
        all = warp_sum(all);
        top = warp_max(top);
        const float f = all > 0.0f ? 1.0f/all : 0.0f;
        const float g = top > 0.0f ? 1.0f/top : 0.0f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sm_vec[warp*64 + i*32 + lane] = make_float4(v[i].x*f, v[i].y*f, v[i].z*g, v[i].w*g);
        }
        if (lane < 6) {
            // columns 4 to 7 are no heads
            sm_scale[(lane >> 1)*8 + (lane & 1)*4 + warp] =
                LOG2E*(lane >= 4 ? alibi_slope(p.max_bias, p.n_head, qh) : lane & 1 ? 0.0f : lane == 0 ? all*p.scale*512.0f : top*p.scale);
        }
    } else {
        grid_wait();
        grid_next();
    }
    fence_async(); // the decoder is read by wgmma
    __syncthreads();

    // anew, as these would be spilled otherwise
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    tid = thread & 127;
    wg = thread >> 7;
    lane = thread & 31;
    warp = tid >> 5;
    const int l4 = lane >> 2;
    const int quad = lane & 3;

    // named barriers: 5: preparing, 12: score and value warps, 13: value warps
    if (wg == NS + 4) {
        reg_free<COPY_REGS>();
        const int copy_tid = tid & 63;
        if (tid < 64) {
            // keys, and what is needed of single cells: two of them each
            const RowCopy<64> row_copy(copy_tid, rows_k + k_offset, gk.row_end - k_offset, p.k.row_bytes, p.k_stage_words*4, smem_u32(sm_k));
            auto make_cells = [&](int unit) {
#pragma unroll
                for (int i = 0; i < NS; i++) {
                    const int64_t cell = (tile0 + unit*NS + i)*64 + copy_tid;
                    uint32_t scales = 0; // the rows of a masked cell may be anything
                    float mask = -INFINITY;
                    int pos = 0;
                    if (unit*NS + i < n_tile && cell < p.n_kv) {
                        const uint8_t * at_k = rows_k + cell*p.k.row_bytes + k_offset;
                        const uint8_t * at_v = rows_v + cell*p.v.row_bytes + v_offset;
                        const uint32_t k = at_k[0] | at_k[1] << 8;
                        const uint32_t v = at_v[0] | at_v[1] << 8;
                        pos = p.pos[(int64_t) stream*p.n_kv + cell];
                        mask = 0.0f;
                        if (p.mask) {
                            const char * at = (const char *) p.mask + stream*p.mask_nb_stream;
                            mask = p.mask_f16 ? __half2float(((const __half *) at)[cell]) : ((const float *) at)[cell];
                        }
                        if (mask != -INFINITY) {
                            scales = k | v << 16;
                        }
                    }
                    uint32_t * to = (uint32_t *)(smem + AT_CELL + (unit & 3)*REACH*12) + i*64 + copy_tid;
                    to[0] = scales;
                    to[REACH] = __float_as_uint(mask);
                    to[2*REACH] = pos;
                }
                mbar_arrive(bar_cells + (unit & 3)*8);
            };
            make_cells(0);
            for (int unit = 0; unit < n_unit; unit++) {
                const int cell0 = (tile0 + unit*NS)*64;
                if (unit > 0) {
                    mbar_wait(bar_read, (unit & 1) ^ 1); // the last rows have been read, and the cells before them used
                }
                row_copy.copy(0, rows_k + (int64_t) cell0*p.k.row_bytes + k_offset, min(REACH, p.n_kv - cell0), p.k.row_bytes, p.k_stage_words*4,
                    rows_k + (int64_t) p.n_kv*p.k.row_bytes);
                mbar_arrive_copies(bar_rows);
                if (unit + 1 < n_unit) {
                    make_cells(unit + 1);
                }
            }
        } else {
            const int stage_bytes = VT*p.v_stage_words*4;
            const RowCopy<64> row_copy(copy_tid, rows_v + v_offset, gv.row_end - v_offset, p.v.row_bytes, p.v_stage_words*4, smem_u32(sm_v));
            const uint8_t * src = rows_v + (int64_t) tile0*64*p.v.row_bytes + v_offset;
            int left = min(n_tile*64, p.n_kv - tile0*64);
            for (int unit = 0; unit < n_unit; unit++) {
#pragma unroll 1
                for (int i = 0; i < NS*VSTAGES; i++) {
                    mbar_wait(bar_summed + i*8, (unit & 1) ^ 1);
                    row_copy.copy(i*stage_bytes, src, min(VT, left), p.v.row_bytes, p.v_stage_words*4, rows_v + (int64_t) p.n_kv*p.v.row_bytes);
                    mbar_arrive_copies(bar_values + i*8);
                    left -= VT;
                    src += VT*p.v.row_bytes;
                }
            }
        }
    } else if (wg == NS + 3) {
        reg_free<PREP_REGS>();
        const uint64_t desc_slow = wgmma_factor(base_u32 + AT_SLOW, S_NEXT, 128);
        const uint64_t desc_q = wgmma_factor(base_u32 + AT_Q, Q_NEXT, 128);
        // Pairs of heads that this thread turns: first a slow one, then a slow or a fast one, the same for all of a warp.
        constexpr int SLOW = 64 - F;
        const int slow_head[2] = { tid/SLOW, (128 + tid)/SLOW };
        const int slow_pair[2] = { tid%SLOW, (128 + tid)%SLOW };
        const int n_slow = 128 + tid < HS*SLOW ? 2 : 1;
        const int fast = 128 + tid - HS*SLOW;
        const int fast_head = fast/F;
        const int fast_pair = fast%F;
        const uint64_t turn[2] = { p.rope.turn[F + slow_pair[0]], p.rope.turn[n_slow == 2 ? F + slow_pair[1] : fast_pair] };
        const int to_fast = ((fast_pair >> 3)*HS + fast_head)*32 + (fast_pair >> 1 & 3)*8 + (fast_pair & 1)*2;
        const int to_w = (warp*4 + (l4 >> 1))*W_NEXT + quad*32 + (l4 & 1)*8;

        // weights of a unit's cells for one head per warp, once the score warps are done with its last pass
        float top = NONE;
        float sum = 0.0f;
        float sum_v = 0.0f;
        int next = 0;                            // unit
        int last_pass = -3;                      // of it, if it has been prepared
        int last_pass_1 = -3;                    // and of the one after it
        auto weigh = [&]() {
            const float * at = (const float *)(smem + AT_X) + ((next & 1)*HS + warp)*X_NEXT + lane;
            const float * cell = (const float *)(smem + AT_CELL + (next & 3)*REACH*12) + lane;
            const float slope = sm_scale[16 + warp];
            float x[NS*2];
            bool higher = false;
#pragma unroll
            for (int i = 0; i < NS*2; i++) {
                x[i] = at[i*32];
            }
            if (__builtin_expect(p.softcap != 0.0f, 0)) {
#pragma unroll
                for (int i = 0; i < NS*2; i++) {
                    x[i] = p.softcap*LOG2E*tanhf(x[i]/(p.softcap*LOG2E));
                }
            }
#pragma unroll
            for (int i = 0; i < NS*2; i++) {
                x[i] += slope*cell[REACH + i*32];
                higher |= x[i] > top;
            }
            if (__any_sync(0xffffffff, higher)) {
                float y = top;
#pragma unroll
                for (int i = 0; i < NS*2; i++) {
                    y = fmaxf(y, x[i]);
                }
                y = warp_max(y);
                const float fix = exp2f(top - y);
                sum *= fix;
                sum_v *= fix;
                top = y;
            }
            mbar_wait(bar_used + (next & 1)*8, (next >> 1 & 1) ^ 1); // the weights before these have been used
#pragma unroll
            for (int i = 0; i < NS*2; i++) {
                const float e = exp2_fast(x[i] - top);
                sum += e;
                const __half w = __float2half_rn(e*__high2float(((const __half2 *) cell)[i*32])*P_SCALE);
                sum_v += __half2float(w);
                *(__half *)(smem + AT_W + ((i >> 1)*2 + (next & 1))*1024 + ((i & 1)*32 + lane)*16 + warp*2) = w;
            }
            if (lane == 0) {
                *(float *)(smem + AT_TOP + (next & 1)*32 + warp*4) = top;
            }
            __syncwarp();
            if (lane == 0) {
                mbar_arrive(bar_ready + (next & 1)*8);
            }
            next++;
            last_pass = last_pass_1;
        };
        int pass = 0;
        for (int unit = 0; unit < n_unit; unit++) {
            mbar_wait(bar_cells + (unit & 3)*8, unit >> 2 & 1);
            // of cells lane, 32 + lane and so on
            int my_pos[NS*2];
            uint32_t used = 0;
#pragma unroll
            for (int i = 0; i < NS*2; i++) {
                const uint32_t * at = (const uint32_t *)(smem + AT_CELL + (unit & 3)*REACH*12) + i*32 + lane;
                my_pos[i] = at[2*REACH];
                used |= (uint32_t)(at[REACH] != 0xff800000) << i;
            }
            uint32_t left = used; // cells to cover
            bool more;
#pragma unroll 1
            do {
                int lo = 0x7fffffff;
#pragma unroll
                for (int i = 0; i < NS*2; i++) {
                    lo = left >> i & 1 ? min(lo, my_pos[i]) : lo;
                }
                lo = __reduce_min_sync(0xffffffff, lo);
                lo = lo == 0x7fffffff ? 0 : lo;
#pragma unroll
                for (int i = 0; i < NS*2; i++) {
                    left &= (uint32_t) my_pos[i] - (uint32_t) lo < REACH ? ~(1u << i) : ~0u;
                }
                more = __any_sync(0xffffffff, left != 0);
                bool in_order = true;
#pragma unroll
                for (int i = 0; i < NS*2; i++) {
                    in_order &= !(used >> i & 1) || my_pos[i] - lo == i*32 + lane;
                }
                in_order = __all_sync(0xffffffff, in_order);

                uint8_t * slot = smem + AT_SLOT + (pass & 1)*SLOT;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (i < n_slow) {
                        const float4 vec = sm_vec[slow_head[i]*64 + F + slow_pair[i]];
                        const uint4 bessel = *(const uint4 *)(smem + AT_BESSEL + slow_pair[i]*16);
                        const uint32_t factor[4] = { bessel.x, bessel.y, bessel.z, bessel.w };
                        float sn, cs;
                        sincos_turn(((uint64_t)(int64_t) lo + REACH/2)*turn[i], sn, cs);
                        const float a = vec.x*cs + vec.y*sn;
                        const float b = vec.y*cs - vec.x*sn;
                        const __half2 even = __floats2half2_rn(a, b);
                        const __half2 odd = __floats2half2_rn(b, -a);
                        uint8_t * to_q = smem + AT_Q + slow_head[i]*KC*Q_NEXT + (slow_pair[i] >> 2)*Q_NEXT + (slow_pair[i] & 3)*4;
#pragma unroll
                        for (int n = 0; n < 4; n++) {
                            *(__half2 *)(to_q + n*32) = __hmul2(even, __low2half2(as_half2(factor[n])));
                            *(__half2 *)(to_q + n*32 + 16) = __hmul2(odd, __high2half2(as_half2(factor[n])));
                        }
                        uint8_t * to_vm = smem + AT_VM + slow_head[i]*112 + slow_pair[i]*2;
                        *(__half *) to_vm = __float2half_rn(vec.z*cs + vec.w*sn);
                        *(__half *)(to_vm + HS*112) = __float2half_rn(vec.w*cs - vec.z*sn);
                    }
                }
                fence_async();
                mbar_wait(bar_empty + (pass & 1)*8, (pass >> 1 & 1) ^ 1);
                if (next < unit && last_pass <= pass - 2) {
                    weigh();
                }
                if (n_slow == 1) {
                    const float4 vec = sm_vec[fast_head*64 + fast_pair];
#pragma unroll
                    for (int v = 0; v < NS; v++) {
                        float sn, cs;
                        sincos_turn(((uint64_t)(int64_t) lo + v*64)*turn[1], sn, cs);
                        __half * to = (__half *)(slot + SLOT_Q + v*GF*128 + to_fast);
                        to[0] = __float2half_rn(vec.x*cs + vec.y*sn);
                        to[2] = __float2half_rn(vec.y*cs - vec.x*sn);
                        to = (__half *)(slot + SLOT_M + v*GF*128 + to_fast);
                        to[0] = __float2half_rn(vec.z*cs + vec.w*sn);
                        to[2] = __float2half_rn(vec.w*cs - vec.z*sn);
                    }
                }
                if (tid == 0) {
                    *(int4 *)(slot + SLOT_HEAD) = make_int4(lo, more, in_order, 0);
                }
                bar_sync(5, 128); // queries are turned
                if (warp == 0) {
                    // the mean's coefficients: rows are the heads' first sides, then second sides, for even and odd n
                    float mc[4] = {};
#pragma unroll
                    for (int k = 0; k < 3; k++) {
                        const uint32_t * at = (const uint32_t *)(smem + AT_VM + l4*112 + k*32 + quad*4);
                        const uint2 b = *(const uint2 *)(smem + AT_J + (k*32 + lane)*8);
                        mma_f16(mc, at[0], 0, at[4], 0, b.x, b.y);
                    }
                    *(__half *)(slot + SLOT_MC + (l4 & 3)*16 + quad*4 + (l4 >> 2)*2) = __float2half_rn(l4 < 4 ? mc[0] : mc[1]);
                }
#pragma unroll
                for (int h0 = 0; h0 < HS; h0 += 2) {
                    float acc[2][2][4];
                    wgmma_fence();
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#pragma unroll
                        for (int k = 0; k < KC/2; k++) {
#pragma unroll
                            for (int t = 0; t < 2; t++) {
                                wgmma_f8(acc[h][t], desc_slow + (((h0 + h)*KC*S_NEXT + k*2*S_NEXT + t*1024) >> 4), desc_q + (((h0 + h)*KC*Q_NEXT + k*2*Q_NEXT) >> 4), k != 0);
                            }
                        }
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
#pragma unroll
                    for (int h = 0; h < 2; h++) {
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            *(uint2 *)(slot + to_w + (h0 + h)*128 + j*16) = make_uint2(pack_f16(acc[h][0][j], acc[h][0][2 + j]), pack_f16(acc[h][1][j], acc[h][1][2 + j]));
                        }
                    }
                }
                fence_async();
                bar_sync(5, 128); // turned queries have been used, and w_n are there
                if (tid == 0) {
                    mbar_arrive(bar_full + (pass & 1)*8);
                }
                pass++;
            } while (more);
            last_pass = unit == next ? pass - 1 : last_pass;
            last_pass_1 = pass - 1;
        }
        for (int i = max(pass - 2, 0); i < pass; i++) {
            mbar_wait(bar_empty + (i & 1)*8, i >> 1 & 1);
            if (next < n_unit && last_pass <= i) {
                weigh();
            }
        }
        sum = warp_sum(sum);
        sum_v = warp_sum(sum_v);
        if (lane == 0) {
            ((float4 *)(smem + AT_FIN))[warp] = make_float4(top, sum, sum_v*(1.0f/P_SCALE), 0.0f);
        }
        bar_sync(12, 512);
    } else if (wg < NS) {
        reg_alloc<SCORE_REGS>();
        const uint8_t * stage = sm_k + wg*64*p.k_stage_words*4;
        const int row0 = warp*16 + l4;
        const uint64_t desc_fast = wgmma_factor(base_u32 + AT_FAST, 1024, 128);
        const uint64_t desc_w = wgmma_factor(base_u32 + AT_SLOT, W_NEXT, 128);
        // where this thread's first row stands in the stage; the same for every tile and eight rows on, as these are whole 16 bytes
        const uint8_t * my_row = stage + row0*p.k_stage_words*4 + ((uint32_t)((uintptr_t) rows_k + row0*p.k.row_bytes + k_offset) & 12);
        uint32_t small = 0; // blocks of 32 channels with at most 4 bits
        for (int i = 0; i < 4; i++) {
            small |= (uint32_t) __all_sync(0xffffffff, sm_seg[i*4 + quad].y >> 8 <= 4) << i;
        }
        // T_n(x/64), n = 2*quad and 2*quad + 1
        auto chebyshev = [&](int from) -> uint32_t { // from: positions from the smallest that is covered
            const float x = (from - REACH/2)*(2.0f/REACH);
            float a = 1.0f;
            float b = x;
            for (int n = 0; n < quad; n++) {
                a = 2.0f*x*b - a;
                b = 2.0f*x*a - b;
            }
            return (uint32_t) from < REACH ? pack_f16(a, b) : 0;
        };
        const uint32_t table[2] = { chebyshev(wg*64 + row0), chebyshev(wg*64 + row0 + 8) };
        const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
        int pass = 0;
        for (int unit = 0; unit < n_unit; unit++) {
            const uint8_t * slot = smem + AT_SLOT + (pass & 1)*SLOT;
            mbar_wait(bar_full + (pass & 1)*8, pass >> 1 & 1);
            int4 head = *(const int4 *)(slot + SLOT_HEAD);
            const bool regular = head.z;
            int cell_pos[2] = {};
            uint32_t t[2] = { table[0], table[1] };
            if (__builtin_expect(!regular, 0)) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    cell_pos[i] = pos[min((tile0 + unit*NS + wg)*64 + row0 + i*8, p.n_kv - 1)];
                    t[i] = chebyshev(cell_pos[i] - head.x);
                }
            }
            uint4 trig;
            auto load_trig = [&](int g) {
                if (__builtin_expect(regular, 1)) {
                    trig = ((const uint4 *)(smem + AT_TRIG))[g*128 + tid];
                } else {
                    uint32_t x[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float s[2], c[2];
#pragma unroll
                        for (int j = 0; j < 2; j++) {
                            sincos_turn((uint64_t)(int64_t)(cell_pos[i] - head.x - wg*64)*p.rope.turn[g*8 + quad*2 + j], s[j], c[j]);
                        }
                        x[i] = pack_f16(c[0], c[1]);
                        x[2 + i] = pack_f16(s[0], s[1]);
                    }
                    trig = make_uint4(x[0], x[1], x[2], x[3]);
                }
            };
            // the mean's part of the scores, before the products are under way: these would have to wait for them
            float sm[4] = {};
            auto add_mean = [&]() {
                mma_f16(sm, t[0], t[1], 0, 0, *(const uint32_t *)(slot + SLOT_MC + (l4 & 3)*16 + quad*4), 0);
            };
#pragma unroll
            for (int g = 0; g < GF; g++) {
                load_trig(g);
                const uint2 bm = *(const uint2 *)(slot + SLOT_M + wg*GF*128 + (g*HS + (l4 & 3))*32 + quad*8);
                mma_f16(sm, trig.x, trig.y, trig.z, trig.w, bm.x, bm.y);
            }
            add_mean();

            mbar_wait(bar_rows, unit & 1);
            uint32_t z[8][4];
            // codes as subnormals n*2^-24, times 2^15, less the middle: (code - (2^bits - 1)/2)/512
            auto unpack = [&](int s, bool is_small) {
                const uint4 seg = sm_seg[s*4 + quad];
                const uint32_t bits = seg.y >> 8;
                const __half2 by = as_half2(0x78007800u);
                const __half2 middle = as_half2(seg.w);
                if (is_small) {
                    const uint32_t ones1 = seg.z << bits;
                    const __half2 by1 = as_half2(0x78007800u - bits*0x04000400u);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row + i*8*p.k_stage_words*4 + seg.x);
                        const uint32_t x = __funnelshift_r(w[0], w[1], seg.y);
                        const uint32_t y = __byte_perm(x, x >> 4*bits, 0x5410);
                        const uint32_t y2 = y >> 2*bits;
                        z[s*2][i] = as_u32(__hfma2(as_half2(y & seg.z), by, middle));
                        z[s*2][2 + i] = as_u32(__hfma2(as_half2(y & ones1), by1, middle));
                        z[s*2 + 1][i] = as_u32(__hfma2(as_half2(y2 & seg.z), by, middle));
                        z[s*2 + 1][2 + i] = as_u32(__hfma2(as_half2(y2 & ones1), by1, middle));
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row + i*8*p.k_stage_words*4 + seg.x);
                        const uint32_t w1 = w[1];
                        const uint32_t lo = __funnelshift_r(w[0], w1, seg.y);
                        const uint32_t hi = __funnelshift_rc(lo, __funnelshift_r(w1, w[2], seg.y), bits*4);
                        const uint32_t y = __byte_perm(lo, hi, 0x5410);
                        const uint32_t y2 = __byte_perm(lo >> 2*bits, hi >> 2*bits, 0x5410);
                        z[s*2][i] = as_u32(__hfma2(as_half2(y & seg.z), by, middle));
                        z[s*2][2 + i] = as_u32(__hfma2(as_half2(y >> bits & seg.z), by, middle));
                        z[s*2 + 1][i] = as_u32(__hfma2(as_half2(y2 & seg.z), by, middle));
                        z[s*2 + 1][2 + i] = as_u32(__hfma2(as_half2(y2 >> bits & seg.z), by, middle));
                    }
                }
            };
            if (__builtin_expect(small == 15, 1)) {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    unpack(s, true);
                }
            } else {
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    if (small >> s & 1) {
                        unpack(s, true);
                    } else {
                        unpack(s, false);
                    }
                }
            }
            __syncwarp();
            if (lane == 0) {
                mbar_arrive(bar_read);
            }

            // two blocks of fast pairs in turn: while one is multiplied, the other is rotated
            uint32_t key[2][16];
            uint32_t near[8];
            auto multiply = [&](uint32_t (&to)[16], int g) {
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < 8; s++) {
                    wgmma_h64(to, z[s], desc_fast + ((g*16384 + s*2048) >> 4), s != 0);
                }
                wgmma_commit();
            };
            auto multiply_near = [&]() {
                const uint64_t desc = desc_w + (pass & 1)*(SLOT >> 4);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < 8; s++) {
                    wgmma_h32(near, z[s], desc + (s*2*W_NEXT >> 4), s != 0);
                }
                wgmma_commit();
            };
            multiply(key[0], 0);
            multiply(key[1], 1);
            // per head and row, of pairs 2*quad and 2*quad + 1: the fast ones' parts of the score
            __half2 part[8] = {};
            auto rotate = [&](uint32_t (&from)[16], int g) {
                const uint8_t * at = slot + SLOT_Q + wg*GF*128 + g*HS*32 + quad*8;
                const __half2 cs[2] = { as_half2(trig.x), as_half2(trig.y) };
                const __half2 sn[2] = { as_half2(trig.z), as_half2(trig.w) };
#pragma unroll
                for (int h = 0; h < HS; h++) {
                    const uint2 q = *(const uint2 *)(at + h*32);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const __half2 ka = as_half2(from[h*4 + i]);
                        const __half2 kb = as_half2(from[h*4 + 2 + i]);
                        part[h*2 + i] = __hfma2(as_half2(q.x), __hfma2(ka, cs[i], __hneg2(__hmul2(kb, sn[i]))), part[h*2 + i]);
                        part[h*2 + i] = __hfma2(as_half2(q.y), __hfma2(ka, sn[i], __hmul2(kb, cs[i])), part[h*2 + i]);
                    }
                }
            };
            auto add_near = [&]() {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    part[i] = __hfma2(as_half2(near[i]), as_half2(t[i & 1]), part[i]);
                }
            };
            auto release = [&]() {
                __syncwarp();
                if (lane == 0) {
                    mbar_arrive(bar_empty + (pass & 1)*8);
                }
                pass++;
            };
#pragma unroll
            for (int g = 0; g < GF; g++) {
                load_trig(g);
                wgmma_wait<1>();
                rotate(key[g & 1], g);
                if (g + 2 < GF) {
                    multiply(key[g & 1], g + 2);
                } else if (g + 2 == GF) {
                    multiply_near();
                }
            }
            wgmma_wait<0>();
            add_near();
#pragma unroll 1
            while (__builtin_expect(head.y, 0)) {
                release();
                slot = smem + AT_SLOT + (pass & 1)*SLOT;
                mbar_wait(bar_full + (pass & 1)*8, pass >> 1 & 1);
                multiply_near();
                // not what an earlier pass covered
                const int lo = head.x;
                head = *(const int4 *)(slot + SLOT_HEAD);
                t[0] = cell_pos[0] - lo < REACH ? 0 : chebyshev(cell_pos[0] - head.x);
                t[1] = cell_pos[1] - lo < REACH ? 0 : chebyshev(cell_pos[1] - head.x);
                wgmma_wait<0>();
                add_near();
                add_mean();
            }
            // a head's parts are summed by a product with ones in the head's column
            float sq[4] = {};
#pragma unroll
            for (int h = 0; h < HS; h += 2) {
                mma_f16(sq, as_u32(part[h*2]), as_u32(part[h*2 + 1]), as_u32(part[h*2 + 2]), as_u32(part[h*2 + 3]),
                    l4 == h ? 0x3c003c00u : 0, l4 == h + 1 ? 0x3c003c00u : 0);
            }

            const float2 fq = *(const float2 *)(sm_scale + quad*2);
            const float2 fm = *(const float2 *)(sm_scale + 8 + quad*2);
            const __half2 * cell = (const __half2 *)(smem + AT_CELL + (unit & 3)*REACH*12) + wg*64 + row0; // there since positions were used
            float * to = (float *)(smem + AT_X) + ((unit & 1)*HS + quad*2)*X_NEXT + wg*64 + row0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float scale_k = __low2float(cell[i*8]);
                const float x0 = scale_k*fq.x*sq[i*2] + sm[i*2]*fm.x;
                const float x1 = scale_k*fq.y*sq[i*2 + 1] + sm[i*2 + 1]*fm.y;
                if (quad < 2) {
                    to[i*8] = x0;
                    to[X_NEXT + i*8] = x1;
                }
            }
            release();
        }
    } else {
        reg_free<VALUE_REGS>();
        const int value_warp = (thread - NS*128) >> 5;
        const int my_tile = value_warp/6; // of the NS at a time
        const int unit_v = value_warp%6;  // of 64 channels
        const int seg_v = unit_v*8 + l4;
        const uint32_t seg = seg_v < gv.rank/8 ? p.v.segs[gv.seg0 + seg_v] : v_offset;
        const uint32_t bits = seg >> 24;
        const uint32_t seg_shift = ((seg & 0xffffff) - (v_offset & ~3) & 3)*8;
        const bool small = __all_sync(0xffffffff, bits <= 4); // all of the warp's segments
        // where this thread's segment of its cells stands in a stage; the same for every step, because 32 rows are a multiple of 16 bytes
        uint32_t my_seg[2]; // of cells 2*quad and 2*quad + 1; eight rows on, a row's place modulo 16 bytes is the same
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = quad*2 + i;
            const uint32_t in16 = (uint32_t)((uintptr_t) rows_v + t*p.v.row_bytes + v_offset) & 12;
            my_seg[i] = (uint32_t)(sm_v - smem) + (my_tile*VSTAGES*VT + t)*p.v_stage_words*4 + in16 + ((seg & 0xffffff) - (v_offset & ~3) & ~3u);
        }
        float acc[4][4] = {};
        float top = NONE; // of column l4, that sums refer to
#pragma unroll 1
        for (int unit = 0; unit < n_unit; unit++) {
            const int from = my_tile*2 + (unit & 1);
            uint32_t at[2] = { my_seg[0], my_seg[1] };
            asm volatile("" : "+r"(at[0]), "+r"(at[1])); // addresses that are computed before the loop need registers
            mbar_wait(bar_ready + (unit & 1)*8, unit >> 1 & 1);
            const float new_top = *(const float *)(smem + AT_TOP + (unit & 1)*32 + l4*4);
            if (__any_sync(0xffffffff, new_top != top)) {
                const float fix = exp2f(top - new_top);
                const float fix0 = __shfl_sync(0xffffffff, fix, quad*8);
                const float fix1 = __shfl_sync(0xffffffff, fix, quad*8 + 4);
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    acc[m][0] *= fix0;
                    acc[m][1] *= fix1;
                    acc[m][2] *= fix0;
                    acc[m][3] *= fix1;
                }
                top = new_top;
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                // of a score warp's 16 cells: 2*quad, 2*quad + 1, 2*quad + 8, 2*quad + 9 for column l4
                uint32_t weight[2][2];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                    : "=r"(weight[0][0]), "=r"(weight[0][1]), "=r"(weight[1][0]), "=r"(weight[1][1])
                    : "r"(base_u32 + AT_W + from*1024 + (n*32 + lane)*16) : "memory");
                if (n == 1) {
                    __syncwarp();
                    if (lane == 0) {
                        mbar_arrive(bar_used + (unit & 1)*8);
                    }
                }
                mbar_wait(bar_values + (my_tile*VSTAGES + n)*8, unit & 1);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    uint32_t x[8][2];
                    value_codes(x, small, bits, seg_shift, [&](int, int i) {
                        const uint32_t * words = (const uint32_t *)(smem + at[i]);
                        at[i] += 8*p.v_stage_words*4;
                        return words;
                    });
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        mma_f16(acc[m], x[m*2][0], x[m*2 + 1][0], x[m*2][1], x[m*2 + 1][1], weight[k][0], weight[k][1]);
                    }
                }
                __syncwarp();
                if (lane == 0) {
                    mbar_arrive(bar_summed + (my_tile*VSTAGES + n)*8);
                }
            }
        }
        bar_sync(12, 512); // the sums of weights are there, and decoders have been used
        const float4 * fin = (const float4 *)(smem + AT_FIN);
        // both tiles' sums together, where the decoder was
        float * both = (float *)(smem + AT_FAST) + unit_v*512 + lane;
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (my_tile == 1) {
                    both[(m*4 + j)*32] = acc[m][j];
                }
            }
        }
        bar_sync(13, 384);
        if (my_tile == 1) {
            return;
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                acc[m][j] += both[(m*4 + j)*32];
            }
        }
        auto dst_of = [&](int col) {
            return p.partial + (((int64_t) stream*p.n_head + head0 + col)*p.n_chunk + blockIdx.x)*(4 + p.rank_stride);
        };
        if (unit_v == 0 && quad == 0 && l4 < HS) {
            const float4 x = fin[l4];
            *(float4 *) dst_of(l4) = make_float4(x.x == NONE ? -INFINITY : x.x, x.y, x.z, 0.0f);
        }
        if (quad < 2 && seg_v < gv.rank/8) {
            constexpr float f = 16777216.0f/P_SCALE;
            const float f1 = small ? f/(1 << bits) : f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float * dst = dst_of(quad*2 + j) + 4 + seg_v*8;
                *(float4 *) dst = make_float4(acc[0][j]*f, acc[0][2 + j]*f1, acc[1][j]*f, acc[1][2 + j]*f1);
                *(float4 *)(dst + 4) = make_float4(acc[2][j]*f, acc[2][2 + j]*f1, acc[3][j]*f, acc[3][2 + j]*f1);
            }
        }
    }
}

#endif

#ifdef PALU_SM90
#define PALU_DECODE_CHEB(GF, NS) \
    extern "C" __global__ void __launch_bounds__((NS + 5)*128, 1) palu_decode_sm90_cheb_##GF##_##NS(const __grid_constant__ palu_cuda_attn p) { decode_sm90_cheb<GF, NS>(p); }
#else
#define PALU_DECODE_CHEB(GF, NS) \
    extern "C" __global__ void palu_decode_sm90_cheb_##GF##_##NS(const __grid_constant__ palu_cuda_attn p) {}
#endif
PALU_CUDA_CHEB_KERNELS(PALU_DECODE_CHEB)
