// palu.cu - decode attention for any shape, combine, and the other files' kernels. See palu_cuda.h for the parameters.

#include "palu_cuda.h"
#include "common.cuh"
#include "store.cuh"
#include "rebuild.cuh"

//
// Decode attention for any shape: a KV head, up to 8 query rows and a chunk of the context per block. Simple and right;
// the fast kernels are checked against it.
//

static __device__ float mask_at(const palu_cuda_attn & p, int stream, int token, int cell) {
    if (!p.mask) {
        return 0.0f;
    }
    const char * m = (const char *) p.mask + stream*p.mask_nb_stream + token*p.mask_nb_token;
    return p.mask_f16 ? __half2float(((const __half *) m)[cell]) : ((const float *) m)[cell];
}

// Eight codes of a segment, read byte by byte.
static __device__ uint64_t segment_bits(const uint8_t * row, uint32_t seg) {
    uint64_t v = 0;
    for (uint32_t i = 0; i < seg >> 24; i++) {
        v |= (uint64_t) row[(seg & 0xffffff) + i] << (8*i);
    }
    return v;
}

static __device__ float row_scale(const uint8_t * row, int offset) {
    return __half2float(__ushort_as_half(row[offset] | row[offset + 1] << 8));
}

extern "C" __global__ void __launch_bounds__(128) palu_decode(const __grid_constant__ palu_cuda_attn p) {
    grid_wait();
    grid_next();
    constexpr int T = 32;
    extern __shared__ __align__(16) uint8_t smem[];
    const int tid = threadIdx.x;
    const int gqa = p.n_head/p.k.n_head_kv;
    const int n_col_all = gqa*p.n_token;
    const int n_block = (n_col_all + 7)/8;
    const int head = blockIdx.y/n_block;       // KV head
    const int col0 = blockIdx.y%n_block*8;
    const int n_col = min(8, n_col_all - col0);
    const int stream = blockIdx.z;
    const int hd = p.k.head_dim;
    const palu_cuda_group gk = p.k.groups[head/p.k.group_size];
    const palu_cuda_group gv = p.v.groups[head/p.v.group_size];
    const int pad = (max(p.k.rank_max, p.v.rank_max) + 31)/32*32 + 4;

    int8_t * codes = (int8_t *) smem;            // [T][pad]
    float * key    = (float *)(codes + T*pad);   // [T][hd + 1]
    float * q      = key + T*(hd + 1);           // [8][hd]
    float * s      = q + 8*hd;                   // [8][T]
    float * sums   = s + 8*T;                    // [8][8]: largest score, sum, weighted sum, correction
    float * scale_k = sums + 64;                 // [T]
    float * scale_v = scale_k + T;               // [T]
    int   * seen   = (int *)(scale_v + T);       // [T] some query row sees the cell
    int   * pos    = seen + T;                   // [T]
    float * u      = (float *)(pos + T);         // [8][rank_stride]

    for (int i = tid; i < n_col*hd; i += 128) {
        const int c = col0 + i/hd;
        const char * src = (const char *) p.q + stream*p.q_nb_stream + (c/gqa)*p.q_nb_token + (head*gqa + c%gqa)*p.q_nb_head;
        q[i] = ((const float *) src)[i%hd];
    }
    for (int i = tid; i < 8*p.rank_stride; i += 128) {
        u[i] = 0.0f;
    }
    if (tid < 8) {
        sums[tid*8] = -INFINITY;
        sums[tid*8 + 1] = 0.0f;
        sums[tid*8 + 2] = 0.0f;
    }
    const int8_t * dec = p.k.dec + gk.dec0 + (int64_t)(head%p.k.group_size)*hd*gk.rank_pad;
    const int64_t plane_k = (int64_t) p.k.group_size*hd*gk.rank_pad;
    const float * mean = p.k.mean + (int64_t) head*hd;
    const float * dec_scale = p.k.dec_scale + (int64_t) head*hd;
    const float * dec_half = p.k.dec_half + (int64_t) head*hd;
    const uint8_t * rows_k = p.rows_k + stream*p.rows_k_nb_stream;
    const uint8_t * rows_v = p.rows_v + stream*p.rows_v_nb_stream;

    const int cell_begin = blockIdx.x*p.part.chunk_tiles*PALU_CUDA_TILE;
    const int cell_end = min(p.n_kv, cell_begin + p.part.chunk_tiles*PALU_CUDA_TILE);
    for (int cell0 = cell_begin; cell0 < cell_end; cell0 += T) {
        const int n = min(T, cell_end - cell0);
        __syncthreads();
        if (tid < T) {
            bool any = false;
            for (int c = 0; c < n_col && tid < n; c++) {
                any |= mask_at(p, stream, (col0 + c)/gqa, cell0 + tid) != -INFINITY;
            }
            seen[tid] = any;
            pos[tid] = any ? p.pos[(int64_t) stream*p.n_kv + cell0 + tid] : 0;
            scale_k[tid] = any ? row_scale(rows_k + (int64_t)(cell0 + tid)*p.k.row_bytes, gk.row_offset) : 0.0f;
            scale_v[tid] = any ? row_scale(rows_v + (int64_t)(cell0 + tid)*p.v.row_bytes, gv.row_offset) : 0.0f;
        }
        __syncthreads();
        for (int i = tid; i < T*(gk.rank_pad/8); i += 128) {
            const int t = i%T;
            const int sg = i/T;
            const bool real = seen[t] && sg < gk.rank/8;
            const uint32_t seg = real ? p.k.segs[gk.seg0 + sg] : 0;
            const uint64_t v = real ? segment_bits(rows_k + (int64_t)(cell0 + t)*p.k.row_bytes, seg) : 0;
            const int bits = seg >> 24;
            for (int j = 0; j < 8; j++) {
                // centred: the half that is left is in dec_half
                codes[t*pad + (sg/4*32 + j/4*16 + sg%4*4 + j%4)] = real ? (int) (v >> (j*bits) & ((1u << bits) - 1)) - (1 << (bits - 1)) : 0;
            }
        }
        __syncthreads();
        for (int i = tid; i < T*(hd/2); i += 128) {
            const int t = i%T;
            const int pair = i/T;
            if (!seen[t]) {
                continue;
            }
            float x[2];
            for (int side = 0; side < 2; side++) {
                const int dim = p.rope.pair_dim[pair*2 + side];
                const int8_t * w = dec + (int64_t) dim*gk.rank_pad;
                float sum = 0.0f;
                for (int plane = 0; plane < p.k.planes; plane++) {
                    int part = 0;
                    for (int c = 0; c < gk.rank_pad; c += 4) {
                        part = __dp4a(*(const int *)(codes + t*pad + c), *(const int *)(w + c), part);
                    }
                    sum = 256.0f*sum + (float) part;
                    w += plane_k;
                }
                const float latent = gk.rank ? scale_k[t]*(dec_scale[dim]*(sum + dec_half[dim])) : 0.0f;
                x[side] = latent + mean[dim];
            }
            float sn, cs;
            sincos_turn((uint64_t) (int64_t) pos[t]*p.rope.turn[pair], sn, cs);
            const float mag = p.rope.mag[pair];
            key[t*(hd + 1) + p.rope.pair_dim[pair*2]]     = mag*(x[0]*cs - x[1]*sn);
            key[t*(hd + 1) + p.rope.pair_dim[pair*2 + 1]] = mag*(x[0]*sn + x[1]*cs);
        }
        __syncthreads();
        for (int i = tid; i < T*n_col; i += 128) {
            const int t = i%T;
            const int c = i/T;
            const float m = t < n ? mask_at(p, stream, (col0 + c)/gqa, cell0 + t) : -INFINITY;
            float dot = -INFINITY;
            if (m != -INFINITY) {
                dot = 0.0f;
                for (int j = 0; j < hd; j++) {
                    dot = fmaf(q[c*hd + j], key[t*(hd + 1) + j], dot);
                }
                dot *= p.scale;
                if (p.softcap != 0.0f) {
                    dot = p.softcap*tanhf(dot/p.softcap);
                }
                dot = (dot + alibi_slope(p.max_bias, p.n_head, head*gqa + (col0 + c)%gqa)*m)*LOG2E;
            }
            s[c*T + t] = dot;
        }
        __syncthreads();
        for (int c = tid >> 5; c < n_col; c += 4) {
            const int t = tid & 31;
            const float x = s[c*T + t];
            const float old = sums[c*8];
            const float top = fmaxf(old, warp_max(x));
            const float base = top == -INFINITY ? 0.0f : top;
            const float w = x == -INFINITY ? 0.0f : exp2f(x - base);
            const float wv = w == 0.0f ? 0.0f : w*scale_v[t];
            const float sum = warp_sum(w);
            const float sum_v = warp_sum(wv);
            s[c*T + t] = wv;
            __syncwarp();
            if (t == 0) {
                const float fix = exp2f(old - base);
                sums[c*8] = top;
                sums[c*8 + 1] = sums[c*8 + 1]*fix + sum;
                sums[c*8 + 2] = sums[c*8 + 2]*fix + sum_v;
                sums[c*8 + 3] = fix;
            }
        }
        for (int i = tid; i < T*(gv.rank/8); i += 128) {
            const int t = i%T;
            const int sg = i/T;
            const uint32_t seg = p.v.segs[gv.seg0 + sg];
            const uint64_t v = seen[t] ? segment_bits(rows_v + (int64_t)(cell0 + t)*p.v.row_bytes, seg) : 0;
            const int bits = seg >> 24;
            for (int j = 0; j < 8; j++) {
                ((uint8_t *) codes)[t*pad + sg*8 + j] = v >> (j*bits) & ((1u << bits) - 1);
            }
        }
        __syncthreads();
        for (int ch = tid; ch < gv.rank; ch += 128) {
            for (int c = 0; c < n_col; c++) {
                float sum = u[c*p.rank_stride + ch]*sums[c*8 + 3];
                for (int t = 0; t < T; t++) {
                    sum = fmaf(s[c*T + t], (float) ((uint8_t *) codes)[t*pad + ch], sum);
                }
                u[c*p.rank_stride + ch] = sum;
            }
        }
    }
    __syncthreads();
    for (int c = 0; c < n_col; c++) {
        const int token = (col0 + c)/gqa;
        const int qh = head*gqa + (col0 + c)%gqa;
        float * dst = p.partial + ((((int64_t) stream*p.n_token + token)*p.n_head + qh)*p.n_chunk + blockIdx.x)*(4 + p.rank_stride);
        if (tid < 4) {
            dst[tid] = tid < 3 ? sums[c*8 + tid] : 0.0f;
        }
        for (int i = tid; i < gv.rank; i += 128) {
            dst[4 + i] = u[c*p.rank_stride + i];
        }
    }
}

