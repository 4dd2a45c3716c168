//! Ids and layouts that come from Python.

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::errors::XTokMapError;
use super::support::bytes_of;
use crate::error::Side;
use crate::rows::{Ids, Layout, Rows};

/// A contiguous 1-D integer array and how its rows lie in it, held while the GIL is released.
enum HeldIds<'py> {
    I32(PyReadonlyArray1<'py, i32>),
    I64(PyReadonlyArray1<'py, i64>),
    U32(PyReadonlyArray1<'py, u32>),
}

enum HeldLayout<'py> {
    Ragged(PyReadonlyArray1<'py, i64>),
    Padded(PyReadonlyArray2<'py, bool>),
}

pub(super) struct Held<'py> {
    ids: HeldIds<'py>,
    layout: HeldLayout<'py>,
}

impl<'py> Held<'py> {
    pub fn new(ids: &Bound<'py, PyAny>, layout: &Bound<'py, PyAny>) -> PyResult<Self> {
        let ids = if let Ok(x) = ids.cast::<PyArray1<i64>>() {
            HeldIds::I64(x.try_readonly()?)
        } else if let Ok(x) = ids.cast::<PyArray1<i32>>() {
            HeldIds::I32(x.try_readonly()?)
        } else if let Ok(x) = ids.cast::<PyArray1<u32>>() {
            HeldIds::U32(x.try_readonly()?)
        } else {
            return Err(PyTypeError::new_err("ids: expected a 1-D numpy array of int32, int64 or uint32"));
        };
        let layout = if let Ok(cu) = layout.cast::<PyArray1<i64>>() {
            HeldLayout::Ragged(cu.try_readonly()?)
        } else if let Ok(mask) = layout.cast::<PyArray2<bool>>() {
            let bytes = bytes_of(mask)?.cast_into::<PyArray2<u8>>()?.try_readonly()?;
            if bytes.as_slice()?.iter().fold(0, |all, byte| all | byte) > 1 {
                return Err(PyTypeError::new_err("layout: a mask whose True is another byte than 1"));
            }
            HeldLayout::Padded(mask.try_readonly()?)
        } else {
            return Err(PyTypeError::new_err("layout: expected int64 cu_seqlens [B+1] or a bool mask [B, T]"));
        };
        Ok(Self { ids, layout })
    }

    /// The rows, and `side`'s name for what does not fit.
    pub fn rows(&self, side: Side) -> PyResult<Rows<'_>> {
        let ids = match &self.ids {
            HeldIds::I32(x) => Ids::I32(x.as_slice()?),
            HeldIds::I64(x) => Ids::I64(x.as_slice()?),
            HeldIds::U32(x) => Ids::U32(x.as_slice()?),
        };
        let (layout, name) = match &self.layout {
            HeldLayout::Ragged(cu) => (Layout::Ragged(cu.as_slice()?), "cu"),
            HeldLayout::Padded(mask) => (Layout::Padded { width: mask.shape()[1], mask: mask.as_slice()? }, "mask"),
        };
        Rows::new(ids, layout).map_err(|error| XTokMapError::new_err(format!("{side}_{name}: {error}")))
    }
}
