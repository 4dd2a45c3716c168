"""A teacher's scoring beside the student's own work."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from xtokmap.train.rollouts import Rollouts
from xtokmap.train.sampling import Roller


class Scoring:
    """A batch that the teacher scores in a thread of its own, while the student samples or is updated.

    Args:
        roller: whose teacher is a served one.
        rollouts: sampled, not scored.
        after: the batch before, whose turn comes first: the server is asked for one at a time.

    Attributes:
        rollouts: the batch as it was sampled.
    """

    def __init__(self, roller: Roller, rollouts: Rollouts, after: Scoring | None = None) -> None:
        self.rollouts = self._scored = rollouts
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(roller, after), daemon=True, name="scoring")
        self._thread.start()

    def _run(self, roller: Roller, after: Scoring | None) -> None:
        if after is not None:
            after._thread.join()
        try:
            self._scored = roller.score(self.rollouts)
        except BaseException as error:
            self._failure = error

    def wait(self) -> Rollouts:
        """The batch with its scores; its time for them becomes that of this call.

        Raises:
            TeacherError: what `Teacher.score` raised.
        """
        start = time.perf_counter()
        self._thread.join()
        waited = time.perf_counter() - start
        if self._failure is not None:
            raise self._failure
        hidden = max(0.0, self._scored.seconds["teacher"] - waited)
        seconds = {**self._scored.seconds, "teacher": waited}
        return replace(self._scored, hidden=hidden, seconds=seconds)
