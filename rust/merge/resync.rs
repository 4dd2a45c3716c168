//! What happens when the bytes differ: how far the difference reaches, and where both sides agree again.
//!
//! Nothing here decides by bytes alone. Both sides are read as *units* (whole characters, or whole invalid sequences as
//! the side's decoder counts them) and every unit as *atoms*: its characters with compatibility forms, case,
//! combining marks and the look of white space taken away. What a normalizer or a lossy decode changes keeps its atoms, so
//! the walk along equal atoms finds where a changed stretch ends without a search, and agreement inside a
//! character is impossible. Only where the atoms differ too (inserted, deleted or replaced text) is there a search
//! ([`Edits`]).

use std::cmp::Ordering;
use std::collections::VecDeque;

use unicode_normalization::char::{canonical_combining_class, decompose_compatible};

use super::edits::{Edits, Run};
use crate::tokens::{Read, Tokens};

/// Combining marks or invisible characters with nothing before them to belong to.
const MARK: u32 = 0x0011_0000;
/// In the start of an atom: it is not the first of its unit, so that the text cannot be cut before it.
const INSIDE: u32 = 1 << 31;

/// The bytes of one side of a row, and its atoms.
struct Text<'a> {
    tokens: Tokens<'a>,
    bytes: Vec<u8>,
    /// The character of every atom.
    atoms: Vec<u32>,
    /// First byte of the unit of every atom, and [`INSIDE`]; `None`: every byte is an atom.
    starts: Option<Vec<u32>>,
    /// First byte of every unit that is no character, and how many bytes it has.
    invalid: Vec<(u32, u32)>,
    /// What `atom_at` found last.
    recent: usize,
}

impl<'a> Text<'a> {
    fn new(tokens: Tokens<'a>) -> Self {
        let bytes = tokens.text();
        if bytes.iter().all(|&byte| byte.is_ascii_graphic() || (byte.is_ascii() && char::from(byte).is_whitespace())) {
            let atom = |byte: &u8| u32::from(if byte.is_ascii_graphic() { byte.to_ascii_lowercase() } else { b' ' });
            let atoms = bytes.iter().map(atom).collect();
            return Self { tokens, bytes, atoms, starts: None, invalid: vec![], recent: 0 };
        }
        let mut atoms: Vec<u32> = Vec::with_capacity(bytes.len());
        let mut starts = Vec::with_capacity(bytes.len());
        let mut invalid = vec![];
        let mut at = 0;
        tokens.read(&bytes, |what| match what {
            Read::Text(text) => {
                for c in text.chars() {
                    if c.is_ascii_graphic() {
                        starts.push(at);
                        atoms.push(c.to_ascii_lowercase() as u32);
                    } else {
                        let before = atoms.len();
                        fold(c, |folded| {
                            starts.push(if atoms.len() == before { at } else { at | INSIDE });
                            atoms.push(folded as u32);
                        });
                        // Marks join the unit before them, if there is one.
                        if atoms.is_empty() {
                            starts.push(at);
                            atoms.push(MARK);
                        }
                    }
                    at += c.len_utf8() as u32;
                }
            }
            Read::Invalid(len) => {
                invalid.push((at, len as u32));
                starts.push(at);
                atoms.push(char::REPLACEMENT_CHARACTER as u32);
                at += len as u32;
            }
        });
        Self { tokens, bytes, atoms, starts: Some(starts), invalid, recent: 0 }
    }

    fn char(&self, p: usize) -> Option<u32> {
        self.atoms.get(p).copied()
    }

    /// The first atom at or after byte `x` before which the text can be cut. Calls mostly ask for later and later bytes.
    fn atom_at(&mut self, x: usize) -> usize {
        let Some(starts) = &self.starts else { return x };
        let starts_before = |start: u32| ((start & !INSIDE) as usize) < x;
        let mut p = self.recent;
        if p > 0 && starts.get(p - 1).is_none_or(|&start| !starts_before(start)) {
            p = starts.partition_point(|&start| starts_before(start));
        }
        while starts.get(p).is_some_and(|&start| starts_before(start)) || !self.cuts(p) {
            p += 1;
        }
        self.recent = p;
        p
    }

    /// The byte at which atom `p`'s unit starts; the end of the text after the last atom.
    fn byte(&self, p: usize) -> usize {
        let Some(starts) = &self.starts else { return p.min(self.bytes.len()) };
        starts.get(p).map_or(self.bytes.len(), |&start| (start & !INSIDE) as usize)
    }

    /// Whether the text can be cut before atom `p`.
    fn cuts(&self, p: usize) -> bool {
        self.starts.as_ref().and_then(|starts| starts.get(p)).is_none_or(|&start| start & INSIDE == 0)
    }

    /// White space and marks may be missing on the other side.
    fn may_skip(&self, p: usize) -> bool {
        self.char(p).is_some_and(|c| c == u32::from(' ') || c == MARK)
    }

    /// The character at byte `x`; `None` for a unit that is none, and at the end.
    fn char_at(&self, x: usize) -> Option<char> {
        if self.invalid_at(x).is_some() {
            return None;
        }
        let rest = &self.bytes[x..self.bytes.len().min(x + 4)];
        rest.utf8_chunks().next()?.valid().chars().next()
    }

    /// Bytes of the unit at `x` if it is no character.
    fn invalid_at(&self, x: usize) -> Option<usize> {
        let found = self.invalid.partition_point(|&(start, _)| start as usize <= x);
        let (start, len) = *self.invalid.get(found.checked_sub(1)?)?;
        (x < (start + len) as usize).then(|| (start + len) as usize - x)
    }

