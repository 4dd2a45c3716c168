//! How one tokenizer cuts bytes into its tokens: the rule itself, on short byte strings.

use std::hash::Hasher;
use std::sync::{Arc, OnceLock};

use rustc_hash::{FxHashMap, FxHasher};

use crate::error::Error;
use crate::pool::{self, Shared};
use crate::table::{ByteTable, Sorted};

/// How a tokenizer chooses among the ways to cut a text into its tokens.
#[derive(Clone, Debug)]
pub enum Rule {
    /// From the left, the longest token that fits (`WordPiece`; what is assumed of a bare vocabulary).
    LongestMatch,
    /// Byte-pair encoding: of all neighbors that may merge, the pair of lowest rank does, the leftmost first.
    Bpe {
        /// (left, right, merged) ids in order of rank; `None`: any two tokens may merge whose bytes together are a
        /// token, with the rank of that token (tiktoken, tekken, `SentencePiece`).
        merges: Option<Vec<[u32; 3]>>,
        /// Without `merges`: the rank of every id, lower first; `None`: the id itself.
        ranks: Option<Vec<u32>>,
        /// Whether the first symbols are characters, and bytes only where a character is no token (byte fallback).
        characters: bool,
        /// Whether a piece of text that is a token is taken whole, before any merge.
        whole: bool,
        /// Tokens that are found in a text before any other, the leftmost and longest first.
        added: Vec<u32>,
    },
    /// The path of the highest sum of scores, one score for every id.
    Unigram(Vec<f32>),
}

/// What a pre-tokenizer does at a boundary between two tokens, by classes of tokens.
///
/// It cuts the text into pieces before the rule sees it, so that no token crosses from one into the next.
#[derive(Clone, Debug, Default)]
pub struct Splits {
    /// Class of every id as the token before the boundary.
    pub before: Vec<u32>,
    /// Class of every id as the token after it.
    pub after: Vec<u32>,
    /// For each class before a boundary and each class after it, how many characters of the token after the boundary
    /// are in the piece of the token before it: 0, a cut at the boundary; [`Splits::ALL`]; [`Splits::ALL_BUT_LAST`]; or
    /// [`Splits::INSIDE`], a cut in the token before. First for every class with nothing behind the two, then for every
    /// class with a word behind ([`Behind`]). A row that was never set says nothing ([`Splits::ALL`]).
    pub reach: Vec<OnceLock<Vec<u8>>>,
    /// Number of classes after a boundary.
    pub width: usize,
}

impl Splits {
    /// The whole token after the boundary is in the same piece.
    pub const ALL: u8 = 254;
    /// The token before the boundary is cut itself.
    pub const INSIDE: u8 = 255;
    /// All characters of the token after the boundary but its last.
    pub const ALL_BUT_LAST: u8 = 253;
}

/// What stands behind two tokens of which the second is white space: it can decide how that is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Behind {
    /// Nothing, or more white space.
    Nothing,
    /// A letter.
    Word,
}

/// (left, right) -> (rank, merged).
type Merges = FxHashMap<(u32, u32), (u32, u32)>;

impl Splits {
    /// What happens after a token, by the class of the next one.
    fn row(&self, s: u32, behind: Behind) -> Option<&[u8]> {
        let row = self.reach[self.before[s as usize] as usize].get()?;
        Some(match behind {
            Behind::Nothing => &row[..self.width],
            Behind::Word => &row[self.width..],
        })
    }
}

/// Whether these bytes are a text of white space alone.
pub(crate) fn is_white(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_ok_and(|text| text.chars().all(char::is_whitespace))
}

/// How one token was made: the pair whose merge it is, and the rank of that merge.
#[derive(Clone, Copy, Debug)]
struct Made {
    left: u32,
    right: u32,
    rank: u32,
}

