//! A batch, row by row or over threads: where every row is read and written.

use std::ops::Range;

use crate::align::{Aligner, Ids, Kind, Rows, Scratch};
use crate::clean::{self, Side};
use crate::{pool, Error};

/// A chunk's kind as it is written: itself, or its number.
pub(crate) trait Code: Copy + Send {
    fn of(kind: Kind) -> Self;
}

impl Code for Kind {
    fn of(kind: Kind) -> Self {
        kind
    }
}

impl Code for u8 {
    fn of(kind: Kind) -> Self {
        kind as u8
    }
}

/// Where some rows of a batch are written. What lies there before does not matter: every element up to the last chunk
/// is written.
pub(crate) struct Out<'a, K> {
    pub student_end: &'a mut [i32],
    pub teacher_end: &'a mut [i32],
    pub student_chunk: &'a mut [i32],
    pub teacher_chunk: &'a mut [i32],
    pub teacher_pos: &'a mut [i32],
    pub teacher_off: &'a mut [i32],
    /// Room for the chunks of all rows, and one more for each row.
    pub student_ptr: &'a mut [i32],
    pub teacher_ptr: &'a mut [i32],
    pub kind: &'a mut [K],
}

impl<K> Out<'_, K> {
    /// The part that belongs to these tokens and chunks.
    pub fn part(&mut self, students: Range<usize>, teachers: Range<usize>, ptr: usize, kind: usize) -> Out<'_, K> {
        Out {
            student_end: &mut self.student_end[students.clone()],
            teacher_end: &mut self.teacher_end[teachers.clone()],
            student_chunk: &mut self.student_chunk[students.clone()],
            teacher_chunk: &mut self.teacher_chunk[teachers],
            teacher_pos: &mut self.teacher_pos[students.clone()],
            teacher_off: &mut self.teacher_off[students],
            student_ptr: &mut self.student_ptr[ptr..],
            teacher_ptr: &mut self.teacher_ptr[ptr..],
            kind: &mut self.kind[kind..],
        }
    }

    /// Two parts for two threads: the second has the tokens and the room from these places on.
    pub fn split_at(&mut self, students: usize, teachers: usize, room: usize) -> (Out<'_, K>, Out<'_, K>) {
        let student_end = self.student_end.split_at_mut(students);
        let teacher_end = self.teacher_end.split_at_mut(teachers);
        let student_chunk = self.student_chunk.split_at_mut(students);
        let teacher_chunk = self.teacher_chunk.split_at_mut(teachers);
        let teacher_pos = self.teacher_pos.split_at_mut(students);
        let teacher_off = self.teacher_off.split_at_mut(students);
        let student_ptr = self.student_ptr.split_at_mut(room);
        let teacher_ptr = self.teacher_ptr.split_at_mut(room);
        let kind = self.kind.split_at_mut(room);
        let left = Out {
            student_end: student_end.0,
            teacher_end: teacher_end.0,
            student_chunk: student_chunk.0,
            teacher_chunk: teacher_chunk.0,
            teacher_pos: teacher_pos.0,
            teacher_off: teacher_off.0,
            student_ptr: student_ptr.0,
            teacher_ptr: teacher_ptr.0,
            kind: kind.0,
        };
        let right = Out {
            student_end: student_end.1,
            teacher_end: teacher_end.1,
            student_chunk: student_chunk.1,
            teacher_chunk: teacher_chunk.1,
            teacher_pos: teacher_pos.1,
            teacher_off: teacher_off.1,
            student_ptr: student_ptr.1,
            teacher_ptr: teacher_ptr.1,
            kind: kind.1,
        };
        (left, right)
    }
}

/// Why some rows could not be written.
pub(crate) enum Halt {
    /// There is not enough room for the chunks.
    Full,
    Error(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// How much room a row's chunks get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// One for each token of the shorter side: no less where the bytes are equal, and hardly ever more.
    Usual,
    /// One for each token of both sides: never more.
    All,
}

/// Number of elements of a batch's arrays.
pub(crate) struct Sizes {
    pub students: usize,
    pub teachers: usize,
    /// Of `student_ptr`, `teacher_ptr` and `kind`, before the last chunk is known.
    pub room: usize,
}

/// Not worth another thread: tokens of both sides.
const GRAIN: usize = 8192;
/// Parts for each thread, so that a slow one does not hold up the others.
const PARTS: usize = 4;

/// The rows of both sides, and how to align them.
pub(crate) struct Job<'a> {
    aligner: &'a Aligner,
    student: Rows<'a>,
    teacher: Rows<'a>,
    strict: bool,
    pub student_cu: Vec<i64>,
    pub teacher_cu: Vec<i64>,
}

impl<'a> Job<'a> {
    /// # Errors
    /// [`Error::Argument`] when the sides have another number of rows.
    pub fn new(aligner: &'a Aligner, student: Rows<'a>, teacher: Rows<'a>, strict: bool) -> Result<Self, Error> {
        if student.len() != teacher.len() {
            return Err(Error::Argument(format!(
                "student_ids has {} rows and teacher_ids {}; each student row needs its teacher row",
                student.len(),
                teacher.len()
            )));
        }
        Ok(Self { aligner, student, teacher, strict, student_cu: student.cu(), teacher_cu: teacher.cu() })
    }

    pub fn sizes(&self, room: Room) -> Sizes {
        let (students, teachers) = self.tokens(0..self.student.len());
        Sizes { students, teachers, room: self.room(0..self.student.len(), room) }
    }