    /// Bytes of the unit at `x`; 0 at the end of the text.
    fn unit_len(&self, x: usize) -> usize {
        self.invalid_at(x).or_else(|| self.char_at(x).map(char::len_utf8)).unwrap_or(0)
    }

    /// Whether a white-space character is at `x`.
    fn is_space(&self, x: usize) -> bool {
        self.char_at(x).is_some_and(char::is_whitespace)
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

/// Resynchronization of one row.
///
/// Inside, the sides are in an order that does not depend on which of them is the student's, so that what is found does
/// not either.
pub(crate) struct Resync<'a> {
    s: Text<'a>,
    t: Text<'a>,
    swapped: bool,
    /// From these bytes on both sides have been equal so far.
    equal_from: (usize, usize),
    edits: Edits,
    /// What a search found and the walk has not come to yet.
    ahead: VecDeque<Run>,
}

impl<'a> Resync<'a> {
    /// Of two sides whose bytes differ first at `from`.
    pub fn new(s: Tokens<'a>, t: Tokens<'a>, from: (usize, usize)) -> Self {
        let (s, t) = (Text::new(s), Text::new(t));
        let swapped = s.bytes[from.0] > t.bytes[from.1];
        let (s, t) = if swapped { (t, s) } else { (s, t) };
        Self { s, t, swapped, equal_from: (0, 0), edits: Edits::default(), ahead: VecDeque::new() }
    }

    fn order<T>(&self, (s, t): (T, T)) -> (T, T) {
        if self.swapped {
            (t, s)
        } else {
            (s, t)
        }
    }

    /// The start, on both sides, of the first unit that differs, given the first byte that does.
    pub fn unit_start(&self, x: usize, y: usize) -> (usize, usize) {
        let (x, y) = self.order((x, y));
        self.order(self.start_of_unit(x, y))
    }

    /// The tokens with which the smallest chunk ends that starts at `tokens` and holds the difference at bytes `from`:
    /// `None` where the sides do not agree again, or not at the end of a token on both.
    pub fn next_common_end(&mut self, tokens: (usize, usize), from: (usize, usize)) -> Option<(usize, usize)> {
        let found = self.common_end_after(self.order(tokens), self.order(from))?;
        Some(self.order(found))
    }

    fn start_of_unit(&self, x: usize, y: usize) -> (usize, usize) {
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

    fn common_end_after(&mut self, tokens: (usize, usize), from: (usize, usize)) -> Option<(usize, usize)> {
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
            let next = self.start_of_unit(start_x + equal, start_y + equal);
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
        // The character opposite may be the one that was inserted.
        let (only_s, only_t) = (equal(past_s, y), equal(x, past_t));
        match only_s.cmp(&only_t) {
            Ordering::Greater if space_s && only_s > both => Some((past_s, y)),
            Ordering::Less if space_t && only_t > both => Some((x, past_t)),
            _ => None,
        }
    }

    /// From one common cut to the next, along equal atoms; the unit in between may differ in its bytes.
    fn next_cut(&mut self, mut p: usize, mut q: usize) -> Option<(usize, usize)> {
        loop {
            match (self.s.char(p), self.t.char(q)) {
                (a, b) if a == b && a.is_some() => (p, q) = (p + 1, q + 1),
                (a, b) => match self.skipped(p, q) {
                    Some(next) => (p, q) = next,
                    None if a.is_some() && b.is_some() => (p, q) = self.after_edit(p, q)?,
                    None => return None,
                },
            }
            if self.s.cuts(p) && self.t.cuts(q) {
                return Some((p, q));
            }
        }
    }

    /// Past white space or a mark that only one side has here, if that leads to more that is equal than an edit does.
    fn skipped(&self, p: usize, q: usize) -> Option<(usize, usize)> {
        let (skip_s, skip_t) = (self.s.may_skip(p), self.t.may_skip(q));
        if skip_s && skip_t {
            // Of a mark and white space the mark is passed.
            return Some(if self.s.char(p) > self.t.char(q) { (p + 1, q) } else { (p, q + 1) });
        }
        let equal = |p: usize, q: usize| {
            let (a, b) = (self.s.atoms.get(p..).unwrap_or_default(), self.t.atoms.get(q..).unwrap_or_default());
            a.iter().zip(b).take(8).take_while(|(x, y)| x == y).count()
        };
        // Not further, so that the walk along a row of spaces stays linear.
        let past = |text: &Text<'_>, p: usize| (p..p + 16).find(|&p| !text.may_skip(p)).unwrap_or(p);
        let (next, after, other) = match (skip_s, skip_t) {
            (true, _) => ((p + 1, q), (past(&self.s, p), q), (p, q + 1)),
            (_, true) => ((p, q + 1), (p, past(&self.t, q)), (p + 1, q)),
            _ => return None,
        };
        let ends = self.s.char(p).is_none() || self.t.char(q).is_none();
        let found = equal(after.0, after.1);
        let edited = (found == 0 && after != (p, q)) || equal(p + 1, q + 1).max(equal(other.0, other.1)) > found;
        (ends || !edited).then_some(next)
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
        for searched in [false, true] {
            while let Some(&Run { a, b, len }) = self.ahead.front() {
                // The walk may have left the path of the search, and come to a later place of it.
                let passed = p.saturating_sub(a).max(q.saturating_sub(b));
                let cuts = |k: usize| self.s.cuts(a + k) && self.t.cuts(b + k);
                if let Some(k) = (passed..len).find(|&k| cuts(k)) {
                    return Some((a + k, b + k));
                }
                self.ahead.pop_front();
            }
            if !searched {
                self.ahead.extend(self.edits.search(&self.s.atoms, &self.t.atoms, p, q));
            }
        }
        None
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
