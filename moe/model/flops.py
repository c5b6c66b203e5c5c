"""The parameters and FLOPs of a token, total and active. T tokens, K experts per token."""

from collections.abc import Sequence
import dataclasses
import math

from flax import nnx

from layers.mixture_of_depths import DepthBlock, blocks_of
from moe.model.transformer import Transformer
from routing.parameters import ROLES, Role


@dataclasses.dataclass(frozen=True)
class Costs:
    """Parameters, and FLOPs of one training token (forward and backward: three times forward).

    A token's FLOPs are flops_per_token_base, plus flops_per_assignment for each of its assignments
    to an expert, in each of the sparse layers.
    """

    parameters_total: int
    parameters_active: int
    flops_per_token_base: int
    flops_per_assignment: int
    sparse_layers: int
    experts_per_token: float
    rows_per_token: float  # of buffers, which in some decisions are mostly empty
    num_experts: int = 1  # without zero-computation experts

    @property
    def flops_per_token(self) -> int:
        """The FLOPs of a token, none of whose assignments is dropped."""
        return self.flops_with(self.experts_per_token)

    def flops_with(self, assignments_per_token: float) -> int:
        """The FLOPs of a token with this mean number of assignments in each sparse layer."""
        work = self.sparse_layers * self.flops_per_assignment * assignments_per_token
        return round(self.flops_per_token_base + work)


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """One attention layer. share: of the tokens that go through it (Mixture-of-Depths)."""

    heads: int
    key_heads: int
    width: int
    window: int | None
    share: float

    def kept(self, keys: float) -> float:
        """Of so many keys, those that a window leaves."""
        return keys if self.window is None else min(keys, self.window)

    def score_flops(self, keys: float) -> float:
        """Forward FLOPs of a token's products with so many keys and their values.

        Both the queries and their keys are only the tokens that go through.
        """
        return self.share**2 * 4 * self.kept(keys) * self.heads * self.width


def costs(model: Transformer, decision_shapes, sequence_length: int) -> Costs:
    """The costs of a model: 6 FLOPs for each weight of a matmul, and those of attention.

    Attention counts the keys that its mask leaves: T / 2 per query on average in a decoder, or the
    window. In a Mixture-of-Depths block matmuls count in proportion to the share of tokens that go
    through, attention to its square. The head counts, tied or not; embedding look-ups don't.
    Not counted: mixing tokens into soft slots and back, the heads of product keys beyond the
    first, and merging experts.

    Args:
        model: with or without values.
        decision_shapes: the routers' decision, stacked over sparse layers; None for a dense model.
        sequence_length: T.
    """
    total, in_experts = size_of(model), size_of(model, ("expert",))
    num_experts, segments = 1, 1
    if in_experts:
        layer = model.moe_layers_of_units()[0]
        num_experts, segments = layer.num_experts, layer.experts.segments
    sparse = sum(model.is_moe)
    tied = model.head_DV is None
    matmul = matmul_size(model, tied)
    layers = [(layer, stack.repeats) for stack in model.stacks for layer in stack.unit.blocks]
    for layer, _ in layers:
        if through(layer) < 1:
            (block,) = blocks_of([layer])
            matmul -= (1 - through(layer)) * matmul_size(block, tied)
    reached = sum(through(layer) * repeats for layer, repeats in layers if layer.is_moe)
    share_reached = reached / sparse if sparse else 1
    rows = rows_per_token(decision_shapes) * share_reached
    per_token = experts_per_token(decision_shapes, model) * share_reached
    one_expert = in_experts // (num_experts * segments * sparse) if in_experts else 0
    seen = sequence_length / 2 if model.causal else sequence_length
    # Forward and backward: three times the products with keys and with values.
    attention = sum(round(3 * layer.score_flops(seen)) for layer in attention_layers(model))
    share = per_token / (num_experts * segments)
    return Costs(
        parameters_total=total,
        parameters_active=round(total - in_experts * (1 - min(share, 1.0))),
        flops_per_token_base=round(6 * matmul) + attention,
        flops_per_assignment=6 * one_expert,
        sparse_layers=sparse,
        experts_per_token=per_token,
        rows_per_token=rows,
        num_experts=num_experts,
    )


def parameters_of(module: nnx.Module) -> list[tuple[Role, tuple[int, ...]]]:
    """Role and shape of every parameter; shapes include stacked layers."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return [(variable.get_metadata()["role"], variable.shape) for _, variable in flat]


def size_of(module: nnx.Module, roles: Sequence[Role] = ROLES) -> int:
    """The number of scalars in a module's parameters of these roles."""
    return sum(math.prod(shape) for role, shape in parameters_of(module) if role in roles)


def matmul_size(module: nnx.Module, tied: bool) -> int:
    """The number of weights in matmuls of every token: no experts, norms, biases or tables.

    tied: whether the embedding is the head, too.
    """
    excluded = {"expert", "norm", "position"} | (set() if tied else {"embedding"})
    return matrices_size(module, [role for role in ROLES if role not in excluded])


def matrices_size(module: nnx.Module, roles: Sequence[Role]) -> int:
    """The number of weights in a module's matrices of these roles."""
    return sum(
        math.prod(shape)
        for role, shape in parameters_of(module)
        if role in roles and len(shape) >= 2
    )


def through(layer) -> float:
    """The share of the tokens that go through a layer in training."""
    return layer.depth_router.capacity if isinstance(layer, DepthBlock) else 1.0


def attention_layers(model: Transformer) -> list[AttentionLayer]:
    """What each layer's attention reads and computes."""
    found = []
    for stack in model.stacks:
        for layer in stack.unit.blocks:
            (block,) = blocks_of([layer])
            attention = block.attention
            heads, width = attention.query_DHK.shape[-2:]
            key_heads = attention.key_DNK.shape[-2]
            one = AttentionLayer(heads, key_heads, width, attention.window, through(layer))
            found += [one] * stack.repeats
    return found


def experts_per_token(decision_shapes, model: Transformer) -> float:
    """The mean number of experts that compute a token, with balanced experts.

    As many as the decision has rows for, or the number that the router declares. Where routers
    choose among experts and zero-computation experts, the experts' part is that of capacity
    (MoE++, eq. 8). A choice that is made at random (GShard's second) counts as made.
    """
    rows = rows_per_token(decision_shapes)
    if not any(model.is_moe):
        return rows
    layer = model.moe_layers_of_units()[0]
    if layer.router.experts_per_token is not None:
        rows = layer.router.experts_per_token
    if layer.chosen is None:
        return rows
    return float(rows * layer.num_experts / layer.chosen.among(layer.num_experts))


def rows_per_token(decision_shapes) -> float:
    """The rows of expert buffers per token, from the shapes of a decision (leading layer axis)."""
    if decision_shapes is None:
        return 0.0
    if hasattr(decision_shapes, "expert_GTK"):
        return float(decision_shapes.expert_GTK.shape[-1])
    if hasattr(decision_shapes, "weight_GSE"):
        return 1.0  # one merged expert; the merge itself is not counted
    if hasattr(decision_shapes, "token_GEC"):
        experts, slots = decision_shapes.token_GEC.shape[-2:]
        return experts * slots / decision_shapes.num_tokens
    tokens, experts, slots = decision_shapes.dispatch_GTES.shape[-3:]
    return experts * slots / tokens
