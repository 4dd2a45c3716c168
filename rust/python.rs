//! The Python module `xtokmap._core`: the only file that knows `PyO3` and numpy.
//!
//! What the locks are, and why none can hang, is written in `pool.rs`.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Arc, Mutex, OnceLock};

use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyIndexError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyBytesMethods, PyDict, PyList, PySlice, PyString, PyTuple};
use pyo3::{create_exception, IntoPyObjectExt};

use crate::batch::{Halt, Job, Out, Room, Sizes};
use crate::scan::{self, Spelling};
use crate::{
    pool, Aligner, Alignment, ByteTable, Cover, Encoding, Error, Ids, Invalid, Kind, Layout, Queries, Rows, Rule, Set,
    Side, Sorted, SpanMode, Splits, VocabMap,
};

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

fn set_attributes(err: &PyErr, attributes: &[(&str, i64)]) {
    Python::attach(|py| {
        for (name, value) in attributes {
            // An exception object takes any attribute; if it does not, the message still says everything.
            let _ = err.value(py).setattr(*name, value);
        }
    });
}

/// Runs what Python asked for. A panic is a bug of the core, and to who called an error like any other.
fn caught<T>(work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(bug(&*panic)))
}

/// What the last panic said, and where it was: it may come from a thread of a pool.
static PANIC: Mutex<Option<(String, String)>> = Mutex::new(None);

fn message(panic: &dyn Any) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

