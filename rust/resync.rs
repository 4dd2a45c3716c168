//! What happens when the bytes differ: how far the difference reaches, and where both sides agree again.
//!
//! Nothing here decides by bytes alone. Both sides are read as *units* (whole characters, or whole invalid sequences as
//! the side's decoder counts them) and every unit as *atoms*: its characters with compatibility forms, case,
//! combining marks and the look of white space taken away. What a normalizer or a lossy decode changes keeps its atoms, so
//! the walk along equal atoms finds where a changed stretch ends without a search, and agreement inside a
//! character is impossible. Only where the atoms differ too (inserted, deleted or replaced text) is there a search, first
//! for the shortest edit, then for a far block of equal text.

use std::cmp::Ordering;

use unicode_normalization::char::{canonical_combining_class, decompose_compatible};

use crate::align::Tokens;
use crate::Invalid;

/// Edits are searched up to this many inserted or deleted atoms, before far blocks are looked for.
const MAX_EDITS: usize = 256;
/// Atoms of a far block: two texts agree again where such a block is equal.
const BLOCK: usize = 32;

/// One atom of a text.
#[derive(Clone, Copy, Debug)]
struct Atom {
    char: u32,
    /// First byte of the unit.
    start: u32,
    /// Whether the atom is the first of its unit: text can be cut only there.
    first: bool,
}

/// Combining marks or invisible characters with nothing before them to belong to.
const MARK: u32 = 0x0011_0000;

/// The bytes of one side of a row, and its atoms.
struct Text<'a> {
    tokens: Tokens<'a>,
    bytes: Vec<u8>,
    invalid: Invalid,
    atoms: Vec<Atom>,
    /// What `atom_at` found last.
    recent: usize,
    /// (hash, first atom) of every block at a multiple of [`BLOCK`], sorted; made when first needed.
    blocks: Option<Vec<(u64, u32)>>,
}

impl<'a> Text<'a> {
    fn new(tokens: Tokens<'a>, invalid: Invalid) -> Self {
        let bytes = tokens.text();
        let mut atoms: Vec<Atom> = Vec::with_capacity(bytes.len());
        let mut at = 0;
        // Marks join the unit before them, if there is one.
        let mut alone = true;
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                let before = atoms.len();
                fold(c, |folded| {
                    atoms.push(Atom { char: folded as u32, start: at as u32, first: atoms.len() == before });
                });
                if atoms.len() == before && alone {
                    atoms.push(Atom { char: MARK, start: at as u32, first: true });
                }
                alone = false;
                at += c.len_utf8();
            }
            let size = match invalid {
                Invalid::Maximal => chunk.invalid().len().max(1),
                Invalid::Each => 1,
            };
            for part in chunk.invalid().chunks(size) {
                atoms.push(Atom { char: char::REPLACEMENT_CHARACTER as u32, start: at as u32, first: true });
                alone = false;
                at += part.len();
            }
        }
        Self { tokens, invalid, atoms, recent: 0, blocks: None, bytes }
    }

    fn char(&self, p: usize) -> Option<u32> {
        self.atoms.get(p).map(|atom| atom.char)
    }

    /// The first atom at or after byte `x` before which the text can be cut. Calls mostly ask for later and later bytes.
    fn atom_at(&mut self, x: usize) -> usize {
        let starts_before = |atom: &Atom| (atom.start as usize) < x;
        let mut p = self.recent;
        if p > 0 && self.atoms.get(p - 1).is_none_or(|atom| !starts_before(atom)) {
            p = self.atoms.partition_point(starts_before);
        }
        while self.atoms.get(p).is_some_and(starts_before) || !self.cuts(p) {
            p += 1;
        }
        self.recent = p;
        p
    }

    /// The byte at which atom `p`'s unit starts; the end of the text after the last atom.
    fn byte(&self, p: usize) -> usize {
        self.atoms.get(p).map_or(self.bytes.len(), |atom| atom.start as usize)
    }

    /// Whether the text can be cut before atom `p`.
    fn cuts(&self, p: usize) -> bool {
        self.atoms.get(p).is_none_or(|atom| atom.first)
    }

    /// White space and marks may be missing on the other side.
    fn may_skip(&self, p: usize) -> bool {
        self.char(p).is_some_and(|c| c == u32::from(' ') || c == MARK)
    }

    /// Bytes of the unit at `x`, at least 1 inside the text.
    fn unit_len(&self, x: usize) -> usize {
        let rest = &self.bytes[x..self.bytes.len().min(x + 4)];
        if rest.first().is_some_and(u8::is_ascii) {
            return 1;
        }
        match rest.utf8_chunks().next() {
            None => 0,
            Some(chunk) => match chunk.valid().chars().next() {
                Some(c) => c.len_utf8(),
                None if self.invalid == Invalid::Each => 1,
                None => chunk.invalid().len(),
            },
        }
    }

    /// Whether a white-space character is at `x`.
    fn is_space(&self, x: usize) -> bool {
        let unit = &self.bytes[x..x + self.unit_len(x)];
        std::str::from_utf8(unit).is_ok_and(|c| !c.is_empty() && c.trim().is_empty())
    }

    fn blocks(&mut self) -> &[(u64, u32)] {
        let atoms = &self.atoms;
        self.blocks.get_or_insert_with(|| {
            let starts = (0..atoms.len() / BLOCK).map(|k| k * BLOCK);
            let mut blocks: Vec<_> = starts
                .filter(|&p| says_something(&atoms[p..p + BLOCK]))
                .map(|p| (atoms[p..p + BLOCK].iter().fold(0, |hash, atom| roll(hash, atom.char)), p as u32))
                .collect();
            blocks.sort_unstable();
            blocks
        })
    }
}