//
// Combine: merges the chunks of one query row, decodes the summed values once
//

extern "C" __global__ void __launch_bounds__(1024) palu_combine(const __grid_constant__ palu_cuda_attn p) {
    grid_next();
    extern __shared__ __align__(16) uint8_t smem[];
    const int n_staged = PALU_CUDA_COMBINE_STAGED(p.rank_stride);
    int * sm_dec = (int *) smem;                          // [32][n_staged] first channels of the decoder's first plane
    float * u = (float *)(smem + 32*n_staged);            // [n_part][rank], at most 4096 or rank_pad
    float * all_u = u + max(4096, p.rank_stride + 32);    // [rank_pad] values summed as codes
    float * weight = all_u + p.rank_stride + 32;          // [n_chunk]
    const int tid = threadIdx.x;
    const int n_block = gridDim.x/p.n_head;               // of a query row
    const int qh = blockIdx.x/n_block;
    const int head = qh/(p.n_head/p.v.n_head_kv);
    const palu_cuda_group g = side_group(p.v, head/p.v.group_size);
    const int64_t row = ((int64_t) blockIdx.z*p.n_token + blockIdx.y)*p.n_head + qh;
    const int stride = 4 + p.rank_stride;
    const float * part = p.partial + row*p.n_chunk*stride;
    const int lane = tid & 31;

    // a warp per dimension; what never changes is loaded before the kernel waits
    constexpr int AHEAD = 5; // chunks; more do not fit the registers
    const int hd = p.v.head_dim;
    const int d = blockIdx.x%n_block*32 + tid/32;
    const int * dec = (const int *)(p.v.dec + g.dec0 + ((int64_t)(head%p.v.group_size)*hd + d)*g.rank_pad);
    const int64_t plane = (int64_t) p.v.group_size*hd*g.rank_pad/4; // of a decoder, in words
    const int rank = g.rank_pad;
    sm_dec += tid/32*(n_staged/4);
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
    const float middle0 = middle(tid);
    grid_wait();

    // four channels per thread, and the chunks in n_part parts
    const int n_quad = max(1, min(1024, rank/4));
    const int n_part = 1024/n_quad;
    const int mine = tid/n_quad;
    const int n_mine = tid%n_quad*4 < g.rank && mine < n_part ? (p.n_chunk - mine + n_part - 1)/n_part : 0;
    float4 ahead[AHEAD];
    {
        const float * at = part + mine*stride + 4 + tid%n_quad*4;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            ahead[j] = j < n_mine ? *(const float4 *) at : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            at += n_part*stride;
        }
    }
    // what all chunks' weights and their sums are: every warp by itself, a lane per chunk
    const float sink = p.sinks ? p.sinks[qh]*LOG2E : -INFINITY;
    const float * extra = p.extra ? p.extra + row*(4 + hd) : nullptr;
    const float extra_top = extra ? extra[0]*LOG2E : -INFINITY;
    const float extra_sum = extra ? extra[1] : 0.0f;
    const float extra_d = extra && d < hd ? extra[4 + d] : 0.0f;
    const float4 none = make_float4(-INFINITY, 0.0f, 0.0f, 0.0f);
    const float4 header0 = lane < p.n_chunk ? *(const float4 *)(part + (int64_t) lane*stride) : none;
    float top = fmaxf(fmaxf(sink, extra_top), header0.x);
    for (int i = 32 + lane; i < p.n_chunk; i += 32) {
        top = fmaxf(top, part[(int64_t) i*stride]);
    }
    top = warp_max(top);
    const float base = top == -INFINITY ? 0.0f : top;
    float sum = 0.0f;
    float sum_v = 0.0f;
    for (int i = lane; i < p.n_chunk; i += 32) {
        const float4 header = i < 32 ? header0 : *(const float4 *)(part + (int64_t) i*stride);
        const float w = exp2f(header.x - base);
        if (tid < 32) {
            weight[i] = w;
        }
        sum += w*header.y;
        sum_v += w*header.z;
    }
    sum = warp_sum(sum);
    sum_v = warp_sum(sum_v);
    const float extra_w = exp2f(extra_top - base);
    const float all = sum + extra_w*extra_sum + (p.sinks ? exp2f(sink - base) : 0.0f);
    const float inv = all > 0.0f ? 1.0f/all : all == 0.0f ? 0.0f : all; // no visible cell: zeros
    __syncthreads();
    for (int c = tid%n_quad*4; c < rank && mine < n_part; c += 4096) {
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
                add(i < p.n_chunk ? weight[i] : 0.0f, ahead[j]);
                i += n_part;
            }
        }
        if (c < g.rank) {
#pragma unroll 4
            for (; i < p.n_chunk; i += n_part) {
                add(weight[i], *(const float4 *)(part + (int64_t) i*stride + 4 + c));
            }
        }
        *(float4 *)(u + mine*rank + c) = x;
    }
    __syncthreads();
    for (int c = tid; c < rank; c += 1024) {
        float x = u[c];
#pragma unroll 4
        for (int i = 1; i < n_part; i++) {
            x += u[i*rank + c];
        }
        all_u[c] = x - (c == tid ? middle0 : middle(c))*sum_v;
    }
    mma::copy_wait<0>();
    __syncthreads();
    float x = 0.0f;
    if (d < hd) {
        for (int n = 0; n < p.v.planes; n++) {
            x *= 256.0f;
            auto add = [&](int i, int word) {
                const float4 y = *(const float4 *)(all_u + i*4);
                x = fmaf((float) (int8_t) word, y.x, x);
                x = fmaf((float) (int8_t) (word >> 8), y.y, x);
                x = fmaf((float) (int8_t) (word >> 16), y.z, x);
                x = fmaf((float) (word >> 24), y.w, x);
            };
#pragma unroll 4
            for (int i = lane; i < rank/4; i += 32) {
                add(i, n == 0 && i < n_staged/4 ? sm_dec[i] : __ldg(dec + n*plane + i));
            }
        }
    }
    x = warp_sum(x);
    if (d < hd && lane == 0) {
        p.out[row*hd + d] = all > 0.0f || all != all ? (scale_d*x + mean_d*sum + extra_w*extra_d)*inv : 0.0f;
    }
}

#include "decode_mma.cuh"
#include "decode_sm90.cuh"
#include "decode_sm90_wide.cuh"
#include "decode_sm90_cluster.cuh"
#include "decode_sm90_cheb.cuh"
#include "recent.cuh"
