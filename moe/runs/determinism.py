"""Deterministic mode: what each backend needs for equal bits, and what is refused there.

CPUs and TPUs give equal bits for equal programs. NVIDIA GPUs do where XLA picks kernels without
timing them and none adds in an order that changes from run to run.
"""

from collections.abc import Iterable
import os
from typing import NamedTuple

from layers.dispatch import Sorted
from layers.dispatch.base import Dispatcher
from layers.kernels.choice import Choice
from moe.errors import Problems
from moe.runs.setup import Setup
from moe.runs.summary import attention_kernels

FLAG = "xla_gpu_deterministic_ops"
BY_THE_CLOCK = {
    "fit_steps": "the number of steps depends on their time",
    "max_seconds": "the clock decides where it ends",
}


class Backend(NamedTuple):
    """Where a program runs.

    platform, kind: of its devices, as JAX has them. flags: what XLA_FLAGS says.
    """

    platform: str
    kind: str
    flags: str

    @property
    def is_set(self) -> bool:
        """Whether XLA was told to be deterministic; the last flag of the name counts."""
        values = [
            value or "true"
            for name, _, value in (flag.partition("=") for flag in self.flags.split())
            if name.lstrip("-") == FLAG
        ]
        return values[-1:] in (["true"], ["True"], ["1"])


def check(setup: Setup) -> None:
    """Refuse what has no deterministic path, where `train.deterministic` or a check needs one.

    Raises:
        Problems: a line for each such setting, with the reason and the way out.
    """
    spec, device = setup.spec, setup.mesh.devices.flat[0]
    backend = Backend(device.platform, device.device_kind, os.environ.get("XLA_FLAGS", ""))
    found = []
    if spec.deterministic:
        found = [
            f"train.deterministic: train.{name}={value!r}: {reason}; leave it out"
            for name, reason in BY_THE_CLOCK.items()
            if (value := getattr(spec, name))
        ]
        layer = setup.model.moe_layer
        dispatcher = layer.dispatcher if layer else None
        attention = attention_kernels(setup.model, setup.mesh)
        found += obstacles(backend, attention, dispatcher)
    elif spec.checks is not None and spec.checks.recompute_every and backend.platform == "gpu":
        found = [
            "CorruptionChecks.recompute_every: on GPUs a step gives other bits each time without "
            "train.deterministic = True; set it, or recompute_every = None"
        ]
    if found:
        raise Problems(found)


def obstacles(
    backend: Backend, attention: Iterable[Choice], dispatcher: Dispatcher | None
) -> list[str]:
    """What keeps a program from giving equal bits on a backend, a line each; empty for nothing.

    attention: the kernels of attention. dispatcher: of the MoE layers, if there are any.
    """
    if backend.platform in ("cpu", "tpu"):
        return []
    prefix = "train.deterministic: "
    if backend.platform != "gpu" or "NVIDIA" not in backend.kind:
        return [f"{prefix}nothing is known of {backend.kind}; CPUs, TPUs and NVIDIA GPUs have it"]
    found = []
    if not backend.is_set:
        found.append(
            f"{prefix}XLA chooses kernels by their time, and adds scattered rows in any order, "
            f"unless the environment variable XLA_FLAGS has --{FLAG}=true"
        )
    if any(choice.kernel == "cudnn" for choice in attention):
        found.append(
            f"{prefix}the backward pass of cuDNN's attention adds in any order; set "
            "Attention.implementation = 'chunks'"
        )
    if isinstance(dispatcher, Sorted) and dispatcher.kernel == "tokamax":
        found.append(
            f"{prefix}nothing is known of Sorted.kernel = 'tokamax'; choose 'slot_blocks' or 'loop'"
        )
    return found
