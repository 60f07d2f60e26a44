// decode_sm90.cuh - decode attention for few query rows on sm_90a.
//
// A block works on HS KV heads of one key group and one chunk of the context, with their slice of the integer decoder
// resident in shared memory. Score warpgroups take tiles of 64 cells in turn, a value warpgroup follows them:
//
//   score   unpack the rows' codes into registers, in the layout that wgmma wants for A (no unpacked code is ever written to
//           memory); keys as integers = codes (s8) x decoder (s8), 128 columns at a time; rotate, to f16; scores by mma with
//           the queries. Columns stand so that a thread has both dimensions of a RoPE pair.
//   value   online softmax; values summed as codes by mma: codes as f16 subnormals (code*2^-24, no conversion needed)
//           times weight*row scale.
//
// RoPE: queries are rotated back by the position of a tile's first cell, keys forward by what is left. While positions are
// consecutive that is the same for every tile and comes from a table; otherwise it is computed.
// The mean and the half that centred codes leave are the same for all cells but for the rotation: two more products of
// the table of cosines and sines with vectors made from the query.
#pragma once

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PALU_SM90 1
#endif

#ifdef PALU_SM90

static __device__ __forceinline__ uint32_t smem_u32(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

static __device__ __forceinline__ void cp_async16_cg(uint32_t dst, const void * src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(dst), "l"(src) : "memory");
}
static __device__ __forceinline__ void cp_async_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
// 2^x for x <= 0
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <int N> static __device__ __forceinline__ void reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> static __device__ __forceinline__ void reg_free() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
static __device__ __forceinline__ void bar_sync(int id, int n) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(n) : "memory");
}
static __device__ __forceinline__ void mbar_init(uint32_t bar, int n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(n) : "memory");
}
static __device__ __forceinline__ void mbar_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
static __device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra wait;\n}\n" :: "r"(bar), "r"(parity) : "memory");
}
static __device__ __forceinline__ void mbar_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void bulk_copy(uint32_t dst, const void * src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(dst), "l"(src), "r"(bytes), "r"(bar) : "memory");
}
static __device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// what this thread wrote to shared memory is seen by products and bulk copies
static __device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// d[64][64] (+)= a[64][32] b[64][32]; b in shared memory, 8x16-byte blocks without swizzle
static __device__ __forceinline__ void wgmma_64(int (&d)[32], const uint32_t (&a)[4], uint64_t desc_b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]),
          "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]),
          "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
          "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b), "r"(accumulate));
}

// c[16][8] += a[16][16] b[16][8], f16 to f32
static __device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
    const __half2 h = __floats2half2_rn(lo, hi);
    return *(const uint32_t *) &h;
}
static __device__ __forceinline__ float2 unpack_f16(uint32_t x) {
    return __half22float2(*(const __half2 *) &x);
}

// Copies a span of rows from global to shared memory with 128 threads, 16 bytes at a time: a row's span lands at the same
// place modulo 16 as it has in global memory. Every thread copies one column of 16 bytes, from every step-th row.
struct Stager {
    uint32_t row0;   // first row; >= rows: nothing to do
    uint32_t step;
    uint32_t unit16; // byte of the column
    uint32_t span;
    uint32_t row_bytes;
    uint32_t stride; // of a row in shared memory

    __device__ __forceinline__ Stager(int tid, int span, int row_bytes, int stride) : span(span), row_bytes(row_bytes), stride(stride) {
        const uint32_t n_unit = (span + 30)/16;
        step = 128/n_unit;
        row0 = tid/n_unit;
        unit16 = tid%n_unit*16;
        if (row0 >= step) {
            row0 = 0x40000000;
        }
    }
    // rows [0, n) from src on, in memory that ends at end
    __device__ __forceinline__ void copy(uint32_t dst, const uint8_t * src, int n, const uint8_t * end) const {
        const uint8_t * base = (const uint8_t *)((uintptr_t) src & ~(uintptr_t) 15);
        uint32_t at = (uint32_t)(src - base) + row0*row_bytes;
        const int64_t left = end - base;
        const uint32_t limit = left < 0x40000000 ? (uint32_t) left : 0x40000000;
        dst += row0*stride + unit16;
        for (int row = row0; row < n; row += step) {
            const uint32_t from = (at & ~15u) + unit16;
            if (from < at + span && from + 15 < limit) {
                cp_async16_cg(dst, base + from);
            }
            at += step*row_bytes;
            dst += step*stride;
        }
        if (n > (int) row0 && limit < (uint32_t)(src - base) + n*row_bytes + 16) {
            // the last row's memory may end within 16 bytes: its last words, by the thread that would have copied them
            at -= step*row_bytes;
            dst -= step*stride;
            const uint32_t from = (at & ~15u) + unit16;
            for (uint32_t i = 0; from < at + span && from + 15 >= limit && from + i < limit; i += 4) {
                asm volatile("st.shared.u32 [%0], %1;" :: "r"(dst + i), "r"(*(const uint32_t *)(base + from + i)) : "memory");
            }
        }
    }
};