/// In the place of printing: the exception says it all.
fn note_panic(info: &PanicHookInfo<'_>) {
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
fn kept<T: numpy::Element>(
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

#[pyclass(frozen, name = "ByteTable", module = "xtokmap")]
struct PyByteTable {
    table: Arc<ByteTable>,
    lengths: OnceLock<Py<PyArray1<i32>>>,
    is_special: OnceLock<Py<PyArray1<bool>>>,
}

impl PyByteTable {
    fn new(table: Arc<ByteTable>) -> Self {
        Self { table, lengths: OnceLock::new(), is_special: OnceLock::new() }
    }
}

fn invalid_from(name: &str) -> PyResult<Invalid> {
    match name {
        "maximal" => Ok(Invalid::Maximal),
        "each" => Ok(Invalid::Each),
        "run" => Ok(Invalid::Run),
        _ => Err(XTokMapError::new_err(format!("invalid={name:?}: use \"maximal\", \"each\" or \"run\""))),
    }
}

#[pymethods]
impl PyByteTable {
    #[staticmethod]
    #[pyo3(signature = (tokens, *, stop_ids = vec![], invalid = "maximal", byte_pieces = vec![]))]
    fn from_bytes(
        tokens: &Bound<'_, PyAny>,
        stop_ids: Vec<Bound<'_, PyAny>>,
        invalid: &str,
        byte_pieces: Vec<Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        caught(|| {
            let invalid = invalid_from(invalid)?;
            let items = tokens
                .try_iter()
                .map_err(|_| {
                    XTokMapError::new_err(format!(
                        "tokens: expected a sequence of bytes or None, got {}",
                        type_name(tokens)
                    ))
                })?
                .enumerate()
                .map(|(i, item)| {
                    let item = item?;
                    if item.is_none() {
                        return Ok(None);
                    }
                    let wrong = || format!("tokens[{i}]: expected bytes or None (special), got {}", type_name(&item));
                    item.cast::<PyBytes>().cloned().map(Some).map_err(|_| XTokMapError::new_err(wrong()))
                })
                .collect::<PyResult<Vec<Option<Bound<'_, PyBytes>>>>>()?;
            let table = ByteTable::from_tokens(items.iter().map(|item| item.as_ref().map(PyBytesMethods::as_bytes)))?;
            let ids = |given: Vec<Bound<'_, PyAny>>, name: &str| {
                let id = |(k, id): (usize, Bound<'_, PyAny>)| {
                    let id = integer(&id, || format!("{name}[{k}]"))?;
                    u32::try_from(id).map_err(|_| {
                        XTokMapError::new_err(format!(
                            "{name}: id {id} is outside the byte table of {} ids",
                            table.len()
                        ))
                    })
                };
                given.into_iter().enumerate().map(id).collect::<PyResult<Vec<u32>>>()
            };
            let (stop_ids, byte_pieces) = (ids(stop_ids, "stop_ids")?, ids(byte_pieces, "byte_pieces")?);
            let table = table.with_invalid(invalid).with_stop_ids(stop_ids)?.with_byte_pieces(byte_pieces)?;
            Ok(Self::new(Arc::new(table)))
        })
    }

    #[staticmethod]
    #[pyo3(signature = (arena, offsets, special, stop_ids, invalid, byte_pieces))]
    #[allow(clippy::needless_pass_by_value)]
    fn from_arrays(
        py: Python<'_>,
        arena: Array<'_, u8>,
        offsets: Array<'_, u32>,
        special: &Bound<'_, PyArray1<bool>>,
        stop_ids: Array<'_, u32>,
        invalid: &str,
        byte_pieces: Array<'_, u32>,
    ) -> PyResult<Self> {
        caught(|| {
            let invalid = invalid_from(invalid)?;
            let special = bytes_of(special)?.cast_into::<PyArray1<u8>>()?.try_readonly()?;
            let special = special.as_slice()?.iter().map(|&byte| byte != 0).collect();
            let (arena, offsets) = (values(&arena)?, values(&offsets)?);
            let (stop_ids, byte_pieces) = (values(&stop_ids)?, values(&byte_pieces)?);
            let make = || {
                let table = ByteTable::from_parts(arena, offsets, special)?.with_invalid(invalid);
                table.with_stop_ids(stop_ids)?.with_byte_pieces(byte_pieces)
            };
            Ok(Self::new(Arc::new(py.detach(make)?)))
        })
    }

    fn to_arrays<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let table = &*self.table;
            let (arena, offsets) = (PyArray1::from_slice(py, table.arena()), PyArray1::from_slice(py, table.offsets()));
            let special = PyArray1::from_slice(py, table.special());
            let stop_ids = PyArray1::from_slice(py, table.stop_ids());
            let byte_pieces = PyArray1::from_slice(py, table.byte_pieces());
            (arena, offsets, special, stop_ids, self.invalid(), byte_pieces).into_pyobject(py)
        })
    }

    fn __len__(&self) -> usize {
        self.table.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, id: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        caught(|| {
            let index: Result<usize, _> = id.extract();
            match index.ok().and_then(|index| self.table.get(index)) {
                Some(bytes) => Ok(bytes.map(|b| PyBytes::new(py, b))),
                None => {
                    Err(PyIndexError::new_err(format!("id {id} is outside the byte table of {} ids", self.table.len())))
                }
            }
        })
    }

    fn __repr__(&self) -> String {
        let specials = self.table.special().iter().filter(|&&s| s).count();
        format!("ByteTable({} ids, {specials} special, stop_ids={:?})", self.table.len(), self.table.stop_ids())
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        caught(|| {
            let tokens: Vec<Option<Bound<'py, PyBytes>>> =
                (0..self.table.len()).map(|id| self.table.get(id).flatten().map(|b| PyBytes::new(py, b))).collect();
            let rebuild = py.import("xtokmap._core")?.getattr("_rebuild_byte_table")?;
            let args = (tokens, self.table.stop_ids().to_vec(), self.invalid(), self.table.byte_pieces().to_vec());
            Ok((rebuild, args.into_pyobject(py)?))
        })
    }

    #[getter]
    fn lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<i32>>> {
        caught(|| kept(py, &self.lengths, || self.table.iter().map(|b| b.len() as i32).collect()))
    }

    #[getter]
    fn is_special(&self, py: Python<'_>) -> PyResult<Py<PyArray1<bool>>> {
        caught(|| kept(py, &self.is_special, || self.table.special().to_vec()))
    }

    #[getter]
    fn stop_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| PyTuple::new(py, self.table.stop_ids()))
    }

    #[getter]
    fn byte_pieces<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| PyTuple::new(py, self.table.byte_pieces()))
    }

    #[getter]
    fn invalid(&self) -> &'static str {
        match self.table.invalid() {
            Invalid::Maximal => "maximal",
            Invalid::Each => "each",
            Invalid::Run => "run",
        }
    }

    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        caught(|| {
            let mut text = Vec::new();
            let items = ids.try_iter().map_err(|_| not_an_integer("ids", ids))?;
            for (position, item) in items.enumerate() {
                let id = integer(&item?, || format!("ids, position {position}"))?;
                let Some(bytes) = usize::try_from(id).ok().and_then(|id| self.table.get(id)) else {
                    let len = self.table.len();
                    let message = format!("ids, position {position}: id {id} is outside the byte table of {len} ids");
                    let err = TokenIdError::new_err(message);
                    let place = [("row", 0), ("position", position as i64), ("id", id), ("vocab_size", len as i64)];
                    set_attributes(&err, &place);
                    return Err(err);
                };
                text.extend_from_slice(bytes.unwrap_or_default());
            }
            Ok(PyBytes::new(py, &text))
        })
    }
}

