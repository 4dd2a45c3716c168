//! The exceptions.

use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::error::Error;

create_exception!(xtokmap, XTokMapError, PyValueError, "Base of every error that xtokmap raises.");
create_exception!(
    xtokmap,
    ByteMismatchError,
    XTokMapError,
    "Student and teacher spell different bytes, and strict=True was asked for. Attributes: row, byte."
);
create_exception!(
    xtokmap,
    UnsupportedTokenizerError,
    XTokMapError,
    "A tokenizer whose tokens' bytes cannot be known exactly; the message names the part and says what to do."
);
create_exception!(
    xtokmap,
    TokenIdError,
    XTokMapError,
    "A token id outside its vocabulary. Attributes: row, position, id, vocab_size."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let (err, attributes) = match error {
            Error::TokenId { row, position, id, len, .. } => (
                TokenIdError::new_err(message),
                vec![("row", row as i64), ("position", position as i64), ("id", id), ("vocab_size", len as i64)],
            ),
            Error::ByteMismatch(at) => {
                (ByteMismatchError::new_err(message), vec![("row", at.row as i64), ("byte", at.byte as i64)])
            }
            Error::RowTooLong { row, .. } => (XTokMapError::new_err(message), vec![("row", row as i64)]),
            Error::Argument(_) => (XTokMapError::new_err(message), vec![]),
        };
        set_attributes(&err, &attributes);
        err
    }
}

/// Numbers that say where it was.
pub(super) fn set_attributes(err: &PyErr, attributes: &[(&str, i64)]) {
    Python::attach(|py| {
        for (name, value) in attributes {
            // An exception object takes any attribute; if it does not, the message still says everything.
            let _ = err.value(py).setattr(*name, value);
        }
    });
}