#[derive(Clone, Debug)]
struct Bpe {
    merges: Merges,
    characters: bool,
    whole: bool,
    /// Added tokens by their bytes.
    added: Vec<u32>,
    is_added: Vec<bool>,
    /// First bytes of added tokens.
    added_start: Vec<bool>,
    /// `None` for a first symbol, and for a token that the rule never makes.
    made: Vec<Option<Made>>,
    /// Whether merges alone make this token of its bytes.
    reachable: Vec<bool>,
    /// Whether the token never stands anywhere: an added token is found inside, or another has its bytes.
    broken: Vec<bool>,
    /// For every id the merges (rank, right, merged) in which it is on the left.
    by_left: Vec<Vec<(u32, u32, u32)>>,
    /// For every id the tokens that were made with it on the left: (rank, made), in order of rank.
    children: Vec<Vec<(u32, u32)>>,
    /// All ids, each followed by those that have it on their left edge, in order of rank.
    order: Vec<u32>,
    /// For every id its place in `order`, and the place at which those that have it on their left edge end.
    span: Vec<[u32; 2]>,
}

/// A set of ids.
#[derive(Clone, Debug)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn new(size: usize) -> Self {
        Self(vec![0; size.div_ceil(64)])
    }

    fn full(size: usize) -> Self {
        let mut all = Self(vec![u64::MAX; size.div_ceil(64)]);
        if let Some(last) = all.0.last_mut().filter(|_| size % 64 > 0) {
            *last = (1 << (size % 64)) - 1;
        }
        all
    }

    pub(crate) fn insert(&mut self, id: u32) {
        self.0[id as usize / 64] |= 1 << (id % 64);
    }

    fn remove(&mut self, id: u32) {
        self.0[id as usize / 64] &= !(1 << (id % 64));
    }

    pub(crate) fn contains(&self, id: u32) -> bool {
        self.0[id as usize / 64] >> (id % 64) & 1 == 1
    }

    /// Rising.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().enumerate().flat_map(|(k, &word)| {
            let left = |word: u64| (word > 0).then_some(word);
            std::iter::successors(left(word), move |word| left(word & (word - 1)))
                .map(move |word| k as u32 * 64 + word.trailing_zeros())
        })
    }
}

/// One tokenizer's vocabulary and rule.
#[derive(Clone, Debug)]
pub struct Encoding {
    table: Arc<ByteTable>,
    ids: ByBytes,
    longest: usize,
    rule: Inner,
    splits: Option<Splits>,
    /// For every class after a boundary the ids that are in it.
    in_class: Vec<Vec<u32>>,
    /// For such a class, and a number of characters: of every id in it the first token of that many characters.
    cut: Arc<Shared<FxHashMap<(usize, u8), Cut>>>,
    sorted: Sorted,
}

#[derive(Clone, Debug)]
enum Inner {
    LongestMatch,
    Bpe(Box<Bpe>),
    Unigram(Vec<f32>),
}

/// (token, first token of its first characters)
type Cut = Arc<Vec<(u32, Option<u32>)>>;

/// Ids by their bytes: open addressing over the table's own bytes.
#[derive(Clone, Debug)]
struct ByBytes {
    slots: Vec<u32>,
}

const EMPTY: u32 = u32::MAX;

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

impl ByBytes {
    /// Of ids with the same bytes, in rising order, `better(new, old)` chooses.
    fn new(table: &ByteTable, better: impl Fn(u32, u32) -> bool) -> Self {
        let size = (table.len() * 2 + 1).next_power_of_two();
        let mut all = Self { slots: vec![EMPTY; size] };
        for (id, bytes) in table.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
            let slot = all.slot(table, bytes);
            let old = all.slots[slot];
            if old == EMPTY || better(id as u32, old) {
                all.slots[slot] = id as u32;
            }
        }
        all
    }

    fn slot(&self, table: &ByteTable, bytes: &[u8]) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = hash(bytes) as usize & mask;
        while self.slots[slot] != EMPTY && table.bytes(self.slots[slot]) != bytes {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn get(&self, table: &ByteTable, bytes: &[u8]) -> Option<u32> {
        let id = self.slots[self.slot(table, bytes)];
        (id != EMPTY).then_some(id)
    }
}

