"""A model without values: its graph, shapes and costs. V vocabulary."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.data.tokens.tokenizer import Tokenizer
from moe.errors import UserError, first_line
from moe.model import flops, functional
from moe.model.functional import Arrays, Graph
from moe.model.transformer import Transformer
from moe.training import metrics
from moe.training.objective import Objective
from routing import Decision, ExpertMerge, SoftSlots, TrainingText
from routing.inputs import Tokens
from routing.training_text import TokenSequence


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without values.

    Attributes:
        graph: merges parameters and router state into a module.
        shapes: of parameters and router state.
        module: with abstract values, from which settings are read.
        objective: as of the run.
        costs: parameters and FLOPs.
        sequence_length: T.
        num_bytes_2V: bytes of text that each token decodes to, as a document's first token and
            elsewhere.
        kind: of the routers' decisions: a kind of `metrics.health`.
    """

    graph: Graph
    shapes: tuple[Arrays, Arrays]
    module: Transformer
    objective: Objective
    costs: flops.Costs
    sequence_length: int
    num_bytes_2V: np.ndarray
    kind: str

    @property
    def moe_layer(self):
        """The first MoE layer, or None for a dense model."""
        return next(iter(self.module.moe_layers_of_units()), None)

    @property
    def sequences_per_group(self) -> int:
        return self.moe_layer.sequences_per_group if self.moe_layer else 1

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factors of all routers' losses, by `Router.key_of`."""
        routers = [layer.router for layer in self.module.moe_layers_of_units()[:1]]
        if self.module.depth_router is not None:
            routers.append(self.module.depth_router)
        return {key: weight for router in routers for key, weight in router.weights().items()}

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """The coefficients of the router losses, by name."""
        coefficients = {}
        if self.moe_layer is not None:
            router = self.moe_layer.router
            coefficients = {loss.name: router.weight_of(loss) for loss in router.losses}
            coefficients |= dict(router.policy_losses)
        if self.module.depth_router is not None:
            depth = self.module.depth_router
            coefficients |= {f"depth/{loss.name}": loss.coefficient for loss in depth.losses}
        return coefficients


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a model needs to know of a tokenizer.

    num_bytes_2V: bytes of text that each token decodes to, as a document's first token and
    elsewhere; one byte each where None.
    """

    size: int
    num_bytes_2V: np.ndarray | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        return cls(tokenizer.vocab_size, tokenizer.num_bytes_2V)


def abstract_model(
    make: Callable[..., Transformer],
    objective: Objective,
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    sequence_length: int,
    training_tokens: TokenSequence | None = None,
) -> AbstractModel:
    """Trace a model without allocating it.

    Args:
        make: the transformer's class, with its settings.
        objective: decides whether the model is causal, and adds tokens to the vocabulary.
        vocabulary: of the tokenizer.
        batch_size: B, for the shapes of the routers' decision.
        sequence_length: T.
        training_tokens: the training text (N,), for routers that count token ids in it. A model
            whose values are restored needs none.

    Raises:
        UserError: sizes are incompatible, or a router is not causal where the objective is.
    """
    vocab_size = vocabulary.size + objective.extra_tokens
    text = None if training_tokens is None else TrainingText(training_tokens, vocab_size)
    build = functools.partial(make, vocab_size=vocab_size, causal=objective.causal, text=text)
    try:
        graph, *shapes = functional.abstract(build)
        module = graph.merge(*shapes)
        if module.learned is not None and module.learned.length < sequence_length:
            raise ValueError(
                f"Transformer.max_length={module.learned.length} is shorter than "
                f"sequence_length={sequence_length}"
            )
        shape = (batch_size, sequence_length)
        decision = _decision(graph, shapes, shape)
    except ValueError as error:
        # gin appends the call stack to a message.
        raise UserError(first_line(error)) from error
    costs = flops.costs(module, decision, sequence_length)
    num_bytes_2V = vocabulary.num_bytes_2V
    if num_bytes_2V is None:
        num_bytes_2V = np.ones((2, vocabulary.size), np.int32)
    # The objective's extra tokens decode to nothing.
    num_bytes_2V = np.pad(num_bytes_2V, ((0, 0), (0, objective.extra_tokens)))
    shapes = (shapes[0], shapes[1])
    kind = kind_of(module, decision)
    return AbstractModel(
        graph, shapes, module, objective, costs, sequence_length, num_bytes_2V, kind
    )


def kind_of(module: Transformer, decision: Decision | None) -> str:
    """The kind of the routers' decisions: a kind of `metrics.health`."""
    if decision is None:
        return metrics.DENSE
    if any(layer.experts.are_neurons for layer in module.moe_layers_of_units()):
        return metrics.NEURONS
    return {SoftSlots: metrics.SOFT, ExpertMerge: metrics.MERGED}.get(
        type(decision), metrics.CHOICES
    )


def _decision(graph: Graph, shapes, shape: tuple[int, int]) -> Decision | None:
    """The abstract decision of the routers in training, None for a dense model."""
    tokens = abstract_tokens(shape)
    out = jax.eval_shape(lambda p, s, t: graph.merge(p, s)(t), *shapes, tokens)
    return out.routers.decision if out.routers is not None else None


def abstract_tokens(shape: tuple[int, int]) -> Tokens:
    """Abstract tokens of shape (B, T) in training."""
    return jax.eval_shape(lambda: Tokens.of(jnp.zeros(shape, jnp.int32), train=True))
