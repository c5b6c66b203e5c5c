"""Several processes that train together: how they meet, which rows each reads, what all agree on.

A collective function (`any_process`, `minimum`, `gathered`) returns only when every process of the
run has called it.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

import jax
import numpy as np

from moe.errors import UserError, first_line
from moe.machine import exits
from moe.machine.peers import Peers
from moe.machine.relay import Relay

# Larger parameters are not gathered in every process's memory.
MOST_GATHERED_BYTES = 8 * 2**30
# Peers notice a dead process before JAX does, which would end all by SIGABRT.
JAX_HEARTBEAT_SECONDS = 600

peers: Peers | None = None  # those of this process; None where it trains alone


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
    global peers
    if processes is None:
        if coordinator is not None or process is not None:
            raise UserError("--coordinator and --process belong to --processes=N")
        return
    # Ignored on other platforms.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
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
            "coordinator_address": _relayed(coordinator) if process else coordinator,
            "num_processes": count,
            "process_id": process,
        }
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run could not be joined: {first_line(error)}"
        ) from error
    # JAX has no public name for it; Orbax takes it likewise.
    from jax._src.distributed import global_state

    peers = Peers(global_state.client, jax.process_index(), jax.process_count())
    peers.start()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A run's work in this process: it returns when all have done theirs.

    An error in the block ends the program where it came of another process's end.
    """
    try:
        yield
    except Exception as error:
        if peers is not None and not isinstance(error, BrokenPipeError):
            peers.failed()
        raise
    if peers is not None:
        peers.done()


def _relayed(coordinator: str) -> str:
    """The address of a relay to the coordinator, which tells our peers when that is gone."""
    host, colon, port = coordinator.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"--coordinator={coordinator}: HOST:PORT of the first process")

    def lost() -> None:
        if peers is not None:
            peers.first_is_gone()
        else:
            line = "moe: the first process of this run was killed or has ended: it hung up"
            exits.end(line, exits.PEER_LOST)

    return Relay(host.strip("[]"), int(port), lost).address


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def index() -> int:
    """The index of this process."""
    return jax.process_index()


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
