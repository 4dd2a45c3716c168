//! The two-pointer merge of token ends, verified byte by byte; one row or a ragged batch.

use std::ops::Range;
use std::sync::Arc;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::batch::{Code, Halt, Job, Out, Room};
use crate::byte_table::{read, Read};
use crate::clean::{Word, PADDING};
use crate::resync::{common_prefix, Resync};
use crate::{pool, ByteTable, Error, Invalid, Mismatch, Side};

/// What the two sides of a chunk are to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The same token on both sides.
    OneToOne = 0,
    /// One student token, several teacher tokens.
    OneToMany = 1,
    /// Several student tokens, one teacher token.
    ManyToOne = 2,
    /// Several tokens on both sides, with no common end between them.
    ManyToMany = 3,
    /// The bytes differ: a normalizer, a lossy decode or an edit changed them.
    Rewritten = 4,
    /// End of turn on both sides, whatever the ids.
    Stop = 5,
}

impl Kind {
    pub(crate) fn of(students: usize, teachers: usize) -> Self {
        match (students, teachers) {
            (1, 1) => Self::OneToOne,
            (1, _) => Self::OneToMany,
            (_, 1) => Self::ManyToOne,
            _ => Self::ManyToMany,
        }
    }
}

/// Token ids as they come; nothing is copied.
#[derive(Clone, Copy, Debug)]
pub enum Ids<'a> {
    /// `int32`
    I32(&'a [i32]),
    /// `int64`
    I64(&'a [i64]),
    /// `uint32`
    U32(&'a [u32]),
}

impl<'a> Ids<'a> {
    /// Some of them.
    fn slice(self, range: Range<usize>) -> Ids<'a> {
        match self {
            Ids::I32(x) => Ids::I32(&x[range]),
            Ids::I64(x) => Ids::I64(&x[range]),
            Ids::U32(x) => Ids::U32(&x[range]),
        }
    }

    fn len(&self) -> usize {
        match self {
            Ids::I32(x) => x.len(),
            Ids::I64(x) => x.len(),
            Ids::U32(x) => x.len(),
        }
    }
}

/// How the rows of a batch lie in the flat ids.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// Row `b` is `ids[cu[b]..cu[b + 1]]`.
    Ragged(&'a [i64]),
    /// Row `b` is where `mask` is true in `ids[b * width..(b + 1) * width]`.
    Padded {
        /// Length of every row.
        width: usize,
        /// One flag for each id.
        mask: &'a [bool],
    },
}

/// The rows of one side of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    ids: Ids<'a>,
    layout: Layout<'a>,
    len: usize,
}

impl<'a> Rows<'a> {
    /// Rows over flat ids.
    ///
    /// # Errors
    /// [`Error::Argument`] when the layout does not fit the ids.
    pub fn new(ids: Ids<'a>, layout: Layout<'a>) -> Result<Self, Error> {
        let len = match layout {
            Layout::Ragged(cu) => {
                let total = ids.len() as i64;
                let wrong = |found: String| {
                    Err(Error::Argument(format!("cu_seqlens must rise from 0 to the number of ids ({total}), {found}")))
                };
                match (cu.first(), cu.last()) {
                    (Some(&0), Some(&last)) if last == total => {}
                    (Some(first), Some(last)) => return wrong(format!("not from {first} to {last}")),
                    _ => return wrong("not be empty".to_owned()),
                }
                if let Some(k) = cu.windows(2).position(|w| w[0] > w[1]) {
                    return wrong(format!("but entry {} is {} after {}", k + 1, cu[k + 1], cu[k]));
                }
                cu.len() - 1
            }
            Layout::Padded { width, mask } => {
                if mask.len() != ids.len() || (width == 0 && !mask.is_empty()) || (width > 0 && mask.len() % width != 0)
                {
                    return Err(Error::Argument(format!(
                        "a mask of {} flags in rows of {width} does not fit {} ids",
                        mask.len(),
                        ids.len()
                    )));
                }
                mask.len().checked_div(width).unwrap_or(0)
            }
        };
        Ok(Self { ids, layout, len })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn row(&self, b: usize) -> (Range<usize>, Option<&'a [bool]>) {
        match self.layout {
            Layout::Ragged(cu) => (cu[b] as usize..cu[b + 1] as usize, None),
            Layout::Padded { width, mask } => {
                let range = b * width..(b + 1) * width;
                (range.clone(), Some(&mask[range]))
            }
        }
    }

    /// The `len` ids of row `b`, padding left out: in one piece as they are, otherwise gathered into `scratch`.
    pub(crate) fn given<'s>(&self, b: usize, len: usize, scratch: &'s mut Vec<i64>) -> Ids<'s>
    where
        'a: 's,
    {
        let (range, mask) = self.row(b);
        let Some(mask) = mask else { return self.ids.slice(range) };
        let first = mask.iter().position(|&m| m).unwrap_or(0);
        if count(&mask[first..first + len]) == len {
            return self.ids.slice(range.start + first..range.start + first + len);
        }
        scratch.clear();
        let kept = (range.zip(mask)).filter_map(|(k, &m)| m.then_some(k));
        match self.ids {
            Ids::I32(x) => scratch.extend(kept.map(|k| i64::from(x[k]))),
            Ids::I64(x) => scratch.extend(kept.map(|k| x[k])),
            Ids::U32(x) => scratch.extend(kept.map(|k| i64::from(x[k]))),
        }
        Ids::I64(scratch)
    }