/// The characters of `c` that survive a change of normal form, case or spacing; none for marks and invisible ones.
fn fold(c: char, mut push: impl FnMut(char)) {
    if c.is_ascii_graphic() {
        push(c.to_ascii_lowercase());
    } else if c.is_whitespace() || c == '\u{2581}' {
        push(' ');
    } else if c.is_ascii() || is_invisible(c) {
        // Control characters: some normalizers drop them.
    } else {
        decompose_compatible(c, |part| {
            if canonical_combining_class(part) == 0 {
                for lower in part.to_lowercase() {
                    match lower {
                        'ς' => push('σ'),
                        'ß' => ['s', 's'].into_iter().for_each(&mut push),
                        _ if lower.is_whitespace() => push(' '),
                        _ if canonical_combining_class(lower) == 0 => push(lower),
                        _ => {}
                    }
                }
            }
        });
    }
}

/// Format characters and variation selectors, which normalizers drop.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{2064}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}')
}

const BASE: u64 = 0x0100_0000_01b3;

fn roll(hash: u64, char: u32) -> u64 {
    hash.wrapping_mul(BASE).wrapping_add(u64::from(char) + 1)
}

/// A block of one or two characters (a row of spaces or dashes) is equal to too much.
fn says_something(block: &[Atom]) -> bool {
    let first = block[0].char;
    let other = block.iter().map(|atom| atom.char).find(|&c| c != first);
    block.iter().any(|atom| atom.char != first && Some(atom.char) != other)
}

/// Resynchronisation of one row.
pub(crate) struct Resync<'a> {
    s: Text<'a>,
    t: Text<'a>,
    /// From these bytes on both sides have been equal so far.
    equal_from: (usize, usize),
    /// What the search for short edits may still cost, so that a row stays linear.
    budget: usize,
}

impl<'a> Resync<'a> {
    pub fn new(s: Tokens<'a>, t: Tokens<'a>, student: Invalid, teacher: Invalid) -> Self {
        let (s, t) = (Text::new(s, student), Text::new(t, teacher));
        let budget = 4 * MAX_EDITS * MAX_EDITS + 16 * (s.atoms.len() + t.atoms.len());
        Self { s, t, equal_from: (0, 0), budget }
    }

