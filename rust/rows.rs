//! Token ids and how the rows of a batch lie in them.

use std::ops::Range;

use crate::error::Error;

/// Token ids as they come; nothing is copied.
#[derive(Clone, Copy, Debug)]
pub enum Ids<'a> {
    /// `int32`
    I32(&'a [i32]),
    /// `int64`
    I64(&'a [i64]),
    /// `uint32`
    U32(&'a [u32]),
}

impl<'a> Ids<'a> {
    /// Some of them.
    fn slice(self, range: Range<usize>) -> Ids<'a> {
        match self {
            Ids::I32(x) => Ids::I32(&x[range]),
            Ids::I64(x) => Ids::I64(&x[range]),
            Ids::U32(x) => Ids::U32(&x[range]),
        }
    }

    fn len(&self) -> usize {
        match self {
            Ids::I32(x) => x.len(),
            Ids::I64(x) => x.len(),
            Ids::U32(x) => x.len(),
        }
    }
}

/// How the rows of a batch lie in the flat ids.
#[derive(Clone, Copy, Debug)]
pub enum Layout<'a> {
    /// Row `b` is `ids[cu[b]..cu[b + 1]]`.
    Ragged(&'a [i64]),
    /// Row `b` is where `mask` is true in `ids[b * width..(b + 1) * width]`.
    Padded {
        /// Length of every row.
        width: usize,
        /// One flag for each id.
        mask: &'a [bool],
    },
}

/// The rows of one side of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    ids: Ids<'a>,
    layout: Layout<'a>,
    len: usize,
}

impl<'a> Rows<'a> {
    /// Rows over flat ids.
    ///
    /// # Errors
    /// [`Error::Argument`] when the layout does not fit the ids.
    pub fn new(ids: Ids<'a>, layout: Layout<'a>) -> Result<Self, Error> {
        let len = match layout {
            Layout::Ragged(cu) => {
                let total = ids.len() as i64;
                let wrong = |found: String| {
                    Err(Error::Argument(format!("cu_seqlens must rise from 0 to the number of ids ({total}), {found}")))
                };
                match (cu.first(), cu.last()) {
                    (Some(&0), Some(&last)) if last == total => {}
                    (Some(first), Some(last)) => return wrong(format!("not from {first} to {last}")),
                    _ => return wrong("not be empty".to_owned()),
                }
                if let Some(k) = cu.windows(2).position(|w| w[0] > w[1]) {
                    return wrong(format!("but entry {} is {} after {}", k + 1, cu[k + 1], cu[k]));
                }
                cu.len() - 1
            }
            Layout::Padded { width, mask } => {
                if mask.len() != ids.len() || (width == 0 && !mask.is_empty()) || (width > 0 && mask.len() % width != 0)
                {
                    return Err(Error::Argument(format!(
                        "a mask of {} flags in rows of {width} does not fit {} ids",
                        mask.len(),
                        ids.len()
                    )));
                }
                mask.len().checked_div(width).unwrap_or(0)
            }
        };
        Ok(Self { ids, layout, len })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn range(&self, b: usize) -> Range<usize> {
        match self.layout {
            Layout::Ragged(cu) => cu[b] as usize..cu[b + 1] as usize,
            Layout::Padded { width, .. } => b * width..(b + 1) * width,
        }
    }

    fn mask(&self, b: usize) -> Option<&'a [bool]> {
        match self.layout {
            Layout::Ragged(_) => None,
            Layout::Padded { mask, .. } => Some(&mask[self.range(b)]),
        }
    }

    /// The ids of row `b`, and which of them are no padding.
    pub(crate) fn row(&self, b: usize) -> (Ids<'a>, Option<&'a [bool]>) {
        (self.ids.slice(self.range(b)), self.mask(b))
    }

    /// The `len` ids of row `b`, padding left out: in one piece as they are, otherwise gathered into `scratch`.
    pub(crate) fn given<'s>(&self, b: usize, len: usize, scratch: &'s mut Vec<i64>) -> Ids<'s>
    where
        'a: 's,
    {
        let range = self.range(b);
        let Some(mask) = self.mask(b) else { return self.ids.slice(range) };
        let first = mask.iter().position(|&m| m).unwrap_or(0);
        if count(&mask[first..first + len]) == len {
            return self.ids.slice(range.start + first..range.start + first + len);
        }
        scratch.clear();
        let kept = (range.zip(mask)).filter_map(|(k, &m)| m.then_some(k));
        match self.ids {
            Ids::I32(x) => scratch.extend(kept.map(|k| i64::from(x[k]))),
            Ids::I64(x) => scratch.extend(kept.map(|k| x[k])),
            Ids::U32(x) => scratch.extend(kept.map(|k| i64::from(x[k]))),
        }
        Ids::I64(scratch)
    }

    /// Cumulative number of tokens, padding left out.
    pub(crate) fn cu(&self) -> Vec<i64> {
        let mut total = 0;
        let lengths = (0..self.len).map(|b| self.mask(b).map_or_else(|| self.range(b).len(), count));
        std::iter::once(0)
            .chain(lengths.map(|n| {
                total += n as i64;
                total
            }))
            .collect()
    }
}

/// How many flags are true.
fn count(mask: &[bool]) -> usize {
    // In bytes as long as they hold it: many at a time.
    let part = |flags: &[bool]| flags.iter().fold(0u8, |n, &flag| n + u8::from(flag));
    mask.chunks(128).map(|flags| usize::from(part(flags))).sum()
}
