//! Ids as the bytes that they spell.

use std::ops::Range;
use std::sync::Arc;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::error::{Error, Side};
use crate::rows::{Ids, Rows};
use crate::table::{ByteTable, Invalid};

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

    pub(crate) fn is_stop(self) -> bool {
        self == Self::STOP
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
        let of = |table: Arc<ByteTable>, symbols| Self { pieces: table.runs_of_pieces(), table, symbols };
        Ok((of(student, student_symbols), of(teacher, teacher_symbols), arena))
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

    /// The runs of tokens without bytes in which a turn ends.
    pub fn turn_ends(&self) -> Vec<TurnEnd> {
        let mut all: Vec<TurnEnd> = vec![];
        for (stop, symbol) in self.symbols.iter().enumerate() {
            if symbol.is_stop() && all.last().is_none_or(|last| last.to <= stop) {
                let from = self.symbols[..stop].iter().rposition(|s| s.len > 0).map_or(0, |last| last + 1);
                all.push(TurnEnd { from, stop, to: self.skip_special(stop) });
            }
        }
        all
    }

    /// The bytes that all tokens spell.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(self.symbols.iter().map(|symbol| symbol.len as usize).sum());
        (0..self.len()).for_each(|i| text.extend_from_slice(self.bytes(i)));
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

/// A run of tokens without bytes, `from..to`, and the first end of turn in it.
pub(crate) struct TurnEnd {
    pub from: usize,
    pub stop: usize,
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
