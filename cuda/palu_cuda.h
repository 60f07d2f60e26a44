// palu_cuda.h - parameters of the CUDA kernels: plain data, every pointer a device pointer, every shape written beside it.
//
// Shapes are written slowest dimension first. The row format is that of docs/format.md. Integer decoders are made on the
// host, one byte per weight:
//
//     weight[d][c] = round(dec[c][d]*step[c]/dec_scale[d]), |weight| <= 127
//     x[d]         = mean[d] + row_scale*dec_scale[d]*sum over c of weight[d][c]*(code[c] - (2^bits[c] - 1)/2)
//
// For keys, the two dimensions that RoPE turns into each other must have the same dec_scale (the larger of the two
// dimensions' max|dec*step|/127): then a rebuilt pair can be rotated before it is scaled.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PALU_CUDA_SEGMENT 8       // channels that share a bit width: b bits are b bytes
#define PALU_CUDA_RANK_ALIGN 32   // decoders are padded with zeros to this many channels
#define PALU_CUDA_TILE 64         // cells that the decode kernels take at a time
#define PALU_CUDA_CONTEXTS 32     // that clusters share, at most
#define PALU_CUDA_PROJECT_TOKENS 4   // of a block of palu_project
#define PALU_CUDA_PROJECT_SMEM 62464 // bytes of palu_project_mma

// One head group of one side.
typedef struct palu_cuda_group {
    int32_t rank;      // kept channels, a multiple of 8; may be 0
    int32_t rank_pad;  // rank rounded up to PALU_CUDA_RANK_ALIGN
    int32_t seg0;      // first of its rank/8 entries in palu_cuda_side.segs
    int32_t step0;     // first of its rank entries in palu_cuda_side.step
    int32_t row_offset;// byte of the row at which its scale (f16) stands; the codes follow
    int32_t row_end;   // byte of the row after its last code
    int64_t dec0;      // first byte of its decoder [planes][d][rank_pad] in palu_cuda_side.dec, a multiple of 16; d = group_size*head_dim
    int64_t enc0;      // first element of its encoder [rank][d] in palu_cuda_side.enc
} palu_cuda_group;

#define PALU_CUDA_NEAR_GROUPS 8   // so many groups come with the parameters: tables are found without reading memory first

// One side (keys or values) of one layer.
typedef struct palu_cuda_side {
    const palu_cuda_group * groups; // [n_group]
    const uint32_t * segs;          // per group [rank/8]: byte of the row at which the segment's codes begin | bits << 24
    const int8_t   * dec;           // per group [planes][group_size*head_dim][rank_pad], 16-byte aligned; keys: channels in the
                                    // order of palu_cuda_key_channel()
    const int8_t   * dec_tiles;     // keys: the decoder as palu_cuda_tile_keys() makes it, 16-byte aligned; may be NULL
    const float    * dec_scale;     // [n_head_kv*head_dim]
    const float    * dec_half;      // [n_head_kv*head_dim] half the sum over c of weight[d][c] (for values only rebuilding reads it)
    const float    * mean;          // [n_head_kv*head_dim]
    const float    * pairs;         // keys: [n_head_kv*head_dim/2][8] of RoPE's pairs: dec_scale, both means, unused, both dec_half, unused
    const uint16_t * enc;           // f16, per group [rank][group_size*head_dim]; only for storing
    const float    * step;          // per group [rank]; only for storing
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t group_size;             // KV heads of a group; n_group = n_head_kv/group_size
    int32_t n_group;
    int32_t row_bytes;              // a multiple of 4
    int32_t rank_max;               // largest rank of a group
    int32_t row_span_max;           // largest row_end - row_offset of a group
    int32_t rank_sum;               // over all groups
    int32_t planes;                 // bytes of a weight, the upper one first: 1, or 2 with weight = 256*plane[0] + plane[1], both signed
    int32_t slice_span;             // palu_cuda_slice_span()
    palu_cuda_group near_groups[PALU_CUDA_NEAR_GROUPS]; // the first of groups
} palu_cuda_side;

