"""Several processes that train together: how they meet, which rows each reads, what all agree on.

A collective function (`any_process`, `minimum`, `gathered`) returns only when every process of the
run has called it.
"""

from typing import Any

import jax
import numpy as np

from moe.errors import UserError

# Larger parameters are not gathered in every process's memory.
MOST_GATHERED_BYTES = 8 * 2**30


def join(processes: str | None, coordinator: str | None, process: int | None) -> None:
    """Connect to the run's other processes; to be called before JAX looks for devices.

    Args:
        processes: their number, or "auto" on TPU pods, Slurm, Open MPI and Kubernetes, which
            provide the other two; None for a single process.
        coordinator: HOST:PORT where the first process listens.
        process: the index of this process, from 0.

    Raises:
        UserError: flags that don't go together, or processes that can't be reached.
    """
    if processes is None:
        if coordinator is not None or process is not None:
            raise UserError("--coordinator and --process belong to --processes=N")
        return
    # Ignored on other platforms.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if processes == "auto":
        if coordinator is not None or process is not None:
            raise UserError("--processes=auto finds --coordinator and --process by itself")
        given = {}
    else:
        if not processes.isdecimal() or int(processes) < 1:
            raise UserError(f"--processes={processes}: a number of processes, or auto")
        count = int(processes)
        if coordinator is None or process is None:
            raise UserError(
                f"--processes={count} needs --coordinator=HOST:PORT of the first process, and "
                f"--process=0 to {count - 1}"
            )
        if process >= count:
            raise UserError(f"--process={process}: 0 to {count - 1}, as --processes={count}")
        given = {
            "coordinator_address": coordinator,
            "num_processes": count,
            "process_id": process,
        }
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the processes of this run could not be joined: {first}") from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def rows(where: jax.sharding.Sharding, batch_size: int) -> slice:
    """The smallest range of a batch's rows with all those that this process's devices hold."""
    held = where.addressable_devices_indices_map((batch_size,)).values()
    ends = [index[0].indices(batch_size) for index in held]  # pyright: ignore[reportOptionalSubscript]
    return slice(min(start for start, _, _ in ends), max(stop for _, stop, _ in ends))


def any_process(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. Collective."""
    return [bool(column.any()) for column in _of_all(flags).T]


def minimum(number: int) -> int:
    """The smallest of all processes' numbers. Collective."""
    return int(_of_all(number).min())


def _of_all(value: Any) -> np.ndarray:
    """The values of all processes, stacked along a new first axis."""
    if jax.process_count() == 1:
        return np.array(value)[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.array(value))


def gathered(tree: Any) -> Any:
    """The tree with whole arrays, in every process's memory; None where they are too large.

    Collective.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    if sum(a.nbytes for a in jax.tree.leaves(tree)) > MOST_GATHERED_BYTES:
        return None
    return multihost_utils.process_allgather(tree, tiled=True)
