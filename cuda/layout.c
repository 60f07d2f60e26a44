// layout.c - sizes and offsets of the parameter structs as the C compiler lays them out, for the test that holds src/cuda.rs to them.

#include "palu_cuda.h"

const size_t palu_cuda_layout[] = {
    sizeof(palu_cuda_group),   offsetof(palu_cuda_group, dec0),        offsetof(palu_cuda_group, enc0),
    sizeof(palu_cuda_side),    offsetof(palu_cuda_side, step),         offsetof(palu_cuda_side, slice_span),   offsetof(palu_cuda_side, near_groups),
    sizeof(palu_cuda_rope),    offsetof(palu_cuda_rope, n_fast),
    sizeof(palu_cuda_attn),    offsetof(palu_cuda_attn, rows_k),       offsetof(palu_cuda_attn, out),
                               offsetof(palu_cuda_attn, mask_f16),     offsetof(palu_cuda_attn, part),     offsetof(palu_cuda_attn, v_stage_words),
    sizeof(palu_cuda_stored),  offsetof(palu_cuda_stored, latent),     sizeof(palu_cuda_store),         offsetof(palu_cuda_store, beside),
    sizeof(palu_cuda_rebuild), offsetof(palu_cuda_rebuild, out),       offsetof(palu_cuda_rebuild, stages),
    sizeof(palu_cuda_recent),  offsetof(palu_cuda_recent, out),        offsetof(palu_cuda_recent, max_bias),
    sizeof(palu_cuda_prepend), offsetof(palu_cuda_prepend, out),       offsetof(palu_cuda_prepend, n_token),
    sizeof(palu_cuda_device),  offsetof(palu_cuda_device, n_cluster),  sizeof(palu_cuda_launch),        offsetof(palu_cuda_launch, smem),
};

const size_t palu_cuda_layout_n = sizeof(palu_cuda_layout)/sizeof(palu_cuda_layout[0]);
