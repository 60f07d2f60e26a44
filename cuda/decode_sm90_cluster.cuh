// decode_sm90_cluster.cuh - decode attention on sm_90a where one group holds all KV heads and no head has more than four query rows:
// a cluster of blocks shares 64 cells at a time, two KV heads per block.
//
// Each block keeps its two heads' part of the integer decoder in shared memory from beginning to end. What all of them need is made
// once: every block unpacks its part of the keys' codes and copies the result into the others' shared memory. Weights go to all
// blocks, too, and each sums its own part of the values' channels for all heads. In a block, five warpgroups:
//
//   score (2)  one head each: keys as integers by wgmma, codes and decoder from shared memory. Between the products of a tile, keys of
//              the one before are rotated, and scores made, from registers
//   unpack     codes of keys to bytes, as wgmma reads them
//   others     two warps make the softmax of both heads, two what else a tile needs: queries turned, scales
//   value      summed as codes as in decode_sm90.cuh, but by wgmma, with weights from shared memory
//
// RoPE: queries are turned back by the position of the middle of a tile, between two cells. Cells at the same distance before and
// after it have the same cosines and opposite sines, so that a thread that has both needs half of the table. While positions are
// consecutive it is the same for every tile; otherwise it is computed.
//
// MANY: clusters share several contexts (tiles.cuh). One goes from a context to the next without a stop: the warps of the softmax look
// tiles up and tell the others of them, and the warps that turn queries fetch those of another context.
#pragma once

#include "decode_sm90.cuh"
#include "tiles.cuh"

#ifdef PALU_SM90

// The thread's number, read where it is needed: what is made of it before would take up registers, or be kept in memory.
static __device__ __forceinline__ int thread_now() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}
static __device__ __forceinline__ uint32_t cluster_map(uint32_t at, uint32_t block) {
    uint32_t r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(at), "r"(block));
    return r;
}
static __device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cp_async16_if(bool copies, uint32_t dst, const void * src) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p cp.async.cg.shared.global [%1], [%2], 16;\n}\n" :: "r"((int) copies), "r"(dst), "l"(src) : "memory");
}
static __device__ __forceinline__ uint32_t shared_u32(uint32_t at) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
    return x;
}
// at: of any block of the cluster, from cluster_map()
static __device__ __forceinline__ void mbar_arrive_at(uint32_t at) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(at) : "memory");
}
// from this block's shared memory to another's, announced at a barrier there
static __device__ __forceinline__ void cluster_copy(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(dst), "r"(src), "r"(bytes), "r"(bar) : "memory");
}

// d[64][128] (+)= a[64][32] b[32][128]; a unsigned, b signed, both in shared memory, 8x16-byte blocks without swizzle
template <bool ACCUMULATE> static __device__ __forceinline__ void wgmma_128(int (&d)[64], uint64_t desc_a, uint64_t desc_b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p;\n}\n"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]),
          "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]),
          "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]),
          "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]),
          "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
        : "l"(desc_a), "l"(desc_b), "n"((int) ACCUMULATE));
}

// d[64][32] += a[64][16] b[16][32], f16; b as above
static __device__ __forceinline__ void wgmma_f16(float (&d)[16], const uint32_t (&a)[4], uint64_t desc_b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b));
}

