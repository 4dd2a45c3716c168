//! Threads, and what threads share: the only file that knows rayon, and that a process may be a fork.
//!
//! A fork has one thread, a copy of the one that forked. Pools of the parent are there without their threads, and a
//! lock that another thread held stays locked for ever. So pools belong to a process, and a lock is waited for only
//! where its holder is sure to be there and to go on.
//!
//! # Every lock, and why none can hang
//! - [`POOLS`], a cover's store and an encoding's cuts are [`Shared`]: a process that finds such a lock taken when it
//!   first comes by leaves it alone for good and takes the next. Nothing that is done under one touches the
//!   interpreter: whoever takes it is detached from it, or does not let go of it before the lock is free again.
//! - Under `POOLS` threads are started, under the cuts a map is read or written: neither waits for anything.
//! - Under a cover's store rayon is at work. A thread of a pool that waits for its other half takes up any work of that
//!   pool meanwhile; were that another call for the same store, it would wait for itself. So who is [`within`] a pool
//!   never waits for a store: it does without. Calls from Python stay on their own thread, and only what is parallel in
//!   them is given to a pool.
//! - The memories of an aligner (`python/aligner.rs`) are only ever tried, never waited for, and emptied or filled by a move.
//!   What is taken is looked at, and what is displaced is dropped, when the lock is free again: numpy's allocator and
//!   the end of an array may hand the GIL to a thread that wants the same lock.
//! - `OnceLock`s (the arrays of a table, the reach of a class) are set with a value that is there already, by a thread
//!   that has the GIL: no other thread can fork at that moment, and none waits longer than a move takes.
//! - numpy's table of borrowed arrays is locked inside of single calls to it, with the GIL. What it and `PyO3` make when
//!   they are first used is made on import.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use rayon::prelude::*;
use rayon::ThreadPool;

use crate::error::Error;

static FORKS: AtomicU32 = AtomicU32::new(0);

/// Says that this process is a fork: numbers of processes are given again when those who had them are gone.
#[cfg(feature = "python")]
pub(crate) fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// This process; no process that it comes from has the same.
fn process() -> u64 {
    u64::from(FORKS.load(Ordering::Relaxed)) << 32 | u64::from(std::process::id())
}

/// A value behind a lock that a fork cannot leave locked.
#[derive(Debug, Default)]
pub(crate) struct Shared<T>([Slot<T>; 3]);

#[derive(Debug, Default)]
struct Slot<T> {
    /// The last process that found the lock free: since then only its own threads can have taken it.
    process: AtomicU64,
    value: RwLock<T>,
}

impl<T> Slot<T> {
    const fn new(value: T) -> Self {
        Self { process: AtomicU64::new(0), value: RwLock::new(value) }
    }

    fn is_ours(&self) -> bool {
        if self.value.is_poisoned() {
            return false;
        }
        let process = process();
        if self.process.load(Ordering::Acquire) == process {
            return true;
        }
        let free = self.value.try_write();
        if free.is_ok() {
            self.process.store(process, Ordering::Release);
        }
        free.is_ok()
    }
}

impl<T> Shared<T> {
    const fn new(a: T, b: T, c: T) -> Self {
        Self([Slot::new(a), Slot::new(b), Slot::new(c)])
    }

    /// The lock of this process; what is in it may be of an earlier one. `None`: forks, or panics, have left none.
    pub fn lock(&self) -> Option<&RwLock<T>> {
        self.0.iter().find(|slot| slot.is_ours()).map(|slot| &slot.value)
    }
}

/// Pools of one process, by the number of threads that was asked for: the default, and the last other.
struct Pools {
    process: u64,
    all: [Option<(usize, Arc<ThreadPool>)>; 2],
}

impl Pools {
    const NONE: Self = Self { process: 0, all: [None, None] };
}

static POOLS: Shared<Pools> = Shared::new(Pools::NONE, Pools::NONE, Pools::NONE);

/// As many threads as `RAYON_NUM_THREADS` says, or as there are cores.
const DEFAULT: usize = 0;
#[cfg(feature = "python")]
const MOST: usize = 64;

