//! Which stretches of two texts that are not the same are still each other's, in linear time.
//!
//! A search starts where the texts differ. First the shortest edit from there is looked for (insertions, deletions and
//! replacements; Ukkonen, "Algorithms for approximate string matching", 1985), until what follows is equal for so long, or
//! so often, that it is no chance. All stretches on its way that are no chance either correspond, so that an edit costs
//! its neighborhood, also where the next one is near. Where no edit of up to [`MOST_EDITS`] does, the nearest stretch
//! that is equal is looked for by hashes, in windows that grow: what is looked through is never much more than what is
//! skipped. Last, texts that end with the same characters correspond there.
//!
//! The order of the sides matters where two edits are as short. The caller decides on one that does not depend on which
//! of them is the student's.

/// Edits up to this many are searched one by one: at most `(MOST_EDITS + 1)^2` steps.
const MOST_EDITS: usize = 32;
/// A stretch that is equal for as long is no chance, whatever was skipped.
pub(crate) const LONG: usize = 32;
/// Characters of the seeds by which far stretches are found.
const SEED: usize = 10;
/// First window of the search for those; each is four times the one before it.
const WINDOW: usize = 128;
/// Edits that may follow a far stretch closely before it counts as chance.
const FEW_EDITS: usize = 8;

/// A stretch that is equal on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub a: usize,
    pub b: usize,
    pub len: usize,
}

/// How many characters must be equal after some edits to be no chance.
fn enough(edits: usize) -> usize {
    (6 + 3 * edits).min(LONG)
}

/// The search in two texts of characters; places only grow from call to call.
#[derive(Default)]
pub(crate) struct Edits {
    /// Nothing equal is left behind the place of the last search.
    exhausted: bool,
    /// Furthest places in `a` on each diagonal `a - b` from `-d` to `d`, for `d` edits, at `d * d`.
    reach: Vec<usize>,
    /// Last place of a seed in a window, by hash.
    seeds: Vec<(u64, usize)>,
}

/// No place of this diagonal can be reached.
const NONE: usize = usize::MAX;

/// Where a shortest edit leads to.
struct Path {
    edits: usize,
    diagonal: isize,
    /// What it leads to is no chance.
    anchored: bool,
}

impl Edits {
    /// The stretches after `(p, q)`, where the texts differ, that correspond, in order; empty where there are none any
    /// more. After the last one another search may start.
    pub fn search(&mut self, a: &[u32], b: &[u32], p: usize, q: usize) -> Vec<Run> {
        let (x, y) = (&a[p..], &b[q..]);
        let mut runs = match self.shortest(x, y, MOST_EDITS) {
            Ok(path) => self.believed(x, y, &path),
            Err(ends) => {
                let last = self.most_believed(x, y, &ends);
                // A path to the end of both sides says all that there is to say.
                let whole = ends.last().is_some_and(|path| path.anchored) && !last.is_empty();
                let far = if whole || self.exhausted { None } else { self.far(x, y) };
                self.exhausted |= far.is_none() && !whole;
                match far {
                    Some(run) => longer(vec![run], last),
                    None if whole => last,
                    None => longer(last, common_end(x, y)),
                }
            }
        };
        for run in &mut runs {
            (run.a, run.b) = (run.a + p, run.b + q);
        }
        runs
    }

    /// The stretches of the path along which most is believed.
    fn most_believed(&self, a: &[u32], b: &[u32], paths: &[Path]) -> Vec<Run> {
        // Of equal ones the path that comes to the end of both sides, which is the last one.
        paths.iter().rev().map(|path| self.believed(a, b, path)).fold(vec![], longer)
    }

    /// The shortest edit that leads to what is no chance, or those that lead to the end of a side.
    fn shortest(&mut self, a: &[u32], b: &[u32], most: usize) -> Result<Path, Vec<Path>> {
        let (n, m) = (a.len(), b.len());
        let mut ends = vec![];
        self.reach.clear();
        self.reach.push(0);
        for edits in 1..=most {
            let enough = enough(edits);
            let mut best: Option<(usize, isize)> = None;
            for diagonal in -(edits as isize)..=edits as isize {
                let Some(from) = self.before(n, m, edits, diagonal).map(|(x, _)| x) else {
                    self.reach.push(NONE);
                    continue;
                };
                let y = from.wrapping_add_signed(-diagonal);
                let run = a[from..].iter().zip(&b[y..]).take(enough).take_while(|(x, y)| x == y).count();
                let (x, y) = (from + run, y + run);
                self.reach.push(x);
                if run > 0 && (run == enough || (edits >= 4 && x + y >= 6 * edits + 20)) {
                    let better = |&(far, other): &(usize, isize)| (x + y, -diagonal.abs()) > (far, -other.abs());
                    if best.as_ref().is_none_or(better) {
                        best = Some((x + y, diagonal));
                    }
                }
                if x == n && y == m {
                    ends.push(Path { edits, diagonal, anchored: true });
                    return best.map_or(Err(ends), |(_, diagonal)| Ok(Path { edits, diagonal, anchored: true }));
                }
                if run > 0 && (x == n || y == m) {
                    ends.push(Path { edits, diagonal, anchored: false });
                }
            }
            if let Some((_, diagonal)) = best {
                return Ok(Path { edits, diagonal, anchored: true });
            }
        }
        Err(ends)
    }

