//! Speed of the kernels at the shapes of a small model: 8 layers, 6 heads of 64, key rank 184, value rank 248.
//!
//! `cargo bench --bench attention`; PALU_CPU_PATH picks a path, PALU_BENCH_THREADS the number of threads (2).

#[path = "../tests/common/mod.rs"]
mod common;

use common::{random_side, Random};
use criterion::{criterion_group, criterion_main, Criterion};
use half::f16;
use palu::attention::{AttnLayer, AttnParams};
use palu::codec::StoreParams;
use palu::projection::{Layer, Side};
use palu::rope::{RopeKind, RopeParams};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;

const N_LAYER: usize = 8;
const N_HEAD: usize = 6;
const HEAD_DIM: usize = 64;

/// Threads that spin between pieces of work, as a runtime's do.
struct Pool {
    n: usize,
    job: Arc<Job>,
}

struct Job {
    round: AtomicUsize,
    left: AtomicUsize,
    stop: AtomicBool,
    work: std::sync::RwLock<Option<Work>>,
}
#[derive(Clone, Copy)]
struct Work(*const (dyn Fn(usize, usize) + Sync));
// SAFETY: the closure is Sync and outlives the round
unsafe impl Send for Work {}
unsafe impl Sync for Work {}

impl Pool {
    fn new(n: usize) -> Self {
        let job = Arc::new(Job {
            round: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            work: std::sync::RwLock::new(None),
        });
        for ith in 1..n {
            let job = job.clone();
            std::thread::spawn(move || {
                let mut seen = 0;
                while !job.stop.load(Ordering::Relaxed) {
                    let round = job.round.load(Ordering::Acquire);
                    if round == seen {
                        std::hint::spin_loop();
                        continue;
                    }
                    seen = round;
                    let work = job.work.read().unwrap().unwrap();
                    // SAFETY: run() waits for this thread
                    unsafe { (*work.0)(ith, n) };
                    job.left.fetch_sub(1, Ordering::Release);
                }
            });
        }
        Self { n, job }
    }

    fn run(&self, f: &(dyn Fn(usize, usize) + Sync)) {
        // SAFETY: the lifetime is only stretched until this function returns
        let f: &'static (dyn Fn(usize, usize) + Sync) = unsafe { std::mem::transmute(f) };
        *self.job.work.write().unwrap() = Some(Work(f));
        self.job.left.store(self.n - 1, Ordering::Relaxed);
        self.job.round.fetch_add(1, Ordering::Release);
        f(0, self.n);
        while self.job.left.load(Ordering::Acquire) != 0 {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.job.stop.store(true, Ordering::Relaxed);
    }
}

struct Model {
    layers: Vec<(AttnLayer, Vec<u8>, Vec<u8>)>,
    x: Vec<f32>,
    row_bytes: [usize; 2],
    n_kv: usize,
}

/// Widths as water-filling leaves them at 14.1% of f16: about 4 bits per kept channel, the first channels most.
fn bits(n: usize) -> Vec<u8> {
    (0..n)
        .map(|i| {
            [7, 6, 6, 5, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1][i * 31 / n]
        })
        .collect()
}

impl Model {
    fn new(n_kv: usize) -> Self {
        let mut random = Random(1);
        let mut x = Vec::new();
        let mut row_bytes = [0; 2];
        let layers = (0..N_LAYER)
            .map(|il| {
                let k = random_side(&mut random, Side::Key, N_HEAD, N_HEAD, HEAD_DIM, &bits(23), 0);
                let v = random_side(&mut random, Side::Value, N_HEAD, N_HEAD, HEAD_DIM, &bits(31), 0);
                if x.is_empty() {
                    x = random.tokens(&k, 512);
                }
                let rope = RopeParams { kind: RopeKind::Neox, n_rot: HEAD_DIM, ..RopeParams::none() };
                let layer = Layer { il, sides: [k, v] };
                let attn = AttnLayer::new(&layer, &rope).unwrap();
                let mut row = |side: Side| {
                    let codec = attn.codec(side);
                    row_bytes[side as usize] = codec.row_bytes;
                    let mut rows = vec![0; codec.row_bytes * 512];
                    codec.encode_rows(&x, &mut rows);
                    rows.into_iter().cycle().take(codec.row_bytes * n_kv).collect()
                };
                let (k, v) = (row(Side::Key), row(Side::Value));
                (attn, k, v)
            })
            .collect();
        Self { layers, x, row_bytes, n_kv }
    }
}

fn attend(pool: &Pool, model: &Model, n_token: usize, n_kv: usize) {
    let mut random = Random(3);
    let q: Vec<f32> = (0..n_token * N_HEAD * HEAD_DIM).map(|_| random.normal() as f32).collect();
    let mask: Vec<f16> = (0..n_token * n_kv)
        .map(|i| if i % n_kv > n_kv - n_token + i / n_kv { f16::NEG_INFINITY } else { f16::ZERO })
        .collect();
    attend_with(pool, model, n_token, n_kv, &q, &mask);
}

fn attend_with(pool: &Pool, model: &Model, n_token: usize, n_kv: usize, q: &[f32], mask: &[f16]) {
    assert!(n_kv <= model.n_kv);
    thread_local! {
        static OUT: std::cell::RefCell<(Vec<f32>, Vec<f32>, Vec<i32>)> = const { std::cell::RefCell::new((Vec::new(), Vec::new(), Vec::new())) };
    }
    OUT.with_borrow_mut(|(out, partial, pos)| {
        out.resize(n_token * N_HEAD * HEAD_DIM, 0.0);
        if pos.len() != n_kv {
            *pos = (0..n_kv as i32).collect();
        }
        for (attn, k, v) in &model.layers {
            let size = attn.partial_size(N_HEAD, n_token, 1, n_kv);
            if partial.len() < size {
                partial.resize(size, 0.0);
            }
            let p = AttnParams {
                q: q.as_ptr(),
                q_nb_head: 4 * HEAD_DIM,
                q_nb_token: 4 * HEAD_DIM * N_HEAD,
                q_nb_stream: 0,
                rows_k: k.as_ptr(),
                rows_v: v.as_ptr(),
                rows_k_nb_stream: 0,
                rows_v_nb_stream: 0,
                mask: mask.as_ptr().cast(),
                mask_nb_token: 2 * n_kv,
                mask_nb_stream: 0,
                mask_f16: true,
                pos: pos.as_ptr(),
                sinks: std::ptr::null(),
                extra: std::ptr::null(),
                partial: partial.as_mut_ptr(),
                out: out.as_mut_ptr(),
                n_head: N_HEAD,
                n_token,
                n_stream: 1,
                n_kv,
                scale: 0.125,
                softcap: 0.0,
                max_bias: 0.0,
            };
            struct Shared<'a>(&'a AttnLayer, AttnParams);
            // SAFETY: shares of one call are made to run at the same time
            unsafe impl Sync for Shared<'_> {}
            let shared = Shared(attn, p);
            let shared = &shared;
            // SAFETY: the buffers have the shapes that `p` says
            pool.run(&|ith, nth| unsafe { shared.0.attend(&shared.1, ith, nth) });
            pool.run(&|ith, nth| unsafe { shared.0.combine(&shared.1, ith, nth) });
        }
    });
}