// KS: products of 32 key channels
template <int KS, bool MANY> static __device__ __forceinline__ void decode_sm90_cluster(const palu_cuda_attn & p) {
    constexpr int C = PALU_CUDA_CLUSTER; // blocks of a cluster; each has two KV heads
    constexpr int HD = 128;
    constexpr int GP = HD/16;          // blocks of 8 pairs in a head
    constexpr int RUN = 32/C;          // cells before and after a tile's middle whose keys a block unpacks
    constexpr int KEY_REGS = 40;       // registers of a thread that unpacks keys
    constexpr int VT = 16;             // cells of a value stage
    constexpr int VSTAGES = 3;
    constexpr int P_WORDS = 32*8 + 8;  // weights of a tile for a block's columns, two cells each; corrections
    constexpr float TOP_SLACK = 2.0f;  // a score may be larger than what weights are relative to by this, in bits
    constexpr float P_SCALE = 16.0f;   // weights this much larger: small ones stay normal in f16
    typedef typename TilesIf<MANY>::type Walk;

    extern __shared__ __align__(128) uint8_t smem_cluster[];
    const int tid = threadIdx.x & 127;
    const int wg = __shfl_sync(0xffffffff, threadIdx.x >> 7, 0); // the same for a warp, which the compiler sees by this
    const int lane = threadIdx.x & 31;
    const int warp = tid >> 5;
    const int l4 = lane >> 2;
    const int quad = lane & 3;

    const int rank_block = blockIdx.y; // in the cluster
    const int head0 = rank_block*2;
    const int stream = blockIdx.z; // MANY: of the context, as below
    const int gqa = p.n_head/p.k.n_head_kv;
    const int col_head = gqa*(MANY ? p.context_tokens : p.n_token); // at most 4; a head's columns are the first of its four
    const palu_cuda_group gk = p.k.near_groups[0];
    const palu_cuda_group gv = p.v.near_groups[0];
    constexpr uint32_t pad = KS*32;    // the group's channels, and more that are zero
    constexpr uint32_t a_bytes = 64*pad;
    const uint32_t run_bytes = RUN*p.k.row_bytes;

    // what has one size for all models comes first, so that its addresses are constants
    uint2   * sm_trig = (uint2 *) smem_cluster;                  // [GP][128] cos, sin of two pairs
    uint2   * sm_q = sm_trig + GP*128;                           // [2][queries, means][2][GP][16]
    float2  * sm_vec = (float2 *) sm_q;                          // before that: [queries, means][8][HD/2] not turned
    uint32_t * sm_p = (uint32_t *)(sm_q + 2*2*2*GP*16);          // [2][C][P_WORDS]: [8][8][4] two cells' weights of a column
    float   * sm_s = (float *)(sm_p + 2*C*P_WORDS);              // [2][64][8]
    float4  * sm_half = (float4 *)(sm_s + 2*64*8);               // [2][GP][4] halves of two pairs, times trig_scale
    __half  * sm_kscale = (__half *)(sm_half + 2*GP*4);          // [2][64] of rows
    __half  * sm_vscale = sm_kscale + 2*64;                      // [4][64]
    float   * sm_factor = (float *)(sm_vscale + 4*64);           // [queries, means][8]; MANY: [2] of these
    float   * sm_part = sm_factor + 2*2*8;                       // [2][2][8] largest of a warp; [2][2][8] sums
    int     * sm_regular = (int *)(sm_part + 64);                // [2][2] positions are consecutive
    uint64_t * sm_turn = (uint64_t *)(sm_regular + 4);           // [HD/2]
    uint64_t * sm_bar = sm_turn + HD/2;                          // [16]
    int4    * sm_tile = (int4 *)(sm_bar + 16);                   // MANY: [16] of as many tiles: values' bytes between the one before and it, cells
                                                                 // from its first on, context (negative: of which it is the cluster's last)
    float   * sm_kept = (float *)(sm_bar + 48);                  // MANY: as sm_factor, of a context
    int     * sm_n_tile = (int *)(sm_bar + 56);                  // MANY
    uint8_t * sm_dec = (uint8_t *)(sm_bar + (MANY ? 64 : 16));   // [2][pad/16][128][16]
    static_assert(PALU_CUDA_CLUSTER_MANY == 384, "as the host counts it");
    uint8_t * sm_a = sm_dec + 256*pad;                           // [2][8][pad/16][8][16]
    uint8_t * sm_k = sm_a + 2*a_bytes;                           // [2][2*run_bytes + 16]
    const uint32_t k_bytes = 2*run_bytes + 16;
    uint8_t * sm_v = sm_k + 2*k_bytes;                           // [VSTAGES][VT][v_stage_words], 64 bytes
    const uint32_t v_bytes = VT*p.v_stage_words*4;
    const uint32_t bar_dec = smem_u32(sm_bar);     // [2] decoder of a head is here
    const uint32_t bar_rows = bar_dec + 16;        // [2] rows of keys are here
    const uint32_t bar_a = bar_rows + 16;          // [2] unpacked keys are here
    const uint32_t bar_a_free = bar_a + 16;        // [2] all blocks have multiplied them
    const uint32_t bar_q = bar_a_free + 16;        // [2] queries and scales of a tile are here, and the scores of two tiles before have been read
    const uint32_t bar_s = bar_q + 16;             // [2] scores are here
    const uint32_t bar_p = bar_s + 16;             // [2] all blocks' weights are here
    const uint32_t bar_p_free = bar_p + 16;        // [2] all blocks have read this one's

    const int tile0 = MANY ? 0 : blockIdx.x*p.part.chunk_tiles;
    const int all_tiles = blockIdx.x == gridDim.x - 1 ? p.part.end_tile - tile0 : p.part.chunk_tiles; // all but the last have as many
    auto n_tile = [&]() { return MANY ? *(volatile int *) sm_n_tile : all_tiles; };
    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;
    const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
    auto cell_of = [&](int t) { return MANY ? p.n_kv - ((volatile int4 *) sm_tile)[t & 15].z : (tile0 + t)*64; };
    auto context_of = [&](int t) { return MANY ? ((volatile int4 *) sm_tile)[t & 15].w : 0; };
    auto stream_of = [&](int context) { return context >> 8 & 255; };
    auto token_of = [&](int context) { return context >> 16 & 0x7fff; }; // the first
    // where a column's sums go
    auto partial_of = [&](int context, int token, int qh) {
        if (MANY) {
            const int64_t row = ((int64_t)(blockIdx.x + (context & 255))*p.context_tokens + token)*p.n_head + qh;
            return p.partial + palu_cuda_tiles_size(&p) + row*(4 + p.rank_stride);
        }
        const int64_t row = ((int64_t) stream*p.n_token + token)*p.n_head + qh;
        return p.partial + (row*p.n_chunk + blockIdx.x)*(4 + p.rank_stride);
    };

    // of a column's queries: a pair with the decoder's scales, with the mean; all of a warp's pairs are then made this much shorter, and what
    // scores are multiplied with for that (turning changes no pair's length)
    auto with_pair = [&](int j, float2 q, float4 pair) {
        return j == 0 ? make_float2(q.x*pair.x, q.y*pair.x) : make_float2(q.x*pair.y + q.y*pair.z, q.y*pair.y - q.x*pair.z);
    };
    auto longest = [&](float2 a, float2 b) { return sqrtf(warp_max(fmaxf(a.x*a.x + a.y*a.y, b.x*b.x + b.y*b.y))); };
    auto factor_of = [&](int j, float top) { return j == 0 ? top*p.scale/p.trig_scale : top*p.scale; };

    // by one thread: a tile's rows to a slot
    auto load_keys = [&](int slot, int cell, int of) {
        const uint32_t bar = bar_rows + slot*8;
        const uint8_t * rows = MANY ? p.rows_k + of*p.rows_k_nb_stream : rows_k;
        uint32_t all = 0;
        const int cell0[2] = { cell + 32 + RUN*rank_block, cell + 32 - RUN*(rank_block + 1) };
        uint32_t whole[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t bytes = max(0, min(RUN, p.n_kv - cell0[i]))*p.k.row_bytes;
            whole[i] = bytes & ~15u;
            all += whole[i];
            for (uint32_t j = whole[i]; j < bytes; j += 4) { // memory may end there
                *(uint32_t *)(sm_k + slot*k_bytes + i*run_bytes + j) = *(const uint32_t *)(rows + (int64_t) cell0[i]*p.k.row_bytes + j);
            }
        }
        mbar_expect(bar, all);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (whole[i]) {
                bulk_copy(smem_u32(sm_k) + slot*k_bytes + i*run_bytes, rows + (int64_t) cell0[i]*p.k.row_bytes, whole[i], bar);
            }
        }
    };

    // Nobody does more than what his part needs before it waits for the kernels in front: a layer's tables come from memory for every
    // token, and what a tile needs first is on its way while the rest is made ready. Rows are not waited for where the kernels in front
    // write none that are read (`beside`).
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbar_init(bar_dec + i*8, 1);
            mbar_init(bar_rows + i*8, 1);
            mbar_init(bar_a + i*8, 1);
            mbar_init(bar_a_free + i*8, 8*C);
            mbar_init(bar_q + i*8, 4);
            mbar_init(bar_s + i*8, 8);
            mbar_init(bar_p + i*8, 1);
            mbar_init(bar_p_free + i*8, 4*C);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async();
        for (int i = 0; i < 2; i++) {
            mbar_expect(bar_dec + i*8, 128*gk.rank_pad);
        }
    }
    for (uint32_t i = threadIdx.x; i < 2*(pad - gk.rank_pad)*8; i += PALU_CUDA_CLUSTER_THREADS) { // channels that there are not
        const uint32_t of_head = (pad - gk.rank_pad)*8;
        *(uint4 *)(sm_dec + i/of_head*128*pad + gk.rank_pad*128 + i%of_head*16) = make_uint4(0, 0, 0, 0);
        fence_async();
    }
    __syncthreads();
    cluster_arrive(); // barriers are there

    if (wg < 2) {
        //
        // Scores
        //
        {
            // queries with the decoder's scales and with the mean, a warp per column; to f16's range, with a factor for each
            const int my_col = threadIdx.x >> 5;
            int2 dim[2];
            float mag[2];
            float4 pair[2]; // scale, means
#pragma unroll
            for (int i = 0; i < 2; i++) {
                dim[i] = ((const int2 *) p.rope.pair_dim)[i*32 + lane];
                mag[i] = p.rope.mag[i*32 + lane];
                pair[i] = *(const float4 *)(p.k.pairs + ((int64_t)(head0 + my_col/4)*(HD/2) + i*32 + lane)*8);
            }
            if (threadIdx.x >= 64 && threadIdx.x < 64 + 2*GP*4) {
                const int i = threadIdx.x - 64;
                const float * of = p.k.pairs + ((int64_t)(head0 + i/(GP*4))*(HD/2) + i%(GP*4)*2)*8 + 4;
                const float2 half0 = *(const float2 *) of;
                const float2 half1 = *(const float2 *)(of + 8);
                // codes are multiplied as bytes, 128 more than signed numbers around zero: less 128 times the sum of weights, plus half of it
                const float f = -255.0f*p.trig_scale;
                sm_half[i] = make_float4(half0.x*f, half1.x*f, half0.y*f, half1.y*f);
            }
            if (!MANY) {
                grid_wait();
            }
            float2 v[2][2] = {};
            if (!MANY && my_col%4 < col_head) { // MANY: by the warps that turn them
                const int qh = (head0 + my_col/4)*gqa + my_col%4%gqa;
                const float * q = (const float *) ((const char *) p.q + stream*p.q_nb_stream + my_col%4/gqa*p.q_nb_token + qh*p.q_nb_head);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float2 both = make_float2(q[dim[i].x]*mag[i], q[dim[i].y]*mag[i]);
                    v[0][i] = with_pair(0, both, pair[i]);
                    v[1][i] = with_pair(1, both, pair[i]);
                }
            }
#pragma unroll
            for (int j = 0; j < 2 && !MANY; j++) {
                const float top = longest(v[j][0], v[j][1]);
                const float inv = top > 0.0f ? 1.0f/top : 0.0f;
                if (lane == 0) {
                    sm_factor[j*8 + my_col] = factor_of(j, top);
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    sm_vec[(j*8 + my_col)*(HD/2) + i*32 + lane] = make_float2(v[j][i].x*inv, v[j][i].y*inv);
                }
            }
        }
        bar_sync(5, 3*128); // queries and turns are there
        // the table of this warp's cells: at half a position and further from the middle
