//! The sides of an alignment, and what can be wrong with an input.

/// One of the two sides of an alignment, in the order in which they are always given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The model that samples.
    Student,
    /// The model that scores.
    Teacher,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::Student => "student",
            Side::Teacher => "teacher",
        })
    }
}

/// Where and how two rows spell different bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Row of the batch.
    pub row: usize,
    /// Byte of the row at which the sides differ (the same on both: everything before it is equal).
    pub byte: usize,
    /// Position and bytes of the student token there; `None` where the student has ended.
    pub student: Option<(usize, Vec<u8>)>,
    /// Position and bytes of the teacher token there; `None` where the teacher has ended.
    pub teacher: Option<(usize, Vec<u8>)>,
    /// The bytes around the spot on each side.
    pub around: (Vec<u8>, Vec<u8>),
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = |side: &Option<(usize, Vec<u8>)>| match side {
            Some((position, bytes)) => format!("token {position} (b\"{}\")", bytes.escape_ascii()),
            None => "its end".to_owned(),
        };
        write!(
            f,
            "row {}: the bytes differ at byte {}: student at {} in b\"{}\", teacher at {} in b\"{}\"; align the text \
             that was really encoded, or use strict=False to put the stretch in a REWRITTEN chunk",
            self.row,
            self.byte,
            token(&self.student),
            self.around.0.escape_ascii(),
            token(&self.teacher),
            self.around.1.escape_ascii(),
        )
    }
}

/// What can be wrong with an input. Nothing in this crate panics on any input.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An id outside the vocabulary.
    #[error(
        "{side}_ids, row {row}, position {position}: id {id} is outside the {side}'s byte table of {len} ids (0 to \
         {last}); check that these ids come from the {side}'s tokenizer and mask padding such as -100",
        last = (*len as i64) - 1
    )]
    TokenId {
        /// Whose id.
        side: Side,
        /// Row of the batch.
        row: usize,
        /// Position in the row, as given (padding counted).
        position: usize,
        /// The id itself.
        id: i64,
        /// Size of the vocabulary.
        len: usize,
    },
    /// The sides spell different bytes and the caller asked for `strict`.
    #[error("{0}")]
    ByteMismatch(Box<Mismatch>),
    /// A row that spells too many bytes for 32-bit byte ends.
    #[error("{side}_ids, row {row} spells {bytes} bytes or more; a row holds at most 2147483647: split it")]
    RowTooLong {
        /// Whose row.
        side: Side,
        /// Row of the batch.
        row: usize,
        /// How many bytes were counted.
        bytes: u64,
    },
    /// Any other malformed argument; the message names it.
    #[error("{0}")]
    Argument(String),
}
