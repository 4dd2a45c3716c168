//! From the tokens of a row to its chunks: where the bytes agree (`clean`), and where they do not (`general`).

pub(crate) mod clean;
pub(crate) mod edits;
pub(crate) mod general;
mod resync;
