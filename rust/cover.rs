//! Which teacher mass stands behind each student token end.
//!
//! A teacher scores its own encoding of the finished text, and a boundary of that encoding says what did not come next.
//! What the teacher thinks of the *student's* encoding is a sum over the teacher tokens that could stand at that place:
//! those whose text goes on past the student's boundary and still leaves the student its token. [`Cover`] finds them.

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustc_hash::FxHashMap;

use crate::chunks::{Arrays, Batch, Kind, View};
use crate::encoding::{is_white, Behind, Bits, Encoding};
use crate::error::Error;
use crate::pool::{self, Shared};
use crate::vocab_map::VocabMap;

/// Teacher tokens of one row that count together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Teacher ids, rising.
    pub ids: Vec<i32>,
    /// The student token that would come next if this token stood there; one for each id, none for a complement.
    pub next: Vec<i32>,
    /// Whether that student token is all that is left of the teacher token.
    pub whole: Vec<bool>,
    /// The set is every token of the row but these.
    pub complement: bool,
    /// Of a complement the student token that would come next, whichever token stood there; -1 where that is not known.
    /// `None`: the one with which the encoding of that token begins.
    pub fixed: Option<i32>,
}

/// The queries of a batch: `terms indptr[i]..indptr[i + 1]` belong to student token `i` of the flat batch.
///
/// With `cum[k]` the sum of the teacher's logprobs before its token `k` (of the row), and `q_k` the row of the teacher
/// that predicts token `k`, Phi(i) = logsumexp over terms of `cum[row] + log q_row(set)`.
#[derive(Clone, Debug, Default)]
pub struct Queries {
    /// Terms before each student token; `M + 1` entries.
    pub indptr: Vec<i64>,
    /// The teacher row of every term: the place of the teacher token that it predicts, from 0 to n.
    pub row: Vec<i32>,
    /// The set of every term: a place in `sets`, or `-1 - id` for one teacher token.
    pub set: Vec<i32>,
    /// For the first token of an unbroken stretch the teacher token at which it starts: `log q = Phi(i) - cum[base]`.
    /// -1 for tokens inside: log q = Phi(i) - Phi(i - 1). -2 where there is no query.
    pub base: Vec<i32>,
    /// Bits of [`Queries::NOT_CANONICAL`] and [`Queries::FORCED`].
    pub flags: Vec<u8>,
    /// For student tokens that begin with a teacher token, after which longer student tokens go on, too: the set of
    /// teacher tokens with which they do, a place in `sets`. -1 where there is none, or where it was not asked for.
    pub within: Vec<i32>,
    /// The sets that these terms use.
    pub sets: Vec<Arc<Set>>,
}

impl Queries {
    /// The student's tokenizer would not have put this token beside the next one.
    pub const NOT_CANONICAL: u8 = 1;
    /// The teacher token that really stands there would have been left out, and was put back.
    pub const FORCED: u8 = 2;
}

/// What the queries of a batch are to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// What the teacher thinks of the student's tokens.
    Tokens,
    /// Of all that could stand in their place, too: with [`Queries::within`].
    Rows,
}

/// What can follow inside the teacher tokens of a batch.
#[derive(Clone, Debug, Default)]
pub struct Interior {
    /// Flat student tokens that start inside a teacher token.
    pub student: Vec<i64>,
    /// Flat teacher token in which each starts.
    pub teacher: Vec<i64>,
    /// `[lo, hi)` in the byte-sorted teacher ids of the tokens that begin with the bytes before it.
    pub range: Vec<[i64; 2]>,
    /// The teacher tokens that go on behind these bytes, with the longest student token of what follows.
    pub sets: Vec<Arc<Set>>,
}

/// Consumed bytes: the start of teacher tokens.
#[derive(Debug)]
struct Node {
    bytes: Vec<u8>,
    range: [usize; 2],
    /// The teacher tokens of the range by ids, once they are needed.
    rests: Option<Vec<Rest>>,
}

/// A teacher token and what is left of it behind consumed bytes.
#[derive(Clone, Copy, Debug)]
struct Rest {
    id: i32,
    /// The student token with which the encoding of the rest begins; -1: none, or nothing is left.
    next: i32,
    whole: bool,
    nothing: bool,
    /// It is white space, and what it does depends on what stands behind it: the token to ask about, or -1.
    white: Option<i32>,
}

const ROOT: u32 = u32::MAX - 1;
const DEAD: u32 = u32::MAX;
/// In the place of a student token: nothing merges with it.
const NEVER: u32 = u32::MAX;
/// In the place of a student token: nothing merges, and the longest student token that fits comes next.
const LONGEST: u32 = u32::MAX - 1;
/// In the place of a student token: the row after white space, where a word begins there.
const BEFORE_WORD: u32 = u32::MAX - 2;
/// The same where more white space does.
const BEFORE_SPACE: u32 = u32::MAX - 3;
/// In the place of consumed bytes: the row after them.
const AFTER: u32 = u32::MAX;
/// The same, of the tokens that would merge with the student token, and with the one that they would make.
const WITHIN: u32 = u32::MAX - 2;
const FULL: u32 = u32::MAX;
/// In the place of a set: one without elements.
const NOTHING: u32 = u32::MAX;
const UNKNOWN: u32 = u32::MAX - 1;

/// What a set is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct SetKey {
    /// A student token or what stands in its place.
    s: u32,
    /// A node or `AFTER`; of `BEFORE_WORD` and `BEFORE_SPACE` the student token that comes next.
    node: u32,
    /// The consumed bytes as a token count too.
    with_self: bool,
    /// A teacher token that does not.
    without: Option<u32>,
}

impl SetKey {
    fn of(s: u32, node: u32) -> Self {
        Self { s, node, with_self: false, without: None }
    }

    /// Whether it is about what may stand behind a student token.
    fn is_of_token(&self) -> bool {
        self.s < BEFORE_SPACE
    }
}

/// What a teacher token in which a student token ends adds to its terms.
#[derive(Clone, Copy, Debug)]
struct Own {
    /// The set of tokens that begin like it, or `NOTHING`.
    set: u32,
    /// The token itself is not in the set, and has to be.
    forced: bool,
}

