//! A KV cache of low-rank, quantized latents, for llama.cpp and runtimes like it.
//!
//! The method is Palu (Chang et al., "Palu: Compressing KV-Cache with Low-Rank Projection", ICLR 2025, arXiv 2407.21118):
//! store a low-rank latent of each token's keys (before RoPE) and values, and rebuild them inside attention.
//!
//! | module | decides |
//! |---|---|
//! | [`gguf`] | how a GGUF file is read (untrusted) and written |
//! | [`projection`] | what a projection file holds and when it is refused |
//! | [`layout`] | which channels are kept with how many bits at a budget, and where they stand in a row |
//! | [`rope`] | the angles of a cell's rotation |
//! | [`codec`] | how a token becomes a row, and back |
//! | [`attention`] | attention over rows |
//! | [`recent`] | the last tokens in f16 beside the rows |
//! | `cuda` | the same on an NVIDIA GPU: tables and launches of the kernels in `cuda/` |
//! | [`kernels`] | the inner loops of both, for each instruction set |
//! | [`capi`] | the C ABI of `include/palu.h` |
//! | `convert` | how a projection file is made |
//! | `compare` | how caches are compared, and what a reader sees of it |

pub mod attention;
pub mod capi;
pub mod codec;
#[cfg(feature = "convert")]
pub mod compare;
#[cfg(feature = "convert")]
pub mod convert;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gguf;
pub mod hash;
pub mod kernels;
pub mod layout;
pub mod projection;
pub mod recent;
pub mod rope;
