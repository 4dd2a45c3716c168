//! One pass over a pair's rows, for benches/instructions.sh to count the instructions of.
//!
//! `instructions align|floor FILE` with a file of `benches/kernel_data.py`, or without one: synthetic words.

#![allow(clippy::expect_used, clippy::cast_precision_loss, dead_code)]

use std::hint::black_box;
use std::path::Path;

#[path = "../benches/workload.rs"]
mod workload;

use workload::{Batch, Pair};

/// What is counted has this name.
#[inline(never)]
fn counted_align(rows: &Batch<'_>, into: &mut xtokmap::Batch) {
    rows.align(into);
}

#[inline(never)]
fn counted_floor(rows: &Batch<'_>) -> u64 {
    black_box(rows.lengths())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let pair = match arguments.get(1) {
        Some(file) => Pair::read(Path::new(file)).expect("a file of benches/kernel_data.py"),
        None => Pair::synthetic("words", 100_000, 20),
    };
    let rows = pair.rows(512, 65_536);
    if arguments.first().is_some_and(|what| what == "floor") {
        counted_floor(&rows);
    } else {
        // The first time the memory is made.
        let mut batch = xtokmap::Batch::default();
        rows.align(&mut batch);
        counted_align(&rows, &mut batch);
    }
    println!("{} {} {:.2}", pair.name, rows.student.len(), pair.one_to_one());
}