// RoPE as tables, so that NORM, NEOX, partial RoPE, frequency factors and YaRN are all the same to a kernel. Every
// dimension belongs to exactly one pair; the dimensions that are not rotated are paired in any order with turn = 0.
// head_dim must be even.
typedef struct palu_cuda_rope {
    const int32_t  * pair_dim; // [head_dim/2][2]
    const uint64_t * turn;     // [head_dim/2] turns per position, modulo 1, times 2^64: the angle is exact for any position
    const float    * mag;      // [head_dim/2] magnitude (YaRN); 1 where not rotated
    int32_t          n_fast;   // palu_cuda_fast_pairs(): the pairs from here on turn slowly
} palu_cuda_rope;

// What a decode kernel works on: tiles of PALU_CUDA_TILE cells, and chunks of these, one for every block or cluster. decode_sm90_wide takes
// any part, decode_sm90_cluster the first one, all others are given everything.
typedef struct palu_cuda_part {
    int32_t first_chunk;
    int32_t first_tile;
    int32_t end_tile;
    int32_t chunk_tiles;   // tiles per chunk
    int32_t heads_per_cta; // KV heads that a block works on
    int32_t beside;        // 1: runs beside the kernel in front of it, which works on the rest or writes no row that is read (common.cuh)
} palu_cuda_part;

// palu_attn_params of include/palu.h with the layer's tables.
typedef struct palu_cuda_attn {
    palu_cuda_side k;
    palu_cuda_side v;
    palu_cuda_rope rope;
    const float   * q;        // [n_stream][n_token][n_head][k.head_dim], strides in bytes
    int64_t         q_nb_head;
    int64_t         q_nb_token;
    int64_t         q_nb_stream;
    const uint8_t * rows_k;   // [n_stream][n_kv][k.row_bytes], 16-byte aligned
    const uint8_t * rows_v;   // [n_stream][n_kv][v.row_bytes], 16-byte aligned
    int64_t         rows_k_nb_stream;
    int64_t         rows_v_nb_stream;
    const void    * mask;     // [n_stream][n_token][n_kv] f16 or f32, or NULL
    int64_t         mask_nb_token;
    int64_t         mask_nb_stream;
    const int32_t * pos;      // [n_stream][n_kv]
    const float   * sinks;    // [n_head] or NULL
    const float   * extra;    // [n_stream][n_token][n_head][4 + v.head_dim] what other cells give, or NULL; only the combine reads it
    float         * partial;  // [n_stream][n_token][n_head][n_chunk][4 + rank_stride]: largest score (in bits, log2), sum of
                              // weights, sum of weights times row scales, unused; then the values summed as codes.
                              // With n_context: what palu_tiles makes, then [n_chunk + n_context][context_tokens][n_head][4 + rank_stride]
    float         * out;      // [n_stream][n_token][n_head][v.head_dim]
    int32_t         mask_f16;
    int32_t         n_head;
    int32_t         n_token;
    int32_t         n_stream;
    int32_t         n_kv;
    int32_t         n_chunk;       // parts that the context is split into; with n_context the number of clusters
    int32_t         n_context;     // 0, or as many contexts as clusters share, each the cells that context_tokens tokens of a stream see: a
                                   // cluster takes as many tiles as all others, of one context or of several that follow each other
    int32_t         context_tokens; // divides n_token
    palu_cuda_part  part;          // of the context, which this launch works on
    int32_t         rank_stride;   // v.rank_max rounded up to 8
    float           scale;
    float           softcap;
    float           max_bias;
    float           trig_scale;    // decode_sm90: power of two, at most 1, with which rebuilt keys, as integers, stay below 46000
    int32_t         mma_cols;      // decode_mma: query rows of a KV head that a block works on, at most
    int32_t         mma_slice;     // decode_mma: channels of values that a block works on, at most
    int32_t         k_stage_words; // decode_sm90: 4-byte words of a staged key row, 4 modulo 8
    int32_t         v_stage_words;
} palu_cuda_attn;

// palu_store_params of include/palu.h with the side's tables.
typedef struct palu_cuda_stored {
    palu_cuda_side  side;
    const float   * x;        // [n_token][n_head_kv][head_dim], strides in bytes
    int64_t         x_nb_head;
    int64_t         x_nb_token;
    const int64_t * idxs;     // [n_token]
    uint8_t       * rows;     // [n_row][row_bytes]
    float         * latent;   // scratch [n_token][rank_sum], 16-byte aligned
} palu_cuda_stored;

