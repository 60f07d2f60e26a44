// store.cuh - tokens to rows: z = enc (x - mean), then the scale with the least squared error, as the CPU codec finds it.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "palu_cuda.h"

// A block's side; group: of both sides together, then of that one.
static __device__ __forceinline__ const palu_cuda_stored & stored_side(const palu_cuda_store & p, int & group) {
    const int n = p.of[0].side.n_group;
    const bool second = group >= n;
    group -= second ? n : 0;
    return p.of[second];
}

//
// Projection in f32, for few tokens or any shape: a warp per channel and PALU_CUDA_PROJECT_TOKENS tokens
//

static __device__ __forceinline__ float store_dot8(const uint4 & e, const float4 & a, const float4 & b, float sum) {
    const float2 e0 = __half22float2(*(const __half2 *) &e.x);
    const float2 e1 = __half22float2(*(const __half2 *) &e.y);
    const float2 e2 = __half22float2(*(const __half2 *) &e.z);
    const float2 e3 = __half22float2(*(const __half2 *) &e.w);
    sum = fmaf(e0.x, a.x, sum);
    sum = fmaf(e0.y, a.y, sum);
    sum = fmaf(e1.x, a.z, sum);
    sum = fmaf(e1.y, a.w, sum);
    sum = fmaf(e2.x, b.x, sum);
    sum = fmaf(e2.y, b.y, sum);
    sum = fmaf(e3.x, b.z, sum);
    return fmaf(e3.y, b.w, sum);
}

static __device__ __forceinline__ float4 store_minus(const float4 & a, const float4 & b) {
    return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w);
}

