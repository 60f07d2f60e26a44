// tiles.cuh - contexts that clusters share (palu_cuda_attn.n_context): which tiles each context sees, and who works on which.
//
// A context's tiles are those in which one of its tokens sees a cell. All contexts' tiles after each other are dealt to the clusters,
// as many to each, so that neither contexts of different lengths nor cells of other sequences leave any of them idle.
#pragma once

#include "common.cuh"

// By a whole warp: a lane has the end of its context's tiles among all.
static __device__ __forceinline__ int context_ends(const palu_cuda_attn & p) {
    const int lane = threadIdx.x & 31;
    return warp_ends(lane < p.n_context ? ((const int *) p.partial)[lane] : 0);
}

// Where a context's tiles are listed, from p.partial on.
static __device__ __forceinline__ int tiles_at(const palu_cuda_attn & p, int context) { return PALU_CUDA_CONTEXTS + context*palu_cuda_n_tile(&p); }

// Tiles of a cluster, but for the last ones.
static __device__ __forceinline__ int cluster_tiles(const palu_cuda_attn & p, int n_tile) { return max(1, (n_tile + p.n_chunk - 1)/p.n_chunk); }

// What a context's chunks are: those of clusters from first on. A cluster's chunk of a context stands at their sum.
struct ContextChunks {
    int first;
    int n;

    __device__ __forceinline__ ContextChunks(const palu_cuda_attn & p, int ends, int context) {
        const int all = __shfl_sync(0xffffffff, ends, 31);
        const int begin = context ? __shfl_sync(0xffffffff, ends, context - 1) : 0;
        const int end = __shfl_sync(0xffffffff, ends, context);
        const int each = cluster_tiles(p, all);
        first = begin/each;
        n = end > begin ? (end - 1)/each - first + 1 : 0;
    }
};

// The tiles of one cluster, one after the other. By whole warps.
struct Tiles {
    int next;    // among all contexts' tiles
    int end;
    int context; // of the tile that came last: its number | stream << 8 | first token << 16
    int left;    // tiles of it that follow
    int at;      // of the next, in the list
    int near;    // the list's element that this lane has: one of 32 at a multiple of 32

    __device__ __forceinline__ Tiles(const palu_cuda_attn & p) : context(0), left(0), at(0), near(0) {
        const int all = __shfl_sync(0xffffffff, context_ends(p), 31);
        const int each = cluster_tiles(p, all);
        next = min(all, (int) blockIdx.x*each);
        end = min(all, next + each);
    }
    // the context of the tile that is next, of which there is one
    __device__ __forceinline__ void find(const palu_cuda_attn & p) {
        const int ends = context_ends(p);
        const int n = __ffs(__ballot_sync(0xffffffff, ends > next)) - 1;
        const int begin = n ? __shfl_sync(0xffffffff, ends, n - 1) : 0;
        left = min(end, __shfl_sync(0xffffffff, ends, n)) - next;
        at = tiles_at(p, n) + next - begin;
        look(p);
        const int n_token = opaque(p.n_token); // a division's factors would be kept
        const int token = n*p.context_tokens;
        context = n | token/n_token << 8 | token%n_token << 16;
    }
    __device__ __forceinline__ void look(const palu_cuda_attn & p) {
        int lane;
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        const int i = (at & ~31) + lane;
        near = i >= at && i < at + left ? ((const int *) p.partial)[i] : 0;
    }
    __device__ __forceinline__ int take(const palu_cuda_attn & p) {
        if (left == 0) {
            find(p);
        } else if (at%32 == 0) {
            look(p);
        }
        const int tile = __shfl_sync(0xffffffff, near, at & 31);
        next++;
        at++;
        left--;
        return tile;
    }
};

// Where clusters share nothing: nobody asks.
struct NoTiles {
    static constexpr int next = 0, end = 0, context = 0, left = 0;
    __device__ __forceinline__ NoTiles(const palu_cuda_attn &) {}
    __device__ __forceinline__ int take(const palu_cuda_attn &) const { return 0; }
};
template <bool MANY> struct TilesIf { typedef NoTiles type; };
template <> struct TilesIf<true> { typedef Tiles type; };

static __device__ __forceinline__ bool mask_shows(const palu_cuda_attn & p, const char * mask, int cell) {
    return p.mask_f16 ? __half2float(((const __half *) mask)[cell]) != -INFINITY : ((const float *) mask)[cell] != -INFINITY;
}

// A block per context. With `beside` the mask is read while the kernel in front is at work (common.cuh).
extern "C" __global__ void __launch_bounds__(1024) palu_tiles(const __grid_constant__ palu_cuda_attn p) {
    grid_next();
    __shared__ uint32_t seen[32]; // of 1024 tiles
    const int warp = threadIdx.x/32;
    const int lane = threadIdx.x%32;
    const int n_tile = palu_cuda_n_tile(&p);
    const int token0 = (int) blockIdx.x*p.context_tokens;
    const char * mask = (const char *) p.mask + token0/p.n_token*p.mask_nb_stream + token0%p.n_token*p.mask_nb_token;
    int * list = (int *) p.partial + tiles_at(p, blockIdx.x);
    if (!p.part.beside) {
        grid_wait();
    }
    int n = 0;
    for (int tile0 = 0; tile0 < n_tile; tile0 += 1024) {
        if (threadIdx.x < 32) {
            seen[lane] = 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < min(32, (n_tile - tile0 - warp + 31)/32); i++) {
            const int cell = (tile0 + i*32 + warp)*PALU_CUDA_TILE + lane*2;
            bool shows = false;
            for (int t = 0; t < p.context_tokens; t++) {
                const char * of = mask + t*p.mask_nb_token;
                shows |= cell < p.n_kv && (!p.mask || mask_shows(p, of, cell));
                shows |= cell + 1 < p.n_kv && (!p.mask || mask_shows(p, of, cell + 1));
            }
            if (__any_sync(0xffffffff, shows) && lane == 0) {
                atomicOr(&seen[i], 1u << warp);
            }
        }
        __syncthreads();
        const uint32_t mine = seen[lane]; // every warp counts all
        const int end = warp_ends(__popc(mine));
        const int begin = n + __shfl_sync(0xffffffff, end - __popc(mine), warp);
        const uint32_t here = __shfl_sync(0xffffffff, mine, warp);
        if (tile0 == 0 && p.part.beside) {
            grid_wait(); // what the kernel in front reads may stand where the list comes to stand
        }
        if (here >> lane & 1) {
            list[begin + __popc(here & ((1u << lane) - 1))] = tile0 + (int) threadIdx.x;
        }
        n += __shfl_sync(0xffffffff, end, 31);
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        ((int *) p.partial)[blockIdx.x] = n;
    }
}
