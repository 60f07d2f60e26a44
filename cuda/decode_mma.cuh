// decode_mma.cuh - decode attention with the warps' matrix instructions, for any shape: many query rows (batches of sequences,
// drafts, wide GQA), any head size, decoders of one or two planes.
//
// A block takes the query rows of one or more KV heads of a group, its *columns*, and a chunk of the context, T cells at a
// time:
//
//   rows  -> raw copies, fetched a tile ahead (in the memory of the decoder's stages, which are idle then)
//         -> codes of keys (signed bytes) and of values (bytes), cos and sin
//   64 dimensions of a head at a time: integer product with the decoder, rotation in registers; what comes out is, as f16,
//         the left factor of the product with the queries
//   softmax over the tile, a warp per column; weights times the values' row scales to f16
//   codes x weights: values are summed as codes (their bytes become f16 in registers)
//
// The warps are T/16 across the cells and two across the dimensions.
#pragma once

#include "decoder.cuh"

template <int T, int NF, int MV>
static __device__ __forceinline__ void decode_mma(const palu_cuda_attn & p) {
    grid_wait();
    grid_next();
    constexpr int THREADS = 4*T;
    constexpr int WARPS = THREADS/32;
    constexpr int COLS = 8*NF;             // room for columns
    constexpr int MINE = COLS/WARPS > 0 ? COLS/WARPS : 1; // columns of a warp in the softmax
    constexpr int S_STRIDE = T + 4;        // 4 modulo 16: the banks of a fragment's columns differ
    constexpr int W_STRIDE = T + 8;
    constexpr int STAGES = 3;

    extern __shared__ __align__(16) uint8_t smem_mma[];
    const int tid = threadIdx.x;
    const int lane = tid & 31;
    const int warp = tid >> 5;
    const int wc = warp%(T/16);            // of the cells
    const int wd = warp/(T/16);            // of the dimensions
    const int hs = p.part.heads_per_cta;
    const int gqa = p.n_head/p.k.n_head_kv;
    const int n_col_all = gqa*p.n_token;
    const int n_col_block = (n_col_all + p.mma_cols - 1)/p.mma_cols;
    const int n_slice = max(1, (p.v.rank_max + p.mma_slice - 1)/p.mma_slice);
    const int slice0 = blockIdx.y%n_slice*p.mma_slice;
    const int col0 = blockIdx.y/n_slice%n_col_block*p.mma_cols;
    const int head0 = blockIdx.y/n_slice/n_col_block*hs;
    const int n_col = min(p.mma_cols, n_col_all - col0); // per head
    const int n_frag = (n_col + 7)/8;
    const int token0 = col0/gqa;
    const int n_token = (col0 + n_col - 1)/gqa - token0 + 1;
    const int stream = blockIdx.z;
    const palu_cuda_group gk = p.k.groups[head0/p.k.group_size];
    const palu_cuda_group gv = p.v.groups[head0/p.v.group_size];
    const int slice = min(p.mma_slice, gv.rank - slice0); // channels of values
    if (slice0 > 0 && slice <= 0) {
        return;
    }
    const int hd = p.k.head_dim;
    const int pairs = hd/2;
    const int quarters = (hd + 63)/64;     // of a head: 64 dimensions, 4 units
    const Divisor per_head(4*quarters);
    const int n_job = hs*quarters;         // 64 dimensions
    const int n_tile = (n_job + 1)/2;      // of the decoder

    const int k_stride = (p.k.rank_max + 31)/32*32 + 16;
    const int v_stride = (min(p.mma_slice, p.v.rank_max) + 31)/32*32 + 16;
    const int trig_stride = per_head.n*8 + 2;
    const int raw_k = gk.row_offset & ~3;  // first byte that is copied
    const int raw_v = gv.row_offset & ~3;
    const int words_k = (gk.row_end - raw_k + 3)/4;
    const int words_v = (gv.row_end - raw_v + 3)/4;
    const int raw_words = (p.k.row_span_max + 6)/4 + (p.v.row_span_max + 6)/4 + 1; // per cell, at most; and its position

    uint8_t  * codes_k = smem_mma;                                       // [T][k_stride]
    uint8_t  * codes_v = codes_k + T*k_stride;                           // [T][v_stride]
    uint8_t  * stage   = codes_v + T*v_stride;                           // [STAGES][128][64]
    uint32_t * raw     = (uint32_t *) stage;                             // [T] positions, [T][words_k], [T][words_v]
    uint32_t * trig    = (uint32_t *)(stage + max(STAGES*128*64, T*raw_words*4)); // [T][trig_stride]
    float    * score   = (float *)(trig + T*trig_stride);                // [2][COLS][S_STRIDE]
    __half   * weight  = (__half *)(score + 2*COLS*S_STRIDE);            // [COLS][W_STRIDE]
    uint2    * query   = (uint2 *)(weight + COLS*W_STRIDE);              // [n_job][4][n_frag][32]: fragments
    float    * consts  = (float *)(query + n_job*4*n_frag*32);           // [2][8][PALU_CONST_STRIDE]
    float    * scale_k = consts + 2*8*PALU_CONST_STRIDE;                 // [T]
    float    * scale_v = scale_k + T;                                    // [T]
    float    * fix     = scale_v + T;                                    // [COLS]
    int      * changed = (int *)(fix + COLS);                            // [4]
    uint16_t * dims    = (uint16_t *)(changed + 4);                      // [4*quarters][16]

    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;
    const int32_t * pos = p.pos + (int64_t) stream*p.n_kv;
    const float * dec_half = p.k.dec_half + (int64_t) head0*hd;
    const float * dec_scale = p.k.dec_scale + (int64_t) head0*hd;
    const float * mean = p.k.mean + (int64_t) head0*hd;
    const Trig turner(p.rope.mag, pairs);

    for (int i = tid; i < (int) per_head.n*16; i += THREADS) {
        dims[i] = p.rope.pair_dim[2*min(i/2, pairs - 1) + i%2];
    }
    for (int i = tid; i < COLS*W_STRIDE/2; i += THREADS) {
        ((uint32_t *) weight)[i] = 0;
    }
    __syncthreads();
    // lane i's two registers: pairs 2*kk and 2*kk + 1 of unit i%4, of column i/4
    for (int i = tid; i < n_job*4*n_frag*32; i += THREADS) {
        const int frag = i/32%n_frag;
        const int kk = i/32/n_frag%4;
        const int job = i/32/n_frag/4;
        const int head = job/quarters;
        const int pair = (job%quarters*4 + i%4)*8 + 2*kk;
        const int col = frag*8 + i%32/4;
        float v[4] = {};
        if (col < n_col) {
            const float * q = (const float *)((const char *) p.q + stream*p.q_nb_stream + (col0 + col)/gqa*p.q_nb_token +
                ((head0 + head)*gqa + (col0 + col)%gqa)*p.q_nb_head);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[j] = pair + j/2 < pairs ? q[p.rope.pair_dim[2*pair + j]] : 0.0f;
            }
        }
        const __half2 a = __floats2half2_rn(v[0], v[1]);
        const __half2 b = __floats2half2_rn(v[2], v[3]);
        query[i] = make_uint2(*(const uint32_t *) &a, *(const uint32_t *) &b);
    }

    // columns that this warp takes in the softmax
    float top[MINE], sum[MINE], sum_v[MINE], slope[MINE];
    int token[MINE]; // -1: none