    /// Cumulative number of tokens, padding left out.
    pub(crate) fn cu(&self) -> Vec<i64> {
        let mut total = 0;
        let lengths = (0..self.len).map(|b| match self.row(b) {
            (range, None) => range.len(),
            (_, Some(mask)) => count(mask),
        });
        std::iter::once(0)
            .chain(lengths.map(|n| {
                total += n as i64;
                total
            }))
            .collect()
    }
}

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

    fn slice(&self, range: Range<usize>) -> Self {
        let base = if range.start == 0 { 0 } else { self.ends[range.start - 1] };
        let pieces = self.pieces.get(range.clone()).unwrap_or_default();
        Self { symbols: &self.symbols[range.clone()], ends: &self.ends[range], base, pieces, ..*self }
    }

    /// The runs of tokens without bytes in which a turn ends.
    fn turn_ends(&self) -> Vec<TurnEnd> {
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
    fn decoded(&self) -> String {
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
    fn skip_special(&self, mut i: usize) -> usize {
        while i < self.len() && self.symbols[i].len == 0 {
            i += 1;
        }
        i
    }
}

/// A run of tokens without bytes, `from..to`, and the first end of turn in it.
struct TurnEnd {
    from: usize,
    stop: usize,
    to: usize,
}

/// The alignment of one row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Alignment {
    /// Chunk `g` starts at student token `student_ptr[g]`; `G + 1` entries.
    pub student_ptr: Vec<i32>,
    /// Chunk `g` starts at teacher token `teacher_ptr[g]`; `G + 1` entries.
    pub teacher_ptr: Vec<i32>,
    /// Kind of every chunk.
    pub kind: Vec<Kind>,
    /// Chunk of every student token, -1 where unaligned.
    pub student_chunk: Vec<i32>,
    /// Chunk of every teacher token, -1 where unaligned.
    pub teacher_chunk: Vec<i32>,
    /// Byte end of every student token in the student's bytes.
    pub student_end: Vec<i32>,
    /// Byte end of every teacher token in the teacher's bytes.
    pub teacher_end: Vec<i32>,
    /// The teacher token in which every student token starts, -1 where that is not known.
    pub teacher_pos: Vec<i32>,
    /// The byte inside that teacher token, -1 where that is not known.
    pub teacher_off: Vec<i32>,
    /// Where the student's and the teacher's tokens start, if they leave gaps or overlap (`align_offsets`): both count
    /// in the same text. `None`: every token starts where the one before it ends.
    pub starts: Option<Box<(Vec<i32>, Vec<i32>)>>,
}

impl Alignment {
    /// Whether the fields fit each other, so that nothing reads outside them.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the side that does not fit.
    pub fn check(&self) -> Result<(), Error> {
        let chunks = self.kind.len();
        let starts = self.starts.as_deref();
        let student = (&self.student_ptr, &self.student_chunk, &self.student_end, starts.map(|s| &s.0));
        let teacher = (&self.teacher_ptr, &self.teacher_chunk, &self.teacher_end, starts.map(|s| &s.1));
        for (side, (ptr, chunk, end, start)) in [(Side::Student, student), (Side::Teacher, teacher)] {
            let sorted = |x: &[i32]| x.first().is_none_or(|&first| first >= 0) && x.windows(2).all(|w| w[0] <= w[1]);
            let fits = ptr.len() == chunks + 1
                && end.len() == chunk.len()
                && sorted(ptr)
                && sorted(end)
                && start.is_none_or(|start| start.len() == end.len() && sorted(start))
                && ptr.last().is_none_or(|&last| last as usize <= chunk.len())
                && chunk.iter().all(|&g| g < chunks as i32);
            if !fits {
                return Err(Error::Argument(format!(
                    "{side}_ptr, {side}_chunk and {side}_end do not fit {chunks} chunks"
                )));
            }
        }
        Ok(())
    }
}