impl Encoding {
    /// The encoding of a vocabulary under a rule, with what its pre-tokenizer does between tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] where the rule or the splits do not fit the table.
    pub fn new(table: impl Into<Arc<ByteTable>>, rule: Rule, splits: Option<Splits>) -> Result<Self, Error> {
        let table = table.into();
        let v = table.len();
        if let Some(s) = &splits {
            let fits = s.before.len() == v
                && s.after.len() == v
                && s.before.iter().all(|&c| (c as usize) < s.reach.len())
                && s.after.iter().all(|&c| (c as usize) < s.width);
            if !fits {
                return Err(Error::Argument(format!("splits do not fit a byte table of {v} ids")));
            }
        }
        let longest = table.iter().map(<[u8]>::len).max().unwrap_or(0);
        let (ids, rule) = match rule {
            Rule::LongestMatch => (ByBytes::new(&table, |_, _| false), Inner::LongestMatch),
            Rule::Unigram(scores) => {
                if scores.len() != v {
                    return Err(Error::Argument(format!("{} scores for a byte table of {v} ids", scores.len())));
                }
                let better = |new: u32, old: u32| scores[new as usize] > scores[old as usize];
                (ByBytes::new(&table, better), Inner::Unigram(scores))
            }
            Rule::Bpe { merges, ranks, characters, whole, added } => {
                if let Some(id) = added.iter().find(|&&id| id as usize >= v) {
                    return Err(Error::Argument(format!("added: id {id} is outside the byte table of {v} ids")));
                }
                let (mut is_added, mut added_start) = (vec![false; v], vec![false; 256]);
                for &id in added.iter().filter(|&&id| !table.bytes(id).is_empty()) {
                    is_added[id as usize] = true;
                    added_start[table.bytes(id)[0] as usize] = true;
                }
                // A byte piece has the bytes of a character: the character, listed after it, is what is made. What is
                // added is found before either.
                let ids = ByBytes::new(&table, |new, old| {
                    let [new, old] = [new, old].map(|id| is_added[id as usize]);
                    if characters {
                        new || !old
                    } else {
                        new && !old
                    }
                });
                let merges = match merges {
                    Some(merges) => listed(&table, &merges)?,
                    None => implied(&table, &ids, ranks.as_deref())?,
                };
                let mut added = added;
                added.retain(|&id| is_added[id as usize]);
                added.sort_unstable_by_key(|&id| table.bytes(id));
                let bpe = Bpe {
                    merges,
                    characters,
                    whole,
                    added,
                    is_added,
                    added_start,
                    made: vec![],
                    reachable: vec![],
                    broken: vec![],
                    by_left: vec![],
                    children: vec![],
                    order: vec![],
                    span: vec![],
                };
                (ids, Inner::Bpe(Box::new(bpe)))
            }
        };
        let mut in_class = vec![];
        if let Some(s) = &splits {
            in_class.resize_with(s.width, Vec::new);
            for (id, &class) in s.after.iter().enumerate() {
                in_class[class as usize].push(id as u32);
            }
        }
        let sorted = Sorted::new(&table);
        let mut all = Self { table, ids, longest, rule, splits, in_class, cut: Arc::default(), sorted };
        all.grow_trees();
        Ok(all)
    }

    /// Sets what the pre-tokenizer does after the tokens of one class, for every class after the boundary. The first
    /// that is said of a class holds.
    ///
    /// # Errors
    /// [`Error::Argument`] for a class or a width that the splits do not have.
    pub fn learn(&self, class: usize, reach: Vec<u8>) -> Result<(), Error> {
        match &self.splits {
            Some(s) if class < s.reach.len() && reach.len() == 2 * s.width => {
                let _ = s.reach[class].set(reach);
                Ok(())
            }
            _ => Err(Error::Argument(format!("class {class}: no such class, or not of {} values", reach.len()))),
        }
    }

    /// The vocabulary.
    pub fn table(&self) -> &Arc<ByteTable> {
        &self.table
    }

    /// The vocabulary in the order of its bytes.
    pub fn sorted(&self) -> &Sorted {
        &self.sorted
    }

    /// The token that these bytes are, if there is one: of several the one that the rule makes.
    pub fn id(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.is_empty() || bytes.len() > self.longest {
            return None;
        }
        self.ids.get(&self.table, bytes)
    }

    /// The longest token that is a prefix of these bytes.
    pub fn longest_prefix(&self, bytes: &[u8]) -> Option<u32> {
        (1..=bytes.len().min(self.longest)).rev().find_map(|n| self.id(&bytes[..n]))
    }