// Two kernels: project, then quantize; or one for both. Keys and values of the same tokens may share the launches.
typedef struct palu_cuda_store {
    palu_cuda_stored of[2];
    uint32_t * done;          // zeros [n_group of both sides] for one stream alone, or NULL; the same afterwards
    int32_t n_side;           // of which so many are there
    int32_t n_token;
    int32_t beside;           // not 0: quantizing, and with few tokens, `done` and a long context projecting, too, runs beside the kernels in
                              // front of it (common.cuh), attention to so many cells of each stream
} palu_cuda_store;

// Rows back to f16, as an f16 cache would hold them: keys rotated by the cells' positions. For prompt processing, where
// ordinary flash attention then reads the result once per query tile.
typedef struct palu_cuda_rebuild {
    palu_cuda_side  side;
    palu_cuda_rope  rope;       // values: pair_dim is NULL, and nothing is rotated
    const uint8_t * rows;       // [n_stream][n_kv][row_bytes], 16-byte aligned
    int64_t         rows_nb_stream;
    const int32_t * pos;        // [n_stream][n_kv], or NULL with rope.pair_dim NULL
    uint16_t      * out;        // f16 [n_stream][n_out][n_head_kv][head_dim], of which the first n_kv cells from here on are written
    int32_t         n_stream;
    int32_t         n_kv;
    int32_t         n_out;
    int32_t         n_split;    // blocks that share the dimensions of a group
    int32_t         slab;       // channels unpacked at a time, a multiple of 64 if it is less than a group's rank_pad
    int32_t         stages;     // of the decoder in shared memory, 2 or 3
} palu_cuda_rebuild;

#define PALU_CUDA_RECENT_MAX 256
#define PALU_CUDA_RECENT_CELLS 16 // staged at a time

// palu_recent_params of include/palu.h; [2]: keys, values. head_dim_k and head_dim_v are even.
typedef struct palu_cuda_recent {
    const float   * q;             // [n_stream][n_token][n_head][head_dim_k], strides in bytes
    int64_t         q_nb_head;
    int64_t         q_nb_token;
    int64_t         q_nb_stream;
    const float   * cur[2];        // [n_stream*n_token][n_head_kv][head_dim], strides in bytes
    int64_t         cur_nb_head[2];
    int64_t         cur_nb_token[2];
    uint16_t      * slots[2];      // f16 [n_stream][n_slot][n_head_kv][head_dim]
    const int32_t * idxs;          // [n_stream][n_token][n_recent + 1]
    float         * out;           // [n_stream][n_token][n_head][4 + head_dim_v], or NULL
    int32_t         n_head;
    int32_t         n_head_kv;
    int32_t         head_dim_k;
    int32_t         head_dim_v;
    int32_t         n_token;
    int32_t         n_stream;
    int32_t         n_slot;
    int32_t         n_recent;      // with out at most PALU_CUDA_RECENT_MAX
    int32_t         store;         // 1: tokens go to their slots, when all of the stream's queries are done
    int32_t         beside;        // 1: runs beside the kernels in front of it (common.cuh)
    float           scale;
    float           softcap;
    float           max_bias;
} palu_cuda_recent;

// What stands before rebuilt rows: slots, tokens, zeros. head_dim is even.
typedef struct palu_cuda_prepend {
    const uint16_t * slots;        // f16 [n_stream][n_slot][n_head_kv][head_dim]
    const float    * cur;          // [n_stream*n_token][n_head_kv][head_dim], strides in bytes
    int64_t          cur_nb_head;
    int64_t          cur_nb_token;
    uint16_t       * out;          // f16 [n_stream][n_out][n_head_kv][head_dim], of which the first n_more cells are written
    int32_t          n_head_kv;
    int32_t          head_dim;
    int32_t          n_stream;
    int32_t          n_more;
    int32_t          n_out;
    int32_t          n_slot;
    int32_t          n_token;
} palu_cuda_prepend;