// Four codes of `bits` bits to four bytes, centred around 128. ones = 2^bits - 1 in every byte, bias = 128 - 2^(bits - 1) in every byte.
static __device__ __forceinline__ uint32_t spread_u8(uint32_t x, int bits, uint32_t ones, uint32_t bias) {
    const uint32_t t = x << (16 - 2*bits);
    const uint32_t y = (x & 0x0000ffffu) | (t & 0xffff0000u);
    const uint32_t u = y << (8 - bits);
    const uint32_t z = (y & 0x00ff00ffu) | (u & 0xff00ff00u);
    return (z & ones) + bias; // no carry between bytes
}
// The same centred around zero, signed.
static __device__ __forceinline__ uint32_t spread_s8(uint32_t x, int bits, uint32_t ones, uint32_t bias) {
    return spread_u8(x, bits, ones, bias) ^ 0x80808080u;
}

static __device__ __forceinline__ __half2 as_half2(uint32_t x) {
    return *(const __half2 *) &x;
}
static __device__ __forceinline__ uint32_t as_u32(__half2 x) {
    return *(const uint32_t *) &x;
}

// A thread's eight codes of a segment of values, of four cells: words(j, i) is where those of cell 8*j + i begin, at bit `shift` modulo 32
// of a word. Two cells' codes stand side by side as f16 subnormals. small: no more than 4 bits, for all threads of the warp, so that a
// segment is within one word. Codes 2*m and 2*m + 1 are y[m][j] and y[m][j] >> bits, but for what stands above them.
template <typename W> static __device__ __forceinline__ void value_code_pairs(uint32_t (&y)[4][2], bool small, uint32_t bits, uint32_t shift, W words) {
    if (small) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t lo[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t * w = words(j, i);
                lo[i] = __funnelshift_r(w[0], w[1], shift);
            }
            y[0][j] = __byte_perm(lo[0], lo[1], 0x5410);
            y[2][j] = __byte_perm(lo[0] >> 4*bits, lo[1] >> 4*bits, 0x5410);
            y[1][j] = y[0][j] >> 2*bits;
            y[3][j] = y[2][j] >> 2*bits;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            uint32_t lo[2], hi[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t * w = words(j, i);
                const uint32_t w1 = w[1];
                lo[i] = __funnelshift_r(w[0], w1, shift);
                hi[i] = __funnelshift_rc(lo[i], __funnelshift_r(w1, w[2], shift), bits*4);
            }
            y[0][j] = __byte_perm(lo[0], lo[1], 0x5410);
            y[1][j] = __byte_perm(lo[0] >> 2*bits, lo[1] >> 2*bits, 0x5410);
            y[2][j] = __byte_perm(hi[0], hi[1], 0x5410);
            y[3][j] = __byte_perm(hi[0] >> 2*bits, hi[1] >> 2*bits, 0x5410);
        }
    }
}
// One by one: x[c][j] is code c; where small, every other code is left where it is, 2^bits times as large.
template <typename W> static __device__ __forceinline__ void value_codes(uint32_t (&x)[8][2], bool small, uint32_t bits, uint32_t shift, W words) {
    const uint32_t ones = ((1u << bits) - 1)*0x00010001u;
    uint32_t y[4][2];
    if (small) {
        const uint32_t ones1 = ones << bits;
        value_code_pairs(y, true, bits, shift, words);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i/2*2][i%2] = y[i/2][i%2] & ones;
            x[i/2*2 + 1][i%2] = y[i/2][i%2] & ones1;
        }
    } else {
        value_code_pairs(y, false, bits, shift, words);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i/2*2][i%2] = y[i/2][i%2] & ones;
            x[i/2*2 + 1][i%2] = y[i/2][i%2] >> bits & ones;
        }
    }
}