    /// The tokens of a short byte string, without its pre-tokenizer; bytes that no token has are left out.
    pub fn encode(&self, bytes: &[u8]) -> Vec<u32> {
        match &self.rule {
            Inner::LongestMatch => {
                let (mut all, mut at) = (vec![], 0);
                while at < bytes.len() {
                    match self.longest_prefix(&bytes[at..]) {
                        Some(id) => {
                            at += self.table.bytes(id).len();
                            all.push(id);
                        }
                        None => at += 1,
                    }
                }
                all
            }
            Inner::Bpe(bpe) => {
                let (mut all, mut from, mut at) = (vec![], 0, 0);
                while at < bytes.len() {
                    match self.added_at(bpe, &bytes[at..]) {
                        Some(id) => {
                            self.merge_into(bpe, &bytes[from..at], &mut all);
                            all.push(id);
                            at += self.table.bytes(id).len();
                            from = at;
                        }
                        None => at += 1,
                    }
                }
                self.merge_into(bpe, &bytes[from..], &mut all);
                all
            }
            Inner::Unigram(scores) => self.best_path(bytes, scores),
        }
    }

    fn merge_into(&self, bpe: &Bpe, bytes: &[u8], out: &mut Vec<u32>) {
        if let Some(id) = self.id(bytes).filter(|_| bpe.whole) {
            out.push(id);
            return;
        }
        let mut symbols = self.first_symbols(bytes, bpe.characters);
        bpe.merge(&mut symbols);
        out.append(&mut symbols);
    }

    /// The longest added token that these bytes begin with.
    fn added_at(&self, bpe: &Bpe, bytes: &[u8]) -> Option<u32> {
        if !bpe.added_start[bytes[0] as usize] {
            return None;
        }
        (1..=bytes.len().min(self.longest))
            .rev()
            .find_map(|n| self.id(&bytes[..n]).filter(|&id| bpe.is_added[id as usize]))
    }

    /// What must follow `s` so that an added token is found across the boundary.
    fn rest_of_added<'a>(&'a self, bpe: &'a Bpe, s: u32) -> impl Iterator<Item = &'a [u8]> {
        let own = self.table.bytes(s);
        // One that is there itself is found first, so only a longer one can take its place.
        let starts = if bpe.is_added[s as usize] { 1 } else { own.len() };
        (0..starts.min(own.len())).flat_map(move |from| {
            let tail = &own[from..];
            let lo = bpe.added.partition_point(|&id| self.table.bytes(id) < tail);
            let rests = bpe.added[lo..].iter().map_while(move |&id| self.table.bytes(id).strip_prefix(tail));
            rests.filter(|rest| !rest.is_empty())
        })
    }

    /// The first token of the encoding.
    pub fn first(&self, bytes: &[u8]) -> Option<u32> {
        if self.is_longest_match() {
            return self.longest_prefix(bytes);
        }
        self.encode(bytes).first().copied()
    }

    /// The first token of these bytes where a letter follows; `None` if that token takes the letter too.
    pub(crate) fn first_before(&self, bytes: &[u8], letter: u8) -> Option<u32> {
        let text = [bytes, &[letter]].concat();
        self.first(&text).filter(|&id| self.table.bytes(id).len() <= bytes.len())
    }

    /// [`Encoding::first`] of every token of another table, of its first `pieces[token]` bytes where that is given: as
    /// far as the pre-tokenizer's first piece goes. -1 where there is none. Behind white space stands `letter`, if one
    /// is given.
    pub(crate) fn first_of_all(&self, other: &ByteTable, pieces: &[u32], letter: Option<u8>) -> Vec<i32> {
        pool::map(other.len(), |v| {
            let bytes = other.bytes(v as u32);
            let end = pieces.get(v).map_or(bytes.len(), |&end| bytes.len().min(end as usize));
            let first = match (&bytes[..end], letter) {
                ([], _) => None,
                (piece, Some(letter)) if end == bytes.len() && is_white(bytes) => self.first_before(piece, letter),
                (piece, _) => self.first(piece),
            };
            first.map_or(-1, |id| id as i32)
        })
    }

