// plan.c - which kernel runs, with which launch shape: the one place where this is decided.

#include "palu_cuda.h"

#include <string.h>

#define SMEM_DEFAULT 49152 // bytes of shared memory that every device gives a block

static int32_t min32(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t ceil_div(int64_t a, int64_t b) { return (int32_t)((a + b - 1)/b); }

static int set_launch(const palu_cuda_device * dev, palu_cuda_launch * out, const char * kernel, int64_t x, int64_t y, int64_t z, uint32_t block, size_t smem) {
    memset(out, 0, sizeof(*out));
    if (x == 0 || y == 0 || z == 0) {
        return 0;
    }
    if (x > 0x7fffffff || y > 65535 || z > 65535 || smem > (size_t) palu_cuda_max32(dev->smem_optin, SMEM_DEFAULT)) {
        return -1;
    }
    out->kernel = kernel;
    out->grid[0] = (uint32_t) x;
    out->grid[1] = (uint32_t) y;
    out->grid[2] = (uint32_t) z;
    out->block = block;
    out->smem = (uint32_t) smem;
    return 0;
}

//
// Store
//

// Cells from which on attention takes longer than storing few tokens beside it by one kernel does.
#define STORE_FEW_FROM_CELLS 4096

int palu_cuda_plan_store(const palu_cuda_device * dev, const palu_cuda_store * p, palu_cuda_launch out[2]) {
    // tensor cores where they take less time: palu_project reads the encoder once per PALU_CUDA_PROJECT_TOKENS
    int mma = dev->arch >= 80 && p->n_token > 16;
    int32_t rank_max = 0;
    int32_t n_group = 0;
    for (int32_t i = 0; i < p->n_side; i++) {
        const palu_cuda_side * s = &p->of[i].side;
        mma &= s->head_dim%8 == 0;
        rank_max = palu_cuda_max32(rank_max, s->rank_max);
        n_group += s->n_group;
    }
    const size_t smem = palu_cuda_quantize_smem(rank_max);
    if (p->beside >= STORE_FEW_FROM_CELLS && p->done && p->n_token <= PALU_CUDA_PROJECT_TOKENS) {
        memset(&out[0], 0, sizeof(out[0]));
        return set_launch(dev, &out[1], "palu_store_few", palu_cuda_max32(1, ceil_div(rank_max, 8)), p->n_token ? n_group : 0, 1, 256, smem);
    }
    if (mma ? set_launch(dev, &out[0], "palu_project_mma", ceil_div(rank_max, 64), n_group, ceil_div(p->n_token, 16), 256, PALU_CUDA_PROJECT_SMEM)
            : set_launch(dev, &out[0], "palu_project", ceil_div(rank_max, 8), n_group, ceil_div(p->n_token, PALU_CUDA_PROJECT_TOKENS), 256, 0)) {
        return -1;
    }
    // many warps per token and group take less time, few do less
    const int64_t n = (int64_t) p->n_token*n_group;
    if (n > (int64_t) dev->n_sm*8 && 4*smem <= (size_t) palu_cuda_max32(dev->smem_optin, SMEM_DEFAULT)) {
        return set_launch(dev, &out[1], "palu_quantize_1", ceil_div(p->n_token, 4), n_group, 1, 128, 4*smem);
    }
    return n > dev->n_sm ? set_launch(dev, &out[1], "palu_quantize_4", p->n_token, n_group, 1, 128, smem)
                         : set_launch(dev, &out[1], "palu_quantize_8", p->n_token, n_group, 1, 256, smem);
}

//
// Rebuild
//

// Units of eight pairs of dimensions in a tile of palu_rebuild_*_<cells>.
static int32_t rebuild_units(int32_t cells) { return cells == 128 ? 8 : 16; }

static size_t rebuild_smem(const palu_cuda_rebuild * p, int32_t cells) {
    const int32_t units = rebuild_units(cells);
    const int32_t pairs = ceil_div(p->side.head_dim, 16)*8;
    return (size_t) cells*(p->slab + 16)                                          // codes
         + (size_t) p->stages*units*16*64                                         // decoder
         + (p->rope.pair_dim ? (size_t) cells*(pairs + 2)*4 : 0)                  // cos, sin
         + (size_t) 2*units*52*4                                                  // per dimension
         + (size_t) cells*4                                                       // scales
         + (size_t) pairs/8*(4 + 32);                                             // dimensions
}

static int rebuild_launch(const palu_cuda_device * dev, palu_cuda_rebuild * p, int32_t cells, int32_t per_sm, palu_cuda_launch * out) {
    const palu_cuda_side * s = &p->side;
    const int64_t blocks = (int64_t) ceil_div(p->n_kv, cells)*s->n_group*p->n_stream;
    const int64_t slots = (int64_t) dev->n_sm*per_sm;
    const int32_t n_tile = ceil_div((int64_t) s->group_size*ceil_div(s->head_dim, 16), rebuild_units(cells));
    // more blocks fill the device better, but every block unpacks for itself (about 0.15 of a block's time)
    double least = 0;
    p->n_split = 1;
    for (int32_t n = 1; n <= n_tile && n*(int64_t) s->n_group <= 65535; n++) {
        const double time = ceil_div(blocks*n, slots)*((double) ceil_div(n_tile, n)/n_tile + 0.15);
        if (n == 1 || time < least) {
            least = time;
            p->n_split = n;
        }
    }
    static const char * const names[2][2][3] = {
        { { "palu_rebuild_values_128", "palu_rebuild_values_64", "palu_rebuild_values_32" },
          { "palu_rebuild_keys_128", "palu_rebuild_keys_64", "palu_rebuild_keys_32" } },
        { { "palu_rebuild_sm90_values_128", "palu_rebuild_sm90_values_64", "palu_rebuild_values_32" },
          { "palu_rebuild_sm90_keys_128", "palu_rebuild_sm90_keys_64", "palu_rebuild_keys_32" } },
    };
    return set_launch(dev, out, names[dev->arch == 90][p->rope.pair_dim != 0][cells == 128 ? 0 : cells == 64 ? 1 : 2], ceil_div(p->n_kv, cells),
        (int64_t) s->n_group*p->n_split, p->n_stream, 256, rebuild_smem(p, cells));
}

int palu_cuda_plan_rebuild(const palu_cuda_device * dev, palu_cuda_rebuild * p, const palu_cuda_group * groups, palu_cuda_launch out[1]) {
    (void) groups;
    // two blocks that fit a multiprocessor (one multiplies while the other writes), with many cells (the decoder is read once
    // for all of them); else, by the times that were measured, one; else as many channels at a time as fit
    static const struct { int32_t cells, stages, per_sm; } shapes[] = {
        { 128, 3, 2 }, { 128, 2, 2 }, { 64, 3, 2 }, { 64, 2, 2 }, { 128, 3, 1 }, { 64, 3, 1 }, { 32, 2, 2 }, { 64, 2, 1 }, { 32, 2, 1 },
    };
    const size_t optin = (size_t) palu_cuda_max32(dev->smem_optin, SMEM_DEFAULT);
    const size_t reserved = dev->arch >= 80 ? 1024 : 0; // per block
    p->slab = ceil_div(p->side.rank_max, 32)*32;
    for (size_t i = 0; i < sizeof(shapes)/sizeof(shapes[0]); i++) {
        p->stages = shapes[i].stages;
        if (rebuild_smem(p, shapes[i].cells) <= (optin + reserved)/shapes[i].per_sm - reserved) {
            return rebuild_launch(dev, p, shapes[i].cells, shapes[i].per_sm, &out[0]);
        }
    }
    p->stages = 2;
    for (p->slab = p->slab/64*64; p->slab >= 64; p->slab -= 64) {
        if (rebuild_smem(p, 32) <= optin) {
            return rebuild_launch(dev, p, 32, 1, &out[0]);
        }
    }
    return -1;
}

//
// Decode attention
//

int palu_cuda_tile_keys(const palu_cuda_side * side, const palu_cuda_group * groups, const int32_t * pair_dim, const int8_t * dec, int8_t * out) {
    if (side->planes != 1 || side->head_dim%64) {
        return -1;
    }
    for (int32_t g = 0; g < side->n_group; g++) {
        const int32_t pad = groups[g].rank_pad;
        int8_t * to = out + groups[g].dec0;
        for (int32_t b = 0; b < side->group_size*side->head_dim/64; b++) {
            for (int32_t c = 0; c < pad; c += 16) {
                for (int32_t n = 0; n < 64; n++, to += 16) {
                    const int32_t pair = b%(side->head_dim/64)*32 + n/16*8 + n%8;
                    const int64_t d = (int64_t)(b/(side->head_dim/64))*side->head_dim + pair_dim[pair*2 + n/8%2];
                    memcpy(to, dec + groups[g].dec0 + d*pad + c, 16);
                }
            }
        }
    }
    return 0;
}

void palu_cuda_pair_table(const palu_cuda_side * side, const int32_t * pair_dim, const float * dec_scale, const float * dec_half, const float * mean, float * out) {
    const int32_t n = side->head_dim/2;
    for (int32_t i = 0; i < side->n_head_kv*n; i++) {
        const int32_t a = i/n*side->head_dim + pair_dim[i%n*2];
        const int32_t b = i/n*side->head_dim + pair_dim[i%n*2 + 1];
        const float pair[8] = { dec_scale[a], mean[a], mean[b], 0.0f, dec_half[a], dec_half[b], 0.0f, 0.0f };
        memcpy(out + i*8, pair, sizeof(pair));
    }
}

// Splits the context so that about n_block blocks run at once, with `others` blocks for every chunk.
static void split(palu_cuda_attn * p, int64_t n_block, int64_t others) {
    const int32_t tiles = palu_cuda_max32(1, ceil_div(p->n_kv, PALU_CUDA_TILE));
    const int32_t n = palu_cuda_max32(1, min32(tiles, (int32_t)(n_block/(others > 0 ? others : 1))));
    p->part = (palu_cuda_part) { 0, 0, tiles, ceil_div(tiles, n), p->part.heads_per_cta, 0 };
    p->n_chunk = ceil_div(tiles, p->part.chunk_tiles);
}

static const struct sm90_kernel {
    int32_t head_dim, heads, k_steps, v_units; // as in the name
    const char * name;
    const char * name_scaled;
} sm90_kernels[] = {
#define X(HD, HS, KS, UN) { HD, HS, KS, UN, "palu_decode_sm90_" #HD "_" #HS "_" #KS "_" #UN, "palu_decode_sm90_" #HD "_" #HS "_" #KS "_" #UN "_scaled" },
    PALU_CUDA_SM90_KERNELS(X)
#undef X
};

// Returns 0, or -1 if none of them fits.
static int plan_sm90(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch * out) {
    if (dev->arch != 90 || p->k.planes != 1 || p->k.head_dim != p->v.head_dim || p->n_kv == 0) { // decoders of values are for palu_combine
        return -1;
    }
    const int64_t cols = (int64_t) p->n_head/p->k.n_head_kv*p->n_token; // query rows of a KV head
    for (size_t i = 0; i < sizeof(sm90_kernels)/sizeof(sm90_kernels[0]); i++) {
        const struct sm90_kernel * f = &sm90_kernels[i];
        if (f->head_dim != p->k.head_dim || f->heads*cols > 8 || p->k.group_size%f->heads || p->v.group_size%f->heads ||
            f->k_steps*32 < p->k.rank_max || f->v_units*128 < p->v.rank_max) {
            continue;
        }
        p->part.heads_per_cta = f->heads;
        p->k_stage_words = palu_cuda_stage_words(&p->k);
        p->v_stage_words = palu_cuda_stage_words(&p->v);
        const size_t smem = palu_cuda_sm90_smem(p, f->k_steps);
        if (smem > (size_t) dev->smem_optin) {
            continue;
        }
        const int32_t blocks = p->k.n_head_kv/f->heads;
        split(p, dev->n_sm, (int64_t) blocks*p->n_stream);
        return set_launch(dev, out, p->trig_scale < 1.0f ? f->name_scaled : f->name, p->n_chunk, blocks, p->n_stream,
            128*(uint32_t)(palu_cuda_sm90_score(f->k_steps) + palu_cuda_sm90_value(f->k_steps)), smem);
    }
    return -1;
}

int32_t palu_cuda_fast_pairs(const uint64_t * turn, int32_t n_pair) {
    const double most = 2.6/64/6.283185307179586*18446744073709551616.0;
    int32_t n = n_pair;
    for (; n > 0; n--) {
        const double t = (double)(int64_t) turn[n - 1];
        if (t > most || t < -most) {
            break;
        }
    }
    return n;
}

static const struct cheb_kernel {
    int32_t fast, tiles; // as in the name
    const char * name;
} cheb_kernels[] = {
#define X(GF, NS) { GF, NS, "palu_decode_sm90_cheb_" #GF "_" #NS },
    PALU_CUDA_CHEB_KERNELS(X)
#undef X
};

static int plan_cheb(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch * out) {
    const int32_t span_max = 241; // of which 64 threads copy four rows, 16 bytes each
    if (dev->arch != 90 || p->k.planes != 1 || p->k.head_dim != 128 || p->v.head_dim != 128 || p->n_kv == 0 || p->n_token != 1 ||
        p->n_head != p->k.n_head_kv || p->k.group_size%4 || p->v.group_size%4 || p->k.rank_max > 128 || p->v.rank_max > 384 ||
        p->k.row_span_max > span_max || p->v.row_span_max > span_max) {
        return -1;
    }
    for (size_t i = 0; i < sizeof(cheb_kernels)/sizeof(cheb_kernels[0]); i++) {
        const struct cheb_kernel * f = &cheb_kernels[i];
        p->k_stage_words = palu_cuda_stage_words(&p->k);
        p->v_stage_words = palu_cuda_stage_words(&p->v);
        const size_t smem = palu_cuda_cheb_smem(p, f->fast, f->tiles);
        if (f->fast*8 < p->rope.n_fast || smem > (size_t) dev->smem_optin) {
            continue;
        }
        p->part.heads_per_cta = 4;
        const int32_t blocks = p->k.n_head_kv/4;
        split(p, dev->n_sm, (int64_t) blocks*p->n_stream);
        p->part.chunk_tiles = ceil_div(p->part.chunk_tiles, f->tiles)*f->tiles; // a pass takes so many
        p->n_chunk = ceil_div(p->part.end_tile, p->part.chunk_tiles);
        return set_launch(dev, out, f->name, p->n_chunk, blocks, p->n_stream, 128*(uint32_t)(f->tiles + 5), smem);
    }
    return -1;
}

static const struct wide_kernel {
    int32_t k_steps;
    const char * name;
    const char * name_scaled;
} wide_kernels[] = {
#define X(KS) { KS, "palu_decode_sm90_wide_" #KS, "palu_decode_sm90_wide_" #KS "_scaled" },
    PALU_CUDA_WIDE_KERNELS(X)
#undef X
};

// What decode_sm90_wide and decode_sm90_cluster both want: one group of heads of 128 dimensions, few query rows each, of so many tokens, rows
// at multiples of 16 bytes.
static int is_joint_sm90(const palu_cuda_device * dev, const palu_cuda_attn * p, int32_t n_token) {
    const int64_t cols = (int64_t) p->n_head/p->k.n_head_kv*n_token;
    return dev->arch == 90 && p->k.planes == 1 && p->k.head_dim == 128 && p->v.head_dim == 128 && p->n_kv != 0 &&
        p->k.n_group == 1 && p->v.n_group == 1 && p->k.dec_tiles && p->k.rank_max != 0 && cols <= 4 &&
        (p->n_stream <= 1 || (p->rows_k_nb_stream%16 == 0 && p->rows_v_nb_stream%16 == 0));
}

// The kernel of decode_sm90_wide that does this, or NULL.
static const struct wide_kernel * wide_kernel_for(const palu_cuda_device * dev, const palu_cuda_attn * p) {
    if (!is_joint_sm90(dev, p, p->n_token) || p->k.n_head_kv > 8 || p->v.rank_max > 640) {
        return NULL;
    }
    for (size_t i = 0; i < sizeof(wide_kernels)/sizeof(wide_kernels[0]); i++) {
        const struct wide_kernel * f = &wide_kernels[i];
        if (f->k_steps*32 >= p->k.rank_max && palu_cuda_wide_smem(p, f->k_steps) <= (size_t) dev->smem_optin && 64*p->v.row_bytes + 144 <= PALU_CUDA_WIDE_SLOT(f->k_steps)) {
            return f;
        }
    }
    return NULL;
}

static int wide_launch(const palu_cuda_device * dev, const palu_cuda_attn * p, const struct wide_kernel * f, int32_t n_chunk, int32_t heads, palu_cuda_launch * out) {
    return set_launch(dev, out, p->trig_scale < 1.0f ? f->name_scaled : f->name, n_chunk, p->k.n_head_kv/heads, p->n_stream, 512, palu_cuda_wide_smem(p, f->k_steps));
}

static int plan_wide(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch * out) {
    const struct wide_kernel * f = wide_kernel_for(dev, p);
    if (!f) {
        return -1;
    }
    // fewer heads in a block rather than fewer than 256 cells
    int32_t n = 1;
    do {
        p->part.heads_per_cta = p->k.n_head_kv/n;
        split(p, dev->n_sm, (int64_t) p->n_stream*n);
        n *= 2;
    } while (p->part.chunk_tiles < 4 && p->k.n_head_kv%n == 0);
    return wide_launch(dev, p, f, p->n_chunk, p->part.heads_per_cta, out);
}

int32_t palu_cuda_slice_span(const palu_cuda_side * side, const palu_cuda_group * groups, const uint32_t * segs) {
    if (side->n_group != 1) {
        return 0;
    }
    const int32_t n = groups[0].rank/8;
    const int32_t part = ceil_div(n, PALU_CUDA_CLUSTER);
    int32_t most = 0;
    for (int32_t first = 0; first < n; first += part) {
        const uint32_t last = segs[groups[0].seg0 + min32(first + part, n) - 1];
        const int32_t start = (int32_t)(segs[groups[0].seg0 + first] & 0xffffff) & ~3;
        most = palu_cuda_max32(most, (int32_t)((last & 0xffffff) + (last >> 24)) - start);
    }
    return most;
}

static const struct cluster_kernel {
    int32_t k_steps;
    const char * name;
    const char * name_many;
} cluster_kernels[] = {
#define X(KS) { KS, "palu_decode_sm90_cluster_" #KS, "palu_decode_sm90_cluster_many_" #KS },
    PALU_CUDA_CLUSTER_KERNELS(X)
#undef X
};

static int cluster_launch(const palu_cuda_device * dev, palu_cuda_launch * out, const char * name, int64_t n_chunk, size_t smem) {
    return set_launch(dev, out, name, n_chunk, PALU_CUDA_CLUSTER, 1, PALU_CUDA_CLUSTER_THREADS, smem);
}

int palu_cuda_plan_one_cluster(const palu_cuda_device * dev, palu_cuda_launch out[1]) {
    return cluster_launch(dev, out, cluster_kernels[0].name, 1, (size_t) palu_cuda_max32(dev->smem_optin, SMEM_DEFAULT));
}

// The kernel of decode_sm90_cluster for so many tokens of a stream at a time, or NULL.
static const struct cluster_kernel * cluster_kernel_for(const palu_cuda_device * dev, palu_cuda_attn * p, int32_t n_token) {
    if (!is_joint_sm90(dev, p, n_token) || dev->n_cluster < 1 || p->k.n_head_kv != 2*PALU_CUDA_CLUSTER || p->v.slice_span == 0 || p->v.slice_span > 240 ||
        p->v.rank_max > 256*PALU_CUDA_CLUSTER || p->k.row_bytes >= 65536) {
        return NULL;
    }
    const int32_t words = (p->v.slice_span + 30)/16*4;
    p->v_stage_words = (words + 3)/8*8 + 4;
    for (size_t i = 0; i < sizeof(cluster_kernels)/sizeof(cluster_kernels[0]); i++) {
        if (cluster_kernels[i].k_steps*32 >= p->k.rank_max) {
            return palu_cuda_cluster_smem(p, cluster_kernels[i].k_steps) <= (size_t) dev->smem_optin ? &cluster_kernels[i] : NULL;
        }
    }
    return NULL;
}

// Multiprocessors that no cluster finds room on take a part of a long context with decode_sm90_wide, 256 cells at a time, for which it
// takes as long as a cluster for PASS of its tiles. Two are left to what else runs beside.
static void plan_rest(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_part * rest, palu_cuda_launch * out) {
    enum { PASS = 25, START = 2, OTHERS = 2 };
    const struct wide_kernel * f = wide_kernel_for(dev, p);
    const int32_t n_idle = dev->n_sm - PALU_CUDA_CLUSTER*dev->n_cluster - OTHERS;
    if (!f || n_idle < 1 || p->n_chunk != dev->n_cluster) {
        return;
    }
    const int32_t tiles = p->part.end_tile;
    int32_t n_pass = 0;
    int32_t mine = p->part.chunk_tiles; // tiles of a cluster
    for (int32_t n = 1; ; n++) {
        const int32_t left = ceil_div(tiles - 4*n*n_idle, dev->n_cluster);
        if (left < n*PASS + START) {
            break;
        }
        n_pass = n;
        mine = left;
    }
    if (mine == p->part.chunk_tiles) {
        return;
    }
    const int32_t n_cluster = dev->n_cluster;
    *rest = (palu_cuda_part) { n_cluster, n_cluster*mine, tiles, 4*n_pass, p->k.n_head_kv, 1 };
    const int32_t n_rest = ceil_div(tiles - rest->first_tile, rest->chunk_tiles);
    if (n_rest < 1 || wide_launch(dev, p, f, n_rest, p->k.n_head_kv, out)) {
        return;
    }
    p->part.chunk_tiles = mine;
    p->part.end_tile = rest->first_tile;
    p->n_chunk = n_cluster + n_rest;
}

static int plan_cluster(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_part * rest, palu_cuda_launch out[2]) {
    const struct cluster_kernel * f = p->n_stream == 1 ? cluster_kernel_for(dev, p, p->n_token) : NULL;
    if (!f) {
        return -1;
    }
    p->part.heads_per_cta = 2;
    split(p, dev->n_cluster, 1);
    const int32_t n_chunk = p->n_chunk;
    plan_rest(dev, p, rest, &out[1]);
    return cluster_launch(dev, &out[0], f->name, n_chunk, palu_cuda_cluster_smem(p, f->k_steps));
}

// Streams, and tokens where all of a stream's are too many for a cluster, as contexts that the clusters share.
static int plan_many(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch out[2]) {
    const int32_t tokens = (int64_t) p->n_head/p->k.n_head_kv*p->n_token <= 4 ? p->n_token : 1;
    const int64_t n = (int64_t) p->n_stream*(p->n_token/tokens);
    if (n < 2 || n > PALU_CUDA_CONTEXTS) {
        return -1;
    }
    p->n_context = (int32_t) n;
    p->context_tokens = tokens;
    const struct cluster_kernel * f = cluster_kernel_for(dev, p, tokens);
    if (!f) {
        p->n_context = p->context_tokens = 0;
        return -1;
    }
    p->part.heads_per_cta = 2;
    split(p, 1, 1);
    p->n_chunk = min32(dev->n_cluster, (int32_t) n*p->part.end_tile);
    return set_launch(dev, &out[0], "palu_tiles", n, 1, 1, 1024, 0) ||
        cluster_launch(dev, &out[1], f->name_many, p->n_chunk, palu_cuda_cluster_smem(p, f->k_steps)) ? -1 : 0;
}

static size_t mma_smem(const palu_cuda_attn * p, int32_t cells, int32_t cols) {
    const int32_t quarters = ceil_div(p->k.head_dim, 64);
    const int32_t raw = cells*4*((p->k.row_span_max + 6)/4 + (p->v.row_span_max + 6)/4 + 1);
    return (size_t) cells*(ceil_div(p->k.rank_max, 32)*32 + 16)                       // codes of keys
         + (size_t) cells*(ceil_div(min32(p->mma_slice, p->v.rank_max), 32)*32 + 16)  // and of values
         + (size_t) palu_cuda_max32(3*128*64, raw)                                    // decoder, or rows
         + (size_t) cells*(quarters*32 + 2)*4                                         // cos, sin
         + (size_t) 2*cols*(cells + 4)*4                                              // scores
         + (size_t) cols*(cells + 8)*2                                                // weights
         + (size_t) p->part.heads_per_cta*quarters*4*ceil_div(p->mma_cols, 8)*32*8         // queries
         + (size_t) 2*8*52*4 + (size_t) 2*cells*4 + (size_t) cols*4 + 16              // per dimension, cell, column
         + (size_t) quarters*4*16*2;                                                  // dimensions
}

// Returns 0, or -1 if none of them fits.
static int plan_mma(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch * out) {
    static const struct { int32_t cells, cols, slice, per_sm; const char * name; } kernels[] = {
        { 64,  8, 1024, 2, "palu_decode_mma_64_8" }, { 64, 16, 1280, 1, "palu_decode_mma_64_16" }, { 64, 32, 640, 1, "palu_decode_mma_64_32" },
        { 32,  8, 1280, 2, "palu_decode_mma_32_8" }, { 32, 16,  640, 2, "palu_decode_mma_32_16" }, { 32, 32, 640, 2, "palu_decode_mma_32_32" },
    };
    if (dev->arch < 75 || p->n_kv == 0) {
        return -1;
    }
    const int32_t cols = p->n_head/p->k.n_head_kv*p->n_token; // of a KV head
    const int64_t tiles = ceil_div(p->n_kv, PALU_CUDA_TILE);
    const size_t optin = (size_t) palu_cuda_max32(dev->smem_optin, SMEM_DEFAULT);
    const size_t reserved = dev->arch >= 80 ? 1024 : 0; // per block
    p->mma_cols = min32(cols, 32);
    const int32_t col_blocks = ceil_div(cols, p->mma_cols);
    // as many heads as there is room for, unpacking rows once for all of them, unless blocks are too few then
    int32_t heads = 1;
    for (int32_t n = 2; n <= p->k.group_size && n*p->mma_cols <= 32; n++) {
        if (p->k.group_size%n == 0 && p->v.group_size%n == 0 && tiles*(p->k.n_head_kv/n)*col_blocks*p->n_stream >= dev->n_sm) {
            heads = n;
        }
    }
    for (; heads > 0; heads--) {
        if (p->k.group_size%heads || p->v.group_size%heads) {
            continue;
        }
        for (size_t i = 0; i < sizeof(kernels)/sizeof(kernels[0]); i++) {
            p->part.heads_per_cta = heads;
            p->mma_slice = kernels[i].slice;
            const size_t smem = mma_smem(p, kernels[i].cells, kernels[i].cols);
            if (heads*p->mma_cols > kernels[i].cols || smem > optin) {
                continue;
            }
            const int64_t blocks = (int64_t)(p->k.n_head_kv/heads)*col_blocks*palu_cuda_max32(1, ceil_div(p->v.rank_max, p->mma_slice));
            const int32_t per_sm = 2*(smem + reserved) <= optin + reserved ? kernels[i].per_sm : 1;
            split(p, (int64_t) dev->n_sm*per_sm, blocks*p->n_stream);
            return set_launch(dev, out, kernels[i].name, p->n_chunk, blocks, p->n_stream, 4*(uint32_t) kernels[i].cells, smem);
        }
    }
    return -1;
}

static int plan_general(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_launch * out) {
    const int64_t cols = (int64_t) p->n_head/p->k.n_head_kv*p->n_token;
    const int64_t blocks = p->k.n_head_kv*(int64_t) ceil_div(cols, 8);
    split(p, (int64_t) dev->n_sm*2, blocks*p->n_stream); // at least two of these blocks fit a multiprocessor
    return set_launch(dev, out, "palu_decode", p->n_chunk, blocks, p->n_stream, 128, palu_cuda_decode_smem(p));
}

// As many query rows at a time as take the least time: a wave of blocks takes about as long as 8 rows of 8 chunks do.
static int plan_combine(const palu_cuda_device * dev, const palu_cuda_attn * p, palu_cuda_launch * out) {
    static const struct { int32_t rows; const char * name; const char * name_many; } kernels[] = {
#define X(RB) { RB, "palu_combine_" #RB, "palu_combine_many_" #RB },
        PALU_CUDA_COMBINE_KERNELS(X)
#undef X
    };
    const int64_t rows = (int64_t) p->n_head/p->v.n_head_kv*p->n_token*p->n_stream; // of a KV head
    const int64_t blocks = (int64_t) p->v.n_head_kv*ceil_div(p->v.head_dim, 32);
    const int32_t chunks = p->n_context ? ceil_div(p->n_chunk, p->n_context) + 1 : p->n_chunk;
    int64_t least = 0;
    for (size_t i = 0; i < sizeof(kernels)/sizeof(kernels[0]); i++) {
        const int32_t n = kernels[i].rows;
        const size_t smem = palu_cuda_combine_smem(p, n);
        const int64_t time = ceil_div(blocks*ceil_div(rows, n), dev->n_sm)*(int64_t)(64 + n*chunks);
        if (i > 0 && (time >= least || smem > (size_t) dev->smem_optin)) {
            continue;
        }
        least = time;
        if (set_launch(dev, out, p->n_context ? kernels[i].name_many : kernels[i].name, blocks, ceil_div(rows, n), 1, 1024, smem)) {
            return -1;
        }
    }
    return 0;
}

int palu_cuda_plan_attn(const palu_cuda_device * dev, palu_cuda_attn * p, palu_cuda_part * rest, palu_cuda_launch out[4]) {
    memset(out, 0, 4*sizeof(*out));
    memset(rest, 0, sizeof(*rest));
    const int32_t beside = p->part.beside;
    if (p->k.n_head_kv < 1 || p->k.n_head_kv != p->v.n_head_kv || p->n_head%p->k.n_head_kv || p->k.head_dim%2) {
        return -1;
    }
    p->rank_stride = (p->v.rank_max + 7)/8*8;
    p->n_context = p->context_tokens = 0;
    if (plan_cluster(dev, p, rest, &out[1]) == 0 || plan_many(dev, p, out) == 0) {
        p->part.beside = beside;
    } else if (plan_wide(dev, p, &out[1]) && plan_cheb(dev, p, &out[1]) && plan_sm90(dev, p, &out[1]) && plan_mma(dev, p, &out[1]) && plan_general(dev, p, &out[1])) {
        return -1;
    }
    return plan_combine(dev, p, &out[3]);
}

// Query rows per KV head from which rebuilding the context, once for all of them, and ordinary attention are the faster way:
// on an H200 at 64K cells, 4 tokens with four query heads per KV head, 16 with one.
#define REBUILD_FROM_ROWS 16
// The same in tokens of a sequence where clusters share what tokens see.
#define REBUILD_FROM_TOKENS 5

int palu_cuda_plan_on_rows(const palu_cuda_device * dev, const palu_cuda_attn * p, int32_t n_seq) {
    if ((int64_t) p->n_token*p->n_head < (int64_t) REBUILD_FROM_ROWS*p->k.n_head_kv) {
        return 1;
    }
    palu_cuda_attn q = *p;
    palu_cuda_launch out[2];
    return p->k.n_head_kv > 0 && p->n_token < (int64_t) REBUILD_FROM_TOKENS*n_seq && plan_many(dev, &q, out) == 0;
}

size_t palu_cuda_partial_size(const palu_cuda_attn * p) {
    if (p->n_context) {
        return (size_t) palu_cuda_tiles_size(p) + (size_t)(p->n_chunk + p->n_context)*p->context_tokens*p->n_head*(4 + p->rank_stride);
    }
    return (size_t) p->n_stream*p->n_token*p->n_head*p->n_chunk*(4 + p->rank_stride);
}

int palu_cuda_plan_recent(const palu_cuda_recent * p, palu_cuda_launch out[1]) {
    if (p->head_dim_k%2 || p->head_dim_v%2 || (p->out && p->n_recent > PALU_CUDA_RECENT_MAX)) {
        return -1;
    }
    out[0] = (palu_cuda_launch) { "palu_recent", { (uint32_t) p->n_head_kv, (uint32_t) p->n_stream, p->out && p->store ? 1 : (uint32_t) p->n_token }, 256, p->out ? (uint32_t) palu_cuda_recent_smem(p) : 0 };
    return 0;
}

int palu_cuda_plan_prepend(const palu_cuda_prepend * p, palu_cuda_launch out[1]) {
    if (p->head_dim%2) {
        return -1;
    }
    out[0] = (palu_cuda_launch) { "palu_prepend", { (uint32_t) p->n_more, (uint32_t) p->n_stream, 1 }, 256, 0 };
    return 0;
}
