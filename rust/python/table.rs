//! `ByteTable`. Its documentation is Python's, in the style of the package.
#![allow(clippy::doc_markdown)]

use std::sync::{Arc, OnceLock};

use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyBytesMethods, PyTuple};

use super::errors::{set_attributes, TokenIdError, XTokMapError};
use super::support::{bytes_of, caught, integer, kept, not_an_integer, type_name, values, Array};
use crate::table::{ByteTable, Invalid, Role};

/// The bytes of every token id of one vocabulary.
///
/// `len(table)` is the number of ids, `table[id]` the bytes of one, None for a special token. `xtokmap.byte_table` makes one
/// of a tokenizer or its file. Tables do not change, may be used by several threads, and pickle.
#[pyclass(frozen, name = "ByteTable", module = "xtokmap")]
pub(super) struct PyByteTable {
    pub table: Arc<ByteTable>,
    lengths: OnceLock<Py<PyArray1<i32>>>,
    is_special: OnceLock<Py<PyArray1<bool>>>,
}

impl PyByteTable {
    fn new(table: Arc<ByteTable>) -> Self {
        Self { table, lengths: OnceLock::new(), is_special: OnceLock::new() }
    }
}

fn invalid_from(name: &str) -> PyResult<Invalid> {
    match name {
        "maximal" => Ok(Invalid::Maximal),
        "each" => Ok(Invalid::Each),
        "run" => Ok(Invalid::Run),
        _ => Err(XTokMapError::new_err(format!("invalid={name:?}: use \"maximal\", \"each\" or \"run\""))),
    }
}

/// A marker as Python has it: the name of its role, and its ids.
type Given = (String, Vec<u32>);

fn markers_from(given: Vec<Given>) -> PyResult<Vec<(Role, Vec<u32>)>> {
    let marker = |(name, ids): Given| {
        let known = Role::ALL.iter().find(|role| role.1 == name);
        let (role, _) = known.ok_or_else(|| {
            let names = Role::ALL.map(|role| role.1).join(", ");
            XTokMapError::new_err(format!("markers: role {name:?} is none of {names}"))
        })?;
        Ok((*role, ids))
    };
    given.into_iter().map(marker).collect()
}

fn markers_of(table: &ByteTable) -> Vec<(&'static str, Vec<u32>)> {
    let named = |(role, ids): &(Role, Vec<u32>)| (Role::ALL[*role as usize].1, ids.clone());
    table.markers().iter().map(named).collect()
}