/// What decides how the student cuts a teacher token.
#[derive(Clone, Copy, Debug)]
enum Decides {
    /// Its own bytes.
    Token,
    /// The row behind it.
    RowBehind(Ahead),
}

/// A teacher token that ends in white space, which the student cuts as what comes behind it says: instead of the token
/// its row has the others, and the row behind it decides.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    /// The set of its row without it.
    others: u32,
    /// The sets of the row behind it: with what the student's token stays if a word comes, and if white space does.
    word: u32,
    space: u32,
}

#[derive(Debug, Default)]
struct Store {
    nodes: Vec<Node>,
    /// By the first place of their range and the number of their bytes.
    node_of: FxHashMap<(usize, usize), u32>,
    steps: FxHashMap<(u32, u32, u32), u32>,
    /// The node of every whole teacher token, or `UNKNOWN`.
    whole: Vec<u32>,
    sets: Vec<Arc<Set>>,
    /// A place in `sets`, or `NOTHING`.
    set_of: FxHashMap<SetKey, u32>,
    /// The same of the row after every student token, and of the one after `NEVER`; or `UNKNOWN`.
    after: Vec<u32>,
    /// The same of what would merge with every student token.
    within: Vec<u32>,
    own: FxHashMap<(u32, u32, u32), Own>,
    decides: FxHashMap<(u32, u32, u32), Decides>,
    joined: FxHashMap<(u32, u32, Behind), bool>,
    elements: usize,
    /// How often the store was emptied: what was numbered before means nothing after.
    resets: u64,
}

/// Elements that the store keeps between batches: about 600 MB.
const STORE_LIMIT: usize = 64 << 20;

/// Finds the queries of batches, and keeps what repeats.
#[derive(Debug)]
pub struct Cover {
    student: Arc<Encoding>,
    teacher: Arc<Encoding>,
    map: Arc<VocabMap>,
    /// Teacher ids by the student token with which their encoding begins; without those of `white`.
    by_first: (Vec<u32>, Vec<u32>),
    /// Behind the teacher's white space stands a word, of which the student may take the last space: some letter.
    letter: Option<u8>,
    /// Where that is so: teacher tokens that are white space, with the student token to ask about for each, or -1.
    white: Vec<(i32, i32)>,
    /// Teacher tokens that end in white space.
    ends_white: Bits,
    /// Student tokens that the teacher may begin longer ones with.
    open: Bits,
    /// One tokenizer on both sides: nothing has to be transferred.
    same: bool,
    limit: usize,
    store: Shared<Store>,
}

/// What a walk over a row needs to know, from the store or to be found out.
trait Known {
    fn step(&mut self, node: u32, token: u32, offset: u32) -> Option<u32>;
    /// The node of a whole token.
    fn whole(&mut self, token: u32) -> Option<u32>;
    fn set(&mut self, s: u32, node: u32) -> Option<u32>;
    fn after(&mut self, s: u32) -> Option<u32>;
    fn within(&mut self, s: u32) -> Option<u32>;
    fn own(&mut self, s: u32, token: u32, offset: u32) -> Option<Own>;
    /// Of a teacher token behind this many of its bytes.
    fn decides(&mut self, s: u32, token: u32, offset: u32) -> Option<Decides>;
    fn joined(&mut self, s: u32, next: u32, behind: Behind) -> Option<bool>;
    fn has(&self, set: u32, id: u32) -> bool;
}

struct Stored<'a>(&'a Store);

impl Known for Stored<'_> {
    fn step(&mut self, node: u32, token: u32, offset: u32) -> Option<u32> {
        self.0.steps.get(&(node, token, offset)).copied()
    }

    fn whole(&mut self, token: u32) -> Option<u32> {
        self.0.whole.get(token as usize).copied().filter(|&node| node != UNKNOWN)
    }

    fn set(&mut self, s: u32, node: u32) -> Option<u32> {
        self.0.set_of.get(&SetKey::of(s, node)).copied()
    }

    fn after(&mut self, s: u32) -> Option<u32> {
        let last = self.0.after.len().wrapping_sub(1);
        self.0.after.get(last.min(s as usize)).copied().filter(|&set| set != UNKNOWN)
    }

    fn within(&mut self, s: u32) -> Option<u32> {
        self.0.within.get(s as usize).copied().filter(|&set| set != UNKNOWN)
    }

    fn own(&mut self, s: u32, token: u32, offset: u32) -> Option<Own> {
        self.0.own.get(&(s, token, offset)).copied()
    }

    fn decides(&mut self, s: u32, token: u32, offset: u32) -> Option<Decides> {
        self.0.decides.get(&(s, token, offset)).copied()
    }

    fn joined(&mut self, s: u32, next: u32, behind: Behind) -> Option<bool> {
        self.0.joined.get(&(s, next, behind)).copied()
    }

    fn has(&self, set: u32, id: u32) -> bool {
        self.0.sets.get(set as usize).is_some_and(|set| set.ids.binary_search(&(id as i32)).is_ok())
    }
}

/// Finds out at once what is quick, and collects the sets that are missing.
struct Discovery<'a> {
    cover: &'a Cover,
    store: &'a mut Store,
    missing: Vec<SetKey>,
}

impl Discovery<'_> {
    fn set_of(&mut self, key: SetKey) -> Option<u32> {
        let known = self.store.set_of.get(&key).copied();
        if known.is_none() {
            self.missing.push(key);
        }
        known
    }
}

