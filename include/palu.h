// palu.h - C ABI of libpalu: a low-rank, quantized KV cache (Palu, Chang et al., ICLR 2025, arXiv 2407.21118).
//
// A projection file (made by `palu convert`, one per model) says, for every layer and for keys (before RoPE) and values
// separately, which latent channels of a token are kept and with how many bits. A token is then stored as one opaque
// row of bytes per layer and side; attention reads the rows directly.
//
// Conventions
//   - Shapes are written slowest dimension first: x[n_token][n_head_kv][head_dim]. Strides are in bytes.
//   - Ownership: every palu_*_load/create gives an object that its palu_*_free takes back. Pointers inside parameter
//     structs are borrowed for the call alone.
//   - Threads: palu_proj, palu_layer and palu_cuda_layer are immutable; any number of threads may use one at the same time. Functions
//     that take (ith, nth) are to be called once for every ith in 0 <= ith < nth, in any order or at the same time, with
//     the same parameters; together these calls do the work, and its result does not depend on nth.
//   - Errors: functions that return palu_status write a sentence for palu_last_error() when it is not PALU_OK, and
//     then have no other effect. Numbers are never reused. A panic inside the library is caught and reported as
//     PALU_ERR_INTERNAL; nothing unwinds through this interface.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PALU_ABI_VERSION 5

typedef enum palu_status {
    PALU_OK              = 0,
    PALU_ERR_ARGUMENT    = 1, // null pointer, index out of range, a shape that does not fit
    PALU_ERR_IO          = 2, // a file cannot be opened, read or written
    PALU_ERR_FORMAT      = 3, // not a projection file, truncated, corrupted, or of an unknown version
    PALU_ERR_MISMATCH    = 4, // a sound projection file, but for another model
    PALU_ERR_UNSUPPORTED = 5, // a model or setting that the library cannot do
    PALU_ERR_INTERNAL    = 6, // a bug in the library; the sentence says where
    PALU_ERR_NOT_FOUND   = 7, // no such layer in the projection file
    PALU_ERR_INTERRUPTED = 8, // the host's callback asked to stop
} palu_status;

typedef enum palu_side {
    PALU_KEY   = 0, // keys before RoPE
    PALU_VALUE = 1,
} palu_side;

// The ABI version the library was built with; compare it with PALU_ABI_VERSION. Never fails.
int32_t palu_abi_version(void);

// The sentence for the last error on this thread; "" if there was none. Valid until the next palu call on this thread.
const char * palu_last_error(void);

// What the attention kernels of this machine use: "AVX-512 VNNI", "AVX2" or "portable" (PALU_CPU_PATH in the
// environment, avx512|avx2|portable, picks a lower one). Static string.
const char * palu_cpu_path(void);

// XXH64 (Collet) of size bytes, chained through seed: the content hash of this library's files and identities.
uint64_t palu_hash(const void * data, size_t size, uint64_t seed);

//
// Projection file
//

typedef struct palu_proj palu_proj;

typedef struct palu_proj_info {
    double   bits_per_value;      // stored bits per cached K or V value, scales and padding included
    uint64_t bytes_per_token;     // over all layers, K and V
    uint64_t f16_bytes_per_token; // the same for an f16 cache
    uint64_t model_identity;      // of the model that the file was made for
    uint64_t identity;            // of this projection at this budget: rows written under one identity cannot be read under another
    int32_t  n_layer;             // of the model
    int32_t  n_layer_kv;          // layers that the file holds
} palu_proj_info;

typedef struct palu_layer_info {
    int32_t n_head_kv;
    int32_t head_dim_k;
    int32_t head_dim_v;
    int32_t rank_k;      // latent channels kept, over all head groups
    int32_t rank_v;
    size_t  row_bytes_k; // bytes of one token's row
    size_t  row_bytes_v;
} palu_layer_info;