    fn first_symbols(&self, bytes: &[u8], characters: bool) -> Vec<u32> {
        let one = |b: &u8| self.ids.get(&self.table, std::slice::from_ref(b));
        if !characters {
            return bytes.iter().filter_map(one).collect();
        }
        let mut symbols = Vec::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            let mut buffer = [0; 4];
            for character in chunk.valid().chars() {
                let bytes = character.encode_utf8(&mut buffer).as_bytes();
                match self.ids.get(&self.table, bytes) {
                    Some(id) => symbols.push(id),
                    None => symbols.extend(bytes.iter().filter_map(one)),
                }
            }
            symbols.extend(chunk.invalid().iter().filter_map(one));
        }
        symbols
    }

    fn best_path(&self, bytes: &[u8], scores: &[f32]) -> Vec<u32> {
        // best[k]: score of the best path to byte k, and its last token.
        let mut best: Vec<(f32, Option<(usize, u32)>)> = vec![(f32::NEG_INFINITY, None); bytes.len() + 1];
        best[0].0 = 0.0;
        for from in 0..bytes.len() {
            let score = best[from].0;
            // A byte that no token has costs more than any path.
            let mut offer = |to: usize, score: f32, id: Option<u32>| {
                if score > best[to].0 {
                    best[to] = (score, Some((from, id.unwrap_or(EMPTY))));
                }
            };
            for n in 1..=self.longest.min(bytes.len() - from) {
                if let Some(id) = self.id(&bytes[from..from + n]) {
                    offer(from + n, score + scores[id as usize], Some(id));
                }
            }
            offer(from + 1, score - 1e4, None);
        }
        let (mut all, mut at) = (vec![], bytes.len());
        while let Some((from, id)) = best[at].1 {
            if id != EMPTY {
                all.push(id);
            }
            at = from;
        }
        all.reverse();
        all
    }

    /// Runs the rule over every token's own bytes: how each is made.
    fn grow_trees(&mut self) {
        let Inner::Bpe(bpe) = &self.rule else { return };
        let v = self.table.len();
        let broken = pool::map(v, |id| {
            let bytes = self.table.bytes(id as u32);
            let added = || (0..bytes.len()).any(|at| self.added_at(bpe, &bytes[at..]).is_some());
            !bpe.is_added[id] && (self.id(bytes) != Some(id as u32) || added())
        });
        let made: Vec<(bool, Option<Made>)> = pool::map(v, |id| {
            let mut symbols = self.first_symbols(self.table.bytes(id as u32), bpe.characters);
            let last = bpe.merge(&mut symbols);
            if symbols == [id as u32] {
                (true, last)
            } else {
                (false, None)
            }
        });
        let (mut children, mut by_left) = (vec![vec![]; v], vec![vec![]; v]);
        for (id, made) in made.iter().enumerate() {
            if let Some(Made { left, rank, .. }) = made.1 {
                children[left as usize].push((rank, id as u32));
            }
        }
        for (&(left, right), &(rank, merged)) in &bpe.merges {
            by_left[left as usize].push((rank, right, merged));
        }
        pool::for_each(&mut by_left, 1, |_, list| list.sort_unstable());
        pool::for_each(&mut children, 1, |_, list| list.sort_unstable());
        let (mut order, mut span) = (Vec::with_capacity(v), vec![[0; 2]; v]);
        for root in (0..v as u32).filter(|&id| made[id as usize].1.is_none()) {
            // Tokens to enter, and tokens to leave again.
            let mut open = vec![(root, false)];
            while let Some((id, done)) = open.pop() {
                if done {
                    span[id as usize][1] = order.len() as u32;
                } else {
                    span[id as usize][0] = order.len() as u32;
                    order.push(id);
                    open.push((id, true));
                    open.extend(children[id as usize].iter().rev().map(|child| (child.1, false)));
                }
            }
        }
        let Inner::Bpe(bpe) = &mut self.rule else { return };
        (bpe.broken, bpe.order, bpe.span) = (broken, order, span);
        bpe.reachable = made.iter().map(|m| m.0).collect();
        bpe.made = made.into_iter().map(|m| m.1).collect();
        bpe.children = children;
        bpe.by_left = by_left;
    }

    /// Whether the encoding of the bytes of `s` followed by `z` does not begin with the token `s`.
    ///
    /// `next` is the first token of the encoding of `z`. The pre-tokenizer is asked about the pair (s, next), with a word
    /// or with nothing behind it.
    pub fn merges(&self, s: u32, z: &[u8], next: Option<u32>, behind: Behind) -> bool {
        match &self.rule {
            Inner::LongestMatch => {
                let mut text = self.table.bytes(s).to_vec();
                let own = text.len();
                text.extend_from_slice(z);
                let end = text.len().min(self.longest);
                (own + 1..=end).any(|n| self.id(&text[..n]).is_some())
            }
            Inner::Bpe(bpe) => next.is_some_and(|next| self.pair_merges(bpe, s, next, behind)),
            Inner::Unigram(scores) => {
                let mut text = self.table.bytes(s).to_vec();
                text.extend_from_slice(z);
                match next.and_then(|next| self.reach(s, next, behind)) {
                    Some(0) => false,
                    Some(Splits::INSIDE) => true,
                    _ => self.best_path(&text, scores).first() != Some(&s),
                }
            }
        }
    }

    /// Whether two neighbors are what the tokenizer would never put side by side.
    pub fn joined(&self, s: u32, next: u32, behind: Behind) -> bool {
        self.merges(s, self.table.bytes(next), Some(next), behind)
    }

    fn reach(&self, s: u32, next: u32, behind: Behind) -> Option<u8> {
        let splits = self.splits.as_ref()?;
        splits.row(s, behind)?.get(splits.after[next as usize] as usize).copied()
    }

    /// Two tokens stand side by side in an encoding if and only if the encoding of their bytes is these two: what
    /// follows does not matter (the invariant of github/rust-gems' bpe).
    fn pair_merges(&self, bpe: &Bpe, s: u32, next: u32, behind: Behind) -> bool {
        if !bpe.added.is_empty() {
            if self.rest_of_added(bpe, s).any(|rest| self.table.bytes(next).starts_with(rest)) {
                return true;
            }
            if bpe.is_added[s as usize] {
                return false;
            }
        }
        if bpe.never(s) {
            return true;
        }
        if bpe.is_added[next as usize] {
            return false;
        }
        match self.reach(s, next, behind) {
            Some(0) => false,
            Some(Splits::INSIDE) => true,
            None | Some(Splits::ALL) => self.crosses(bpe, s, next),
            Some(characters) => self.cut(next, characters).is_some_and(|cut| self.crosses(bpe, s, cut)),
        }
    }

    /// The first token of the first characters of a token.
    fn cut(&self, id: u32, characters: u8) -> Option<u32> {
        let bytes = self.table.bytes(id);
        let mut at = std::str::from_utf8(bytes).unwrap_or_default().char_indices();
        let at = if characters == Splits::ALL_BUT_LAST { at.next_back() } else { at.nth(characters as usize) };
        let end = at.map_or(bytes.len(), |(at, _)| at);
        if end == bytes.len() {
            Some(id)
        } else {
            self.first(&bytes[..end])
        }
    }

    /// [`Encoding::cut`] of all tokens of a class.
    fn cuts(&self, class: usize, characters: u8) -> Cut {
        let known = |all: &FxHashMap<(usize, u8), Cut>| all.get(&(class, characters)).cloned();
        let kept = self.cut.lock();
        if let Some(cuts) = kept.and_then(|kept| known(&*kept.read().ok()?)) {
            return cuts;
        }
        let cuts: Cut = Arc::new(self.in_class[class].iter().map(|&id| (id, self.cut(id, characters))).collect());
        if let Some(mut all) = kept.and_then(|kept| kept.write().ok()) {
            all.insert((class, characters), cuts.clone());
        }
        cuts
    }

    fn crosses(&self, bpe: &Bpe, s: u32, next: u32) -> bool {
        if bpe.whole {
            let mut text = self.table.bytes(s).to_vec();
            text.extend_from_slice(self.table.bytes(next));
            if self.id(&text).is_some() {
                return true;
            }
            if !bpe.reachable[s as usize] {
                return true;
            }
        }
        bpe.crosses(s, next)
    }

    /// The tokens `next` of this vocabulary for which `merges` is true, whatever `z` they begin; `None` where the rule
    /// does not depend on `next` alone.
    pub(crate) fn all_joined(&self, s: u32, behind: Behind) -> Option<Bits> {
        let Inner::Bpe(bpe) = &self.rule else { return None };
        let v = self.table.len();
        if bpe.never(s) && !bpe.is_added[s as usize] {
            return Some(Bits::full(v));
        }
        let mut all = Bits::new(v);
        if !bpe.is_added[s as usize] {
            self.join_merging(bpe, s, behind, &mut all);
        }
        let sorted = |range: [usize; 2]| self.sorted().order[range[0]..range[1]].iter().map(|&id| id as u32);
        for rest in self.rest_of_added(bpe, s) {
            for u in sorted(self.sorted().prefix_range(&self.table, rest)) {
                all.insert(u);
            }
        }
        Some(all)
    }

    /// Of [`Encoding::all_joined`] those with which the rule itself merges, for a token that is none of the added.
    fn join_merging(&self, bpe: &Bpe, s: u32, behind: Behind, all: &mut Bits) {
        let splits = self.splits.as_ref().and_then(|splits| Some((&splits.after, splits.row(s, behind)?)));
        // What merges in one piece.
        let mut across;
        if bpe.reachable[s as usize] {
            across = Bits::new(self.table.len());
            for [lo, hi] in bpe.crossing(s) {
                for &u in &bpe.order[lo as usize..hi as usize] {
                    across.insert(u);
                }
            }
            if bpe.whole {
                for u in self.completing(s) {
                    across.insert(u);
                }
            }
        } else {
            // It was a whole piece; nothing else can be in it.
            across = Bits::full(self.table.len());
        }
        match splits {
            None => *all = across,
            Some((after, reach)) => {
                for u in across.iter().filter(|&u| reach[after[u as usize] as usize] == Splits::ALL) {
                    all.insert(u);
                }
                for (class, &reach) in reach.iter().enumerate() {
                    match reach {
                        0 | Splits::ALL => {}
                        Splits::INSIDE => self.in_class[class].iter().for_each(|&u| all.insert(u)),
                        characters => {
                            let cuts = self.cuts(class, characters);
                            let crossing = |cut: &Option<u32>| cut.is_some_and(|cut| across.contains(cut));
                            cuts.iter().filter(|(_, cut)| crossing(cut)).for_each(|&(u, _)| all.insert(u));
                        }
                    }
                }
            }
        }
        for &id in &bpe.added {
            all.remove(id);
        }
    }

    /// The tokens that make a longer token of `s` when they come after it.
    fn completing(&self, s: u32) -> impl Iterator<Item = u32> + '_ {
        let own = self.table.bytes(s);
        let Sorted { order, range } = self.sorted();
        let [lo, hi] = self.sorted().prefix_range(&self.table, own);
        order[lo..hi].iter().flat_map(move |&longer| {
            let rest = &self.table.bytes(longer as u32)[own.len()..];
            let from = self.id(rest).map_or(order.len(), |id| range[id as usize][0] as usize);
            order[from..].iter().map(|&u| u as u32).take_while(move |&u| self.table.bytes(u) == rest)
        })
    }

    /// Whether both encode every text alike: the same tokens, ids apart from specials too, under the same rule.
    pub fn same_as(&self, other: &Self) -> bool {
        let rules = match (&self.rule, &other.rule) {
            (Inner::LongestMatch, Inner::LongestMatch) => true,
            (Inner::Bpe(a), Inner::Bpe(b)) => {
                a.merges == b.merges && a.characters == b.characters && a.whole == b.whole
            }
            (Inner::Unigram(a), Inner::Unigram(b)) => a == b,
            _ => false,
        };
        let splits = |e: &Self| e.splits.as_ref().map(|s| (s.reach.len(), s.width));
        let size = self.table.len().max(other.table.len()) as u32;
        rules && (0..size).all(|id| self.table.bytes(id) == other.table.bytes(id)) && splits(self) == splits(other)
    }

    /// Whether a list or a ranking of merges decides.
    pub(crate) fn is_bpe(&self) -> bool {
        matches!(self.rule, Inner::Bpe(_))
    }

    /// Whether a pre-tokenizer cuts a text before the rule sees it.
    pub(crate) fn is_split(&self) -> bool {
        self.splits.is_some()
    }

    /// Whether the longest-match rule decides.
    pub(crate) fn is_longest_match(&self) -> bool {
        matches!(self.rule, Inner::LongestMatch)
    }
}