    /// The furthest place on a diagonal after one more edit, before what is equal there, and the diagonal it comes from.
    fn before(&self, n: usize, m: usize, edits: usize, diagonal: isize) -> Option<(usize, isize)> {
        let last = edits as isize - 1;
        let reached = |k: isize| {
            let place = if k.abs() > last { NONE } else { self.reach[(last * last + last + k) as usize] };
            (place != NONE).then_some(place)
        };
        let fits = |x: usize| (x <= n && x.wrapping_add_signed(-diagonal) <= m).then_some(x);
        // Of edits that lead as far a replacement is the likelier one.
        let replaced = reached(diagonal).and_then(|x| fits(x + 1));
        let deleted = reached(diagonal - 1).and_then(|x| fits(x + 1));
        let inserted = reached(diagonal + 1).and_then(fits);
        let mut best = replaced.map(|x| (x, diagonal));
        for other in [deleted.map(|x| (x, diagonal - 1)), inserted.map(|x| (x, diagonal + 1))].into_iter().flatten() {
            if best.is_none_or(|(x, _)| other.0 > x) {
                best = Some(other);
            }
        }
        best
    }

    /// The stretches along a path that are no chance: those that few edits part from something that is none.
    fn believed(&self, a: &[u32], b: &[u32], path: &Path) -> Vec<Run> {
        // From the last to the first: edits after a stretch, and the stretch.
        let mut steps: Vec<(usize, Run)> = vec![];
        let (mut edits, mut diagonal, mut gap) = (path.edits, path.diagonal, 0);
        while edits > 0 {
            let Some((from, came)) = self.before(a.len(), b.len(), edits, diagonal) else { break };
            let to = self.reach[(edits * edits).wrapping_add_signed(edits as isize + diagonal)];
            if to > from {
                steps.push((gap, Run { a: from, b: from.wrapping_add_signed(-diagonal), len: to - from }));
                gap = 0;
            }
            (edits, diagonal, gap) = (edits - 1, came, gap + 1);
        }
        let first_gap = gap;
        steps.reverse();
        // Trust grows along what is equal and falls with every edit; once lost it has to be won whole.
        let trusted = |steps: &mut dyn Iterator<Item = (usize, usize)>, anchored: bool| {
            let (mut trust, mut alive) = (if anchored { TRUST } else { 0 }, anchored);
            let step = |(gap, len): (usize, usize)| {
                alive &= trust > EDIT * gap;
                trust = (trust.saturating_sub(EDIT * gap) + len).min(TRUST);
                alive |= trust == TRUST;
                alive
            };
            steps.map(step).collect::<Vec<bool>>()
        };
        let gap_before = |k: usize| if k == 0 { first_gap } else { steps[k - 1].0 };
        let forth = trusted(&mut (0..steps.len()).map(|k| (gap_before(k), steps[k].1.len)), true);
        let mut back = trusted(&mut (0..steps.len()).rev().map(|k| (steps[k].0, steps[k].1.len)), path.anchored);
        back.reverse();
        // A short stretch to the side of those around it is chance.
        let diagonal = |k: usize| steps[k].1.a.wrapping_sub(steps[k].1.b);
        let aside = |k: usize| {
            let before = if k == 0 { 0 } else { diagonal(k - 1) };
            let last = k + 1 == steps.len();
            diagonal(k) != before && if last { !path.anchored } else { diagonal(k) != diagonal(k + 1) }
        };
        let believed = |k: usize| (forth[k] || back[k]) && (steps[k].1.len >= ASIDE || !aside(k));
        (0..steps.len()).filter(|&k| believed(k)).map(|k| steps[k].1).collect()
    }

    /// The nearest stretch that is equal on both sides, wherever it is.
    fn far(&mut self, a: &[u32], b: &[u32]) -> Option<Run> {
        let mut window = WINDOW;
        let mut needed = 12;
        loop {
            let (x, y) = (&a[..window.min(a.len())], &b[..window.min(b.len())]);
            if let Some(run) = self.far_in(a, b, x.len(), y.len(), needed) {
                return Some(run);
            }
            if window >= a.len().max(b.len()) {
                return None;
            }
            (window, needed) = (4 * window, (needed + 2).min(LONG));
        }
    }