// A warp's channel of a block's eight, PALU_CUDA_PROJECT_TOKENS tokens from t0 on. ready(): the tokens may be read
template <typename Ready>
static __device__ __forceinline__ void project(const palu_cuda_stored & p, const palu_cuda_group & group, int gi, int t0, int n_token, Ready ready) {
    constexpr int T = PALU_CUDA_PROJECT_TOKENS;
    const int lane = threadIdx.x & 31;
    const int c = blockIdx.x*8 + (threadIdx.x >> 5);
    if (c >= group.rank) {
        return;
    }
    const int hd = p.side.head_dim;
    const int d = p.side.group_size*hd;
    const int n_t = min(T, n_token - t0);
    const __half * enc = (const __half *) p.side.enc + group.enc0 + (int64_t) c*d;
    for (int j = lane*64; j < d; j += 32*64) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"(enc + j));
    }
    ready();
    const float * mean = p.side.mean + (int64_t) gi*d;
    const char * x = (const char *) p.x + (int64_t) gi*p.side.group_size*p.x_nb_head + t0*p.x_nb_token;
    float sum[T] = {};
    if (hd%8 == 0 && (((uintptr_t) x | p.x_nb_head | p.x_nb_token) & 15) == 0) {
#pragma unroll 4
        for (int j = lane*8; j < d; j += 256) {
            const int head = j/hd;
            const char * at = x + head*p.x_nb_head + (j - head*hd)*4;
            const uint4 e = *(const uint4 *)(enc + j);
            const float4 m0 = *(const float4 *)(mean + j);
            const float4 m1 = *(const float4 *)(mean + j + 4);
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t < n_t) {
                    const float4 * v = (const float4 *)(at + t*p.x_nb_token);
                    sum[t] = store_dot8(e, store_minus(v[0], m0), store_minus(v[1], m1), sum[t]);
                }
            }
        }
    } else {
        for (int j = lane; j < d; j += 32) {
            const float e = __half2float(enc[j]);
            const char * at = x + j/hd*p.x_nb_head + j%hd*4;
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t < n_t) {
                    sum[t] = fmaf(e, *(const float *)(at + t*p.x_nb_token) - mean[j], sum[t]);
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < T; t++) {
        const float s = warp_sum(sum[t]);
        if (lane == 0 && t < n_t) {
            p.latent[(int64_t)(t0 + t)*p.side.rank_sum + group.step0 + c] = s;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) palu_project(const __grid_constant__ palu_cuda_store all) {
    int gi = blockIdx.y;
    const palu_cuda_stored & p = stored_side(all, gi);
    project(p, side_group(p.side, gi), gi, blockIdx.z*PALU_CUDA_PROJECT_TOKENS, all.n_token, [] {
        grid_wait();
        grid_next();
    });
}

//
// Projection with tensor cores: x - mean is split into two tf32 numbers, whose products with the encoder's f16 are exact.
// The tensor cores truncate sums, so no more than 16 products are added there.
//

// 16 tokens and 64 channels per block, 64 dimensions at a time, of which a warp takes a quarter
extern "C" __global__ void __launch_bounds__(256) palu_project_mma(const __grid_constant__ palu_cuda_store all) {
#ifdef PALU_SM80
    grid_wait();
    grid_next();
    constexpr int STAGES = 4;
    constexpr int X_STRIDE = 80; // floats; 16 modulo 32, so that the rows of a quarter warp differ in their banks
    constexpr int E_STRIDE = 80; // halves; 32 bytes modulo 128, likewise
    struct Stage {
        float x[16*X_STRIDE];
        __half enc[64*E_STRIDE];
        float mean[64];
    };
    extern __shared__ __align__(16) uint8_t smem_project[];
    Stage * stage = (Stage *) smem_project;
    static_assert(STAGES*sizeof(Stage) == PALU_CUDA_PROJECT_SMEM, "as the plan says");

    const int tid = threadIdx.x;
    const int lane = tid & 31;
    const int warp = tid >> 5;
    int gi = blockIdx.y;
    const palu_cuda_stored & p = stored_side(all, gi);
    const int n_token = all.n_token;
    const palu_cuda_group group = side_group(p.side, gi);
    const int rank = group.rank;
    const int c0 = blockIdx.x*64;
    if (c0 >= rank) {
        return;
    }
    const int hd = p.side.head_dim; // a multiple of 8
    const int d = p.side.group_size*hd;
    const int t0 = blockIdx.z*16;
    const __half * enc = (const __half *) p.side.enc + group.enc0;
    const float * mean = p.side.mean + (int64_t) gi*d;
    const char * x = (const char *) p.x + (int64_t) gi*p.side.group_size*p.x_nb_head;
    const bool aligned = (((uintptr_t) x | p.x_nb_head | p.x_nb_token) & 15) == 0;
    const int n_chunk = (d + 63)/64;

    auto load = [&](int chunk) {
        if (chunk < n_chunk) {
            Stage & s = stage[chunk%STAGES];
            const int jx = chunk*64 + tid%16*4;
            const int head = jx/hd;
            const char * from = x + head*p.x_nb_head + (jx - head*hd)*4;
            float * to_x = s.x + tid/16*X_STRIDE + tid%16*4;
            const char * at = from + min(t0 + tid/16, n_token - 1)*p.x_nb_token;
            if (jx >= d) {
                *(float4 *) to_x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            } else if (aligned) {
                mma::copy16(mma::smem(to_x), at);
            } else {
                for (int k = 0; k < 4; k++) {
                    mma::copy4(mma::smem(to_x + k), at + 4*k);
                }
            }
            const int je = chunk*64 + tid%8*8;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = tid/8 + i*32;
                __half * to = s.enc + c*E_STRIDE + tid%8*8;
                if (je >= d) {
                    *(uint4 *) to = make_uint4(0, 0, 0, 0);
                } else {
                    mma::copy16(mma::smem(to), enc + (int64_t) min(c0 + c, rank - 1)*d + je);
                }
            }
            if (tid < 64) {
                const int j = chunk*64 + tid;
                if (j < d) {
                    mma::copy4(mma::smem(s.mean + tid), mean + j);
                } else {
                    s.mean[tid] = 0.0f;
                }
            }
        }
        mma::copy_commit();
    };

    for (int i = 0; i < STAGES - 1; i++) {
        load(i);
    }
    const int row = lane/4;
    const int col = warp%2*32 + lane/4;
    const int k = warp/2*16; // of a chunk
    const int k4 = lane%4*4;
    float sum[4][4] = {};
    for (int chunk = 0; chunk < n_chunk; chunk++) {
        mma::copy_wait<STAGES - 2>();
        __syncthreads();
        load(chunk + STAGES - 1);
        const Stage & s = stage[chunk%STAGES];
        float acc_hi[4][4] = {};
        float acc_lo[4][4] = {};
        const float4 m = *(const float4 *)(s.mean + k + k4);
        const float4 x0 = store_minus(*(const float4 *)(s.x + row*X_STRIDE + k + k4), m);
        const float4 x1 = store_minus(*(const float4 *)(s.x + (row + 8)*X_STRIDE + k + k4), m);
        // the four elements of a thread are two fragments' columns t and t + 4; the encoder's likewise
        const float v[8] = { x0.x, x1.x, x0.y, x1.y, x0.z, x1.z, x0.w, x1.w };
        uint32_t hi[8], lo[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            hi[i] = __float_as_uint(v[i]) & 0xffffe000u;
            lo[i] = __float_as_uint(v[i] - __uint_as_float(hi[i])) + 0x1000u; // the rest is cut off: this rounds
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const uint2 e = *(const uint2 *)(s.enc + (col + n*8)*E_STRIDE + k + k4);
            const float2 e0 = __half22float2(*(const __half2 *) &e.x);
            const float2 e1 = __half22float2(*(const __half2 *) &e.y);
            const uint32_t b[4] = { __float_as_uint(e0.x), __float_as_uint(e0.y), __float_as_uint(e1.x), __float_as_uint(e1.y) };
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma::tf32(acc_lo[n], lo + 4*i, b[2*i], b[2*i + 1]);
                mma::tf32(acc_hi[n], hi + 4*i, b[2*i], b[2*i + 1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            sum[i/4][i%4] += acc_hi[i/4][i%4] + acc_lo[i/4][i%4];
        }
    }
    mma::copy_wait<0>();
    __syncthreads();
    float * other = (float *) smem_project + tid%64;
    if (warp >= 2) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            other[((warp/2 - 1)*16 + i)*64] = sum[i/4][i%4];
        }
    }
    __syncthreads();
    if (warp >= 2) {
        return;
    }
#pragma unroll
    for (int i = 0; i < 48; i++) {
        sum[i%16/4][i%4] += other[i*64];
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int c = c0 + warp*32 + n*8 + lane%4*2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = t0 + row + 8*i;
            if (c < rank && t < n_token) {
                *(float2 *)(p.latent + (int64_t) t*p.side.rank_sum + group.step0 + c) = make_float2(sum[n][2*i], sum[n][2*i + 1]);
            }
        }
    }
#endif
}

