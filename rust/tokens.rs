//! Ids as the bytes that they spell.

use std::ops::Range;
use std::sync::Arc;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::error::{Error, Side};
use crate::rows::{Ids, Rows};
use crate::table::{ByteTable, Invalid, Role};

/// Zeros behind the bytes of all tokens, so that as many can be read from the start of any.
pub(crate) const PADDING: usize = 16;

/// A token as the merge sees it: where its bytes lie in the arena that both vocabularies share. Equal byte strings
/// lie at the same place, so that two tokens spell the same bytes if and only if their symbols are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Symbol {
    pub start: u32,
    pub len: u32,
}

impl Symbol {
    const SPECIAL: Self = Self { start: 0, len: 0 };
    pub(crate) const STOP: Self = Self { start: 1, len: 0 };
    /// A token of a marker that is not its first.
    const INSIDE: Self = Self { start: 2, len: 0 };
    /// The first token of a marker, and its role.
    const MARKER: u32 = 3;

    pub(crate) fn is_stop(self) -> bool {
        self == Self::STOP
    }

    /// The role of the marker that starts here.
    fn role(self) -> Option<Role> {
        let number = self.start.checked_sub(Self::MARKER).filter(|_| self.len == 0)?;
        Role::ALL.get(number as usize).map(|&(role, _)| role)
    }

    fn is_plain(self) -> bool {
        self.len == 0 && self.start <= Self::STOP.start
    }
}

/// Gives every token of a table its symbol; equal bytes get equal symbols across all tables that share `seen`.
fn intern<'a>(
    table: &'a ByteTable,
    arena: &mut Vec<u8>,
    seen: &mut FxHashMap<&'a [u8], Symbol>,
) -> Result<Vec<Symbol>, Error> {
    let mut symbols = Vec::with_capacity(table.len());
    for bytes in table.iter() {
        let symbol = if bytes.is_empty() {
            Symbol::SPECIAL
        } else if let Some(&symbol) = seen.get(bytes) {
            symbol
        } else {
            let start = u32::try_from(arena.len())
                .ok()
                .filter(|&s| u32::try_from(bytes.len()).is_ok_and(|n| s.checked_add(n).is_some()));
            let Some(start) = start else {
                return Err(Error::Argument(
                    "student and teacher vocabularies have 2^32 bytes or more together".to_owned(),
                ));
            };
            arena.extend_from_slice(bytes);
            let symbol = Symbol { start, len: bytes.len() as u32 };
            seen.insert(bytes, symbol);
            symbol
        };
        symbols.push(symbol);
    }
    for &id in table.stop_ids() {
        symbols[id as usize] = Symbol::STOP;
    }
    Ok(symbols)
}

/// One side's vocabulary as the merge sees it.
#[derive(Clone, Debug)]
pub(crate) struct Vocabulary {
    pub table: Arc<ByteTable>,
    pub symbols: Vec<Symbol>,
    /// Which tokens are byte pieces; empty where that does not matter.
    pieces: Vec<bool>,
    /// The table's markers by their first id, longer ones first.
    markers: FxHashMap<u32, Vec<usize>>,
}

impl Vocabulary {
    /// Both sides', and the bytes of all symbols.
    ///
    /// # Errors
    /// [`Error::Argument`] when both have 2^32 bytes or more.
    pub fn both(student: Arc<ByteTable>, teacher: Arc<ByteTable>) -> Result<(Self, Self, Vec<u8>), Error> {
        let mut arena = Vec::new();
        let (student_symbols, teacher_symbols) = {
            let mut seen = FxHashMap::with_capacity_and_hasher(student.len() + teacher.len(), FxBuildHasher);
            let mut symbols = |table| intern(table, &mut arena, &mut seen);
            (symbols(&*student)?, symbols(&*teacher)?)
        };
        let of = |table: Arc<ByteTable>, symbols| {
            let (pieces, markers) = (table.runs_of_pieces(), by_first_id(table.markers()));
            Self { table, symbols, pieces, markers }
        };
        Ok((of(student, student_symbols), of(teacher, teacher_symbols), arena))
    }