// One block of 64 columns: rotates HS heads' keys, 8 pairs at a time, and adds their scores. SCALE: integers are too large
// for f16.
template <int HS, bool SCALE> static __device__ __forceinline__ void rotate_and_score(
        const int (&acc)[32], float (&sq)[HS][4], float (&sm)[4], float (&sh)[4], float pre, bool regular, const uint4 * sm_trig,
        const uint2 * frag_q, const uint4 * frag_b, const uint64_t * turn, const int (&dpos)[2], int gp0, int tid) {
    const int lane = tid & 31;
#pragma unroll
    for (int g = 0; g < 4/HS; g++) {
        const int gp = gp0 + g;
        uint4 trig;
        if (regular) {
            trig = sm_trig[gp*128 + tid];
        } else {
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float s[2], c[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    sincos_turn((uint64_t) (int64_t) dpos[i]*turn[gp*8 + (lane & 3)*2 + j], s[j], c[j]);
                }
                x[i] = pack_f16(c[0], c[1]);
                x[2 + i] = pack_f16(s[0], s[1]);
            }
            trig = make_uint4(x[0], x[1], x[2], x[3]);
        }
        const uint2 bq = frag_q[gp*32 + lane];
        const uint4 bb = frag_b[gp*32 + lane];
        const __half2 cs[2] = { as_half2(trig.x), as_half2(trig.y) };
        const __half2 sn[2] = { as_half2(trig.z), as_half2(trig.w) };
#pragma unroll
        for (int h = 0; h < HS; h++) {
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = (h*(8/HS) + g*2)*4 + i*2;
                float f[4] = { (float) acc[at], (float) acc[at + 1], (float) acc[at + 4], (float) acc[at + 5] };
                if (SCALE) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        f[j] *= pre;
                    }
                }
                const __half2 ka = __floats2half2_rn(f[0], f[1]);
                const __half2 kb = __floats2half2_rn(f[2], f[3]);
                x[i] = as_u32(__hfma2(ka, cs[i], __hneg2(__hmul2(kb, sn[i]))));
                x[2 + i] = as_u32(__hfma2(ka, sn[i], __hmul2(kb, cs[i])));
            }
            mma_f16(sq[h], x[0], x[1], x[2], x[3], bq.x, bq.y);
        }
        mma_f16(sm, trig.x, trig.y, trig.z, trig.w, bb.x, bb.y);
        mma_f16(sh, trig.x, trig.y, trig.z, trig.w, bb.z, bb.w);
    }
}

