#[path = "../benches/workload.rs"]
mod workload;
use std::time::Instant;
fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut pairs = workload::Pair::read_all(std::path::Path::new("/work/scratch/wt-kernel/benches/.data"));
    for (n, s) in [("all one to one", 0), ("words", 20), ("split", 100)] {
        pairs.push(workload::Pair::synthetic(n, 300_000, s));
    }
    let only = std::env::var("ONLY").unwrap_or_default(); for pair in pairs.iter().filter(|p| p.name.contains(&only)) {
        print!("{:28} 1:1 {:.2} ", pair.name, pair.one_to_one());
        for len in [512] {
            for total in [8192, 65536] { let b = pair.rows(len, total);
            let (mut best, mut floor) = (f64::MAX, f64::MAX);
            let mut out = xtokmap::Batch::default();
            pool.install(|| {
                for _ in 0..std::env::var("N").ok().map_or(60, |n| n.parse().unwrap()) {
                    let t = Instant::now();
                    b.align(&mut out);
                    best = best.min(t.elapsed().as_secs_f64());
                    let t = Instant::now();
                    std::hint::black_box(b.lengths());
                    floor = floor.min(t.elapsed().as_secs_f64());
                }
            });
            let n = b.student.len() as f64 * 1e-9;
            print!(" | {len} x {}: {:.2} floor {:.2}", b.len(), best / n, floor / n);}
        }
        println!();
    }
}