/// A pool of so many threads.
fn pool(threads: usize) -> Result<Arc<ThreadPool>, Error> {
    let build = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|k| format!("xtokmap {k}")).build();
        pool.map(Arc::new).map_err(|error| Error::Argument(format!("threads={threads}: {error}")))
    };
    let Some(lock) = POOLS.lock() else { return build() };
    let kept = usize::from(threads != DEFAULT);
    let of = |pools: &Pools| match &pools.all[kept] {
        Some((n, pool)) if (pools.process, *n) == (process(), threads) => Some(pool.clone()),
        _ => None,
    };
    if let Some(pool) = lock.read().ok().as_deref().and_then(of) {
        return Ok(pool);
    }
    let Ok(mut pools) = lock.write() else { return build() };
    if let Some(pool) = of(&pools) {
        return Ok(pool);
    }
    if pools.process != process() {
        // Nothing is left to stop, and to try it might wait for a thread that is not there.
        std::mem::forget(std::mem::replace(&mut *pools, Pools { process: process(), ..Pools::NONE }));
    }
    let pool = build()?;
    pools.all[kept] = Some((threads, pool.clone()));
    Ok(pool)
}

#[derive(Clone)]
enum Place {
    /// The thread that asks, and no other.
    Here,
    /// The pool that the thread that asks is of.
    Within,
    In(Arc<ThreadPool>),
}

thread_local! {
    static ASKED: RefCell<Option<Place>> = const { RefCell::new(None) };
}

impl Place {
    /// Where parallel work of this thread is done.
    fn current() -> Self {
        if let Some(place) = ASKED.with_borrow(Clone::clone) {
            return place;
        }
        if within() {
            return Self::Within;
        }
        // The answer is the same on one thread, where a machine gives no more.
        pool(DEFAULT).map_or(Self::Here, Self::of)
    }

    fn of(pool: Arc<ThreadPool>) -> Self {
        if pool.current_num_threads() == 1 {
            Self::Here
        } else {
            Self::In(pool)
        }
    }

    fn run<I: Send, T: Send>(self, input: I, here: impl FnOnce(I) -> T, parallel: impl FnOnce(I) -> T + Send) -> T {
        match self {
            Self::Here => here(input),
            Self::Within => parallel(input),
            Self::In(pool) => pool.install(|| parallel(input)),
        }
    }
}

/// Whether this thread is one of a pool.
pub(crate) fn within() -> bool {
    rayon::current_thread_index().is_some()
}

/// Runs `work` on this thread, and what is parallel in it on so many; `None`: as ever. Thousands of threads that look
/// for work take more time than it does: no more are made than [`MOST`], or than there are cores.
///
/// # Errors
/// [`Error::Argument`] where there cannot be so many threads.
#[cfg(feature = "python")]
pub(crate) fn with<T>(threads: Option<usize>, work: impl FnOnce() -> T) -> Result<T, Error> {
    struct Before(Option<Place>);
    impl Drop for Before {
        fn drop(&mut self) {
            ASKED.set(self.0.take());
        }
    }
    let place = match threads {
        None => None,
        Some(1) => Some(Place::Here),
        Some(threads) if threads <= MOST => Some(Place::of(pool(threads)?)),
        Some(threads) => {
            let cores = std::thread::available_parallelism().map_or(MOST, usize::from);
            Some(Place::of(pool(threads.min(cores.max(MOST)))?))
        }
    };
    let _before = Before(ASKED.replace(place));
    Ok(work())
}

/// How many threads parallel work has.
pub(crate) fn threads() -> usize {
    match Place::current() {
        Place::Here => 1,
        Place::Within => rayon::current_num_threads(),
        Place::In(pool) => pool.current_num_threads(),
    }
}

/// Both results.
pub(crate) fn join<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    Place::current().run((a, b), |(a, b)| (a(), b()), |(a, b)| rayon::join(a, b))
}

/// The results for 0 to `n`, in order.
pub(crate) fn map<T: Send>(n: usize, f: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    map_with(n, || (), |(), k| f(k))
}

/// As [`map`], with something to work in that is made once for many of them.
pub(crate) fn map_with<S, T: Send>(
    n: usize,
    scratch: impl Fn() -> S + Send + Sync,
    f: impl Fn(&mut S, usize) -> T + Send + Sync,
) -> Vec<T> {
    let here = |all: Range<usize>| {
        let mut scratch = scratch();
        all.map(|k| f(&mut scratch, k)).collect()
    };
    Place::current().run(0..n, here, |all| all.into_par_iter().map_init(&scratch, &f).collect())
}