/// The alignments of a batch, flat: row after row, values local to the row.
///
/// `student_ptr` and `teacher_ptr` hold `G_b + 1` entries for row `b`, at `chunk_cu[b] + b`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// All rows' fields.
    pub flat: Alignment,
    /// Student tokens before each row; `B + 1` entries.
    pub student_cu: Vec<i64>,
    /// Teacher tokens before each row; `B + 1` entries.
    pub teacher_cu: Vec<i64>,
    /// Chunks before each row; `B + 1` entries.
    pub chunk_cu: Vec<i64>,
}

/// Aligns the ids of two vocabularies.
#[derive(Clone, Debug)]
pub struct Aligner {
    student: Arc<ByteTable>,
    teacher: Arc<ByteTable>,
    /// The bytes of all symbols, and zeros (`PADDING`).
    pub(crate) arena: Vec<u8>,
    student_symbols: Vec<Symbol>,
    teacher_symbols: Vec<Symbol>,
    /// The same in less memory, for rows that spell the same bytes.
    pub(crate) student_words: Vec<Word>,
    pub(crate) teacher_words: Vec<Word>,
    /// Which tokens are byte pieces; empty where that does not matter.
    student_pieces: Vec<bool>,
    teacher_pieces: Vec<bool>,
}

impl Aligner {
    /// An aligner for a student's and a teacher's vocabulary.
    ///
    /// # Errors
    /// [`Error::Argument`] when both vocabularies together have 2^32 bytes or more.
    pub fn new(student: impl Into<Arc<ByteTable>>, teacher: impl Into<Arc<ByteTable>>) -> Result<Self, Error> {
        let (student, teacher) = (student.into(), teacher.into());
        let mut arena = Vec::new();
        let (student_symbols, teacher_symbols) = {
            let mut seen = FxHashMap::with_capacity_and_hasher(student.len() + teacher.len(), FxBuildHasher);
            let mut symbols = |table| intern(table, &mut arena, &mut seen);
            (symbols(&*student)?, symbols(&*teacher)?)
        };
        arena.extend([0; PADDING]);
        let (student_words, teacher_words) = (Word::all(&student_symbols, 0), Word::all(&teacher_symbols, 1));
        let (student_pieces, teacher_pieces) = (student.runs_of_pieces(), teacher.runs_of_pieces());
        Ok(Self {
            student,
            teacher,
            arena,
            student_symbols,
            teacher_symbols,
            student_words,
            teacher_words,
            student_pieces,
            teacher_pieces,
        })
    }

    /// The student's byte table.
    pub fn student(&self) -> &Arc<ByteTable> {
        &self.student
    }

    /// The teacher's byte table.
    pub fn teacher(&self) -> &Arc<ByteTable> {
        &self.teacher
    }

    /// Aligns one row.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside its vocabulary.
    pub fn align(&self, student: &[u32], teacher: &[u32]) -> Result<Alignment, Error> {
        let (student_cu, teacher_cu) = ([0, student.len() as i64], [0, teacher.len() as i64]);
        let student = Rows::new(Ids::U32(student), Layout::Ragged(&student_cu))?;
        let teacher = Rows::new(Ids::U32(teacher), Layout::Ragged(&teacher_cu))?;
        Ok(self.align_batch(student, teacher, false)?.flat)
    }

    /// Aligns a batch, its rows over the rayon pool that this is called in, or else over one of the crate's own that has
    /// `RAYON_NUM_THREADS` threads, or as many as there are cores. With `strict`, bytes that differ are an error.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside its vocabulary, [`Error::RowTooLong`], [`Error::ByteMismatch`] where
    /// `strict`, [`Error::Argument`] when the sides have another number of rows. The first row in order decides.
    pub fn align_batch(&self, student: Rows<'_>, teacher: Rows<'_>, strict: bool) -> Result<Batch, Error> {
        let mut batch = Batch::default();
        self.align_batch_into(student, teacher, strict, &mut batch)?;
        Ok(batch)
    }