/// An integer argument; `name` says where a wrong one is.
fn integer(item: &Bound<'_, PyAny>, name: impl Fn() -> String) -> PyResult<i64> {
    match item.extract() {
        Ok(value) => Ok(value),
        Err(error) if error.is_instance_of::<PyOverflowError>(item.py()) => {
            Err(XTokMapError::new_err(format!("{}: {item} is far out of range", name())))
        }
        Err(_) => Err(not_an_integer(&name(), item)),
    }
}

fn not_an_integer(name: &str, item: &Bound<'_, PyAny>) -> PyErr {
    XTokMapError::new_err(format!("{name}: expected an integer, got {}", type_name(item)))
}

#[pyfunction]
fn _rebuild_byte_table(
    tokens: &Bound<'_, PyAny>,
    stop_ids: Vec<Bound<'_, PyAny>>,
    invalid: &str,
    byte_pieces: Vec<Bound<'_, PyAny>>,
) -> PyResult<PyByteTable> {
    caught(|| PyByteTable::from_bytes(tokens, stop_ids, invalid, byte_pieces))
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// The bytes of a bool array: numpy takes every byte but 0 for True, Rust has only 0 and 1.
fn bytes_of<'py>(array: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    array.call_method1("view", ("uint8",))
}

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

struct Held<'py> {
    ids: HeldIds<'py>,
    layout: HeldLayout<'py>,
}

impl<'py> Held<'py> {
    fn new(ids: &Bound<'py, PyAny>, layout: &Bound<'py, PyAny>) -> PyResult<Self> {
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
    fn rows(&self, side: Side) -> PyResult<Rows<'_>> {
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

/// More would be a mistake rather than a machine.
const MAX_THREADS: i64 = 4096;

/// Runs `work` without the GIL, on `threads` threads (`None`: as many as `RAYON_NUM_THREADS` says, or all cores).
fn in_threads<T: Send, E: From<Error> + Send>(
    py: Python<'_>,
    threads: Option<i64>,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    if let Some(n) = threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
        return Err(Error::Argument(format!("threads={n}: use 1 to {MAX_THREADS}, or None for all cores")).into());
    }
    py.detach(|| pool::with(threads.map(|n| n as usize), work)?)
}

/// The memory of a batch, which its arrays are views of.
struct Memory {
    numbers: Py<PyArray1<i32>>,
    kinds: Py<PyArray1<u8>>,
}

impl Memory {
    /// Nothing larger is kept: bytes.
    const MAX: usize = 64 << 20;
    fn new(py: Python<'_>, numbers: usize, kinds: usize) -> Self {
        let (numbers, kinds) = (PyArray1::zeros(py, numbers, false), PyArray1::zeros(py, kinds, false));
        Self { numbers: numbers.unbind(), kinds: kinds.unbind() }
    }

    /// Whether no array looks at it any more, and it is large enough but not much larger.
    fn fits(&self, py: Python<'_>, numbers: usize, kinds: usize) -> bool {
        // Views count as references to the array they look at.
        #[allow(deprecated)]
        let is_free = self.numbers.get_refcnt(py) == 1 && self.kinds.get_refcnt(py) == 1;
        let (len, kinds_len) = (self.numbers.bind(py).len(), self.kinds.bind(py).len());
        is_free && len >= numbers && kinds_len >= kinds && len / 4 <= numbers
    }
}

/// Memory of earlier batches: fresh pages cost several times the alignment. The last comes first; while one batch is at
/// work, the next may be made.
///
/// Without a GIL nothing is kept: a count of references is then no more than a guess.
#[derive(Default)]
struct Memories([Mutex<Option<Memory>>; 2]);

/// `None` also where another thread is at the place.
fn taken(place: &Mutex<Option<Memory>>) -> Option<Memory> {
    place.try_lock().ok()?.take()
}

/// Puts a memory in its place; what has none, this one or the one before, is handed back.
fn put(place: &Mutex<Option<Memory>>, memory: Memory) -> Option<Memory> {
    match place.try_lock() {
        Ok(mut place) => place.replace(memory),
        Err(_) => Some(memory),
    }
}

impl Memories {
    fn take(&self, py: Python<'_>, numbers: usize, kinds: usize) -> Memory {
        for place in &self.0 {
            if let Some(memory) = taken(place) {
                if memory.fits(py, numbers, kinds) {
                    return memory;
                }
                drop(put(place, memory));
            }
        }
        Memory::new(py, numbers, kinds)
    }