/// The merges of a list, in order of rank.
fn listed(table: &ByteTable, merges: &[[u32; 3]]) -> Result<Merges, Error> {
    let mut all = FxHashMap::default();
    all.reserve(merges.len());
    for (rank, &[left, right, merged]) in merges.iter().enumerate() {
        if let Some(id) = [left, right, merged].into_iter().find(|&id| id as usize >= table.len()) {
            return Err(Error::Argument(format!(
                "merges[{rank}]: id {id} is outside the byte table of {} ids",
                table.len()
            )));
        }
        all.entry((left, right)).or_insert((rank as u32, merged));
    }
    Ok(all)
}

/// Every pair whose bytes together are a token, with that token's rank.
fn implied(table: &ByteTable, ids: &ByBytes, ranks: Option<&[u32]>) -> Result<Merges, Error> {
    if let Some(ranks) = ranks.filter(|ranks| ranks.len() != table.len()) {
        return Err(Error::Argument(format!("{} ranks for a byte table of {} ids", ranks.len(), table.len())));
    }
    let pairs = pool::flat_map(table.len(), |id| {
        let id = id as u32;
        let bytes = table.bytes(id);
        let rank = ranks.map_or(id, |ranks| ranks[id as usize]);
        // Of tokens with equal bytes one is ever made.
        let own = ids.get(table, bytes) == Some(id);
        (1..bytes.len()).filter(move |_| own).filter_map(move |cut| {
            let left = ids.get(table, &bytes[..cut])?;
            let right = ids.get(table, &bytes[cut..])?;
            Some(((left, right), (rank, id)))
        })
    });
    Ok(pairs.into_iter().collect())
}

