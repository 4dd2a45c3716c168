//! What an alignment is made of: chunks, their kinds, and the arrays that say where they are.

// Here it is measured, in short rows: what goes over all arrays shall be as if each were written out.
#![allow(clippy::inline_always)]

use std::ops::Range;

use crate::error::{Error, Side};

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
    /// A marker of one role on both sides ([`Role`](crate::Role)), whatever the ids and how many.
    Marker = 6,
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

/// What the length of an array counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    Students,
    Teachers,
    /// Chunks, and one more for each row.
    Ptr,
    Chunks,
}

/// Something for every axis: a length, or a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axes<T> {
    pub students: T,
    pub teachers: T,
    pub ptr: T,
    pub chunks: T,
}

impl<T: Clone> Axes<T> {
    #[inline(always)]
    pub fn of(&self, axis: Axis) -> T {
        let of = match axis {
            Axis::Students => &self.students,
            Axis::Teachers => &self.teachers,
            Axis::Ptr => &self.ptr,
            Axis::Chunks => &self.chunks,
        };
        of.clone()
    }
}

/// One of two, for an array of numbers (`N`) or of kinds (`K`).
macro_rules! pick {
    (N [$($numbers:tt)*] [$($kinds:tt)*]) => { $($numbers)* };
    (K [$($numbers:tt)*] [$($kinds:tt)*]) => { $($kinds)* };
}

/// Makes everything that has to name all arrays of an alignment from one list of them.
macro_rules! declare {
    ($($(#[$doc:meta])* $name:ident: $of:ident by $axis:ident,)*) => {
        /// The alignment of one row.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Alignment {
            $($(#[$doc])* pub $name: pick!($of [Vec<i32>] [Vec<Kind>]),)*
            /// Where the student's and the teacher's tokens start, if they leave gaps or overlap (`align_offsets`): both
            /// count in the same text. `None`: every token starts where the one before it ends.
            pub starts: Option<Box<(Vec<i32>, Vec<i32>)>>,
        }

        impl Alignment {
            pub(crate) fn arrays(&self) -> Arrays<&[i32], &[Kind]> {
                Arrays { $($name: &self.$name,)* }
            }

            pub(crate) fn arrays_mut(&mut self) -> Arrays<&mut Vec<i32>, &mut Vec<Kind>> {
                Arrays { $($name: &mut self.$name,)* }
            }
        }

        /// The arrays of an alignment in any form: borrowed, to be written, as places in memory, Python's.
        #[derive(Clone, Copy, Debug, Default)]
        pub(crate) struct Arrays<N, K> {
            $(pub $name: $of,)*
        }

        impl<N, K> Arrays<N, K> {
            #[inline(always)]
            pub fn map<M, L>(
                self,
                mut numbers: impl FnMut(Axis, N) -> M,
                mut kinds: impl FnMut(Axis, K) -> L,
            ) -> Arrays<M, L> {
                Arrays { $($name: pick!($of [numbers] [kinds])(Axis::$axis, self.$name),)* }
            }

            #[inline(always)]
            pub fn each_mut(&mut self) -> Arrays<&mut N, &mut K> {
                Arrays { $($name: &mut self.$name,)* }
            }
        }

        impl<N, K, M, L> Arrays<(N, M), (K, L)> {
            #[inline(always)]
            fn unzip(self) -> (Arrays<N, K>, Arrays<M, L>) {
                (Arrays { $($name: self.$name.0,)* }, Arrays { $($name: self.$name.1,)* })
            }
        }

        #[cfg(feature = "python")]
        mod for_python {
            use super::{Alignment, Arrays, Kind};

            impl Arrays<(), ()> {
                /// The names of the arrays, in order.
                pub const NAMES: &'static [&'static str] = &[$(stringify!($name),)*];
            }

            impl<N, K> Arrays<N, K> {
                pub fn each(&self) -> Arrays<&N, &K> {
                    Arrays { $($name: &self.$name,)* }
                }
            }

            impl<T> Arrays<T, T> {
                pub fn into_iter(self) -> impl Iterator<Item = T> {
                    [$(self.$name,)*].into_iter()
                }
            }

            impl<N, K, E> Arrays<Result<N, E>, Result<K, E>> {
                /// The first error in order, if there is one.
                pub fn transpose(self) -> Result<Arrays<N, K>, E> {
                    Ok(Arrays { $($name: self.$name?,)* })
                }
            }

            impl From<Alignment> for Arrays<Vec<i32>, Vec<Kind>> {
                fn from(a: Alignment) -> Self {
                    Self { $($name: a.$name,)* }
                }
            }
        }
    };
}

declare! {
    /// Chunk `g` starts at student token `student_ptr[g]`; `G + 1` entries.
    student_ptr: N by Ptr,
    /// Chunk `g` starts at teacher token `teacher_ptr[g]`; `G + 1` entries.
    teacher_ptr: N by Ptr,
    /// Kind of every chunk.
    kind: K by Chunks,
    /// Chunk of every student token, -1 where unaligned.
    student_chunk: N by Students,
    /// Chunk of every teacher token, -1 where unaligned.
    teacher_chunk: N by Teachers,
    /// Byte end of every student token in the student's bytes.
    student_end: N by Students,
    /// Byte end of every teacher token in the teacher's bytes.
    teacher_end: N by Teachers,
    /// The teacher token in which every student token starts, -1 where that is not known.
    teacher_pos: N by Students,
    /// The byte inside that teacher token, -1 where that is not known.
    teacher_off: N by Students,
}

impl Alignment {
    /// Whether the fields fit each other, so that nothing reads outside them.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the side that does not fit.
    pub fn check(&self) -> Result<(), Error> {
        self.row().check()
    }

    pub(crate) fn row(&self) -> Row<'_> {
        Row { arrays: self.arrays(), starts: self.starts.as_deref().map(|(s, t)| (s.as_slice(), t.as_slice())) }
    }
}

/// The alignment of one row, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub arrays: Arrays<&'a [i32], &'a [Kind]>,
    pub starts: Option<(&'a [i32], &'a [i32])>,
}