// HD: head_dim; HS: KV heads; KS: key channels/32; UN: value channels/128, rounded up; SCALE: integers are too large
// for f16 (trig_scale < 1); NS, NV: score and value warpgroups
template <int HD, int HS, int KS, int UN, bool SCALE, int NS, int NV>
static __device__ __forceinline__ void decode_sm90(const palu_cuda_attn & p) {
    constexpr int NB = HS*HD/64;    // blocks of 64 columns
    constexpr int GP = HD/16;       // blocks of 8 pairs in a head
    constexpr int GB = 4/HS;        // of them in a block of columns
    static_assert(NB%2 == 0 && NB*GB == GP, "columns must fill blocks of 64, two at a time");
    constexpr int VT = 32;          // cells of a value stage
    constexpr int VSTAGES = 3;
    constexpr int THREADS = (NS + NV)*128;
    constexpr int S_STRIDE = 12;
    // registers of all warpgroups together: 512, or 480 where there are five
    constexpr int SCORE_REGS = NS == 3 ? 96 : NV == 2 ? 152 : 184;
    constexpr int VALUE_REGS = NS == 3 ? 96 : NV == 2 ? 104 : 136;
    constexpr bool TWO_BLOCKS = KS > 8; // with fewer channels the other warps hide more than a second block of columns

    extern __shared__ __align__(16) uint8_t smem_sm90[];
    uint8_t * smem = smem_sm90;
    const int tid = threadIdx.x & 127;
    const int wg = threadIdx.x >> 7;
    const int lane = threadIdx.x & 31;
    const int warp = tid >> 5;
    const int l4 = lane >> 2;
    const int quad = lane & 3;

    const int head0 = blockIdx.y*HS;
    const int stream = blockIdx.z;
    const int gqa = p.n_head/p.k.n_head_kv;
    const int col_head = gqa*p.n_token; // query rows of a KV head
    const int n_col = HS*col_head;
    const palu_cuda_group & gk = p.k.groups[head0/p.k.group_size];
    const palu_cuda_group & gv = p.v.groups[head0/p.v.group_size];

    // shared memory
    uint8_t * sm_dec = smem;                                             // [NB][2*KS][8][8][16]
    uint8_t * sm_trig = sm_dec + NB*KS*2048;                             // [GP][128] uint4
    uint8_t * sm_frag = sm_trig + GP*128*16;                             // [NS][GP][32] uint2, then [NS][GP][32] uint4
    uint4   * sm_vec = (uint4 *)(sm_frag + NS*GP*32*24);                  // [8][HD/2]
    uint8_t * sm_k = (uint8_t *)(sm_vec + 8*HD/2);                       // [NS][64][k_stage_words]
    uint8_t * sm_v = sm_k + NS*64*p.k_stage_words*4;                     // [NV][VSTAGES][VT][v_stage_words]
    float   * sm_s = (float *)(sm_v + NV*VSTAGES*VT*p.v_stage_words*4 + 64);// [NS][64][S_STRIDE]
    float   * sm_top = sm_s + NS*64*S_STRIDE;                            // [NS][4][8]
    uint4   * sm_seg = (uint4 *)(sm_top + NS*32);                        // [KS*4]
    float   * sm_scale = (float *)(sm_seg + KS*4);                       // [3][8]
    uint64_t * sm_bar = (uint64_t *)(sm_scale + 24);                     // [2][NS]: scores are ready, scores have been read

    const int tile0 = blockIdx.x*p.part.chunk_tiles;
    const int n_tile = min(p.part.chunk_tiles, (p.n_kv + 63)/64 - tile0);

    // rows
    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;
    const int span_k = gk.row_end - gk.row_offset;
    const int span_v = gv.row_end - gv.row_offset;
    const bool scores = wg < NS;
    const Stager stager(tid, scores ? span_k : span_v, scores ? p.k.row_bytes : p.v.row_bytes, (scores ? p.k_stage_words : p.v_stage_words)*4);
    auto stage_k = [&](int tile) {
        const int cell0 = tile*64;
        stager.copy(smem_u32(sm_k) + wg*64*p.k_stage_words*4, rows_k + (int64_t) cell0*p.k.row_bytes + gk.row_offset,
            min(64, p.n_kv - cell0), rows_k + (int64_t) p.n_kv*p.k.row_bytes);
        cp_async_commit();
    };
    // a value warpgroup's step: a half tile; with two, each has its half of every tile
    const int value_wg = wg - NS;
    auto stage_v = [&](int step) {
        const int half = NV == 2 ? step*2 + value_wg : step;
        if (half < n_tile*2) {
            const int cell0 = tile0*64 + half*VT;
            stager.copy(smem_u32(sm_v) + (value_wg*VSTAGES + step%VSTAGES)*VT*p.v_stage_words*4, rows_v + (int64_t) cell0*p.v.row_bytes + gv.row_offset,
                min(VT, p.n_kv - cell0), rows_v + (int64_t) p.n_kv*p.v.row_bytes);
        }
        cp_async_commit();
    };

    if (threadIdx.x < NS) {
        mbar_init(smem_u32(sm_bar + threadIdx.x), 128);
        mbar_init(smem_u32(sm_bar + NS + threadIdx.x), 128*NV);
    }

    // decoder: rows (head, 8 pairs, first or second dimension, pair) in blocks of 64
    {
        const int n = threadIdx.x & 63;
        const int8_t * src[NB];
#pragma unroll
        for (int b = 0; b < NB; b++) {
            const int pair = b*(32/HS) + n%(64/HS)/16*8 + n%8;
            src[b] = p.k.dec + gk.dec0 + (int64_t)((head0%p.k.group_size + n/(64/HS))*HD + p.rope.pair_dim[pair*2 + (n >> 3 & 1)])*gk.rank_pad;
        }
#pragma unroll
        for (int b = 0; b < NB; b++) {
            for (int c = threadIdx.x >> 6; c < 2*KS; c += THREADS/64) {
                uint8_t * dst = sm_dec + (b*2*KS + c)*1024 + n*16;
                if (c*16 < gk.rank_pad) {
                    cp_async16_cg(smem_u32(dst), src[b] + c*16);
                } else {
                    *(uint4 *) dst = make_uint4(0, 0, 0, 0);
                }
            }
        }
    }
    for (int i = threadIdx.x; i < KS*4; i += THREADS) {
        // .x: first word's byte, .y: shift within the word | bits << 8, .z, .w: as spread_s8 wants them
        const uint32_t seg = i < gk.rank/8 ? p.k.segs[gk.seg0 + i] : gk.row_offset;
        const uint32_t bits = seg >> 24;
        const uint32_t at = (seg & 0xffffff) - (gk.row_offset & ~3);
        sm_seg[i] = make_uint4(at & ~3u, (at & 3)*8 | bits << 8, ((1u << bits) - 1)*0x01010101u, (bits ? 128u - (1u << (bits - 1)) : 128u)*0x01010101u);
    }
    // table: what a key at cell i of a tile is rotated by
    for (int i = threadIdx.x; i < GP*128; i += THREADS) {
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
        ((uint4 *) sm_trig)[i] = make_uint4(x[0], x[1], x[2], x[3]);
    }
    // fragments of columns without a query stay zero
    for (int i = threadIdx.x; i < NS*GP*32*24/16; i += THREADS) {
        ((uint4 *) sm_frag)[i] = make_uint4(0, 0, 0, 0);
    }
    grid_wait();
    grid_next();
    // first rows on their way
    if (scores) {
        if (wg < n_tile) {
            stage_k(tile0 + wg);
        }
    } else {
        stage_v(0);
        stage_v(1);
    }

    // query vectors: with the decoder's scales; with the mean; with the halves. A warp per column; to f16 range, with a
    // factor for each vector
    if (threadIdx.x < 256) {
        constexpr int N = HD/64;
        const int col = threadIdx.x >> 5;
        float2 v[3][N] = {};
        if (col < n_col) {
            const int h = col/col_head;
            const int token = col%col_head/gqa;
            const int qh = (head0 + h)*gqa + col%gqa;
            const float * q = (const float *) ((const char *) p.q + stream*p.q_nb_stream + token*p.q_nb_token + qh*p.q_nb_head);
            const int64_t at = (int64_t)(head0 + h)*HD;
            for (int i = 0; i < N; i++) {
                const int pair = i*32 + lane;
                const int da = p.rope.pair_dim[pair*2];
                const int db = p.rope.pair_dim[pair*2 + 1];
                const float mag = p.rope.mag[pair];
                const float qa = q[da]*mag;
                const float qb = q[db]*mag;
                const float scale = gk.rank ? p.k.dec_scale[at + da] : 0.0f;
                const float ma = p.k.mean[at + da];
                const float mb = p.k.mean[at + db];
                const float ha = scale*p.k.dec_half[at + da];
                const float hb = scale*p.k.dec_half[at + db];
                v[0][i] = make_float2(qa*scale, qb*scale);
                v[1][i] = make_float2(qa*ma + qb*mb, qb*ma - qa*mb);
                v[2][i] = make_float2(qa*ha + qb*hb, qb*ha - qa*hb);
            }
        }
        for (int j = 0; j < 3; j++) {
            float top = 0.0f;
            for (int i = 0; i < N; i++) {
                top = fmaxf(top, fmaxf(fabsf(v[j][i].x), fabsf(v[j][i].y)));
            }
            top = warp_max(top);
            const float inv = top > 0.0f ? 1.0f/top : 0.0f;
            for (int i = 0; i < N; i++) {
                v[j][i].x *= inv;
                v[j][i].y *= inv;
            }
            if (lane == 0) {
                sm_scale[j*8 + col] = j == 0 ? top*p.scale/p.trig_scale : top*p.scale;
            }
        }
        for (int i = 0; i < N; i++) {
            sm_vec[col*(HD/2) + i*32 + lane] = make_uint4(__float_as_uint(v[0][i].x), __float_as_uint(v[0][i].y),
                pack_f16(v[1][i].x, v[1][i].y), pack_f16(v[2][i].x, v[2][i].y));
        }
    }
    cp_async_wait_all();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // the decoder is read by wgmma
    __syncthreads();

    // named barriers: 1 + wg within a warpgroup, 12: the value warpgroups
    if (wg < NS) {
        if constexpr (NS == 2) {
            reg_alloc<SCORE_REGS>();
        }
        uint2 * frag_q = (uint2 *) sm_frag + wg*GP*32;
        uint4 * frag_b = (uint4 *)(sm_frag + NS*GP*32*8) + wg*GP*32;
        const uint8_t * stage = sm_k + wg*64*p.k_stage_words*4;
        float * out_s = sm_s + wg*64*S_STRIDE;
        float * out_top = sm_top + wg*32;
        const int row0 = warp*16 + l4;
        const uint64_t desc0 = (uint64_t)((smem_u32(sm_dec) & 0x3ffff) >> 4) | (uint64_t)(1024 >> 4) << 16 | (uint64_t)(128 >> 4) << 32;

        // columns of this thread's scores
        int64_t mask_at[2];
        float slope[2];
        bool real[2];
        for (int j = 0; j < 2; j++) {
            const int col = quad*2 + j;
            const int h = col/col_head;
            real[j] = col < n_col;
            mask_at[j] = stream*p.mask_nb_stream + (real[j] ? col%col_head/gqa : 0)*p.mask_nb_token;
            slope[j] = real[j] ? alibi_slope(p.max_bias, p.n_head, (head0 + h)*gqa + col%gqa) : 1.0f;
        }
        // this thread's share of turning the queries: one pair, every (128/(HD/2))th column
        const int my_pair = tid & (HD/2 - 1);
        const uint64_t my_turn = p.rope.turn[my_pair];
        const int my_frag = (my_pair >> 3)*32 + (my_pair >> 1 & 3); // + 4*column: register 0 or 1 is side, half is my_pair & 1
        // where this thread's rows stand in the stage; the same for every tile, because 64 rows are a multiple of 16 bytes
        const uint8_t * my_row[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t in16 = (uint32_t)((uintptr_t) rows_k + (row0 + i*8)*p.k.row_bytes + gk.row_offset) & 12;
            my_row[i] = stage + (row0 + i*8)*p.k_stage_words*4 + in16;
        }
        uint32_t small = 0; // steps of 32 channels with at most 4 bits
        for (int i = 0; i < KS; i++) {
            small |= (uint32_t) __all_sync(0xffffffff, sm_seg[i*4 + quad].y >> 8 <= 4) << i;
        }

        // positions and masks, loaded a tile ahead
        const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
        int next_base = 0;
        int next_pos[2] = {};
        uint32_t next_mask[2][2] = {};
        auto load_next = [&](int it) {
            const int cell0 = (tile0 + it)*64;
            next_base = pos[cell0];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int cell = min(cell0 + row0 + i*8, p.n_kv - 1);
                next_pos[i] = pos[cell];
                if (p.mask) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const char * at = (const char *) p.mask + mask_at[j];
                        next_mask[i][j] = p.mask_f16 ? ((const uint16_t *) at)[cell] : ((const uint32_t *) at)[cell];
                    }
                }
            }
        };
        if (wg < n_tile) {
            load_next(wg);
        }

        for (int it = wg; it < n_tile; it += NS) {
            const int cell0 = (tile0 + it)*64;
            const int base = next_base;
            int dpos[2];
            float mask[2][2];
            bool regular = true;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const bool in = cell0 + row0 + i*8 < p.n_kv;
                dpos[i] = next_pos[i] - base;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const float m = p.mask_f16 ? __half2float(__ushort_as_half((uint16_t) next_mask[i][j])) : __uint_as_float(next_mask[i][j]);
                    mask[i][j] = in && real[j] ? m : -INFINITY;
                }
                regular &= dpos[i] == row0 + i*8 || (mask[i][0] == -INFINITY && mask[i][1] == -INFINITY);
            }
            regular = __all_sync(0xffffffff, regular);

            cp_async_wait<0>();
            bar_sync(1 + wg, 128); // rows are here

            uint32_t a[KS][4];
            float scale_k[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint8_t * at = my_row[i] + (gk.row_offset & 3);
                scale_k[i] = __half2float(__ushort_as_half(at[0] | at[1] << 8));
            }