#pragma unroll
    for (int j = 0; j < MINE; j++) {
        const int col = warp + WARPS*j;
        const int c = col0 + col%p.mma_cols;
        const bool real = col < COLS && col/p.mma_cols < hs && c < n_col_all;
        top[j] = -INFINITY;
        sum[j] = 0.0f;
        sum_v[j] = 0.0f;
        token[j] = real ? c/gqa : -1;
        slope[j] = real ? alibi_slope(p.max_bias, p.n_head, (head0 + col/p.mma_cols)*gqa + c%gqa) : 0.0f;
    }
    auto mask = [&](int token, int cell) {
        const char * m = (const char *) p.mask + stream*p.mask_nb_stream + token*p.mask_nb_token;
        return p.mask_f16 ? __half2float(((const __half *) m)[cell]) : ((const float *) m)[cell];
    };

    const Divisor by_k(words_k);
    const Divisor by_v(words_v);
    auto fetch = [&](int cell0) {
        for (int i = tid; i < T; i += THREADS) {
            mma::copy4(mma::smem(raw + i), pos + min(cell0 + i, p.n_kv - 1));
        }
        for (int i = tid; i < T*words_k; i += THREADS) {
            const int t = by_k(i);
            mma::copy4(mma::smem(raw + T + i), rows_k + (int64_t) min(cell0 + t, p.n_kv - 1)*p.k.row_bytes + raw_k + (i - t*words_k)*4);
        }
        for (int i = tid; i < T*words_v; i += THREADS) {
            const int t = by_v(i);
            mma::copy4(mma::smem(raw + T + T*words_k + i), rows_v + (int64_t) min(cell0 + t, p.n_kv - 1)*p.v.row_bytes + raw_v + (i - t*words_v)*4);
        }
        mma::copy_commit();
    };

    DecoderStream<128, THREADS> decoder(p.k, gk, p.k.dec + gk.dec0 + (int64_t)(head0%p.k.group_size)*hd*gk.rank_pad, dims, per_head, hs*per_head.n, stage, STAGES);
    const DecoderProduct<1> product(codes_k, k_stride, stage, wc*16, wd*64);
    const bool ahead = gk.rank_pad > 64 || p.k.planes > 1; // two loads, or one

    // values: 16 channels per fragment, shared evenly among the warps
    const int v_frags = (max(slice, 0) + 15)/16;
    const int v_each = (v_frags + WARPS - 1)/WARPS;
    const int v_first = warp*v_each;
    const int v_mine = max(0, min(v_each, v_frags - v_first));
    float acc_v[MV][NF][4] = {};

    const int cell_begin = blockIdx.x*p.part.chunk_tiles*PALU_CUDA_TILE;
    const int cell_end = min(p.n_kv, cell_begin + p.part.chunk_tiles*PALU_CUDA_TILE);
    if (cell_begin < cell_end) {
        fetch(cell_begin);
    }
    for (int cell0 = cell_begin; cell0 < cell_end; cell0 += T) {
        mma::copy_wait<0>();
        bool any = p.mask == nullptr;
        for (int i = tid; i < T*n_token && p.mask; i += THREADS) {
            any |= cell0 + i%T < cell_end && mask(token0 + i/T, cell0 + i%T) != -INFINITY;
        }
        // the rows are there, and nobody reads the last tile's codes and weights any more
        if (!__syncthreads_or(any)) {
            if (cell0 + T < cell_end) {
                fetch(cell0 + T);
            }
            continue;
        }
        unpack_codes<true, true, THREADS>(codes_k, k_stride, T, 0, gk.rank_pad/8, gk.rank/8, p.k.segs + gk.seg0,
            [&](int t) { return (const uint8_t *)(raw + T + t*words_k) - raw_k; });
        unpack_codes<false, false, THREADS>(codes_v, v_stride, T, slice0/8, 2*v_frags, gv.rank/8, p.v.segs + gv.seg0,
            [&](int t) { return (const uint8_t *)(raw + T + T*words_k + t*words_v) - raw_v; });
        if (tid == 0) {
            *changed = 0;
        }
        for (int t = tid; t < T; t += THREADS) {
            const uint8_t * k = (const uint8_t *)(raw + T + t*words_k) + (gk.row_offset - raw_k);
            const uint8_t * v = (const uint8_t *)(raw + T + T*words_k + t*words_v) + (gv.row_offset - raw_v);
            scale_k[t] = gk.rank ? __half2float(__ushort_as_half(k[0] | k[1] << 8)) : 0.0f;
            scale_v[t] = __half2float(__ushort_as_half(v[0] | v[1] << 8));
        }
        for (int pair = lane; pair < pairs; pair += 32) {
            const uint64_t turn = p.rope.turn[pair];
            const float mag = p.rope.mag[pair];
#pragma unroll 4
            for (int t = warp; t < T; t += WARPS) {
                float sn, cs;
                sincos_turn((uint64_t)(int64_t)(int32_t) raw[t]*turn, sn, cs);
                trig[t*trig_stride + pair] = turner.pack(cs, sn, mag);
            }
        }
        for (int i = tid; i < 2*COLS*S_STRIDE/4; i += THREADS) {
            ((float4 *) score)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        __syncthreads();

        // keys and scores
        auto load_consts = [&](int tile) {
            if (tile < n_tile) {
                decoder.load_consts(consts + (tile & 1)*8*PALU_CONST_STRIDE, tile, dec_half, dec_scale, mean);
            }
        };
        decoder.start(0);
        if (gk.rank) {
            load_consts(0);
            for (int i = 0; i < (ahead ? 2 : 1); i++) {
                decoder.load(n_tile);
                mma::copy_commit();
            }
        }
        uint32_t at = 0;
        for (int tile = 0; tile < n_tile; tile++) {
            int acc[1][8][4] = {};
            if (gk.rank == 0) {
                load_consts(tile);
                mma::copy_commit();
                mma::copy_wait<0>();
                __syncthreads();
            }
            for (int plane = 0; plane < p.k.planes && gk.rank > 0; plane++) {
                if (plane) {
                    product.next_plane(acc);
                }
                for (int k = 0; k < gk.rank_pad; k += 64) {
                    if (ahead) {
                        mma::copy_wait<1>();
                    } else {
                        mma::copy_wait<0>();
                    }
                    __syncthreads();
                    if (plane + k == 0) {
                        load_consts(tile + 1);
                    }
                    decoder.load(n_tile);
                    mma::copy_commit();
                    product.add(acc, k_stride, k, at, k + 32 < gk.rank_pad);
                    at = at + decoder.STAGE == STAGES*decoder.STAGE ? 0 : at + decoder.STAGE;
                }
            }
            const int job = 2*tile + wd;
            if (job < n_job) {
                const int head = job/quarters;
                const float * c = consts + (tile & 1)*8*PALU_CONST_STRIDE + (wd*4 + lane%4)*PALU_CONST_STRIDE;
                const int row0 = wc*16 + lane/4;
                const uint32_t * turns = trig + row0*trig_stride + ((job - head*quarters)*4 + lane%4)*8;
                const uint2 * q = query + job*4*n_frag*32 + lane;
                const float row_scale[2] = { scale_k[row0], scale_k[row0 + 8] };
                float s[NF][4] = {};
#pragma unroll
                for (int kk = 0; kk < 4; kk++) {
                    const float4 half = *(const float4 *)(c + kk*12);
                    const float4 ds = *(const float4 *)(c + kk*12 + 4);
                    const float4 mean = *(const float4 *)(c + kk*12 + 8);
                    const float4 hs = make_float4(half.x*ds.x, half.y*ds.y, half.z*ds.z, half.w*ds.w);
                    uint32_t a[4];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float x[2] = { (float) acc[0][2*kk][2*i], (float) acc[0][2*kk][2*i + 1] };
                        float y[2] = { (float) acc[0][2*kk + 1][2*i], (float) acc[0][2*kk + 1][2*i + 1] };
                        rebuild_pairs<true>(x, y, hs, ds, mean, row_scale[i], turner, *(const uint2 *)(turns + 8*i*trig_stride + 2*kk));
                        const __half2 u = __floats2half2_rn(x[0], x[1]);
                        const __half2 v = __floats2half2_rn(y[0], y[1]);
                        a[i] = *(const uint32_t *) &u;
                        a[2 + i] = *(const uint32_t *) &v;
                    }
#pragma unroll
                    for (int f = 0; f < NF; f++) {
                        if (f < n_frag) {
                            const uint2 b = q[(kk*n_frag + f)*32];
                            mma::f16(s[f], a, b.x, b.y);
                        }
                    }
                }
                float * to = score + (wd*COLS + head*p.mma_cols)*S_STRIDE + row0;
#pragma unroll
                for (int f = 0; f < NF; f++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int col = f*8 + lane%4*2 + i%2;
                        if (col < n_col) {
                            to[col*S_STRIDE + i/2*8] += s[f][i];
                        }
                    }
                }
            }
        }
        __syncthreads();
        if (cell0 + T < cell_end) {
            fetch(cell0 + T);
        }

        // softmax