impl Row<'_> {
    /// As [`Alignment::check`].
    pub fn check(&self) -> Result<(), Error> {
        let (a, chunks) = (self.arrays, self.arrays.kind.len());
        let student = (a.student_ptr, a.student_chunk, a.student_end, self.starts.map(|s| s.0));
        let teacher = (a.teacher_ptr, a.teacher_chunk, a.teacher_end, self.starts.map(|s| s.1));
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

/// A batch, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub flat: Arrays<&'a [i32], &'a [Kind]>,
    pub student_cu: &'a [i64],
    pub teacher_cu: &'a [i64],
    pub chunk_cu: &'a [i64],
}

impl<'a> From<&'a Batch> for View<'a> {
    fn from(batch: &'a Batch) -> Self {
        Self {
            flat: batch.flat.arrays(),
            student_cu: &batch.student_cu,
            teacher_cu: &batch.teacher_cu,
            chunk_cu: &batch.chunk_cu,
        }
    }
}

impl<'a> View<'a> {
    /// Whether the rows fill the arrays, and these have so many tokens.
    pub fn fits(&self, students: usize, teachers: usize) -> bool {
        let rows = self.student_cu.len().wrapping_sub(1);
        let chunks = self.flat.kind.len();
        let sizes = Axes { students, teachers, ptr: chunks.wrapping_add(rows), chunks };
        let bounds = |cu: &[i64], total: usize| {
            cu.len() == rows.wrapping_add(1)
                && cu.first() == Some(&0)
                && cu.windows(2).all(|w| w[0] <= w[1])
                && cu.last() == Some(&(total as i64))
        };
        let mut fits =
            bounds(self.student_cu, students) && bounds(self.teacher_cu, teachers) && bounds(self.chunk_cu, chunks);
        self.flat.map(|axis, numbers| fits &= numbers.len() == sizes.of(axis), |_, _| ());
        fits
    }

    pub fn rows(&self) -> usize {
        self.student_cu.len() - 1
    }

    /// Where row `b` lies in the arrays.
    pub fn place(&self, b: usize) -> Axes<Range<usize>> {
        let range = |cu: &[i64]| cu[b] as usize..cu[b + 1] as usize;
        let chunks = range(self.chunk_cu);
        let ptr = chunks.start + b..chunks.end + b + 1;
        Axes { students: range(self.student_cu), teachers: range(self.teacher_cu), ptr, chunks }
    }

    pub fn row(&self, at: &Axes<Range<usize>>) -> Arrays<&'a [i32], &'a [Kind]> {
        self.flat.map(|axis, numbers| &numbers[at.of(axis)], |axis, kinds| &kinds[at.of(axis)])
    }
}

/// Where some rows of a batch are written. What lies there before does not matter: every element up to the last chunk
/// is written. There is room for the chunks of all rows.
pub(crate) type Out<'a, K> = Arrays<&'a mut [i32], &'a mut [K]>;

impl<K> Out<'_, K> {
    #[inline(always)]
    pub fn part(&mut self, at: &Axes<Range<usize>>) -> Out<'_, K> {
        self.each_mut().map(|axis, numbers| &mut numbers[at.of(axis)], |axis, kinds| &mut kinds[at.of(axis)])
    }

    /// Two parts for two threads.
    pub fn split_at(&mut self, at: &Axes<usize>) -> (Out<'_, K>, Out<'_, K>) {
        let halves = self
            .each_mut()
            .map(|axis, numbers| numbers.split_at_mut(at.of(axis)), |axis, kinds| kinds.split_at_mut(at.of(axis)));
        halves.unzip()
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
