"""What a run does at a bad step: stop, skip its update, or rewind to a checkpoint.

A step is bad where its loss, a gradient, its update, or the optimizer's or the routers' state after
it is not finite; and, where `sigmas` asks for it, where its loss or gradient norm is a spike.
"""

import abc
import collections
import dataclasses
import math
from typing import Any

import gin
import numpy as np

from moe.data.batch import Batch
from moe.training import finite, metrics
from moe.training.train_step import StepMetrics
from routing.ranges import Count, Positive


@dataclasses.dataclass(frozen=True)
class BadSteps(abc.ABC):
    """Abstract: what is done at a bad step, and what is one.

    Attributes:
        most: how many bad steps there may be in the whole run; one more ends it.
        sigmas: a step is bad as well where its loss or gradient norm exceeds the mean of the last
            `window` good steps by this many standard deviations; None for no such limit.
        window: good steps that the limits are of; before there are as many, there is no limit.
    """

    most: Count
    sigmas: Positive | None
    window: Count


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SkipBadSteps(BadSteps):
    """Leave a bad step's update out, inside the compiled step.

    Parameters, optimizer and router state stay as they are, bit for bit; the next step has the next
    batch and learning rate.
    """

    most: Count = 20
    sigmas: Positive | None = None
    window: Count = 128


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RewindBadSteps(BadSteps):
    """Go back to the last checkpoint, and leave out the batches from there to the bad step's.

    Steps keep their numbers and learning rates, and have later batches. Needs `train.save_every`
    or `train.eval_every`.
    """

    most: Count = 3
    sigmas: Positive | None = None
    window: Count = 128


@dataclasses.dataclass
class Watch:
    """Judges each step of a run, and counts the bad ones, over all starts of the run.

    Attributes:
        policy: None to stop at the first one.
        skipped: steps whose update was left out.
        rewinds: how many times the run went back.
        left_out: batches that rewinds have left out, before all later steps.
        recent: step, loss and gradient norm of good steps, oldest first.
    """

    policy: BadSteps | None
    skipped: int = 0
    rewinds: int = 0
    left_out: int = 0
    recent: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, policy: BadSteps | None, record: dict[str, Any] | None) -> "Watch":
        """From `record` of the checkpoint that a run continues; None for a new run."""
        watch = cls(policy, **(record or {}))
        watch.recent = [(step, loss, norm) for step, loss, norm in watch.recent]
        return watch

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON; empty where nothing has happened."""
        found = dataclasses.asdict(self)
        del found["policy"]
        return {"bad_steps": found} if any(found.values()) else {}

    def summary(self) -> dict[str, int]:
        """The counts for summary.json; empty where a bad step ends the run, or ever did nothing."""
        counts = {"skipped_steps": self.skipped, "rewinds": self.rewinds}
        return counts if self.policy is not None or any(counts.values()) else {}

    @property
    def skips(self) -> bool:
        return isinstance(self.policy, SkipBadSteps)

    @property
    def rewinds_left(self) -> int:
        """How many more times the run may go back."""
        policy = self.policy
        return policy.most - self.rewinds if isinstance(policy, RewindBadSteps) else 0

    def limits(self, step: int) -> np.ndarray:
        """The largest loss and gradient norm of a good step, float32.

        They are of good steps before the last one, whose metrics may not be read yet: limits must
        not depend on when a checkpoint or an evaluation lets the host read them.
        """
        none = np.full(2, np.inf, np.float32)
        if self.policy is None or self.policy.sigmas is None:
            return none
        window = self.policy.window
        known = [values for number, *values in self.recent if number <= step - 2][-window:]
        if len(known) < window:
            return none
        known_N2 = np.array(known)
        return (known_N2.mean(0) + self.policy.sigmas * known_N2.std(0)).astype(np.float32)

    def fault(self, step: int, measured: StepMetrics) -> str | None:
        """What is bad about a step, in words; None for a good one, which then is remembered.

        measured: on the host.
        """
        if broken := not_finite(measured):
            return f"not finite: {', '.join(broken)}{first_place(measured)}"
        values = measured.loss, measured.grad_norms["all"]
        limits = self.limits(step)
        names = "loss", "gradient norm"
        high = [
            f"the {name} of {value:.4g} is above {limit:.4g}"
            for name, value, limit in zip(names, values, limits, strict=True)
            if value > limit
        ]
        if high:
            assert self.policy is not None
            return f"a spike: {' and '.join(high)}, {self.policy.sigmas:g} sigmas"
        if self.policy is not None and self.policy.sigmas is not None:
            self.recent.append((step, float(values[0]), float(values[1])))
            del self.recent[: -self.policy.window - 1]
        return None

    def rewound(self, bad: int, step: int, record: dict[str, Any] | None) -> None:
        """Note that the run went back from a bad step to `step`, whose checkpoint has `record`."""
        self.rewinds += 1
        # To those that were left out when the bad step was reached: an earlier rewind to the same
        # checkpoint left out some that the checkpoint does not know of.
        self.left_out += bad - step
        self.recent = Watch.of(self.policy, record).recent


def outside_vocabulary(batch: Batch, vocab_size: int) -> str | None:
    """The first token of a batch that is none of the vocabulary's, in words; None without any.

    On a device such a token would be read as another one, without an error. batch: on the host.
    """
    for name, token_BT in (("token_BT", batch.token_BT), ("target_BT", batch.target_BT)):
        wrong_BT = (token_BT < 0) | (token_BT >= vocab_size)
        if wrong_BT.any():
            row, place = (int(at[0]) for at in np.nonzero(wrong_BT))
            token = int(token_BT[row, place])
            return (
                f"the batch is broken, first in {name}, row {row}, place {place}: token {token:,}, "
                f"and the vocabulary has {vocab_size:,}"
            )
    return None


def not_finite(measured: StepMetrics) -> list[str]:
    """What of a step's loss, gradients, update and state is not finite, the causes first."""
    norms = {f"gradient norm ({name})": value for name, value in measured.grad_norms.items()}
    values = {"loss": measured.loss, **norms, "update norm": measured.update_norm}
    broken = [name for name, value in values.items() if not math.isfinite(float(value))]
    kinds = {"router_state": "router state", "opt_state": "optimizer state"}
    names = [n for n, flags in (measured.broken or {}).items() if np.any(flags)]
    state = [word for kind, word in kinds.items() if any(n.startswith(kind) for n in names)]
    return broken + state