impl Bpe {
    /// Merges until nothing merges; what the last merge was.
    fn merge(&self, symbols: &mut Vec<u32>) -> Option<Made> {
        let mut last = None;
        let mut ranks: Vec<Option<(u32, u32)>> =
            symbols.windows(2).map(|pair| self.merges.get(&(pair[0], pair[1])).copied()).collect();
        let rank = |r: &Option<(u32, u32)>| r.map_or(u32::MAX, |(rank, _)| rank);
        while let Some(at) = (0..ranks.len()).min_by_key(|&k| rank(&ranks[k])) {
            let Some((rank, merged)) = ranks[at] else { break };
            last = Some(Made { left: symbols[at], right: symbols[at + 1], rank });
            symbols[at] = merged;
            symbols.remove(at + 1);
            ranks.remove(at);
            for k in [at.checked_sub(1), Some(at)].into_iter().flatten().filter(|&k| k + 1 < symbols.len()) {
                ranks[k] = self.merges.get(&(symbols[k], symbols[k + 1])).copied();
            }
        }
        last
    }

    /// The tokens down the right edge of how `s` is made, each with the rank at which it is used up.
    fn right_edge(&self, s: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let mut next = Some((s, u32::MAX));
        std::iter::from_fn(move || {
            let (x, limit) = next?;
            next = self.made[x as usize].map(|made| (made.right, made.rank));
            Some((x, limit))
        })
    }

