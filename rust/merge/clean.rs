//! The merge of a row whose sides spell the same bytes, in one pass: ids are read, looked up and compared, and every
//! output is written, once.
//!
//! Almost every row is of this kind, so this is the loop that counts. It gives up at the first sign of anything else, and
//! the row is left to the merge that can do everything; the result is the same where both can do it.

// Here it is measured: a call of these costs as much as what they do.
#![allow(clippy::inline_always)]

use crate::chunks::{Axes, Code, Kind, Out};
use crate::tokens::{Symbol, PADDING};

/// A symbol in 32 bits, so that the tables stay in the caches: the length in the upper 9, the place in the lower 23.
/// Words of the two sides are equal if and only if both have bytes, and the same ones; other than a [`Symbol`], a word
/// without bytes, or with more than fit, is equal to none of the other side's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u32);

impl Word {
    const PLACE_BITS: u32 = 23;
    /// The length of what does not fit.
    const LONG: u32 = 511;
    const MARKER: u32 = 4;

    /// The words of one side; `side` is 0 or 1. Ids that a marker may start with have words of their own.
    pub fn all(symbols: &[Symbol], side: u32, markers: impl Iterator<Item = u32>) -> Vec<Self> {
        let word = |symbol: &Symbol| {
            if symbol.len >= Self::LONG || symbol.start >= 1 << Self::PLACE_BITS {
                Self(Self::LONG << Self::PLACE_BITS | side)
            } else if symbol.len == 0 {
                Self(2 * side + u32::from(symbol.is_stop()))
            } else {
                Self(symbol.len << Self::PLACE_BITS | symbol.start)
            }
        };
        let mut words: Vec<Self> = symbols.iter().map(word).collect();
        for id in markers {
            words[id as usize] = Self(Self::MARKER + 2 * side);
        }
        words
    }

    /// Whether it has bytes, and they are known.
    #[inline]
    fn has_bytes(self) -> bool {
        (1..Self::LONG as usize).contains(&self.len())
    }

    /// Whether it has no bytes.
    #[inline]
    fn is_special(self) -> bool {
        self.len() == 0
    }

    fn is_stop(self) -> bool {
        self.is_special() && self.0 % 2 == 1
    }

    fn is_marker(self) -> bool {
        self.is_special() && self.0 >= Self::MARKER
    }

    #[inline]
    fn start(self) -> usize {
        (self.0 & ((1 << Self::PLACE_BITS) - 1)) as usize
    }

    #[inline]
    fn len(self) -> usize {
        (self.0 >> Self::PLACE_BITS) as usize
    }
}

/// One side of a row: ids without padding, and the word of every id.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, T> {
    pub ids: &'a [T],
    pub words: &'a [Word],
}

impl<T: Copy + Into<i64>> Row<'_, T> {
    /// The word of token `i`; `None` also behind the last token.
    #[inline]
    fn word(&self, i: usize) -> Option<Word> {
        self.word_of(*self.ids.get(i)?)
    }

    #[inline]
    fn word_of(&self, id: T) -> Option<Word> {
        // A negative id becomes a huge one.
        self.words.get(id.into() as usize).copied()
    }
}

/// Ones for the first `len` of 16 bytes.
static MASKS: [[u64; 2]; PADDING + 1] = {
    let mut masks = [[0; 2]; PADDING + 1];
    let mut len = 1;
    while len <= PADDING {
        masks[len] = masks[len - 1];
        masks[len][(len - 1) / 8] |= 0xff << (8 * ((len - 1) % 8));
        len += 1;
    }
    masks
};

/// Whether the `len` bytes at these two places are equal.
#[inline(always)]
fn equal(arena: &[u8], a: usize, b: usize, len: usize) -> bool {
    let Some([mask, more]) = MASKS.get(len) else {
        return equal_long(arena, a, b, len);
    };
    let words = |at: usize| {
        let bytes = arena.get(at..at + PADDING)?.first_chunk::<PADDING>()?;
        let word = |half: usize| Some(u64::from_le_bytes(*bytes[8 * half..].first_chunk()?));
        Some((word(0)?, word(1)?))
    };
    match (words(a), words(b)) {
        (Some(a), Some(b)) => (a.0 ^ b.0) & mask | (a.1 ^ b.1) & more == 0,
        _ => false,
    }
}

