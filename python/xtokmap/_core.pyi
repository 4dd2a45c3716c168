from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "ARRAYS",
    "KINDS",
    "ROLES",
    "Aligner",
    "ByteMismatchError",
    "ByteTable",
    "Cover",
    "Encoding",
    "TokenIdError",
    "UnsupportedTokenizerError",
    "XTokMapError",
    "_Sets",
    "__version__",
    "_fail",
    "align_offsets",
    "get_alignments",
    "gguf_strings",
    "json_ids",
    "json_strings_end",
    "map_spans",
    "overlaps",
    "spell",
]

__version__: Final[str]
ARRAYS: Final[tuple[str, ...]]
KINDS: Final[dict[str, int]]
ROLES: Final[tuple[str, ...]]

class XTokMapError(ValueError): ...
class UnsupportedTokenizerError(XTokMapError): ...

class ByteMismatchError(XTokMapError):
    row: int
    byte: int

class TokenIdError(XTokMapError):
    row: int
    position: int
    id: int
    vocab_size: int

@final
class ByteTable:
    @staticmethod
    def from_bytes(
        tokens: Iterable[bytes | None],
        *,
        stop_ids: Sequence[int] = ...,
        invalid: str = "maximal",
        byte_pieces: Sequence[int] = ...,
        markers: Sequence[tuple[str, Sequence[int]]] = ...,
    ) -> ByteTable: ...
    @staticmethod
    def from_arrays(
        arena: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.uint32],
        special: npt.NDArray[np.bool_],
        stop_ids: npt.NDArray[np.uint32],
        invalid: str,
        byte_pieces: npt.NDArray[np.uint32],
        markers: Sequence[tuple[str, Sequence[int]]] = ...,
    ) -> ByteTable: ...
    def to_arrays(
        self,
    ) -> tuple[
        npt.NDArray[np.uint8],
        npt.NDArray[np.uint32],
        npt.NDArray[np.bool_],
        npt.NDArray[np.uint32],
        str,
        npt.NDArray[np.uint32],
        list[tuple[str, list[int]]],
    ]: ...
    def with_markers(self, markers: Sequence[tuple[str, Sequence[int]]]) -> ByteTable: ...
    def __len__(self) -> int: ...
    def __getitem__(self, id: int, /) -> bytes | None: ...
    def __reduce__(self) -> tuple[Any, ...]: ...
    @property
    def lengths(self) -> npt.NDArray[np.int32]: ...
    @property
    def is_special(self) -> npt.NDArray[np.bool_]: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def markers(self) -> tuple[tuple[str, tuple[int, ...]], ...]: ...
    @property
    def invalid(self) -> str: ...
    @property
    def byte_pieces(self) -> tuple[int, ...]: ...
    def decode(self, ids: Iterable[int] | npt.NDArray[Any]) -> bytes: ...

@final
class Aligner:
    def __new__(cls, student: ByteTable, teacher: ByteTable) -> Aligner: ...
    def align_batch(
        self,
        student_ids: npt.NDArray[Any],
        student_layout: npt.NDArray[Any],
        teacher_ids: npt.NDArray[Any],
        teacher_layout: npt.NDArray[Any],
        strict: bool,
        threads: int | None,
    ) -> tuple[npt.NDArray[Any], ...]: ...
    def student_texts(
        self, ids: npt.NDArray[Any], layout: npt.NDArray[Any], threads: int | None
    ) -> tuple[list[str], list[int], list[int | None]]: ...
    def marker_pairs(self) -> list[tuple[int, int]]: ...

@final
class Encoding:
    def __new__(
        cls,
        table: ByteTable,
        rule: str = "longest match",
        *,
        merges: npt.NDArray[np.uint32] | None = None,
        ranks: npt.NDArray[np.uint32] | None = None,
        scores: npt.NDArray[np.float32] | None = None,
        characters: bool = False,
        whole: bool = False,
        added: npt.NDArray[np.uint32] | None = None,
        splits: tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], int, int] | None = None,
    ) -> Encoding: ...
    def encode(self, bytes: bytes) -> list[int]: ...
    def learn(self, class_: int, reach: npt.NDArray[np.uint8]) -> None: ...
    def joined(self, token: int, next: int, word: bool = False) -> bool: ...

@final
class Cover:
    def __new__(
        cls,
        student: Encoding,
        teacher: Encoding,
        pieces: npt.NDArray[np.uint32] | None = None,
        letter: int | None = None,
    ) -> Cover: ...
    @property
    def same(self) -> bool: ...
    def vocab_map(self) -> dict[str, Any]: ...
    def queries(
        self,
        arrays: tuple[npt.NDArray[Any], ...],
        cu: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]],
        student_ids: npt.NDArray[np.uint32],
        teacher_ids: npt.NDArray[np.uint32],
        rows: bool,
        threads: int | None = None,
    ) -> dict[str, Any]: ...
    def interior(
        self,
        arrays: tuple[npt.NDArray[Any], ...],
        cu: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]],
        student_ids: npt.NDArray[np.uint32],
        teacher_ids: npt.NDArray[np.uint32],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], _Sets]: ...

@final
class _Sets:
    def __len__(self) -> int: ...
    def arrays(
        self,
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        npt.NDArray[np.int32],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        npt.NDArray[np.int32],
    ]: ...

def _fail(threads: int | None) -> None: ...
def overlaps(
    arrays: tuple[npt.NDArray[Any], ...],
    starts: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...
def map_spans(
    arrays: tuple[npt.NDArray[Any], ...],
    starts: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
    spans: npt.NDArray[np.int64],
    to_teacher: bool,
    cover: bool,
) -> npt.NDArray[np.int64]: ...
def align_offsets(
    student: npt.NDArray[np.int64], teacher: npt.NDArray[np.int64]
) -> tuple[tuple[npt.NDArray[Any], ...], tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]: ...
def get_alignments(tokens_a: Sequence[str], tokens_b: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]: ...
def spell(tokens: list[str], replacements: Sequence[tuple[str, str]], kind: str) -> list[bytes]: ...
def json_strings_end(json: bytes, start: int) -> int | None: ...
def json_ids(json: bytes, start: int) -> tuple[list[str], list[int], int] | None: ...
def gguf_strings(
    data: npt.NDArray[np.uint8], start: int, count: int, big_endian: bool, keep: bool
) -> tuple[list[bytes], int] | None: ...