    /// The start, on both sides, of the first unit that differs, given the first byte that does.
    pub fn unit_start(&self, x: usize, y: usize) -> (usize, usize) {
        if x == self.equal_from.0 || self.s.bytes[x - 1].is_ascii() {
            return (x, y);
        }
        // The bytes before are the same on both sides; an unfinished character at their end is part of the difference.
        let before = &self.s.bytes[self.equal_from.0.max(x.saturating_sub(3))..x];
        let lead = before.iter().rposition(|&b| b >= 0xC0).filter(|&k| {
            let need = match before[k] {
                0xC2..=0xDF => 2,
                0xE0..=0xEF => 3,
                0xF0..=0xF4 => 4,
                _ => 0,
            };
            before.len() - k < need && before[k + 1..].iter().all(|b| (0x80..0xC0).contains(b))
        });
        let back = lead.map_or(0, |k| before.len() - k);
        let (mut from_x, mut from_y) = (x - back, y - back);
        while from_x < x {
            let (a, b) = (self.s.unit_len(from_x), self.t.unit_len(from_y));
            if a != b || from_x + a > x {
                break;
            }
            (from_x, from_y) = (from_x + a, from_y + b);
        }
        (from_x, from_y)
    }

    /// The tokens with which the smallest chunk ends that starts at `tokens` and holds the difference at bytes `from`:
    /// `None` where the sides do not agree again, or not at the end of a token on both.
    pub fn next_common_end(&mut self, tokens: (usize, usize), from: (usize, usize)) -> Option<(usize, usize)> {
        let (mut ends_s, mut ends_t) = (Ends::new(self.s.tokens, tokens.0), Ends::new(self.t.tokens, tokens.1));
        let (mut x, mut y) = from;
        // `p` and `q` stand at the same place of the text.
        let (mut p, mut q) = (self.s.atom_at(x), self.t.atom_at(y));
        let mut fresh = true;
        loop {
            let space = if fresh { self.space_inserted(x, y) } else { None };
            fresh = false;
            let (to_x, to_y) = space.unwrap_or_else(|| (self.s.byte(p), self.t.byte(q)));
            if (to_x, to_y) == (x, y) {
                if p == self.s.atoms.len() && q == self.t.atoms.len() {
                    return None;
                }
                (p, q) = self.next_cut(p, q)?;
                continue;
            }
            // A changed stretch ends here; what both sides end it with has not changed.
            let kept = self.common_units_before((x, y), (to_x, to_y));
            let (start_x, start_y) = (to_x - kept, to_y - kept);
            let equal = common_prefix(&self.s.bytes[start_x..], &self.t.bytes[start_y..]);
            self.equal_from = (start_x, start_y);
            match Ends::common(&mut ends_s, &mut ends_t, (start_x, start_y), equal) {
                // A chunk holds at least one token.
                Some(end) if end != tokens => return Some(end),
                _ => {}
            }
            // No token ends between this stretch and the next one.
            let next = self.unit_start(start_x + equal, start_y + equal);
            (x, y) = (next.0.max(to_x), next.1.max(to_y));
            (p, q) = (self.s.atom_at(x), self.t.atom_at(y));
            fresh = true;
        }
    }

    /// Where both sides agree behind one white-space character that only one of them has here, and agree for longer than
    /// behind the pair of characters: the prefix space before a line end is no line end that became a space.
    fn space_inserted(&self, x: usize, y: usize) -> Option<(usize, usize)> {
        const ENOUGH: usize = 64;
        let (space_s, space_t) = (self.s.is_space(x), self.t.is_space(y));
        if !space_s && !space_t {
            return None;
        }
        let (past_s, past_t) = (x + self.s.unit_len(x), y + self.t.unit_len(y));
        let equal = |x: usize, y: usize| {
            let (a, b) = (&self.s.bytes[x..], &self.t.bytes[y..]);
            let equal = common_prefix(&a[..a.len().min(ENOUGH)], &b[..b.len().min(ENOUGH)]);
            // The first bytes of two characters say nothing.
            if equal < self.s.unit_len(x) {
                0
            } else {
                equal
            }
        };
        let both = equal(past_s, past_t);
        let only_s = if space_s { equal(past_s, y) } else { 0 };
        let only_t = if space_t { equal(x, past_t) } else { 0 };
        match only_s.cmp(&only_t) {
            Ordering::Greater if only_s > both => Some((past_s, y)),
            Ordering::Less if only_t > both => Some((x, past_t)),
            _ => None,
        }
    }