    fn keep(&self, py: Python<'_>, memory: Memory) {
        if memory.numbers.bind(py).len() * size_of::<i32>() <= Memory::MAX {
            let [first, second] = &self.0;
            drop(put(first, memory).map(|before| put(second, before)));
        }
    }
}

/// Whether one thread at a time uses Python's objects.
fn has_gil(py: Python<'_>) -> PyResult<bool> {
    match py.import("sys")?.getattr_opt("_is_gil_enabled")? {
        Some(is_enabled) => is_enabled.call0()?.extract(),
        None => Ok(true),
    }
}

#[pyclass(frozen, name = "Aligner", module = "xtokmap._core")]
struct PyAligner {
    aligner: Aligner,
    memories: Option<Memories>,
}

#[pymethods]
impl PyAligner {
    #[new]
    fn new(py: Python<'_>, student: &PyByteTable, teacher: &PyByteTable) -> PyResult<Self> {
        caught(|| {
            let (student, teacher) = (student.table.clone(), teacher.table.clone());
            let aligner = py.detach(|| Aligner::new(student, teacher))?;
            Ok(Self { aligner, memories: has_gil(py)?.then(Memories::default) })
        })
    }

    /// The fields of an `AlignmentBatch` in their order, up to `chunk_cu`.
    #[pyo3(signature = (student_ids, student_layout, teacher_ids, teacher_layout, strict, threads))]
    #[allow(clippy::too_many_arguments)]
    fn align_batch<'py>(
        &self,
        py: Python<'py>,
        student_ids: &Bound<'py, PyAny>,
        student_layout: &Bound<'py, PyAny>,
        teacher_ids: &Bound<'py, PyAny>,
        teacher_layout: &Bound<'py, PyAny>,
        strict: bool,
        threads: Option<i64>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let (student, teacher) = (Held::new(student_ids, student_layout)?, Held::new(teacher_ids, teacher_layout)?);
            let (student, teacher) = (student.rows(Side::Student)?, teacher.rows(Side::Teacher)?);
            let job = Job::new(&self.aligner, student, teacher, strict)?;
            let mut room = Room::Usual;
            let (memory, sizes, chunk_cu) = loop {
                let sizes = job.sizes(room);
                let (n, room_for) = (sizes.numbers(), sizes.room);
                let memory = self
                    .memories
                    .as_ref()
                    .map_or_else(|| Memory::new(py, n, room_for), |kept| kept.take(py, n, room_for));
                let done = {
                    let mut numbers = memory.numbers.bind(py).try_readwrite()?;
                    let mut kinds = memory.kinds.bind(py).try_readwrite()?;
                    let out = sizes.out(numbers.as_slice_mut()?, kinds.as_slice_mut()?);
                    in_threads(py, threads, || job.run(out, room))
                };
                match done {
                    Ok(chunk_cu) => break (memory, sizes, chunk_cu),
                    Err(Halt::Full) => room = Room::All,
                    Err(Halt::Error(error)) => return Err(error.into()),
                }
            };
            let chunks = chunk_cu.last().map_or(0, |&chunks| chunks as usize);
            let numbers = memory.numbers.bind(py);
            let view =
                |from: usize, len: usize| numbers.get_item(PySlice::new(py, from as isize, (from + len) as isize, 1));
            let [s_end, t_end, s_chunk, t_chunk, pos, off, s_ptr, t_ptr] = sizes.starts();
            let (m, n, ptr) = (sizes.students, sizes.teachers, chunks + chunk_cu.len() - 1);
            let all = [
                view(s_ptr, ptr)?,
                view(t_ptr, ptr)?,
                memory.kinds.bind(py).get_item(PySlice::new(py, 0, chunks as isize, 1))?,
                view(s_chunk, m)?,
                view(t_chunk, n)?,
                view(s_end, m)?,
                view(t_end, n)?,
                view(pos, m)?,
                view(off, m)?,
                job.student_cu.into_pyarray(py).into_any(),
                job.teacher_cu.into_pyarray(py).into_any(),
                chunk_cu.into_pyarray(py).into_any(),
            ];
            if let Some(kept) = &self.memories {
                kept.keep(py, memory);
            }
            PyTuple::new(py, all)
        })
    }

    fn student_texts<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        layout: &Bound<'py, PyAny>,
        threads: Option<i64>,
    ) -> PyResult<(Vec<String>, Vec<usize>)> {
        caught(|| {
            let held = Held::new(ids, layout)?;
            let rows = held.rows(Side::Student)?;
            let texts = in_threads(py, threads, || self.aligner.decode_lossy(Side::Student, rows))?;
            let counts = texts.iter().map(Vec::len).collect();
            Ok((texts.into_iter().flatten().collect(), counts))
        })
    }
}