impl Known for Discovery<'_> {
    fn step(&mut self, node: u32, token: u32, offset: u32) -> Option<u32> {
        let key = (node, token, offset);
        if let Some(&to) = self.store.steps.get(&key) {
            return Some(to);
        }
        let (cover, table) = (self.cover, self.cover.teacher.table());
        let token = table.bytes(token);
        let part = if offset == FULL { token } else { token.get(..offset as usize).unwrap_or(token) };
        let mut bytes = self.store.nodes.get(node as usize).map_or(vec![], |node| node.bytes.clone());
        bytes.extend_from_slice(part);
        let range = cover.map.teacher.prefix_range(table, &bytes);
        let order = &cover.map.teacher.order[range[0]..range[1]];
        // The longer ones are sorted behind those that are equal.
        let longer = order.last().is_some_and(|&id| table.bytes(id as u32).len() > bytes.len());
        let to = if longer {
            let nodes = &mut self.store.nodes;
            *self.store.node_of.entry((range[0], bytes.len())).or_insert_with(|| {
                nodes.push(Node { bytes, range, rests: None });
                nodes.len() as u32 - 1
            })
        } else {
            DEAD
        };
        self.store.steps.insert(key, to);
        Some(to)
    }

    fn whole(&mut self, token: u32) -> Option<u32> {
        let node = self.step(ROOT, token, FULL)?;
        self.store.whole[token as usize] = node;
        Some(node)
    }

    fn set(&mut self, s: u32, node: u32) -> Option<u32> {
        self.set_of(SetKey::of(s, node))
    }

    fn after(&mut self, s: u32) -> Option<u32> {
        let set = self.set_of(SetKey::of(s, AFTER))?;
        let last = self.store.after.len() - 1;
        self.store.after[last.min(s as usize)] = set;
        Some(set)
    }

    fn within(&mut self, s: u32) -> Option<u32> {
        let set = self.set_of(SetKey::of(s, WITHIN))?;
        self.store.within[s as usize] = set;
        Some(set)
    }

    fn own(&mut self, s: u32, token: u32, offset: u32) -> Option<Own> {
        let key = (s, token, offset);
        if let Some(&own) = self.store.own.get(&key) {
            return Some(own);
        }
        let node = self.step(ROOT, token, offset)?;
        let own = if node == DEAD {
            Own { set: NOTHING, forced: false }
        } else {
            let set = self.set_of(SetKey { with_self: offset != FULL, ..SetKey::of(s, node) })?;
            Own { set, forced: offset != FULL && !self.has(set, token) }
        };
        self.store.own.insert(key, own);
        Some(own)
    }

    fn decides(&mut self, s: u32, token: u32, offset: u32) -> Option<Decides> {
        let key = (s, token, offset);
        if let Some(&known) = self.store.decides.get(&key) {
            return Some(known);
        }
        let rest = &self.cover.teacher.table().bytes(token)[offset as usize..];
        let decides = match self.cover.undecided(s, rest) {
            None => Decides::Token,
            Some([word, space]) => {
                let (node, with_self) =
                    if offset == 0 { (AFTER, false) } else { (self.step(ROOT, token, offset)?, true) };
                let others = self.set_of(SetKey { s, node, with_self, without: Some(token) });
                let [word, space] = [(BEFORE_WORD, word), (BEFORE_SPACE, space)]
                    .map(|(s, next)| next.map_or(Some(NOTHING), |next| self.set_of(SetKey::of(s, next as u32))));
                Decides::RowBehind(Ahead { others: others?, word: word?, space: space? })
            }
        };
        self.store.decides.insert(key, decides);
        Some(decides)
    }

    fn joined(&mut self, s: u32, next: u32, behind: Behind) -> Option<bool> {
        let joined = || self.cover.student.joined(s, next, behind);
        Some(*self.store.joined.entry((s, next, behind)).or_insert_with(joined))
    }

    fn has(&self, set: u32, id: u32) -> bool {
        Stored(self.store).has(set, id)
    }
}

/// The store to read, unless this thread must not wait for it.
fn read(lock: &RwLock<Store>) -> Option<RwLockReadGuard<'_, Store>> {
    if pool::within() {
        return lock.try_read().ok();
    }
    lock.read().ok()
}

fn write(lock: &RwLock<Store>) -> Option<RwLockWriteGuard<'_, Store>> {
    if pool::within() {
        return lock.try_write().ok();
    }
    lock.write().ok()
}

/// The queries of one row, with sets numbered as in the store.
#[derive(Default)]
struct RowQueries {
    counts: Vec<u32>,
    row: Vec<i32>,
    set: Vec<i32>,
    base: Vec<i32>,
    flags: Vec<u8>,
    within: Vec<i32>,
}

/// One row of a batch, as slices.
#[derive(Clone, Copy)]
struct Row<'a> {
    students: &'a [u32],
    teachers: &'a [u32],
    of: Arrays<&'a [i32], &'a [Kind]>,
}

/// An unbroken stretch of chunks in which both sides spell the same bytes.
struct Stretch {
    /// The next teacher token that has not ended yet.
    j: usize,
    /// How many more bytes the teacher's row has before it than the student's.
    ahead: i64,
    /// Places before `j` at which a longer token could have stood, with the bytes from there to `j`.
    open: Vec<(usize, u32)>,
}

impl Stretch {
    fn start(row: Row<'_>, i: usize, place: usize) -> Self {
        let own = if i == 0 { 0 } else { i64::from(row.of.student_end[i - 1]) };
        Self { j: place, ahead: row.teacher_start(place) - own, open: vec![] }
    }
}

/// A walk over one row.
struct Walk<'a, K> {
    known: &'a mut K,
    complete: bool,
    out: RowQueries,
}

impl<K: Known> Walk<'_, K> {
    /// What was found, or something in its place where it is missing.
    fn or<T>(&mut self, found: Option<T>, instead: T) -> T {
        self.complete &= found.is_some();
        found.unwrap_or(instead)
    }

    fn step(&mut self, node: u32, token: u32, offset: u32) -> u32 {
        let to = self.known.step(node, token, offset);
        self.or(to, DEAD)
    }

    fn joined(&mut self, s: u32, next: u32, behind: Behind) -> bool {
        let joined = self.known.joined(s, next, behind);
        self.or(joined, false)
    }

    fn ahead(&mut self, s: u32, token: u32, offset: u32) -> Option<Ahead> {
        let decides = self.known.decides(s, token, offset);
        match self.or(decides, Decides::Token) {
            Decides::Token => None,
            Decides::RowBehind(ahead) => Some(ahead),
        }
    }

    fn after(&mut self, s: u32) -> u32 {
        let set = self.known.after(s);
        self.or(set, NOTHING)
    }

    fn within(&mut self, s: u32) -> i32 {
        let set = self.known.within(s);
        i32::try_from(self.or(set, NOTHING)).unwrap_or(-1)
    }

    /// The term of tokens that go on behind a node.
    fn beyond(&mut self, k: usize, s: u32, node: u32) {
        let set = self.known.set(s, node);
        let set = self.or(set, NOTHING);
        self.term(k, set);
    }

    fn term(&mut self, k: usize, set: u32) {
        if set != NOTHING {
            self.out.row.push(k as i32);
            self.out.set.push(set as i32);
        }
    }

    fn one(&mut self, k: usize, token: u32) {
        self.out.row.push(k as i32);
        self.out.set.push(-1 - token as i32);
    }
}

