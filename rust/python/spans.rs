//! Overlaps, spans and alignments without a vocabulary.

use numpy::{IntoPyArray, PyArray2, PyArrayMethods, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::arrays::{tuple, Given, Starts};
use super::support::{caught, pairs};
use crate::error::Side;
use crate::spans::{self, SpanMode};

/// Overlaps as (indptr int64 `[m+1]`, indices int32 `[nnz]`, nbytes int32 `[nnz]`).
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn overlaps<'py>(
    py: Python<'py>,
    arrays: Given<'py>,
    starts: Option<Starts<'py>>,
) -> PyResult<Bound<'py, PyTuple>> {
    caught(|| {
        let kinds = arrays.kinds()?;
        let row = arrays.row(&kinds, starts.as_ref())?;
        let all = py.detach(|| spans::overlaps_of(row));
        (all.indptr.into_pyarray(py), all.indices.into_pyarray(py), all.nbytes.into_pyarray(py)).into_pyobject(py)
    })
}

/// Spans int64 `[k, 2]` of one side on the other.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn map_spans<'py>(
    py: Python<'py>,
    arrays: Given<'py>,
    starts: Option<Starts<'py>>,
    spans: PyReadonlyArray2<'py, i64>,
    to_teacher: bool,
    cover: bool,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    caught(|| {
        let (kinds, spans) = (arrays.kinds()?, pairs(&spans)?);
        let row = arrays.row(&kinds, starts.as_ref())?;
        let to = if to_teacher { Side::Teacher } else { Side::Student };
        let mode = if cover { SpanMode::Cover } else { SpanMode::Inside };
        let mapped = py.detach(|| spans::map_spans_of(row, &spans, to, mode))?;
        let k = mapped.len();
        mapped.into_flattened().into_pyarray(py).reshape([k, 2])
    })
}

/// The arrays of an alignment made from sorted offsets int64 `[m, 2]` and `[n, 2]`, and where the tokens of both
/// sides start.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn align_offsets<'py>(
    py: Python<'py>,
    student: PyReadonlyArray2<'py, i64>,
    teacher: PyReadonlyArray2<'py, i64>,
) -> PyResult<Bound<'py, PyTuple>> {
    caught(|| {
        let (student, teacher) = (pairs(&student)?, pairs(&teacher)?);
        let mut flat = py.detach(|| spans::align_offsets(&student, &teacher))?;
        let starts = flat.starts.take().unwrap_or_default();
        (tuple(py, flat)?, (starts.0.into_pyarray(py), starts.1.into_pyarray(py))).into_pyobject(py)
    })
}

#[pyfunction]
#[allow(clippy::type_complexity, clippy::needless_pass_by_value)]
pub(super) fn get_alignments(
    py: Python<'_>,
    tokens_a: Vec<String>,
    tokens_b: Vec<String>,
) -> PyResult<(Vec<Vec<usize>>, Vec<Vec<usize>>)> {
    caught(|| Ok(py.detach(|| spans::align_texts(&tokens_a, &tokens_b))))
}