    /// Aligns every row, over the pool's threads, and returns `chunk_cu`.
    ///
    /// # Errors
    /// As [`Aligner::align_batch`], and [`Halt::Full`] unless the room is [`Room::All`].
    pub fn run<K: Code>(&self, out: Out<'_, K>, room: Room) -> Result<Vec<i64>, Halt> {
        let rows = 0..self.student.len();
        let (m, n) = self.tokens(rows.clone());
        let grain = if rows.len() > 1 && m + n > GRAIN {
            match pool::threads() {
                1 => usize::MAX,
                threads => GRAIN.max((m + n) / (PARTS * threads)),
            }
        } else {
            usize::MAX
        };
        let mut chunk_cu = vec![0; rows.len() + 1];
        self.run_parts(rows, out, &mut chunk_cu[1..], room, grain)?;
        for b in 1..chunk_cu.len() {
            chunk_cu[b] += chunk_cu[b - 1];
        }
        Ok(chunk_cu)
    }

    fn tokens(&self, rows: Range<usize>) -> (usize, usize) {
        let tokens = |cu: &[i64]| (cu[rows.end] - cu[rows.start]) as usize;
        (tokens(&self.student_cu), tokens(&self.teacher_cu))
    }

    /// How many chunks these rows may have, and one more for each row.
    fn room(&self, rows: Range<usize>, room: Room) -> usize {
        let of_row = |b| match (room, self.tokens(b..b + 1)) {
            (Room::Usual, (m, n)) => m.min(n) + 1,
            (Room::All, (m, n)) => m + n + 1,
        };
        rows.map(of_row).sum()
    }

    /// Aligns these rows, in parts of about `grain` tokens, and returns how many chunks they have; `counts` takes the
    /// number of each row.
    fn run_parts<K: Code>(
        &self,
        rows: Range<usize>,
        mut out: Out<'_, K>,
        counts: &mut [i64],
        room: Room,
        grain: usize,
    ) -> Result<usize, Halt> {
        let (m, n) = self.tokens(rows.clone());
        if rows.len() <= 1 || m + n <= grain {
            return self.run_rows(rows, out, counts);
        }
        let half = self.student_cu[rows.start] + self.teacher_cu[rows.start] + usize::midpoint(m, n) as i64;
        let mut middle = rows.start + 1;
        while middle + 1 < rows.end && self.student_cu[middle] + self.teacher_cu[middle] < half {
            middle += 1;
        }
        let (first, second) = (rows.start..middle, middle..rows.end);
        let (m, n) = self.tokens(first.clone());
        let (rows_before, room_before) = (first.len(), self.room(first.clone(), room));
        let (left, right) = out.split_at(m, n, room_before);
        let (left_counts, right_counts) = counts.split_at_mut(rows_before);
        let more = second.len();
        let (left, right) = pool::join(
            || self.run_parts(first, left, left_counts, room, grain),
            || self.run_parts(second, right, right_counts, room, grain),
        );
        // The first row that is wrong decides.
        let (left, right) = (left?, right?);
        let ptr = room_before..room_before + right + more;
        out.student_ptr.copy_within(ptr.clone(), left + rows_before);
        out.teacher_ptr.copy_within(ptr, left + rows_before);
        out.kind.copy_within(room_before..room_before + right, left);
        Ok(left + right)
    }

    /// Aligns these rows one after the other, each written where the one before it ends.
    fn run_rows<K: Code>(&self, rows: Range<usize>, mut out: Out<'_, K>, counts: &mut [i64]) -> Result<usize, Halt> {
        let mut scratch = Scratch::default();
        let (mut given_student, mut given_teacher) = (vec![], vec![]);
        let (mut i, mut j, mut chunks) = (0, 0, 0);
        for ((k, b), count) in rows.enumerate().zip(counts) {
            let (m, n) = self.tokens(b..b + 1);
            let mut row = out.part(i..i + m, j..j + n, chunks + k, chunks);
            let student = self.student.given(b, m, &mut given_student);
            let teacher = self.teacher.given(b, n, &mut given_teacher);
            let found = match self.merge(student, teacher, &mut row) {
                Some(found) => found,
                None => self.aligner.align_row(b, self.student, self.teacher, self.strict, &mut scratch, &mut row)?,
            };
            *count = found as i64;
            (i, j, chunks) = (i + m, j + n, chunks + found);
        }
        Ok(chunks)
    }

    fn merge<K: Code>(&self, student: Ids<'_>, teacher: Ids<'_>, out: &mut Out<'_, K>) -> Option<usize> {
        let words = &self.aligner.student_words;
        match student {
            Ids::I32(ids) => self.merge_with(Side { ids, words }, teacher, out),
            Ids::I64(ids) => self.merge_with(Side { ids, words }, teacher, out),
            Ids::U32(ids) => self.merge_with(Side { ids, words }, teacher, out),
        }
    }

    fn merge_with<S: Copy + Into<i64>, K: Code>(
        &self,
        student: Side<'_, S>,
        teacher: Ids<'_>,
        out: &mut Out<'_, K>,
    ) -> Option<usize> {
        let (words, arena) = (&self.aligner.teacher_words, &self.aligner.arena);
        match teacher {
            Ids::I32(ids) => clean::merge(student, Side { ids, words }, arena, out),
            Ids::I64(ids) => clean::merge(student, Side { ids, words }, arena, out),
            Ids::U32(ids) => clean::merge(student, Side { ids, words }, arena, out),
        }
    }
}
