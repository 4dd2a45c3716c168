//! Vocabulary -> bytes.

use crate::error::Error;
use crate::pool;

/// How a tokenizer's decoder spells bytes that are not UTF-8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Invalid {
    /// One U+FFFD for each maximal invalid part (byte-level decoders, tiktoken, Python's `errors="replace"`).
    #[default]
    Maximal,
    /// One U+FFFD for each byte of an invalid part (`SentencePiece` byte fallback).
    Each,
    /// One U+FFFD for each byte of a run of byte pieces that is not UTF-8 as a whole, also where a part of it is
    /// (`ByteFallback` of Hugging Face's tokenizers).
    Run,
}

/// What a marker does in an assistant's turn. Markers correspond by role, whatever their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Role {
    /// A thought begins.
    ThinkOpen = 0,
    /// A thought ends.
    ThinkClose = 1,
    /// A tool call begins.
    CallOpen = 2,
    /// A tool call ends.
    CallClose = 3,
    /// An answer begins.
    AnswerOpen = 4,
    /// From here to the next marker nothing is aligned: the other side is not given it.
    AsideOpen = 5,
    /// Closes that; where nothing opened it, nothing is aligned from the start of the turn to here.
    AsideClose = 6,
}

impl Role {
    /// All of them, in the order of their numbers, and their names.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::ThinkOpen, "think_open"),
        (Self::ThinkClose, "think_close"),
        (Self::CallOpen, "call_open"),
        (Self::CallClose, "call_close"),
        (Self::AnswerOpen, "answer_open"),
        (Self::AsideOpen, "aside_open"),
        (Self::AsideClose, "aside_close"),
    ];
}

/// The bytes of every token id of one vocabulary: one arena and its offsets.
///
/// Special tokens have no bytes: they never move a boundary.
#[derive(Clone, Debug, Default)]
pub struct ByteTable {
    arena: Vec<u8>,
    /// Token `i` is `arena[offsets[i]..offsets[i + 1]]`.
    offsets: Vec<u32>,
    special: Vec<bool>,
    stop_ids: Vec<u32>,
    invalid: Invalid,
    /// Ids of tokens that are a single byte by rule (`<0x0A>`), rising.
    byte_pieces: Vec<u32>,
    /// Sequences of ids that play a role; of one role the first is the preferred one.
    markers: Vec<(Role, Vec<u32>)>,
}

impl ByteTable {
    /// A table from the bytes of every id, in order; `None` is a special token.
    ///
    /// # Errors
    /// [`Error::Argument`] when all tokens together have 2^32 bytes or more.
    pub fn from_tokens<B: AsRef<[u8]>>(tokens: impl IntoIterator<Item = Option<B>>) -> Result<Self, Error> {
        let mut table = Self { offsets: vec![0], ..Self::default() };
        for token in tokens {
            if let Some(bytes) = &token {
                table.arena.extend_from_slice(bytes.as_ref());
            }
            table.special.push(token.is_none());
            let end = u32::try_from(table.arena.len()).map_err(|_| {
                Error::Argument(format!(
                    "tokens[{}]: the vocabulary has 2^32 bytes or more up to this token; a byte table holds less",
                    table.special.len() - 1
                ))
            })?;
            table.offsets.push(end);
        }
        Ok(table)
    }

    /// A table from its parts: token `i` is `arena[offsets[i]..offsets[i + 1]]`, and `special[i]` says that it has no
    /// bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] when the parts do not fit each other.
    pub fn from_parts(arena: Vec<u8>, offsets: Vec<u32>, special: Vec<bool>) -> Result<Self, Error> {
        let fits = offsets.len() == special.len() + 1
            && offsets.first() == Some(&0)
            && offsets.last().is_some_and(|&end| end as usize == arena.len())
            && offsets.windows(2).zip(&special).all(|(w, &special)| w[0] == w[1] || (w[0] < w[1] && !special));
        if !fits {
            return Err(Error::Argument(format!(
                "offsets must rise from 0 to the size of the arena ({}), be one more than the {} ids, and leave special \
                 ids without bytes",
                arena.len(),
                special.len()
            )));
        }
        Ok(Self { arena, offsets, special, ..Self::default() })
    }

    /// The same table with the ids that end a turn or a text, the preferred one first.
    ///
    /// # Errors
    /// [`Error::Argument`] for an id outside the table or one that has bytes.
    pub fn with_stop_ids(mut self, stop_ids: Vec<u32>) -> Result<Self, Error> {
        for &id in &stop_ids {
            match self.get(id as usize) {
                Some(None) => {}
                Some(Some(bytes)) => {
                    return Err(Error::Argument(format!(
                        "stop_ids: id {id} has the bytes b\"{}\"; an end-of-turn token must be special (None)",
                        bytes.escape_ascii()
                    )))
                }
                None => {
                    return Err(Error::Argument(format!(
                        "stop_ids: id {id} is outside the byte table of {} ids",
                        self.len()
                    )))
                }
            }
        }
        self.stop_ids = stop_ids;
        Ok(self)
    }

    /// The same table with another rule for bytes that are not UTF-8.
    #[must_use]
    pub fn with_invalid(mut self, invalid: Invalid) -> Self {
        self.invalid = invalid;
        self
    }

