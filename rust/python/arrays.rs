//! The arrays of an alignment, to Python and back.

use std::cell::Cell;

use numpy::IntoPyArray;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use pyo3::IntoPyObjectExt;

use super::errors::XTokMapError;
use super::support::Array;
use crate::chunks::{Alignment, Arrays, Kind, Row, View};

/// The kinds of chunks in the order of their numbers.
const KINDS: [(Kind, &str); 7] = [
    (Kind::OneToOne, "ONE_TO_ONE"),
    (Kind::OneToMany, "ONE_TO_MANY"),
    (Kind::ManyToOne, "MANY_TO_ONE"),
    (Kind::ManyToMany, "MANY_TO_MANY"),
    (Kind::Rewritten, "REWRITTEN"),
    (Kind::Stop, "STOP"),
    (Kind::Marker, "MARKER"),
];

pub(super) fn kinds(py: Python<'_>) -> PyResult<Py<PyAny>> {
    let all = PyDict::new(py);
    for (kind, name) in KINDS {
        all.set_item(name, kind as u8)?;
    }
    all.into_py_any(py)
}

/// The arrays of an alignment in their order; every one is moved, not copied.
pub(super) fn tuple(py: Python<'_>, alignment: Alignment) -> PyResult<Bound<'_, PyTuple>> {
    let code = |kinds: Vec<Kind>| kinds.into_iter().map(|kind| kind as u8).collect::<Vec<u8>>();
    let arrays = Arrays::from(alignment)
        .map(|_, numbers| numbers.into_pyarray(py).into_any(), |_, kinds| code(kinds).into_pyarray(py).into_any());
    PyTuple::new(py, arrays.into_iter().collect::<Vec<_>>())
}

/// The arrays of an alignment that comes back from Python, as a tuple in their order.
pub(super) type Given<'py> = Arrays<Array<'py, i32>, Array<'py, u8>>;
/// Where the tokens of both sides start.
pub(super) type Starts<'py> = (Array<'py, i32>, Array<'py, i32>);
/// `student_cu`, `teacher_cu` and `chunk_cu` of a batch.
pub(super) type Cus<'py> = (Array<'py, i64>, Array<'py, i64>, Array<'py, i64>);

impl<'py> FromPyObject<'_, 'py> for Given<'py> {
    type Error = PyErr;

    fn extract(all: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        let all = all.cast::<PyTuple>()?;
        let place = Cell::new(0);
        let next = || all.get_item(place.replace(place.get() + 1));
        Arrays::<(), ()>::default().map(|_, ()| next()?.extract(), |_, ()| next()?.extract()).transpose()
    }
}

impl Given<'_> {
    pub fn kinds(&self) -> PyResult<Vec<Kind>> {
        let kind = |&number: &u8| KINDS.get(number as usize).map(|&(kind, _)| kind);
        let kinds: Option<Vec<Kind>> = self.kind.as_slice()?.iter().map(kind).collect();
        kinds.ok_or_else(|| XTokMapError::new_err("kind: a number that is no kind of chunk"))
    }

    fn borrowed<'a>(&'a self, kinds: &'a [Kind]) -> PyResult<Arrays<&'a [i32], &'a [Kind]>> {
        self.each().map(|_, numbers| Ok::<_, PyErr>(numbers.as_slice()?), |_, _| Ok(kinds)).transpose()
    }

    pub fn row<'a>(&'a self, kinds: &'a [Kind], starts: Option<&'a Starts<'_>>) -> PyResult<Row<'a>> {
        let starts = starts.map(|(s, t)| Ok::<_, PyErr>((s.as_slice()?, t.as_slice()?))).transpose()?;
        let row = Row { arrays: self.borrowed(kinds)?, starts };
        row.check()?;
        Ok(row)
    }

    pub fn batch<'a>(&'a self, kinds: &'a [Kind], cu: &'a Cus<'_>) -> PyResult<View<'a>> {
        let flat = self.borrowed(kinds)?;
        let (student_cu, teacher_cu, chunk_cu) = (cu.0.as_slice()?, cu.1.as_slice()?, cu.2.as_slice()?);
        Ok(View { flat, student_cu, teacher_cu, chunk_cu })
    }
}
