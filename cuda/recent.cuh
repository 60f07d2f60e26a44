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

// A block per KV head, stream and token; where tokens are stored as well, per KV head and stream, as a slot may be overwritten when the
// queries of all tokens are done. Cells are staged CELLS at a time, so that all loads of a stage are in flight together; then a warp per
// query.
extern "C" __global__ void __launch_bounds__(256) palu_recent(const __grid_constant__ palu_cuda_recent p) {
    grid_next();
    constexpr int CELLS = PALU_CUDA_RECENT_CELLS;
    extern __shared__ __align__(16) uint8_t smem[];
    __shared__ int indices[PALU_CUDA_RECENT_MAX];
    __shared__ float weights[8][CELLS];
    const int kv = blockIdx.x;
    const int stream = blockIdx.y;
    const int tid = threadIdx.x;
    const int warp = tid/32;
    const int lane = tid%32;
    const int rep = p.n_head/p.n_head_kv;
    const int dk = p.head_dim_k;
    const int dv = p.head_dim_v;
    const int k_stride = palu_cuda_recent_stride(dk);
    const int v_stride = palu_cuda_recent_stride(dv);
    float * keys = (float *) smem;                // [CELLS][k_stride]
    float * values = keys + CELLS*k_stride;       // [CELLS][v_stride]
    float * sums = values + CELLS*v_stride;       // [8][dv], a warp's sums of values
    const int token0 = blockIdx.z;
    const int token_end = p.store && p.out ? p.n_token : token0 + 1;
    auto index_of = [&](int token, int j) { return p.idxs[((int64_t) stream*p.n_token + token)*(p.n_recent + 1) + j]; };
    if (!p.beside) {
        grid_wait();
    }

    // what comes from global memory and depends on nothing, together
    const recent_cell first_k(p, 0, stream, p.n_slot + token0, kv);
    const recent_cell first_v(p, 1, stream, p.n_slot + token0, kv);
    float2 own[2] = {}; // of this thread's first dimensions
    own[0] = tid*2 < dk ? first_k.load(tid*2) : own[0];
    own[1] = tid*2 < dv ? first_v.load(tid*2) : own[1];
    const int slot0 = p.store ? index_of(token0, p.n_recent) : -1;
    for (int token = token0; p.out && token < token_end; token++) {
        for (int j = tid; j < p.n_recent; j += 256) {
            indices[j] = index_of(token, j);
        }
        __syncthreads();
        for (int r0 = 0; r0 < rep; r0 += 8) {
            const int r = r0 + warp;
            const int head = kv*rep + min(r, rep - 1);
            const float * q = (const float *)((const char *) p.q + stream*p.q_nb_stream + token*p.q_nb_token + head*p.q_nb_head);
            const float slope = alibi_slope(p.max_bias, p.n_head, head);
            if (lane*32 < dk) {
                asm volatile("prefetch.global.L1 [%0];" :: "l"(q + lane*32)); // while cells are on their way
            }
            float * y = sums + warp*dv;
            for (int d = lane; d < dv; d += 32) {
                y[d] = 0.0f;
            }
            float top = -INFINITY;
            float sum = 0.0f;
            for (int j0 = 0; j0 < p.n_recent; j0 += CELLS) {
                __syncthreads(); // everybody is done with the stage before
                const int n = min(CELLS, p.n_recent - j0);
                // sixteen threads per cell
                static_assert(CELLS == 16, "a cell for every sixteen threads");
                const int mine_c = tid/16;
                const int index = mine_c < n ? indices[j0 + mine_c] : -1;
                const recent_cell k_cell(p, 0, stream, max(index, 0), kv);
                const recent_cell v_cell(p, 1, stream, max(index, 0), kv);
#pragma unroll 4
                for (int d = tid%16*2; d < dk; d += 32) {
                    *(float2 *)(keys + mine_c*k_stride + d) = index >= 0 ? k_cell.load(d) : make_float2(0.0f, 0.0f);
                }
#pragma unroll 4
                for (int d = tid%16*2; d < dv; d += 32) {
                    *(float2 *)(values + mine_c*v_stride + d) = index >= 0 ? v_cell.load(d) : make_float2(0.0f, 0.0f);
                }
                __syncthreads();
                // eight lanes per cell; lane c keeps the score of cell c
                float mine = -INFINITY;
#pragma unroll
                for (int c0 = 0; c0 < CELLS; c0 += 4) {
                    const int c = c0 + lane/8;
                    float x = 0.0f;
#pragma unroll 4
                    for (int d = lane%8*2; d < dk; d += 16) {
                        const float2 k = *(const float2 *)(keys + c*k_stride + d);
                        x = fmaf(q[d], k.x, fmaf(q[d + 1], k.y, x));
                    }
                    x += __shfl_xor_sync(0xffffffff, x, 1);
                    x += __shfl_xor_sync(0xffffffff, x, 2);
                    x += __shfl_xor_sync(0xffffffff, x, 4);
                    const float other = __shfl_sync(0xffffffff, x, lane%4*8);
                    mine = lane/4 == c0/4 ? other : mine;
                }
                mine *= p.scale;
                if (p.softcap != 0.0f) {
                    mine = p.softcap*tanhf(mine/p.softcap);
                }
                if (p.max_bias > 0.0f) {
                    mine -= slope*(j0 + lane);
                }
                mine = lane < n && indices[j0 + lane] >= 0 ? mine : -INFINITY;
                const float before = top;
                top = fmaxf(top, warp_max(mine));
                const float shrink = before == -INFINITY ? 0.0f : expf(before - top);
                const float w = mine == -INFINITY ? 0.0f : expf(mine - top); // not-a-number stays
                sum = sum*shrink + warp_sum(w);
                if (lane < CELLS) {
                    weights[warp][lane] = w;
                }
                __syncwarp();
                for (int d = lane*2; d < dv; d += 64) {
                    float2 a = make_float2(y[d]*shrink, y[d + 1]*shrink);
#pragma unroll
                    for (int c = 0; c < CELLS; c++) {
                        const float2 v = *(const float2 *)(values + c*v_stride + d);
                        const float wc = weights[warp][c];
                        a.x = fmaf(wc, v.x, a.x);
                        a.y = fmaf(wc, v.y, a.y);
                    }
                    y[d] = a.x;
                    y[d + 1] = a.y;
                }
                __syncwarp();
            }
            if (r < rep) {
                float * out = p.out + (((int64_t) stream*p.n_token + token)*p.n_head + head)*(4 + dv);
                if (lane < 4) {
                    out[lane] = lane == 0 ? top : lane == 1 ? sum : 0.0f;
                }
                __syncwarp();
                for (int d = lane; d < dv; d += 32) {
                    out[4 + d] = y[d];
                }
            }
        }
        __syncthreads(); // what is overwritten was read
    }
    for (int token = token0; p.store && token < token_end; token++) {
        const int slot = token == token0 ? slot0 : index_of(token, p.n_recent);
        for (int side = 0; slot >= 0 && side < 2; side++) {
            const recent_cell from(p, side, stream, p.n_slot + token, kv);
            const int hd = side ? dv : dk;
            __half2 * to = (__half2 *)(p.slots[side] + (((int64_t) stream*p.n_slot + slot)*p.n_head_kv + kv)*hd);
            for (int d = tid*2; d < hd; d += 512) {
                const float2 x = d == tid*2 && token == token0 ? own[side] : from.load(d);
                to[d/2] = __floats2half2_rn(x.x, x.y);
            }
        }
    }
    if (p.beside && kv == 0 && stream == 0 && token0 == 0) {
        grid_wait();
    }
}

// What comes before rebuilt rows: slots, tokens, zeros. A block per cell and stream.
extern "C" __global__ void __launch_bounds__(256) palu_prepend(const __grid_constant__ palu_cuda_prepend p) {
    grid_next();
    const int i = blockIdx.x;
    const int stream = blockIdx.y;
    const int n = p.n_head_kv*p.head_dim;
    __half2 * out = (__half2 *)(p.out + ((int64_t) stream*p.n_out + i)*n);
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