fn store(pool: &Pool, model: &mut Model, side: Side, n_token: usize) {
    let idxs: Vec<i64> = (0..n_token as i64).collect();
    let row_bytes = model.row_bytes[side as usize];
    for (attn, k, v) in &mut model.layers {
        let rows = if side == Side::Key { k } else { v };
        assert!(rows.len() >= n_token * row_bytes);
        let p = StoreParams {
            x: model.x.as_ptr(),
            x_nb_head: 4 * HEAD_DIM,
            x_nb_token: 4 * HEAD_DIM * N_HEAD,
            idxs: idxs.as_ptr(),
            rows: rows.as_mut_ptr(),
            n_token,
        };
        struct Shared<'a>(&'a AttnLayer, StoreParams);
        // SAFETY: shares of one call are made to run at the same time
        unsafe impl Sync for Shared<'_> {}
        let shared = Shared(attn, p);
        let shared = &shared;
        // SAFETY: the buffers have the shapes that `p` says
        pool.run(&|ith, nth| unsafe { shared.0.store(side, &shared.1, ith, nth) });
    }
}

fn benchmarks(c: &mut Criterion) {
    let threads = std::env::var("PALU_BENCH_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    let mut model = Model::new(8192);
    let name = |what: &str| format!("{what}, 8 layers, {} x{threads}", palu::attention::cpu_path());
    let mut group = c.benchmark_group("attention");
    group
        .sample_size(20)
        .measurement_time(std::time::Duration::from_secs(2))
        .warm_up_time(std::time::Duration::from_millis(500));
    for n_kv in [1536, 8192] {
        let q = vec![0.3f32; N_HEAD * HEAD_DIM];
        let mask = vec![f16::ZERO; n_kv];
        group.bench_function(name(&format!("decode at {n_kv}")), |b| {
            b.iter(|| attend_with(&pool, &model, 1, n_kv, &q, &mask))
        });
    }
    for n_kv in [512, 2048] {
        group.bench_function(name(&format!("prefill 512 at {n_kv}")), |b| b.iter(|| attend(&pool, &model, 512, n_kv)));
    }
    for n_token in [1, 512] {
        for side in [Side::Key, Side::Value] {
            group.bench_function(name(&format!("store {n_token} {side:?}")), |b| {
                b.iter(|| store(&pool, &mut model, side, n_token))
            });
        }
    }
    group.finish();
}

criterion_group!(benches, benchmarks);
criterion_main!(benches);