    /// As [`Aligner::align_batch`], in the memory of an earlier batch: fresh pages cost several times the alignment.
    ///
    /// # Errors
    /// As [`Aligner::align_batch`]; the batch is empty then.
    pub fn align_batch_into(
        &self,
        student: Rows<'_>,
        teacher: Rows<'_>,
        strict: bool,
        batch: &mut Batch,
    ) -> Result<(), Error> {
        let mut flat = std::mem::take(batch).flat;
        flat.starts = None;
        let job = Job::new(self, student, teacher, strict)?;
        let mut room = Room::Usual;
        let chunk_cu = loop {
            let sizes = job.sizes(room);
            for (array, len) in [
                (&mut flat.student_ptr, sizes.room),
                (&mut flat.teacher_ptr, sizes.room),
                (&mut flat.student_chunk, sizes.students),
                (&mut flat.teacher_chunk, sizes.teachers),
                (&mut flat.student_end, sizes.students),
                (&mut flat.teacher_end, sizes.teachers),
                (&mut flat.teacher_pos, sizes.students),
                (&mut flat.teacher_off, sizes.students),
            ] {
                resize(array, len, 0);
            }
            resize(&mut flat.kind, sizes.room, Kind::OneToOne);
            let out = Out {
                student_end: &mut flat.student_end,
                teacher_end: &mut flat.teacher_end,
                student_chunk: &mut flat.student_chunk,
                teacher_chunk: &mut flat.teacher_chunk,
                teacher_pos: &mut flat.teacher_pos,
                teacher_off: &mut flat.teacher_off,
                student_ptr: &mut flat.student_ptr,
                teacher_ptr: &mut flat.teacher_ptr,
                kind: &mut flat.kind,
            };
            match job.run(out, room) {
                Ok(chunk_cu) => break chunk_cu,
                Err(Halt::Full) => room = Room::All,
                Err(Halt::Error(error)) => return Err(error),
            }
        };
        let chunks = total(&chunk_cu);
        flat.student_ptr.truncate(chunks + student.len());
        flat.teacher_ptr.truncate(chunks + student.len());
        flat.kind.truncate(chunks);
        *batch = Batch { flat, student_cu: job.student_cu, teacher_cu: job.teacher_cu, chunk_cu };
        Ok(())
    }

    /// What the decoder of `side`'s tokenizer spells before, between and after the end-of-turn tokens of every row:
    /// one text more than the row has such tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary.
    pub fn decode_lossy(&self, side: Side, rows: Rows<'_>) -> Result<Vec<Vec<String>>, Error> {
        let (symbols, table, flags) = match side {
            Side::Student => (&self.student_symbols, &self.student, &self.student_pieces),
            Side::Teacher => (&self.teacher_symbols, &self.teacher, &self.teacher_pieces),
        };
        let cu = rows.cu();
        let decode = |(scratch, ends): &mut (Vec<Symbol>, Vec<i32>), b: usize| {
            let (range, mask) = rows.row(b);
            let len = (cu[b + 1] - cu[b]) as usize;
            ends.resize(len, 0);
            resolve(rows.ids, range, mask, symbols, scratch, ends).map_err(|e| e.at(side, b, symbols.len()))?;
            let pieces = flagged(rows.given(b, len, &mut vec![]), flags);
            let invalid = table.invalid();
            let tokens = Tokens { symbols: scratch, ends, arena: &self.arena, base: 0, invalid, pieces: &pieces };
            let mut from = 0;
            let stops = (0..len).filter(|&i| tokens.symbols[i].is_stop()).chain([len]);
            Ok(stops.map(|stop| tokens.slice(std::mem::replace(&mut from, stop + 1)..stop).decoded()).collect())
        };
        pool::map_with(rows.len(), Default::default, decode).into_iter().collect()
    }

