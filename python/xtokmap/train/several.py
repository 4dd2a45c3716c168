"""More teachers than one: who they are, and how much each counts in which prompt."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from xtokmap._core import XTokMapError
from xtokmap.chat import Prompt
from xtokmap.teachers.client import RowRefusedError
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.torch.mixture import View
from xtokmap.torch.pair import Pair
from xtokmap.train.rollouts import Rollouts

#: What the first teacher is called, that of `Config.teacher`.
FIRST = "teacher"


def named_teachers(text: str) -> dict[str, tuple[str, str]]:
    """Models, and URLs of servers that have them (empty: none), by name: of `Config.more_teachers`.

    Raises:
        XTokMapError: an entry that is none, a name twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, sign, rest = entry.partition("=")
        model, at, url = rest.partition("@http")
        if not sign or not model or not re.fullmatch(r"[\w-]+", name):
            raise XTokMapError(
                f"more_teachers: {entry!r} is no NAME=MODEL or NAME=MODEL@URL; a name has letters, digits, _ and -"
            )
        if name == FIRST or name in found:
            raise XTokMapError(f"more_teachers: {name!r} is another teacher's name already")
        found[name] = (model, f"http{url}" if at else "")
    return found


def shares_by_domain(text: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """How much each teacher counts in a domain, adding up to 1: of `Config.domains`.

    Raises:
        XTokMapError: a domain twice, a teacher that there is not, weights that are none.
    """
    found: dict[str, dict[str, float]] = {}
    for entry in filter(None, map(str.strip, text.split(";"))):
        domain, sign, rest = (part.strip() for part in entry.partition(":"))
        if not sign or not rest or domain in found:
            raise XTokMapError(f"domains: {entry!r} is no new 'DOMAIN: TEACHER' or 'DOMAIN: TEACHER=WEIGHT ...'")
        weights: dict[str, float] = {}
        for word in rest.split():
            name, _, weight = word.partition("=")
            try:
                weights[name] = float(weight or 1)
            except ValueError:
                weights[name] = math.nan
            if name not in names or not 0 <= weights[name] < math.inf:
                raise XTokMapError(
                    f"domains: {word!r} is no weight of a teacher; there are {', '.join(names)}, and weights are at "
                    "least 0"
                )
        total = sum(weights.values())
        if not total:
            raise XTokMapError(f"domains: no teacher counts in {domain!r}")
        found[domain] = {name: weights.get(name, 0.0) / total for name in names}
    return found


class Others:
    """The teachers beside the first one.

    The first one scores every prompt, whether it counts there or not: it is the one that a run's health, its samples
    and their report show. The others score where they count.

    Args:
        pair: of student and first teacher.
        teachers: the others by name.
        domains: of `shares_by_domain`; in a domain that is not there all teachers count the same.
    """

    def __init__(self, pair: Pair, teachers: Mapping[str, Teacher], domains: Mapping[str, Mapping[str, float]]) -> None:
        self.names = (FIRST, *teachers)
        self.domains = domains
        how = {"plain_template": pair.plain_template, "foreign": pair.aligner.foreign, **asdict(pair.settings)}
        self.teachers = {
            name: (teacher, Pair(pair.tokenizers[0], teacher.tokenizer, pair.rule, **how))
            for name, teacher in teachers.items()
        }

    def local(self) -> dict[str, LocalTeacher]:
        """Those that are models in this process, by name."""
        return {name: one for name, (one, _) in self.teachers.items() if isinstance(one, LocalTeacher)}

    def weights(self, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """How much each teacher counts in some prompts."""
        same = dict.fromkeys(self.names, 1 / len(self.names))
        found = [self.domains.get(prompt.domain, same) for prompt in prompts]
        return {name: [row[name] for row in found] for name in self.names}

    def views(self, rollouts: Rollouts, pair: Pair) -> list[View]:
        """What every teacher thinks of a batch that the first one has scored.

        Args:
            rollouts: the batch.
            pair: of the first teacher, with the loss.

        Raises:
            TeacherError: a served teacher gives no scores.
        """
        weights, count = self.weights(rollouts.prompts), len(rollouts.prompts)
        for b in rollouts.skipped:  # what the first one does not take, nobody learns from
            for values in weights.values():
                values[b] = 0.0
        at = {b: b for b in range(count)}
        found = [View(pair, rollouts.batch, rollouts.teacher, weights[FIRST], at, FIRST)]
        for name, (teacher, own) in self.teachers.items():
            found.append(_view(name, teacher, own.with_loss(pair.rule), rollouts, weights[name]))
        return found


def _view(name: str, teacher: Teacher, pair: Pair, rollouts: Rollouts, weights: list[float]) -> View:
    # A teacher that counts nowhere scores one row, so that there are figures of it in every process.
    rows = [b for b, weight in enumerate(weights) if weight] or [0]
    prompts = teacher.render([rollouts.prompts[b] for b in rows])
    students = [[side[b] for b in rows] for side in rollouts.batch.sides[:2]]
    batch = pair.prepare((students[0], prompts), students[1], device=rollouts.batch.completion_mask.device)
    at = {b: k for k, b in enumerate(rows)}
    try:
        return View(pair, batch, pair.scores(teacher, batch), weights, at, name)
    except RowRefusedError as error:
        if not error.rows or all(weights[rows[k]] == 0 for k in error.rows):
            raise
        refused = {rows[k] for k in error.rows}
        left = [0.0 if b in refused else weight for b, weight in enumerate(weights)]
        return _view(name, teacher, pair, rollouts, left)
