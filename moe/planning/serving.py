"""What a model costs to serve, counted from shapes: FLOPs and bytes of a decoded token.

B texts side by side, S tokens of each that its cache holds, E experts, K of them per token.
"""

from collections.abc import Sequence
import dataclasses
import math

from layers.mixture_of_depths import blocks_of
from moe.model.flops import AttentionLayer, attention_layers, matrices_size, size_of, through
from moe.model.transformer import Transformer
from moe.planning.chips import Chip
from moe.training import metrics
from moe.training.abstract_model import AbstractModel
from routing.parameters import Role

MOST_TEXTS = 2**24


@dataclasses.dataclass(frozen=True)
class Serving:
    """A model's costs in one precision.

    Attributes:
        projections, router, experts, feed_forward, head: forward FLOPs of a token; `experts` are
            those chosen, or all slots of a segment, or the merge and one; `feed_forward` whatever
            every token passes beside attention.
        attention: every layer's.
        sparse_layers, num_experts, experts_per_token: of the mixture; 0, 1 and 0 without one.
        reads_all: whether a token reads every expert: soft slots, and merged experts.
        expert_parameters, other_parameters: scalars, the latter without tables that are looked up.
        table_parameters: of embeddings that are no head, of which a token reads one row.
        value_bytes: of a weight, and of a value in the cache.
    """

    projections: float
    router: float
    experts: float
    feed_forward: float
    head: float
    attention: tuple[AttentionLayer, ...]
    sparse_layers: int
    num_experts: int
    experts_per_token: float
    expert_parameters: int
    other_parameters: int
    table_parameters: int
    value_bytes: int
    reads_all: bool = False

    @classmethod
    def of(cls, model: AbstractModel, value_bytes: int = 2) -> "Serving":
        """The costs of a model, with weights and caches of so many bytes a value."""
        module, costs = model.module, model.costs
        table = matrices_size(module, ["embedding"])
        head = matrices_size(module, ["head"]) or table
        looked_up = size_of(module, ("position",)) + (table if module.head_DV is not None else 0)
        experts = size_of(module, ("expert",))
        rows = costs.experts_per_token
        if model.kind == metrics.SOFT:  # all slots of a segment, for each of its tokens
            router = module.moe_layers_of_units()[0].router
            rows *= getattr(router, "segment", None) or model.sequence_length
        chosen = costs.sparse_layers * costs.flops_per_assignment * rows / 3
        if model.kind == metrics.MERGED:
            chosen += 2 * experts  # every expert's weights times its share, added up
        return cls(
            projections=2 * _matrices(module, ["attention"]),
            router=2 * _matrices(module, ["router"]),
            experts=chosen,
            feed_forward=2 * _matrices(module, ["feed_forward", "latent", "companion"]),
            head=2 * head,
            attention=tuple(attention_layers(module)),
            sparse_layers=costs.sparse_layers,
            num_experts=costs.num_experts,
            experts_per_token=costs.experts_per_token,
            expert_parameters=experts,
            other_parameters=costs.parameters_total - experts - looked_up,
            table_parameters=looked_up,
            value_bytes=value_bytes,
            reads_all=model.kind in (metrics.SOFT, metrics.MERGED),
        )

    def flops(self, length: int) -> dict[str, float]:
        """Forward FLOPs of the token after `length` others, by part."""
        return {
            "projections": self.projections,
            "scores": sum(layer.score_flops(length) for layer in self.attention),
            "router": self.router,
            "experts": self.experts,
            "feed_forward": self.feed_forward,
            "head": self.head,
        }

    def cache_bytes(self, length: int) -> float:
        """Bytes of one text's keys and values."""
        values = sum(2 * a.key_heads * a.width * a.share * a.kept(length) for a in self.attention)
        return values * self.value_bytes

    def experts_read(self, texts: int) -> float:
        """Distinct experts that a step of B texts reads in a layer: E (1 - (1 - K/E)^B).

        As though each text chose by itself, and each expert were as likely: texts that are alike
        read fewer, and a skewed load does, too.
        """
        if not self.sparse_layers:
            return 0.0
        if self.reads_all:
            return float(self.num_experts)
        left = max(0.0, 1 - self.experts_per_token / self.num_experts)
        return self.num_experts * (1 - left**texts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        whole = self.expert_parameters + self.other_parameters + self.table_parameters
        return whole * self.value_bytes

    def weights_read(self, texts: int) -> float:
        """Bytes of weights that a step of B texts reads."""
        share = self.experts_read(texts) / self.num_experts
        return (self.other_parameters + share * self.expert_parameters) * self.value_bytes

    def step(self, chip: Chip, texts: int, length: int) -> dict[str, float]:
        """Seconds of one step of B texts on one chip, if nothing but its peaks held it up.

        The longer of the two counts: FLOPs at the peak of matmuls, or bytes at the memory's rate.
        """
        flops = texts * sum(self.flops(length).values()) / chip.flops
        moved = self.weights_read(texts) + texts * self.cache_bytes(length)
        reading = moved / chip.memory_bandwidth
        return {"seconds": max(flops, reading), "computing": flops, "reading": reading}

    def break_even(self, chip: Chip, length: int) -> int | None:
        """The fewest texts whose step is held up by FLOPs; None where caches always take longer."""
        low, high = 0, 1
        while not _computes(self.step(chip, high, length)):
            low, high = high, 2 * high
            if high > MOST_TEXTS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if _computes(self.step(chip, middle, length)) else (middle, high)
            )
        return high

    def most_texts(self, memory: float, length: int) -> int:
        """How many texts of this length have room for their caches beside the weights."""
        left = memory - self.weight_bytes
        cache = self.cache_bytes(length)
        return max(0, math.floor(left / cache)) if cache else MOST_TEXTS


def _computes(step: dict[str, float]) -> bool:
    return step["computing"] >= step["reading"]


def _matrices(module: Transformer, roles: Sequence[Role]) -> float:
    """The weights in matrices of these roles that a token meets in all layers, on average."""
    total = 0.0
    for stack in module.stacks:
        for layer in stack.unit.blocks:
            (block,) = blocks_of([layer])  # a depth router beside it reads every token
            passed_by = (1 - through(layer)) * matrices_size(block, roles)
            total += matrices_size(layer, roles) - passed_by
    return total