#[inline(never)]
fn equal_long(arena: &[u8], a: usize, b: usize, len: usize) -> bool {
    arena.get(a..a + len) == arena.get(b..b + len)
}

/// Tokens that are looked at together.
const BLOCK: usize = 8;

#[inline]
fn block<const N: usize, T>(array: &mut [T], at: usize) -> Option<&mut [T; N]> {
    array.get_mut(at..)?.first_chunk_mut()
}

/// Numbers from `first` on.
#[inline]
fn count<const N: usize>(block: &mut [i32; N], first: usize, offsets: &[i32; N]) {
    let first = first as i32;
    for (number, offset) in block.iter_mut().zip(offsets) {
        *number = first + offset;
    }
}

/// Where a merge stands: tokens, chunks and bytes so far. Both sides have spelled the same bytes.
#[derive(Clone, Copy, Default)]
struct At {
    i: usize,
    j: usize,
    g: usize,
    bytes: usize,
}

/// The first tokens that are not equal.
struct Differ {
    a: Word,
    b: Word,
}

/// Where a short chunk ends, if it is one.
enum Found {
    Chunk(At),
    Longer,
    Differs,
}

struct Merge<'a, 'o, S, T, K> {
    student: Row<'a, S>,
    teacher: Row<'a, T>,
    arena: &'a [u8],
    out: Out<'o, K>,
    /// Number of chunks before the last tokens without bytes, and the tokens at which the last of them ended.
    end: (usize, usize, usize),
}

impl<S: Copy + Into<i64>, T: Copy + Into<i64>, K: Code> Merge<'_, '_, S, T, K> {
    /// Passes the next tokens as far as they are equal on both sides, `N` at most, and returns the first two that are not.
    /// What only counts on is written for all of them at once, before it is known how many are equal: the rest is written
    /// again.
    #[inline(always)]
    #[allow(clippy::option_option)]
    fn equal_tokens<const N: usize>(&mut self, at: &mut At, offsets: &[i32; N]) -> Option<Option<Differ>> {
        let At { i, j, g, bytes } = *at;
        let out = &mut self.out;
        count(block(out.student_chunk, i)?, g, offsets);
        count(block(out.teacher_chunk, j)?, g, offsets);
        count(block(out.teacher_pos, i)?, j, offsets);
        count(block(out.student_ptr, g)?, i, offsets);
        count(block(out.teacher_ptr, g)?, j, offsets);
        *block(out.teacher_off, i)? = [0; N];
        *block(out.kind, g)? = [K::of(Kind::OneToOne); N];
        let student: &[S; N] = self.student.ids.get(i..)?.first_chunk()?;
        let teacher: &[T; N] = self.teacher.ids.get(j..)?.first_chunk()?;
        let student_end: &mut [i32; N] = block(out.student_end, i)?;
        let teacher_end: &mut [i32; N] = block(out.teacher_end, j)?;
        let (mut equal, mut end) = (0, bytes);
        for (((&s, &t), s_end), t_end) in student.iter().zip(teacher).zip(student_end).zip(teacher_end) {
            let (a, b) = (self.student.word_of(s)?, self.teacher.word_of(t)?);
            if a != b {
                *at = At { i: i + equal, j: j + equal, g: g + equal, bytes: end };
                return Some(Some(Differ { a, b }));
            }
            end += a.len();
            (*s_end, *t_end) = (end as i32, end as i32);
            equal += 1;
        }
        *at = At { i: i + N, j: j + N, g: g + N, bytes: end };
        Some(None)
    }