    /// From one common cut to the next, along equal atoms; the unit in between may differ in its bytes.
    fn next_cut(&mut self, mut p: usize, mut q: usize) -> Option<(usize, usize)> {
        loop {
            match (self.s.char(p), self.t.char(q)) {
                (a, b) if a == b && a.is_some() => (p, q) = (p + 1, q + 1),
                // The order of the sides must not matter: of a mark and white space, the mark is passed.
                (a, b) if self.s.may_skip(p) && (a > b || !self.t.may_skip(q)) => p += 1,
                _ if self.t.may_skip(q) => q += 1,
                (Some(_), Some(_)) => (p, q) = self.after_edit(p, q)?,
                _ => return None,
            }
            if self.s.cuts(p) && self.t.cuts(q) {
                return Some((p, q));
            }
        }
    }

    /// Bytes of the whole characters with which both stretches end.
    fn common_units_before(&self, from: (usize, usize), to: (usize, usize)) -> usize {
        let (a, b) = (&self.s.bytes[from.0..to.0], &self.t.bytes[from.1..to.1]);
        let mut kept = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
        while kept > 0 && (0x80..0xC0).contains(&a[a.len() - kept]) {
            kept -= 1;
        }
        kept
    }

    /// Where both sides agree again after text that is on one side only, or another text.
    fn after_edit(&mut self, p: usize, q: usize) -> Option<(usize, usize)> {
        // The order of the sides must not matter: the one with the smaller atom here goes first.
        let swap = self.s.char(p) > self.t.char(q);
        let (a, b) = if swap { (&mut self.t, &mut self.s) } else { (&mut self.s, &mut self.t) };
        let (from_a, from_b) = if swap { (q, p) } else { (p, q) };
        let (mut x, mut y) = match short_edit(&a.atoms[from_a..], &b.atoms[from_b..], &mut self.budget) {
            Search::Found(x, y) => (from_a + x, from_b + y),
            Search::Ended => return None,
            Search::TooFar => far_block(a, b, from_a, from_b)?,
        };
        while x > from_a && y > from_b && a.atoms[x - 1].char == b.atoms[y - 1].char {
            (x, y) = (x - 1, y - 1);
        }
        // A unit of several atoms may be half inside; the run that was found is longer than any of them.
        while !(a.cuts(x) && b.cuts(y)) {
            if a.char(x) != b.char(y) {
                return None;
            }
            (x, y) = (x + 1, y + 1);
        }
        Some(if swap { (y, x) } else { (x, y) })
    }
}

pub(crate) fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// The places at which a chunk may end on one side: before its first token, and after every token with bytes.
struct Ends<'a> {
    tokens: Tokens<'a>,
    /// One past the token that ends at `byte`.
    next: usize,
    byte: usize,
}

impl<'a> Ends<'a> {
    fn new(tokens: Tokens<'a>, first: usize) -> Self {
        Self { tokens, next: first, byte: tokens.start(first) }
    }

    /// To the first end at or after `byte`.
    fn seek(&mut self, byte: usize) -> Option<()> {
        while self.byte < byte {
            if self.next == self.tokens.len() {
                return None;
            }
            self.byte = self.tokens.end(self.next);
            self.next += 1;
        }
        Some(())
    }

    /// The first pair of ends that lie equally far, at most `equal` bytes, behind `start`.
    fn common(s: &mut Self, t: &mut Self, start: (usize, usize), equal: usize) -> Option<(usize, usize)> {
        s.seek(start.0)?;
        t.seek(start.1)?;
        loop {
            let (a, b) = (s.byte - start.0, t.byte - start.1);
            if a.max(b) > equal {
                return None;
            }
            if a == b {
                return Some((s.next, t.next));
            }
            if a < b {
                s.seek(start.0 + b)?;
            } else {
                t.seek(start.1 + a)?;
            }
        }
    }
}