impl Row<'_> {
    fn teacher_start(&self, j: usize) -> i64 {
        if j == 0 {
            0
        } else {
            i64::from(self.of.teacher_end[j - 1])
        }
    }

    /// The kind of student token `i`'s chunk, `None` where it has none.
    fn kind(&self, i: usize) -> Option<Kind> {
        self.of.kind.get(usize::try_from(*self.of.student_chunk.get(i)?).ok()?).copied()
    }

    fn spelled(&self, i: usize) -> bool {
        self.kind(i).is_some_and(|kind| !matches!(kind, Kind::Rewritten | Kind::Stop | Kind::Marker))
    }
}

impl Stretch {
    /// Goes past the next teacher token: every open place takes it whole, and so does its own.
    fn pass<K: Known>(&mut self, token: u32, walk: &mut Walk<'_, K>) {
        self.open.retain_mut(|(_, node)| {
            *node = walk.step(*node, token, FULL);
            *node != DEAD
        });
        self.next(token, walk);
    }

    /// The place of the next teacher token is open from now on.
    fn next<K: Known>(&mut self, token: u32, walk: &mut Walk<'_, K>) {
        let node = walk.known.whole(token);
        let node = walk.or(node, DEAD);
        if node != DEAD {
            self.open.push((self.j, node));
        }
        self.j += 1;
    }
}

impl Cover {
    /// Queries between a student's and a teacher's encoding; `map` is the map between the two.
    ///
    /// `letter`, the one that the map was made with: behind white space the teacher puts words whole, and the student
    /// takes the last space into them.
    pub fn new(student: Arc<Encoding>, teacher: Arc<Encoding>, map: Arc<VocabMap>, letter: Option<u8>) -> Self {
        let mut white = vec![];
        let mut ends_white = Bits::new(teacher.table().len());
        for (v, bytes) in teacher.table().iter().enumerate().filter(|_| letter.is_some()) {
            if is_white(bytes) {
                white.push((v as i32, asked(&student, bytes, map.canonical[v])));
            }
            if bytes.last().is_some_and(u8::is_ascii_whitespace) || is_white(bytes) {
                ends_white.insert(v as u32);
            }
        }
        let mut first = map.canonical.clone();
        for &(v, _) in &white {
            first[v as usize] = -1;
        }
        let mut ptr = vec![0u32; student.table().len() + 1];
        for &u in first.iter().filter(|&&u| u >= 0) {
            ptr[u as usize + 1] += 1;
        }
        for k in 1..ptr.len() {
            ptr[k] += ptr[k - 1];
        }
        let mut at = ptr.clone();
        let mut ids = vec![0; ptr[ptr.len() - 1] as usize];
        for (v, &u) in first.iter().enumerate().filter(|(_, &u)| u >= 0) {
            ids[at[u as usize] as usize] = v as u32;
            at[u as usize] += 1;
        }
        let mut open = Bits::new(student.table().len());
        for (r, &v) in map.teacher_first.iter().enumerate().filter(|(_, &v)| v >= 0) {
            let first = teacher.table().bytes(v as u32);
            if first.len() < student.table().bytes(r as u32).len() {
                student.id(first).into_iter().for_each(|u| open.insert(u));
            }
        }
        let same = student.same_as(&teacher);
        let (by_first, limit, store) = ((ptr, ids), STORE_LIMIT, Shared::default());
        Self { student, teacher, map, by_first, letter, white, ends_white, open, same, limit, store }
    }

    /// The same, keeping no more than about this many elements of sets between batches.
    #[must_use]
    pub fn with_limit(mut self, elements: usize) -> Self {
        self.limit = elements;
        self
    }

    /// Whether both sides are one tokenizer, so that the teacher's own logprobs are the answer.
    pub fn same(&self) -> bool {
        self.same
    }

    /// For every student token the bits of whether a longer student token exists that the teacher would cut after it:
    /// mass on it may belong to that one.
    pub fn open(&self) -> Vec<bool> {
        (0..self.student.table().len()).map(|u| self.open.contains(u as u32)).collect()
    }

    /// The queries of a batch whose flat ids are given, its rows over the threads that [`crate::Aligner::align_batch`]
    /// takes.
    ///
    /// # Errors
    /// [`Error::Argument`] where the batch does not fit the ids or the vocabularies.
    pub fn queries(&self, batch: &Batch, students: &[u32], teachers: &[u32], of: Of) -> Result<Queries, Error> {
        self.queries_of(batch.into(), students, teachers, of)
    }

    pub(crate) fn queries_of(
        &self,
        batch: View<'_>,
        students: &[u32],
        teachers: &[u32],
        of: Of,
    ) -> Result<Queries, Error> {
        let rows = self.rows(batch, students, teachers)?;
        // Rows that are not worth a task of their own are done together.
        let at_once = 2048 * rows.len() / (students.len() + 1) + 1;
        self.with_store(|lock| self.queries_in(lock, &rows, at_once, students.len(), of))
    }