#pragma unroll 1
        for (int i = threadIdx.x; i < GP*128; i += 256) {
            const int64_t d = i%128/32*8 + i%32/4;
            float s[2], c[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint64_t turn = sm_turn[i/128*8 + i%4*2 + j];
                sincos_turn(d*turn + (uint64_t)((int64_t) turn >> 1), s[j], c[j]);
            }
            sm_trig[i] = make_uint2(pack_f16(c[0], c[1]), pack_f16(s[0], s[1]));
        }
        if (MANY) {
            grid_wait();
            const Walk tiles(p);
            *sm_n_tile = tiles.end - tiles.next; // everybody comes to the same
        }
        bar_sync(6, 256);
        cluster_wait();
        reg_alloc<136>();
        const uint64_t desc_b = (uint64_t)((smem_u32(sm_dec) + wg*128*pad) >> 4 & 0x3fff) | (uint64_t)(2048 >> 4) << 16 | (uint64_t)(128 >> 4) << 32;
        const uint64_t desc_a = (uint64_t)(smem_u32(sm_a) >> 4 & 0x3fff) | (uint64_t)(128 >> 4) << 16 | (uint64_t)(8*pad >> 4) << 32;
        const int up = 32 + warp*8 + l4;   // the thread's two cells of a tile
        const int down = 31 - warp*8 - l4;
        const uint32_t free_at = lane < C ? cluster_map(bar_a_free, lane) : 0;
        constexpr int FIRST = 1; // products in front of the scores
        int acc[64];
        uint32_t key[GP*4]; // f16: first and second dimensions of two pairs, of both cells
        // Products of a tile, some at a time, so that they are started between parts of the scores: a warp that starts one too many waits for
        // it, and so do the values' products. Descriptors are made anew of a part that the compiler does not know
        uint32_t a_at = 0;
        uint32_t b_at = 0;
        auto multiply = [&](int first, int end) {
#pragma unroll
            for (int s = first; s < end; s++) {
                const uint64_t a = (desc_a & 0xffffffff00000000) | (a_at + s*(256 >> 4));
                const uint64_t b = (desc_b & 0xffffffff00000000) | (b_at + s*(4096 >> 4));
                if (s == 0) {
                    wgmma_128<false>(acc, a, b);
                } else {
                    wgmma_128<true>(acc, a, b);
                }
            }
        };
        auto begin = [&](int t) {
            const int slot = t & 1;
            mbar_wait(bar_a + slot*8, t >> 1 & 1);
            fence_async();
            a_at = opaque((uint32_t) desc_a + slot*(a_bytes >> 4));
            b_at = opaque((uint32_t) desc_b);
            wgmma_fence();
        };
        auto convert = [&](int t) {
            wgmma_wait<0>();
            if (lane < C) {
                mbar_arrive_at((MANY ? cluster_map(opaque(bar_a_free), thread_now() & 31) : free_at) + (t & 1)*8);
            }
            const float4 * halves = sm_half + wg*GP*4 + quad;
#pragma unroll
            for (int g = 0; g < GP; g++) {
                const float4 h = halves[g*4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int k = g*8 + i*2;
                    key[g*4 + i] = pack_f16(fmaf((float) acc[k], p.trig_scale, h.x), fmaf((float) acc[k + 1], p.trig_scale, h.y));
                    key[g*4 + 2 + i] = pack_f16(fmaf((float) acc[k + 4], p.trig_scale, h.z), fmaf((float) acc[k + 5], p.trig_scale, h.w));
                }
            }
        };
        uint2 bq = make_uint2(0, 0); // of 16 threads: other columns' products are not used
        uint2 bm = make_uint2(0, 0);
        // the tile's queries and scales are here; are its positions consecutive?
        auto ready = [&](int t) {
            const int slot = t & 1;
            mbar_wait(bar_q + slot*8, t >> 1 & 1);
            return sm_regular[slot*2] && sm_regular[slot*2 + 1];
        };
        auto turn_and_multiply = [&](int t, int g, __half2 c0, __half2 c1, __half2 s0, __half2 s1, float (&sq)[4], float (&sm)[4]) {
            const int lane = thread_now() & 31;
            const uint2 * queries = sm_q + ((t & 1)*4 + wg)*GP*16 + lane;
            if (lane < 16) {
                bq = queries[g*16];
                bm = queries[2*GP*16 + g*16];
            }
            const __half2 cs[2] = { c0, c1 };
            const __half2 sn[2] = { s0, s1 };
            uint32_t x[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const __half2 ka = as_half2(key[g*4 + i]);
                const __half2 kb = as_half2(key[g*4 + 2 + i]);
                x[i] = as_u32(__hfma2(ka, cs[i], __hneg2(__hmul2(kb, sn[i]))));
                x[2 + i] = as_u32(__hfma2(ka, sn[i], __hmul2(kb, cs[i])));
            }
            mma_f16(sq, x[0], x[1], x[2], x[3], bq.x, bq.y);
            mma_f16(sm, as_u32(cs[0]), as_u32(cs[1]), as_u32(sn[0]), as_u32(sn[1]), bm.x, bm.y);
        };
        auto write_scores = [&](int t, const float (&sq)[4], const float (&sm)[4]) {
            const int slot = t & 1;
            const int quad = thread_now() & 3;
            if (quad < 2) {
                const float * factors = sm_factor + (MANY ? slot*16 : 0) + wg*4 + quad*2;
                const float2 fq = *(const float2 *) factors;
                const float2 fm = *(const float2 *)(factors + 8);
                const __half * scales = sm_kscale + slot*64;
                float * to = sm_s + slot*64*8 + wg*4 + quad*2;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int cell = i ? down : up;
                    const float f = __half2float(scales[cell]);
                    *(float2 *)(to + cell*8) = make_float2(f*fq.x*sq[i*2] + fm.x*sm[i*2], f*fq.y*sq[i*2 + 1] + fm.y*sm[i*2 + 1]);
                }
            }
            __syncwarp();
            if ((thread_now() & 31) == 0) {
                mbar_arrive(bar_s + slot*8);
            }
        };
        // scores of a tile. between(): what is started between its parts
        auto score = [&](int t, bool regular, auto between) {
            const uint2 * trig = sm_trig + (thread_now() & 127);
            float sq[4] = {};
            float sm[4] = {};
#pragma unroll
            for (int g = 0; g < GP; g++) {
                const uint2 x = trig[g*128];
                turn_and_multiply(t, g, as_half2(x.x), as_half2(x.x), as_half2(x.y), as_half2(x.y ^ 0x80008000u), sq, sm);
                between(g);
            }
            if (regular) {
                write_scores(t, sq, sm);
            }
        };
        // the same for any positions, while nothing is multiplied and registers are free: from the tile's first on, less those up to its middle
        auto score_slowly = [&](int t) {
            const int cell0 = cell_of(t);
            const int32_t * of = MANY ? p.pos + (int64_t) stream_of(context_of(t))*p.n_kv : pos;
            const int first = of[cell0];
            const uint64_t at[2] = { (uint64_t)(int64_t)(of[min(cell0 + up, p.n_kv - 1)] - first - 31),
                                     (uint64_t)(int64_t)(of[min(cell0 + down, p.n_kv - 1)] - first - 31) };
            float sq[4] = {};
            float sm[4] = {};
#pragma unroll
            for (int g = 0; g < GP; g++) {
                float s[2][2], c[2][2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint64_t turn = sm_turn[g*8 + quad*2 + j];
                        sincos_turn(at[i]*turn - (uint64_t)((int64_t) turn >> 1), s[i][j], c[i][j]);
                    }
                }
                turn_and_multiply(t, g, __floats2half2_rn(c[0][0], c[0][1]), __floats2half2_rn(c[1][0], c[1][1]),
                    __floats2half2_rn(s[0][0], s[0][1]), __floats2half2_rn(s[1][0], s[1][1]), sq, sm);
            }
            write_scores(t, sq, sm);
        };
        mbar_wait(bar_dec + wg*8, 0);
        if (!MANY || n_tile()) {
            begin(0);
            multiply(0, KS);
            wgmma_commit();
            convert(0);
        }
        for (int t = 1; t < n_tile(); t++) {
            const bool regular = ready(t - 1);
            if (!regular) {
                score_slowly(t - 1);
            }
            begin(t);
            multiply(0, FIRST);
            score(t - 1, regular, [&](int g) {
                multiply(min(KS, FIRST + g*2), min(KS, FIRST + g*2 + 2));
                if (g == GP - 1) {
                    wgmma_commit();
                }
            });
            convert(t);
        }
        if (!MANY || n_tile()) {
            if (ready(n_tile() - 1)) {
                score(n_tile() - 1, true, [](int) {});
            } else {
                score_slowly(n_tile() - 1);
            }
        }
    } else if (wg == 2) {
        //
        // Unpack keys
        //
        reg_free<KEY_REGS>();
        // A thread has one cell and two parts of 32 channels, four segments each. Eight cells of a warp are written to all banks; where
        // their rows have too much in the same banks, it has four of them and twice as many parts.
        const bool few = p.k.row_bytes%64 == 0;
        const int cell = few ? warp*4 + (lane & 3) : (warp >> 1)*8 + (lane & 7);
        const int part = few ? lane >> 2 : (warp & 1)*4 + (lane >> 3); // and the eighth after
        uint32_t segs[2][4]; // first word's byte | shift within it << 16 | bits << 24
        bool wide[2];        // a code of the warp has more than 4 bits
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int n = (part + j*8)*4 + i;
                const uint32_t seg = n < gk.rank/8 ? p.k.segs[gk.seg0 + n] : 0;
                segs[j][i] = (seg & 0xff00fffcu) | (seg & 3) << 19;
            }
            wide[j] = __any_sync(0xffffffff, max(max(segs[j][0], segs[j][1]), max(segs[j][2], segs[j][3])) >> 24 > 4);
        }
        if (MANY || !p.part.beside) {
            grid_wait();
        }
        if (MANY) {
            Walk tiles(p);
            *sm_n_tile = tiles.end - tiles.next;
            for (int t = 0; t < 2 && tiles.next < tiles.end; t++) {
                const int tile = tiles.take(p);
                if (tid == 0) {
                    load_keys(t, tile*64, stream_of(tiles.context));
                }
            }
        } else if (tid == 0) {
            load_keys(0, tile0*64, 0);
            if (n_tile() > 1) {
                load_keys(1, (tile0 + 1)*64, 0);
            }
        }
        bar_sync(1, 128);
        if (MANY) {
            bar_sync(7, 2*128); // the first tiles are known
        }
        cluster_wait();
        const uint32_t part_bytes = a_bytes/C;
        const int n_part = pad/32;
        // of eight cells, two groups after each other are at the same distance from the middle
        const int distance = (cell >> 4)*8 + (cell & 7);
        const uint32_t row_at = cell & 8 ? run_bytes + (RUN - 1 - distance)*p.k.row_bytes : distance*p.k.row_bytes;
        const uint32_t unpacked_at = (cell >> 3)*8*pad + (cell & 7)*16 + part*256;
        for (int t = 0; t < n_tile(); t++) {
            const int slot = t & 1;
            mbar_wait(bar_rows + slot*8, t >> 1 & 1);
            if (t >= 2) {
                mbar_wait(bar_a_free + slot*8, (t >> 1) - 1 & 1);
            }
            uint8_t * to = sm_a + slot*a_bytes + rank_block*part_bytes;
            const uint8_t * from = sm_k + slot*k_bytes + row_at;
            uint8_t * at = to + unpacked_at;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (part + j*8 < n_part) {
                    uint32_t seg[4];
                    uint32_t lo[4], hi[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        seg[i] = opaque(segs[j][i]);
                    }
                    if (wide[j]) {
                        uint32_t w[4][3];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const uint32_t * words = (const uint32_t *)(from + (seg[i] & 0xffff));
                            w[i][0] = words[0];
                            w[i][1] = words[1];
                            w[i][2] = words[2];
                        }
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const uint32_t shift = seg[i] >> 16; // modulo 32
                            lo[i] = __funnelshift_r(w[i][0], w[i][1], shift);
                            hi[i] = __funnelshift_rc(lo[i], __funnelshift_r(w[i][1], w[i][2], shift), seg[i] >> 24 << 2);
                        }
                    } else { // eight codes are one word
                        uint32_t w[4][2];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const uint32_t * words = (const uint32_t *)(from + (seg[i] & 0xffff));
                            w[i][0] = words[0];
                            w[i][1] = words[1];
                        }
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            lo[i] = __funnelshift_r(w[i][0], w[i][1], seg[i] >> 16);
                            hi[i] = lo[i] >> (seg[i] >> 24 << 2);
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const uint32_t bits = seg[i] >> 24;
                        const uint32_t ones = ((1u << bits) - 1)*0x01010101u;
                        const uint32_t bias = ~(ones >> 1) & 0x7f7f7f7fu; // 128 - 2^(bits - 1); anything where there are no codes
                        lo[i] = spread_u8(lo[i], bits, ones, bias);
                        hi[i] = spread_u8(hi[i], bits, ones, bias);
                    }
                    *(uint4 *)(at + j*2048) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
                    *(uint4 *)(at + j*2048 + 128) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
                }
            }
            fence_async();
            bar_sync(1, 128);
            if (tid == 0) {
                mbar_expect(bar_a + slot*8, (C - 1)*part_bytes);
#pragma unroll
                for (int i = 1; i < C; i++) {
                    const uint32_t other = (rank_block + i)%C;
                    cluster_copy(cluster_map(smem_u32(to), other), smem_u32(to), part_bytes, cluster_map(bar_a + slot*8, other));
                }
                if (t + 2 < n_tile()) {
                    load_keys(slot, cell_of(t + 2), stream_of(context_of(t + 2)));
                }
            }
        }
    } else if (wg == 3) {
        reg_free<56>();
        if (tid < HD/2) {
            sm_turn[tid] = p.rope.turn[tid];
        } else if (tid == HD/2) {
            // the combine's largest table comes to the cache
            const uint32_t n = gridDim.x*C*gridDim.z;
            const uint32_t i = (blockIdx.z*gridDim.x + blockIdx.x)*C + rank_block;
            const int64_t all = gv.dec0 + (int64_t) p.v.planes*p.v.n_head_kv*HD*gv.rank_pad;
            const int64_t part = (all/16 + n - 1)/n*16;
            if (i*part < all) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(p.v.dec + i*part), "r"((uint32_t) min(part, all - i*part)));
            }
        }
        if (warp < 2) {
            //
            // Softmax: a thread has eight cells of a column
            //
            const int col = lane & 7;
            const bool real = col%4 < col_head;
            const int token = col%4/gqa; // of the context
            const float slope = real ? alibi_slope(p.max_bias, p.n_head, (head0 + col/4)*gqa + col%4%gqa) : 1.0f;
            const char * mask = p.mask && !MANY ? (const char *) p.mask + stream*p.mask_nb_stream + (real ? token : 0)*p.mask_nb_token : nullptr;
            const int end = opaque(real ? p.n_kv : 0);
            float top = -INFINITY;
            float sum = 0.0f;
            float sum_v = 0.0f;
            if (lane == 0) {
                mbar_arrive(bar_q);
                mbar_arrive(bar_q + 8);
            }
            if (MANY) {
                bar_sync(5, 3*128); // turns
            }
            grid_wait();
            Walk tiles(p);
            // MANY: what the others need to know of a tile, before any of them asks: keys of tile t + 2 are loaded when those of t are unpacked,
            // which waits for the scores of t - 3 to be made, and these for the softmax to have read those of t - 5. The first ones are known
            // before others begin. Both warps write the same
            constexpr int KNOWN = 7;
            auto tell = [&](int t) {
                const int64_t before = t ? stream_of(context_of(t - 1))*p.rows_v_nb_stream + (int64_t)(cell_of(t - 1) + 64)*p.v.row_bytes : 0;
                const int cell = tiles.take(p)*64;
                const int64_t between = stream_of(tiles.context)*p.rows_v_nb_stream + (int64_t) cell*p.v.row_bytes - before;
                sm_tile[t & 15] = make_int4((int) between, (int)(between >> 32), p.n_kv - cell, tiles.context | (tiles.left == 0 ? (int) 0x80000000 : 0));
                __syncwarp();
            };
            if (MANY) {
                *sm_n_tile = tiles.end - tiles.next;
                for (int t = 0; t < KNOWN && tiles.next < tiles.end; t++) {
                    tell(t);
                }
                bar_sync(7, 2*128);
            }
            cluster_wait();
            if (!MANY) {
                bar_sync(5, 3*128);
            }
            auto write_sums = [&](int context) {
                sum += __shfl_xor_sync(0xffffffff, sum, 8);
                sum += __shfl_xor_sync(0xffffffff, sum, 16);
                sum_v += __shfl_xor_sync(0xffffffff, sum_v, 8);
                sum_v += __shfl_xor_sync(0xffffffff, sum_v, 16);
                if (lane < 8) {
                    sm_part[32 + warp*8 + lane] = sum;
                    sm_part[48 + warp*8 + lane] = sum_v;
                }
                bar_sync(2, 64);
                if (tid < 8 && real) {
                    *(float4 *) partial_of(context, token, (head0 + col/4)*gqa + col%4%gqa) = make_float4(top,
                        sm_part[32 + tid] + sm_part[40 + tid], (sm_part[48 + tid] + sm_part[56 + tid])*(1.0f/P_SCALE), 0.0f);
                }
            };
            for (int t = 0; t < n_tile(); t++) {
                const int tid = thread_now() & 63;
                const int col = tid & 7;
                const int pair = tid >> 3; // of cells, and every eighth after
                const int slot = t & 1;
                if (MANY) {
                    if (tiles.next < tiles.end) {
                        tell(t + KNOWN);
                    }
                    const int context = context_of(t);
                    if (t > 0 && context_of(t - 1) < 0) {
                        write_sums(context_of(t - 1));
                        top = -INFINITY;
                        sum = sum_v = 0.0f;
                    }
                    mask = p.mask ? (const char *) p.mask + stream_of(context)*p.mask_nb_stream + (token_of(context) + (real ? token : 0))*p.mask_nb_token : nullptr;
                }
                const int cell0 = cell_of(t);
                const int left = end - cell0;
                float m[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    m[i] = (pair + i/2*8)*2 + i%2 < left ? 0.0f : -INFINITY;
                }
                if (mask && p.mask_f16) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        if (m[i] == 0.0f) {
                            m[i] = __half2float(((const __half *) mask)[cell0 + (pair + i/2*8)*2 + i%2]);
                        }
                    }
                } else if (mask) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        if (m[i] == 0.0f) {
                            m[i] = ((const float *) mask)[cell0 + (pair + i/2*8)*2 + i%2];
                        }
                    }
                }
                mbar_wait(bar_s + slot*8, t >> 1 & 1);
                if (p.softcap != 0.0f) {
#pragma unroll 1
                    for (int i = 0; i < 8; i++) { // not unrolled: instructions that most models never run would be in the others' way
                        float * at = sm_s + (slot*64 + (pair + i/2*8)*2 + i%2)*8 + col;
                        *at = p.softcap*tanhf(*at/p.softcap);
                    }
                }
                float x[8];
                float most = -INFINITY;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    x[i] = sm_s[(slot*64 + (pair + i/2*8)*2 + i%2)*8 + col];
                    x[i] = m[i] == -INFINITY ? -INFINITY : (x[i] + slope*m[i])*LOG2E;
                    most = fmaxf(most, x[i]);
                }
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 8));
                most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 16));
                const int tid_now = thread_now() & 63;
                if ((tid_now & 31) < 8) {
                    sm_part[(slot*2 + (tid_now >> 5))*8 + (tid_now & 7)] = most;
                }
                bar_sync(2, 64);
                const float old = top;
                most = fmaxf(most, sm_part[(slot*2 + (tid_now >> 5 ^ 1))*8 + (tid_now & 7)]);
                top = most > top + TOP_SLACK ? most : top; // sums are scaled anew only where that matters
                const float base = top == -INFINITY ? 0.0f : top;
                const float fix = top == old ? 1.0f : exp2_fast(old - base);
                sum *= fix;
                sum_v *= fix;
                if (t >= 2) {
                    mbar_wait(bar_p_free + slot*8, (t >> 1) - 1 & 1);
                }
                uint32_t * to = sm_p + (slot*C + rank_block)*P_WORDS;
                const __half2 * scales = (const __half2 *)(sm_vscale + (t & 3)*64);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 f = __half22float2(scales[pair + i*8]);
                    __half w[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const bool hidden = x[i*2 + j] == -INFINITY;
                        const float e = hidden ? 0.0f : exp2_fast(x[i*2 + j] - base);
                        sum += e;
                        w[j] = __float2half_rn(hidden ? 0.0f : e*(j ? f.y : f.x)*P_SCALE);
                        sum_v += __half2float(w[j]);
                    }
                    to[(pair/4 + i*2)*32 + col*4 + pair%4] = (uint32_t) __half_as_ushort(w[0]) | (uint32_t) __half_as_ushort(w[1]) << 16;
                }
                if (tid_now < 8) {
                    to[32*8 + tid_now] = __float_as_uint(fix);
                }
                fence_async();
                bar_sync(2, 64);
                if ((thread_now() & 31) == 0) {
                    mbar_arrive(bar_q + slot*8); // scores may come to stand where these were
                }
                if ((thread_now() & 63) == 0) {
                    mbar_expect(bar_p + slot*8, (C - 1)*P_WORDS*4);
#pragma unroll
                    for (int i = 1; i < C; i++) {
                        const uint32_t other = (rank_block + i)%C;
                        cluster_copy(cluster_map(smem_u32(to), other), smem_u32(to), P_WORDS*4, cluster_map(bar_p + slot*8, other));
                    }
                }
            }
            if (!MANY || n_tile()) {
                write_sums(MANY ? context_of(n_tile() - 1) : 0);
            }
        } else {
            //
            // What a tile needs: queries and means turned, scales, whether positions are consecutive. A warp has half of the pairs
            //
            if (MANY) {
                bar_sync(5, 3*128);
                grid_wait();
                bar_sync(7, 2*128); // the first tiles are known
            } else {
                grid_wait();
            }
            cluster_wait();
            if (!MANY) {
                bar_sync(5, 3*128);
            }
            float2 vec[2][4][2]; // [queries, means][blocks of 8 pairs][pairs], column l4
            auto fetch = [&](int j, const float2 * from) {
#pragma unroll
                for (int g = 0; g < 4; g++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        vec[j][g][i] = from[l4*(HD/2) + ((warp - 2)*4 + g)*8 + quad*2 + i];
                    }
                }
            };
            // queries of another context, a head per warp; they pass through where the tile's come to stand
            auto turn_to = [&](int context, int slot) {
                float2 * by = (float2 *)(sm_q + slot*2*2*GP*16);
                const int lane = thread_now() & 31;
                const int mine = thread_now() >> 5 & 1; // of the block's heads
                const int head = head0 + mine;
                const int rep = opaque(gqa);
                const char * from = (const char *) p.q + stream_of(context)*p.q_nb_stream + token_of(context)*p.q_nb_token + (int64_t) head*rep*p.q_nb_head;
                float2 v[2][4]; // pairs of a column
                float4 pair[2]; // scale, means
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int2 dim = ((const int2 *) p.rope.pair_dim)[i*32 + lane];
                    const float mag = p.rope.mag[i*32 + lane];
                    pair[i] = *(const float4 *)(p.k.pairs + ((int64_t) head*(HD/2) + i*32 + lane)*8);
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        v[i][c] = make_float2(0.0f, 0.0f);
                        if (c < rep*p.context_tokens) {
                            const float * q = (const float *)(from + (c >= rep ? c/rep*p.q_nb_token + c%rep*p.q_nb_head : c*p.q_nb_head));
                            v[i][c] = make_float2(q[dim.x]*mag, q[dim.y]*mag);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        float2 x[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            x[i] = with_pair(j, v[i][c], pair[i]);
                        }
                        const float top = longest(x[0], x[1]);
                        const float inv = top > 0.0f ? 1.0f/top : 0.0f;
                        if (lane == 0) {
                            sm_kept[j*8 + mine*4 + c] = factor_of(j, top);
                        }
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            by[(mine*4 + c)*(HD/2) + i*32 + lane] = make_float2(x[i].x*inv, x[i].y*inv);
                        }
                    }
                    bar_sync(4, 64);
                    fetch(j, by);
                    bar_sync(4, 64); // queries come to where they were
                }
            };
            if (!MANY) {
                fetch(0, sm_vec);
                fetch(1, sm_vec + 8*(HD/2));
                bar_sync(4, 64); // queries come to where they were
            }
            int first_pos = 0;
            int next_pos = 0;
            uint32_t next_k = 0;
            uint32_t next_v = 0;
            auto ask = [&](int t) {
                int stream = 0;
                if (MANY) {
                    if (t == n_tile()) {
                        return;
                    }
                    stream = stream_of(context_of(t));
                }
                const int cell0 = cell_of(t);
                const int cell = cell0 + (thread_now() & 63);
                if (cell0 < p.n_kv) {
                    const int32_t * of = MANY ? p.pos + (int64_t) stream*p.n_kv : pos;
                    first_pos = of[cell0];
                    if (cell < p.n_kv) {
                        next_pos = of[cell];
                        next_k = *(const uint16_t *)((MANY ? p.rows_k + stream*p.rows_k_nb_stream : rows_k) + (int64_t) cell*p.k.row_bytes + gk.row_offset);
                        next_v = *(const uint16_t *)((MANY ? p.rows_v + stream*p.rows_v_nb_stream : rows_v) + (int64_t) cell*p.v.row_bytes + gv.row_offset);
                    }
                }
            };
            ask(0);
            for (int t = 0; t < n_tile(); t++) {
                const int slot = t & 1;
                const int cell = thread_now() & 63; // as `tid` less the warps of the softmax
                const int consecutive = __all_sync(0xffffffff, next_pos == first_pos + cell || cell_of(t) + cell >= p.n_kv);
                const uint64_t turn = sm_turn[cell];
                float my_s, my_c;
                sincos_turn((uint64_t)(int64_t)(first_pos + 31)*turn + (uint64_t)((int64_t) turn >> 1), my_s, my_c);
                if (t >= 2) {
                    mbar_wait(bar_s + slot*8, (t >> 1) - 1 & 1);
                }
                if (MANY) {
                    if (t == 0 || context_of(t - 1) < 0) {
                        turn_to(context_of(t), slot);
                    }
                    const int i = thread_now() & 63; // a warp has its head's, as it may be a tile ahead of the other
                    if ((i & 31) < 8) {
                        const int of = (i & 4) << 1 | i >> 5 << 2 | (i & 3);
                        sm_factor[slot*16 + of] = sm_kept[of];
                    }
                }
                sm_kscale[slot*64 + cell] = __ushort_as_half((unsigned short) next_k);
                sm_vscale[(t & 3)*64 + cell] = __ushort_as_half((unsigned short) next_v);
                if ((cell & 31) == 0) {
                    sm_regular[slot*2 + (cell >> 5)] = consecutive;
                }
                ask(t + 1);
                const int l4 = cell >> 2 & 7;
                const int quad = cell & 3;
                uint2 * to = sm_q + slot*2*2*GP*16 + ((l4 >> 2)*GP + (cell >> 5)*4)*16 + (l4 & 3)*4 + quad;
#pragma unroll
                for (int g = 0; g < 4; g++) {
                    float s[2], c[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        c[i] = __shfl_sync(0xffffffff, my_c, g*8 + quad*2 + i);
                        s[i] = __shfl_sync(0xffffffff, my_s, g*8 + quad*2 + i);
                    }
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float a[2], b[2];
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            a[i] = vec[j][g][i].x*c[i] + vec[j][g][i].y*s[i];
                            b[i] = vec[j][g][i].y*c[i] - vec[j][g][i].x*s[i];
                        }
                        to[(j*2*GP + g)*16] = make_uint2(pack_f16(a[0], a[1]), pack_f16(b[0], b[1]));
                    }
                }
                __syncwarp();
                if ((cell & 31) == 0) {
                    mbar_arrive(bar_q + slot*8);
                }
            }
        }
    } else {
        //
        // Values: segments of eight channels are dealt to blocks, then to warps, then to up to eight times four threads
        //
        reg_alloc<112>();
        {
            // the decoder, blocks of 64 columns side by side; by these warps, as copies of a warp are started one after the other
            const uint32_t n = gk.rank_pad/16;
            const int8_t * from = p.k.dec_tiles + gk.dec0 + (int64_t) head0*HD*gk.rank_pad;
            for (uint32_t i = tid; i < 4*n; i += 128) {
                const uint32_t c = i >> 2;
                const uint32_t b = i & 3;
                bulk_copy(smem_u32(sm_dec) + (b >> 1)*128*pad + c*2048 + (b & 1)*1024, from + (b*n + c)*1024, 1024, bar_dec + (b >> 1)*8);
            }
        }
        const int n_seg = gv.rank/8;
        const int block_segs = (n_seg + C - 1)/C;
        const int warp_segs = (block_segs + 3)/4;
        const int seg_first = rank_block*block_segs;
        const int seg_end = min(n_seg, seg_first + block_segs);
        const int my_seg = seg_first + warp*warp_segs + l4;
        const bool mine = l4 < warp_segs && my_seg < seg_end;
        const uint32_t start = (seg_first < seg_end ? p.v.segs[gv.seg0 + seg_first] & 0xffffff : gv.row_offset) & ~3u;
        const uint32_t last = seg_first < seg_end ? p.v.segs[gv.seg0 + seg_end - 1] : gv.row_offset;
        const uint32_t seg = mine ? p.v.segs[gv.seg0 + my_seg] : start;
        const uint32_t bits = seg >> 24;
        const uint32_t at = (seg & 0xffffff) - start;
        const uint32_t shift = (at & 3)*8;
        const uint32_t ones = ((1u << bits) - 1)*0x00010001u;
        const bool small = __all_sync(0xffffffff, bits <= 4);
        // a thread copies the same 16 bytes of two of a stage's rows, which land at the same place modulo 16 as they have in memory
        const uint8_t * source = rows_v + (int64_t)(tile0*64 + (tid >> 4))*p.v.row_bytes + start;
        const uint32_t source_at = (uint32_t)(uintptr_t) source & 15;
        const bool copies = (tid & 15)*16 < source_at + (last & 0xffffff) + (last >> 24) - start;
        source += (tid & 15)*16 - (int) source_at;
        const uint32_t target = smem_u32(sm_v) + ((tid >> 4)*p.v_stage_words + (tid & 15)*4)*4;
        const uint32_t v8 = 8*p.v.row_bytes;
        int left = p.n_kv - tile0*64; // cells from the stage on that comes next
        uint32_t write_at = 0;
        if (MANY) {
            grid_wait();
            Walk tiles(p);
            *sm_n_tile = tiles.end - tiles.next;
            left = 0;
            if (tiles.next < tiles.end) {
                const int cell = tiles.take(p)*64;
                source += stream_of(tiles.context)*p.rows_v_nb_stream + (int64_t) cell*p.v.row_bytes;
                left = p.n_kv - cell;
            }
        }
        auto stage = [&]() {
            const uint8_t * const from[2] = { source, source + v8 };
            if (left >= 2*VT) {
                cp_async16_if(copies, target + write_at, from[0]);
                cp_async16_if(copies, target + write_at + 32*p.v_stage_words, from[1]);
            } else if (copies) { // memory may end there
                const uint8_t * end = rows_v + (int64_t) p.n_kv*p.v.row_bytes;
                if (MANY) { // of this tile's stream
                    const int row = thread_now() >> 4 & 7;
                    end = source + (int64_t)(left - row)*p.v.row_bytes - (thread_now() & 15)*16 + (int) source_at - start;
                }
                for (int i = 0; i < 2; i++) {
                    for (int j = 0; j < 16 && (tid >> 4) + i*8 < left && from[i] + j < end; j += 4) {
                        *(uint32_t *)(sm_v + (target + write_at - smem_u32(sm_v)) + i*32*p.v_stage_words + j) = *(const uint32_t *)(from[i] + j);
                    }
                }
            }
            cp_async_commit();
            source = from[1] + v8;
            left -= VT;
            write_at = write_at == (VSTAGES - 1)*v_bytes ? 0 : write_at + v_bytes;
        };
        if (!MANY && !p.part.beside) {
            grid_wait();
        }
        stage();
        stage();
        stage();
        if (!MANY && p.part.beside) {
            grid_wait();
        }
        grid_next();
        cluster_wait();
        // where this thread's cells stand in a stage; 8 rows are a multiple of 16 bytes, so that the eighth after stands alike
        uint32_t my_row[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int c = quad*2 + i;
            my_row[i] = smem_u32(sm_v) + c*p.v_stage_words*4 + ((uint32_t)((uintptr_t) rows_v + c*p.v.row_bytes + start) & 12) + (at & ~3u);
        }
        const uint32_t eight = 32*p.v_stage_words;
        float u[4][4*C] = {};
        const uint64_t desc_p = (uint64_t)(smem_u32(sm_p) >> 4 & 0x3fff) | (uint64_t)(128 >> 4) << 16 | (uint64_t)(P_WORDS*4 >> 4) << 32;
        uint32_t read_at = 0;
        uint32_t w[2][2][3]; // what is unpacked next
        auto ask = [&]() {
            const uint32_t at = read_at;
            if (small) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    w[i/2][i%2][0] = shared_u32(my_row[i%2] + at + i/2*eight);
                    w[i/2][i%2][1] = shared_u32(my_row[i%2] + at + i/2*eight + 4);
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    w[i/2][i%2][0] = shared_u32(my_row[i%2] + at + i/2*eight);
                    w[i/2][i%2][1] = shared_u32(my_row[i%2] + at + i/2*eight + 4);
                    w[i/2][i%2][2] = shared_u32(my_row[i%2] + at + i/2*eight + 8);
                }
            }
            read_at = at == (VSTAGES - 1)*v_bytes ? 0 : at + v_bytes;
        };
        cp_async_wait<2>();
        bar_sync(3, 128);
        ask();
        for (int t = 0; t < n_tile(); t++) {
            if (MANY) { // a context's numbers may not be finite
#pragma unroll
                for (int m = 0; m < 4; m++) {
#pragma unroll
                    for (int i = 0; i < 4*C; i++) {
                        u[m][i] = 0.0f;
                    }
                }
            }
            for (;; t++) {
                const int slot = t & 1;
                const uint32_t * weights = sm_p + slot*C*P_WORDS;
                const int other = thread_now() & 31;
                mbar_wait(bar_p + slot*8, t >> 1 & 1);
                float2 fix[C];
                bool any = false;
#pragma unroll
                for (int n = 0; n < C; n++) {
                    fix[n] = *(const float2 *)(weights + n*P_WORDS + 32*8 + (other & 3)*2);
                    any |= fix[n].x != 1.0f || fix[n].y != 1.0f;
                }
                if (__any_sync(0xffffffff, any)) {
#pragma unroll
                    for (int n = 0; n < C; n++) {
#pragma unroll
                        for (int m = 0; m < 4; m++) {
                            u[m][n*4 + 0] *= fix[n].x;
                            u[m][n*4 + 1] *= fix[n].y;
                            u[m][n*4 + 2] *= fix[n].x;
                            u[m][n*4 + 3] *= fix[n].y;
                        }
                    }
                }
#pragma unroll 1
                for (int kb = 0; kb < 4; kb++) {
                    uint32_t y[4][2];
                    value_code_pairs(y, small, bits, shift, [&](int j, int i) { return w[j][i]; });
                    uint32_t a[4][4];
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        a[m][0] = y[m][0] & ones;
                        a[m][1] = y[m][0] >> bits & ones;
                        a[m][2] = y[m][1] & ones;
                        a[m][3] = y[m][1] >> bits & ones;
                    }
                    wgmma_fence();
#pragma unroll
                    for (int m = 0; m < 4; m++) {
                        wgmma_f16(u[m], a[m], desc_p + ((slot*C*P_WORDS*4 + kb*256) >> 4));
                    }
                    wgmma_commit();
                    cp_async_wait<1>();
                    bar_sync(3, 128); // the next stage is here, and all have read this one
                    if (MANY && kb == 1) {
                        const volatile int4 & next = sm_tile[(t + 1) & 15];
                        source += (int64_t) next.y << 32 | (uint32_t) next.x;
                        left = t + 1 < n_tile() ? next.z : 0;
                    }
                    stage();
                    ask();
                    wgmma_wait<0>();
                }
                if (other < C) {
                    mbar_arrive_at(cluster_map(bar_p_free + slot*8, other));
                }
                if (MANY ? context_of(t) < 0 : t + 1 == n_tile()) {
                    break;
                }
            }
            if (mine) {
                constexpr float f = 16777216.0f/P_SCALE;
#pragma unroll
                for (int n = 0; n < C; n++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const int c = quad*2 + j;
                        if (c%4 < col_head) {
                            float2 * to = (float2 *)(partial_of(context_of(t), c%4/gqa, (n*2 + c/4)*gqa + c%4%gqa) + 4 + my_seg*8);
#pragma unroll
                            for (int m = 0; m < 4; m++) {
                                to[m] = make_float2(u[m][n*4 + j]*f, u[m][n*4 + 2 + j]*f);
                            }
                        }
                    }
                }
            }
        }
        cp_async_wait<0>();
    }
    // no block is gone while another writes to it
    cluster_arrive();
    cluster_wait();
}

#endif

#ifdef PALU_SM90
#define PALU_DECODE_CLUSTER(KS) \
    extern "C" __global__ void __cluster_dims__(1, PALU_CUDA_CLUSTER, 1) __launch_bounds__(PALU_CUDA_CLUSTER_THREADS, 1) \
    palu_decode_sm90_cluster_##KS(const __grid_constant__ palu_cuda_attn p) { decode_sm90_cluster<KS, false>(p); } \
    extern "C" __global__ void __cluster_dims__(1, PALU_CUDA_CLUSTER, 1) __launch_bounds__(PALU_CUDA_CLUSTER_THREADS, 1) \
    palu_decode_sm90_cluster_many_##KS(const __grid_constant__ palu_cuda_attn p) { decode_sm90_cluster<KS, true>(p); }
#else
#define PALU_DECODE_CLUSTER(KS) \
    extern "C" __global__ void palu_decode_sm90_cluster_##KS(const __grid_constant__ palu_cuda_attn p) {} \
    extern "C" __global__ void palu_decode_sm90_cluster_many_##KS(const __grid_constant__ palu_cuda_attn p) {}
#endif
PALU_CUDA_CLUSTER_KERNELS(PALU_DECODE_CLUSTER)