#pragma unroll
            for (int s = 0; s < KS; s++) {
                const uint4 seg = sm_seg[s*4 + quad];
                const uint32_t bits = seg.y >> 8;
                if (small >> s & 1) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row[i] + seg.x);
                        const uint32_t lo = __funnelshift_r(w[0], w[1], seg.y);
                        a[s][i] = spread_s8(lo, bits, seg.z, seg.w);
                        a[s][2 + i] = spread_s8(lo >> bits*4, bits, seg.z, seg.w);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t * w = (const uint32_t *)(my_row[i] + seg.x);
                        const uint32_t w1 = w[1];
                        const uint32_t lo = __funnelshift_r(w[0], w1, seg.y);
                        const uint32_t hi = __funnelshift_rc(lo, __funnelshift_r(w1, w[2], seg.y), bits*4);
                        a[s][i] = spread_s8(lo, bits, seg.z, seg.w);
                        a[s][2 + i] = spread_s8(hi, bits, seg.z, seg.w);
                    }
                }
            }
            bar_sync(1 + wg, 128); // rows have been read, and so have the last tile's fragments
            if (it + NS < n_tile) {
                stage_k(tile0 + it + NS);
                load_next(it + NS);
            }
            // queries, rotated back by the tile's first position
            {
                float sn, cs;
                sincos_turn((uint64_t) (int64_t) base*my_turn, sn, cs);
                for (int col = tid/(HD/2); col < n_col; col += 128/(HD/2)) {
                    const uint4 vec = sm_vec[col*(HD/2) + my_pair];
                    const float2 v[3] = { make_float2(__uint_as_float(vec.x), __uint_as_float(vec.y)), unpack_f16(vec.z), unpack_f16(vec.w) };
                    __half * to_q = (__half *)(frag_q + my_frag + col*4) + (my_pair & 1);
                    __half * to_b = (__half *)(frag_b + my_frag + col*4) + (my_pair & 1);
#pragma unroll
                    for (int j = 0; j < 3; j++) {
                        __half * to = j == 0 ? to_q : to_b + (j - 1)*4;
                        to[0] = __float2half_rn(v[j].x*cs + v[j].y*sn);
                        to[2] = __float2half_rn(v[j].y*cs - v[j].x*sn);
                    }
                }
            }
            bar_sync(1 + wg, 128);

            float sq[HS][4] = {};
            float sm[4] = {};
            float sh[4] = {};
            // two blocks of columns in turn: while one is multiplied, the other is rotated
            int acc[TWO_BLOCKS ? 2 : 1][32];
            uint64_t desc = desc0;
            auto multiply = [&](int (&to)[32]) {
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < KS; s++) {
                    wgmma_64(to, a[s], desc + s*(2048 >> 4), s != 0);
                }
                wgmma_commit();
                desc += KS*2048 >> 4;
            };
            auto rotate = [&](int (&from)[32], int b) {
                rotate_and_score<HS, SCALE>(from, sq, sm, sh, p.trig_scale, regular, (const uint4 *) sm_trig, frag_q, frag_b, p.rope.turn, dpos, b*GB, tid);
            };
            if constexpr (TWO_BLOCKS) {
                multiply(acc[0]);
#pragma unroll 1
                for (int b = 0; b < NB; b += 2) {
                    multiply(acc[1]);
                    wgmma_wait<1>();
                    rotate(acc[0], b);
                    if (b + 2 < NB) {
                        multiply(acc[0]);
                        wgmma_wait<1>();
                    } else {
                        wgmma_wait<0>();
                    }
                    rotate(acc[1], b + 1);
                }
            } else {
#pragma unroll 1
                for (int b = 0; b < NB; b++) {
                    multiply(acc[0]);
                    wgmma_wait<0>();
                    rotate(acc[0], b);
                }
            }

            float score[2][2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int col = quad*2 + j;
                const float fq = sm_scale[col];
                const float fm = sm_scale[8 + col];
                const float fh = sm_scale[16 + col];
                const int h = col/col_head;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float dot = sq[0][i*2 + j];
#pragma unroll
                    for (int k = 1; k < HS; k++) {
                        dot = h == k ? sq[k][i*2 + j] : dot;
                    }
                    float x = scale_k[i]*(dot*fq + sh[i*2 + j]*fh) + sm[i*2 + j]*fm;
                    if (p.softcap != 0.0f) {
                        x = p.softcap*tanhf(x/p.softcap);
                    }
                    score[i][j] = mask[i][j] == -INFINITY ? -INFINITY : (x + slope[j]*mask[i][j])*LOG2E;
                }
            }
            float top[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                top[j] = fmaxf(score[0][j], score[1][j]);
#pragma unroll
                for (int i = 4; i < 32; i *= 2) {
                    top[j] = fmaxf(top[j], __shfl_xor_sync(0xffffffff, top[j], i));
                }
            }
            if (it >= NS) {
                mbar_wait(smem_u32(sm_bar + NS + wg), (it/NS - 1) & 1); // the last scores have been read
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                *(float2 *)(out_s + (row0 + i*8)*S_STRIDE + quad*2) = make_float2(score[i][0], score[i][1]);
            }
            if (l4 == 0) {
                *(float2 *)(out_top + warp*8 + quad*2) = make_float2(top[0], top[1]);
            }
            mbar_arrive(smem_u32(sm_bar + wg));
        }
    } else {
        constexpr float P_SCALE = 64.0f; // weights this much larger: small ones stay normal in f16
        const int side = warp & 1;        // even or odd units of 64 channels
        const int part = warp >> 1;       // first or second 16 cells of a stage
        // where this thread's cells stand in a stage; the same for every step, because 32 rows are a multiple of 16 bytes
        const uint8_t * my_row0[2][2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = part*16 + quad*2 + j*8 + i;
                const uint32_t in16 = (uint32_t)((uintptr_t) rows_v + t*p.v.row_bytes + gv.row_offset) & 12;
                my_row0[j][i] = sm_v + (value_wg*VSTAGES*VT + t)*p.v_stage_words*4 + in16;
            }
        }
        int slot_v = 0;
        if constexpr (NS == 2) {
            reg_free<VALUE_REGS>();
        }
        float acc[UN][4][4];
        uint32_t seg_at[UN];   // first word's byte
        uint32_t seg_info[UN]; // shift within the word | bits << 8
        bool small[UN];        // all of the warp's segments have at most 4 bits