    /// Aligns row `b`, whatever its bytes, and returns its number of chunks.
    pub(crate) fn align_row<K: Code>(
        &self,
        b: usize,
        student: Rows<'_>,
        teacher: Rows<'_>,
        strict: bool,
        scratch: &mut Scratch,
        row: &mut Out<'_, K>,
    ) -> Result<usize, Halt> {
        for unaligned in [&mut *row.student_chunk, row.teacher_chunk, row.teacher_pos, row.teacher_off] {
            unaligned.fill(-1);
        }
        let (student_end, teacher_end) = (&mut *row.student_end, &mut *row.teacher_end);
        let mut out = RowOut {
            student_chunk: row.student_chunk,
            teacher_pos: row.teacher_pos,
            teacher_off: row.teacher_off,
            teacher_chunk: row.teacher_chunk,
        };
        let Scratch { student: s, teacher: t } = scratch;
        let (range, mask) = student.row(b);
        resolve(student.ids, range, mask, &self.student_symbols, s, student_end)
            .map_err(|e| e.at(Side::Student, b, self.student.len()))?;
        let (range, mask) = teacher.row(b);
        resolve(teacher.ids, range, mask, &self.teacher_symbols, t, teacher_end)
            .map_err(|e| e.at(Side::Teacher, b, self.teacher.len()))?;
        let (m, n) = (s.len(), t.len());
        let pieces_s = flagged(student.given(b, m, &mut vec![]), &self.student_pieces);
        let pieces_t = flagged(teacher.given(b, n, &mut vec![]), &self.teacher_pieces);
        let tokens = |symbols, ends, pieces, table: &ByteTable| Tokens {
            symbols,
            ends,
            arena: &self.arena,
            base: 0,
            invalid: table.invalid(),
            pieces,
        };
        let s = tokens(s, student_end, &pieces_s, &self.student);
        let t = tokens(t, teacher_end, &pieces_t, &self.teacher);
        let mut chunks = Chunks::with_capacity(s.len().min(t.len()));
        let mut merge = |students: Range<usize>, teachers: Range<usize>, ends: Option<(usize, usize)>| {
            let mut merge = Merge {
                s: s.slice(students.clone()),
                t: t.slice(teachers.clone()),
                first_token: (students.start, teachers.start),
                first_chunk: chunks.kind.len(),
                first_end: chunks.end,
                out: out.part(students, teachers),
                chunks: &mut chunks,
            };
            merge.run(b, strict, ends.is_some())?;
            if let Some((stop, other)) = ends {
                let g = chunks.push(stop, other, Kind::Stop);
                chunks.end = (stop + 1, other + 1);
                out.student_chunk[stop] = g;
                out.teacher_chunk[other] = g;
                out.teacher_pos[stop] = other as i32;
                out.teacher_off[stop] = 0;
            }
            Ok::<(), Error>(())
        };
        let (ends, others) = (s.turn_ends(), t.turn_ends());
        let (mut i, mut j) = (0, 0);
        if ends.len() == others.len() {
            // The same number of turns: what lies between their ends corresponds, whatever it is.
            for (end, other) in ends.iter().zip(&others) {
                merge(i..end.from, j..other.from, Some((end.stop, other.stop)))?;
                (i, j) = (end.to, other.to);
            }
        }
        merge(i..s.len(), j..t.len(), None)?;
        chunks.write(row)
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

/// How many flags are true.
fn count(mask: &[bool]) -> usize {
    // In bytes as long as they hold it: many at a time.
    let part = |flags: &[bool]| flags.iter().fold(0u8, |n, &flag| n + u8::from(flag));
    mask.chunks(128).map(|flags| usize::from(part(flags))).sum()
}

/// Changes the length and keeps what fits; a vector too small is replaced, not copied.
fn resize<T: Copy>(array: &mut Vec<T>, len: usize, fresh: T) {
    if array.capacity() < len {
        *array = vec![fresh; len];
    } else {
        array.resize(len, fresh);
    }
}

fn total(cu: &[i64]) -> usize {
    cu.last().map_or(0, |&n| n as usize)
}

/// The symbols of a row, kept from row to row.
#[derive(Default)]
pub(crate) struct Scratch {
    student: Vec<Symbol>,
    teacher: Vec<Symbol>,
}

/// Why a row of ids could not be read; the caller knows which row it was.
enum RowError {
    Id { position: usize, id: i64 },
    TooLong { bytes: u64 },
}

impl RowError {
    fn at(self, side: Side, row: usize, len: usize) -> Error {
        match self {
            RowError::Id { position, id } => Error::TokenId { side, row, position, id, len },
            RowError::TooLong { bytes } => Error::RowTooLong { side, row, bytes },
        }
    }
}

/// Looks every id up and sums the lengths: `symbols` and `ends` of one row.
fn resolve(
    ids: Ids<'_>,
    range: Range<usize>,
    mask: Option<&[bool]>,
    table: &[Symbol],
    symbols: &mut Vec<Symbol>,
    ends: &mut [i32],
) -> Result<(), RowError> {
    match ids {
        Ids::I32(x) => resolve_ids(&x[range], mask, table, symbols, ends),
        Ids::I64(x) => resolve_ids(&x[range], mask, table, symbols, ends),
        Ids::U32(x) => resolve_ids(&x[range], mask, table, symbols, ends),
    }
}

fn resolve_ids<T: Copy + Into<i64>>(
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

/// The flag of every id; none where there are no flags. The ids are in the vocabulary.
fn flagged(ids: Ids<'_>, flags: &[bool]) -> Vec<bool> {
    let flag = |id: i64| flags.get(id as usize).copied().unwrap_or_default();
    match ids {
        _ if flags.is_empty() => vec![],
        Ids::I32(x) => x.iter().map(|&id| flag(id.into())).collect(),
        Ids::I64(x) => x.iter().map(|&id| flag(id)).collect(),
        Ids::U32(x) => x.iter().map(|&id| flag(id.into())).collect(),
    }
}

/// The part of the batch's arrays that one row fills.
struct RowOut<'a> {
    student_chunk: &'a mut [i32],
    teacher_pos: &'a mut [i32],
    teacher_off: &'a mut [i32],
    teacher_chunk: &'a mut [i32],
}

impl RowOut<'_> {
    /// The same for some of the row's tokens.
    fn part(&mut self, students: Range<usize>, teachers: Range<usize>) -> RowOut<'_> {
        RowOut {
            student_chunk: &mut self.student_chunk[students.clone()],
            teacher_pos: &mut self.teacher_pos[students.clone()],
            teacher_off: &mut self.teacher_off[students],
            teacher_chunk: &mut self.teacher_chunk[teachers],
        }
    }
}