#[pyclass(frozen, name = "Encoding", module = "xtokmap._core")]
struct PyEncoding(Arc<Encoding>);

fn values<T: numpy::Element + Copy>(array: &PyReadonlyArray1<'_, T>) -> PyResult<Vec<T>> {
    Ok(array.as_slice()?.to_vec())
}

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

    #[pyo3(signature = (class_, reach))]
    #[allow(clippy::needless_pass_by_value)]
    fn learn(&self, class_: usize, reach: Array<'_, u8>) -> PyResult<()> {
        caught(|| Ok(self.0.learn(class_, values(&reach)?)?))
    }

    fn joined(&self, token: u32, next: u32) -> PyResult<bool> {
        caught(|| {
            for id in [token, next] {
                if id as usize >= self.0.table().len() {
                    return Err(PyIndexError::new_err(format!("id {id} is outside {} ids", self.0.table().len())));
                }
            }
            Ok(self.0.joined(token, next))
        })
    }
}

#[pyclass(frozen, name = "Cover", module = "xtokmap._core")]
struct PyCover {
    map: Arc<VocabMap>,
    cover: Cover,
}

#[pymethods]
impl PyCover {
    #[new]
    #[pyo3(signature = (student, teacher, pieces=None))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(
        py: Python<'_>,
        student: &PyEncoding,
        teacher: &PyEncoding,
        pieces: Option<Array<'_, u32>>,
    ) -> PyResult<Self> {
        caught(|| {
            let (student, teacher) = (student.0.clone(), teacher.0.clone());
            let pieces = pieces.map(|pieces| values(&pieces)).transpose()?.unwrap_or_default();
            Ok(py.detach(|| {
                let map = Arc::new(VocabMap::new(&student, &teacher, &pieces));
                Self { cover: Cover::new(student, teacher, map.clone()), map }
            }))
        })
    }

    #[getter]
    fn same(&self) -> bool {
        self.cover.same()
    }

    /// The arrays of the vocabulary map by name.
    fn vocab_map<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        caught(|| {
            let all = PyDict::new(py);
            let map = &*self.map;
            for (name, values) in [
                ("teacher_to_student", &map.teacher_to_student),
                ("student_to_teacher", &map.student_to_teacher),
                ("prefix", &map.prefix),
                ("canonical", &map.canonical),
                ("teacher_first", &map.teacher_first),
                ("group", &map.group),
                ("student_order", &map.student.order),
                ("teacher_order", &map.teacher.order),
            ] {
                all.set_item(name, values.clone().into_pyarray(py))?;
            }
            for (name, sorted) in [("student_range", &map.student), ("teacher_range", &map.teacher)] {
                all.set_item(name, ranges(py, sorted)?)?;
            }
            all.set_item("open", self.cover.open().into_pyarray(py))?;
            Ok(all)
        })
    }

    #[pyo3(signature = (batch, student_ids, teacher_ids, threads=None))]
    #[allow(clippy::needless_pass_by_value)]
    fn queries<'py>(
        &self,
        py: Python<'py>,
        batch: BatchFields<'py>,
        student_ids: Array<'py, u32>,
        teacher_ids: Array<'py, u32>,
        threads: Option<i64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        caught(|| {
            let kinds = batch.kinds()?;
            let batch = batch.with(&kinds)?;
            let (students, teachers) = (student_ids.as_slice()?, teacher_ids.as_slice()?);
            let found = in_threads(py, threads, || self.cover.queries_of(batch, students, teachers))?;
            let all = PyDict::new(py);
            let Queries { indptr, row, set, base, flags, sets } = found;
            all.set_item("indptr", indptr.into_pyarray(py))?;
            for (name, values) in [("row", row), ("set", set), ("base", base)] {
                all.set_item(name, values.into_pyarray(py))?;
            }
            all.set_item("flags", flags.into_pyarray(py))?;
            all.set_item("sets", PySets(sets))?;
            Ok(all)
        })
    }

    /// student int64 `[Q]`, teacher int64 `[Q]`, range int64 `[Q, 2]` and the sets of a batch's interior positions.
    #[allow(clippy::needless_pass_by_value)]
    fn interior<'py>(
        &self,
        py: Python<'py>,
        batch: BatchFields<'py>,
        student_ids: Array<'py, u32>,
        teacher_ids: Array<'py, u32>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let kinds = batch.kinds()?;
            let batch = batch.with(&kinds)?;
            let (students, teachers) = (student_ids.as_slice()?, teacher_ids.as_slice()?);
            let found = py.detach(|| self.cover.interior_of(batch, students, teachers))?;
            let n = found.range.len();
            let range = found.range.into_flattened().into_pyarray(py).reshape([n, 2])?;
            (found.student.into_pyarray(py), found.teacher.into_pyarray(py), range, PySets(found.sets))
                .into_pyobject(py)
        })
    }
}

