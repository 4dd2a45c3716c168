//! Rows of both sides -> their chunks: a row at a time, or a batch over threads.

use std::ops::Range;
use std::sync::Arc;

use crate::chunks::{Alignment, Axes, Batch, Code, Halt, Kind, Out};
use crate::error::{Error, Side};
use crate::merge::clean::{self, Word};
use crate::merge::general;
use crate::pool;
use crate::rows::{Ids, Layout, Rows};
use crate::table::{ByteTable, Role};
use crate::tokens::{Scratch, Vocabulary, PADDING};

/// Aligns the ids of two vocabularies.
#[derive(Clone, Debug)]
pub struct Aligner {
    student: Vocabulary,
    teacher: Vocabulary,
    /// The bytes of all symbols, and zeros (`PADDING`).
    arena: Vec<u8>,
    /// The symbols in less memory, for rows that spell the same bytes.
    student_words: Vec<Word>,
    teacher_words: Vec<Word>,
}

impl Aligner {
    /// An aligner for a student's and a teacher's vocabulary.
    ///
    /// # Errors
    /// [`Error::Argument`] when both vocabularies together have 2^32 bytes or more.
    pub fn new(student: impl Into<Arc<ByteTable>>, teacher: impl Into<Arc<ByteTable>>) -> Result<Self, Error> {
        let (student, teacher, mut arena) = Vocabulary::both(student.into(), teacher.into())?;
        arena.extend([0; PADDING]);
        let student_words = Word::all(&student.symbols, 0, student.marker_starts());
        let teacher_words = Word::all(&teacher.symbols, 1, teacher.marker_starts());
        Ok(Self { student, teacher, arena, student_words, teacher_words })
    }

    /// The student's byte table.
    pub fn student(&self) -> &Arc<ByteTable> {
        &self.student.table
    }

    /// The teacher's byte table.
    pub fn teacher(&self) -> &Arc<ByteTable> {
        &self.teacher.table
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
        let chunk_cu = job.with_room(|room, sizes| {
            let arrays = flat.arrays_mut();
            let out = arrays.map(
                |axis, numbers| sized(numbers, sizes.of(axis), 0),
                |axis, kinds| sized(kinds, sizes.of(axis), Kind::OneToOne),
            );
            job.run(out, room)
        })?;
        let sizes = job.filled(&chunk_cu);
        flat.arrays_mut()
            .map(|axis, array| array.truncate(sizes.of(axis)), |axis, array| array.truncate(sizes.of(axis)));
        *batch = Batch { flat, student_cu: job.student_cu, teacher_cu: job.teacher_cu, chunk_cu };
        Ok(())
    }

    /// The first ids of the markers of a role on both sides, for every role of which these say that it begins and nothing
    /// else: where a model may begin a marker, they are the same event.
    pub fn marker_pairs(&self) -> Vec<(Role, u32, u32)> {
        let pair = |&(role, _): &(Role, &str)| Some((role, self.student.first_of(role)?, self.teacher.first_of(role)?));
        Role::ALL.iter().filter_map(pair).collect()
    }

    /// What the decoder of `side`'s tokenizer spells before, between and after the end-of-turn tokens (`None`) and the
    /// markers of every row, and which these are: one text more than there are of them. Bytes that are not UTF-8 become
    /// U+FFFD.
    ///
    /// # Errors
    /// [`Error::TokenId`] for an id outside the vocabulary.
    #[allow(clippy::type_complexity)]
    pub fn decode_lossy(&self, side: Side, rows: Rows<'_>) -> Result<Vec<(Vec<String>, Vec<Option<Role>>)>, Error> {
        let vocabulary = match side {
            Side::Student => &self.student,
            Side::Teacher => &self.teacher,
        };
        let cu = rows.cu();
        let decode = |scratch: &mut Scratch, b: usize| {
            let len = (cu[b + 1] - cu[b]) as usize;
            Ok(vocabulary.tokens(side, rows, (b, len), &self.arena, scratch)?.split())
        };
        pool::map_with(rows.len(), Default::default, decode).into_iter().collect()
    }
}

/// The array with this length, and what fits of it; one too small is replaced, not copied.
fn sized<T: Copy>(array: &mut Vec<T>, len: usize, fresh: T) -> &mut [T] {
    if array.capacity() < len {
        *array = vec![fresh; len];
    } else {
        array.resize(len, fresh);
    }
    array
}