// Kernels (extern "C"; the struct is the only parameter, passed by value):
//   palu_project      (palu_cuda_store)  any shape; grid (ceil(rank_max/8), n_group, ceil(n_token/PALU_CUDA_PROJECT_TOKENS)), 256 threads;
//                                        here and below rank_max of the side that has more, n_group of both sides together
//   palu_project_mma  (palu_cuda_store)  sm_80 and later, head_dim a multiple of 8; grid (ceil(rank_max/64), n_group, ceil(n_token/16)),
//                                        256 threads, dynamic shared memory PALU_CUDA_PROJECT_SMEM
//   palu_quantize_{8,4}(palu_cuda_store) so many warps per token and group; grid (n_token, n_group), 32 threads per warp,
//                                        dynamic shared memory palu_cuda_quantize_smem(rank_max)
//   palu_quantize_1   (palu_cuda_store)  grid (ceil(n_token/4), n_group), 128 threads, dynamic shared memory 4*palu_cuda_quantize_smem(rank_max)
//   palu_store_few    (palu_cuda_store)  instead of both, at most PALU_CUDA_PROJECT_TOKENS tokens, beside; grid (ceil(rank_max/8), n_group), 256 threads,
//                                        dynamic shared memory palu_cuda_quantize_smem(rank_max)
//   palu_decode  (palu_cuda_attn)   any shape; grid (n_chunk, n_head_kv*ceil(n_col/8), n_stream), n_col = n_token*n_head/n_head_kv; here and
//                                   below n_chunk is that of the launch's part; 128 threads, dynamic shared memory palu_cuda_decode_smem()
//   palu_decode_sm90_*(palu_cuda_attn) few query rows on sm_90a; grid (n_chunk, n_head_kv/heads_per_cta, n_stream),
//                                   128*(palu_cuda_sm90_score() + palu_cuda_sm90_value()) threads,
//                                   dynamic shared memory palu_cuda_sm90_smem()
//   palu_decode_sm90_cheb_*(palu_cuda_attn) on sm_90a, one query row per KV head, heads of 128 dimensions in groups of a multiple of 4,
//                                   at most 128 key and 384 value channels, at most 24 fast pairs (the name's first number times 8;
//                                   its second: tiles); grid (n_chunk, n_head_kv/4, n_stream), 128*(tiles + 5) threads,
//                                   dynamic shared memory palu_cuda_cheb_smem()
//   palu_decode_sm90_wide_*(palu_cuda_attn) on sm_90a, where one group holds all KV heads and no head has more than 4 query rows;
//                                   grid (n_chunk, n_head_kv/heads_per_cta, n_stream), 512 threads,
//                                   dynamic shared memory palu_cuda_wide_smem()
//   palu_decode_sm90_cluster_*(palu_cuda_attn) the same with 2*PALU_CUDA_CLUSTER KV heads; grid (n_chunk, PALU_CUDA_CLUSTER, n_stream),
//                                   640 threads, dynamic shared memory palu_cuda_cluster_smem()
//   palu_decode_mma_{64,32}_{8,16,32}(palu_cuda_attn) any shape that fits shared memory; cells at a time (times 4: threads) and
//                                   columns (query rows of all of a block's heads); grid (n_chunk, n_head_kv/heads_per_cta*
//                                   ceil(n_col/mma_cols)*ceil(v.rank_max/mma_slice), n_stream)
//   palu_decode_sm90_cluster_many_*(palu_cuda_attn) the same with n_context, after palu_tiles; grid (n_chunk, PALU_CUDA_CLUSTER)
//   palu_tiles   (palu_cuda_attn)   which tiles each of n_context contexts sees; grid (n_context), 1024 threads
//   palu_combine_{1,4,8}(palu_cuda_attn), with n_context palu_combine_many_{1,4,8}: after any decode kernel, so many query rows of a KV head at a time; grid (n_head_kv*ceil(v.head_dim/32),
//                                   ceil(n_head/n_head_kv*n_token*n_stream/rows)), 1024 threads, dynamic shared memory palu_cuda_combine_smem()
//
//   palu_recent  (palu_cuda_recent) grid (n_head_kv, n_stream, out && store ? 1 : n_token), 256 threads, dynamic shared memory palu_cuda_recent_smem()
//   palu_prepend  (palu_cuda_prepend) grid (n_more, n_stream), 256 threads
//   palu_rebuild_{keys,values}_{128,64,32}(palu_cuda_rebuild)  so many cells per block, 256 threads; side.dec_half must be set
//   palu_rebuild_sm90_{keys,values}_{128,64}                   the same on sm_90a
//
// Which kernel runs with which launch shape is decided on the host, in plan.c.

typedef struct palu_cuda_device {
    int32_t arch;       // compute capability, 10*major + minor
    int32_t n_sm;
    int32_t smem_optin; // bytes of shared memory that a block may have
    int32_t n_cluster;  // clusters of decode_sm90_cluster that run at once: fewer than multiprocessors would do for, as a cluster's
                        // blocks share a part of the device
} palu_cuda_device;

