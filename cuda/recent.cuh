// recent.cuh - the last tokens in f16, beside the rows; palu_recent() of include/palu.h.
#pragma once

#include "common.cuh"
#include "palu_cuda.h"

// Two neighbouring dimensions of a cell that an index names.
struct recent_cell {
    const __half2 * slot; // or
    const float   * cur;

    __device__ recent_cell(const palu_cuda_recent & p, int side, int stream, int index, int kv) {
        const int hd = side ? p.head_dim_v : p.head_dim_k;
        const int64_t at = (((int64_t) stream*p.n_slot + index)*p.n_head_kv + kv)*hd;
        const int64_t token = (int64_t) stream*p.n_token + index - p.n_slot;
        slot = index < p.n_slot ? (const __half2 *)(p.slots[side] + at) : nullptr;
        cur = (const float *)((const char *) p.cur[side] + token*p.cur_nb_token[side] + kv*p.cur_nb_head[side]);
    }

    __device__ float2 load(int d) const { return slot ? __half22float2(slot[d/2]) : make_float2(cur[d], cur[d + 1]); }
};

// A block per KV head, stream and palu_cuda_recent.tokens_per_block tokens: first a warp per query, then the tokens that go to slots.
extern "C" __global__ void __launch_bounds__(256) palu_recent(const __grid_constant__ palu_cuda_recent p) {
    grid_next();
    __shared__ float all_scores[8][PALU_CUDA_RECENT_MAX];
    const int kv = blockIdx.x;
    const int stream = blockIdx.y;
    const int token0 = blockIdx.z*p.tokens_per_block;
    const int token1 = min(token0 + p.tokens_per_block, p.n_token);
    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;
    const int rep = p.n_head/p.n_head_kv;
    const int32_t * idxs = p.idxs + (int64_t) stream*p.n_token*(p.n_recent + 1);
    float * scores = all_scores[warp];
    grid_wait();

    for (int r = token0*rep + warp; p.out && r < token1*rep; r += 8) {
        const int token = r/rep;
        const int head = kv*rep + r%rep;
        const int32_t * idx = idxs + token*(p.n_recent + 1);
        const float * q = (const float *)((const char *) p.q + stream*p.q_nb_stream + token*p.q_nb_token + head*p.q_nb_head);
        const float slope = alibi_slope(p.max_bias, p.n_head, head);

        // eight lanes per cell
        float top = -INFINITY;
        for (int j0 = 0; j0 < p.n_recent; j0 += 4) {
            const int j = j0 + lane/8;
            const int index = j < p.n_recent ? idx[j] : -1;
            float x = 0.0f;
            if (index >= 0) {
                const recent_cell cell(p, 0, stream, index, kv);
#pragma unroll 4
                for (int d = lane%8*2; d < p.head_dim_k; d += 16) {
                    const float2 k = cell.load(d);
                    x = fmaf(q[d], k.x, fmaf(q[d + 1], k.y, x));
                }
            }
            x += __shfl_xor_sync(0xffffffff, x, 1);
            x += __shfl_xor_sync(0xffffffff, x, 2);
            x += __shfl_xor_sync(0xffffffff, x, 4);
            x *= p.scale;
            if (p.softcap != 0.0f) {
                x = p.softcap*tanhf(x/p.softcap);
            }
            if (p.max_bias > 0.0f) {
                x -= slope*j;
            }
            x = index >= 0 ? x : -INFINITY;
            top = fmaxf(top, x);
            if (lane%8 == 0 && j < p.n_recent) {
                scores[j] = x;
            }
        }
        top = warp_max(top);
        __syncwarp();
        float sum = 0.0f;
        for (int j = lane; j < p.n_recent; j += 32) {
            const float x = scores[j];
            const float w = x == -INFINITY ? 0.0f : expf(x - top); // not-a-number stays
            scores[j] = w;
            sum += w;
        }
        sum = warp_sum(sum);
        __syncwarp();
        float * out = p.out + (((int64_t) stream*p.n_token + token)*p.n_head + head)*(4 + p.head_dim_v);
        if (lane < 4) {
            out[lane] = lane == 0 ? top : lane == 1 ? sum : 0.0f;
        }
        for (int d = lane*2; d < p.head_dim_v; d += 64) {
            float2 y = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int j = 0; j < p.n_recent; j++) {
                const int index = idx[j];
                if (index >= 0) {
                    const float2 v = recent_cell(p, 1, stream, index, kv).load(d);
                    y.x = fmaf(scores[j], v.x, y.x);
                    y.y = fmaf(scores[j], v.y, y.y);
                }
            }
            out[4 + d] = y.x;
            out[5 + d] = y.y;
        }
        __syncwarp(); // before the scores are written again
    }

    __syncthreads();
    for (int token = token0; token < token1; token++) {
        const int slot = idxs[token*(p.n_recent + 1) + p.n_recent];
        if (slot < 0) {
            continue;
        }
        for (int side = 0; side < 2; side++) {
            const int hd = side ? p.head_dim_v : p.head_dim_k;
            const recent_cell cell(p, side, stream, p.n_slot + token, kv);
            __half2 * to = (__half2 *)(p.slots[side] + (((int64_t) stream*p.n_slot + slot)*p.n_head_kv + kv)*hd);
            for (int d = threadIdx.x*2; d < hd; d += 512) {
                const float2 x = cell.load(d);
                to[d/2] = __floats2half2_rn(x.x, x.y);
            }
        }
    }
}

// What follows rebuilt rows: slots, tokens, zeros. A block per cell and stream.
extern "C" __global__ void __launch_bounds__(256) palu_append(const __grid_constant__ palu_cuda_append p) {
    grid_next();
    const int i = blockIdx.x;
    const int stream = blockIdx.y;
    const int n = p.n_head_kv*p.head_dim;
    __half2 * out = (__half2 *)(p.out + ((int64_t) stream*p.n_out + p.n_kv + i)*n);
    const __half2 * slot = (const __half2 *)(p.slots + ((int64_t) stream*p.n_slot + i)*n);
    const char * cur = (const char *) p.cur + ((int64_t) stream*p.n_token + i - p.n_slot)*p.cur_nb_token;
    grid_wait();
    for (int d = threadIdx.x; d < n/2; d += 256) {
        __half2 x = __half2half2(__ushort_as_half(0));
        if (i < p.n_slot) {
            x = slot[d];
        } else if (i < p.n_slot + p.n_token) {
            const float * head = (const float *)(cur + d*2/p.head_dim*p.cur_nb_head) + d*2%p.head_dim;
            x = __floats2half2_rn(head[0], head[1]);
        }
        out[d] = x;
    }
}