//
// Quantization: a block, or a warp, per token and group
//

// A layer's tables come from memory for every token: before anything waits.
static __device__ __forceinline__ void prefetch_tables(const palu_cuda_side & side, const palu_cuda_group & group, int tid, int n_thread) {
    for (int c = tid*32; c < group.rank; c += n_thread*32) {
        asm volatile("prefetch.global.L2 [%0];" :: "l"(side.step + group.step0 + c));
        if (c%256 == 0) {
            asm volatile("prefetch.global.L2 [%0];" :: "l"(side.segs + group.seg0 + c/8));
        }
    }
}

// The scales to try form a sequence that does not depend on what came of them, until the search stops: so the warps of a
// block try as many at a time, and eight of them all that the refinement may come to. That is the shorter way; a warp alone
// does less in total.
template <int WARPS>
static __device__ __forceinline__ void quantize(const palu_cuda_store & all_p, uint8_t * smem, int token, int gi) {
    const palu_cuda_stored & p = stored_side(all_p, gi);
    constexpr int THREADS = 32*WARPS;
    const int tid = threadIdx.x%THREADS;
    const int lane = threadIdx.x & 31;
    const int warp = WARPS == 1 ? 0 : threadIdx.x >> 5;
    const palu_cuda_group group = side_group(p.side, gi);
    const int rank = group.rank;
    float * tmp    = (float *) smem;      // [2][8]
    float * y      = tmp + 16;            // [rank] latent in steps
    float * weight = y + rank;            // [rank]
    float * half   = weight + rank;       // [rank/8]
    const uint32_t * segs = p.side.segs + group.seg0;
    const float * step = p.side.step + group.step0;
    const float * z = p.latent + (int64_t) token*p.side.rank_sum + group.step0;
    prefetch_tables(p.side, group, tid, THREADS);
    if (!all_p.beside) {
        grid_wait();
    }
    uint8_t * row = p.rows + p.idxs[token]*(int64_t) p.side.row_bytes;

    auto sync = [] {
        if (WARPS == 1) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    };
    int turn = 0;
    // every warp's value, in every thread
    auto share = [&](float x, float (&all)[WARPS]) {
        if (WARPS == 1) {
            all[0] = x;
            return;
        }
        float * to = tmp + turn*8;
        turn ^= 1;
        if (lane == 0) {
            to[warp] = x;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            all[i] = to[i];
        }
    };

    float top = 0.0f;
    float bad = 0.0f;
    for (int c = tid*4; c < rank; c += THREADS*4) {
        const float h = ((1 << (segs[c/8] >> 24)) - 1)*0.5f;
        const float4 s = *(const float4 *)(step + c);
        float4 v = __ldcg((const float4 *)(z + c)); // other blocks of this kernel may have written it
        v.x *= s.x > 0.0f ? 1.0f/s.x : 0.0f;
        v.y *= s.y > 0.0f ? 1.0f/s.y : 0.0f;
        v.z *= s.z > 0.0f ? 1.0f/s.z : 0.0f;
        v.w *= s.w > 0.0f ? 1.0f/s.w : 0.0f;
        bad += v.x*0.0f + v.y*0.0f + v.z*0.0f + v.w*0.0f;
        *(float4 *)(y + c) = v;
        *(float4 *)(weight + c) = make_float4(s.x*s.x, s.y*s.y, s.z*s.z, s.w*s.w);
        if (c%8 == 0) {
            half[c/8] = h;
        }
        top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)))/(h + 0.5f));
    }
    // what is not finite in a token is in every channel of its latent; without channels, look at the token
    for (int j = tid; rank == 0 && j < p.side.group_size*p.side.head_dim; j += THREADS) {
        const int head = gi*p.side.group_size + j/p.side.head_dim;
        bad += *(const float *)((const char *) p.x + token*p.x_nb_token + head*p.x_nb_head + j%p.side.head_dim*4)*0.0f;
    }
    float all[WARPS];
    share(warp_max(top) + warp_sum(bad), all); // also orders what was written above
    sync();
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        bad = i ? bad + all[i]*0.0f : all[0]*0.0f;
        top = i ? fmaxf(top, all[i]) : all[0];
    }

    auto level = [](float y, float inverse, float h) {
        // adding 1.5*2^23 rounds to an integer
        return (fminf(fmaxf(fmaf(y, inverse, h), 0.0f), h + h) + 12582912.0f) - 12582912.0f;
    };
    auto term = [&](float y, float w, float h, float scale, float inverse, float sum) {
        const float e = fmaf(-(level(y, inverse, h) - h), scale, y);
        return fmaf(e*e, w, sum);
    };
    // by the warp alone, or its part of what the block finds together
    auto error_of = [&](float scale, int from, int stride) {
        const float inverse = 1.0f/scale;
        float a = 0.0f;
        float b = 0.0f;
#pragma unroll 4
        for (int c = from; c < rank; c += stride) {
            const float4 v = *(const float4 *)(y + c);
            const float4 w = *(const float4 *)(weight + c);
            const float h = half[c/8];
            a = term(v.x, w.x, h, scale, inverse, a);
            b = term(v.y, w.y, h, scale, inverse, b);
            a = term(v.z, w.z, h, scale, inverse, a);
            b = term(v.w, w.w, h, scale, inverse, b);
        }
        return warp_sum(a + b);
    };
    auto error = [&](float scale) { return scale > 0.0f ? error_of(scale, lane*4, 128) : INFINITY; };
    auto total = [&](float x) {
        share(x, all);
        float sum = all[0];
#pragma unroll
        for (int i = 1; i < WARPS; i++) {
            sum += all[i];
        }
        return sum;
    };
    auto as_f16 = [](float x) { return __half2float(__float2half_rn(x)); };

    float best = 0.0f;
    if (bad != 0.0f || !isfinite(top)) {
        best = nanf("");
    } else {
        float least = INFINITY;
        int worse = 0;
        float scale = fminf(top, 65504.0f);
        while (worse < 3) {
            float s[WARPS];
            float mine = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                s[i] = as_f16(scale);
                mine = i == warp ? s[i] : mine;
                // scale /= 1.19f; exact for every float
                const float q = scale*(1.0f/1.19f);
                scale = fmaf(fmaf(-q, 1.19f, scale), 1.0f/1.19f, q);
            }
            share(error(mine), all);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                if (s[i] == 0.0f) {
                    worse = 3;
                }
                if (worse < 3) {
                    worse++;
                    if (all[i] < least) {
                        best = s[i];
                        least = all[i];
                        worse = 0;
                    }
                }
            }
        }
        // twice half the distance around the best
        constexpr float ratio[2] = { 1.09087121f, 1.04444778f }; // the root of 1.19 and its root
        auto take = [&](float scale, float e) {
            if (scale > 0.0f && isfinite(scale) && e < least) {
                best = scale;
                least = e;
            }
        };
        if (WARPS < 8) {
            for (int r = 0; r < 2; r++) {
                const float up = as_f16(best*ratio[r]);
                const float down = as_f16(best/ratio[r]);
                if (WARPS == 1) {
                    take(up, error(up));
                    take(down, error(down));
                } else {
                    share(error(warp & 1 ? down : up), all);
                    take(up, all[0]);
                    take(down, all[WARPS > 1]);
                }
            }
        } else if (best > 0.0f) {
            // up and down of the best; then of it and of these two
            float s[8];
            s[0] = as_f16(best*ratio[0]);
            s[1] = as_f16(best/ratio[0]);
            float mine = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i >= 2) {
                    const float middle = i < 4 ? best : i < 6 ? s[0] : s[1];
                    s[i] = as_f16(i%2 ? middle/ratio[1] : middle*ratio[1]);
                }
                mine = i == warp ? s[i] : mine;
            }
            share(error(mine), all);
            int from = 2;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float before = least;
                take(s[i], all[i%WARPS]);
                from = least < before ? 4 + 2*i : from;
            }
