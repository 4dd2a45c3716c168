//! `Encoding`.

use std::sync::{Arc, OnceLock};

use numpy::PyReadonlyArray2;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use super::errors::XTokMapError;
use super::support::{caught, values, Array};
use super::table::PyByteTable;
use crate::encoding::{Behind, Encoding, Rule, Splits};

#[pyclass(frozen, name = "Encoding", module = "xtokmap._core")]
pub(super) struct PyEncoding(pub Arc<Encoding>);

#[pymethods]
impl PyEncoding {
    /// `rule`: "longest match", "bpe" (merges uint32 `[n, 3]`, or ranks uint32 `[V]`, or neither) or "unigram" (scores
    /// float32 `[V]`); `splits`: classes uint32 `[V]` before and after a boundary, and how many there are of each.
    #[new]
    #[pyo3(signature = (table, rule="longest match", *, merges=None, ranks=None, scores=None, characters=false, whole=false, added=None, splits=None))]
    #[allow(clippy::too_many_arguments, clippy::type_complexity, clippy::needless_pass_by_value)]
    fn new<'py>(
        py: Python<'py>,
        table: &PyByteTable,
        rule: &str,
        merges: Option<PyReadonlyArray2<'py, u32>>,
        ranks: Option<Array<'py, u32>>,
        scores: Option<Array<'py, f32>>,
        characters: bool,
        whole: bool,
        added: Option<Array<'py, u32>>,
        splits: Option<(Array<'py, u32>, Array<'py, u32>, usize, usize)>,
    ) -> PyResult<Self> {
        caught(|| {
            let rule = match (rule, scores) {
                ("longest match", _) => Rule::LongestMatch,
                ("unigram", Some(scores)) => Rule::Unigram(values(&scores)?),
                ("bpe", _) => {
                    let triples = |m: PyReadonlyArray2<'_, u32>| {
                        let triples = m.as_slice()?.chunks_exact(3).map(|t| [t[0], t[1], t[2]]).collect();
                        Ok::<Vec<[u32; 3]>, PyErr>(triples)
                    };
                    let ranks = ranks.map(|ranks| values(&ranks)).transpose()?;
                    let added = added.map(|added| values(&added)).transpose()?.unwrap_or_default();
                    Rule::Bpe { merges: merges.map(triples).transpose()?, ranks, characters, whole, added }
                }
                _ => {
                    return Err(XTokMapError::new_err(format!(
                        "rule {rule:?}: use longest match, bpe or unigram (scores)"
                    )))
                }
            };
            let splits = match splits {
                None => None,
                Some((before, after, classes, width)) => {
                    let reach = vec![OnceLock::new(); classes];
                    Some(Splits { before: values(&before)?, after: values(&after)?, reach, width })
                }
            };
            let table = table.table.clone();
            Ok(Self(Arc::new(py.detach(|| Encoding::new(table, rule, splits))?)))
        })
    }

    fn encode(&self, py: Python<'_>, bytes: &[u8]) -> PyResult<Vec<u32>> {
        caught(|| Ok(py.detach(|| self.0.encode(bytes))))
    }

    /// `reach`: uint8 `[2 * classes]`; with nothing behind the token after the boundary, then with a letter.
    #[pyo3(signature = (class_, reach))]
    #[allow(clippy::needless_pass_by_value)]
    fn learn(&self, class_: usize, reach: Array<'_, u8>) -> PyResult<()> {
        caught(|| Ok(self.0.learn(class_, values(&reach)?)?))
    }

    /// `word`: a letter stands behind the two, which matters where `next` is white space.
    #[pyo3(signature = (token, next, word=false))]
    fn joined(&self, token: u32, next: u32, word: bool) -> PyResult<bool> {
        caught(|| {
            for id in [token, next] {
                if id as usize >= self.0.table().len() {
                    return Err(PyIndexError::new_err(format!("id {id} is outside {} ids", self.0.table().len())));
                }
            }
            Ok(self.0.joined(token, next, if word { Behind::Word } else { Behind::Nothing }))
        })
    }
}