/// The chunks of one row, as they grow: where each starts, and its kind.
#[derive(Default)]
struct Chunks {
    student_ptr: Vec<i32>,
    teacher_ptr: Vec<i32>,
    kind: Vec<Kind>,
    /// One past the last token of the last chunk, on both sides.
    end: (usize, usize),
}

impl Chunks {
    fn with_capacity(chunks: usize) -> Self {
        Self {
            student_ptr: Vec::with_capacity(chunks + 1),
            teacher_ptr: Vec::with_capacity(chunks + 1),
            kind: Vec::with_capacity(chunks),
            end: (0, 0),
        }
    }

    fn push(&mut self, i: usize, j: usize, kind: Kind) -> i32 {
        self.student_ptr.push(i as i32);
        self.teacher_ptr.push(j as i32);
        self.kind.push(kind);
        self.kind.len() as i32 - 1
    }

    /// Writes them where the row starts, and returns their number.
    fn write<K: Code>(mut self, row: &mut Out<'_, K>) -> Result<usize, Halt> {
        self.student_ptr.push(self.end.0 as i32);
        self.teacher_ptr.push(self.end.1 as i32);
        let (chunks, entries) = (self.kind.len(), self.student_ptr.len());
        if row.student_ptr.len() < entries {
            return Err(Halt::Full);
        }
        row.student_ptr[..entries].copy_from_slice(&self.student_ptr);
        row.teacher_ptr[..entries].copy_from_slice(&self.teacher_ptr);
        for (code, &kind) in row.kind.iter_mut().zip(&self.kind) {
            *code = K::of(kind);
        }
        Ok(chunks)
    }
}

/// Where the sides agree no longer.
enum Found {
    /// A chunk of these many tokens with bytes, up to these tokens.
    Chunk { i: usize, j: usize, students: usize, teachers: usize },
    /// One side ended before the next common end.
    End,
    /// The bytes differ at this byte of the student's and of the teacher's row.
    Differ(usize, usize),
}

/// The merge of one stretch of a row: all of it, or what lies between two ends of turns.
struct Merge<'a, 'o> {
    s: Tokens<'a>,
    t: Tokens<'a>,
    /// Where the stretch starts in the row, and in its chunks; where the chunk before it ends.
    first_token: (usize, usize),
    first_chunk: usize,
    first_end: (usize, usize),
    out: RowOut<'o>,
    chunks: &'o mut Chunks,
}