#pragma unroll
        for (int u = 0; u < UN; u++) {
            const int s = (u*2 + side)*8 + l4;
            const uint32_t seg = s < gv.rank/8 ? p.v.segs[gv.seg0 + s] : gv.row_offset;
            const uint32_t at = (seg & 0xffffff) - (gv.row_offset & ~3);
            seg_at[u] = at & ~3u;
            seg_info[u] = (at & 3)*8 | seg >> 24 << 8;
            small[u] = __all_sync(0xffffffff, seg >> 24 <= 4);
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    acc[u][m][j] = 0.0f;
                }
            }
        }
        float top = -INFINITY; // of column l4
        float sum = 0.0f;
        float sum_v = 0.0f;
        for (int it = 0; it < n_tile; it++) {
            const int slot = it%NS;
            const float * in_s = sm_s + slot*64*S_STRIDE;
            const float * in_top = sm_top + slot*32;
            mbar_wait(smem_u32(sm_bar + slot), it/NS & 1);
            const float new_top = fmaxf(top, fmaxf(fmaxf(in_top[l4], in_top[8 + l4]), fmaxf(in_top[16 + l4], in_top[24 + l4])));
            const float base = new_top == -INFINITY ? 0.0f : new_top;
            if (__any_sync(0xffffffff, new_top != top)) {
                const float fix = exp2f(top - base);
                sum *= fix;
                sum_v *= fix;
                const float fix0 = __shfl_sync(0xffffffff, fix, quad*8);
                const float fix1 = __shfl_sync(0xffffffff, fix, quad*8 + 4);
#pragma unroll
                for (int u = 0; u < UN; u++) {
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        acc[u][m][0] *= fix0;
                        acc[u][m][1] *= fix1;
                        acc[u][m][2] *= fix0;
                        acc[u][m][3] *= fix1;
                    }
                }
                top = new_top;
            }
