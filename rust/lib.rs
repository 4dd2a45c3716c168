//! Byte-exact alignment between the token sequences of two tokenizers.
//!
//! Every token is a byte string. Laid end to end, the tokens of a *student* and of a *teacher* spell the same
//! bytes, and wherever a student token and a teacher token end at the same byte the text can be cut. The smallest
//! pieces between such cuts are **chunks**: the finest units on which two language models can be compared exactly.
//!
//! ```
//! use xtokmap::{Aligner, ByteTable, Kind};
//!
//! let student = ByteTable::from_tokens([Some("blue"), Some("bird"), Some("!")])?;
//! let teacher = ByteTable::from_tokens([Some("bluebird"), Some("!")])?;
//! let alignment = Aligner::new(student, teacher)?.align(&[0, 1, 2], &[0, 1])?;
//! assert_eq!(alignment.student_chunk, [0, 0, 1]);
//! assert_eq!(alignment.kind, [Kind::ManyToOne, Kind::OneToOne]);
//! # Ok::<(), xtokmap::Error>(())
//! ```
//!
//! # Laws
//! 1. Chunks partition both aligned regions, in order.
//! 2. Both sides of a chunk that is not `Rewritten`, `Stop` or `Marker` spell the same bytes.
//! 3. Minimal: no chunk can be split. Number of chunks = number of common byte ends.
//! 4. `align(a, b)` is `align(b, a)` with the sides swapped.
//! 5. `align(a, a)` is all `OneToOne`, and `Stop` and `Marker` where there are such tokens.
//! 6. A batch is the map of its rows; the result does not depend on the number of threads, on padding or on its side.
//! 7. A difference in the bytes costs its own neighborhood and never the tail.
//! 8. Cutting the end of either side changes only the last chunk.
//! 9. The student is never re-encoded: sampled ids are aligned as sampled, also when no tokenizer would have
//!    produced them, and also when they end in the middle of a character.
//! 10. Work is linear in tokens plus bytes, at any length.
//!
//! The laws are properties in `tests/laws.rs`, checked against a brute-force oracle.

mod aligner;
mod chunks;
mod cover;
mod encoding;
mod error;
mod merge;
mod pool;
#[cfg(feature = "python")]
mod python;
mod rows;
#[cfg(feature = "python")]
mod scan;
mod spans;
mod table;
mod tokens;
mod vocab_map;

pub use aligner::Aligner;
pub use chunks::{Alignment, Batch, Kind};
pub use cover::{Cover, Interior, Of, Queries, Set};
pub use encoding::{Behind, Encoding, Rule, Splits};
pub use error::{Error, Mismatch, Side};
pub use rows::{Ids, Layout, Rows};
pub use spans::{align_offsets, align_texts, map_spans, overlaps, Overlaps, SpanMode};
pub use table::{ByteTable, Invalid, Role, Sorted};
pub use vocab_map::VocabMap;
