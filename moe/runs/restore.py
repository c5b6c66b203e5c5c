"""A finished or paused run as something to evaluate and to generate with."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import gin
import jax
from jax.sharding import Mesh

from moe import settings
from moe.data.tokens.tokenizer import Tokenizer, load_tokenizer
from moe.errors import UserError
from moe.machine.allocator import keep_freed_memory
from moe.model import sharding
from moe.model.functional import Arrays
from moe.model.sharding import MeshShape
from moe.model.transformer import Transformer
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import RunFolder
from moe.training import assemble
from moe.training.objective import NextToken

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's model with the values of one of its checkpoints."""

    model: assemble.Model
    params: Arrays
    router_state: Arrays
    step: int
    mesh: Mesh
    tokenizer: Tokenizer
    settings: dict[str, Any]


def restore_run(
    workdir: str, gin_bindings: Sequence[str] = (), step: int | None = None, say: Say = print
) -> Restored:
    """Load a run's config, with further settings on top, and a checkpoint (the last, or `step`'s).

    Parameters and router state alone are read, onto the devices that are here: neither the mesh
    nor the batch of training has a say.

    Raises:
        UserError: no run there, no checkpoint, or none that can be read.
    """
    keep_freed_memory()
    folder = RunFolder(workdir)
    if not folder.config.exists():
        raise UserError(f"{workdir} holds no run: there is no config.gin in it")
    settings.load([str(folder.config)], gin_bindings)
    bound = gin.get_bindings("train")
    tokenizer = load_tokenizer(folder.tokenizer)
    mesh = mesh_here(bound["mesh"] or MeshShape(), say)
    sizes = {name: bound[name] for name in ("batch_size", "sequence_length")}
    model = assemble.assemble(
        bound.get("model", Transformer),
        bound["objective"] or NextToken(),
        token_vocabulary=tokenizer.vocab_size,
        num_bytes_2V=tokenizer.num_bytes_2V,
        **sizes,
    )
    params, router_state, step = read_values(folder, model, mesh, step, say)
    return Restored(model, params, router_state, step, mesh, tokenizer, bound)


def mesh_here(shape: MeshShape, say: Say) -> Mesh:
    """The run's mesh, where the devices that are here can make it up; else all of them as data."""
    try:
        return shape.build()
    except ValueError as error:
        # Every size: gin would fill in the run's own.
        mesh = MeshShape(data=-1, fsdp=1, expert=1, tensor=1, sequence=1).build()
        say(f"{error}; here: data={mesh.size}")
        return mesh


def read_values(
    folder: RunFolder, model: assemble.Model, mesh: Mesh, step: int | None, say: Say
) -> tuple[Arrays, Arrays, int]:
    """Parameters and router state of a run's checkpoint (the last, or `step`'s), and its step.

    Raises:
        UserError: no checkpoint, none that can be read, or one of another model.
    """
    wanted = {}
    for kind, arrays in zip(("params", "router_state"), model.shapes, strict=True):
        for name, a in arrays.items():
            place = sharding.sharding(mesh, model.graph.axes[name], a.shape)
            wanted[f"{kind}.{name}"] = jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    with checkpoint.opened(folder.checkpoints, read_only=True) as saves:
        found = saves.values(wanted, step, say)
    if found is None:
        raise UserError(f"{folder.checkpoints} holds no checkpoint yet")
    values, step = found
    params, router_state = (
        {name: values[f"{kind}.{name}"] for name in arrays}
        for kind, arrays in zip(("params", "router_state"), model.shapes, strict=True)
    )
    return params, router_state, step
