"""What users pass as token ids, masks and spans, as arrays that the core reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.ma import MaskedArray  # now: an import that a fork interrupts in another thread never ends

from xtokmap._core import XTokMapError

Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Bool: TypeAlias = npt.NDArray[np.bool_]
#: One row of token ids: a list, a numpy array or a torch CPU tensor of integers, 1-D.
Ids: TypeAlias = Any


class _Rows(NamedTuple):
    """Ids as the core takes them: flat, with `cu_seqlens` or with a mask."""

    ids: npt.NDArray[Any]
    layout: npt.NDArray[Any]
    mask: Bool | None = None

    def split(self) -> list[npt.NDArray[Any]]:
        """The rows, one array each, padding left out."""
        if self.mask is not None:
            rows = self.ids.reshape(self.mask.shape)
            return [row[kept] for row, kept in zip(rows, self.mask, strict=True)]
        return [self.ids[start:end] for start, end in pairwise(self.layout.tolist())]

    @classmethod
    def of_one(cls, ids: Ids, name: str) -> _Rows:
        array = _integers(ids, name)
        if array.ndim != 1:
            raise XTokMapError(
                f"{name}: expected one row of ids (1-D), got shape {array.shape}; use align_batch for a batch"
            )
        return cls(array, np.asarray([0, len(array)], dtype=np.int64))

    @classmethod
    def of_batch(cls, ids: Any, mask: Any, cu: Any, side: str) -> _Rows:
        name = f"{side}_ids"
        if cu is not None:
            if mask is not None:
                raise XTokMapError(
                    f"{side}_mask and {side}_cu: give one of them; a mask goes with padded {name} (2-D), cu_seqlens "
                    "with flat ones (1-D)"
                )
            array = _integers(ids, name)
            if array.ndim != 1:
                raise XTokMapError(f"{side}_cu goes with flat {name} (1-D), got shape {array.shape}")
            ends = _integers(cu, f"{side}_cu", "cu_seqlens")
            if ends.ndim != 1:
                raise XTokMapError(f"{side}_cu: expected cu_seqlens of shape [B+1], got shape {ends.shape}")
            return cls(array, ends.astype(np.int64, copy=False))
        if isinstance(ids, (list, tuple)):
            if mask is not None:
                raise XTokMapError(
                    f"{side}_mask: a mask goes with padded {name} (a 2-D array); {name} is a sequence of rows"
                )
            return cls._of_ragged(ids, name)
        array = _integers(ids, name)
        if array.ndim != 2:
            raise XTokMapError(
                f"{name}: expected a sequence of rows or a padded [B, T] array, got shape {array.shape}; flat ids go "
                f"with {side}_cu"
            )
        if mask is None:
            rows, width = array.shape
            return cls(array.reshape(-1), np.arange(rows + 1, dtype=np.int64) * width)
        flags = _as_numpy(mask, f"{side}_mask")
        if flags.shape != array.shape:
            raise XTokMapError(f"{side}_mask has shape {flags.shape}, {name} has {array.shape}; they must be equal")
        if flags.dtype != np.bool_:
            if flags.dtype.kind not in "iu" or (flags.size and not 0 <= flags.min() <= flags.max() <= 1):
                raise XTokMapError(
                    f"{side}_mask: expected bool or integers 0 and 1, got {flags.dtype}; compare it first (mask > 0)"
                )
            flags = flags.astype(np.bool_)
        flags = np.ascontiguousarray(flags)
        # A view of other bytes as bool: numpy takes every byte but 0 for True, and counts bytes that are 1.
        if (bytes_ := flags.view(np.uint8)).max(initial=0) > 1:
            flags = bytes_ != 0
        # Rows without any column cannot be counted from a flat mask.
        layout = flags if flags.size else np.zeros(len(flags) + 1, dtype=np.int64)
        return cls(array.reshape(-1), layout, flags)

    @classmethod
    def _of_ragged(cls, rows: Sequence[Any], name: str) -> _Rows:
        kinds = set(map(type, rows))
        ids: Any = None
        if kinds <= {list, tuple}:
            try:
                ids = _integers(list(chain.from_iterable(rows)), name)
            except XTokMapError:
                # Say which row it is.
                for b, row in enumerate(rows):
                    cls.of_one(row, f"{name}[{b}]")
                raise
        elif len(kinds) == 1:
            ids = _joined(rows)
        if ids is None or ids.ndim != 1:
            arrays = [cls.of_one(row, f"{name}[{b}]").ids for b, row in enumerate(rows)]
            rows, ids = arrays, np.concatenate(arrays)
        cu = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)), out=cu[1:])
        return cls(_integers(ids, name), cu)


def _joined(rows: Sequence[Any]) -> Any:
    """Arrays or tensors of one type and dtype end to end; None where they must be looked at one by one."""
    torch = sys.modules.get("torch")
    try:
        if len(set(map(attrgetter("dtype"), rows))) > 1:
            return None
        joined = np.concatenate(rows) if type(rows[0]) is np.ndarray else torch and torch.cat(list(rows)).numpy()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return joined if joined is not None and joined.dtype.kind in "iu" else None


_ID_DTYPES = (np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.uint32))


def _as_numpy(array: Any, name: str) -> npt.NDArray[Any]:
    """A numpy view of a list, an array or a torch CPU tensor."""
    if type(array) is np.ndarray:
        return array
    if isinstance(array, MaskedArray):
        raise XTokMapError(
            f"{name}: a numpy.ma masked array, whose own mask nothing here looks at; pass its data "
            f"(numpy.ma.getdata), and which of them are tokens (~numpy.ma.getmaskarray) as a mask of bool"
        )
    if hasattr(array, "detach") and hasattr(array, "is_cpu"):
        if not array.is_cpu:
            raise XTokMapError(f"{name}: a tensor on {array.device}; alignment runs on the CPU, pass {name}.cpu()")
        if array.requires_grad:
            raise XTokMapError(f"{name}: a tensor that requires grad cannot be token ids or a mask; pass .detach()")
        try:
            view: npt.NDArray[Any] = array.numpy()
        except TypeError:
            raise XTokMapError(f"{name}: a tensor of {array.dtype}; pass integers, or bool for a mask") from None
        return view
    try:
        return np.asarray(array)
    except ValueError:
        raise XTokMapError(
            f"{name}: lists of different lengths where numbers of one shape are expected; a row is one flat list, and "
            "rows of different lengths go to align_batch as a list of rows"
        ) from None


def _integers(numbers: Any, name: str, what: str = "token ids") -> npt.NDArray[Any]:
    """`numbers` as a contiguous int32, int64 or uint32 array in the machine's byte order."""
    array = _as_numpy(numbers, name)
    if array.dtype in _ID_DTYPES and array.flags.c_contiguous and array.flags.aligned:
        return array
    if array.size == 0 and array.dtype.kind in "fO":
        array = array.astype(np.int64)  # an empty list
    if array.dtype.kind not in "iu":
        odd = array.reshape(-1)[:1].tolist()
        if array.dtype.kind == "O":
            odd = [number for number in array.flat if not isinstance(number, int)][:1]
            if not odd:
                raise XTokMapError(f"{name}: {what} beyond 64 bits; they are larger than any vocabulary or text")
        raise XTokMapError(f"{name}: {what} must be integers, got {array.dtype} {odd}; pass int32, int64 or uint32")
    native = array.dtype.newbyteorder("=")
    if native not in _ID_DTYPES:
        if native == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise XTokMapError(f"{name}: id {array.max()} is larger than any vocabulary")
        native = np.dtype(np.int64)
    array = np.asarray(array, dtype=native, order="C")
    return array if array.flags.aligned else array.copy()


def _offsets(spans: Any, name: str) -> Int64:
    array = _as_numpy(spans, name)
    if array.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise XTokMapError(f"{name}: expected [k, 2] (start, stop) pairs, got shape {array.shape}")
    return _integers(array, name, "spans").astype(np.int64, copy=False)
