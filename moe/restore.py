"""A finished or paused run as something to evaluate and to generate with."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import gin
from jax.sharding import Mesh

from moe import assemble, checkpoint, gin_files
from moe.allocator import keep_freed_memory
from moe.errors import UserError
from moe.functional import Arrays
from moe.model import Transformer
from moe.objective import NextToken
from moe.optimizer import AdamW
from moe.run_folder import RunFolder
from moe.sharding import MeshShape
from moe.tokenizer import Tokenizer, load_tokenizer


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
    workdir: str, gin_bindings: Sequence[str] = (), step: int | None = None, say=print
) -> Restored:
    """Load a run's config, with further settings on top, and a checkpoint (the last, or `step`'s).

    Raises:
        UserError: no run there, no checkpoint, or none that can be read.
    """
    keep_freed_memory()
    folder = RunFolder(workdir)
    if not folder.config.exists():
        raise UserError(f"{workdir} holds no run: there is no config.gin in it")
    gin_files.load([str(folder.config)], gin_bindings)
    settings = gin.get_bindings("train")
    tokenizer = load_tokenizer(folder.tokenizer)
    mesh = (settings["mesh"] or MeshShape()).build()
    sizes = {name: settings[name] for name in ("batch_size", "sequence_length")}
    model = assemble.assemble(
        settings.get("model", Transformer),
        settings["objective"] or NextToken(),
        token_vocabulary=tokenizer.vocab_size,
        num_bytes_V=tokenizer.num_bytes_V,
        **sizes,
    )
    program = assemble.program(
        model,
        settings["optimizer"] or AdamW(),
        mesh,
        batch_size=settings["batch_size"],
        **{name: settings[name] for name in ("steps", "seed", "accumulate")},
    )
    with checkpoint.opened(folder.checkpoints, read_only=True) as saves:
        found = saves.restore(program.abstract_state, step, say)
    if found is None:
        raise UserError(f"{folder.checkpoints} holds no checkpoint yet")
    state = found[0]
    return Restored(
        model, state.params, state.router_state, int(state.step), mesh, tokenizer, settings
    )
