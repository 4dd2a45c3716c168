//! What all bindings use: panics, arrays, integers, threads.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Mutex, OnceLock};

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::XTokMapError;
use crate::error::Error;
use crate::pool;

/// Runs what Python asked for. A panic is a bug of the core, and to who called an error like any other.
pub(super) fn caught<T>(work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(bug(&*panic)))
}

/// What the last panic said, and where it was: it may come from a thread of a pool.
static PANIC: Mutex<Option<(String, String)>> = Mutex::new(None);

fn message(panic: &dyn Any) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

/// In the place of printing: the exception says it all.
pub(super) fn note_panic(info: &PanicHookInfo<'_>) {
    let place = info.location().map_or_else(String::new, |place| format!(" ({}:{})", place.file(), place.line()));
    if let Ok(mut last) = PANIC.try_lock() {
        *last = Some((message(info.payload()).to_owned(), place));
    }
}

fn bug(panic: &(dyn Any + Send)) -> PyErr {
    let said = message(panic);
    let last = PANIC.try_lock().ok().and_then(|mut last| last.take());
    let place = last.filter(|last| last.0 == said).map_or_else(String::new, |last| last.1);
    XTokMapError::new_err(format!("bug in xtokmap: {said}{place}; please report it with the arguments that led to it"))
}

/// A read-only array that is made when it is first asked for.
pub(super) fn kept<T: numpy::Element>(
    py: Python<'_>,
    cell: &OnceLock<Py<PyArray1<T>>>,
    values: impl FnOnce() -> Vec<T>,
) -> PyResult<Py<PyArray1<T>>> {
    if let Some(array) = cell.get() {
        return Ok(array.clone_ref(py));
    }
    let array = values().into_pyarray(py);
    let kwargs = PyDict::new(py);
    kwargs.set_item("write", false)?;
    array.call_method("setflags", (), Some(&kwargs))?;
    // Another thread may have made one meanwhile; the first stays.
    let late = cell.set(array.clone().unbind());
    drop(late);
    Ok(cell.get().map_or_else(|| array.unbind(), |array| array.clone_ref(py)))
}

/// An integer argument; `name` says where a wrong one is.
pub(super) fn integer(item: &Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<i64> {
    match item.extract() {
        Ok(value) => Ok(value),
        Err(error) if error.is_instance_of::<PyOverflowError>(item.py()) => {
            Err(XTokMapError::new_err(format!("{}: {item} is far out of range", name())))
        }
        Err(_) => Err(not_an_integer(&name(), item)),
    }
}

pub(super) fn not_an_integer(name: &str, item: &Bound<'_, PyAny>) -> PyErr {
    XTokMapError::new_err(format!("{name}: expected an integer, got {}", type_name(item)))
}

pub(super) fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// The bytes of a bool array: numpy takes every byte but 0 for True, Rust has only 0 and 1.
pub(super) fn bytes_of<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    array.call_method1("view", ("uint8",))
}

pub(super) type Array<'py, T> = PyReadonlyArray1<'py, T>;

pub(super) fn values<T: numpy::Element + Copy>(array: &Array<'_, T>) -> PyResult<Vec<T>> {
    Ok(array.as_slice()?.to_vec())
}

pub(super) fn pairs(array: &PyReadonlyArray2<'_, i64>) -> PyResult<Vec<[i64; 2]>> {
    Ok(array.as_slice()?.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
}

/// More would be a mistake rather than a machine.
const MAX_THREADS: i64 = 4096;

/// Runs `work` without the GIL, on `threads` threads (`None`: as many as `RAYON_NUM_THREADS` says, or all cores).
pub(super) fn in_threads<T: Send>(
    py: Python<'_>,
    threads: Option<i64>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Error> {
    if let Some(n) = threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
        return Err(Error::Argument(format!("threads={n}: use 1 to {MAX_THREADS}, or None for all cores")));
    }
    py.detach(|| pool::with(threads.map(|n| n as usize), work)?)
}

/// Whether one thread at a time uses Python's objects.
pub(super) fn has_gil(py: Python<'_>) -> PyResult<bool> {
    match py.import("sys")?.getattr_opt("_is_gil_enabled")? {
        Some(is_enabled) => is_enabled.call0()?.extract(),
        None => Ok(true),
    }
}
