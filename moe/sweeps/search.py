"""Which trials tune a sweep's cells: a search of the ranges, and of what widens them."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

from moe.sweeps import tune
from moe.sweeps.cell import Cell, Trial
from moe.sweeps.record import Row
from moe.sweeps.spec import folder_name


@dataclasses.dataclass(frozen=True)
class Search:
    """The tuning of cells, which are all tuned alike.

    The trials of a piece follow from its name and the search's seed alone, not from what else is
    widened: arms and trials may be added to a search that has ended.
    """

    cells: Sequence[Cell]
    ranges: Mapping[str, tune.Range]
    number: int
    widen: int
    seed: int

    def trials(self, results: Mapping[str, Row]) -> list[Trial]:
        """The trials of each round of tuning that has begun or may begin.

        A round waits for all of the last one. It has the pieces at whose edge some cell is best,
        and those that have begun before, as when arms are added: all cells get them.
        """
        points = tune.points(self.ranges, self.number, self.seed)
        trials = self._at(points, part="")
        reached: dict[tuple[str, str], int] = {}
        again, latest = 0, trials
        while latest and all(trial.name in results for trial in latest):
            called = self._edges(results, trials) if again < self.widen else set()
            latest = []
            for name, side in itertools.product(self.ranges, ("low", "high")):
                number = reached.get((name, side), 0) + 1
                more = self._piece(name, side, number)
                if (name, side) in called or any(trial.name in results for trial in more):
                    reached[name, side] = number
                    latest += more
            trials, again = [*trials, *latest], again + 1
        return trials

    def _piece(self, name: str, side: str, number: int) -> list[Trial]:
        """The trials in the piece that widens a setting's range on a side by this number.

        The other settings are searched in their ranges as given.
        """
        span = self.ranges[name].beyond(side, number)
        if span is None:
            return []
        seed = self.seed + 1000 * number
        points = tune.points({**self.ranges, name: span}, self.number, seed)
        return self._at(points, part=f"{side}{number}-{folder_name(name)}")

    def _at(self, points: Sequence[tune.Values], part: str) -> list[Trial]:
        """A trial of every cell at each point; neighbours are of other cells, so that two workers
        seldom compile the same program at the same time.
        """
        trials = []
        for number, point in enumerate(points, 1):
            for cell in self.cells:
                own = {name: value for name, value in point.items() if name in cell.tuned}
                trials.append(Trial(cell, "tuning", number, self.seed, own, part))
        return trials

    def _edges(self, results: Mapping[str, Row], done: list[Trial]) -> set[tuple[str, str]]:
        """Settings and sides where the best value of any cell is the lowest or highest tried."""
        found = set()
        for cell in self.cells:
            best = best_of(cell, results, done)
            tried = [results[trial.name]["tuned"] for trial in done if trial.cell is cell]
            found |= set(tune.edges(best or {}, tried).items())
        return found


def best_of(cell: Cell, results: Mapping[str, Row], tuning: list[Trial]) -> tune.Values | None:
    """The values of the cell's best tuning trial on validation; None where all of them failed.

    Without tuning, no values: the config's own stand.
    """
    own = [trial.name for trial in tuning if trial.cell is cell]
    if not own:
        return {}
    scored = [
        (row["validation_bits_per_byte"], order, row["tuned"])
        for order, row in enumerate(results[name] for name in own)
        if row["status"] == "finished" and row["validation_bits_per_byte"] is not None
    ]
    return min(scored, key=lambda item: item[:2])[2] if scored else None