def first_place(measured: StepMetrics) -> str:
    """The first tensor that is not finite, with its layer, in words; empty where none is known.

    A value of the state that was broken before the step comes first; then routers' logits, in the
    order of the forward pass; then gradients, in that of the backward pass; then what the step has
    made of its finite gradients.
    """
    flags = {name: np.asarray(f) for name, f in (measured.broken or {}).items()}
    sizes = {name: f.shape[0] for name, f in flags.items() if f.ndim}
    found: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
    for name, f in flags.items():
        for row in np.flatnonzero(f):
            layer = finite.layer_of(name, int(row), sizes)
            after_layers = layer is None and "embedding" not in name
            depth = (math.inf if after_layers else -1) if layer is None else layer
            found[name.split(".")[0]].append((depth, name))
    if found["params"]:
        return f", first in {_tensor(*min(found['params']))}, before this step"
    if measured.routers:
        size_L = metrics.Routing.of(measured.routers).logit_size_L
        if len(broken_L := np.flatnonzero(~np.isfinite(size_L))):
            return f", first in layer {broken_L[0]} or before it, by the routers' logits"
    if not math.isfinite(float(measured.loss)):
        return ""
    if found["gradients"]:
        deepest = max(depth for depth, _ in found["gradients"])
        depth, name = min(pair for pair in found["gradients"] if pair[0] == deepest)
        return f", first (from the loss backwards) in {_tensor(depth, name)}"
    state = found["opt_state"] + found["router_state"]
    return f", first in {_tensor(*min(state))}" if state else ""


def _tensor(depth: float, name: str) -> str:
    return f"layer {depth:g}: {name}" if 0 <= depth < math.inf else name