impl Merge<'_, '_> {
    /// Aligns the stretch. Where it is `closed` by an end of turn on both sides, what is left before it corresponds too.
    fn run(&mut self, row: usize, strict: bool, closed: bool) -> Result<(), Error> {
        let (m, n) = (self.s.len(), self.t.len());
        let mut resyncer = None;
        // `i` and `j` stand at the same place of the text, before every turn of the loop.
        let (mut i, mut j) = (0, 0);
        while i < m && j < n {
            let symbol = self.s.symbols[i];
            if symbol.len > 0 && symbol == self.t.symbols[j] {
                self.pair(i, j, Kind::OneToOne);
                (i, j) = (i + 1, j + 1);
                continue;
            }
            if symbol.len == 0 || self.t.symbols[j].len == 0 {
                (i, j) = self.cross_specials(i, j);
                continue;
            }
            match self.next_chunk(i, j) {
                Found::Chunk { i: to_i, j: to_j, students, teachers } => {
                    self.emit(i..to_i, j..to_j, Kind::of(students, teachers));
                    (i, j) = (to_i, to_j);
                }
                Found::End => break,
                Found::Differ(x, y) => {
                    if strict {
                        return Err(self.mismatch(row, x, y));
                    }
                    let (s, t) = (self.s, self.t);
                    let resync = resyncer.get_or_insert_with(|| Resync::new(s, t, (x, y)));
                    let differs = x;
                    let (x, y) = resync.unit_start(x, y);
                    // A chunk must not end inside a character that differs.
                    (i, j) = self.back_to(i, j, x, y);
                    self.unplace(i, differs);
                    let Some((to_i, to_j)) = resync.next_common_end((i, j), (x, y)) else { break };
                    self.emit(i..to_i, j..to_j, Kind::Rewritten);
                    (i, j) = (to_i, to_j);
                }
            }
        }
        self.finish(row, strict, closed, self.s.skip_special(i), self.t.skip_special(j))
    }

    /// What is left from tokens `i` and `j` on has no common end any more.
    fn finish(&mut self, row: usize, strict: bool, closed: bool, i: usize, j: usize) -> Result<(), Error> {
        let (m, n) = (self.s.len(), self.t.len());
        if i == m && j == n {
            return Ok(());
        }
        if strict {
            // The sides agree until one of them ends.
            let (x, y) = (self.s.start(i), self.t.start(j));
            let common = (self.s.start(m) - x).min(self.t.start(n) - y);
            return Err(self.mismatch(row, x + common, y + common));
        }
        self.forget_from(i, j);
        if closed {
            self.emit(i..m, j..n, Kind::Rewritten);
        }
        Ok(())
    }

    fn push(&mut self, students: &Range<usize>, teachers: &Range<usize>, kind: Kind) -> i32 {
        let (i0, j0) = self.first_token;
        self.chunks.end = (i0 + students.end, j0 + teachers.end);
        self.chunks.push(i0 + students.start, j0 + teachers.start, kind)
    }

    fn pair(&mut self, i: usize, j: usize, kind: Kind) {
        let g = self.push(&(i..i + 1), &(j..j + 1), kind);
        self.out.student_chunk[i] = g;
        self.out.teacher_chunk[j] = g;
        self.place(i, j, 0);
    }

    /// Student token `i` starts `off` bytes inside teacher token `j`.
    fn place(&mut self, i: usize, j: usize, off: usize) {
        self.out.teacher_pos[i] = (self.first_token.1 + j) as i32;
        self.out.teacher_off[i] = off as i32;
    }

    /// Passes the tokens without bytes on both sides. Where the sides have different numbers of turns, ends of turns
    /// correspond only if they are at the same place of the text.
    fn cross_specials(&mut self, i: usize, j: usize) -> (usize, usize) {
        let (to_i, to_j) = (self.s.skip_special(i), self.t.skip_special(j));
        let stop = |tokens: &Tokens<'_>, from: usize, to: usize| (from..to).find(|&k| tokens.symbols[k].is_stop());
        if let (Some(si), Some(tj)) = (stop(&self.s, i, to_i), stop(&self.t, j, to_j)) {
            self.pair(si, tj, Kind::Stop);
        }
        (to_i, to_j)
    }