// Opens, checks (structure and checksum, whole file) and lays out a projection file. bits_per_value: the budget, 0 for
// the file's own, else at most the file's own. Errors: IO, FORMAT, ARGUMENT (budget out of range).
palu_status palu_proj_load(const char * path, double bits_per_value, palu_proj ** out);
void        palu_proj_free(palu_proj * proj);

palu_status palu_proj_get_info (const palu_proj * proj, palu_proj_info * out);
palu_status palu_proj_get_layer(const palu_proj * proj, int32_t il, palu_layer_info * out); // NOT_FOUND: layer il is not in the file

// MISMATCH with a sentence naming both unless the file was made for this model. arch: general.architecture.
palu_status palu_proj_check_model(const palu_proj * proj, const char * arch, uint64_t model_identity, int32_t n_layer);

//
// Layer: one layer of a projection, made ready to run with one kind of RoPE
//

typedef struct palu_layer palu_layer;

typedef enum palu_rope_type {
    PALU_ROPE_NONE = 0, // keys are used as stored
    PALU_ROPE_NORM = 1, // rotates (x[2i], x[2i + 1])
    PALU_ROPE_NEOX = 2, // rotates (x[i], x[i + n_rot/2])
} palu_rope_type;

// RoPE as ggml_rope_ext() does it, YaRN included; see there for the parameters.
typedef struct palu_rope {
    int32_t type;         // palu_rope_type
    int32_t n_rot;        // dimensions rotated, even
    int32_t n_offs;       // index of the first rotated dimension
    int32_t n_ctx_orig;
    float   freq_base;
    float   freq_scale;
    float   ext_factor;
    float   attn_factor;
    float   beta_fast;
    float   beta_slow;
    const float * freq_factors; // [n_rot/2] or NULL
} palu_rope;

// Errors: NOT_FOUND, ARGUMENT (rope does not fit the head), UNSUPPORTED.
palu_status palu_layer_create(const palu_proj * proj, int32_t il, const palu_rope * rope, palu_layer ** out);
void        palu_layer_free(palu_layer * layer);

// Stores tokens: row idxs[t] of rows becomes token t. Not-a-number and infinite inputs make a row that rebuilds to
// not-a-number, so that they show. Rows that idxs does not name are left as they are.
typedef struct palu_store_params {
    const float   * x;           // [n_token][n_head_kv][head_dim], last dimension contiguous
    size_t          x_nb_head;   // stride between heads
    size_t          x_nb_token;  // stride between tokens
    const int64_t * idxs;        // [n_token], 0 <= idxs[t] < n_row, all different
    uint8_t       * rows;        // [n_row][row_bytes]
    int64_t         n_row;
    int32_t         n_token;
    int32_t         side;        // palu_side
} palu_store_params;

palu_status palu_store(const palu_layer * layer, const palu_store_params * params, int32_t ith, int32_t nth);

// Rebuilds rows as they went in (keys before RoPE): out[n_token][n_head_kv][head_dim], contiguous. For tests and tools.
palu_status palu_load_rows(const palu_layer * layer, int32_t side, const uint8_t * rows, const int64_t * idxs, int32_t n_token, float * out);