    /// Passes the chunk that starts with these tokens, which are not equal and have bytes, if it has at most two tokens on
    /// either side, as most have. No branches tell how many: nothing could predict them.
    #[inline(always)]
    fn short_chunk(&mut self, at: At, a: Word, b: Word) -> Found {
        let At { i, j, g, bytes } = at;
        let (len_a, len_b) = (a.len(), b.len());
        let (Some(next_a), Some(next_b)) = (self.student.word(i + 1), self.teacher.word(j + 1)) else {
            return Found::Longer;
        };
        let (both_a, both_b) = (len_a + next_a.len(), len_b + next_b.len());
        let (one_student, one_teacher) = (len_a == both_b, len_b == both_a);
        let two = (both_a == both_b) & next_a.has_bytes() & next_b.has_bytes();
        if len_a == len_b || !(one_student | one_teacher | two) {
            return Found::Longer;
        }
        let student_shorter = len_a < len_b;
        let (short, short_len, next_short) = if student_shorter { (a, len_a, next_a) } else { (b, len_b, next_b) };
        let (long, long_len, next_long) = if student_shorter { (b, len_b, next_b) } else { (a, len_a, next_a) };
        let (all, overlap) = (if two { both_a } else { long_len }, long_len - short_len);
        if !equal(self.arena, short.start(), long.start(), short_len)
            || !equal(self.arena, next_short.start(), long.start() + short_len, overlap)
            || (two && !equal(self.arena, next_short.start() + overlap, next_long.start(), all - long_len))
        {
            return Found::Differs;
        }
        let out = &mut self.out;
        let ends = |len: usize| [(bytes + len) as i32, (bytes + all) as i32];
        let (pos, off) = if student_shorter { (j, len_a) } else { (j + 1, overlap) };
        // The second is written again where there is no second token.
        out.student_end[i..i + 2].copy_from_slice(&ends(len_a));
        out.teacher_end[j..j + 2].copy_from_slice(&ends(len_b));
        out.student_chunk[i..i + 2].copy_from_slice(&[g as i32; 2]);
        out.teacher_chunk[j..j + 2].copy_from_slice(&[g as i32; 2]);
        out.teacher_pos[i..i + 2].copy_from_slice(&[j as i32, pos as i32]);
        out.teacher_off[i..i + 2].copy_from_slice(&[0, off as i32]);
        out.student_ptr[g] = i as i32;
        out.teacher_ptr[g] = j as i32;
        let (students, teachers) = (2 - usize::from(one_student), 2 - usize::from(one_teacher));
        out.kind[g] = K::of(Kind::of(students, teachers));
        Found::Chunk(At { i: i + students, j: j + teachers, g: g + 1, bytes: bytes + all })
    }

    /// Passes a chunk of any number of tokens.
    #[inline(never)]
    fn long_chunk(&mut self, at: At, a: Word, b: Word) -> Option<At> {
        let At { mut i, mut j, g, mut bytes } = at;
        let out = &mut self.out;
        out.student_ptr[g] = i as i32;
        out.teacher_ptr[g] = j as i32;
        out.student_chunk[i] = g as i32;
        out.teacher_chunk[j] = g as i32;
        (out.teacher_pos[i], out.teacher_off[i]) = (j as i32, 0);
        // What is left of the tokens at hand.
        let (mut at_a, mut left_a) = (a.start(), a.len());
        let (mut at_b, mut left_b) = (b.start(), b.len());
        let mut len_b = left_b;
        loop {
            let common = left_a.min(left_b);
            if !equal(self.arena, at_a, at_b, common) {
                return None;
            }
            bytes += common;
            (at_a, left_a) = (at_a + common, left_a - common);
            (at_b, left_b) = (at_b + common, left_b - common);
            if left_b == 0 {
                out.teacher_end[j] = bytes as i32;
                j += 1;
                if left_a == 0 {
                    out.student_end[i] = bytes as i32;
                    i += 1;
                    break;
                }
                let b = self.teacher.word(j).filter(|b| b.has_bytes())?;
                (at_b, left_b, len_b) = (b.start(), b.len(), b.len());
                out.teacher_chunk[j] = g as i32;
            } else {
                out.student_end[i] = bytes as i32;
                i += 1;
                let a = self.student.word(i).filter(|a| a.has_bytes())?;
                (at_a, left_a) = (a.start(), a.len());
                out.student_chunk[i] = g as i32;
                (out.teacher_pos[i], out.teacher_off[i]) = (j as i32, (len_b - left_b) as i32);
            }
        }
        out.kind[g] = K::of(Kind::of(i - at.i, j - at.j));
        Some(At { i, j, g: g + 1, bytes })
    }