    /// The ids that a marker may start with.
    pub fn marker_starts(&self) -> impl Iterator<Item = u32> + '_ {
        self.markers.keys().copied()
    }

    /// The first id of a role's markers, if it says that this role begins and nothing else.
    pub fn first_of(&self, role: Role) -> Option<u32> {
        let all = self.table.markers();
        let (_, marker) = all.iter().find(|marker| marker.0 == role)?;
        let first = *marker.first()?;
        let alone = all.iter().all(|(other, ids)| (*other == role) == (ids.first() == Some(&first)));
        (alone && (marker.len() == 1 || self.table.bytes(first).is_empty())).then_some(first)
    }

    /// Gives the tokens of markers their roles, and takes their bytes, and those of what stands aside.
    fn mark(&self, id: impl Fn(usize) -> u32, symbols: &mut [Symbol], ends: &mut [i32]) {
        let (mut i, mut turn, mut aside, mut marked) = (0, 0, false, false);
        while i < symbols.len() {
            let fits = |&&k: &&usize| {
                let ids = &self.table.markers()[k].1;
                ids.len() <= symbols.len() - i && (0..ids.len()).all(|n| ids[n] == id(i + n))
            };
            let Some(&k) = self.markers.get(&id(i)).and_then(|some| some.iter().find(fits)) else {
                if symbols[i].is_stop() {
                    (turn, aside) = (i + 1, false);
                } else if aside {
                    symbols[i] = Symbol::SPECIAL;
                }
                i += 1;
                continue;
            };
            let (role, ids) = &self.table.markers()[k];
            let (mut from, mut to) = (i, i + ids.len());
            // New lines beside what stands aside are there for it.
            while *role == Role::AsideOpen && from > turn && self.table.is_new_lines(id(from - 1)) {
                from -= 1;
            }
            while *role == Role::AsideClose && to < symbols.len() && self.table.is_new_lines(id(to)) {
                to += 1;
            }
            match role {
                Role::AsideOpen => symbols[from..to].fill(Symbol::SPECIAL),
                Role::AsideClose => {
                    let from = if aside { i } else { turn };
                    symbols[from..to].fill(Symbol::SPECIAL);
                }
                _ => {
                    symbols[i..to].fill(Symbol::INSIDE);
                    symbols[i] = Symbol { start: Symbol::MARKER + *role as u32, len: 0 };
                }
            }
            aside = *role == Role::AsideOpen;
            (i, marked) = (to, true);
        }
        if marked {
            let mut bytes = 0;
            for (symbol, end) in symbols.iter().zip(ends) {
                bytes += symbol.len as i32;
                *end = bytes;
            }
        }
    }

    /// The `len` tokens of row `b`, looked up.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary, [`Error::RowTooLong`].
    pub fn tokens<'a>(
        &self,
        side: Side,
        rows: Rows<'_>,
        (b, len): (usize, usize),
        arena: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<Tokens<'a>, Error> {
        let Scratch { symbols, ends, pieces } = scratch;
        ends.resize(len, 0);
        let (ids, mask) = rows.row(b);
        let found = match ids {
            Ids::I32(ids) => resolve(ids, mask, &self.symbols, symbols, ends),
            Ids::I64(ids) => resolve(ids, mask, &self.symbols, symbols, ends),
            Ids::U32(ids) => resolve(ids, mask, &self.symbols, symbols, ends),
        };
        found.map_err(|error| match error {
            RowError::Id { position, id } => Error::TokenId { side, row: b, position, id, len: self.symbols.len() },
            RowError::TooLong { bytes } => Error::RowTooLong { side, row: b, bytes },
        })?;
        if !self.markers.is_empty() {
            match rows.given(b, len, &mut vec![]) {
                Ids::I32(ids) => self.mark(|i| ids[i] as u32, symbols, ends),
                Ids::I64(ids) => self.mark(|i| ids[i] as u32, symbols, ends),
                Ids::U32(ids) => self.mark(|i| ids[i], symbols, ends),
            }
        }
        pieces.clear();
        if !self.pieces.is_empty() {
            let flag = |id: i64| self.pieces[id as usize];
            match rows.given(b, len, &mut vec![]) {
                Ids::I32(ids) => pieces.extend(ids.iter().map(|&id| flag(id.into()))),
                Ids::I64(ids) => pieces.extend(ids.iter().map(|&id| flag(id))),
                Ids::U32(ids) => pieces.extend(ids.iter().map(|&id| flag(id.into()))),
            }
        }
        Ok(Tokens { symbols, ends, arena, base: 0, invalid: self.table.invalid(), pieces })
    }
}

fn by_first_id(markers: &[(Role, Vec<u32>)]) -> FxHashMap<u32, Vec<usize>> {
    let mut found: FxHashMap<u32, Vec<usize>> = FxHashMap::default();
    for (k, (_, ids)) in markers.iter().enumerate() {
        found.entry(ids[0]).or_default().push(k);
    }
    for some in found.values_mut() {
        some.sort_by_key(|&k| std::cmp::Reverse(markers[k].1.len()));
    }
    found
}

