//! `Aligner`, and the memory that its batches lie in.

use std::ops::Range;
use std::sync::Mutex;

use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PySlice, PyTuple};

use super::rows::Held;
use super::support::{caught, has_gil, in_threads};
use super::table::PyByteTable;
use crate::aligner::{Aligner, Job};
use crate::chunks::{Arrays, Axes, Out};
use crate::error::Side;
use crate::table::Role;

/// The memory of a batch, which its arrays are views of.
struct Memory {
    numbers: Py<PyArray1<i32>>,
    kinds: Py<PyArray1<u8>>,
}

impl Memory {
    /// Nothing larger is kept: bytes.
    const MAX: usize = 64 << 20;

    fn new(py: Python<'_>, numbers: usize, kinds: usize) -> Self {
        let (numbers, kinds) = (PyArray1::zeros(py, numbers, false), PyArray1::zeros(py, kinds, false));
        Self { numbers: numbers.unbind(), kinds: kinds.unbind() }
    }

    /// Whether no array looks at it any more, and it is large enough but not much larger.
    fn fits(&self, py: Python<'_>, numbers: usize, kinds: usize) -> bool {
        // Views count as references to the array they look at.
        #[allow(deprecated)]
        let is_free = self.numbers.get_refcnt(py) == 1 && self.kinds.get_refcnt(py) == 1;
        let (len, kinds_len) = (self.numbers.bind(py).len(), self.kinds.bind(py).len());
        is_free && len >= numbers && kinds_len >= kinds && len / 4 <= numbers
    }
}

/// Memory of earlier batches: fresh pages cost several times the alignment. The last comes first; while one batch is at
/// work, the next may be made.
///
/// Without a GIL nothing is kept: a count of references is then no more than a guess.
#[derive(Default)]
struct Memories([Mutex<Option<Memory>>; 2]);

/// `None` also where another thread is at the place.
fn taken(place: &Mutex<Option<Memory>>) -> Option<Memory> {
    place.try_lock().ok()?.take()
}

/// Puts a memory in its place; what has none, this one or the one before, is handed back.
fn put(place: &Mutex<Option<Memory>>, memory: Memory) -> Option<Memory> {
    match place.try_lock() {
        Ok(mut place) => place.replace(memory),
        Err(_) => Some(memory),
    }
}

impl Memories {
    fn take(&self, py: Python<'_>, numbers: usize, kinds: usize) -> Memory {
        for place in &self.0 {
            if let Some(memory) = taken(place) {
                if memory.fits(py, numbers, kinds) {
                    return memory;
                }
                drop(put(place, memory));
            }
        }
        Memory::new(py, numbers, kinds)
    }

    fn keep(&self, py: Python<'_>, memory: Memory) {
        if memory.numbers.bind(py).len() * size_of::<i32>() <= Memory::MAX {
            let [first, second] = &self.0;
            drop(put(first, memory).map(|before| put(second, before)));
        }
    }
}

/// Where the arrays lie in one array of numbers, and `kind` in one of its own; and how many numbers that makes.
fn places(sizes: &Axes<usize>) -> (Arrays<Range<usize>, Range<usize>>, usize) {
    let mut end = 0;
    let next = |axis, ()| {
        let start = end;
        end += sizes.of(axis);
        start..end
    };
    let places = Arrays::<(), ()>::default().map(next, |axis, ()| 0..sizes.of(axis));
    (places, end)
}

/// The arrays at these places.
fn out<'a>(
    places: &Arrays<Range<usize>, Range<usize>>,
    mut numbers: &'a mut [i32],
    mut kinds: &'a mut [u8],
) -> Out<'a, u8> {
    let next = |_, place: &Range<usize>| {
        let (taken, rest) = std::mem::take(&mut numbers).split_at_mut(place.len());
        numbers = rest;
        taken
    };
    places.each().map(next, |_, place| &mut std::mem::take(&mut kinds)[place.clone()])
}

#[pyclass(frozen, name = "Aligner", module = "xtokmap._core")]
pub(super) struct PyAligner {
    aligner: Aligner,
    memories: Option<Memories>,
}

