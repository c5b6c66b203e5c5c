"""What a mixture-of-experts layer is put together from: kinds of experts, and companions.

G groups, T tokens per group, D model width, F hidden width, E experts, C slots per expert.
"""

import abc
import dataclasses
from fractions import Fraction
from typing import ClassVar, NamedTuple

from flax import nnx
import jax

from layers.dispatch import Dispatcher
from layers.experts.feed_forward import Activation
from routing.capacity import Capacity
from routing.inputs import RouterInputs
from routing.records import Decision, TokenChoice


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """What experts and companions are built from.

    Attributes:
        num_experts: E.
        d_model: D.
        d_ff: F, of one expert.
        activation: of the hidden units.
        out_scale: variance scale of the output weights.
    """

    num_experts: int
    d_model: int
    d_ff: int
    activation: Activation = "swiglu"
    out_scale: float = 1.0


class ExpertsOutput(NamedTuple):
    """y_GTD: the tokens' outputs; y_EGCD: the experts', slot by slot, where `shows_slots`."""

    y_GTD: jax.Array
    y_EGCD: jax.Array | None = None


class Experts(nnx.Module):
    """Abstract: a kind of experts. A subclass is built from `LayerSizes`.

    Declared by the class, or by an instance whose options change it:
        accepts: the records of a decision that it computes.
        takes_repeats: whether a token may name one expert several times.
        has_capacity: whether an expert takes what `Capacity` says at most; else all that chose it.
        ignores_gates: whether gates are left out, so that the router's have to be 1.
        shows_slots: whether it returns y_EGCD.
        are_neurons: whether an expert is a single hidden unit.
        segments: into how many parts an expert is cut, one of which an assignment computes.
        row_width: of the rows that an expert reads; D where None.
        hidden_width: hidden units that it makes of a row, kept for the backward pass.
        activation: of these.
    """

    accepts: tuple[type, ...] = (TokenChoice,)
    takes_repeats: bool = False
    has_capacity: bool = True
    ignores_gates: bool = False
    shows_slots: bool = False
    are_neurons: bool = False
    segments: int = 1
    row_width: int | None = None
    hidden_width: int = 0
    activation: Activation = "relu"

    def needs_slots(self, train: bool) -> bool:
        """Whether the dispatcher has to give every assignment a slot."""
        return False

    @abc.abstractmethod
    def __call__(
        self, x_GTD: jax.Array, decision: Decision, inputs: RouterInputs, dispatcher: Dispatcher
    ) -> ExpertsOutput:
        """What the experts make of the tokens, moved by the dispatcher where it has to be."""


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a companion sees of a layer's work.

    Attributes:
        x_GTD: the layer's input, padding set to zero.
        inputs: what the router saw.
        decision: what the experts computed.
        own: the assignments to the companion's own members, where the router chooses among these.
        y_EGCD: the experts' outputs by slot, where they show them.
    """

    x_GTD: jax.Array
    inputs: RouterInputs
    decision: Decision
    own: TokenChoice | None = None
    y_EGCD: jax.Array | None = None


class Companion(nnx.Module):
    """Abstract: what adds to a layer's output beside its experts. Built from `LayerSizes`.

    Declared by the class, or by an instance:
        name: of the attribute of the layer that holds it, and so of its parameters.
        needs_slots: whether it reads y_EGCD.
        hidden_width: hidden units that it makes of every token.
    """

    name: ClassVar[str]
    needs_slots: bool = False
    hidden_width: int = 0
    activation: Activation = "relu"

    @abc.abstractmethod
    def __call__(self, routed: Routed) -> jax.Array:
        """(G, T, D), or the same numbers as (B, T, D): what it adds."""

    def batch_sums(self, routed: Routed) -> dict[str, jax.Array]:
        """Sums over valid tokens by name; later in `stats.batch_sums["companion/<name>"]`."""
        return {}


class ChosenCompanion(Companion):
    """Abstract: a companion whose `choices` members the router chooses among, after the experts."""

    choices: int

    @abc.abstractmethod
    def split(self, decision: TokenChoice, num_experts: int) -> tuple[TokenChoice, TokenChoice]:
        """The assignments to the experts, and those to its own members, numbered from 0."""

    @abc.abstractmethod
    def fit_capacity(
        self, own: TokenChoice, capacity: Capacity, inputs: RouterInputs, num_experts: int
    ) -> TokenChoice:
        """Its own assignments without those that its members have no room for."""

    @abc.abstractmethod
    def among(self, num_experts: int) -> Fraction | int:
        """Among how many experts the assignments are divided when capacity is shared out."""