typedef struct palu_cuda_launch {
    const char * kernel; // NULL: nothing to launch
    uint32_t     grid[3];
    uint32_t     block;
    uint32_t     smem;   // dynamic shared memory, bytes
} palu_cuda_launch;

// Each fills in the fields of *p that the kernels share with the plan, and the launches in order. palu_cuda_plan_attn() takes
// p->part.beside as what the caller allows, and leaves it where the kernel does so. The device pointers of *p
// are not read; groups: the host's copies of p->k.groups and so on. Returns 0, or -1 if no kernel can do it.
// Storing: project, quantize; where one kernel does both, only the second is to be launched.
int palu_cuda_plan_store  (const palu_cuda_device * dev, const palu_cuda_store * p, palu_cuda_launch out[2]);
int palu_cuda_plan_rebuild(const palu_cuda_device * dev, palu_cuda_rebuild * p, const palu_cuda_group * groups, palu_cuda_launch out[1]);
// Attention: palu_tiles if clusters share contexts, one decode kernel or two, the second with p->part = *rest, and the combine; what has no
// kernel is not to be launched.
int palu_cuda_plan_attn   (const palu_cuda_device * dev, palu_cuda_attn    * p, palu_cuda_part * rest, palu_cuda_launch out[4]);

// One cluster of decode_sm90_cluster with all of the device's shared memory: what palu_cuda_device.n_cluster is asked of the driver with.
int palu_cuda_plan_one_cluster(const palu_cuda_device * dev, palu_cuda_launch out[1]);

int palu_cuda_plan_recent (const palu_cuda_recent * p, palu_cuda_launch out[1]);
int palu_cuda_plan_prepend (const palu_cuda_prepend * p, palu_cuda_launch out[1]);

// 1 if attention of this shape is to read the rows, 0 if they are to be rebuilt first. n_seq: sequences that a stream's tokens belong to,
// of which each sees its own cells, at least 1.
int palu_cuda_plan_on_rows(const palu_cuda_device * dev, const palu_cuda_attn * p, int32_t n_seq);

// For decode_sm90_wide: the decoders of keys in the order in which they are multiplied, 64 columns (one head's 32 pairs) after
// each other: out, as large as dec and at the same dec0, is per group [group_size*head_dim/64][rank_pad/16][64][16]; of 64
// columns, 16 are 8 pairs' first dimensions, then their second ones. pair_dim: as in palu_cuda_rope. Only with planes = 1 and
// head_dim a multiple of 64; else returns -1.
int palu_cuda_tile_keys(const palu_cuda_side * side, const palu_cuda_group * groups, const int32_t * pair_dim, const int8_t * dec, int8_t * out);

// palu_cuda_side.pairs from the host's copies of the side's tables. pair_dim: as in palu_cuda_rope.
void palu_cuda_pair_table(const palu_cuda_side * side, const int32_t * pair_dim, const float * dec_scale, const float * dec_half, const float * mean, float * out);

// For decode_sm90_cheb: pairs before the first from which on none turns by more than 2.6/64 radians per position.
int32_t palu_cuda_fast_pairs(const uint64_t * turn, int32_t n_pair);

// For decode_sm90_cluster: most bytes of a row of values that one of its blocks reads; 0 where rows have more than one group. segs: the
// host's copy.
int32_t palu_cuda_slice_span(const palu_cuda_side * side, const palu_cuda_group * groups, const uint32_t * segs);

// Scratch that a planned p needs: floats at palu_cuda_attn.partial. Storing needs n_token*rank_sum at palu_cuda_stored.latent.
size_t palu_cuda_partial_size(const palu_cuda_attn * p);

// Where channel c of a key decoder's row stands: of every 32 channels, first the lower halves of the four segments, then
// the upper halves. Then a thread of a tensor core instruction holds a whole segment.
static inline int32_t palu_cuda_key_channel(int32_t c) { return (c & ~31) | (c >> 2 & 1) << 4 | (c >> 3 & 3) << 2 | (c & 3); }

static inline int32_t palu_cuda_max32(int32_t a, int32_t b) { return a > b ? a : b; }

// Channels of a decoder that palu_combine keeps in shared memory.
#define PALU_CUDA_COMBINE_STAGED(rank_stride) ((rank_stride) > 992 ? 1024 : ((rank_stride) + 31)/32*32)

