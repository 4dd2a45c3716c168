//! What is quicker here in reading the files of tokenizers.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};

use super::errors::XTokMapError;
use super::support::{caught, Array};
use crate::scan::{self, Spelling};

/// The bytes of tokens inside a text: replacements first, then "plain", "byte level" or "byte pieces".
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn spell<'py>(
    tokens: &Bound<'py, PyList>,
    replacements: Vec<(String, String)>,
    kind: &str,
) -> PyResult<Bound<'py, PyList>> {
    caught(|| {
        let spelling = match kind {
            "plain" => Spelling::Plain,
            "byte level" => Spelling::ByteLevel,
            "byte pieces" => Spelling::BytePieces,
            _ => return Err(XTokMapError::new_err(format!("kind={kind:?}: no way to spell a token"))),
        };
        let spell = |token: Bound<'py, PyAny>| {
            let bytes = scan::spell(token.cast::<PyString>()?.to_str()?, &replacements, spelling);
            Ok(PyBytes::new(token.py(), &bytes))
        };
        PyList::new(tokens.py(), tokens.iter().map(spell).collect::<PyResult<Vec<_>>>()?)
    })
}

/// The end of the JSON array of strings, or of arrays of strings, at `start`; None where there is no such array.
#[pyfunction]
pub(super) fn json_strings_end(py: Python<'_>, json: &[u8], start: usize) -> PyResult<Option<usize>> {
    caught(|| Ok(py.detach(|| scan::json_strings_end(json, start))))
}

/// The names and the integers of the JSON object at `start`, and its end; None where there is no such object.
#[pyfunction]
#[allow(clippy::type_complexity)]
pub(super) fn json_ids<'py>(
    py: Python<'py>,
    json: &[u8],
    start: usize,
) -> PyResult<Option<(Bound<'py, PyList>, Bound<'py, PyList>, usize)>> {
    caught(|| {
        let Some((all, end)) = py.detach(|| scan::json_ids(json, start)) else { return Ok(None) };
        let names = PyList::new(py, all.iter().map(|(name, _)| PyString::new(py, name)))?;
        let ids = PyList::new(py, all.iter().map(|&(_, id)| id))?;
        Ok(Some((names, ids, end)))
    })
}

/// The strings of an array of a GGUF file (none unless `keep`), and where it ends; None where the file ends first.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
pub(super) fn gguf_strings<'py>(
    py: Python<'py>,
    data: Array<'py, u8>,
    start: usize,
    count: u64,
    big_endian: bool,
    keep: bool,
) -> PyResult<Option<(Bound<'py, PyList>, usize)>> {
    caught(|| {
        let data = data.as_slice()?;
        let mut strings = vec![];
        let end = py.detach(|| {
            scan::gguf_strings(data, start, count, big_endian, |string| {
                if keep {
                    strings.push(string);
                }
            })
        });
        let strings = strings.into_iter().map(|string| PyBytes::new(py, string));
        end.map(|end| Ok((PyList::new(py, strings.collect::<Vec<_>>())?, end))).transpose()
    })
}