    fn queries_in(
        &self,
        lock: &RwLock<Store>,
        rows: &[Row<'_>],
        at_once: usize,
        tokens: usize,
        of: Of,
    ) -> Option<Queries> {
        let mut resets = self.make_room(lock)?;
        let mut done: Vec<Option<RowQueries>> = vec![];
        done.resize_with(rows.len(), || None);
        loop {
            let store = read(lock)?;
            if store.resets != resets {
                resets = store.resets;
                done.fill_with(|| None);
            }
            let known = |done: &mut Option<RowQueries>, row: &Row<'_>| {
                if done.is_none() {
                    *done = self.walk(*row, &mut Stored(&store), of);
                }
            };
            pool::for_each(&mut done, at_once, |b, done| known(done, &rows[b]));
            if done.iter().all(Option::is_some) {
                return Some(gather(done.into_iter().flatten(), &store, tokens));
            }
            drop(store);
            let mut store = write(lock)?;
            let mut discovery = Discovery { cover: self, store: &mut store, missing: vec![] };
            for (row, _) in rows.iter().zip(&done).filter(|(_, done)| done.is_none()) {
                self.walk(*row, &mut discovery, of);
            }
            let mut missing = discovery.missing;
            self.fill(&mut missing, &mut store);
            // With all sets there, what is made of them.
            let mut discovery = Discovery { cover: self, store: &mut store, missing: vec![] };
            for (row, done) in rows.iter().zip(&mut done).filter(|(_, done)| done.is_none()) {
                *done = self.walk(*row, &mut discovery, of);
            }
            if resets != store.resets {
                resets = store.resets;
                done.fill_with(|| None);
            }
        }
    }

    /// Works with what is known, or, where that would mean to wait for oneself, with nothing.
    fn with_store<T>(&self, work: impl Fn(&RwLock<Store>) -> Option<T>) -> Result<T, Error> {
        let found = self.store.lock().and_then(&work).or_else(|| work(&RwLock::default()));
        found.ok_or_else(|| Error::Argument("a bug: nobody else has this lock".to_owned()))
    }

    /// Empties a store that has grown too large; how often that happened.
    fn make_room(&self, lock: &RwLock<Store>) -> Option<u64> {
        {
            let store = read(lock)?;
            if store.elements <= self.limit && !store.after.is_empty() {
                return Some(store.resets);
            }
        }
        let mut store = write(lock)?;
        if store.elements > self.limit || store.after.is_empty() {
            *store = Store {
                whole: vec![UNKNOWN; self.teacher.table().len()],
                after: vec![UNKNOWN; self.student.table().len() + 1],
                within: vec![UNKNOWN; self.student.table().len()],
                resets: store.resets + 1,
                ..Store::default()
            };
        }
        Some(store.resets)
    }

    /// For every student token that starts inside a teacher token, which teacher tokens go on behind the bytes before it.
    ///
    /// # Errors
    /// [`Error::Argument`] where the batch does not fit the ids or the vocabularies.
    pub fn interior(&self, batch: &Batch, students: &[u32], teachers: &[u32]) -> Result<Interior, Error> {
        self.interior_of(batch.into(), students, teachers)
    }

    pub(crate) fn interior_of(&self, batch: View<'_>, students: &[u32], teachers: &[u32]) -> Result<Interior, Error> {
        let rows = self.rows(batch, students, teachers)?;
        self.with_store(|lock| self.interior_in(lock, batch, &rows))
    }

