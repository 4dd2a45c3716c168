//! The Python module `xtokmap._core`: the only folder that knows `PyO3` and numpy.
//!
//! What the locks are, and why none can hang, is written in `pool.rs`.

mod aligner;
mod arrays;
mod cover;
mod encoding;
mod errors;
mod readers;
mod rows;
mod spans;
mod support;
mod table;

use numpy::{IntoPyArray, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use self::errors::{ByteMismatchError, TokenIdError, UnsupportedTokenizerError, XTokMapError};
use self::support::{caught, in_threads};
use crate::chunks::Arrays;
use crate::pool;
use crate::table::Role;

/// Fails as a bug in the core would, in a thread of a pool: for the test of what comes of it.
#[pyfunction]
fn _fail(py: Python<'_>, threads: Option<i64>) -> PyResult<()> {
    caught(|| {
        in_threads(py, threads, || {
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
    std::panic::set_hook(Box::new(support::note_panic));
    if let Some(register) = py.import("os")?.getattr_opt("register_at_fork")? {
        let kwargs = PyDict::new(py);
        kwargs.set_item("after_in_child", wrap_pyfunction!(_forked, module)?)?;
        register.call((), Some(&kwargs))?;
    }
    // What is made when it is first used: a fork that comes by just then would wait for it.
    drop(vec![0u8].into_pyarray(py).try_readwrite()?);
    module.add_class::<table::PyByteTable>()?;
    module.add_class::<aligner::PyAligner>()?;
    module.add_class::<encoding::PyEncoding>()?;
    module.add_class::<cover::PyCover>()?;
    module.add_class::<cover::PySets>()?;
    module.add_function(wrap_pyfunction!(_fail, module)?)?;
    module.add_function(wrap_pyfunction!(spans::overlaps, module)?)?;
    module.add_function(wrap_pyfunction!(spans::map_spans, module)?)?;
    module.add_function(wrap_pyfunction!(spans::align_offsets, module)?)?;
    module.add_function(wrap_pyfunction!(spans::get_alignments, module)?)?;
    module.add_function(wrap_pyfunction!(readers::spell, module)?)?;
    module.add_function(wrap_pyfunction!(readers::json_strings_end, module)?)?;
    module.add_function(wrap_pyfunction!(readers::json_ids, module)?)?;
    module.add_function(wrap_pyfunction!(readers::gguf_strings, module)?)?;
    module.add("XTokMapError", py.get_type::<XTokMapError>())?;
    module.add("ByteMismatchError", py.get_type::<ByteMismatchError>())?;
    module.add("UnsupportedTokenizerError", py.get_type::<UnsupportedTokenizerError>())?;
    module.add("TokenIdError", py.get_type::<TokenIdError>())?;
    module.add("KINDS", arrays::kinds(py)?)?;
    module.add("ROLES", PyTuple::new(py, Role::ALL.map(|role| role.1))?)?;
    module.add("ARRAYS", PyTuple::new(py, Arrays::NAMES)?)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