#pragma unroll 1
            for (int n = 0; n < 2/NV; n++) {
                const int half = NV == 2 ? value_wg : n;
                const int step = NV == 2 ? it : it*2 + n;
                cp_async_wait<1>();
                bar_sync(1 + wg, 128); // the stage is here, and the one before has been used
                stage_v(step + 2);
                const uint8_t * my_row[2][2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        my_row[j][i] = my_row0[j][i] + slot_v*VT*p.v_stage_words*4;
                    }
                }
                slot_v = slot_v == VSTAGES - 1 ? 0 : slot_v + 1;
                // weights of cells 2*quad, 2*quad + 1, 2*quad + 8, 2*quad + 9 for column l4
                uint32_t bp[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    __half w[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int t = quad*2 + j*8 + i;
                        const float x = in_s[(half*VT + part*16 + t)*S_STRIDE + l4];
                        const uint8_t * at = my_row[j][i] + (gv.row_offset & 3);
                        const float scale = __half2float(__ushort_as_half(at[0] | at[1] << 8));
                        const float e = exp2_fast(x - base);
                        sum += x == -INFINITY ? 0.0f : e;
                        w[i] = __float2half_rn(x == -INFINITY ? 0.0f : e*scale*P_SCALE);
                        sum_v += __half2float(w[i]);
                    }
                    bp[j] = (uint32_t) __half_as_ushort(w[0]) | (uint32_t) __half_as_ushort(w[1]) << 16;
                }