enum Search {
    /// The first atoms of a run that is equal on both sides.
    Found(usize, usize),
    /// Both sides end without one.
    Ended,
    /// Nothing within reach.
    TooFar,
}

/// The shortest edit after which a long enough run is equal (Myers, "An O(ND) difference algorithm", 1986). What is long
/// enough grows with the edit: the more was skipped, the likelier an equal run by chance.
fn short_edit(a: &[Atom], b: &[Atom], budget: &mut usize) -> Search {
    const NONE: isize = isize::MIN / 2;
    let (n, m) = (a.len() as isize, b.len() as isize);
    let mid = MAX_EDITS + 1;
    // reach[mid + k]: the furthest atom of `a` on diagonal k = x - y.
    let mut reach = [NONE; 2 * MAX_EDITS + 3];
    reach[mid] = 0;
    for edits in 1..=MAX_EDITS as isize {
        if *budget < edits as usize {
            return Search::TooFar;
        }
        *budget -= edits as usize;
        let enough = (4 + 4 * edits).min(BLOCK as isize);
        for k in (-edits..=edits).step_by(2) {
            let at = mid.wrapping_add_signed(k);
            let (inserted, deleted) = (reach[at + 1], reach[at - 1] + 1);
            let inserted = if inserted - k <= m { inserted } else { NONE };
            let from = if deleted <= n { deleted.max(inserted) } else { inserted };
            reach[at] = from;
            if from < 0 {
                continue;
            }
            let (mut x, mut y) = (from, from - k);
            while x < n && y < m && x - from < enough && a[x as usize].char == b[y as usize].char {
                (x, y) = (x + 1, y + 1);
            }
            reach[at] = x;
            let (run, ended) = (x - from, x == n && y == m);
            if run >= enough || (ended && run > 0 && 4 * run >= edits) {
                return Search::Found(from as usize, (from - k) as usize);
            }
            if ended {
                return Search::Ended;
            }
        }
    }
    Search::TooFar
}

/// The nearest block of `b` that is equal to a stretch of `a`, wherever it lies (as rsync finds moved blocks).
fn far_block(a: &Text<'_>, b: &mut Text<'_>, from_a: usize, from_b: usize) -> Option<(usize, usize)> {
    b.blocks();
    let blocks = b.blocks.as_deref()?;
    if blocks.is_empty() || a.atoms.len() < from_a + BLOCK {
        return None;
    }
    // A bit for each hash: almost every position is refused here.
    let mut filter = vec![0u64; (blocks.len() / 8 + 1).next_power_of_two()];
    let bits = filter.len() * 64 - 1;
    let slot = |hash: u64| ((hash ^ (hash >> 29)) as usize) & bits;
    for &(hash, _) in blocks {
        filter[slot(hash) / 64] |= 1 << (slot(hash) % 64);
    }
    let out = (0..BLOCK).fold(1u64, |power, _| power.wrapping_mul(BASE));
    let mut hash = a.atoms[from_a..from_a + BLOCK].iter().fold(0, |hash, atom| roll(hash, atom.char));
    let mut best: Option<(usize, usize, usize)> = None;
    for x in from_a..=a.atoms.len() - BLOCK {
        if best.is_some_and(|(cost, ..)| x - from_a >= cost) {
            break;
        }
        if filter[slot(hash) / 64] & (1 << (slot(hash) % 64)) != 0 {
            let first = blocks.partition_point(|&block| block < (hash, from_b as u32));
            if let Some(&(found, y)) = blocks.get(first) {
                let y = y as usize;
                let equal = found == hash && (0..BLOCK).all(|k| a.atoms[x + k].char == b.atoms[y + k].char);
                let cost = x - from_a + (y - from_b.min(y));
                if equal && best.is_none_or(|(least, ..)| cost < least) {
                    best = Some((cost, x, y));
                }
            }
        }
        if let Some(next) = a.atoms.get(x + BLOCK) {
            hash = roll(hash, next.char).wrapping_sub(out.wrapping_mul(u64::from(a.atoms[x].char) + 1));
        }
    }
    best.map(|(_, x, y)| (x, y))
}