    fn interior_in(&self, lock: &RwLock<Store>, batch: View<'_>, rows: &[Row<'_>]) -> Option<Interior> {
        self.make_room(lock)?;
        let mut store = write(lock)?;
        let mut found = Interior::default();
        let mut keys = vec![];
        for (b, row) in rows.iter().enumerate() {
            for i in (0..row.students.len()).filter(|&i| row.spelled(i) && row.of.teacher_off[i] > 0) {
                let Some(j) = usize::try_from(row.of.teacher_pos[i]).ok().filter(|&j| j < row.teachers.len()) else {
                    continue;
                };
                let mut discovery = Discovery { cover: self, store: &mut store, missing: vec![] };
                let node = discovery.step(ROOT, row.teachers[j], row.of.teacher_off[i] as u32).unwrap_or(DEAD);
                let Some(Node { range, .. }) = store.nodes.get(node as usize) else { continue };
                found.student.push(batch.student_cu[b] + i as i64);
                found.teacher.push(batch.teacher_cu[b] + j as i64);
                found.range.push([range[0] as i64, range[1] as i64]);
                keys.push(SetKey::of(LONGEST, node));
            }
        }
        let mut missing: Vec<SetKey> = keys.iter().filter(|key| !store.set_of.contains_key(key)).copied().collect();
        self.fill(&mut missing, &mut store);
        let empty = Arc::new(Set::default());
        let set = |key| store.sets.get(store.set_of[key] as usize).unwrap_or(&empty).clone();
        found.sets = keys.iter().map(set).collect();
        Some(found)
    }

    /// Works out sets that are missing.
    fn fill(&self, missing: &mut Vec<SetKey>, store: &mut Store) {
        missing.sort_unstable();
        missing.dedup();
        let of_nodes = missing.iter().filter(|key| key.is_of_token() || key.s == NEVER);
        let mut nodes: Vec<u32> = of_nodes.map(|key| key.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.retain(|&node| store.nodes.get(node as usize).is_some_and(|node| node.rests.is_none()));
        let rests: Vec<Vec<Rest>> = pool::map(nodes.len(), |k| self.rests(&store.nodes[nodes[k] as usize], false));
        for (&node, rests) in nodes.iter().zip(rests) {
            store.elements += rests.len();
            store.nodes[node as usize].rests = Some(rests);
        }
        // The sets of one student token share what merges with it.
        let by_token: Vec<&[SetKey]> = missing.chunk_by(|a, b| a.s == b.s).collect();
        let sets: Vec<Vec<Set>> = pool::map(by_token.len(), |k| self.sets(by_token[k], &store.nodes));
        for (&key, set) in missing.iter().zip(sets.into_iter().flatten()) {
            let mut id = NOTHING;
            if set.complement || !set.ids.is_empty() {
                id = store.sets.len() as u32;
                store.elements += set.ids.len();
                store.sets.push(Arc::new(set));
            }
            store.set_of.insert(key, id);
        }
    }

    fn rows<'a>(&self, batch: View<'a>, students: &'a [u32], teachers: &'a [u32]) -> Result<Vec<Row<'a>>, Error> {
        let fits = batch.fits(students.len(), teachers.len())
            && students.iter().all(|&id| (id as usize) < self.student.table().len())
            && teachers.iter().all(|&id| (id as usize) < self.teacher.table().len());
        if !fits {
            return Err(Error::Argument("the batch was not aligned from these ids and vocabularies".to_owned()));
        }
        let row = |b| {
            let at = batch.place(b);
            let of = batch.row(&at);
            Row { students: &students[at.students], teachers: &teachers[at.teachers], of }
        };
        Ok((0..batch.rows()).map(row).collect())
    }

    /// The queries of a row; `None` when something was not known (a discovery goes on to find the rest).
    fn walk(&self, row: Row<'_>, known: &mut impl Known, of: Of) -> Option<RowQueries> {
        let m = row.students.len();
        let mut walk = Walk { known, complete: true, out: RowQueries::default() };
        for numbers in [&mut walk.out.row, &mut walk.out.set] {
            numbers.reserve(2 * m);
        }
        walk.out.base.reserve(m);
        walk.out.counts.reserve(m);
        walk.out.flags.reserve(m);
        walk.out.within.reserve(m);
        let mut stretch: Option<Stretch> = None;
        for i in 0..m {
            let before = walk.out.set.len();
            let (mut base, mut flags, mut within) = (-2, 0, -1);
            let place = usize::try_from(row.of.teacher_pos[i]).ok().filter(|&place| place < row.teachers.len());
            match row.kind(i) {
                Some(Kind::Stop | Kind::Marker) => {
                    if let Some(place) = place {
                        base = if stretch.is_some_and(|stretch| stretch.j == place) { -1 } else { place as i32 };
                        walk.one(place, row.teachers[place]);
                    }
                    stretch = None;
                }
                Some(kind) if kind != Kind::Rewritten => {
                    if let Some(place) = place.filter(|_| row.of.teacher_off[i] == 0) {
                        if let Some(root) = self.root(row, i, place).filter(|_| of == Of::Rows) {
                            within = walk.within(root);
                        }
                        // Also where teacher tokens without bytes lie between the stretch so far and this token.
                        if stretch.as_ref().is_none_or(|stretch| stretch.j != place) {
                            stretch = Some(Stretch::start(row, i, place));
                            base = place as i32;
                        }
                    }
                    stretch = stretch.and_then(|mut stretch| {
                        flags = self.end_of_token(row, i, &mut stretch, &mut walk)?;
                        base = base.max(-1);
                        Some(stretch)
                    });
                    if stretch.is_none() {
                        base = -2;
                    }
                }
                _ => stretch = None,
            }
            walk.out.base.push(base);
            walk.out.flags.push(flags);
            walk.out.within.push(within);
            walk.out.counts.push((walk.out.set.len() - before) as u32);
        }
        walk.complete.then_some(walk.out)
    }

    /// The student token that teacher token `j` is, where student token `i` begins with that and longer ones do, too.
    fn root(&self, row: Row<'_>, i: usize, j: usize) -> Option<u32> {
        let (s, t) = (row.students[i], row.teachers[j]);
        let root = u32::try_from(self.map.teacher_to_student[t as usize]).ok()?;
        let makes = self.map.canonical[t as usize] == root as i32 && self.open.contains(root);
        let begins = s == root || self.map.teacher_first[s as usize] == t as i32;
        (makes && begins && !self.same && !self.ends_white.contains(t)).then_some(root)
    }

    /// The terms of the boundary after student token `i`, and its flags; `None` where a teacher token without bytes
    /// stands in the middle of a chunk.
    fn end_of_token<K: Known>(
        &self,
        row: Row<'_>,
        i: usize,
        stretch: &mut Stretch,
        walk: &mut Walk<'_, K>,
    ) -> Option<u8> {
        let end = i64::from(row.of.student_end[i]) + stretch.ahead;
        while *row.of.teacher_chunk.get(stretch.j)? >= 0 && i64::from(row.of.teacher_end[stretch.j]) < end {
            stretch.pass(row.teachers[stretch.j], walk);
        }
        let j = stretch.j;
        if *row.of.teacher_chunk.get(j)? < 0 {
            return None;
        }
        let token = row.teachers[j];
        let exact = i64::from(row.of.teacher_end[j]) == end;
        if self.same && row.kind(i) == Some(Kind::OneToOne) {
            let all = walk.after(NEVER);
            walk.term(j + 1, all);
            stretch.pass(token, walk);
            return Some(0);
        }
        let offset = if exact { FULL } else { (end - row.teacher_start(j)) as u32 };
        let (mut s, mut flags) = (row.students[i], 0);
        let goes_on = row.spelled(i + 1);
        if goes_on && walk.joined(s, row.students[i + 1], self.behind(row, i + 1)) {
            s = NEVER;
            flags |= Queries::NOT_CANONICAL;
        }
        if exact {
            stretch.open.retain_mut(|(k, node)| {
                *node = walk.step(*node, token, FULL);
                if *node != DEAD {
                    walk.beyond(*k, s, *node);
                }
                *node != DEAD
            });
        } else {
            for &(k, node) in &stretch.open {
                let node = walk.step(node, token, offset);
                if node != DEAD {
                    walk.beyond(k, s, node);
                }
            }
        }
        let undecided = !exact && self.ends_white.contains(token);
        if let Some(ahead) = undecided.then(|| walk.ahead(s, token, offset)).flatten() {
            walk.term(j, ahead.others);
            flags |= self.row_behind(row, j + 1, ahead, walk);
        } else {
            let own = walk.known.own(s, token, offset);
            let own = walk.or(own, Own { set: NOTHING, forced: false });
            walk.term(j, own.set);
            if own.forced {
                walk.one(j, token);
                flags |= Queries::FORCED;
            }
        }
        if exact {
            flags |= self.row_after(row, i, s, j + 1, walk);
            stretch.next(token, walk);
        }
        Some(flags)
    }

    /// The terms of the row of teacher token `k`, that starts where student token `i` ends.
    fn row_after<K: Known>(&self, row: Row<'_>, i: usize, s: u32, k: usize, walk: &mut Walk<'_, K>) -> u8 {
        let goes_on = row.spelled(i + 1);
        let next = row.teachers.get(k).copied().filter(|_| goes_on && row.of.teacher_pos[i + 1] == k as i32);
        let white = next.filter(|&next| self.ends_white.contains(next));
        if let Some(ahead) = white.and_then(|next| walk.ahead(s, next, 0)) {
            walk.term(k, ahead.others);
            return self.row_behind(row, k + 1, ahead, walk);
        }
        let set = walk.after(s);
        walk.term(k, set);
        // A rule that looks at the next token alone has just been asked about it.
        let known = |next| self.student.is_bpe() && self.map.canonical[next as usize] == row.students[i + 1] as i32;
        if let Some(next) = next.filter(|&next| (white.is_some() || !known(next)) && walk.known.has(set, next)) {
            walk.one(k, next);
            return Queries::FORCED;
        }
        0
    }

    /// The terms of row `k`, behind a teacher token of which it decides how the student cuts it.
    fn row_behind<K: Known>(&self, row: Row<'_>, k: usize, ahead: Ahead, walk: &mut Walk<'_, K>) -> u8 {
        walk.term(k, ahead.word);
        walk.term(k, ahead.space);
        let next = row.teachers.get(k).copied();
        let white = next.is_some_and(|next| self.is_white(next));
        if let Some(next) = next.filter(|_| (if white { ahead.space } else { ahead.word }) == NOTHING) {
            walk.one(k, next);
            return Queries::FORCED;
        }
        0
    }

    fn is_white(&self, token: u32) -> bool {
        self.white.binary_search_by_key(&(token as i32), |&(v, _)| v).is_ok()
    }

    /// What stands behind student token `i`.
    fn behind(&self, row: Row<'_>, i: usize) -> Behind {
        let word = self.letter.is_some() && row.spelled(i + 1) && {
            let bytes = self.student.table().bytes(row.students[i + 1]);
            !bytes.first().is_some_and(u8::is_ascii_whitespace)
        };
        if word {
            Behind::Word
        } else {
            Behind::Nothing
        }
    }

    /// Of white space behind `s` the student token that comes next, with a word behind it and with more white space:
    /// `None` where `s` would not stay, -1 where the token is not known. `None` where it makes no difference.
    fn undecided(&self, s: u32, z: &[u8]) -> Option<[Option<i32>; 2]> {
        let rest = self.rest(z, false);
        rest.white?;
        let word = (!self.rest_merges(s, z, &rest)).then_some(rest.next);
        let next = self.student.first(z).map_or(-1, |u| u as i32);
        let space = (!self.merges(s, z, asked(&self.student, z, next), None)).then_some(next);
        (word != space).then_some([word, space])
    }

    /// Whether `s` would merge with these bytes, before a letter or before nothing.
    fn merges(&self, s: u32, z: &[u8], asked: i32, letter: Option<u8>) -> bool {
        let asked = u32::try_from(asked).ok();
        s < BEFORE_SPACE
            && match letter {
                Some(letter) => self.student.merges(s, &[z, &[letter]].concat(), asked, Behind::Word),
                None => self.student.merges(s, z, asked, Behind::Nothing),
            }
    }

    /// Whether `s` would merge with what is left of a teacher token, a word behind it where it is white space.
    fn rest_merges(&self, s: u32, z: &[u8], rest: &Rest) -> bool {
        self.merges(s, z, rest.white.unwrap_or(rest.next), rest.white.and(self.letter))
    }

    /// What is left of a teacher token; the id is not known here. `longest`: the longest student token comes next.
    fn rest(&self, z: &[u8], longest: bool) -> Rest {
        let white = self.letter.filter(|_| !longest && is_white(z));
        let first = |z| self.student.first(z).map_or(-1, |u| u as i32);
        let next = match (self.teacher.id(z), white) {
            _ if z.is_empty() => -1,
            _ if longest => self.student.longest_prefix(z).map_or(-1, |u| u as i32),
            (Some(token), _) => self.map.canonical[token as usize],
            (None, Some(_)) if self.student.is_split() && z.len() > 1 => first(z.strip_suffix(b" ").unwrap_or(z)),
            (None, Some(letter)) => self.student.first_before(z, letter).map_or(-1, |u| u as i32),
            (None, None) => first(z),
        };
        let whole = u32::try_from(next).is_ok_and(|u| self.student.table().bytes(u).len() == z.len());
        let white = white.map(|_| asked(&self.student, z, next));
        Rest { id: -1, next, whole, nothing: z.is_empty(), white }
    }

    /// The teacher tokens that begin with the bytes of a node, by ids; `longest`: the longest student token comes next.
    fn rests(&self, Node { bytes: consumed, range, .. }: &Node, longest: bool) -> Vec<Rest> {
        let table = self.teacher.table();
        let rest = |&id: &i32| Rest { id, ..self.rest(&table.bytes(id as u32)[consumed.len()..], longest) };
        let mut all: Vec<Rest> = self.map.teacher.order[range[0]..range[1]].iter().map(rest).collect();
        all.sort_unstable_by_key(|rest| rest.id);
        all
    }

    /// Sets of one student token.
    fn sets(&self, keys: &[SetKey], nodes: &[Node]) -> Vec<Set> {
        let joined = keys.first().filter(|key| key.is_of_token()).and_then(|key| self.joined(key.s));
        keys.iter().map(|&key| self.set(key, joined.as_ref(), nodes)).collect()
    }

    fn joined(&self, s: u32) -> Option<Joined> {
        let any = self.student.all_joined(s, Behind::Nothing)?;
        let word = self.letter.and_then(|_| self.student.all_joined(s, Behind::Word));
        Some(Joined { any, word })
    }

    fn set(&self, key: SetKey, joined: Option<&Joined>, nodes: &[Node]) -> Set {
        let SetKey { s, node, with_self, without } = key;
        if s == BEFORE_WORD || s == BEFORE_SPACE {
            let ids: Vec<i32> = self.white.iter().map(|&(v, _)| v).collect();
            if s == BEFORE_WORD {
                return Set { ids, complement: true, fixed: Some(node as i32), ..Set::default() };
            }
            return Set { next: vec![node as i32; ids.len()], whole: vec![true; ids.len()], ids, ..Set::default() };
        }
        if node == WITHIN {
            return self.within(s, joined);
        }
        if node == AFTER {
            let mut ids = if s == NEVER { vec![] } else { self.merging(s, joined) };
            if let Some(Err(at)) = without.map(|v| ids.binary_search(&(v as i32))) {
                ids.insert(at, without.map_or(0, |v| v as i32));
            }
            return Set { ids, complement: true, ..Set::default() };
        }
        let Some(node) = nodes.get(node as usize) else { return Set::default() };
        let longest;
        let rests = match &node.rests {
            Some(rests) if s != LONGEST => rests,
            _ => {
                longest = self.rests(node, s == LONGEST);
                &longest
            }
        };
        let table = self.teacher.table();
        let rest_of = |rest: &Rest| &table.bytes(rest.id as u32)[node.bytes.len()..];
        let merges = |rest: &Rest| match (joined, rest.white) {
            _ if s >= BEFORE_SPACE => false,
            (Some(Joined { word: Some(word), .. }), Some(asked)) => {
                u32::try_from(asked).is_ok_and(|u| word.contains(u))
            }
            (Some(joined), _) => u32::try_from(rest.next).is_ok_and(|u| joined.any.contains(u)),
            (None, _) => self.rest_merges(s, rest_of(rest), rest),
        };
        // White space that ends where the student's token does has a word behind it.
        let before_word = |letter| {
            let letter_id = self.student.id(&[letter]).map_or(-1, |id| id as i32);
            is_white(&node.bytes) && self.merges(s, &[], letter_id, Some(letter))
        };
        let ends = with_self && !self.letter.is_some_and(before_word);
        let mut set = Set::default();
        let counts = |rest: &&Rest| Some(rest.id as u32) != without && if rest.nothing { ends } else { !merges(rest) };
        for rest in rests.iter().filter(counts) {
            set.ids.push(rest.id);
            set.next.push(rest.next);
            set.whole.push(rest.whole);
        }
        set
    }

    /// The teacher tokens that would have merged with `s`, had they come after it.
    fn merging(&self, s: u32, joined: Option<&Joined>) -> Vec<i32> {
        joined.map_or_else(|| self.merging_row(s), |joined| self.begins_with(joined))
    }

    /// The teacher tokens that would have merged with `s`, and the student token with which both together begin.
    fn within(&self, s: u32, joined: Option<&Joined>) -> Set {
        let ids = self.merging(s, joined);
        let mut bytes = self.student.table().bytes(s).to_vec();
        let own = bytes.len();
        let mut set = Set::default();
        for &v in &ids {
            bytes.truncate(own);
            bytes.extend_from_slice(self.teacher.table().bytes(v as u32));
            let both = self.rest(&bytes, false);
            set.next.push(both.next);
            set.whole.push(both.whole);
        }
        Set { ids, ..set }
    }

    /// The teacher tokens that would have merged with a student token, had they come after it.
    fn begins_with(&self, joined: &Joined) -> Vec<i32> {
        let (ptr, ids) = &self.by_first;
        let mut all = Bits::new(self.teacher.table().len());
        for u in joined.any.iter() {
            for &v in &ids[ptr[u as usize] as usize..ptr[u as usize + 1] as usize] {
                all.insert(v);
            }
        }
        if let Some(word) = &joined.word {
            let merging = |asked: i32| u32::try_from(asked).is_ok_and(|u| word.contains(u));
            self.white.iter().filter(|white| merging(white.1)).for_each(|&(v, _)| all.insert(v as u32));
        }
        all.iter().map(|v| v as i32).collect()
    }

    /// The teacher tokens that would have merged with `s`, had they come after it, where that depends on their bytes.
    fn merging_row(&self, s: u32) -> Vec<i32> {
        let (students, teachers) = (self.student.table(), self.teacher.table());
        let own = students.bytes(s);
        // Something must reach across the boundary: a student token that begins with an end of `s`.
        let starts = if self.student.is_longest_match() { 0..1 } else { 0..own.len() };
        let mut candidates: Vec<i32> = vec![];
        if !self.student.is_longest_match() && self.student.encode(own) != [s] {
            candidates = (0..teachers.len() as i32).collect();
        } else {
            for tail in starts.map(|from| &own[from..]) {
                let [lo, hi] = self.map.student.prefix_range(students, tail);
                for &r in &self.map.student.order[lo..hi] {
                    let rest = &students.bytes(r as u32)[tail.len()..];
                    if !rest.is_empty() {
                        let [lo, hi] = self.map.teacher.prefix_range(teachers, rest);
                        candidates.extend(&self.map.teacher.order[lo..hi]);
                    }
                }
            }
        }
        candidates.extend(self.white.iter().map(|&(v, _)| v));
        candidates.sort_unstable();
        candidates.dedup();
        candidates.retain(|&v| {
            let z = teachers.bytes(v as u32);
            !z.is_empty() && self.rest_merges(s, z, &self.rest(z, false))
        });
        candidates
    }
}

