"""Replies of models to questions, and the file that keeps them, so that an interrupted run can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.quality.answers import whole_lines
from moe_surgery.quality.questions import Question

__all__ = ["Reply", "ReplyFile", "choose"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answered, and whether that is right.

    `text` is what was judged, `tokens` all that was generated; `finished` is False where the limit of new tokens
    ended it. `scores` are the log-probabilities of choices in nats.
    """

    right: bool
    text: str
    tokens: tuple[int, ...] = ()
    finished: bool = True
    scores: tuple[float, ...] = ()


def choose(question: Question, scores: Sequence[float]) -> Reply:
    """The most likely choice; of equally likely ones the first."""
    choice = question.choices[max(range(len(scores)), key=scores.__getitem__)]
    return Reply(choice in question.answers, choice, scores=tuple(scores))


class ReplyFile:
    """Lines of JSON: first the job, then a line for each model and question, in batches as they finish.

    Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, job: str) -> None:
        self._path, self._job = path, job

    def read(self, questions: Sequence[Question]) -> dict[tuple[str, int], Reply]:
        """Replies by key of the model and index of the question that an earlier run of this job left.

        Afterwards the file holds whole lines of this job only. Raises InvalidInputError for a damaged file,
        OutputError if it cannot be written.
        """
        found: dict[tuple[str, int], Reply] = {}
        if self._path is None:
            return found
        lines = list(whole_lines(self._path)) if self._path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number > 1:
                    found[entry["key"], entry["question"]] = _reply(entry, questions[entry["question"]])
                elif entry["job"] != self._job:
                    lines = []
                    break
            except (ValueError, KeyError, TypeError, IndexError):
                raise InvalidInputError(
                    f"{printable_path(self._path)}: line {number} is damaged; delete the file to start over"
                ) from None
        if lines:
            self._write("r+", size=sum(len(line.encode()) for line in lines))
        else:
            self._write("w", json.dumps({"job": self._job}) + "\n")
        return found

    def append(
        self, name: str, key: str, questions: Sequence[Question], replies: Mapping[int, Reply]
    ) -> None:
        """Add the replies, by index of the question, of the model `name`. Raises OutputError."""
        lines = []
        for index, reply in replies.items():
            asked = {"model": name, "key": key, "question": index, "id": questions[index].name}
            if reply.scores:
                more: dict[str, object] = {"scores": list(reply.scores)}
            else:
                more = {"finished": reply.finished, "tokens": list(reply.tokens)}
            lines.append(json.dumps({**asked, "right": reply.right, "reply": reply.text, **more}) + "\n")
        self._write("a", "".join(lines))

    def _write(self, mode: str, text: str = "", size: int | None = None) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, mode, encoding="utf-8", newline="\n") as file:
                if size is not None:
                    file.truncate(size)
                file.write(text)
        except OSError as error:
            raise OutputError(f"{printable_path(self._path)}: cannot write: {error.strerror}") from error


def _reply(entry: Mapping[str, object], question: Question) -> Reply:
    """Raises KeyError, TypeError or ValueError."""
    if question.choices:
        scores = entry["scores"]
        if not isinstance(scores, list) or len(scores) != len(question.choices):
            raise ValueError
        return choose(question, [float(score) for score in scores])
    text, tokens, finished = entry["reply"], entry["tokens"], entry["finished"]
    if not isinstance(text, str) or not isinstance(tokens, list) or not isinstance(finished, bool):
        raise ValueError
    return Reply(question.accepts(text), text, tuple(int(t) for t in tokens), finished)