static inline size_t palu_cuda_combine_smem(const palu_cuda_attn * p, int32_t rows) {
    const int32_t u = rows*(p->rank_stride + 32);
    return 32*(size_t) PALU_CUDA_COMBINE_STAGED(p->rank_stride) + 4*((size_t) palu_cuda_max32(4096, u) + u + (size_t) rows*p->n_chunk);
}

// Tiles of a stream.
#ifdef __CUDACC__
__host__ __device__
#endif
static inline int32_t palu_cuda_n_tile(const palu_cuda_attn * p) { return (p->n_kv + PALU_CUDA_TILE - 1)/PALU_CUDA_TILE; }

// What palu_tiles makes, at palu_cuda_attn.partial, and its size in 4-byte words: int32 [PALU_CUDA_CONTEXTS] how many tiles a context sees,
// then [n_context][ceil(n_kv/PALU_CUDA_TILE)] which these are.
#ifdef __CUDACC__
__host__ __device__
#endif
static inline int64_t palu_cuda_tiles_size(const palu_cuda_attn * p) {
    return PALU_CUDA_CONTEXTS + ((int64_t) p->n_context*palu_cuda_n_tile(p) + 3)/4*4;
}

// Kernels that combine: X(query rows of a KV head at a time).
#define PALU_CUDA_COMBINE_KERNELS(X) X(1) X(4) X(8)

// Floats of a staged head of a cell, 16 modulo 32 where it can be: two cells then lie in different banks.
#ifdef __CUDACC__
__host__ __device__
#endif
static inline int32_t palu_cuda_recent_stride(int32_t head_dim) { return head_dim + (head_dim%32 == 0 ? 16 : 0); }

static inline size_t palu_cuda_recent_smem(const palu_cuda_recent * p) {
    return 4*((size_t) PALU_CUDA_RECENT_CELLS*(palu_cuda_recent_stride(p->head_dim_k) + palu_cuda_recent_stride(p->head_dim_v)) + 8*(size_t) p->head_dim_v);
}

#ifdef __CUDACC__
__host__ __device__
#endif
static inline size_t palu_cuda_quantize_smem(int32_t rank_max) { return 64 + 4*(size_t)(2*rank_max + (rank_max + 31)/32*4); }

static inline size_t palu_cuda_decode_smem(const palu_cuda_attn * p) {
    const int32_t rank = palu_cuda_max32(p->k.rank_max, p->v.rank_max);
    const int32_t pad  = (rank + 31)/32*32;
    return (size_t) 32*(pad + 4)                  // codes of 32 cells
         + 4*(size_t) 32*(p->k.head_dim + 1)      // their keys
         + 4*(size_t) 8*p->k.head_dim             // 8 query rows
         + 4*(size_t) 8*(32 + 8)                  // scores and sums
         + 4*(size_t) 32*4                        // per cell
         + 4*(size_t) 8*p->rank_stride;           // values summed as codes
}

// Words of a staged row: the span with what copying whole 16 bytes adds, 4 modulo 8 (then the reads of a warp hit
// different banks).
static inline int32_t palu_cuda_stage_words(const palu_cuda_side * s) {
    const int32_t words = (s->row_span_max + 30)/16*4;
    return (words + 3)/8*8 + 4;
}

// Score and value warpgroups of decode_sm90, from key channels/32.
static inline int32_t palu_cuda_sm90_score(int32_t k_steps) { return k_steps <= 4 ? 3 : 2; }
static inline int32_t palu_cuda_sm90_value(int32_t k_steps) { return k_steps <= 8 ? 2 : 1; }

static inline size_t palu_cuda_sm90_smem(const palu_cuda_attn * p, int32_t k_steps) {
    const int32_t hd = p->k.head_dim;
    const size_t n_score = (size_t) palu_cuda_sm90_score(k_steps);
    return (size_t) p->part.heads_per_cta*hd*k_steps*32   // decoder
         + (size_t) hd/16*128*16                     // cos, sin
         + n_score*hd/16*32*24                       // query fragments, per score warpgroup
         + (size_t) 64*hd                            // query vectors
         + n_score*64*p->k_stage_words*4             // key rows, per score warpgroup
         + (size_t) palu_cuda_sm90_value(k_steps)*3*32*p->v_stage_words*4 + 64 // value rows
         + n_score*(64*12 + 32)*4                    // scores
         + (size_t) k_steps*4*16                     // segments
         + 256;
}