    /// The same table with the ids that stand for a single byte (`<0x0A>`), which matter to [`Invalid::Run`].
    ///
    /// # Errors
    /// [`Error::Argument`] for an id outside the table or one that has not one byte.
    pub fn with_byte_pieces(mut self, mut ids: Vec<u32>) -> Result<Self, Error> {
        if let Some(&id) = ids.iter().find(|&&id| self.bytes(id).len() != 1) {
            return Err(Error::Argument(format!(
                "byte_pieces: id {id} has {} bytes; a byte piece has one",
                self.bytes(id).len()
            )));
        }
        ids.sort_unstable();
        ids.dedup();
        self.byte_pieces = ids;
        Ok(self)
    }

    /// The same table with the sequences of ids that mark thoughts and tool calls, the preferred one of each role first.
    /// Where several fit, the longest counts. Its tokens carry no bytes there.
    ///
    /// # Errors
    /// [`Error::Argument`] for one without ids, with an id outside the table, or that is there twice.
    pub fn with_markers(mut self, markers: Vec<(Role, Vec<u32>)>) -> Result<Self, Error> {
        for (k, (_, ids)) in markers.iter().enumerate() {
            let wrong = match ids.iter().find(|&&id| id as usize >= self.len()) {
                Some(id) => format!("id {id} is outside the byte table of {} ids", self.len()),
                None if ids.is_empty() => "a marker needs ids".to_owned(),
                None if markers[..k].iter().any(|(_, other)| other == ids) => format!("{ids:?} is there twice"),
                None => continue,
            };
            return Err(Error::Argument(format!("markers[{k}]: {wrong}")));
        }
        self.markers = markers;
        Ok(self)
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.special.is_empty()
    }

    /// `None` outside the table, `Some(None)` for a special token, else the token's bytes.
    pub fn get(&self, id: usize) -> Option<Option<&[u8]>> {
        let special = *self.special.get(id)?;
        let bytes = self.arena.get(self.offsets[id] as usize..self.offsets[id + 1] as usize)?;
        Some((!special).then_some(bytes))
    }

    /// The token's bytes; none for a special token and outside the table.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.arena[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Whether a token is nothing but new lines.
    pub(crate) fn is_new_lines(&self, id: u32) -> bool {
        let bytes = self.bytes(id);
        !bytes.is_empty() && bytes.iter().all(|&byte| byte == b'\n')
    }

    /// Every token's bytes in order of ids; special tokens are empty.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.offsets.windows(2).map(|w| &self.arena[w[0] as usize..w[1] as usize])
    }

    /// The bytes of all tokens, end to end.
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// Token `i` is `arena[offsets[i]..offsets[i + 1]]`.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Which ids are special.
    pub fn special(&self) -> &[bool] {
        &self.special
    }

    /// The ids that end a turn or a text, the preferred one first.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// How this tokenizer's decoder spells bytes that are not UTF-8.
    pub fn invalid(&self) -> Invalid {
        self.invalid
    }

    /// The ids that stand for a single byte, rising.
    pub fn byte_pieces(&self) -> &[u32] {
        &self.byte_pieces
    }

    /// The sequences of ids that mark thoughts and tool calls.
    pub fn markers(&self) -> &[(Role, Vec<u32>)] {
        &self.markers
    }

    /// Whether a token is a byte piece, for every id; empty where that does not matter.
    pub(crate) fn runs_of_pieces(&self) -> Vec<bool> {
        if self.invalid != Invalid::Run {
            return vec![];
        }
        let mut flags = vec![false; self.len()];
        self.byte_pieces.iter().for_each(|&id| flags[id as usize] = true);
        flags
    }
}

/// The ids of one table that have bytes, sorted by them, and for every id the range that its bytes are a prefix of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sorted {
    /// Ids by bytes, equal bytes by id.
    pub order: Vec<i32>,
    /// `[lo, hi)` in `order` of the tokens that begin with this token's bytes, itself among them; `[0, 0)` for a token
    /// without bytes.
    pub range: Vec<[i32; 2]>,
}

impl Sorted {
    /// Sorts a table.
    pub fn new(table: &ByteTable) -> Self {
        let mut order: Vec<i32> = (0..table.len() as i32).filter(|&id| !table.bytes(id as u32).is_empty()).collect();
        pool::sort(&mut order, |&a, &b| table.bytes(a as u32).cmp(table.bytes(b as u32)).then(a.cmp(&b)));
        let mut range = vec![[0, 0]; table.len()];
        // Tokens whose ranges are still open; each is a prefix of the next.
        let mut open: Vec<i32> = vec![];
        let mut first_equal = 0;
        for (at, &id) in order.iter().enumerate() {
            let bytes = table.bytes(id as u32);
            while let Some(&top) = open.last() {
                if bytes.starts_with(table.bytes(top as u32)) {
                    break;
                }
                range[top as usize][1] = at as i32;
                open.pop();
            }
            let equal = at > 0 && table.bytes(order[at - 1] as u32) == bytes;
            if !equal {
                first_equal = at;
            }
            range[id as usize][0] = first_equal as i32;
            open.push(id);
        }
        for id in open {
            range[id as usize][1] = order.len() as i32;
        }
        Self { order, range }
    }

    /// `[lo, hi)` in `order` of the tokens that begin with these bytes.
    pub fn prefix_range(&self, table: &ByteTable, prefix: &[u8]) -> [usize; 2] {
        let lo = self.order.partition_point(|&id| table.bytes(id as u32) < prefix);
        let len = self.order[lo..].partition_point(|&id| table.bytes(id as u32).starts_with(prefix));
        [lo, lo + len]
    }
}
