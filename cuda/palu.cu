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

#include "combine.cuh"
#include "decode_mma.cuh"
#include "decode_sm90.cuh"
#include "decode_sm90_wide.cuh"
#include "decode_sm90_cluster.cuh"
#include "decode_sm90_cheb.cuh"
#include "recent.cuh"