#pragma unroll
        for (int j = 0; j < MINE; j++) {
            if (token[j] >= 0) {
                const int col = warp + WARPS*j;
                const float * s = score + col*S_STRIDE;
                float x[T/32];
                float most = top[j];
#pragma unroll
                for (int i = 0; i < T/32; i++) {
                    const int t = i*32 + lane;
                    const float m = cell0 + t >= cell_end ? -INFINITY : p.mask ? mask(token[j], cell0 + t) : 0.0f;
                    x[i] = (s[t] + s[COLS*S_STRIDE + t])*p.scale;
                    if (p.softcap != 0.0f) {
                        x[i] = p.softcap*tanhf(x[i]/p.softcap);
                    }
                    x[i] = m == -INFINITY ? -INFINITY : (x[i] + slope[j]*m)*LOG2E;
                    most = fmaxf(most, x[i]);
                }
                most = warp_max(most);
                const float base = most == -INFINITY ? 0.0f : most;
                const float f = exp2f(top[j] - base);
                sum[j] *= f;
                sum_v[j] *= f;
#pragma unroll
                for (int i = 0; i < T/32; i++) {
                    const int t = i*32 + lane;
                    const float w = exp2f(x[i] - base);
                    const float wv = w == 0.0f ? 0.0f : w*scale_v[t];
                    const __half h = __float2half_rn(wv);
                    weight[col*W_STRIDE + t] = h;
                    sum[j] += w;
                    sum_v[j] += __half2float(h); // as the codes are weighed
                }
                if (lane == 0) {
                    fix[col] = f;
                    if (f != 1.0f) {
                        atomicOr(changed, 1);
                    }
                }
                top[j] = most;
            }
        }
        __syncthreads();

        // values
        if (*changed) {
#pragma unroll
            for (int n = 0; n < NF; n++) {
                const float2 f = *(const float2 *)(fix + n*8 + lane%4*2);
#pragma unroll
                for (int i = 0; i < MV; i++) {
                    acc_v[i][n][0] *= f.x;
                    acc_v[i][n][1] *= f.y;
                    acc_v[i][n][2] *= f.x;
                    acc_v[i][n][3] *= f.y;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < T; k += 32) {
            uint32_t b[NF][4]; // of 8 cells each
#pragma unroll
            for (int n = 0; n < NF; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    b[n][i] = *(const uint32_t *)(weight + (n*8 + lane/4)*W_STRIDE + k + i*8 + lane%4*2);
                }
            }
#pragma unroll
            for (int i = 0; i < MV; i++) {
                if (i < v_mine) {
                    // two channels of two cells: even channels are rows 0 to 7 of the product, odd ones rows 8 to 15
                    uint32_t r[4];
                    mma::load_4_transposed(r, mma::smem(codes_v + (k + lane)*v_stride + (v_first + i)*16));
                    uint32_t a[2][4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const __half2 offset = __float2half2_rn(1024.0f); // 0x6400
                        const uint32_t even = __byte_perm(r[j], 0x64646464u, 0x4240);
                        const uint32_t odd = __byte_perm(r[j], 0x64646464u, 0x4341);
                        const __half2 e = __hsub2(*(const __half2 *) &even, offset);
                        const __half2 o = __hsub2(*(const __half2 *) &odd, offset);
                        a[j/2][j%2*2] = *(const uint32_t *) &e;
                        a[j/2][j%2*2 + 1] = *(const uint32_t *) &o;
                    }
#pragma unroll
                    for (int n = 0; n < NF; n++) {
                        mma::f16(acc_v[i][n], a[0], b[n][0], b[n][1]);
                        mma::f16(acc_v[i][n], a[1], b[n][2], b[n][3]);
                    }
                }
            }
        }
    }

    // what the chunk comes to
    auto partial = [&](int col) {
        const int c = col0 + col%p.mma_cols;
        const int64_t row = ((int64_t) stream*p.n_token + c/gqa)*p.n_head + (head0 + col/p.mma_cols)*gqa + c%gqa;
        return p.partial + (row*p.n_chunk + blockIdx.x)*(4 + p.rank_stride);
    };
    if (slice0 == 0) {
#pragma unroll
        for (int j = 0; j < MINE; j++) {
            if (token[j] >= 0) {
                const float a = warp_sum(sum[j]);
                const float b = warp_sum(sum_v[j]);
                if (lane == 0) {
                    *(float4 *) partial(warp + WARPS*j) = make_float4(top[j], a, b, 0.0f);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < NF; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int col = n*8 + lane%4*2 + e;
            if (col/p.mma_cols < hs && col0 + col%p.mma_cols < n_col_all) {
                float * to = partial(col) + 4 + slice0 + lane/4*2;
#pragma unroll
                for (int i = 0; i < MV; i++) {
                    const int ch = (v_first + i)*16;
                    if (i < v_mine && ch + lane/4*2 < slice) {
                        *(float2 *)(to + ch) = make_float2(acc_v[i][n][e], acc_v[i][n][2 + e]);
                    }
                }
            }
        }
    }
    mma::copy_wait<0>();
}

#define PALU_DECODE_MMA(T, NF, COLS, MV, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(4*T, BLOCKS) palu_decode_mma_##T##_##COLS(const __grid_constant__ palu_cuda_attn p) { decode_mma<T, NF, MV>(p); }
PALU_DECODE_MMA(64, 1,  8,  8, 2)
PALU_DECODE_MMA(64, 2, 16, 10, 1)
PALU_DECODE_MMA(64, 4, 32,  5, 1)
PALU_DECODE_MMA(32, 1,  8, 20, 2)
PALU_DECODE_MMA(32, 2, 16, 10, 2)
PALU_DECODE_MMA(32, 4, 32, 10, 2)
#undef PALU_DECODE_MMA