fn ranges<'py>(py: Python<'py>, sorted: &Sorted) -> PyResult<Bound<'py, PyArray2<i32>>> {
    let n = sorted.range.len();
    sorted.range.as_flattened().to_vec().into_pyarray(py).reshape([n, 2])
}

/// The sets of some queries; they become arrays when they are asked for.
#[pyclass(frozen, name = "_Sets", module = "xtokmap._core")]
struct PySets(Vec<Arc<Set>>);

#[pymethods]
impl PySets {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// indptr int64 `[n+1]`, ids int32, next int32 and whole bool of all elements, complement bool `[n]`.
    fn arrays<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        caught(|| {
            let total = self.0.iter().map(|set| set.ids.len()).sum();
            let (mut indptr, mut complement) = (vec![0i64], Vec::with_capacity(self.0.len()));
            let (mut ids, mut next, mut whole) = (vec![], vec![], vec![]);
            py.detach(|| {
                ids.reserve(total);
                next.reserve(total);
                whole.reserve(total);
                for set in &self.0 {
                    ids.extend_from_slice(&set.ids);
                    next.extend_from_slice(&set.next);
                    next.resize(ids.len(), -1);
                    whole.extend_from_slice(&set.whole);
                    whole.resize(ids.len(), false);
                    indptr.push(ids.len() as i64);
                    complement.push(set.complement);
                }
            });
            let arrays = (
                indptr.into_pyarray(py),
                ids.into_pyarray(py),
                next.into_pyarray(py),
                whole.into_pyarray(py),
                complement.into_pyarray(py),
            );
            arrays.into_pyobject(py)
        })
    }
}

/// How the arrays of a batch lie in one array of numbers.
impl Sizes {
    /// Of all arrays but `kind`.
    fn numbers(&self) -> usize {
        4 * self.students + 2 * self.teachers + 2 * self.room
    }

    /// Where each starts, in the order of [`Out`].
    fn starts(&self) -> [usize; 8] {
        let (m, n, room) = (self.students, self.teachers, self.room);
        let mut start = 0;
        [m, n, m, n, m, m, room, room].map(|len| {
            start += len;
            start - len
        })
    }

    fn out<'a>(&self, mut numbers: &'a mut [i32], kind: &'a mut [u8]) -> Out<'a, u8> {
        let mut next = |len: usize| {
            let (taken, rest) = std::mem::take(&mut numbers).split_at_mut(len);
            numbers = rest;
            taken
        };
        let (m, n, room) = (self.students, self.teachers, self.room);
        Out {
            student_end: next(m),
            teacher_end: next(n),
            student_chunk: next(m),
            teacher_chunk: next(n),
            teacher_pos: next(m),
            teacher_off: next(m),
            student_ptr: next(room),
            teacher_ptr: next(room),
            kind: &mut kind[..room],
        }
    }
}

/// The fields of an alignment by name; every array is moved, not copied.
fn fields(py: Python<'_>, flat: Alignment) -> PyResult<Bound<'_, PyDict>> {
    let kind: Vec<u8> = flat.kind.iter().map(|&kind| kind as u8).collect();
    let all = PyDict::new(py);
    for (name, values) in [
        ("student_ptr", flat.student_ptr),
        ("teacher_ptr", flat.teacher_ptr),
        ("student_chunk", flat.student_chunk),
        ("teacher_chunk", flat.teacher_chunk),
        ("student_end", flat.student_end),
        ("teacher_end", flat.teacher_end),
        ("teacher_pos", flat.teacher_pos),
        ("teacher_off", flat.teacher_off),
    ] {
        all.set_item(name, values.into_pyarray(py))?;
    }
    all.set_item("kind", kind.into_pyarray(py))?;
    Ok(all)
}

type Array<'py, T> = PyReadonlyArray1<'py, T>;

/// An alignment that comes back from Python, by its attributes.
#[derive(FromPyObject)]
struct Fields<'py> {
    student_ptr: Array<'py, i32>,
    teacher_ptr: Array<'py, i32>,
    kind: Array<'py, u8>,
    student_chunk: Array<'py, i32>,
    teacher_chunk: Array<'py, i32>,
    student_end: Array<'py, i32>,
    teacher_end: Array<'py, i32>,
    #[pyo3(attribute("_starts"))]
    starts: Option<(Array<'py, i32>, Array<'py, i32>)>,
}