// Attention over rows: out = softmax(softcap(scale*q.K) + slope*mask, sinks).V, per query head and query token, with K
// rotated by the cell's position. Query head h reads KV head h/(n_head/n_head_kv). A query that no cell is visible to
// gives zeros. Cells that are masked for every query are not read, whatever their bytes.
typedef struct palu_attn_params {
    const float   * q;            // [n_stream][n_token][n_head][head_dim_k], rotated, last dimension contiguous
    size_t          q_nb_head;
    size_t          q_nb_token;
    size_t          q_nb_stream;
    const uint8_t * rows_k;       // [n_stream][n_kv][row_bytes_k], rows contiguous within a stream
    const uint8_t * rows_v;       // [n_stream][n_kv][row_bytes_v]
    size_t          rows_k_nb_stream;
    size_t          rows_v_nb_stream;
    const void    * mask;         // [n_stream][n_token][n_kv], added to the scores, -inf hides; NULL: all visible
    size_t          mask_nb_token;
    size_t          mask_nb_stream;
    int32_t         mask_f16;     // 1: mask is f16, 0: f32
    const int32_t * pos;          // [n_stream][n_kv] position of each cell, contiguous
    const float   * sinks;        // [n_head] logits that take part in the softmax without a value, or NULL
    const float   * extra;        // [n_stream][n_token][n_head][PALU_EXTRA_HEAD + head_dim_v] from other cells, or NULL: palu_recent()
    float         * partial;      // palu_attn_partial_size() floats; unused when palu_attn_n_chunk() is 1
    float         * out;          // [n_stream][n_token][n_head][head_dim_v], contiguous
    int32_t         n_head;       // a multiple of n_head_kv
    int32_t         n_token;      // per stream
    int32_t         n_stream;
    int32_t         n_kv;         // cells per stream
    float           scale;
    float           softcap;      // 0: none; else scores become softcap*tanh(scores/softcap) before the mask
    float           max_bias;     // ALiBi (slopes as in ggml_soft_max_ext); 0: none, slope = 1
} palu_attn_params;

// Few query tokens over a long context are split over the context: palu_attn() then writes one partial result per chunk
// and palu_attn_combine() must be called after all of its (ith, nth) calls are done. With 1 chunk palu_attn() writes out
// itself and palu_attn_combine() does nothing. Both numbers depend on the shapes alone.
int32_t palu_attn_n_chunk     (const palu_layer * layer, int32_t n_head, int32_t n_token, int32_t n_stream, int32_t n_kv);
size_t  palu_attn_partial_size(const palu_layer * layer, int32_t n_head, int32_t n_token, int32_t n_stream, int32_t n_kv); // in floats

palu_status palu_attn        (const palu_layer * layer, const palu_attn_params * params, int32_t ith, int32_t nth);
palu_status palu_attn_combine(const palu_layer * layer, const palu_attn_params * params, int32_t ith, int32_t nth);

// The last tokens of a sequence in f16, beside the rows: most of what attention reads is near, and exact there. Every token
// has its row too. The runtime keeps a ring of slots for each sequence and tells for every query which slot, or which token of
// the same call, has the cell at each distance before it (its own at distance 0); it hides these cells from the attention over
// rows with the mask, and passes what comes out here as palu_attn_params.extra. A cell that no slot has any more is simply
// not named here and read from its row.

#define PALU_N_RECENT   16 // what a runtime should take by default
#define PALU_EXTRA_HEAD  4 // floats before the values in a row of out: largest score, sum of exp(score - largest), two unused

typedef struct palu_recent_params {
    const float   * q;              // [n_stream][n_token][n_head][head_dim_k], as in palu_attn_params
    size_t          q_nb_head;
    size_t          q_nb_token;
    size_t          q_nb_stream;
    const float   * k_cur;          // [n_stream*n_token][n_head_kv][head_dim_k] keys of these tokens, rotated
    size_t          k_cur_nb_head;
    size_t          k_cur_nb_token;
    const float   * v_cur;          // [n_stream*n_token][n_head_kv][head_dim_v]
    size_t          v_cur_nb_head;
    size_t          v_cur_nb_token;
    uint16_t      * k_slots;        // f16 [n_stream][n_slot][n_head_kv][head_dim_k], contiguous
    uint16_t      * v_slots;        // f16 [n_stream][n_slot][n_head_kv][head_dim_v], contiguous
    const int32_t * idxs;           // [n_stream][n_token][n_recent + 1]: i < n_slot: slot i, else token i - n_slot of the same stream, negative:
                                    // none; last the slot that the token goes to when all queries are done, all different, or negative
    float         * out;            // [n_stream][n_token][n_head][PALU_EXTRA_HEAD + head_dim_v], or NULL: tokens are stored and nothing else
    int32_t         n_head;
    int32_t         n_head_kv;
    int32_t         head_dim_k;
    int32_t         head_dim_v;
    int32_t         n_token;        // per stream
    int32_t         n_stream;
    int32_t         n_slot;         // per stream
    int32_t         n_recent;
    float           scale;          // as in palu_attn_params
    float           softcap;
    float           max_bias;       // the mask of the cell at distance d is -d
} palu_recent_params;