#[pymethods]
impl PyAligner {
    #[new]
    fn new(py: Python<'_>, student: &PyByteTable, teacher: &PyByteTable) -> PyResult<Self> {
        caught(|| {
            let (student, teacher) = (student.table.clone(), teacher.table.clone());
            let aligner = py.detach(|| Aligner::new(student, teacher))?;
            Ok(Self { aligner, memories: has_gil(py)?.then(Memories::default) })
        })
    }

    /// The arrays of a batch in their order, then `student_cu`, `teacher_cu` and `chunk_cu`.
    #[pyo3(signature = (student_ids, student_layout, teacher_ids, teacher_layout, strict, threads))]
    #[allow(clippy::too_many_arguments)]
    fn align_batch<'py>(
        &self,
        py: Python<'py>,
        student_ids: &Bound<'py, PyAny>,
        student_layout: &Bound<'py, PyAny>,
        teacher_ids: &Bound<'py, PyAny>,
        teacher_layout: &Bound<'py, PyAny>,
        strict: bool,
        threads: Option<i64>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let (student, teacher) = (Held::new(student_ids, student_layout)?, Held::new(teacher_ids, teacher_layout)?);
            let (student, teacher) = (student.rows(Side::Student)?, teacher.rows(Side::Teacher)?);
            let job = Job::new(&self.aligner, student, teacher, strict)?;
            let (memory, places, chunk_cu) = job.with_room(|room, sizes| {
                let (places, total) = places(sizes);
                let fresh = || Memory::new(py, total, sizes.chunks);
                let memory = self.memories.as_ref().map_or_else(fresh, |kept| kept.take(py, total, sizes.chunks));
                let done = {
                    let mut numbers = memory.numbers.bind(py).try_readwrite()?;
                    let mut kinds = memory.kinds.bind(py).try_readwrite()?;
                    let out = out(&places, numbers.as_slice_mut()?, kinds.as_slice_mut()?);
                    in_threads(py, threads, || job.run(out, room))?
                };
                Ok::<_, PyErr>(done.map(|chunk_cu| (memory, places, chunk_cu)))
            })?;
            let sizes = job.filled(&chunk_cu);
            let (numbers, kinds) = (memory.numbers.bind(py), memory.kinds.bind(py));
            let view = |all: &Bound<'py, PyAny>, from: usize, len: usize| {
                all.get_item(PySlice::new(py, from as isize, (from + len) as isize, 1))
            };
            let views = places.map(
                |axis, place| view(numbers, place.start, sizes.of(axis)),
                |axis, place| view(kinds, place.start, sizes.of(axis)),
            );
            let cu = [job.student_cu, job.teacher_cu, chunk_cu].map(|cu| Ok(cu.into_pyarray(py).into_any()));
            let all = views.into_iter().chain(cu).collect::<PyResult<Vec<_>>>()?;
            if let Some(kept) = &self.memories {
                kept.keep(py, memory);
            }
            PyTuple::new(py, all)
        })
    }

    /// Texts, how many every row has, and what stands between them: the number of a marker's role, `None` for an end of
    /// turn.
    #[allow(clippy::type_complexity)]
    fn student_texts<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        layout: &Bound<'py, PyAny>,
        threads: Option<i64>,
    ) -> PyResult<(Vec<String>, Vec<usize>, Vec<Option<u8>>)> {
        caught(|| {
            let held = Held::new(ids, layout)?;
            let rows = held.rows(Side::Student)?;
            let rows = in_threads(py, threads, || self.aligner.decode_lossy(Side::Student, rows))?;
            let counts = rows.iter().map(|row| row.0.len()).collect();
            let (texts, cuts): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
            let number = |cut: Option<Role>| cut.map(|role| role as u8);
            Ok((texts.into_iter().flatten().collect(), counts, cuts.into_iter().flatten().map(number).collect()))
        })
    }

    /// The first ids of markers that are the same event on both sides: student's, teacher's.
    fn marker_pairs(&self) -> PyResult<Vec<(u32, u32)>> {
        caught(|| Ok(self.aligner.marker_pairs().into_iter().map(|(_, s, t)| (s, t)).collect()))
    }
}