impl Fields<'_> {
    fn alignment(&self) -> PyResult<Alignment> {
        let vec = |array: &Array<'_, i32>| array.as_slice().map(<[i32]>::to_vec);
        let starts = self.starts.as_ref().map(|(s, t)| Ok::<_, PyErr>(Box::new((vec(s)?, vec(t)?))));
        let a = Alignment {
            student_ptr: vec(&self.student_ptr)?,
            teacher_ptr: vec(&self.teacher_ptr)?,
            kind: kinds_of(&self.kind)?,
            student_chunk: vec(&self.student_chunk)?,
            teacher_chunk: vec(&self.teacher_chunk)?,
            student_end: vec(&self.student_end)?,
            teacher_end: vec(&self.teacher_end)?,
            starts: starts.transpose()?,
            ..Alignment::default()
        };
        a.check()?;
        Ok(a)
    }
}

fn kinds_of(numbers: &Array<'_, u8>) -> PyResult<Vec<Kind>> {
    let kind: Option<Vec<Kind>> =
        numbers.as_slice()?.iter().map(|&k| KINDS.get(k as usize).map(|&(kind, _)| kind)).collect();
    kind.ok_or_else(|| XTokMapError::new_err("kind: a number that is no kind of chunk"))
}

/// A batch that comes back from Python, as far as its queries need it.
#[derive(FromPyObject)]
struct BatchFields<'py> {
    kind: Array<'py, u8>,
    student_chunk: Array<'py, i32>,
    teacher_chunk: Array<'py, i32>,
    student_end: Array<'py, i32>,
    teacher_end: Array<'py, i32>,
    teacher_pos: Array<'py, i32>,
    teacher_off: Array<'py, i32>,
    student_cu: Array<'py, i64>,
    teacher_cu: Array<'py, i64>,
    chunk_cu: Array<'py, i64>,
}

impl BatchFields<'_> {
    fn kinds(&self) -> PyResult<Vec<Kind>> {
        kinds_of(&self.kind)
    }

    fn with<'a>(&'a self, kind: &'a [Kind]) -> PyResult<crate::cover::Fields<'a>> {
        Ok(crate::cover::Fields {
            kind,
            student_chunk: self.student_chunk.as_slice()?,
            teacher_chunk: self.teacher_chunk.as_slice()?,
            student_end: self.student_end.as_slice()?,
            teacher_end: self.teacher_end.as_slice()?,
            teacher_pos: self.teacher_pos.as_slice()?,
            teacher_off: self.teacher_off.as_slice()?,
            student_cu: self.student_cu.as_slice()?,
            teacher_cu: self.teacher_cu.as_slice()?,
            chunk_cu: self.chunk_cu.as_slice()?,
        })
    }
}

/// Overlaps as (indptr int64 `[m+1]`, indices int32 `[nnz]`, nbytes int32 `[nnz]`).
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
fn overlaps<'py>(py: Python<'py>, alignment: Fields<'py>) -> PyResult<Bound<'py, PyTuple>> {
    caught(|| {
        let a = alignment.alignment()?;
        let all = py.detach(|| crate::overlaps(&a));
        (all.indptr.into_pyarray(py), all.indices.into_pyarray(py), all.nbytes.into_pyarray(py)).into_pyobject(py)
    })
}

/// Spans int64 `[k, 2]` of one side on the other.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
fn map_spans<'py>(
    py: Python<'py>,
    alignment: Fields<'py>,
    spans: PyReadonlyArray2<'py, i64>,
    to_teacher: bool,
    cover: bool,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    caught(|| {
        let (a, spans) = (alignment.alignment()?, pairs(&spans)?);
        let to = if to_teacher { Side::Teacher } else { Side::Student };
        let mode = if cover { SpanMode::Cover } else { SpanMode::Inside };
        let mapped = py.detach(|| crate::map_spans(&a, &spans, to, mode))?;
        let k = mapped.len();
        mapped.into_flattened().into_pyarray(py).reshape([k, 2])
    })
}

fn pairs(array: &PyReadonlyArray2<'_, i64>) -> PyResult<Vec<[i64; 2]>> {
    Ok(array.as_slice()?.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
}

/// The fields of an alignment made from sorted offsets int64 `[m, 2]` and `[n, 2]`.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
fn align_offsets<'py>(
    py: Python<'py>,
    student: PyReadonlyArray2<'py, i64>,
    teacher: PyReadonlyArray2<'py, i64>,
) -> PyResult<Bound<'py, PyDict>> {
    caught(|| {
        let (student, teacher) = (pairs(&student)?, pairs(&teacher)?);
        let mut flat = py.detach(|| crate::align_offsets(&student, &teacher))?;
        let starts = flat.starts.take().unwrap_or_default();
        let all = fields(py, flat)?;
        all.set_item("_starts", (starts.0.into_pyarray(py), starts.1.into_pyarray(py)))?;
        Ok(all)
    })
}

