//! Time of the alignment, in student tokens: `cargo bench`
//!
//! By length of the rows, by the mix of chunks, by threads, and beside the floor: reading the length of every token of
//! both sides, which no aligner can do without. Vocabularies are synthetic; real pairs are added from the folder that
//! `KERNEL_DATA` names, or `benches/.data` (`python benches/kernel_data.py` writes it). All output goes to the memory of the
//! batch before: fresh pages cost several times the alignment.

#![allow(missing_docs, clippy::expect_used, clippy::cast_precision_loss, dead_code)]

use std::path::PathBuf;
use std::time::Duration;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};

mod workload;

use workload::{Batch, Pair};

/// Student tokens of a batch.
const TOKENS: usize = 131_072;
const LENGTHS: [usize; 5] = [512, 2048, 8192, 32_768, 131_072];

/// All one to one; as between tokenizers of words and their parts; several tokens on both sides for every word.
fn synthetic() -> [Pair; 3] {
    [("one to one", 0), ("words", 20), ("splits", 100)].map(|(name, split)| Pair::synthetic(name, 160_000, split))
}

fn measure(c: &mut Criterion, group: &str, name: &str, threads: usize, rows: &Batch<'_>) {
    let mut group = c.benchmark_group(group);
    group.throughput(Throughput::Elements(rows.student.len() as u64));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a few threads");
    let mut batch = xtokmap::Batch::default();
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        pool.install(|| b.iter(|| rows.align(&mut batch)));
    });
}

fn kernel(c: &mut Criterion) {
    let folder = std::env::var_os("KERNEL_DATA").map_or_else(|| PathBuf::from("benches/.data"), PathBuf::from);
    let mut pairs = Vec::from(synthetic());
    pairs.extend(Pair::read_all(&folder));
    for pair in &pairs {
        let rows = pair.rows(512, TOKENS);
        let name = format!("{} ({:.0} % one to one)", pair.name, 100.0 * pair.one_to_one());
        measure(c, "mix", &name, 1, &rows);
        let mut group = c.benchmark_group("floor");
        group.throughput(Throughput::Elements(rows.student.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(&pair.name), |b| b.iter(|| rows.lengths()));
    }
    let words = &pairs[1];
    for length in LENGTHS {
        measure(c, "row length", &length.to_string(), 1, &words.rows(length, TOKENS));
    }
    for threads in [1, 2] {
        measure(c, "threads", &threads.to_string(), threads, &words.rows(512, TOKENS));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(30);
    targets = kernel
}
criterion_main!(benches);
