"""`moe describe`: a config's model, costs and settings, without reading its text or training."""

from collections.abc import Sequence
import itertools
import json
import math
from pathlib import Path
from typing import Any

from layers.mixture_of_depths import DepthBlock
from moe import settings
from moe.cli import config
from moe.errors import printable
from moe.model.transformer import Transformer
from moe.settings import resolved
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec


def run(flags) -> int:
    """Print parameters, FLOPs, routing and settings of a config; `--json` also writes them."""
    spec = config.of_flags(flags)
    vocabulary = Vocabulary(flags.vocab_size or spec.vocab_size)
    model = spec.build_model(vocabulary)
    found = described(spec, model, vocabulary.size)
    width = max(map(len, found)) + 2
    for name, value in found.items():
        if isinstance(value, int):
            value = f"{value:,}"
        print(f"{name.replace('_', ' '):<{width}}{value}")
    ignored = settings.unused(later=("eval",))
    print(f"{'ignored settings':<{width}}{', '.join(ignored) or 'none'}")
    table = resolved.rows(spec, *spec.in_force, model.module)
    print(printable(f"\nsettings in force\n{resolved.text(table, unset=False)}"))
    if flags.json:
        shown = {
            name: {key: resolved.shown(value) for key, value in row.items()}
            for name, row in table.items()
        }
        whole = found | {"ignored_settings": ignored, "settings": shown}
        Path(flags.json).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


def mesh_of(spec: RunSpec) -> str:
    """The size of each mesh axis, in words."""
    sizes = vars(spec.in_force.mesh)
    return ", ".join(f"{k}={'the devices left' if v == -1 else v}" for k, v in sizes.items())


def layers_of(module: Transformer) -> str:
    """Each layer's router, such as "0: dense; 1-3: TopK"; after that of a Mixture-of-Depths."""
    kinds: dict[str, list[int]] = {}
    units = (s.unit.blocks for s in module.stacks for _ in range(s.repeats))
    for layer, block in enumerate(itertools.chain.from_iterable(units)):
        name = type(block.router).__name__ if block.is_moe else "dense"
        if isinstance(block, DepthBlock):
            name = f"{type(block.depth_router).__name__} and {name}"
        kinds.setdefault(name, []).append(layer)
    return "; ".join(f"{ranges(layers)}: {name}" for name, layers in kinds.items())


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges, such as 0-2, 5, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in runs)


def described(spec: RunSpec, model: AbstractModel, vocab_size: int) -> dict[str, Any]:
    """A run's sizes, costs, layers and routing by name, in the order in which they are printed."""
    costs, tokens = model.costs, math.prod(spec.shape)
    found: dict[str, Any] = {
        "vocabulary": vocab_size,
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "flops_per_token": costs.flops_per_token,
        "tokens_per_step": tokens,
        "steps": spec.steps,
        "flops_in_all": costs.flops_per_token * tokens * spec.steps,
        **({"distillation": f"{spec.distil}; its FLOPs are left out"} if spec.distil else {}),
        "layers": layers_of(model.module),
        "mesh": mesh_of(spec),
    }
    layer = model.moe_layer
    found["sparse_layers"] = layer.router.sparse_layers if layer else "none (dense)"
    if layer is not None:
        router = layer.router
        found |= {
            "router": type(router).__name__,
            "causality": str(router.causality.value),
            "decodes": router.decoding,
            "experts": layer.num_experts,
            "kind_of_experts": type(layer.experts).__name__,
            "companions": ", ".join(type(c).__name__ for c in layer.companions) or "none",
            "experts_per_token": round(costs.experts_per_token, 2),
            "capacity": str(layer.capacity),
            "dispatcher": str(layer.dispatcher),
            "eval_dispatcher": str(layer.eval_dispatcher),
        }
        losses = ", ".join(f"{c:g} * {n}" for n, c in model.loss_coefficients.items())
        found["router_losses"] = losses or "none"
    return found
