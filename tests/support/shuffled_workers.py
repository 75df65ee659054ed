"""Workers without processes: parts and results are pickled, and come back in another order."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class ShuffledWorkers:
    """Holds `ahead` results back and yields one of them at random; `done` counts the parts."""

    count = 2

    def __init__(self, seed: int = 0, ahead: int = 4) -> None:
        self._random = random.Random(seed)
        self._ahead = ahead
        self.done = 0

    def run(self, work: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        waiting: list[tuple[int, Any]] = []
        for number, part in enumerate(parts):
            result = pickle.loads(pickle.dumps(work))(pickle.loads(pickle.dumps(part)))
            waiting.append((number, pickle.loads(pickle.dumps(result))))
            self.done += 1
            if len(waiting) > self._ahead:
                yield waiting.pop(self._random.randrange(len(waiting)))
        self._random.shuffle(waiting)
        yield from waiting