#[pyfunction]
#[allow(clippy::type_complexity, clippy::needless_pass_by_value)]
fn get_alignments(
    py: Python<'_>,
    tokens_a: Vec<String>,
    tokens_b: Vec<String>,
) -> PyResult<(Vec<Vec<usize>>, Vec<Vec<usize>>)> {
    caught(|| Ok(py.detach(|| crate::align_texts(&tokens_a, &tokens_b))))
}

/// The bytes of tokens inside a text: replacements first, then "plain", "byte level" or "byte pieces".
#[pyfunction]
#[allow(clippy::needless_pass_by_value)]
fn spell<'py>(
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
fn json_strings_end(py: Python<'_>, json: &[u8], start: usize) -> PyResult<Option<usize>> {
    caught(|| Ok(py.detach(|| scan::json_strings_end(json, start))))
}

/// The names and the integers of the JSON object at `start`, and its end; None where there is no such object.
#[pyfunction]
#[allow(clippy::type_complexity)]
fn json_ids<'py>(
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
fn gguf_strings<'py>(
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

/// Fails as a bug in the core would, in a thread of a pool: for the test of what comes of it.
#[pyfunction]
fn _fail(py: Python<'_>, threads: Option<i64>) -> PyResult<()> {
    caught(|| {
        in_threads::<_, Error>(py, threads, || {
            pool::map(64, |k| assert!(k != 40, "asked to fail"));
            Ok(())
        })?;
        Ok(())
    })
}

#[pyfunction]
fn _forked() {
    pool::forked();
}

#[pymodule(gil_used = false)]
#[pyo3(name = "_core")]
fn core_module(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    std::panic::set_hook(Box::new(note_panic));
    if let Some(register) = py.import("os")?.getattr_opt("register_at_fork")? {
        let kwargs = PyDict::new(py);
        kwargs.set_item("after_in_child", wrap_pyfunction!(_forked, module)?)?;
        register.call((), Some(&kwargs))?;
    }
    // What is made when it is first used: a fork that comes by just then would wait for it.
    drop(vec![0u8].into_pyarray(py).try_readwrite()?);
    module.add_class::<PyByteTable>()?;
    module.add_class::<PyAligner>()?;
    module.add_class::<PyEncoding>()?;
    module.add_class::<PyCover>()?;
    module.add_class::<PySets>()?;
    module.add_function(wrap_pyfunction!(_rebuild_byte_table, module)?)?;
    module.add_function(wrap_pyfunction!(_fail, module)?)?;
    module.add_function(wrap_pyfunction!(overlaps, module)?)?;
    module.add_function(wrap_pyfunction!(map_spans, module)?)?;
    module.add_function(wrap_pyfunction!(align_offsets, module)?)?;
    module.add_function(wrap_pyfunction!(get_alignments, module)?)?;
    module.add_function(wrap_pyfunction!(spell, module)?)?;
    module.add_function(wrap_pyfunction!(json_strings_end, module)?)?;
    module.add_function(wrap_pyfunction!(json_ids, module)?)?;
    module.add_function(wrap_pyfunction!(gguf_strings, module)?)?;
    module.add("XTokMapError", py.get_type::<XTokMapError>())?;
    module.add("ByteMismatchError", py.get_type::<ByteMismatchError>())?;
    module.add("UnsupportedTokenizerError", py.get_type::<UnsupportedTokenizerError>())?;
    module.add("TokenIdError", py.get_type::<TokenIdError>())?;
    module.add("KINDS", kinds(py)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}

/// The kinds of chunks in the order of their numbers.
const KINDS: [(Kind, &str); 6] = [
    (Kind::OneToOne, "ONE_TO_ONE"),
    (Kind::OneToMany, "ONE_TO_MANY"),
    (Kind::ManyToOne, "MANY_TO_ONE"),
    (Kind::ManyToMany, "MANY_TO_MANY"),
    (Kind::Rewritten, "REWRITTEN"),
    (Kind::Stop, "STOP"),
];

fn kinds(py: Python<'_>) -> PyResult<Py<PyAny>> {
    let all = PyDict::new(py);
    for (kind, name) in KINDS {
        all.set_item(name, kind as u8)?;
    }
    all.into_py_any(py)
}
