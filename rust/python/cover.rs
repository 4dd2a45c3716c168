//! `Cover`, the vocabulary map and the sets of queries.

use std::sync::Arc;

use numpy::{IntoPyArray, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arrays::{Cus, Given};
use super::encoding::PyEncoding;
use super::support::{caught, in_threads, values, Array};
use crate::cover::{Cover, Of, Queries, Set};
use crate::table::Sorted;
use crate::vocab_map::VocabMap;

#[pyclass(frozen, name = "Cover", module = "xtokmap._core")]
pub(super) struct PyCover {
    map: Arc<VocabMap>,
    cover: Cover,
}

#[pymethods]
impl PyCover {
    #[new]
    #[pyo3(signature = (student, teacher, pieces=None, letter=None))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(
        py: Python<'_>,
        student: &PyEncoding,
        teacher: &PyEncoding,
        pieces: Option<Array<'_, u32>>,
        letter: Option<u8>,
    ) -> PyResult<Self> {
        caught(|| {
            let (student, teacher) = (student.0.clone(), teacher.0.clone());
            let pieces = pieces.map(|pieces| values(&pieces)).transpose()?.unwrap_or_default();
            Ok(py.detach(|| {
                let map = Arc::new(VocabMap::new(&student, &teacher, &pieces, letter));
                Self { cover: Cover::new(student, teacher, map.clone(), letter), map }
            }))
        })
    }

    #[getter]
    fn same(&self) -> bool {
        self.cover.same()
    }

    /// The arrays of the vocabulary map by name.
    fn vocab_map<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        caught(|| {
            let all = PyDict::new(py);
            let map = &*self.map;
            for (name, values) in [
                ("teacher_to_student", &map.teacher_to_student),
                ("student_to_teacher", &map.student_to_teacher),
                ("prefix", &map.prefix),
                ("canonical", &map.canonical),
                ("teacher_first", &map.teacher_first),
                ("teacher_second", &map.teacher_second),
                ("group", &map.group),
                ("student_order", &map.student.order),
                ("teacher_order", &map.teacher.order),
            ] {
                all.set_item(name, values.clone().into_pyarray(py))?;
            }
            for (name, sorted) in [("student_range", &map.student), ("teacher_range", &map.teacher)] {
                all.set_item(name, ranges(py, sorted)?)?;
            }
            all.set_item("open", self.cover.open().into_pyarray(py))?;
            Ok(all)
        })
    }

    /// The queries of a batch by name: `cu` are its `student_cu`, `teacher_cu` and `chunk_cu`; `rows` with `within`.
    #[pyo3(signature = (arrays, cu, student_ids, teacher_ids, rows, threads=None))]
    #[allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]
    fn queries<'py>(
        &self,
        py: Python<'py>,
        arrays: Given<'py>,
        cu: Cus<'py>,
        student_ids: Array<'py, u32>,
        teacher_ids: Array<'py, u32>,
        rows: bool,
        threads: Option<i64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        caught(|| {
            let kinds = arrays.kinds()?;
            let batch = arrays.batch(&kinds, &cu)?;
            let (students, teachers) = (student_ids.as_slice()?, teacher_ids.as_slice()?);
            let of = if rows { Of::Rows } else { Of::Tokens };
            let found = in_threads(py, threads, || self.cover.queries_of(batch, students, teachers, of))?;
            let all = PyDict::new(py);
            let Queries { indptr, row, set, base, flags, within, sets } = found;
            all.set_item("indptr", indptr.into_pyarray(py))?;
            for (name, values) in [("row", row), ("set", set), ("base", base), ("within", within)] {
                all.set_item(name, values.into_pyarray(py))?;
            }
            all.set_item("flags", flags.into_pyarray(py))?;
            all.set_item("sets", PySets(sets))?;
            Ok(all)
        })
    }

    /// student int64 `[Q]`, teacher int64 `[Q]`, range int64 `[Q, 2]` and the sets of a batch's interior positions.
    #[allow(clippy::needless_pass_by_value)]
    fn interior<'py>(
        &self,
        py: Python<'py>,
        arrays: Given<'py>,
        cu: Cus<'py>,
        student_ids: Array<'py, u32>,
        teacher_ids: Array<'py, u32>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let kinds = arrays.kinds()?;
            let batch = arrays.batch(&kinds, &cu)?;
            let (students, teachers) = (student_ids.as_slice()?, teacher_ids.as_slice()?);
            let found = py.detach(|| self.cover.interior_of(batch, students, teachers))?;
            let n = found.range.len();
            let range = found.range.into_flattened().into_pyarray(py).reshape([n, 2])?;
            (found.student.into_pyarray(py), found.teacher.into_pyarray(py), range, PySets(found.sets))
                .into_pyobject(py)
        })
    }
}

fn ranges<'py>(py: Python<'py>, sorted: &Sorted) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let n = sorted.range.len();
    sorted.range.as_flattened().to_vec().into_pyarray(py).reshape([n, 2])
}

/// The sets of some queries; they become arrays when they are asked for.
#[pyclass(frozen, name = "_Sets", module = "xtokmap._core")]
pub(super) struct PySets(Vec<Arc<Set>>);

#[pymethods]
impl PySets {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// indptr int64 `[n+1]`, ids int32, next int32 and whole bool of all elements, complement bool `[n]`, fixed int32
    /// `[n]` (-2: none).
    fn arrays<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let total = self.0.iter().map(|set| set.ids.len()).sum();
            let (mut indptr, mut complement) = (vec![0i64], Vec::with_capacity(self.0.len()));
            let fixed: Vec<i32> = self.0.iter().map(|set| set.fixed.unwrap_or(-2)).collect();
            let (mut ids, mut next, mut whole) = (vec![], vec![], vec![]);
            py.detach(|| {
                ids.reserve(total);
                next.reserve(total);
                whole.reserve(total);
                for set in &self.0 {
                    ids.extend_from_slice(&set.ids);
                    next.extend_from_slice(&set.next);
                    next.resize(ids.len(), -1);
                    whole.extend_from_slice(&set.whole);
                    whole.resize(ids.len(), false);
                    indptr.push(ids.len() as i64);
                    complement.push(set.complement);
                }
            });
            let arrays = (
                indptr.into_pyarray(py),
                ids.into_pyarray(py),
                next.into_pyarray(py),
                whole.into_pyarray(py),
                complement.into_pyarray(py),
                fixed.into_pyarray(py),
            );
            arrays.into_pyobject(py)
        })
    }
}