#pragma unroll
            for (int i = 2; i < 8; i++) {
                if (i/2*2 == from) {
                    take(s[i], all[i%WARPS]);
                }
            }
        }
        // the best scale for these codes
        if (best > 0.0f) {
            const float inverse = 1.0f/best;
            float above = 0.0f;
            float below = 0.0f;
            for (int c = tid*4; c < rank; c += THREADS*4) {
                const float4 v = *(const float4 *)(y + c);
                const float4 w = *(const float4 *)(weight + c);
                const float h = half[c/8];
                auto add = [&](float y, float w) {
                    const float l = level(y, inverse, h) - h;
                    above = fmaf(l*w, y, above);
                    below = fmaf(l*w, l, below);
                };
                add(v.x, w.x);
                add(v.y, w.y);
                add(v.z, w.z);
                add(v.w, w.w);
            }
            above = total(warp_sum(above));
            below = total(warp_sum(below));
            const float refit = as_f16(above/below);
            if (refit > 0.0f && isfinite(refit) && total(error_of(refit, tid*4, THREADS*4)) < least) {
                best = refit;
            }
        }
    }
    const float inverse = 1.0f/best;
    for (int s = tid; s < rank/8; s += THREADS) {
        const int bits = segs[s] >> 24;
        const float h = half[s];
        uint64_t v = 0;
        for (int i = 0; i < 8; i++) {
            v |= (uint64_t)(best > 0.0f ? (uint32_t) level(y[s*8 + i], inverse, h) : 0u) << (i*bits);
        }
        for (int i = 0; i < bits; i++) {
            row[(segs[s] & 0xffffff) + i] = (uint8_t)(v >> (8*i));
        }
    }
    if (tid == 0) {
        uint32_t h = __half_as_ushort(__float2half_rn(best));
        // without this, ptxas 13.0 stores the f16's value, converted to u8, as its lower byte
        asm volatile("" : "+r"(h));
        row[group.row_offset] = (uint8_t) h;
        row[group.row_offset + 1] = (uint8_t)(h >> 8);
    }
    if (gi == p.side.n_group - 1) {
        for (int i = group.row_end + tid; i < p.side.row_bytes; i += THREADS) {
            row[i] = 0;
        }
    }
}

