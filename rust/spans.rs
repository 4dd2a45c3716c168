//! Many-to-many spans: who shares bytes with whom, spans of one side on the other, alignment from offsets or texts.

use std::ops::Range;

use similar::{capture_diff_slices, Algorithm, DiffTag};
use unicode_normalization::UnicodeNormalization;

use crate::chunks::{Alignment, Kind, Row};
use crate::error::{Error, Side};
use crate::merge::edits::{Edits, Run, LONG};

/// For every student token the teacher tokens with which it shares bytes, as compressed rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlaps {
    /// Student token `i` has the entries `indptr[i]..indptr[i + 1]`.
    pub indptr: Vec<i64>,
    /// Teacher token of every entry.
    pub indices: Vec<i32>,
    /// How many bytes the two share.
    pub nbytes: Vec<i32>,
}

/// Which tokens of the other side stand for a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanMode {
    /// The smallest span that holds all bytes of it.
    Cover,
    /// The largest span that holds no other bytes.
    Inside,
}

/// One side of an alignment, with the names that `Side` leaves open.
struct Half<'a> {
    chunk: &'a [i32],
    end: &'a [i32],
    ptr: &'a [i32],
    /// In the text that both sides share; `None`: every token starts where the one before it ends.
    starts: Option<&'a [i32]>,
}

impl<'a> Half<'a> {
    fn of(row: Row<'a>, side: Side) -> Self {
        let (a, starts) = (row.arrays, row.starts);
        match side {
            Side::Student => {
                Self { chunk: a.student_chunk, end: a.student_end, ptr: a.student_ptr, starts: starts.map(|s| s.0) }
            }
            Side::Teacher => {
                Self { chunk: a.teacher_chunk, end: a.teacher_end, ptr: a.teacher_ptr, starts: starts.map(|s| s.1) }
            }
        }
    }

    /// The tokens of chunk `g`, in order.
    fn members(&self, g: usize) -> impl DoubleEndedIterator<Item = usize> + '_ {
        let span = self.ptr[g] as usize..self.ptr[g + 1] as usize;
        span.filter(move |&i| self.chunk[i] == g as i32)
    }

    /// The bytes of token `i` of chunk `g`, counted so that both sides' can be compared.
    fn bytes_in(&self, g: usize, i: usize) -> Range<i32> {
        if let Some(starts) = self.starts {
            return starts[i]..self.end[i];
        }
        let start = |i: usize| if i == 0 { 0 } else { self.end[i - 1] };
        // The sides may have spelled different bytes before, but a chunk starts at the same place on both.
        let from = start(self.ptr[g] as usize);
        start(i) - from..self.end[i] - from
    }
}

/// The overlaps of one alignment. REWRITTEN chunks have none: which byte became which is not known inside. The tokens of a
/// STOP or MARKER chunk share 0 bytes and are listed.
pub fn overlaps(a: &Alignment) -> Overlaps {
    overlaps_of(a.row())
}

pub(crate) fn overlaps_of(row: Row<'_>) -> Overlaps {
    let (s, t) = (Half::of(row, Side::Student), Half::of(row, Side::Teacher));
    let a = row.arrays;
    let mut all = Overlaps { indptr: vec![0], ..Overlaps::default() };
    // No teacher token before this one reaches into the student token at hand, or a later one.
    let mut first = 0;
    for (i, &g) in a.student_chunk.iter().enumerate() {
        if g >= 0 && a.kind[g as usize] != Kind::Rewritten {
            let g = g as usize;
            let bytes = s.bytes_in(g, i);
            let stop = matches!(a.kind[g], Kind::Stop | Kind::Marker);
            first = first.max(t.ptr[g] as usize);
            let to = t.ptr[g + 1] as usize;
            while first < to && (t.chunk[first] != g as i32 || (!stop && t.bytes_in(g, first).end <= bytes.start)) {
                first += 1;
            }
            for j in (first..to).filter(|&j| t.chunk[j] == g as i32) {
                let other = t.bytes_in(g, j);
                if other.start >= bytes.end && !stop {
                    break;
                }
                all.indices.push(j as i32);
                all.nbytes.push(bytes.end.min(other.end) - bytes.start.max(other.start));
            }
        }
        all.indptr.push(all.indices.len() as i64);
    }
    all
}

/// Token spans (`start`, `stop`) of the side that `to` is not -> token spans of the side `to`; -1, -1 for none.
///
/// Tokens that are unaligned have no counterpart and are passed over. A REWRITTEN chunk is only taken whole: a span that
/// touches it is covered by all of the other side's tokens in it, and only a span that holds it all has them inside.
///
/// # Errors
/// [`Error::Argument`] for a span that is not within the tokens.
pub fn map_spans(a: &Alignment, spans: &[[i64; 2]], to: Side, mode: SpanMode) -> Result<Vec<[i64; 2]>, Error> {
    map_spans_of(a.row(), spans, to, mode)
}

