"""What the first process of a run concludes from the states that all of them publish."""

import dataclasses

from moe.machine import exits

SILENT_AFTER_FAILURE = 5  # seconds; a connection broke, so that somebody is likely dead
LEFT_BEHIND = 4  # seconds in which others may end with the same error


@dataclasses.dataclass(frozen=True)
class State:
    """What a process says of itself.

    Attributes:
        at: the kind and the number of what its main thread works at.
        done: the run is over for it.
        failed: an error was raised in it.
        hung: its watchdog's line, where that has barked.
        code: the exit status that it ends with, where it ends before the run does.
    """

    at: tuple[str, int] | None = None
    done: bool = False
    failed: bool = False
    hung: str | None = None
    code: int | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How all end: `line` says what happened; an empty one that each goes its own way."""

    line: str
    code: int


def judge(
    states: dict[int, State],
    silent: dict[int, float],
    ended: dict[int, float],
    count: int,
    patience: float,
) -> Verdict | None:
    """The verdict, None while there is nothing to conclude.

    Args:
        states: of each process that was heard of.
        silent: seconds since each of `count` processes was last heard.
        ended: seconds since a process has said that it ends.
        patience: how long a process may be silent.
    """
    alive = {i: s for i, s in states.items() if s.code is None}
    if len(states) == count and all(s.done or s.failed for s in alive.values()):
        if not ended and (all(s.done for s in alive.values()) or all_fail(alive, silent)):
            return Verdict("", 0)
    failed = any(s.failed for s in alive.values())
    limit = min(patience, SILENT_AFTER_FAILURE) if failed else patience
    for i in range(count):
        if i not in ended and silent[i] > limit:
            return Verdict(
                f"process {i} of {count} was not heard of for {silent[i]:.0f} s: it was killed or "
                "stopped, or its machine is gone",
                exits.PEER_LOST,
            )
    if hung := [i for i, s in sorted(alive.items()) if s.hung]:
        return Verdict(_of_hung(alive, hung[0]), exits.HUNG)
    for i, seconds in ended.items():
        if seconds > LEFT_BEHIND:
            code = states[i].code or 0
            return Verdict(
                f"process {i} of {count} has ended with status {code}",
                code if code > 128 else exits.PEER_LOST,
            )
    return None


def all_fail(alive: dict[int, State], silent: dict[int, float]) -> bool:
    """Whether all have failed and are there: the same error in each, of which each tells."""
    return all(s.failed and silent[i] < SILENT_AFTER_FAILURE / 2 for i, s in alive.items())


def _of_hung(alive: dict[int, State], first: int) -> str:
    """The watchdog's line, and which process keeps the others waiting."""
    at = {i: s.at for i, s in alive.items()}
    numbers = [a[1] for a in at.values() if a is not None]
    kinds = {a[0] for a in at.values() if a is not None}
    line = alive[first].hung or ""
    if len(kinds) == 1 and len(numbers) == len(at) and min(numbers) < max(numbers):
        behind = [i for i, a in at.items() if a is not None and a[1] == min(numbers)]
        which = ", ".join(map(str, behind))
        word = "process" if len(behind) == 1 else "processes"
        return f"{line}; {word} {which} of {len(alive)} keeps the others waiting"
    return f"{line}, in process {first} of {len(alive)}, and no other is behind it"