/// All results for 0 to `n`, in order.
pub(crate) fn flat_map<T: Send, I: IntoIterator<Item = T>>(n: usize, f: impl Fn(usize) -> I + Send + Sync) -> Vec<T> {
    let here = |all: Range<usize>| all.flat_map(&f).collect();
    Place::current().run(0..n, here, |all| all.into_par_iter().flat_map_iter(&f).collect())
}

/// Does something to every element, to at least `at_once` of them in a task.
pub(crate) fn for_each<T: Send>(all: &mut [T], at_once: usize, f: impl Fn(usize, &mut T) + Send + Sync) {
    let place = if at_once < all.len() { Place::current() } else { Place::Here };
    let here = |all: &mut [T]| all.iter_mut().enumerate().for_each(|(k, item)| f(k, item));
    place.run(all, here, |all| {
        all.par_iter_mut().enumerate().with_min_len(at_once).for_each(|(k, item)| f(k, item));
    });
}

/// Sorts, equal ones in any order.
pub(crate) fn sort<T: Send>(all: &mut [T], compare: impl Fn(&T, &T) -> std::cmp::Ordering + Send + Sync) {
    Place::current().run(all, |all| all.sort_unstable_by(&compare), |all| all.par_sort_unstable_by(&compare));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_lock_that_an_earlier_process_left_taken_is_left_alone() {
        let shared = Shared::<u8>::default();
        let first = shared.lock().unwrap();
        *first.write().unwrap() = 1;
        // As a fork sees it: taken, and found free last by another process.
        let held = first.read().unwrap();
        shared.0[0].process.store(u64::MAX, Ordering::Relaxed);
        let second = shared.lock().unwrap();
        *second.write().unwrap() = 2;
        drop(held);
        // Another fork, in which nobody holds anything, knows what is in the first.
        for slot in &shared.0 {
            slot.process.store(u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(*shared.lock().unwrap().read().unwrap(), 1);
    }

    #[test]
    fn a_lock_under_which_something_failed_is_left_alone_until_there_is_none() {
        let shared = Shared::<u8>::default();
        for _ in 0..3 {
            let lock = shared.lock().unwrap();
            let failed = std::thread::scope(|scope| {
                let fail = scope.spawn(|| {
                    let _held = lock.write();
                    panic!("on purpose");
                });
                fail.join()
            });
            assert!(failed.is_err());
        }
        assert!(shared.lock().is_none());
    }

    #[test]
    fn a_lock_of_ours_is_waited_for() {
        let shared = Shared::<u8>::default();
        let lock = shared.lock().unwrap();
        let _held = lock.write().unwrap();
        assert!(std::ptr::eq(shared.lock().unwrap(), lock));
    }

    #[test]
    fn parallel_work_keeps_its_order_wherever_it_is_done() {
        let want: Vec<usize> = (0..1000).map(|k| k * k).collect();
        let check = || {
            assert_eq!(map(1000, |k| k * k), want);
            assert_eq!(
                map_with(1000, Vec::new, |all, k| {
                    all.push(k);
                    k * k
                }),
                want
            );
            assert_eq!(flat_map(1000, |k| [k * k]), want);
            let mut all: Vec<usize> = (0..1000).collect();
            for_each(&mut all, 7, |k, item| *item *= k);
            assert_eq!(all, want);
            sort(&mut all, |a, b| b.cmp(a));
            assert!(all.iter().eq(want.iter().rev()));
            assert_eq!(join(|| 1, || 2), (1, 2));
        };
        check();
        let other = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        other.install(|| {
            assert_eq!(threads(), 3);
            check();
        });
        #[cfg(feature = "python")]
        for n in [1, 2, 5] {
            with(Some(n), || {
                assert_eq!(threads(), n);
                check();
            })
            .unwrap();
        }
    }

    #[test]
    fn rayons_own_pool_is_never_used() {
        let odd = AtomicUsize::new(0);
        map(1000, |_| {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            odd.fetch_add(usize::from(within() && !name.starts_with("xtokmap")), Ordering::Relaxed);
        });
        assert_eq!(odd.into_inner(), 0);
    }
}