    /// The same for stretches that start in the first `n` and `m` characters.
    fn far_in(&mut self, a: &[u32], b: &[u32], n: usize, m: usize, needed: usize) -> Option<Run> {
        if n < SEED || m < SEED {
            return None;
        }
        let mut seeds = std::mem::take(&mut self.seeds);
        let bits = (2 * m).next_power_of_two() - 1;
        seeds.clear();
        seeds.resize(bits + 1, (0, NONE));
        let slot = |hash: u64| (hash ^ (hash >> 31)) as usize & bits;
        // Of equal seeds the nearest one stays.
        for (y, hash) in hashes(&b[..m]).enumerate() {
            let mut at = slot(hash);
            while seeds[at].1 != NONE && seeds[at].0 != hash {
                at = (at + 1) & bits;
            }
            if seeds[at].1 == NONE {
                seeds[at] = (hash, y);
            }
        }
        let mut best: Option<(usize, Run)> = None;
        let mut checked = 0;
        for (x, hash) in hashes(&a[..n]).enumerate() {
            if best.is_some_and(|(cost, _)| x >= cost) {
                break;
            }
            let mut at = slot(hash);
            while seeds[at].1 != NONE && seeds[at].0 != hash {
                at = (at + 1) & bits;
            }
            let y = seeds[at].1;
            if y == NONE || best.is_some_and(|(cost, _)| x + y >= cost) {
                continue;
            }
            // What follows a stretch that was looked at already says nothing else.
            if checked > x && x > 0 && y > 0 && a[x - 1] == b[y - 1] {
                continue;
            }
            checked = x + SEED;
            if let Some(run) = self.no_chance(a, b, x, y, needed) {
                best = Some((x + y, run));
            }
        }
        self.seeds = seeds;
        best.map(|(_, run)| run)
    }

    /// The stretch at these places, if it is long enough, or few edits part it from what makes up for that.
    fn no_chance(&mut self, a: &[u32], b: &[u32], x: usize, y: usize, needed: usize) -> Option<Run> {
        let equal = a[x..].iter().zip(&b[y..]).take_while(|(x, y)| x == y).take(LONG).count();
        if equal < SEED || !says_something(&a[x..x + equal]) {
            return None;
        }
        let mut run = Run { a: x, b: y, len: equal };
        if equal < needed.max(LONG.min(needed + 4)) {
            let (n, m) = (x + equal, y + equal);
            let path = self.shortest(&a[n..], &b[m..], FEW_EDITS).ok()?;
            let reached =
                self.reach[(path.edits * path.edits).wrapping_add_signed(path.edits as isize + path.diagonal)];
            (equal + reached >= needed + 3 * path.edits).then_some(())?;
        }
        while run.a > 0 && run.b > 0 && a[run.a - 1] == b[run.b - 1] {
            run = Run { a: run.a - 1, b: run.b - 1, len: run.len + 1 };
        }
        Some(run)
    }
}

/// How much trust there is at most, and what an edit takes of it.
const TRUST: usize = 12;
const EDIT: usize = 3;
/// A stretch as long is believed also where it lies to the side of those around it.
const ASIDE: usize = 3;

/// Of two ways the one in which more corresponds, the first of equal ones.
fn longer(one: Vec<Run>, other: Vec<Run>) -> Vec<Run> {
    let total = |runs: &[Run]| runs.iter().map(|run| run.len).sum::<usize>();
    if total(&other) > total(&one) {
        other
    } else {
        one
    }
}

/// What both texts end with, if it says something: four characters, or all that is left of a side.
fn common_end(a: &[u32], b: &[u32]) -> Vec<Run> {
    let len = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
    if len >= 4 || len == a.len() || len == b.len() {
        vec![Run { a: a.len() - len, b: b.len() - len, len }]
    } else {
        vec![]
    }
}

/// A stretch of one or two characters (a row of spaces or dashes) is equal to too much.
fn says_something(stretch: &[u32]) -> bool {
    let first = stretch[0];
    let other = stretch.iter().find(|&&c| c != first);
    stretch.iter().any(|c| *c != first && Some(c) != other)
}

/// Rolling hashes of all stretches of [`SEED`] characters.
fn hashes(text: &[u32]) -> impl Iterator<Item = u64> + '_ {
    const BASE: u64 = 0x9E37_79B9_7F4A_7C15;
    let out = (0..SEED).fold(1u64, |power, _| power.wrapping_mul(BASE));
    let roll = |hash: u64, char: u32| hash.wrapping_mul(BASE).wrapping_add(u64::from(char) + 1);
    let mut hash = text[..SEED - 1].iter().fold(0, |hash, &char| roll(hash, char));
    (SEED - 1..text.len()).map(move |k| {
        hash = roll(hash, text[k]);
        if k >= SEED {
            hash = hash.wrapping_sub(out.wrapping_mul(u64::from(text[k - SEED]) + 1));
        }
        hash
    })
}