pub(crate) fn map_spans_of(row: Row<'_>, spans: &[[i64; 2]], to: Side, mode: SpanMode) -> Result<Vec<[i64; 2]>, Error> {
    let from_side = if to == Side::Teacher { Side::Student } else { Side::Teacher };
    let (from, onto) = (&Half::of(row, from_side), &Half::of(row, to));
    let len = from.chunk.len();
    let map = |(k, &[start, stop]): (usize, &[i64; 2])| {
        if start < 0 || stop < start || stop as usize > len {
            return Err(Error::Argument(format!(
                "spans[{k}] is ({start}, {stop}); a span must satisfy 0 <= start <= stop <= {len}, the number of {from_side} tokens"
            )));
        }
        let inside = |i: usize| i >= start as usize && i < stop as usize;
        let mut aligned = (start as usize..stop as usize).filter(|&i| from.chunk[i] >= 0);
        let Some(first) = aligned.next() else { return Ok([-1, -1]) };
        let last = aligned.next_back().unwrap_or(first);
        let (g, h) = (from.chunk[first] as usize, from.chunk[last] as usize);
        // The tokens of the other side, in chunk `c`, that stand for the part of the span that lies in it.
        let counterparts = |c: usize| {
            let members = || from.members(c).filter(|&i| inside(i));
            let own = members().next().map_or(0, |i| from.bytes_in(c, i).start)
                ..members().next_back().map_or(0, |i| from.bytes_in(c, i).end);
            let whole = from.members(c).all(inside);
            let keeps = move |j: &usize| {
                let other = onto.bytes_in(c, *j);
                match (mode, row.arrays.kind[c]) {
                    (SpanMode::Cover, Kind::Rewritten | Kind::Stop | Kind::Marker) => true,
                    (SpanMode::Inside, Kind::Rewritten | Kind::Stop | Kind::Marker) => whole,
                    (SpanMode::Cover, _) => other.start < own.end && other.end > own.start,
                    (SpanMode::Inside, _) => other.start >= own.start && other.end <= own.end,
                }
            };
            onto.members(c).filter(keeps)
        };
        let forth = (g..=h).find_map(|c| counterparts(c).next());
        let back = (g..=h).rev().find_map(|c| counterparts(c).next_back());
        Ok(match (forth, back) {
            (Some(start), Some(stop)) => [start as i64, stop as i64 + 1],
            _ => [-1, -1],
        })
    };
    spans.iter().enumerate().map(map).collect()
}

/// Aligns two lists of sorted (`start`, `stop`) spans over one text, in bytes or characters: chunks are the smallest groups
/// in which spans overlap only each other. Empty spans and spans that overlap nothing are unaligned.
///
/// # Errors
/// [`Error::Argument`] for spans that are not sorted, negative, or beyond 2^31.
pub fn align_offsets(student: &[[i64; 2]], teacher: &[[i64; 2]]) -> Result<Alignment, Error> {
    check_sorted("student_offsets", student)?;
    check_sorted("teacher_offsets", teacher)?;
    let ends = |spans: &[[i64; 2]]| spans.iter().map(|s| s[1] as i32).collect::<Vec<_>>();
    let starts = |spans: &[[i64; 2]]| spans.iter().map(|s| s[0] as i32).collect::<Vec<_>>();
    let mut a = Alignment {
        student_chunk: vec![-1; student.len()],
        teacher_chunk: vec![-1; teacher.len()],
        student_end: ends(student),
        teacher_end: ends(teacher),
        teacher_pos: vec![-1; student.len()],
        teacher_off: vec![-1; student.len()],
        starts: Some(Box::new((starts(student), starts(teacher)))),
        ..Alignment::default()
    };
    let (mut i, mut j, mut last) = (0, 0, (0, 0));
    while i < student.len() && j < teacher.len() {
        let (from_i, from_j, g) = (i, j, a.kind.len() as i32);
        let (students, teachers) = pass_group(student, teacher, &mut i, &mut j);
        if students == 0 || teachers == 0 {
            continue;
        }
        let full =
            |spans: &[[i64; 2]], range: Range<usize>| range.filter(|&k| spans[k][0] < spans[k][1]).collect::<Vec<_>>();
        let (own, other) = (full(student, from_i..i), full(teacher, from_j..j));
        let mut at = 0;
        for &k in &own {
            a.student_chunk[k] = g;
            while at < other.len() && teacher[other[at]][1] <= student[k][0] {
                at += 1;
            }
            if let Some(&t) = other.get(at).filter(|&&t| teacher[t][0] <= student[k][0]) {
                a.teacher_pos[k] = t as i32;
                a.teacher_off[k] = (student[k][0] - teacher[t][0]) as i32;
            }
        }
        for &k in &other {
            a.teacher_chunk[k] = g;
        }
        a.student_ptr.push(own[0] as i32);
        a.teacher_ptr.push(other[0] as i32);
        a.kind.push(Kind::of(students, teachers));
        last = (own[own.len() - 1] + 1, other[other.len() - 1] + 1);
    }
    a.student_ptr.push(last.0 as i32);
    a.teacher_ptr.push(last.1 as i32);
    Ok(a)
}

