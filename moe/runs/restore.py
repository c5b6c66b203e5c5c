"""Restoring a run's model from one of its checkpoints, to evaluate it or generate with it."""

from collections.abc import Callable
import dataclasses

import jax
from jax.sharding import Mesh

from moe.data.text import PreparedData
from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError
from moe.machine.allocator import keep_freed_memory
from moe.model import sharding
from moe.model.functional import Arrays
from moe.model.sharding import MeshShape
from moe.runs.storage import checkpoint
from moe.runs.storage.folder import RunFolder
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's model with the values of one of its checkpoints."""

    model: AbstractModel
    params: Arrays
    router_state: Arrays
    step: int
    mesh: Mesh
    tokenizer: Tokenizer
    spec: RunSpec

    def text(self, otherwise: str) -> PreparedData:
        """The run's own text, read and tokenised.

        otherwise: the end of the message where its tokenizer no longer comes out the same.
        """
        data = self.spec.prepare_data()
        if data.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError(f"the run's text has changed since it was trained{otherwise}")
        return data


def restore_run(workdir: str, spec: RunSpec, step: int | None = None, say: Say = print) -> Restored:
    """The model of the run in a folder, with the values of its checkpoint.

    Only parameters and router state are read, and they are placed on the devices at hand; these
    need not be those of training. Weights are rounded here, once, where the run's spec says so.

    Args:
        workdir: the run's folder.
        spec: from the folder's config, with further settings.
        step: of the checkpoint; the newest where None.

    Raises:
        UserError: no checkpoint, or none that can be read; another tokenizer than was recorded.
    """
    keep_freed_memory()
    folder = RunFolder(workdir)
    tokenizer = folder.own_tokenizer()
    mesh = mesh_at_hand(spec.in_force.mesh, say)
    model = stored_model(spec, tokenizer)
    params, router_state, step = read_values(folder, model, mesh, step, say)
    graph, params = model.graph.rounded_once(params)
    model = dataclasses.replace(model, graph=graph)
    return Restored(model, params, router_state, step, mesh, tokenizer, spec)


def stored_model(spec: RunSpec, tokenizer: Tokenizer) -> AbstractModel:
    """A run's model without values, of the shapes and types that its checkpoints hold."""
    return stored(spec, spec.build_model(Vocabulary.of(tokenizer)))


def stored(spec: RunSpec, model: AbstractModel) -> AbstractModel:
    """The model with its parameters in the types that the run keeps."""
    params, router_state = model.shapes
    kept = spec.in_force.precision.stored(params, model.graph.declared)
    return dataclasses.replace(model, shapes=(kept, router_state))


def mesh_at_hand(shape: MeshShape, say: Say) -> Mesh:
    """A mesh of this shape, or of all devices on the data axis where they can't make it up."""
    try:
        return shape.build()
    except ValueError as error:
        # Every axis is given: gin would fill in the run's sizes.
        mesh = MeshShape(data=-1, fsdp=1, expert=1, tensor=1, sequence=1).build()
        say(f"{error}; used here: data={mesh.size}")
        return mesh


def read_values(
    folder: RunFolder, model: AbstractModel, mesh: Mesh, step: int | None, say: Say
) -> tuple[Arrays, Arrays, int]:
    """A checkpoint's parameters, router state and step; the newest checkpoint's, for step None.

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