// Kernels of decode_sm90: X(head_dim, heads_per_cta, key channels/32, value channels/128), in the order in which they are
// tried. Names are palu_decode_sm90_<head_dim>_<heads_per_cta>_<key channels/32>_<value channels/128>, _scaled for
// trig_scale < 1.
#define PALU_CUDA_SM90_KERNELS(X) \
    X(128, 4, 4, 3) X(128, 4, 8, 3) X(128, 2, 8, 3) X(128, 2, 14, 5) X(128, 1, 8, 3) X(128, 1, 16, 5) \
    X(64, 4, 4, 3) X(64, 4, 8, 3) X(64, 2, 16, 5)

// Bytes of a slot: 64 columns of the decoder, or 64 value rows, or a third of 8*80*32 sums of values.
#define PALU_CUDA_WIDE_SLOT(k_steps) ((k_steps)*2048 > 27648 ? (k_steps)*2048 : 27648)
// Bytes of 64 staged key rows; the table of cosines and sines comes to stand there as well.
static inline size_t palu_cuda_wide_rows(const palu_cuda_attn * p) {
    const size_t rows = ((size_t) 64*p->k.row_bytes + 144 + 127)/128*128;
    return rows > 16384 ? rows : 16384;
}
static inline size_t palu_cuda_wide_smem(const palu_cuda_attn * p, int32_t k_steps) {
    return (size_t) 3*PALU_CUDA_WIDE_SLOT(k_steps) // decoder, value rows
         + 4*palu_cuda_wide_rows(p)
         + (size_t) 8*8*16*8 + 4*8*32*16    // query fragments
         + (size_t) 256*32*4                // scores
         + (size_t) k_steps*4*16            // segments
         + (size_t) 4*(3*32 + 3*16*32 + 4*32 + 2*32 + 256 + 64 + 128)
         + 256;
}

// Kernels of decode_sm90_wide: X(key channels/32).
#define PALU_CUDA_WIDE_KERNELS(X) X(8) X(11) X(14) X(16)

// Of decode_sm90_cluster: blocks of a cluster, threads of a block.
#define PALU_CUDA_CLUSTER 4
#define PALU_CUDA_CLUSTER_THREADS 640
#define PALU_CUDA_CLUSTER_MANY 384 // bytes that sharing contexts takes
// Kernels of decode_sm90_cluster: X(key channels/32).
#define PALU_CUDA_CLUSTER_KERNELS(X) X(10) X(12) X(13) X(14) X(15)

static inline size_t palu_cuda_cluster_smem(const palu_cuda_attn * p, int32_t k_steps) {
    const size_t pad = (size_t) k_steps*32;
    return 256*pad                                               // decoder
         + 2*64*pad                                              // unpacked keys
         + (size_t) 8*128*8 + 2*4096                             // cos, sin; queries
         + (size_t) 2*PALU_CUDA_CLUSTER*1056 + 2*2048            // weights, scores
         + 2*((size_t) 64/PALU_CUDA_CLUSTER*p->k.row_bytes + 16) // rows of keys
         + (size_t) 3*16*p->v_stage_words*4 + 64                 // and of values
         + 1024 + 768 + 128 + 256 + 16 + 512 + 128               // halves, scales, factors, maxima, flags, turns, barriers
         + (p->n_context ? PALU_CUDA_CLUSTER_MANY : 0);
}

// Bytes of shared memory of decode_sm90_cheb but for the staged rows, with so many blocks of eight fast pairs and so many tiles at a time.
#define PALU_CUDA_CHEB_FIXED(fast, tiles) (131072 + 2*((8528 + 256*(fast)*(tiles) + 127)/128*128) + 640*(16 - 2*(fast)) + 2048*(fast) + 7168*(tiles) + 7520)
static inline size_t palu_cuda_cheb_smem(const palu_cuda_attn * p, int32_t fast, int32_t tiles) {
    return (size_t) PALU_CUDA_CHEB_FIXED(fast, tiles) + (size_t) tiles*64*p->k_stage_words*4 + (size_t) tiles*64*p->v_stage_words*4 + 64;
}

// Kernels of decode_sm90_cheb: X(fast pairs/8, tiles at a time).
#define PALU_CUDA_CHEB_KERNELS(X) X(2, 2) X(3, 2)

#ifdef __cplusplus
}
#endif
