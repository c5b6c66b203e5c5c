"""The transformer: embeddings, stacks of blocks, a head. Dense where it has no MoE layer.

B batch, T tokens, D model width, V vocabulary, L sparse layers, H heads.
"""

from collections.abc import Callable, Iterable, Sequence
import functools

from flax import nnx
import gin
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from layers.attention import Attention
from layers.block import Block
from layers.experts.feed_forward import FeedForward
from layers.linear import linear
from layers.logical_axes import logical_constraint
from layers.mixture_of_depths import DepthBlock
from layers.moe_layer import MoELayer
from layers.norms import RMSNorm
from layers.positions import POSITIONS, LearnedPositions, Positions, sinusoidal
from layers.remat import REMAT, Remat
from layers.stack import Stack, moe_layers
from moe.model import maximal_update
from routing import (
    Causality,
    DepthRouter,
    GlobalBatch,
    RouterOutput,
    RouterStats,
    Sizes,
    TrainingText,
)
from routing.inputs import Tokens
from routing.parameters import normal, parameter, truncated_normal
from routing.ranges import Count, Natural

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@nnx.dataclass
class ModelOutput(nnx.Pytree):
    """Normalised hidden states, for `Transformer.logits`, and the outputs of the routers.

    routers: of the MoE layers, stacked over them. mod_routers: of the Mixture-of-Depths layers.
    """

    hidden_BTD: Float[Array, "B T D"] = nnx.data()
    routers: RouterOutput | None = nnx.data(default=None)
    mod_routers: RouterOutput | None = nnx.data(default=None)