palu_status palu_recent(const palu_recent_params * params, int32_t ith, int32_t nth);

// Rebuilds rows as the f16 cache that they stand for: keys rotated by the cells' positions, values as they are. For a
// runtime whose own attention is the faster one where many query tokens share a context. Slots and tokens of
// palu_recent_params can be had in front of the rows, to be told apart by a mask.
typedef struct palu_rebuild_params {
    const uint8_t * rows;           // [n_stream][n_kv][row_bytes], rows contiguous within a stream
    size_t          rows_nb_stream; // stride between streams
    const int32_t * pos;            // [n_stream][n_kv] position of each cell, contiguous; only for keys
    uint16_t      * out;            // f16 [n_stream][n_slot + n_token + n_pad + n_kv][n_head_kv][head_dim], contiguous
    int32_t         n_stream;
    int32_t         n_kv;
    int32_t         side;           // palu_side
    const uint16_t * slots;         // this side's slots; NULL if n_slot is 0
    const float   * cur;            // this side's tokens; NULL if n_token is 0
    size_t          cur_nb_head;
    size_t          cur_nb_token;
    int32_t         n_slot;
    int32_t         n_token;        // per stream
    int32_t         n_pad;          // cells of zeros before the rows
} palu_rebuild_params;

palu_status palu_rebuild(const palu_layer * layer, const palu_rebuild_params * params, int32_t ith, int32_t nth);

//
// CUDA: one layer on an NVIDIA GPU
//
// The kernels are inside the library; the driver is looked for at run time. Pointers in parameter structs are device
// pointers here, rows begin at a multiple of 16 bytes, and every call only puts kernels on a stream (a CUstream or
// cudaStream_t of the device's primary context): it neither allocates nor waits, and may be captured in a CUDA graph.
// What a call puts on the stream depends on the parameters alone, so that a captured graph stays right as long as they
// stay the same; everything that changes from token to token stands in device memory. A captured graph is work of the
// stream it was captured from: it does not run at the same time as other calls for the same layer on that stream.
//

typedef struct palu_cuda_layer palu_cuda_layer;

// Puts layer il on the GPU `device`, numbered as the driver does. Errors: as palu_layer_create(); UNSUPPORTED, with the
// reason, where the library has no kernels, there is no driver or it is too old, the device is too old, or no kernel can do
// this layer's shape; nothing is left for later calls to find out.
palu_status palu_cuda_layer_create(const palu_proj * proj, int32_t il, const palu_rope * rope, int32_t device, palu_cuda_layer ** out);
void        palu_cuda_layer_free(palu_cuda_layer * layer);

// "NVIDIA H200, sm_90". Valid as long as the layer.
const char * palu_cuda_description(const palu_cuda_layer * layer);

