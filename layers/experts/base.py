"""The interfaces of a mixture-of-experts layer's modules: kinds of experts, and companions.

G groups, T tokens per group, D model width, F hidden width, E experts, C slots per expert.
"""

import abc
import dataclasses
from fractions import Fraction
from typing import ClassVar, NamedTuple

from flax import nnx
import jax
from jaxtyping import Array, Float

from layers.dispatch import Dispatcher
from layers.experts.feed_forward import Activation
from routing.capacity import Capacity
from routing.inputs import RouterInputs
from routing.records import Decision, TokenChoice


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """The sizes that experts and companions are built from.

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
    """y_GTD: the output of every token; y_EGCD: of every slot, from experts that `shows_slots`."""

    y_GTD: Float[Array, "G T D"]
    y_EGCD: Float[Array, "E G C D"] | None = None


class Experts(nnx.Module):
    """Abstract: a kind of experts. A subclass is built from `LayerSizes`.

    Declared by the class, or by an instance whose options change it:
        accepts: the kinds of decisions that it takes.
        takes_repeats: whether a token may choose one expert several times.
        has_capacity: whether `Capacity` bounds an expert's tokens; else it takes all that chose it.
        ignores_gates: whether gates are not applied, so that the router's have to be 1.
        shows_slots: whether it returns y_EGCD, where the dispatcher has slots.
        are_neurons: whether an expert is a single hidden unit.
        segments: into how many segments an expert is cut; an assignment computes one of them.
        row_width: width of the rows that an expert reads; D where None.
        hidden_width: hidden units of a row, saved for the backward pass.
        activation: of the hidden units.
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
        self,
        x_GTD: Float[Array, "G T D"],
        decision: Decision,
        inputs: RouterInputs,
        dispatcher: Dispatcher,
    ) -> ExpertsOutput:
        """The experts' gate-weighted outputs for the tokens; padding in x_GTD is zero."""


@dataclasses.dataclass(frozen=True)
class Routed:
    """A layer's input, decision and slot outputs, as a companion reads them.

    Attributes:
        x_GTD: the layer's input, padding set to zero.
        inputs: what the router read.
        decision: the assignments that the experts computed.
        own: the assignments to the companion's members, where the router chooses among these.
        y_EGCD: the experts' outputs by slot, where `shows_slots`.
    """

    x_GTD: Float[Array, "G T D"]
    inputs: RouterInputs
    decision: Decision
    own: TokenChoice | None = None
    y_EGCD: Float[Array, "E G C D"] | None = None


class Companion(nnx.Module):
    """Abstract: a module whose output is added to that of the experts. Built from `LayerSizes`.

    Declared by the class, or by an instance:
        name: the layer's attribute that holds it; parameter names contain it.
        needs_slots: whether it reads y_EGCD.
        hidden_width: hidden units of every token.
        activation: of the hidden units.
    """

    name: ClassVar[str]
    needs_slots: bool = False
    hidden_width: int = 0
    activation: Activation = "relu"

    @abc.abstractmethod
    def __call__(self, routed: Routed) -> jax.Array:
        """The output to add: (G, T, D), or the same numbers as (B, T, D)."""

    def batch_sums(self, routed: Routed) -> dict[str, jax.Array]:
        """Sums over valid tokens, by name, which `stats.batch_sums["companion/<name>"]` holds."""
        return {}


class ChosenCompanion(Companion):
    """Abstract: a companion whose `choices` members the router chooses among, after the experts."""

    choices: int

    @abc.abstractmethod
    def split(self, decision: TokenChoice, num_experts: int) -> tuple[TokenChoice, TokenChoice]:
        """The assignments to the experts, and those to its members, numbered from 0."""

    @abc.abstractmethod
    def fit_capacity(
        self, own: TokenChoice, capacity: Capacity, inputs: RouterInputs, num_experts: int
    ) -> TokenChoice:
        """The assignments `own` to its members, without those beyond their capacity."""

    @abc.abstractmethod
    def among(self, num_experts: int) -> Fraction | int:
        """The number of experts that all choices count as when capacity is divided among them."""