#pragma unroll
                for (int u = 0; u < UN; u++) {
                    const uint32_t bits = seg_info[u] >> 8;
                    uint32_t x[8][2];
                    value_codes(x, small[u], bits, seg_info[u], [&](int j, int i) { return (const uint32_t *)(my_row[j][i] + seg_at[u]); });
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        mma_f16(acc[u][m], x[m*2][0], x[m*2 + 1][0], x[m*2][1], x[m*2 + 1][1], bp[0], bp[1]);
                    }
                }
            }
            mbar_arrive(smem_u32(sm_bar + NS + slot));
        }
        // the parts of the cells together, through the value stages, one unit at a time: 16 values of 64 lanes
        cp_async_wait<0>();
        float * both = (float *) sm_v;
        float * both_sum = both + 16*64;
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        sum_v += __shfl_xor_sync(0xffffffff, sum_v, 1);
        sum_v += __shfl_xor_sync(0xffffffff, sum_v, 2);
        const int my_part = value_wg*2 + part;
#pragma unroll
        for (int u = 0; u < UN; u++) {
            for (int from = 1; from < NV*2; from++) {
                bar_sync(12, NV*128);
                if (my_part == from) {
#pragma unroll
                    for (int m = 0; m < 4; m++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            both[(m*4 + j)*64 + side*32 + lane] = acc[u][m][j];
                        }
                    }
                    if (u == 0 && side == 0 && quad == 0) {
                        both_sum[l4] = sum;
                        both_sum[8 + l4] = sum_v;
                    }
                }
                bar_sync(12, NV*128);
                if (my_part == 0) {
#pragma unroll
                    for (int m = 0; m < 4; m++) {
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            acc[u][m][j] += both[(m*4 + j)*64 + side*32 + lane];
                        }
                    }
                    if (u == 0) {
                        sum += both_sum[l4];
                        sum_v += both_sum[8 + l4];
                    }
                }
            }
        }
        if (my_part == 0) {
            auto dst_of = [&](int col) {
                const int token = col%col_head/gqa;
                const int qh = (head0 + col/col_head)*gqa + col%gqa;
                return p.partial + ((((int64_t) stream*p.n_token + token)*p.n_head + qh)*p.n_chunk + blockIdx.x)*(4 + p.rank_stride);
            };
            if (side == 0 && quad == 0 && l4 < n_col) {
                *(float4 *) dst_of(l4) = make_float4(top, sum, sum_v*(1.0f/P_SCALE), 0.0f);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int col = quad*2 + j;
                if (col >= n_col) {
                    continue;
                }
                float * dst = dst_of(col) + 4;
                constexpr float f = 16777216.0f/P_SCALE;
#pragma unroll
                for (int u = 0; u < UN; u++) {
                    const int s = (u*2 + side)*8 + l4;
                    if (s < gv.rank/8) {
                        const float f1 = small[u] ? f/(1 << (seg_info[u] >> 8)) : f;
                        *(float4 *)(dst + s*8) = make_float4(acc[u][0][j]*f, acc[u][0][2 + j]*f1, acc[u][1][j]*f, acc[u][1][2 + j]*f1);
                        *(float4 *)(dst + s*8 + 4) = make_float4(acc[u][2][j]*f, acc[u][2][2 + j]*f1, acc[u][3][j]*f, acc[u][3][2 + j]*f1);
                    }
                }
            }
        }
    }
}

#endif

#ifdef PALU_SM90
#define PALU_DECODE_SM90(HD, HS, KS, UN, SUFFIX, SCALE) \
    extern "C" __global__ void __launch_bounds__((KS <= 4 ? 5 : KS <= 8 ? 4 : 3)*128, 1) \
    palu_decode_sm90_##HD##_##HS##_##KS##_##UN##SUFFIX(const __grid_constant__ palu_cuda_attn p) { \
        decode_sm90<HD, HS, KS, UN, SCALE, (KS <= 4 ? 3 : 2), (KS <= 8 ? 2 : 1)>(p); \
    }
#else
#define PALU_DECODE_SM90(HD, HS, KS, UN, SUFFIX, SCALE) \
    extern "C" __global__ void palu_decode_sm90_##HD##_##HS##_##KS##_##UN##SUFFIX(const __grid_constant__ palu_cuda_attn p) {}
#endif

#define PALU_BOTH(HD, HS, KS, UN) PALU_DECODE_SM90(HD, HS, KS, UN, , false) PALU_DECODE_SM90(HD, HS, KS, UN, _scaled, true)
PALU_CUDA_SM90_KERNELS(PALU_BOTH)
