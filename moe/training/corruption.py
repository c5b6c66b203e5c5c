"""Silent corruption: copies of an array that differ, and steps that don't compute the same again.

P devices of a mesh, N arrays.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from moe.data.batch import Batch
from moe.errors import UserError
from moe.machine import exits
from moe.training.checksums import checksums
from moe.training.finite import named
from moe.training.train_step import StepMetrics, TrainState
from routing.ranges import Count


@gin.configurable
@dataclasses.dataclass(frozen=True)
class CorruptionChecks:
    """What is looked at for devices that compute or remember wrongly, without an error.

    Attributes:
        replicas_every: steps between comparisons of all copies that the mesh holds of an array of
            the state; they are compared before each checkpoint, too. None for neither.
        recompute_every: steps between those that are computed twice, from the same state and batch,
            which takes a second state's memory. None for no such step.
    """

    replicas_every: Count | None = 100
    recompute_every: Count | None = 1000

    def told(self, abstract: TrainState) -> str:
        """What these checks look at for a state of these shapes and shardings, in words."""
        told = []
        if self.replicas_every is not None:
            share = coverage(abstract)
            told.append(
                f"{share:.0%} of the state has copies on this mesh, compared every "
                f"{self.replicas_every} steps and before each checkpoint"
                if share
                else "no array has copies on one device, so that none are compared"
            )
        if self.recompute_every is not None:
            told.append(f"a step is computed twice every {self.recompute_every}")
        return "; ".join(told) or "none"


class Corrupted(UserError):
    """A device has computed or remembered something wrongly."""

    status = exits.CORRUPTED


class Checker:
    """Runs the checks of a run; without any it does nothing. All methods are collective.

    Args:
        checks: which ones; None for none.
        mesh: of the state and the metrics.
        last_good: says which checkpoint is the newest.
    """

    def __init__(self, checks: CorruptionChecks | None, mesh: Mesh, last_good: Callable[[], str]):
        self._checks = checks or CorruptionChecks(None, None)
        self._mesh, self._last_good = mesh, last_good

    def replicas_due(self, step: int) -> bool:
        """Whether copies are compared after this step."""
        every = self._checks.replicas_every
        return every is not None and step % every == 0

    def recompute_due(self, step: int) -> bool:
        """Whether this step is computed twice."""
        every = self._checks.recompute_every
        return every is not None and step % every == 0

    def replicas(self, state: TrainState, step: int) -> None:
        """Compare all copies of each array of the state after a step, where copies are compared.

        Raises:
            Corrupted: two copies differ.
        """
        if self._checks.replicas_every is None:
            return
        arrays = named(state)
        sums_PN = checksums(self._mesh, arrays)
        found = {
            name: _odd_ones(a.sharding, a.shape, sums_PN[:, i], self._mesh)
            for i, (name, a) in enumerate(arrays.items())
        }
        differs = [f"copies of {name} differ: {odd}" for name, odd in found.items() if odd]
        if differs:
            self._refuse(step, differs, len(found), "a device or its memory is at fault")

    def trial(self, train_step: Callable, state: TrainState, batch: Batch, **given) -> "Trial":
        """The checksums of a step's results, of which nothing else is kept; `state` stays."""
        return Trial.of(self._mesh, *train_step(_copy(state), batch, **given))

    def compare(self, before: "Trial", state: TrainState, measured: StepMetrics, step: int) -> None:
        """Compare the same step's results with those of a trial of it.

        Raises:
            Corrupted: some bits differ.
        """
        after = Trial.of(self._mesh, state, measured)
        devices = list(self._mesh.devices.flat)
        differs = []
        for name, then_P, now_P in zip(
            before.names, before.sums_PN.T, after.sums_PN.T, strict=True
        ):
            if odd := [d for d, same in zip(devices, then_P == now_P, strict=True) if not same]:
                where = _devices(odd) if len(odd) < len(devices) or len(odd) == 1 else "all devices"
                again = "computed again from the same state and batch"
                differs.append(f"{again}, {name} has other bits on {where}")
        if differs:
            fault = "a device is at fault, or the step depends on more than these"
            self._refuse(step, differs, len(before.names), fault)

    def _refuse(self, step: int, differs: list[str], of: int, fault: str) -> None:
        found = f"{differs[0]} ({len(differs)} of {of} arrays do)"
        raise Corrupted(f"step {step}: {found}; {fault}; {self._last_good()}")


class Trial(NamedTuple):
    """Checksums of a step's metrics and of the state after it, in this order."""

    names: tuple[str, ...]
    sums_PN: np.ndarray

    @classmethod
    def of(cls, mesh: Mesh, state: TrainState, measured: StepMetrics) -> "Trial":
        """Of a step's results."""
        arrays = {"loss": measured.loss} | named(measured) | named(state)
        return cls(tuple(arrays), checksums(mesh, arrays))


def coverage(abstract: TrainState) -> float:
    """The share of a state's bytes that the mesh holds more than one copy of."""
    arrays = jax.tree.leaves(abstract)
    sizes = [(math.prod(a.shape) * a.dtype.itemsize, _copies(a.sharding, a.shape)) for a in arrays]
    return sum(size for size, copies in sizes if copies > 1) / sum(size for size, _ in sizes)


def _copies(sharding: jax.sharding.Sharding, shape: Sequence[int]) -> int:
    held = math.prod(sharding.shard_shape(tuple(shape))) * len(sharding.device_set)
    return held // max(math.prod(shape), 1)


def _copy(state: TrainState) -> TrainState:
    """The same bits on the same devices, in other memory: a step takes its state's."""
    return jax.tree.map(jnp.copy, state)


def _odd_ones(
    sharding: jax.sharding.Sharding, shape: Sequence[int], sum_P: np.ndarray, mesh: Mesh
) -> str | None:
    """Which devices' copies of an array differ from the others', in words; None where none does."""
    place = {device: i for i, device in enumerate(mesh.devices.flat)}
    held: dict[Any, dict[int, list[Any]]] = {}
    for device, index in sharding.devices_indices_map(tuple(shape)).items():
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        held.setdefault(key, {}).setdefault(int(sum_P[place[device]]), []).append(device)
    for groups in held.values():
        if len(groups) > 1:
            *odd, most = sorted(groups.values(), key=len)
            least = [device for group in odd for device in group]
            if len(least) == 1 and len(most) == 1:  # nobody knows which is right
                return f"{_devices(sorted(least + most, key=_number))} have different bits"
            return f"{_devices(least)} from {_devices(most)}"
    return None


def _number(device: Any) -> int:
    return device.id


def _devices(devices: Sequence[Any], most: int = 8) -> str:
    """Devices in words: `device 3`, or `devices 0, 1 and 2`; with their processes, if several."""
    several = jax.process_count() > 1
    names = [f"{d.id} (process {d.process_index})" if several else f"{d.id}" for d in devices]
    if len(names) > most:
        return f"devices {', '.join(names[:most])} and {len(names) - most} more"
    if len(names) == 1:
        return f"device {names[0]}"
    return f"devices {', '.join(names[:-1])} and {names[-1]}"