// Stores tokens in two steps, in this order on one stream: the first writes latents to scratch memory, the second rows. Both take
// keys, or values, or both of the same tokens (n_params = 2), which is faster; latent has palu_cuda_store_latent_size() floats for
// each of them. Rows are those of palu_store() but for rounding. The indices cannot be checked here: the caller vouches for them.
//
// beside is 0, or the n_kv of the attention that hides both steps, and palu_cuda_recent(); these two only ask whether it is 0. The order
// on the stream is palu_cuda_project(), palu_cuda_attn(), palu_cuda_recent(), palu_cuda_store(), palu_cuda_attn_combine() with nothing
// else between the last four, and beside is not 0 for all of them that take it; between the first two is nothing that writes rows of
// this layer. Few tokens may then be projected by palu_cuda_store(): they must be there until it is done. The caller vouches that the
// mask hides the rows that are stored from all queries of this attention, as it does for the last tokens of palu_recent(), and that
// nothing that one of the last four reads or writes shares memory with what another writes, but for these rows.
size_t      palu_cuda_store_latent_size(const palu_cuda_layer * layer, int32_t side, int32_t n_token);
palu_status palu_cuda_project(const palu_cuda_layer * layer, const palu_store_params * params, int32_t n_params, float * latent, int32_t beside, void * stream);
palu_status palu_cuda_store  (const palu_cuda_layer * layer, const palu_store_params * params, int32_t n_params, float * latent, int32_t beside, void * stream);

// 1 where attention is fastest straight from the rows; 0 where the query tokens are so many that palu_cuda_rebuild() and
// the runtime's own attention over its result are faster. n_seq: of how many sequences a stream's tokens are, at least 1: where
// each sees its own cells, the others' cost nothing. Depends on these numbers alone.
int32_t     palu_cuda_attn_on_rows     (const palu_cuda_layer * layer, int32_t n_head, int32_t n_token, int32_t n_stream, int32_t n_kv, int32_t n_seq);

// Attention in two steps, always both: palu_attn_params.partial has palu_cuda_attn_partial_size() floats.
size_t      palu_cuda_attn_partial_size(const palu_cuda_layer * layer, int32_t n_head, int32_t n_token, int32_t n_stream, int32_t n_kv);
palu_status palu_cuda_attn             (const palu_cuda_layer * layer, const palu_attn_params * params, int32_t beside, void * stream);
palu_status palu_cuda_attn_combine     (const palu_cuda_layer * layer, const palu_attn_params * params, void * stream);

// out is NULL, or n_recent is at most PALU_CUDA_RECENT_MAX.
#define PALU_CUDA_RECENT_MAX 256
palu_status palu_cuda_recent(const palu_cuda_layer * layer, const palu_recent_params * params, int32_t beside, void * stream);

palu_status palu_cuda_rebuild(const palu_cuda_layer * layer, const palu_rebuild_params * params, void * stream);

//
// Conversion and comparison (only in a library built with the feature `convert`)
//
// The runtime runs the model; the library decides which tokens and on which cache, looks at K, V and Q through a tap or at
// the logits, and writes the projection file or the comparison.
//

typedef struct palu_tap palu_tap;

// Which cells a query at position p can see, besides those after it.
typedef enum palu_window {
    PALU_WINDOW_NONE   = 0, // all of them
    PALU_WINDOW_LAST   = 1, // from p - n_window + 1 on
    PALU_WINDOW_CHUNK  = 2, // from the last multiple of n_window up to p on
    PALU_WINDOW_AROUND = 3, // from p - n_window/2 on
} palu_window;

// How a layer attends. Scores and their changes are those of palu_attn_params.
typedef struct palu_tap_layer {
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim_k;
    int32_t head_dim_v;
    int32_t window;            // palu_window
    int32_t n_window;          // tokens, > 0 unless window is PALU_WINDOW_NONE
    float   scale;
    float   softcap;
    float   max_bias;
    const palu_rope * rope;    // NULL for no RoPE
    const float     * sinks;   // [n_head] or NULL
    // The matrices that keys (before RoPE) and values come from, by palu_side, where these are a matrix times the layer's
    // input plus at most a bias; else NULL. Only read() looks into them; they live as long as the model.
    const void * proj[2];      // [n_head_kv*head_dim][n_embd]
    const void * proj_bias[2]; // [n_head_kv*head_dim] or NULL
    // Writes a matrix or a bias as f32 to out, if cap floats are enough. Returns how many floats there are, < 0 on error.
    int64_t (*read)(const void * proj, float * out, size_t cap);
} palu_tap_layer;

