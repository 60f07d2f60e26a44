// combine.cuh - after any decode kernel: merges the chunks of query rows, and decodes the summed values once.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "tiles.cuh"

// RB query rows of a KV head at a time, which share what is read of the decoder: one where blocks are few, more where they would stand in line.
// MANY: of contexts that clusters shared (tiles.cuh).
template <int RB, bool MANY> static __device__ __forceinline__ void combine(const palu_cuda_attn & p) {
    grid_next();
    extern __shared__ __align__(16) uint8_t smem[];
    struct Row {
        const float * chunks;
        int n_chunk;
        float sum, sum_v, extra, all; // of weights, of weights times row scales, the other cells' weight, of all weights
    };
    __shared__ Row sm_row[RB];
    const int tid = threadIdx.x;
    const int lane = tid & 31;
    const int warp = tid >> 5;
    const int hd = p.v.head_dim;
    const int n_block = (hd + 31)/32;                     // of a KV head
    const int head = blockIdx.x/n_block;
    const int gqa = p.n_head/p.v.n_head_kv;
    const palu_cuda_group g = side_group(p.v, head/p.v.group_size);
    const int rank = g.rank_pad;
    const int n_staged = PALU_CUDA_COMBINE_STAGED(p.rank_stride);
    int * sm_dec = (int *) smem;                          // [32][n_staged] first channels of the decoder's first plane
    float * u = (float *)(smem + 32*n_staged);            // [n_part][RB][rank], at most 4096 or RB*rank_pad
    float * all_u = u + max(4096, RB*(p.rank_stride + 32)); // [RB][rank_pad] values summed as codes
    float * weight = all_u + RB*(p.rank_stride + 32);     // [RB][n_chunk]
    const int stride = 4 + p.rank_stride;
    // the head's query rows: tokens of all streams, then query heads
    const int n_row = min(RB, gqa*p.n_token*p.n_stream - (int) blockIdx.y*RB);
    const int row_first = blockIdx.y*RB;
    auto token_of = [&](int r) { return (row_first + r)/gqa; };
    const int row0 = token_of(0)*p.n_head + head*gqa + row_first%gqa;
    auto row_of = [&](int r) { return RB == 1 ? row0 : token_of(r)*p.n_head + head*gqa + (row_first + r)%gqa; };

    // a warp per dimension; what never changes is loaded before the kernel waits
    constexpr int AHEAD = 5; // chunks; more do not fit the registers
    const int d = blockIdx.x%n_block*32 + warp;
    const int * dec = (const int *)(p.v.dec + g.dec0 + ((int64_t)(head%p.v.group_size)*hd + d)*g.rank_pad);
    const int64_t plane = (int64_t) p.v.group_size*hd*g.rank_pad/4; // of a decoder, in words
    sm_dec += warp*(n_staged/4);
    float scale_d = 0.0f, mean_d = 0.0f;
    if (d < hd) {
        for (int i = lane*4; i < min(rank, n_staged)/4; i += 128) {
            mma::copy16(mma::smem(sm_dec + i), dec + i);
        }
        scale_d = g.rank ? p.v.dec_scale[(int64_t) head*hd + d] : 0.0f;
        mean_d = p.v.mean[(int64_t) head*hd + d];
    }
    mma::copy_commit();
    auto middle = [&](int c) { return ((1 << (c < g.rank ? p.v.segs[g.seg0 + c/8] >> 24 : 0)) - 1)*0.5f; };
    const float middle0 = rank ? middle(RB == 1 ? tid : tid%rank) : 0.0f;
    grid_wait();

    // where a row's chunks are
    const int next_chunk = MANY ? p.context_tokens*p.n_head*stride : stride;
    if (MANY) {
        const int ends = context_ends(p);
        const int r = warp < n_row ? warp : 0;
        const int token = token_of(r);
        const ContextChunks of(p, ends, token/p.context_tokens);
        if (warp < RB && lane == 0) {
            const int64_t at = (int64_t)(of.first + token/p.context_tokens)*p.context_tokens + token%p.context_tokens;
            sm_row[warp].chunks = p.partial + palu_cuda_tiles_size(&p) + (at*p.n_head + row_of(r)%p.n_head)*stride;
            sm_row[warp].n_chunk = warp < n_row ? of.n : 0;
        }
        __syncthreads();
    }
    auto chunks_of = [&](int r) { return MANY ? sm_row[r].chunks : p.partial + (int64_t) row_of(r)*p.n_chunk*stride; };
    auto n_chunk_of = [&](int r) { return MANY ? sm_row[r].n_chunk : r < n_row ? p.n_chunk : 0; };

    // four channels of a row per thread, and the chunks in n_part parts
    const int n_quad = max(1, min(1024, RB*rank/4));
    const int n_part = 1024/n_quad;
    const int mine = tid/n_quad;
    const int c0 = tid%n_quad*4;
    float4 ahead[AHEAD];
    {
        const int r = RB == 1 || rank == 0 ? 0 : c0/rank;
        const int n = c0 - r*rank < g.rank && mine < n_part ? n_chunk_of(r) : 0;
        const float * at = chunks_of(r) + mine*next_chunk + 4 + c0 - r*rank;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            ahead[j] = mine + j*n_part < n ? *(const float4 *) at : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            at += n_part*next_chunk;
        }
    }
    // what all chunks' weights and their sums are: every warp by itself for one of the rows, a lane per chunk
    {
        const int r = warp%RB;
        const int n_chunk = n_chunk_of(r);
        const float * part = chunks_of(r);
        const float sink = p.sinks ? p.sinks[row_of(r)%p.n_head]*LOG2E : -INFINITY;
        const float * extra = p.extra && r < n_row ? p.extra + (int64_t) row_of(r)*(4 + hd) : nullptr;
        const float extra_top = extra ? extra[0]*LOG2E : -INFINITY;
        const float extra_sum = extra ? extra[1] : 0.0f;
        const float4 none = make_float4(-INFINITY, 0.0f, 0.0f, 0.0f);
        const float4 header0 = lane < n_chunk ? *(const float4 *)(part + lane*next_chunk) : none;
        float top = fmaxf(fmaxf(sink, extra_top), header0.x);
        for (int i = 32 + lane; i < n_chunk; i += 32) {
            top = fmaxf(top, part[i*next_chunk]);
        }
        top = warp_max(top);
        const float base = top == -INFINITY ? 0.0f : top;
        float sum = 0.0f;
        float sum_v = 0.0f;
        for (int i = lane; i < n_chunk; i += 32) {
            const float4 header = i < 32 ? header0 : *(const float4 *)(part + i*next_chunk);
            const float w = exp2f(header.x - base);
            if (warp < RB) {
                weight[r*p.n_chunk + i] = w;
            }
            sum += w*header.y;
            sum_v += w*header.z;
        }
        sum = warp_sum(sum);
        sum_v = warp_sum(sum_v);
        const float extra_w = exp2f(extra_top - base);
        if (warp < RB && lane == 0) {
            sm_row[r].sum = sum;
            sm_row[r].sum_v = sum_v;
            sm_row[r].extra = extra_w;
            sm_row[r].all = sum + extra_w*extra_sum + (p.sinks ? exp2f(sink - base) : 0.0f);
        }
    }
    // a lane per row for what is written in the end
    const bool writes = d < hd && lane < n_row;
    const float extra_d = p.extra && writes ? p.extra[(int64_t) row_of(lane)*(4 + hd) + 4 + d] : 0.0f;
    __syncthreads();
    for (int c = c0; c < RB*rank && mine < n_part; c += 4096) {
        const int r = RB == 1 ? 0 : c/rank;
        const int n_chunk = n_chunk_of(r);
        const float * w_r = weight + r*p.n_chunk;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        auto add = [&](float w, const float4 & y) {
            x.x = fmaf(w, y.x, x.x);
            x.y = fmaf(w, y.y, x.y);
            x.z = fmaf(w, y.z, x.z);
            x.w = fmaf(w, y.w, x.w);
        };
        int i = mine;
        if (c < 4096) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                add(i < n_chunk ? w_r[i] : 0.0f, ahead[j]);
                i += n_part;
            }
        }
        if (c - r*rank < g.rank) {
            const float * at = chunks_of(r) + 4 + c - r*rank;
#pragma unroll 4
            for (; i < n_chunk; i += n_part) {
                add(w_r[i], *(const float4 *)(at + i*next_chunk));
            }
        }
        *(float4 *)(u + mine*RB*rank + c) = x;
    }
    __syncthreads();
    for (int c = tid; c < RB*rank; c += 1024) {
        float x = u[c];
#pragma unroll 4
        for (int i = 1; i < n_part; i++) {
            x += u[i*RB*rank + c];
        }
        const int r = RB == 1 ? 0 : c/rank;
        all_u[c] = x - (c == tid ? middle0 : middle(c - r*rank))*sm_row[r].sum_v;
    }
    mma::copy_wait<0>();
    __syncthreads();
    float x[RB] = {};
    if (d < hd) {
        for (int n = 0; n < p.v.planes; n++) {
#pragma unroll
            for (int r = 0; r < RB; r++) {
                x[r] *= 256.0f;
            }
#pragma unroll(RB == 1 ? 4 : 1)
            for (int i = lane; i < rank/4; i += 32) {
                const int word = n == 0 && i < n_staged/4 ? sm_dec[i] : __ldg(dec + n*plane + i);
                const float w[4] = { (float) (int8_t) word, (float) (int8_t) (word >> 8), (float) (int8_t) (word >> 16), (float) (word >> 24) };
#pragma unroll
                for (int r = 0; r < RB; r++) {
                    const float4 y = *(const float4 *)(all_u + r*rank + i*4);
                    x[r] = fmaf(w[0], y.x, x[r]);
                    x[r] = fmaf(w[1], y.y, x[r]);
                    x[r] = fmaf(w[2], y.z, x[r]);
                    x[r] = fmaf(w[3], y.w, x[r]);
                }
            }
        }
    }
    float mine_x = 0.0f;
#pragma unroll
    for (int r = 0; r < RB; r++) {
        const float sum = warp_sum(x[r]);
        mine_x = lane == r ? sum : mine_x;
    }
    if (writes) {
        const Row & of = sm_row[lane];
        const float inv = of.all > 0.0f ? 1.0f/of.all : of.all == 0.0f ? 0.0f : of.all; // no visible cell: zeros
        p.out[(int64_t) row_of(lane)*hd + d] = of.all > 0.0f || of.all != of.all ? (scale_d*mine_x + mean_d*of.sum + of.extra*extra_d)*inv : 0.0f;
    }
}

#define PALU_COMBINE(RB) \
    extern "C" __global__ void __launch_bounds__(1024) palu_combine_##RB(const __grid_constant__ palu_cuda_attn p) { combine<RB, false>(p); } \
    extern "C" __global__ void __launch_bounds__(1024) palu_combine_many_##RB(const __grid_constant__ palu_cuda_attn p) { combine<RB, true>(p); }
PALU_CUDA_COMBINE_KERNELS(PALU_COMBINE)
#undef PALU_COMBINE