    /// Passes the tokens without bytes on both sides.
    fn specials(&mut self, at: &mut At) -> Option<()> {
        let (mut stop_i, mut stop_j) = (None, None);
        let (from, out, bytes) = (*at, &mut self.out, at.bytes as i32);
        while at.i < self.student.ids.len() {
            let word = self.student.word(at.i)?;
            if !word.is_special() {
                break;
            }
            if word.is_marker() {
                return None;
            }
            if stop_i.is_none() && word.is_stop() {
                stop_i = Some(at.i);
            }
            (out.student_end[at.i], out.student_chunk[at.i]) = (bytes, -1);
            (out.teacher_pos[at.i], out.teacher_off[at.i]) = (-1, -1);
            at.i += 1;
        }
        while at.j < self.teacher.ids.len() {
            let word = self.teacher.word(at.j)?;
            if !word.is_special() {
                break;
            }
            if word.is_marker() {
                return None;
            }
            if stop_j.is_none() && word.is_stop() {
                stop_j = Some(at.j);
            }
            (out.teacher_end[at.j], out.teacher_chunk[at.j]) = (bytes, -1);
            at.j += 1;
        }
        match (stop_i, stop_j) {
            // One side has ended, and the other one spells more.
            (None, None) if (at.i, at.j) == (from.i, from.j) => None,
            (None, None) => Some(()),
            (Some(i), Some(j)) => {
                let g = at.g;
                (out.student_ptr[g], out.teacher_ptr[g]) = (i as i32, j as i32);
                (out.student_chunk[i], out.teacher_chunk[j]) = (g as i32, g as i32);
                (out.teacher_pos[i], out.teacher_off[i]) = (j as i32, 0);
                out.kind[g] = K::of(Kind::Stop);
                at.g += 1;
                self.end = (at.g, i + 1, j + 1);
                Some(())
            }
            _ => None,
        }
    }
}

/// Writes the alignment of one row and returns its number of chunks; `None` where the row needs more than this: bytes
/// that differ, an id outside the vocabulary, an end of turn on one side only, a token without bytes inside a chunk, what
/// may be a marker, a row that is too long.
pub(crate) fn merge<S, T, K>(
    student: Row<'_, S>,
    teacher: Row<'_, T>,
    arena: &[u8],
    out: &mut Out<'_, K>,
) -> Option<usize>
where
    S: Copy + Into<i64>,
    T: Copy + Into<i64>,
    K: Code,
{
    let (m, n) = (student.ids.len(), teacher.ids.len());
    // As much as a block more, if there is as much: what is written behind the last chunk is the next row's.
    let room = out.student_ptr.len().min(m.min(n) + BLOCK);
    if room <= m.min(n) {
        return None;
    }
    let out = out.part(&Axes { students: 0..m, teachers: 0..n, ptr: 0..room, chunks: 0..room });
    let mut merge = Merge { student, teacher, arena, out, end: (0, 0, 0) };
    // Opaque: the compiler would unroll known numbers into single additions and stores.
    let offsets = std::hint::black_box([0, 1, 2, 3, 4, 5, 6, 7]);
    let mut at = At::default();
    loop {
        if m - at.i >= BLOCK && n - at.j >= BLOCK && room - at.g >= BLOCK {
            let Some(Differ { a, b }) = merge.equal_tokens(&mut at, &offsets)? else { continue };
            if a.has_bytes() && b.has_bytes() {
                at = match merge.short_chunk(at, a, b) {
                    Found::Chunk(at) => at,
                    Found::Longer => merge.long_chunk(at, a, b)?,
                    Found::Differs => return None,
                };
                continue;
            }
        } else if at.i < m && at.j < n {
            let Some(Differ { a, b }) = merge.equal_tokens(&mut at, &[0])? else { continue };
            if a.has_bytes() && b.has_bytes() {
                at = merge.long_chunk(at, a, b)?;
                continue;
            }
        }
        if at.g > merge.end.0 {
            merge.end = (at.g, at.i, at.j);
        }
        if (at.i, at.j) == (m, n) {
            break;
        }
        merge.specials(&mut at)?;
    }
    if at.bytes > i32::MAX as usize {
        return None;
    }
    (merge.out.student_ptr[at.g], merge.out.teacher_ptr[at.g]) = (merge.end.1 as i32, merge.end.2 as i32);
    Some(at.g)
}
