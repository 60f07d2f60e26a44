// The C ABI as a C program sees it: built with warnings as errors and AddressSanitizer, run by tests/capi.rs.

#include "palu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failed = 0;

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, palu_last_error()); \
            failed = 1;                                                                        \
        }                                                                                      \
    } while (0)

static float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31;
    const float size = exponent ? ldexpf(1.0f + (h & 1023)/1024.0f, exponent - 15) : ldexpf((h & 1023)/1024.0f, -14);
    return h & 0x8000 ? -size : size;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    CHECK(palu_abi_version() == PALU_ABI_VERSION);
    CHECK(strlen(palu_cpu_path()) > 0);
    CHECK(palu_hash("abc", 3, 0) == 0x44BC2CF5AD770999ull);
    CHECK(palu_hash(NULL, 0, 0) == 0xEF46DB3751D8E999ull);

    // errors: a status, a sentence, and nothing else
    palu_proj * proj = NULL;
    CHECK(palu_proj_load(NULL, 0, &proj) == PALU_ERR_ARGUMENT && proj == NULL);
    CHECK(palu_proj_load(argv[1], 0, NULL) == PALU_ERR_ARGUMENT);
    CHECK(palu_proj_load("/nonexistent/file", 0, &proj) == PALU_ERR_IO && strlen(palu_last_error()) > 0);
    CHECK(palu_proj_load(argv[2], 0, &proj) == PALU_ERR_FORMAT); // a model, not a projection
    CHECK(palu_proj_load(argv[1], 99, &proj) == PALU_ERR_ARGUMENT);
    CHECK(palu_proj_load(argv[1], NAN, &proj) == PALU_ERR_ARGUMENT && proj == NULL);

    CHECK(palu_proj_load(argv[1], 0, &proj) == PALU_OK && proj != NULL);
    palu_proj_info info;
    CHECK(palu_proj_get_info(proj, &info) == PALU_OK);
    CHECK(palu_proj_get_info(NULL, &info) == PALU_ERR_ARGUMENT);
    CHECK(info.n_layer == 8 && info.n_layer_kv == 8 && info.f16_bytes_per_token == 8*2*384*2);
    CHECK(info.bits_per_value > 2.0 && info.bits_per_value <= 2.25);
    CHECK(palu_proj_check_model(proj, "llama", info.model_identity, 8) == PALU_OK);
    CHECK(palu_proj_check_model(proj, "llama", info.model_identity ^ 1, 8) == PALU_ERR_MISMATCH);
    CHECK(palu_proj_check_model(proj, "qwen2", info.model_identity, 8) == PALU_ERR_MISMATCH);

    palu_layer_info layer_info;
    CHECK(palu_proj_get_layer(proj, 3, &layer_info) == PALU_OK);
    CHECK(palu_proj_get_layer(proj, 8, &layer_info) == PALU_ERR_NOT_FOUND);
    CHECK(palu_proj_get_layer(proj, -1, &layer_info) == PALU_ERR_NOT_FOUND);
    CHECK(layer_info.n_head_kv == 6 && layer_info.head_dim_k == 64 && layer_info.head_dim_v == 64);

    palu_rope rope = { PALU_ROPE_NORM, 64, 0, 2048, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f, NULL };
    palu_layer * layer = NULL;
    CHECK(palu_layer_create(proj, 99, &rope, &layer) == PALU_ERR_NOT_FOUND);
    rope.n_rot = 66;
    CHECK(palu_layer_create(proj, 3, &rope, &layer) == PALU_ERR_ARGUMENT);
    rope.n_rot = 64;
    rope.type  = 40;
    CHECK(palu_layer_create(proj, 3, &rope, &layer) == PALU_ERR_UNSUPPORTED && layer == NULL);
    rope.type  = PALU_ROPE_NORM;
    CHECK(palu_layer_create(proj, 3, &rope, &layer) == PALU_OK && layer != NULL);

    // a token stored, rebuilt, and attended to alone: attention over one cell is its value
    enum { N_HEAD = 6, HEAD_DIM = 64, D = N_HEAD*HEAD_DIM, N_ROW = 4 };
    float    x[D], k[D], v[D], q[D], out[D];
    uint8_t * rows_k = malloc(N_ROW*layer_info.row_bytes_k);
    uint8_t * rows_v = malloc(N_ROW*layer_info.row_bytes_v);
    memset(rows_k, 0xFF, N_ROW*layer_info.row_bytes_k);
    memset(rows_v, 0xFF, N_ROW*layer_info.row_bytes_v);
    for (int i = 0; i < D; ++i) {
        x[i] = sinf(0.1f*i);
        q[i] = cosf(0.3f*i);
        out[i] = NAN;
    }
    const int64_t idx = 2;
    palu_store_params store = { x, HEAD_DIM*sizeof(float), D*sizeof(float), &idx, rows_k, N_ROW, 1, PALU_KEY };
    CHECK(palu_store(layer, &store, 0, 1) == PALU_OK);
    store.rows = rows_v;
    store.side = PALU_VALUE;
    CHECK(palu_store(layer, &store, 0, 1) == PALU_OK);
    store.side = 2;
    CHECK(palu_store(layer, &store, 0, 1) == PALU_ERR_ARGUMENT);
    store.side = PALU_VALUE;
    CHECK(palu_store(layer, &store, 1, 1) == PALU_ERR_ARGUMENT);
    store.n_row = 2;
    CHECK(palu_store(layer, &store, 0, 1) == PALU_ERR_ARGUMENT);
    CHECK(rows_k[0] == 0xFF && rows_k[3*layer_info.row_bytes_k] == 0xFF);
    CHECK(palu_load_rows(layer, PALU_KEY, rows_k, &idx, 1, k) == PALU_OK);
    CHECK(palu_load_rows(layer, PALU_VALUE, rows_v, &idx, 1, v) == PALU_OK);

    // as an f16 cache would hold it: values as they are, keys rotated by their position, which leaves each pair's length
    const int32_t at = 5;
    uint16_t half[D];
    palu_rebuild_params rebuild = { rows_v + idx*layer_info.row_bytes_v, 0, NULL, half, 1, 1, PALU_VALUE, NULL, NULL, 0, 0, 0, 0, 0 };
    CHECK(palu_rebuild(layer, &rebuild, 0, 1) == PALU_OK);
    for (int i = 0; i < D; ++i) {
        CHECK(fabsf(half_to_float(half[i]) - v[i]) < 1e-3f);
    }
    rebuild.rows = rows_k + idx*layer_info.row_bytes_k;
    rebuild.side = PALU_KEY;
    CHECK(palu_rebuild(layer, &rebuild, 0, 1) == PALU_ERR_ARGUMENT); // no positions
    rebuild.pos = &at;
    CHECK(palu_rebuild(layer, &rebuild, 0, 1) == PALU_OK);
    for (int i = 0; i < D; i += 2) {
        CHECK(fabsf(hypotf(half_to_float(half[i]), half_to_float(half[i + 1])) - hypotf(k[i], k[i + 1])) < 2e-3f);
    }

    const float   mask[N_ROW] = { -INFINITY, -INFINITY, 0.0f, -INFINITY };
    const int32_t pos [N_ROW] = { -1, 12345678, 5, 7 };
    palu_attn_params attn = {
        q, HEAD_DIM*sizeof(float), D*sizeof(float), 0, rows_k, rows_v, 0, 0, mask, sizeof(mask), 0, 0,
        pos, NULL, NULL, NULL, out, N_HEAD, 1, 1, N_ROW, 0.125f, 0.0f, 0.0f,
    };
    const int    n_chunk = palu_attn_n_chunk(layer, N_HEAD, 1, 1, N_ROW);
    const size_t size    = palu_attn_partial_size(layer, N_HEAD, 1, 1, N_ROW);
    attn.partial = malloc((size + 1)*sizeof(float));
    memset(attn.partial, 0xFF, (size + 1)*sizeof(float));
    CHECK(n_chunk >= 1);
    for (int ith = 2; ith >= 0; --ith) {
        CHECK(palu_attn(layer, &attn, ith, 3) == PALU_OK);
    }
    CHECK(palu_attn_combine(layer, &attn, 0, 1) == PALU_OK);
    for (int i = 0; i < D; ++i) {
        CHECK(fabsf(out[i] - v[i]) < 1e-4f);
    }

    // a token of this call beside the row, with a score that leaves the row nothing: what comes out is the token's value
    float key[D], value[D], extra[N_HEAD*(PALU_EXTRA_HEAD + HEAD_DIM)];
    uint16_t slots_k[2*D] = { 0 }, slots_v[2*D] = { 0 };
    for (int i = 0; i < D; ++i) {
        key[i] = 100.0f*q[i];
        value[i] = 0.5f*(i%7);
    }
    int32_t recent_idxs[] = { 2, -1, 1 }; // the token itself, nothing before it, and it goes to slot 1
    palu_recent_params recent = {
        q, HEAD_DIM*sizeof(float), D*sizeof(float), 0, key, HEAD_DIM*sizeof(float), 0, value, HEAD_DIM*sizeof(float), 0,
        slots_k, slots_v, recent_idxs, extra, N_HEAD, N_HEAD, HEAD_DIM, HEAD_DIM, 1, 1, 2, 2, 0.125f, 0.0f, 0.0f,
    };
    for (int ith = 0; ith < 2; ++ith) {
        CHECK(palu_recent(&recent, ith, 2) == PALU_OK);
    }
    attn.extra = extra;
    CHECK(palu_attn(layer, &attn, 0, 1) == PALU_OK);
    CHECK(palu_attn_combine(layer, &attn, 0, 1) == PALU_OK);
    for (int i = 0; i < D; ++i) {
        CHECK(fabsf(out[i] - value[i]) < 1e-4f);
        CHECK(slots_v[i] == 0 && half_to_float(slots_v[D + i]) == value[i] && fabsf(half_to_float(slots_k[D + i]) - key[i]) <= 1e-3f*fabsf(key[i]));
    }
    recent_idxs[0] = 3;
    CHECK(palu_recent(&recent, 0, 1) == PALU_ERR_ARGUMENT); // there is one token
    recent_idxs[0] = 2;
    recent_idxs[2] = 2;
    CHECK(palu_recent(&recent, 0, 1) == PALU_ERR_ARGUMENT); // there are two slots
    attn.n_head = 7;
    CHECK(palu_attn(layer, &attn, 0, 1) == PALU_ERR_ARGUMENT);
    attn.n_head = N_HEAD;
    attn.q = NULL;
    CHECK(palu_attn(layer, &attn, 0, 1) == PALU_ERR_ARGUMENT);

    free(attn.partial);
    free(rows_k);
    free(rows_v);
    palu_layer_free(layer);
    palu_layer_free(NULL);
    palu_proj_free(proj);
    palu_proj_free(NULL);
    return failed;
}
