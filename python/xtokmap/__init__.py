"""Byte-exact token alignment between two tokenizers, and the losses that cross model families on it.

    import xtokmap

    al = xtokmap.Aligner(student, teacher)          # tokenizers, files or byte tables
    a = al.align(student_ids, teacher_ids)          # chunks: the finest spans with the same bytes on both sides

`xtokmap.torch`, `xtokmap.losses`, `xtokmap.teachers` and `xtokmap.train` need torch and are imported by name.
"""

from xtokmap._core import (
    ByteMismatchError,
    ByteTable,
    TokenIdError,
    UnsupportedTokenizerError,
    XTokMapError,
    __version__,
)
from xtokmap.aligner import Aligner
from xtokmap.alignment import Alignment, AlignmentBatch, Chunk, Kind, Overlaps, align_offsets, get_alignments
from xtokmap.tokenizers import byte_table

__all__ = [
    "Aligner",
    "Alignment",
    "AlignmentBatch",
    "ByteMismatchError",
    "ByteTable",
    "Chunk",
    "Kind",
    "Overlaps",
    "TokenIdError",
    "UnsupportedTokenizerError",
    "XTokMapError",
    "__version__",
    "align_offsets",
    "byte_table",
    "get_alignments",
]