// One block waits for what a kernel runs beside.
static __device__ __forceinline__ void store_end(const palu_cuda_store & p, bool waits) {
    if (p.beside && waits) {
        grid_wait();
    }
}

#define PALU_QUANTIZE(WARPS) \
    extern "C" __global__ void __launch_bounds__(32*WARPS) palu_quantize_##WARPS(const __grid_constant__ palu_cuda_store p) { \
        extern __shared__ __align__(16) uint8_t smem_quantize[]; \
        grid_next(); \
        quantize<WARPS>(p, smem_quantize, blockIdx.x, blockIdx.y); \
        store_end(p, blockIdx.x == 0 && blockIdx.y == 0); \
    }
PALU_QUANTIZE(8)
PALU_QUANTIZE(4)
#undef PALU_QUANTIZE

extern "C" __global__ void __launch_bounds__(128) palu_quantize_1(const __grid_constant__ palu_cuda_store p) {
    extern __shared__ __align__(16) uint8_t smem_quantize[];
    const int warp = threadIdx.x >> 5;
    const int token = blockIdx.x*4 + warp;
    grid_next();
    if (token < p.n_token) {
        const int32_t rank_max = max(p.of[0].side.rank_max, p.of[1].side.rank_max); // 0 where there is one side
        quantize<1>(p, smem_quantize + warp*palu_cuda_quantize_smem(rank_max), token, blockIdx.y);
    }
    store_end(p, blockIdx.x == 0 && blockIdx.y == 0);
}

//
// Both, for few tokens: a block per eight channels, and the last one of a group quantizes
//

extern "C" __global__ void __launch_bounds__(256) palu_store_few(const __grid_constant__ palu_cuda_store all) {
    extern __shared__ __align__(16) uint8_t smem_quantize[];
    __shared__ bool last;
    grid_next();
    int gi = blockIdx.y;
    const palu_cuda_stored & p = stored_side(all, gi);
    const palu_cuda_group group = side_group(p.side, gi);
    const int n_block = max(1, (group.rank + 7)/8);
    if (blockIdx.x == 0) {
        prefetch_tables(p.side, group, threadIdx.x, 256);
    }
    if (blockIdx.x < n_block) {
        project(p, group, gi, 0, all.n_token, [] {});
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(all.done + blockIdx.y, 1) == n_block - 1;
            if (last) {
                all.done[blockIdx.y] = 0; // as it was
                __threadfence();
            }
        }
        __syncthreads();
        for (int token = 0; last && token < all.n_token; token++) {
            quantize<8>(all, smem_quantize, token, blockIdx.y);
            __syncthreads();
        }
    }
    store_end(all, blockIdx.x == 0 && blockIdx.y == 0);
}
