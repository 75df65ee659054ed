"""Group-limited routing: a token's experts come from the best few of `groups` equal groups of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Grouping"]


@dataclass(frozen=True, slots=True)
class Grouping:
    """The `experts` of a layer in `groups` consecutive groups, of which a token uses `used`.

    The score of a group needs `minimum` experts in it. A pruned model routes as the full one does among the kept
    experts only if each group keeps the same number, and the kept experts stay in the order of the groups.
    """

    experts: int
    groups: int
    used: int
    minimum: int

    @property
    def size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups

    def group_of(self, expert: int) -> int:
        return expert // self.size

    def problem_of_count(self, kept: int, top_k: int) -> str | None:
        """Why `kept` experts a layer cannot be routed with `top_k`, None where they can."""
        if kept % self.groups:
            return f"{kept} experts do not divide into the {self.groups} groups that the router chooses from"
        if kept // self.groups < self.minimum:
            return (
                f"{kept} experts leave {kept // self.groups} in each of {self.groups} groups, and a group's score "
                f"needs {self.minimum}"
            )
        if (reachable := self.used * kept // self.groups) < top_k:
            return (
                f"of {kept} experts in {self.groups} groups a token reaches {reachable} ({self.used} groups), fewer "
                f"than its top-{top_k}"
            )
        return None

    def problem_of_row(self, kept: Sequence[int]) -> str | None:
        """Why a layer cannot keep `kept` in that order, None where it can."""
        each = len(kept) // self.groups
        for position, expert in enumerate(kept):
            group = position // each
            if self.group_of(expert) != group:
                return (
                    f"expert {expert} of group {self.group_of(expert)} is in the place of one of group {group}: keep "
                    f"{each} experts of each of the {self.groups} groups, group after group"
                )
        return None

    def best(self, order: Sequence[int], kept: int) -> tuple[int, ...]:
        """The first `kept` of `order`, the same number from each group, group after group."""
        each = kept // self.groups
        by_group: list[list[int]] = [[] for _ in range(self.groups)]
        for expert in order:
            members = by_group[self.group_of(expert)]
            if len(members) < each:
                members.append(expert)
        return tuple(e for members in by_group for e in members)
