"""VocabMap: what the tokens of two vocabularies are to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

from xtokmap.ids import Bool, Int32

_T = TypeVar("_T")


class once(Generic[_T]):  # noqa: N801
    """A property that is worked out when it is first asked for; of several threads that ask at once, by each.

    `functools.cached_property` has one lock for all objects up to Python 3.11, and a process that is forked while
    another thread holds it would wait for it for ever.
    """

    def __init__(self, make: Callable[[Any], _T]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> once[_T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...
    def __get__(self, instance: object | None, owner: type) -> once[_T] | _T:
        if instance is None:
            return self
        made: _T = instance.__dict__.setdefault(self._name, self._make(instance))
        return made


@dataclass(frozen=True, eq=False, repr=False)
class VocabMap:
    """What the tokens of two vocabularies are to each other; -1 where there is none.

    Attributes:
        teacher_to_student: int32 `[V_T]`; the student token with the same bytes. Of several the one that the student's
            tokenizer makes.
        student_to_teacher: int32 `[V_S]`; the teacher token with the same bytes.
        prefix: int32 `[V_T]`; the longest student token that every teacher token begins with.
        canonical: int32 `[V_T]`; the first token of the student's own encoding of every teacher token.
        teacher_first: int32 `[V_S]`; the first teacher token of every student token's bytes.
        teacher_second: int32 `[V_S]`; the second.
        student_order: int32 `[n_S]`; the student's ids that have bytes, sorted by them (equal bytes by id).
        teacher_order: int32 `[n_T]`; the teacher's.
        student_range: int32 `[V_S, 2]`; `[lo, hi)` in `student_order` of the tokens that begin with this one's bytes.
        teacher_range: int32 `[V_T, 2]`; the same in `teacher_order`.
        group: int32 `[V_T]`; teacher tokens without an equal student token, in groups connected by one being a prefix
            of another; -1 for all others.
        open: bool `[V_S]`; whether there is a longer student token that the teacher would cut right after this one, so
            that mass on it may belong to the longer one.
        student_stops: the student's ids that end a turn, the preferred one first; none that begins a marker.
        teacher_stops: the teacher's.
    """

    teacher_to_student: Int32
    student_to_teacher: Int32
    prefix: Int32
    canonical: Int32
    teacher_first: Int32
    teacher_second: Int32
    student_order: Int32
    teacher_order: Int32
    student_range: Int32
    teacher_range: Int32
    group: Int32
    open: Bool
    student_stops: tuple[int, ...]
    teacher_stops: tuple[int, ...]
    #: Names of tokens on both sides, where both tokenizers have them.
    _names: tuple[Mapping[str, int], Mapping[str, int]] | None = field(default=None, kw_only=True)

    def summary(self) -> dict[str, int | None]:
        """Counts of tokens.

        Returns:
            `student` and `teacher`: tokens that have bytes; `shared_bytes`: teacher tokens with an equal student token;
            `shared_strings`: tokens whose vocabulary strings are equal, which is what a comparison by string finds
            (None where a side has no strings); `uncovered`: teacher tokens without an equal student token; `groups`:
            their groups; `unreachable`: teacher tokens that no student token begins.
        """
        spelled = self.teacher_order
        strings = None if self._names is None else len(self._names[0].keys() & self._names[1].keys())
        return {
            "student": len(self.student_order),
            "teacher": len(spelled),
            "shared_bytes": int((self.teacher_to_student[spelled] >= 0).sum()),
            "shared_strings": strings,
            "uncovered": int((self.teacher_to_student[spelled] < 0).sum()),
            "groups": int(self.group.max(initial=-1)) + 1,
            "unreachable": int((self.prefix[spelled] < 0).sum()),
        }

    def __repr__(self) -> str:
        return f"VocabMap({', '.join(f'{name}={n}' for name, n in self.summary().items())})"