    /// From tokens `i` and `j` that start together to the next common end, every byte compared.
    fn next_chunk(&mut self, i: usize, j: usize) -> Found {
        let (mut p, mut q) = (i, j);
        let (mut a, mut b) = (self.s.bytes(p), self.t.bytes(q));
        let (mut students, mut teachers) = (1, 1);
        self.place(i, j, 0);
        loop {
            let common = a.len().min(b.len());
            if a[..common] != b[..common] {
                let equal = common_prefix(a, b);
                let at = |tokens: &Tokens<'_>, k: usize, rest: &[u8]| tokens.end(k) - rest.len() + equal;
                return Found::Differ(at(&self.s, p, a), at(&self.t, q, b));
            }
            (a, b) = (&a[common..], &b[common..]);
            if a.is_empty() && b.is_empty() {
                return Found::Chunk { i: p + 1, j: q + 1, students, teachers };
            }
            if b.is_empty() {
                q = self.t.skip_special(q + 1);
                if q == self.t.len() {
                    return Found::End;
                }
                b = self.t.bytes(q);
                teachers += 1;
            } else {
                p = self.s.skip_special(p + 1);
                if p == self.s.len() {
                    return Found::End;
                }
                a = self.s.bytes(p);
                students += 1;
                self.place(p, q, self.t.bytes(q).len() - b.len());
            }
        }
    }

    fn emit(&mut self, students: Range<usize>, teachers: Range<usize>, kind: Kind) {
        let g = self.push(&students, &teachers, kind);
        for j in teachers.clone() {
            if self.t.symbols[j].len > 0 {
                self.out.teacher_chunk[j] = g;
            }
        }
        for i in students.clone() {
            if self.s.symbols[i].len > 0 {
                self.out.student_chunk[i] = g;
            }
        }
        if kind == Kind::Rewritten {
            // Which byte became which is not known inside; only the chunk's start is.
            self.out.teacher_pos[students.clone()].fill(-1);
            self.out.teacher_off[students.clone()].fill(-1);
            if !students.is_empty() && !teachers.is_empty() {
                self.place(students.start, teachers.start, 0);
            }
        }
    }

    /// Takes chunks back until the place before token `i`, `j` is at or before these bytes.
    fn back_to(&mut self, mut i: usize, mut j: usize, x: usize, y: usize) -> (usize, usize) {
        let (i0, j0) = self.first_token;
        let (from_i, from_j) = (i, j);
        while (self.s.start(i) > x || self.t.start(j) > y) && self.chunks.kind.len() > self.first_chunk {
            self.chunks.kind.pop();
            i = self.chunks.student_ptr.pop().map_or(0, |start| start as usize - i0);
            j = self.chunks.teacher_ptr.pop().map_or(0, |start| start as usize - j0);
        }
        if (i, j) != (from_i, from_j) {
            self.out.student_chunk[i..from_i].fill(-1);
            self.out.teacher_chunk[j..from_j].fill(-1);
            // A chunk may be empty on one side.
            let end = |chunk: &[i32], ptr: &[i32], first: usize, before: usize| {
                let tokens = chunk.iter().rposition(|&g| g >= 0).map_or(before, |last| first + last + 1);
                tokens.max(ptr.last().map_or(0, |&start| start as usize))
            };
            let before = self.first_end;
            self.chunks.end.0 = end(&self.out.student_chunk[..i], &self.chunks.student_ptr, i0, before.0);
            self.chunks.end.1 = end(&self.out.teacher_chunk[..j], &self.chunks.teacher_ptr, j0, before.1);
        }
        (i, j)
    }

    /// Takes back the places in the teacher's tokens of what starts between token `i` and byte `x`, the difference.
    fn unplace(&mut self, i: usize, x: usize) {
        let to = (i..self.s.len()).find(|&k| self.s.start(k) > x).unwrap_or(self.s.len());
        self.out.teacher_pos[i..to].fill(-1);
        self.out.teacher_off[i..to].fill(-1);
    }

    /// Leaves everything from here on unaligned.
    fn forget_from(&mut self, i: usize, j: usize) {
        self.out.student_chunk[i..].fill(-1);
        self.out.teacher_pos[i..].fill(-1);
        self.out.teacher_off[i..].fill(-1);
        self.out.teacher_chunk[j..].fill(-1);
    }

    fn mismatch(&self, row: usize, x: usize, y: usize) -> Error {
        let token = |tokens: &Tokens<'_>, byte: usize, first: usize| {
            let i = (0..tokens.len()).find(|&i| tokens.end(i) > byte)?;
            Some((first + i, tokens.bytes(i).to_vec()))
        };
        let around = |tokens: &Tokens<'_>, byte: usize| {
            let text = tokens.text();
            text[byte.saturating_sub(12)..(byte + 12).min(text.len())].to_vec()
        };
        Error::ByteMismatch(Box::new(Mismatch {
            row,
            byte: x + self.s.base as usize,
            student: token(&self.s, x, self.first_token.0),
            teacher: token(&self.t, y, self.first_token.1),
            around: (around(&self.s, x), around(&self.t, y)),
        }))
    }
}