/// What the student's tokenizer would not have put behind a token.
struct Joined {
    /// With nothing, or anything but a letter, behind white space.
    any: Bits,
    /// With a letter behind white space, where that makes a difference.
    word: Option<Bits>,
}

/// The student token to ask a pre-tokenizer about white space: how that is cut says the pre-tokenizer, or `next` does.
fn asked(student: &Encoding, white: &[u8], next: i32) -> i32 {
    let whole = student.id(white).filter(|_| student.is_split());
    whole.map_or(next, |id| id as i32)
}

/// The queries of all rows, with the sets that they use.
fn gather(rows: impl Iterator<Item = RowQueries>, store: &Store, tokens: usize) -> Queries {
    let mut all = Queries { indptr: Vec::with_capacity(tokens + 1), ..Queries::default() };
    all.indptr.push(0);
    let mut number = vec![-1; store.sets.len()];
    let mut terms = 0;
    for row in rows {
        for count in row.counts {
            terms += i64::from(count);
            all.indptr.push(terms);
        }
        let sets = &mut all.sets;
        let mut numbered = |set: i32| {
            let Ok(place) = usize::try_from(set) else { return set };
            if number[place] < 0 {
                number[place] = sets.len() as i32;
                sets.push(store.sets[place].clone());
            }
            number[place]
        };
        all.row.extend(row.row);
        all.set.extend(row.set.into_iter().map(&mut numbered));
        all.within.extend(row.within.into_iter().map(numbered));
        all.base.extend(row.base);
        all.flags.extend(row.flags);
    }
    all
}
