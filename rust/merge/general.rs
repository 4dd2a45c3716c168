//! The merge of any row: bytes that differ, ends of turns on one side only, tokens without bytes anywhere.

use std::ops::Range;

use super::resync::{common_prefix, Resync};
use crate::chunks::{Axes, Code, Halt, Kind, Out};
use crate::error::{Error, Mismatch};
use crate::table::Role;
use crate::tokens::{Marker, Tokens};

/// Writes the alignment of row `b`, whatever its bytes, and returns its number of chunks. Of the roles in `pairs` a
/// marker's first token is the same event on both sides.
pub(crate) fn merge<K: Code>(
    b: usize,
    s: Tokens<'_>,
    t: Tokens<'_>,
    strict: bool,
    pairs: &[Role],
    row: &mut Out<'_, K>,
) -> Result<usize, Halt> {
    row.student_end.copy_from_slice(s.ends);
    row.teacher_end.copy_from_slice(t.ends);
    for unaligned in [&mut *row.student_chunk, row.teacher_chunk, row.teacher_pos, row.teacher_off] {
        unaligned.fill(-1);
    }
    let mut chunks = Chunks::with_capacity(s.len().min(t.len()));
    let mut merge = |students: Range<usize>, teachers: Range<usize>, cut: Option<Cut>| {
        let (s, t) = (s.slice(students.clone()), t.slice(teachers.clone()));
        let mut merge = Merge {
            s,
            t,
            first_token: (students.start, teachers.start),
            first_chunk: chunks.kind.len(),
            first_end: chunks.end,
            out: row.part(&Axes { students, teachers, ptr: 0..0, chunks: 0..0 }),
            chunks: &mut chunks,
        };
        merge.run(b, strict, cut.is_some())?;
        if let Some(Cut { kind, known, tokens: (students, teachers), .. }) = cut {
            let g = chunks.push(students.start, teachers.start, kind);
            chunks.end = (students.end, teachers.end);
            if known {
                row.teacher_pos[students.start] = teachers.start as i32;
                row.teacher_off[students.start] = 0;
            }
            row.student_chunk[students].fill(g);
            row.teacher_chunk[teachers].fill(g);
        }
        Ok::<(), Error>(())
    };
    let (mut i, mut j) = (0, 0);
    for cut in cuts(s, t, pairs) {
        let ((to_i, to_j), next) = (cut.stretch, cut.next);
        merge(i..to_i, j..to_j, Some(cut))?;
        (i, j) = next;
    }
    merge(i..s.len(), j..t.len(), None)?;
    chunks.write(row)
}

/// Tokens that correspond by their role: what lies before them, since the last, corresponds whatever it is.
struct Cut {
    kind: Kind,
    /// Whether the first tokens are the same event.
    known: bool,
    /// Where what lies before ends.
    stretch: (usize, usize),
    tokens: (Range<usize>, Range<usize>),
    next: (usize, usize),
}

/// The ends of turns and the markers of both sides that correspond.
fn cuts(s: Tokens<'_>, t: Tokens<'_>, pairs: &[Role]) -> Vec<Cut> {
    let (ends, others) = (s.turn_ends(), t.turn_ends());
    let (markers, theirs) = (s.markers(), t.markers());
    let (mut markers, mut theirs) = (markers.as_slice(), theirs.as_slice());
    let mut cuts = vec![];
    let pair = |own: &[Marker], other: &[Marker], cuts: &mut Vec<Cut>| {
        let roles = |markers: &[Marker]| markers.iter().map(|marker| marker.role).collect::<Vec<_>>();
        for (a, b) in common(&roles(own), &roles(other)) {
            let (a, b) = (own[a], other[b]);
            cuts.push(Cut {
                kind: Kind::Marker,
                known: pairs.contains(&a.role),
                stretch: (a.from, b.from),
                tokens: (a.from..a.to, b.from..b.to),
                next: (a.to, b.to),
            });
        }
    };
    if ends.len() == others.len() {
        // The same number of turns: what lies between their ends corresponds, whatever it is.
        for (end, other) in ends.iter().zip(&others) {
            let (own, more) = markers.split_at(markers.partition_point(|marker| marker.from < end.from));
            let (its, rest) = theirs.split_at(theirs.partition_point(|marker| marker.from < other.from));
            pair(own, its, &mut cuts);
            (markers, theirs) = (more, rest);
            cuts.push(Cut {
                kind: Kind::Stop,
                known: true,
                stretch: (end.from, other.from),
                tokens: (end.stop..end.stop + 1, other.stop..other.stop + 1),
                next: (end.to, other.to),
            });
        }
    }
    pair(markers, theirs, &mut cuts);
    cuts
}

/// More than this is not compared, each with each.
const MANY: usize = 1 << 16;

/// A longest common subsequence, as places in both. Where there are several, what is left out is decided by role, so that
/// the sides can be swapped.
fn common(a: &[Role], b: &[Role]) -> Vec<(usize, usize)> {
    let equal = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let mut found: Vec<(usize, usize)> = (0..equal).map(|k| (k, k)).collect();
    let (m, n) = (a.len() - equal, b.len() - equal);
    if m * n > MANY {
        return found;
    }
    let (a, b) = (&a[equal..], &b[equal..]);
    // The length of what the rests from `i` and `j` on have in common.
    let at = |i: usize, j: usize| i * (n + 1) + j;
    let mut length = vec![0u32; (m + 1) * (n + 1)];
    for i in (0..m).rev() {
        for j in (0..n).rev() {
            length[at(i, j)] = if a[i] == b[j] {
                length[at(i + 1, j + 1)] + 1
            } else {
                length[at(i + 1, j)].max(length[at(i, j + 1)])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < m && j < n {
        if a[i] == b[j] {
            found.push((equal + i, equal + j));
            (i, j) = (i + 1, j + 1);
        } else if (length[at(i + 1, j)], a[i]) > (length[at(i, j + 1)], b[j]) {
            i += 1;
        } else {
            j += 1;
        }
    }
    found
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
struct Merge<'a, 'o, K> {
    s: Tokens<'a>,
    t: Tokens<'a>,
    /// Where the stretch starts in the row, and in its chunks; where the chunk before it ends.
    first_token: (usize, usize),
    first_chunk: usize,
    first_end: (usize, usize),
    out: Out<'o, K>,
    chunks: &'o mut Chunks,
}

impl<K> Merge<'_, '_, K> {
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