/// The tokens of a row; their memory is kept from row to row.
#[derive(Default)]
pub(crate) struct Scratch {
    symbols: Vec<Symbol>,
    ends: Vec<i32>,
    pieces: Vec<bool>,
}

/// Why a row of ids could not be read.
enum RowError {
    Id { position: usize, id: i64 },
    TooLong { bytes: u64 },
}

/// Looks every id up and sums the lengths: `symbols` and `ends` of one row.
fn resolve<T: Copy + Into<i64>>(
    ids: &[T],
    mask: Option<&[bool]>,
    table: &[Symbol],
    symbols: &mut Vec<Symbol>,
    ends: &mut [i32],
) -> Result<(), RowError> {
    symbols.clear();
    symbols.reserve(ends.len());
    let mut bytes = 0u64;
    let mut push = |position: usize, id: i64, end: &mut i32| {
        // A negative id becomes a huge one.
        let symbol = *table.get(id as usize).ok_or(RowError::Id { position, id })?;
        bytes += u64::from(symbol.len);
        // Wraps on a row that is too long, which is refused below.
        *end = bytes as i32;
        symbols.push(symbol);
        Ok(())
    };
    match mask {
        None => {
            for ((position, &id), end) in ids.iter().enumerate().zip(ends) {
                push(position, id.into(), end)?;
            }
        }
        Some(mask) => {
            let kept = ids.iter().enumerate().zip(mask).filter(|(_, &m)| m);
            for (((position, &id), _), end) in kept.zip(ends) {
                push(position, id.into(), end)?;
            }
        }
    }
    if bytes > i32::MAX as u64 {
        return Err(RowError::TooLong { bytes });
    }
    Ok(())
}

/// One side of one row.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub symbols: &'a [Symbol],
    /// Byte end of every token, counted in the row.
    pub ends: &'a [i32],
    pub arena: &'a [u8],
    /// Bytes of the row before the first of these tokens.
    pub base: i32,
    pub invalid: Invalid,
    /// Which of them are byte pieces; empty where that does not matter.
    pub pieces: &'a [bool],
}

impl<'a> Tokens<'a> {
    pub fn len(&self) -> usize {
        self.symbols.len()
    }

