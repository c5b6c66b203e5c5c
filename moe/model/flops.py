"""What a token costs: parameters and FLOPs, total and active. T tokens, K experts per token."""

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

    An expert assignment costs `flops_per_assignment` in one layer; everything else of a token
    costs `flops_per_token_base`. A token's FLOPs are base + layers * assignments * that.
    """

    parameters_total: int
    parameters_active: int
    flops_per_token_base: int
    flops_per_assignment: int
    sparse_layers: int
    experts_per_token: float
    rows_per_token: float  # that experts have room for, most of them empty in some decisions
    num_experts: int = 1  # that cost something

    @property
    def flops_per_token(self) -> int:
        """With every chosen expert computed."""
        return self.flops_with(self.experts_per_token)

    def flops_with(self, assignments_per_token: float) -> int:
        """With this mean number of experts per token and sparse layer."""
        work = self.sparse_layers * self.flops_per_assignment * assignments_per_token
        return round(self.flops_per_token_base + work)


def costs(model: Transformer, decision_shapes, sequence_length: int) -> Costs:
    """Counted from the parameters: 6 FLOPs for each weight of a matmul, and attention.

    The decision is of the tokens that reach the layer: of a Mixture-of-Depths' block only the share
    of tokens that goes through pays, and of attention in it the square of that.
    Not counted: what mixes tokens into soft slots and back, product keys' heads beyond the first,
    a merge of experts. Attention counts what its mask leaves: T / 2 keys per query on average in a
    decoder (the window's share where there is one). Embedding look-ups cost nothing; the head
    does, tied or not.
    """
    total, in_experts = size_of(model), size_of(model, ("expert",))
    num_experts = model.moe_layers_of_units()[0].num_experts if in_experts else 1
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
    one_expert = in_experts // (num_experts * sparse) if in_experts else 0
    if in_experts:
        segments = model.moe_layers_of_units()[0].experts.segments
        one_expert //= segments
        num_experts *= segments
    attention = sum(_attention_flops(model, stack, sequence_length) for stack in model.stacks)
    share = per_token / num_experts
    return Costs(
        parameters_total=total,
        parameters_active=round(total - in_experts * (1 - min(share, 1.0))),
        flops_per_token_base=round(6 * matmul) + attention,
        flops_per_assignment=6 * one_expert,
        sparse_layers=sparse,
        experts_per_token=per_token,
        rows_per_token=rows,
        num_experts=model.moe_layers_of_units()[0].num_experts if in_experts else 1,
    )


def parameters_of(module: nnx.Module) -> list[tuple[Role, tuple[int, ...]]]:
    """Role and shape of every parameter, with the layers that it is stacked over."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return [(variable.get_metadata()["role"], variable.shape) for _, variable in flat]


def size_of(module: nnx.Module, roles: Sequence[Role] = ROLES) -> int:
    """How many numbers its parameters of these roles hold."""
    return sum(math.prod(shape) for role, shape in parameters_of(module) if role in roles)


def matmul_size(module: nnx.Module, tied: bool) -> int:
    """Parameters that every token is multiplied with: none of experts, norms, biases and tables.

    tied: the embedding is the head, too.
    """
    apart = {"expert", "norm", "position"} | (set() if tied else {"embedding"})
    return sum(
        math.prod(shape)
        for role, shape in parameters_of(module)
        if role not in apart and len(shape) >= 2
    )


def through(layer) -> float:
    """The share of the tokens that a layer works on in training."""
    return layer.depth_router.capacity if isinstance(layer, DepthBlock) else 1.0


def _attention_flops(model: Transformer, stack, length: int) -> int:
    """Of one token in all layers of a stack, forward and backward."""
    total = 0
    for layer in stack.unit.blocks:
        (block,) = blocks_of([layer])
        attention = block.attention
        heads, width = attention.query_DHK.shape[-2:]
        seen = length / 2 if model.causal else length
        if attention.window is not None:
            seen = min(seen, attention.window)
        # So many tokens, each of which sees so many.
        total += round(through(layer) ** 2 * 3 * 4 * seen * heads * width) * stack.repeats
    return total


def experts_per_token(decision_shapes, model: Transformer) -> float:
    """Experts that work on a token in the mean, where every expert gets its share.

    As many as a decision has rows for, unless the router says how many it aims at. Of choices among
    experts and zero-computation ones, those to experts, as capacity is shared out (MoE++, eq. 8).
    A choice that stands by chance (GShard's second) counts as made.
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
    """Assignments per token of a decision, from the shapes of its record (leading layer axis)."""
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
