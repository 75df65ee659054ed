"""What a pruned checkpoint inherits from its source's README.md."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.checkpoint.source import ByteSource

__all__ = ["MAX_README_BYTES", "SourceCard", "read_readme"]

MAX_README_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class SourceCard:
    """Validated metadata: ids, codes and names are safe to quote, the citation is any text."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    base_model: str | None = None
    citation: str | None = None


def read_readme(file: ByteSource | None) -> SourceCard:
    """The card in `file`, which gets closed; an empty one without a file or if it is too large for a card.

    Raises OutputError if the file cannot be read.
    """
    if file is None:
        return SourceCard()
    with file:
        if file.size > MAX_README_BYTES:
            return SourceCard()
        from moe_surgery.card.front_matter import read_source_card

        return read_source_card(file.read(0, file.size))