    pub fn bytes(&self, i: usize) -> &'a [u8] {
        let Symbol { start, len } = self.symbols[i];
        &self.arena[start as usize..(start + len) as usize]
    }

    /// The byte at which token `i` starts, counted from the first of these tokens.
    pub fn start(&self, i: usize) -> usize {
        if i == 0 {
            0
        } else {
            self.end(i - 1)
        }
    }

    pub fn end(&self, i: usize) -> usize {
        (self.ends[i] - self.base) as usize
    }

    pub fn slice(&self, range: Range<usize>) -> Self {
        let base = if range.start == 0 { 0 } else { self.ends[range.start - 1] };
        let pieces = self.pieces.get(range.clone()).unwrap_or_default();
        Self { symbols: &self.symbols[range.clone()], ends: &self.ends[range], base, pieces, ..*self }
    }

    /// The runs of tokens without bytes, markers apart, in which a turn ends.
    pub fn turn_ends(&self) -> Vec<TurnEnd> {
        let mut all: Vec<TurnEnd> = vec![];
        for (stop, symbol) in self.symbols.iter().enumerate() {
            if symbol.is_stop() && all.last().is_none_or(|last| last.to <= stop) {
                let from = self.symbols[..stop].iter().rposition(|s| !s.is_plain()).map_or(0, |last| last + 1);
                let plain = self.symbols[stop..].iter().take_while(|s| s.is_plain()).count();
                all.push(TurnEnd { from, stop, to: stop + plain });
            }
        }
        all
    }

    /// The markers, in order.
    pub fn markers(&self) -> Vec<Marker> {
        let marker = |from: usize| {
            let role = self.symbols[from].role()?;
            let inside = self.symbols[from + 1..].iter().take_while(|&&s| s == Symbol::INSIDE).count();
            Some(Marker { role, from, to: from + 1 + inside })
        };
        (0..self.len()).filter_map(marker).collect()
    }

    /// What the tokenizer's decoder spells before, between and after ends of turns (`None`) and markers, and which these
    /// are: one text more than there are of them.
    pub fn split(&self) -> (Vec<String>, Vec<Option<Role>>) {
        // Most have bytes, and are no more than looked at.
        let cut = |i: usize| match self.symbols[i] {
            Symbol { len: 1.., .. } => None,
            Symbol::STOP => Some((i, None)),
            symbol => symbol.role().map(|role| (i, Some(role))),
        };
        let cuts: Vec<(usize, Option<Role>)> = (0..self.len()).filter_map(cut).collect();
        let (starts, ends) = (cuts.iter().map(|cut| cut.0 + 1), cuts.iter().map(|cut| cut.0));
        let parts = std::iter::once(0).chain(starts).zip(ends.chain([self.len()]));
        (parts.map(|(from, to)| self.slice(from..to).decoded()).collect(), cuts.iter().map(|cut| cut.1).collect())
    }

    /// The bytes that all tokens spell.
    pub fn text(&self) -> Vec<u8> {
        let all: usize = self.symbols.iter().map(|symbol| symbol.len as usize).sum();
        let mut text = vec![0; all + PADDING];
        let mut at = 0;
        for &Symbol { start, len } in self.symbols {
            let (start, len) = (start as usize, len as usize);
            let to = text[at..].first_chunk_mut::<PADDING>();
            match (to, self.arena[start..].first_chunk()) {
                // A copy of a known size is one move. What is too much of it, the next token overwrites.
                (Some(to), Some(from)) if len <= PADDING => *to = *from,
                _ => text[at..at + len].copy_from_slice(&self.arena[start..start + len]),
            }
            at += len;
        }
        text.truncate(all);
        text
    }

    /// What the tokenizer's decoder reads in `text`, the bytes of all tokens.
    pub fn read<'t>(&self, text: &'t [u8], mut push: impl FnMut(Read<'t>)) {
        if self.pieces.is_empty() {
            return read(text, self.invalid, push);
        }
        // Runs of byte pieces, and what is between them; what has no bytes parts nothing.
        let (mut start, mut end, mut in_run) = (0, 0, false);
        let mut read_run = |run: &'t [u8], of_pieces: bool| match std::str::from_utf8(run) {
            Err(_) if of_pieces => run.iter().for_each(|_| push(Read::Invalid(1))),
            _ => read(run, Invalid::Maximal, &mut push),
        };
        for (symbol, &piece) in self.symbols.iter().zip(self.pieces) {
            if symbol.len > 0 && piece != in_run {
                read_run(&text[start..end], in_run);
                (start, in_run) = (end, piece);
            }
            end += symbol.len as usize;
        }
        read_run(&text[start..end], in_run);
    }

    /// What the tokenizer's decoder spells.
    pub fn decoded(&self) -> String {
        match String::from_utf8(self.text()) {
            // Then every run of byte pieces is UTF-8, too: what is around it is.
            Ok(text) => text,
            Err(error) => {
                let mut text = String::with_capacity(error.as_bytes().len() + 8);
                self.read(error.as_bytes(), |what| match what {
                    Read::Text(valid) => text.push_str(valid),
                    Read::Invalid(_) => text.push(char::REPLACEMENT_CHARACTER),
                });
                text
            }
        }
    }

    /// The first token at or after `i` that has bytes.
    pub fn skip_special(&self, mut i: usize) -> usize {
        while i < self.len() && self.symbols[i].len == 0 {
            i += 1;
        }
        i
    }
}

/// A run of tokens without bytes and without markers, `from..to`, and the first end of turn in it.
pub(crate) struct TurnEnd {
    pub from: usize,
    pub stop: usize,
    pub to: usize,
}

/// The tokens `from..to` of a marker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marker {
    pub role: Role,
    pub from: usize,
    pub to: usize,
}

/// What a decoder reads.
pub(crate) enum Read<'a> {
    Text(&'a str),
    /// Bytes that become one U+FFFD.
    Invalid(usize),
}

/// Bytes as a decoder with this rule reads them.
fn read<'a>(bytes: &'a [u8], invalid: Invalid, mut push: impl FnMut(Read<'a>)) {
    for chunk in bytes.utf8_chunks() {
        push(Read::Text(chunk.valid()));
        let rest = chunk.invalid().len();
        match invalid {
            Invalid::Each => (0..rest).for_each(|_| push(Read::Invalid(1))),
            Invalid::Maximal | Invalid::Run if rest > 0 => push(Read::Invalid(rest)),
            Invalid::Maximal | Invalid::Run => {}
        }
    }
}