#[pymethods]
impl PyByteTable {
    /// A table of any vocabulary whose bytes you know.
    ///
    /// Args:
    ///     tokens: the bytes of every id, in order; None for a special token, which spells nothing.
    ///     stop_ids: ids of special tokens that end a turn. They correspond to the other side's by this role.
    ///     invalid: how the tokenizer's decoder spells bytes that are not UTF-8: "maximal", "each" or "run", as
    ///         `byte_table` says.
    ///     byte_pieces: ids of the pieces that "run" is about, of one byte each.
    ///     markers: roles and ids of the markers of thoughts and tool calls.
    ///
    /// Raises:
    ///     XTokMapError: a token that is not bytes or None, an id outside the table, a stop id that has bytes, an
    ///         unknown `invalid` or role.
    #[staticmethod]
    #[pyo3(signature = (tokens, *, stop_ids = vec![], invalid = "maximal", byte_pieces = vec![], markers = vec![]))]
    fn from_bytes(
        tokens: &Bound<'_, PyAny>,
        stop_ids: Vec<Bound<'_, PyAny>>,
        invalid: &str,
        byte_pieces: Vec<Bound<'_, PyAny>>,
        markers: Vec<Given>,
    ) -> PyResult<Self> {
        caught(|| {
            let invalid = invalid_from(invalid)?;
            let items = tokens
                .try_iter()
                .map_err(|_| {
                    XTokMapError::new_err(format!(
                        "tokens: expected a sequence of bytes or None, got {}",
                        type_name(tokens)
                    ))
                })?
                .enumerate()
                .map(|(i, item)| {
                    let item = item?;
                    if item.is_none() {
                        return Ok(None);
                    }
                    let wrong = || format!("tokens[{i}]: expected bytes or None (special), got {}", type_name(&item));
                    item.cast::<PyBytes>().cloned().map(Some).map_err(|_| XTokMapError::new_err(wrong()))
                })
                .collect::<PyResult<Vec<Option<Bound<'_, PyBytes>>>>>()?;
            let table = ByteTable::from_tokens(items.iter().map(|item| item.as_ref().map(PyBytesMethods::as_bytes)))?;
            let ids = |given: Vec<Bound<'_, PyAny>>, name: &str| {
                let id = |(k, id): (usize, Bound<'_, PyAny>)| {
                    let id = integer(&id, || format!("{name}[{k}]"))?;
                    u32::try_from(id).map_err(|_| {
                        XTokMapError::new_err(format!(
                            "{name}: id {id} is outside the byte table of {} ids",
                            table.len()
                        ))
                    })
                };
                given.into_iter().enumerate().map(id).collect::<PyResult<Vec<u32>>>()
            };
            let (stop_ids, byte_pieces) = (ids(stop_ids, "stop_ids")?, ids(byte_pieces, "byte_pieces")?);
            let table = table.with_invalid(invalid).with_stop_ids(stop_ids)?.with_byte_pieces(byte_pieces)?;
            Ok(Self::new(Arc::new(table.with_markers(markers_from(markers)?)?)))
        })
    }

    /// The table that `to_arrays` took apart, by copies of its arrays.
    ///
    /// Raises:
    ///     XTokMapError: arrays that do not make a table.
    #[staticmethod]
    #[pyo3(signature = (arena, offsets, special, stop_ids, invalid, byte_pieces, markers = vec![]))]
    #[allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]
    fn from_arrays(
        py: Python<'_>,
        arena: Array<'_, u8>,
        offsets: Array<'_, u32>,
        special: &Bound<'_, PyArray1<bool>>,
        stop_ids: Array<'_, u32>,
        invalid: &str,
        byte_pieces: Array<'_, u32>,
        markers: Vec<Given>,
    ) -> PyResult<Self> {
        caught(|| {
            let (invalid, markers) = (invalid_from(invalid)?, markers_from(markers)?);
            let special = bytes_of(special)?.cast_into::<PyArray1<u8>>()?.try_readonly()?;
            let special = special.as_slice()?.iter().map(|&byte| byte != 0).collect();
            let (arena, offsets) = (values(&arena)?, values(&offsets)?);
            let (stop_ids, byte_pieces) = (values(&stop_ids)?, values(&byte_pieces)?);
            let make = || {
                let table = ByteTable::from_parts(arena, offsets, special)?.with_invalid(invalid);
                table.with_stop_ids(stop_ids)?.with_byte_pieces(byte_pieces)?.with_markers(markers)
            };
            Ok(Self::new(Arc::new(py.detach(make)?)))
        })
    }

    /// The arrays that make the table: all bytes; where those of each id begin and end; which ids are special; then stop
    /// ids, `invalid`, byte pieces and markers.
    fn to_arrays<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let table = &*self.table;
            let (arena, offsets) = (PyArray1::from_slice(py, table.arena()), PyArray1::from_slice(py, table.offsets()));
            let special = PyArray1::from_slice(py, table.special());
            let stop_ids = PyArray1::from_slice(py, table.stop_ids());
            let byte_pieces = PyArray1::from_slice(py, table.byte_pieces());
            (arena, offsets, special, stop_ids, self.invalid(), byte_pieces, markers_of(table)).into_pyobject(py)
        })
    }

    /// The same table with other markers, each a role and the ids that spell it.
    fn with_markers(&self, markers: Vec<Given>) -> PyResult<Self> {
        caught(|| Ok(Self::new(Arc::new((*self.table).clone().with_markers(markers_from(markers)?)?))))
    }

    /// The markers of thoughts and tool calls: role and ids of each.
    #[getter]
    fn markers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let markers = markers_of(&self.table).into_iter().map(|(role, ids)| Ok((role, PyTuple::new(py, ids)?)));
            PyTuple::new(py, markers.collect::<PyResult<Vec<_>>>()?)
        })
    }

    fn __len__(&self) -> usize {
        self.table.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, id: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        caught(|| {
            let index: Result<usize, _> = id.extract();
            match index.ok().and_then(|index| self.table.get(index)) {
                Some(bytes) => Ok(bytes.map(|b| PyBytes::new(py, b))),
                None => {
                    Err(PyIndexError::new_err(format!("id {id} is outside the byte table of {} ids", self.table.len())))
                }
            }
        })
    }

    fn __repr__(&self) -> String {
        let specials = self.table.special().iter().filter(|&&s| s).count();
        format!("ByteTable({} ids, {specials} special, stop_ids={:?})", self.table.len(), self.table.stop_ids())
    }

    /// By its arrays: two large ones instead of an object for each token.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        caught(|| Ok((slf.get_type().getattr("from_arrays")?, slf.get().to_arrays(slf.py())?)))
    }

    /// int32 `[V]`; the bytes of every id, 0 for special tokens.
    #[getter]
    fn lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<i32>>> {
        caught(|| kept(py, &self.lengths, || self.table.iter().map(|b| b.len() as i32).collect()))
    }

    /// bool `[V]`; whether an id has no bytes.
    #[getter]
    fn is_special(&self, py: Python<'_>) -> PyResult<Py<PyArray1<bool>>> {
        caught(|| kept(py, &self.is_special, || self.table.special().to_vec()))
    }

    /// Ids that end a turn.
    #[getter]
    fn stop_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| PyTuple::new(py, self.table.stop_ids()))
    }

    /// Ids of one byte that a run of bytes which are not UTF-8 is made of.
    #[getter]
    fn byte_pieces<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| PyTuple::new(py, self.table.byte_pieces()))
    }

    /// How the tokenizer's decoder spells bytes that are not UTF-8.
    #[getter]
    fn invalid(&self) -> &'static str {
        match self.table.invalid() {
            Invalid::Maximal => "maximal",
            Invalid::Each => "each",
            Invalid::Run => "run",
        }
    }

    /// The bytes of some ids, laid end to end.
    ///
    /// Raises:
    ///     TokenIdError: an id outside the table.
    ///     XTokMapError: ids that are no integers.
    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        caught(|| {
            let mut text = Vec::new();
            let items = ids.try_iter().map_err(|_| not_an_integer("ids", ids))?;
            for (position, item) in items.enumerate() {
                let id = integer(&item?, || format!("ids, position {position}"))?;
                let Some(bytes) = usize::try_from(id).ok().and_then(|id| self.table.get(id)) else {
                    let len = self.table.len();
                    let message = format!("ids, position {position}: id {id} is outside the byte table of {len} ids");
                    let err = TokenIdError::new_err(message);
                    let place = [("row", 0), ("position", position as i64), ("id", id), ("vocab_size", len as i64)];
                    set_attributes(&err, &place);
                    return Err(err);
                };
                text.extend_from_slice(bytes.unwrap_or_default());
            }
            Ok(PyBytes::new(py, &text))
        })
    }
}