fn check_sorted(name: &str, spans: &[[i64; 2]]) -> Result<(), Error> {
    for (i, &[start, stop]) in spans.iter().enumerate() {
        let before = i.checked_sub(1).map_or([0, 0], |k| spans[k]);
        if start < before[0] || stop < before[1] || stop < start || stop > i64::from(i32::MAX) {
            return Err(Error::Argument(format!(
                "{name}[{i}] is ({start}, {stop}) after ({}, {}); spans must be sorted, with 0 <= start <= stop < 2^31",
                before[0], before[1]
            )));
        }
    }
    Ok(())
}

/// Passes everything that starts before the furthest end so far, which belongs together, and returns how many spans of
/// each side are not empty.
fn pass_group(student: &[[i64; 2]], teacher: &[[i64; 2]], i: &mut usize, j: &mut usize) -> (usize, usize) {
    let (mut students, mut teachers, mut end) = (0, 0, -1);
    loop {
        let student_first = teacher.get(*j).is_none_or(|t| student.get(*i).is_some_and(|s| s[0] <= t[0]));
        let (spans, at, taken) =
            if student_first { (student, &mut *i, &mut students) } else { (teacher, &mut *j, &mut teachers) };
        match spans.get(*at) {
            Some(&[start, stop]) if end < 0 || start < end => {
                if start < stop {
                    (*taken, end) = (*taken + 1, stop.max(end));
                }
                *at += 1;
            }
            _ => return (students, teachers),
        }
    }
}

/// Characters of both sides up to which a shortest edit is looked for at any cost, which is at most the square; and of
/// the parts of what has more.
const SMALL: usize = 8192;
const PART: usize = 2048;

/// What a shortest edit of two texts leaves alone. Between the stretches of a long text that are no chance, where much
/// differs, it is the shortest edit of one part after the other, so that the time stays linear.
fn stretches(a: &[u32], b: &[u32]) -> Vec<Run> {
    let mut found = vec![];
    let differ = |a_range: Range<usize>, b_range: Range<usize>, found: &mut Vec<Run>| {
        let len = a_range.len() + b_range.len();
        let parts = if len <= SMALL { 1 } else { len.div_ceil(PART) };
        let part = |range: &Range<usize>, k: usize| range.start + range.len() * k / parts;
        for k in 0..parts {
            let (i, j) = (part(&a_range, k), part(&b_range, k));
            let texts = (&a[i..part(&a_range, k + 1)], &b[j..part(&b_range, k + 1)]);
            for op in capture_diff_slices(Algorithm::Myers, texts.0, texts.1) {
                if op.tag() == DiffTag::Equal {
                    let (x, y) = (op.old_range(), op.new_range());
                    found.push(Run { a: i + x.start, b: j + y.start, len: x.len() });
                }
            }
        }
    };
    let (mut i, mut j, mut edits) = (0, 0, Edits::default());
    // What is not yet written starts here on both sides.
    let (mut from_i, mut from_j) = (0, 0);
    while a.len() + b.len() > SMALL {
        let len = a[i..].iter().zip(&b[j..]).take_while(|(x, y)| x == y).count();
        if len >= LONG {
            differ(from_i..i, from_j..j, &mut found);
            found.push(Run { a: i, b: j, len });
            (from_i, from_j) = (i + len, j + len);
        }
        (i, j) = (i + len, j + len);
        let runs = if i < a.len() && j < b.len() { edits.search(a, b, i, j) } else { vec![] };
        let Some(run) = runs.last() else { break };
        (i, j) = (run.a, run.b);
    }
    differ(from_i..a.len(), from_j..b.len(), &mut found);
    found
}

/// For every text of `a` the texts of `b` that share characters with it, and the other way round.
///
/// Characters are compared without case and compatibility forms; where the texts differ the correspondence is that
/// of a shortest edit (Myers). The behavior is that of the tokenizations and spacy-alignments packages.
pub fn align_texts<S: AsRef<str>>(a: &[S], b: &[S]) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
    let (a_chars, a_of) = folded(a);
    let (b_chars, b_of) = folded(b);
    let mut forth = vec![vec![]; a.len()];
    let mut back = vec![vec![]; b.len()];
    let mut pair = |i: usize, j: usize| {
        let (i, j) = (a_of[i], b_of[j]);
        if forth[i].last() != Some(&j) {
            forth[i].push(j);
        }
        if back[j].last() != Some(&i) {
            back[j].push(i);
        }
    };
    for Run { a, b, len } in stretches(&a_chars, &b_chars) {
        (0..len).for_each(|k| pair(a + k, b + k));
    }
    (forth, back)
}

/// The characters of all texts in one normal form, and the text that each came from.
fn folded<S: AsRef<str>>(texts: &[S]) -> (Vec<u32>, Vec<usize>) {
    let chars = |text: &str| text.nfkd().flat_map(char::to_lowercase).map(u32::from).collect::<Vec<_>>();
    texts.iter().enumerate().flat_map(|(k, text)| chars(text.as_ref()).into_iter().map(move |c| (c, k))).unzip()
}