// What the graph is about to do in layer il; called while the graph is built, before the layer's first tap. Must say
// the same thing every time.
palu_status palu_tap_describe(palu_tap * tap, int32_t il, const palu_tap_layer * layer);

// Passes tokens of one layer and side through the tap: out gets what the model is to go on with (x itself while
// statistics are collected, x through the codec when a candidate is measured). For keys, q is the rotated query
// [n_token][n_head][head_dim_k] and pos the positions [n_token], also without RoPE; for values both are NULL.
typedef struct palu_tap_params {
    const float   * x;          // [n_token][n_head_kv][head_dim]
    size_t          x_nb_head;
    size_t          x_nb_token;
    const float   * q;
    size_t          q_nb_head;
    size_t          q_nb_token;
    const int32_t * pos;
    float         * out;        // [n_token][n_head_kv][head_dim], contiguous
    int32_t         n_token;
    int32_t         il;
    int32_t         side;       // palu_side
} palu_tap_params;

palu_status palu_tap_run(palu_tap * tap, const palu_tap_params * params, int32_t ith, int32_t nth);

// What a host is to load. Pointers are borrowed for the call alone, except tap.
typedef struct palu_host_params {
    const char * path;         // of the model
    const char * type_k;       // types of the cache by their ggml names, NULL: f16
    const char * type_v;
    const char * palu;         // projection file of the cache, NULL: none; excludes other types and a tap
    double       palu_bits;    // its budget, 0: the file's own
    palu_tap   * tap;          // the graph calls it; NULL: the model runs as it does for everybody
    int32_t      n_gpu_layers; // -1: the runtime's default
    int32_t      n_threads;
    int32_t      n_ctx;        // tokens of the context, cut to what the model was trained for
} palu_host_params;

typedef struct palu_host_model {
    char     arch[64];       // general.architecture
    char     name[128];      // general.name, or ""
    char     error[512];     // why the model cannot be loaded like this, in one sentence
    uint64_t identity;
    uint64_t kv_bytes;       // allocated for the cache of n_ctx tokens
    int32_t  n_ctx;          // tokens of the context
    int32_t  n_layer;
    int32_t  n_vocab;
    int32_t  n_ctx_train;
    int32_t  token_bos;      // -1: none
    int32_t  has_tokenizer;  // 0: the model has no vocabulary; only --calibration self works
} palu_host_model;

// Callbacks return 0, or a negative number after saying why in one sentence: load in error, the others on stderr.
typedef struct palu_host {
    void * ctx;
    // Makes a context as the parameters have it, in place of the one before. On failure there is none.
    int32_t (*load)(void * ctx, const palu_host_params * params, palu_host_model * out);
    // Tokens of UTF-8 text, without added special tokens. Returns how many, at most cap; a negative number -n if n would be needed.
    int32_t (*tokenize)(void * ctx, const char * text, int32_t size, int32_t * tokens, int32_t cap);
    // Runs tokens as one sequence from position 0 on an empty cache (keep = 0) or after what is there (keep = 1).
    // logits: NULL, or room for the logits [n_token - first_logit][n_vocab] of the tokens from first_logit on.
    int32_t (*eval)(void * ctx, const int32_t * tokens, int32_t n_token, int32_t keep, int32_t first_logit, float * logits);
    // Output projection of layer il as f32 [n_out][n_head*head_dim_v] into out, at most cap floats (cap 0: only tells the
    // size). Returns n_out, or 0 when the layer's attention output is not multiplied by a matrix at once.
    int32_t (*output_proj)(void * ctx, int32_t il, float * out, size_t cap);
} palu_host;

// The whole of `palu convert` and `palu compare`: argv as the command line has it, from the command's name on. Returns the
// exit status.
int32_t palu_command(int32_t argc, const char * const * argv, const palu_host * host);

#ifdef __cplusplus
}
#endif