/// How much room a row's chunks get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// One for each token of the shorter side: no less where the bytes are equal, and hardly ever more.
    Usual,
    /// One for each token of both sides: never more.
    All,
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
    /// The roles of which a marker's first token is the same event on both sides.
    pairs: Vec<Role>,
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
        let pairs = aligner.marker_pairs().iter().map(|pair| pair.0).collect();
        Ok(Self { aligner, student, teacher, strict, pairs, student_cu: student.cu(), teacher_cu: teacher.cu() })
    }

    /// Number of elements of the arrays, now that the chunks are known.
    pub fn filled(&self, chunk_cu: &[i64]) -> Axes<usize> {
        let (students, teachers) = self.tokens(0..self.student.len());
        let chunks = chunk_cu.last().map_or(0, |&chunks| chunks as usize);
        Axes { students, teachers, ptr: chunks + self.student.len(), chunks }
    }

    /// What `attempt` makes of the batch in arrays of the sizes that it is given: for the usual room, and where it finds
    /// that too little (`None`) for all room.
    ///
    /// # Errors
    /// Those of `attempt`.
    pub fn with_room<T, E: From<Error>>(
        &self,
        mut attempt: impl FnMut(Room, &Axes<usize>) -> Result<Option<T>, E>,
    ) -> Result<T, E> {
        for room in [Room::Usual, Room::All] {
            if let Some(done) = attempt(room, &self.sizes(0..self.student.len(), room))? {
                return Ok(done);
            }
        }
        Err(Error::Argument("a bug: more chunks than tokens".to_owned()).into())
    }

    /// Aligns every row, over the pool's threads, and returns `chunk_cu`; `None` where there is not enough room, which
    /// cannot be with [`Room::All`].
    ///
    /// # Errors
    /// As [`Aligner::align_batch`].
    pub fn run<K: Code>(&self, out: Out<'_, K>, room: Room) -> Result<Option<Vec<i64>>, Error> {
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
        match self.run_parts(rows, out, &mut chunk_cu[1..], room, grain) {
            Err(Halt::Full) => return Ok(None),
            Err(Halt::Error(error)) => return Err(error),
            Ok(_) => {}
        }
        for b in 1..chunk_cu.len() {
            chunk_cu[b] += chunk_cu[b - 1];
        }
        Ok(Some(chunk_cu))
    }

    fn tokens(&self, rows: Range<usize>) -> (usize, usize) {
        let tokens = |cu: &[i64]| (cu[rows.end] - cu[rows.start]) as usize;
        (tokens(&self.student_cu), tokens(&self.teacher_cu))
    }

    fn sizes(&self, rows: Range<usize>, room: Room) -> Axes<usize> {
        let (students, teachers) = self.tokens(rows.clone());
        let of_row = |b| match (room, self.tokens(b..b + 1)) {
            (Room::Usual, (m, n)) => m.min(n) + 1,
            (Room::All, (m, n)) => m + n + 1,
        };
        let room = rows.map(of_row).sum();
        Axes { students, teachers, ptr: room, chunks: room }
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
        let sizes = self.sizes(first.clone(), room);
        let (rows_before, room_before) = (first.len(), sizes.chunks);
        let (left, right) = out.split_at(&sizes);
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
        let mut scratch = (Scratch::default(), Scratch::default());
        let (mut given_student, mut given_teacher) = (vec![], vec![]);
        let (mut i, mut j, mut chunks) = (0, 0, 0);
        for ((k, b), count) in rows.enumerate().zip(counts) {
            let (m, n) = self.tokens(b..b + 1);
            let (ptr, kinds) = (chunks + k..out.student_ptr.len(), chunks..out.kind.len());
            let mut row = out.part(&Axes { students: i..i + m, teachers: j..j + n, ptr, chunks: kinds });
            let student = self.student.given(b, m, &mut given_student);
            let teacher = self.teacher.given(b, n, &mut given_teacher);
            let found = match self.merge_clean(student, teacher, &mut row) {
                Some(found) => found,
                None => self.merge_any(b, (m, n), &mut scratch, &mut row)?,
            };
            *count = found as i64;
            (i, j, chunks) = (i + m, j + n, chunks + found);
        }
        Ok(chunks)
    }

    /// Aligns row `b`, whatever its bytes.
    fn merge_any<K: Code>(
        &self,
        b: usize,
        (m, n): (usize, usize),
        (student, teacher): &mut (Scratch, Scratch),
        row: &mut Out<'_, K>,
    ) -> Result<usize, Halt> {
        let Aligner { student: s, teacher: t, arena, .. } = self.aligner;
        let s = s.tokens(Side::Student, self.student, (b, m), arena, student)?;
        let t = t.tokens(Side::Teacher, self.teacher, (b, n), arena, teacher)?;
        general::merge(b, s, t, self.strict, &self.pairs, row)
    }

    /// Aligns a row whose sides spell the same bytes; `None`: it needs more than that.
    fn merge_clean<K: Code>(&self, student: Ids<'_>, teacher: Ids<'_>, out: &mut Out<'_, K>) -> Option<usize> {
        let words = &self.aligner.student_words;
        match student {
            Ids::I32(ids) => self.merge_clean_with(clean::Row { ids, words }, teacher, out),
            Ids::I64(ids) => self.merge_clean_with(clean::Row { ids, words }, teacher, out),
            Ids::U32(ids) => self.merge_clean_with(clean::Row { ids, words }, teacher, out),
        }
    }

    fn merge_clean_with<S: Copy + Into<i64>, K: Code>(
        &self,
        student: clean::Row<'_, S>,
        teacher: Ids<'_>,
        out: &mut Out<'_, K>,
    ) -> Option<usize> {
        let (words, arena) = (&self.aligner.teacher_words, &self.aligner.arena);
        match teacher {
            Ids::I32(ids) => clean::merge(student, clean::Row { ids, words }, arena, out),
            Ids::I64(ids) => clean::merge(student, clean::Row { ids, words }, arena, out),
            Ids::U32(ids) => clean::merge(student, clean::Row { ids, words }, arena, out),
        }
    }
}