    fn left_edge(&self, u: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let mut next = Some((u, u32::MAX));
        std::iter::from_fn(move || {
            let (y, limit) = next?;
            next = self.made[y as usize].map(|made| (made.left, made.rank));
            Some((y, limit))
        })
    }

    /// Whether a merge across the boundary comes before the merges that use its two sides up inside `s` and `next`.
    /// Of equal ranks the one further left comes first.
    fn crosses(&self, s: u32, next: u32) -> bool {
        self.right_edge(s).any(|(x, x_limit)| {
            self.left_edge(next).any(|(y, y_limit)| {
                self.merges.get(&(x, y)).is_some_and(|&(rank, _)| rank < x_limit && rank <= y_limit)
            })
        })
    }

    /// Every token for which `crosses` is true: disjoint ranges of `order`.
    fn crossing(&self, s: u32) -> Vec<[u32; 2]> {
        let mut ranges = vec![];
        for (x, x_limit) in self.right_edge(s) {
            for &(rank, y, _) in self.by_left[x as usize].iter().take_while(|merge| merge.0 < x_limit) {
                let [at, end] = self.span[y as usize];
                ranges.push([at, at + 1]);
                let children = &self.children[y as usize];
                // What uses `y` up before this merge comes first, and the rest in one stretch.
                if let Some(child) = children.get(children.partition_point(|child| child.0 < rank)) {
                    ranges.push([self.span[child.1 as usize][0], end]);
                }
            }
        }
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let meets = next[0] <= last[1];
            if meets {
                last[1] = last[1].max(next[1]);
            }
            meets
        });
        ranges
    }

    /// Whether no encoding has this token where another follows in its piece.
    fn never(&self, s: u32) -> bool {
        self.broken[s as usize] || !(self.reachable[s as usize] || self.whole)
    }
}