def runs_of_layers(kinds: Iterable) -> list[tuple[tuple, int]]:
    """The layers as (pattern, repeats) pairs, with as few blocks to trace as possible.

    [0, 1, 0, 1] is (0, 1) twice; [0, 1, 1, 1] is (0) once and (1) three times.
    """
    layers = tuple(kinds)
    for period in range(1, len(layers) // 2 + 1):
        if len(layers) % period == 0 and layers[:period] * (len(layers) // period) == layers:
            return [(layers[:period], len(layers) // period)]
    runs: list[tuple[tuple, int]] = []
    for kind in layers:
        if runs and runs[-1][0] == (kind,):
            runs[-1] = ((kind,), runs[-1][1] + 1)
        else:
            runs.append(((kind,), 1))
    return runs


def stacks_of(kinds: Iterable[tuple], make_block, remat: Remat, scan: bool | None) -> list[Stack]:
    """The layers as stacks of equal ones; make_block(*kind) makes a layer's block."""
    stacks, first = [], 0
    for pattern, repeats in runs_of_layers(kinds):

        def make_blocks(pattern=pattern):
            return [make_block(*kind) for kind in pattern]

        stacks.append(Stack(make_blocks, repeats, first, remat, scan))
        first += len(pattern) * repeats
    return stacks


def learned_positions(positions, max_length: int | None, d_model: int) -> LearnedPositions | None:
    """The table of learned positions, None for other kinds; ValueError without `max_length`."""
    if positions != "learned":
        return None
    if max_length is None:
        raise ValueError("learned positions need Transformer.max_length")
    return LearnedPositions(max_length, d_model)


@gin.configurable
class Transformer(nnx.Module):
    """A decoder, or with causal=False an encoder for masked tokens.

    Args:
        vocab_size: V, from the tokenizer and the objective.
        causal: whether a token attends to no later one; from the objective.
        text: the training text, for routers that count token ids in it before training.
        d_model: D.
        num_layers: all layers, dense and sparse.
        num_heads: H; D / 64, at least 1, where None.
        moe: `MoELayer`, or None for the dense model.
        moe_every: layers n-1, 2n-1, ... (from 0) are sparse.
        moe_layers: exactly these layers (from 0) are sparse; then moe_every must be 1.
        depth_router: a `DepthRouter` such as `MixtureOfDepths`, which chooses the tokens that go
            through a layer; None: all do.
        depth_every: layers n-1, 2n-1, ... (from 0) have a depth router.
        positions: rotary, alibi, learned, sinusoidal or none.
        max_length: the most tokens of a sequence; for learned positions alone.
        norm, feed_forward, attention, block: the classes that layers are made of (`RMSNorm` or
            `LayerNorm`, and so on).
        tie_embeddings: the head is the embedding's transpose.
        remat: what the backward pass recomputes: "none"; "full", everything; "dots", all but
            matmuls of all tokens (projections, dense feed-forwards); "dots_with_batch", all but
            those, attention's output, the experts' matmuls and exchanged rows. Routing is always
            saved, attention's scores never are.
        compute_dtype: of matmuls and activations; routers and losses are float32, and parameters,
            unless `train.precision` says otherwise.
        scan: loop over equal layers (compiles once), or False to unroll them; None: as the
            platform, their number and `remat` have it, which a run's first lines say.
        base_width: the d_model at which the learning rate was tuned: it stays the best one at other
            widths (µP, moe/model/maximal_update.py), if d_ff and num_heads grow alike; None for
            the standard parametrization, which is the same at d_model = base_width.
        allow_leaks: allow a decoder whose router sees later tokens, to measure how far that
            flatters its loss; it can't generate text.

    Raises:
        ValueError: sizes are incompatible, or a decoder's router is not causal.
    """

    def __init__(
        self,
        vocab_size: Count,
        causal: bool = True,
        text: TrainingText | None = None,
        d_model: Count = 128,
        num_layers: Count = 4,
        num_heads: Count | None = None,
        moe: Callable[..., MoELayer] | None = None,
        moe_every: Count = 1,
        moe_layers: Sequence[Natural] | None = None,
        depth_router: Callable[[Sizes], DepthRouter] | None = None,
        depth_every: Count = 2,
        positions: Positions = "rotary",
        max_length: Count | None = None,
        norm: Callable[[int], nnx.Module] = RMSNorm,
        feed_forward: Callable[..., FeedForward] = FeedForward,
        attention: Callable[..., Attention] = Attention,
        block: Callable[..., Block] = Block,
        tie_embeddings: bool = True,
        remat: Remat = "none",
        compute_dtype: str = "float32",
        scan: bool | None = None,
        base_width: Count | None = None,
        allow_leaks: bool = False,
    ):
        check_choice("positions", positions, POSITIONS)
        check_choice("remat", remat, REMAT)
        check_choice("compute_dtype", compute_dtype, tuple(DTYPES))
        is_moe = sparse_layers(num_layers, moe is not None, moe_every, moe_layers)
        self.vocab_size, self.d_model, self.causal = vocab_size, d_model, causal
        is_deep = sparse_layers(num_layers, depth_router is not None, depth_every, None, "depth")
        self.is_moe, self.positions, self.compute_dtype = is_moe, positions, compute_dtype
        table = (vocab_size, d_model), ("vocab", "embed"), normal(0.02)
        self.embedding_VD = parameter(*table, role="embedding")
        self.learned = learned_positions(positions, max_length, d_model)
        scale, heads = 0.5 / num_layers, num_heads or max(1, d_model // 64)
        shared = {"positions": positions, "causal": causal, "out_scale": scale}
        make_attention = functools.partial(attention, num_heads=heads, **shared)
        make_dense = functools.partial(feed_forward, out_scale=scale)
        options = {"vocab_size": vocab_size, "text": text, "out_scale": scale}
        make_moe = moe and functools.partial(moe, **options, sparse_layers=sum(is_moe))
        sizes = Sizes(d_model, 1, vocab_size, text)  # of a depth router

        def make_block(sparse, deep):
            make = make_moe if sparse else make_dense
            plain = block(d_model, make_attention, make, norm=norm)
            return DepthBlock(plain, depth_router(sizes)) if depth_router and deep else plain

        kinds = zip(is_moe, is_deep, strict=True)
        self.stacks = nnx.List(stacks_of(kinds, make_block, remat, scan))
        self.final_norm = norm(d_model)
        head = (d_model, vocab_size), ("embed", "vocab"), truncated_normal()
        self.head_DV = None if tie_embeddings else parameter(*head, role="head")
        self.width_ratio = d_model / (base_width or d_model)
        if base_width:
            maximal_update.parametrize(self, self.width_ratio)
        self.leak = self._leak() if causal else None
        if self.leak and not allow_leaks:
            raise ValueError(self.leak)

    def moe_layers_of_units(self) -> list[MoELayer]:
        """The MoE layers of each scanned unit; their parameters are stacked over repeats."""
        return [layer for stack in self.stacks for layer in moe_layers(stack.unit.blocks)]

    @property
    def depth_router(self) -> DepthRouter | None:
        """The first Mixture-of-Depths router (its parameters are stacked); None without any."""
        layers = [block for stack in self.stacks for block in stack.unit.blocks]
        return next((b.depth_router for b in layers if isinstance(b, DepthBlock)), None)

    def _leak(self) -> str | None:
        """Why later tokens change earlier ones at evaluation, and what to set; or None."""
        for layer in self.moe_layers_of_units():
            if layer.capacity.leaks_at_evaluation:
                return (
                    f"Capacity.eval_factor={layer.capacity.eval_factor} with priority="
                    f"{layer.capacity.priority!r} and order={layer.capacity.order!r} lets later "
                    "tokens evict earlier ones when a decoder is evaluated; leave eval_factor at "
                    'None, or use priority="position" with order="token-major"'
                )
            if layer.router.causality is Causality.NEVER:
                return (
                    f"{type(layer.router).__name__} is not causal and has no causal rule for "
                    f"evaluation (decoding: {layer.router.decoding}); in a decoder use TopK, "
                    "Switch or Hash, train a bidirectional model with train.objective = "
                    "@MaskedToken(), or set Transformer.allow_leaks = True to measure the leak"
                )
        return None

    def __call__(
        self, tokens: Tokens | ArrayLike | Sequence, global_batch: GlobalBatch | None = None
    ) -> ModelOutput:
        """Hidden states (B, T, D), and the decisions, losses and statistics of the routers.

        tokens: a batch; or token ids (B, T) or (T,), which are evaluated as documents without
            padding.
        global_batch: in a micro-batch whose losses need them, the statistics of the global batch,
            stacked over sparse layers.
        """
        tokens = tokens if isinstance(tokens, Tokens) else Tokens.of(tokens)
        x_BTD, tokens = self.embedded(tokens)
        outputs, mod_outputs, done = [], [], 0
        for stack in self.stacks:
            per_unit = sum(b.is_moe for b in stack.unit.blocks)
            statistics = per_block(global_batch, done, per_unit, stack.repeats)
            x_BTD, logits_BTE, output, mod_output = stack(x_BTD, tokens, statistics)
            tokens = tokens.with_previous_logits(logits_BTE)
            done += per_unit * stack.repeats
            outputs += [] if output is None else [output]
            mod_outputs += [] if mod_output is None else [mod_output]
        hidden_BTD = self.final_norm(x_BTD)  # pyright: ignore[reportCallIssue]
        return ModelOutput(hidden_BTD, over_layers(outputs), over_layers(mod_outputs))

    def embedded(self, tokens: Tokens) -> tuple[Float[Array, "B T D"], Tokens]:
        """The first layer's input, and the tokens with the previous logits that routers read."""
        dtype = DTYPES[self.compute_dtype]
        # In float32, so that the gradients of a token that comes often are summed in it.
        x_BTD = self.embedding_VD[...].astype(jnp.float32)[tokens.token_BT] * (1 / 0.02)
        if self.learned is not None:
            x_BTD = x_BTD + self.learned(tokens.position_BT) * (1 / 0.02)
        elif self.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoidal(tokens.position_BT, self.d_model)
        x_BTD = logical_constraint(x_BTD.astype(dtype), "batch", "length", None)
        return x_BTD, self._with_zero_logits(tokens)

    def _with_zero_logits(self, tokens: Tokens) -> Tokens:
        """The tokens with previous logits of zero, where routers read previous logits."""
        for layer in self.moe_layers_of_units():
            if layer.router.reads_previous_logits:
                shape = (*tokens.token_BT.shape, layer.router.num_experts)
                logits_BTE = logical_constraint(jnp.zeros(shape), "batch", "length", None)
                return tokens.with_previous_logits(logits_BTE)
        return tokens

    def head(self) -> jax.Array:
        """The output weights (D, V), float32."""
        if self.head_DV is not None:
            return self.head_DV[...].astype(jnp.float32)
        scale = 0.02 * (self.d_model * self.width_ratio) ** 0.5
        return self.embedding_VD[...].astype(jnp.float32).T / scale

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> jax.Array:
        """The logits (B, T, V) of hidden states, float32."""
        logits_BTV = linear(hidden_BTD, self.head(), dtype=jnp.float32)
        return logical_constraint(logits_BTV, "batch", None, "vocab")

    def update_router_state(self, stats: RouterStats) -> None:
        """Update router state in place from a step's statistics, stacked over sparse layers."""
        done = 0
        for stack in self.stacks:
            per_unit = sum(b.is_moe for b in stack.unit.blocks)
            stats_per_block = per_block(stats, done, per_unit, stack.repeats)
            if stats_per_block:
                stack.update_router_state(stats_per_block)
            done += per_unit * stack.repeats


def over_layers(outputs: list[RouterOutput]) -> RouterOutput | None:
    """The outputs of several stacks, concatenated along the layer axis."""
    return jax.tree.map(lambda *a: jnp.concatenate(a), *outputs) if outputs else None


def per_block(tree, first: int, per_unit: int, repeats: int):
    """For each sparse block of one stack's unit its part of the tree, stacked over repeats.

    tree: leaves stacked over all sparse layers, of which the stack's begin at `first`.
    """
    if tree is None or not per_unit:
        return None
    last = first + per_unit * repeats
    return [
        jax.tree.map(lambda a, j=j: a[first + j : last : per_unit], tree) for j in range(per_unit)
    ]


def sparse_layers(num_layers, has_moe, every, listed, name="moe") -> tuple[bool, ...]:
    """Which layers are sparse, or have a depth router; ValueError for impossible settings."""
    if num_layers < 1:
        raise ValueError(f"Transformer.num_layers={num_layers} must be at least 1")
    if not has_moe:
        return (False,) * num_layers
    if listed is not None:
        wrong = sorted(set(listed) - set(range(num_layers)))
        if wrong or every != 1:
            raise ValueError(
                f"Transformer.moe_layers={list(listed)} with moe_every={every}: list layers "
                f"between 0 and {num_layers - 1}, and leave moe_every at 1"
            )
        return tuple(layer in listed for layer in range(num_layers))
    if not 1 <= every <= num_layers:
        raise ValueError(
            f"Transformer.{name}_every={every} leaves no such layer among {num_layers}; "
            f"choose 1 to {num_layers}, or no router at all"
        )
    return tuple(layer % every == every - 1 for layer in range(num_layers))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"Transformer.{name}={value!r}: one of {', '.join(choices)}")
