"""Does a router keep what it declares? One verdict for each property, on small random inputs.

B sequences (each a group), T tokens, D model width, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layers.dispatch import OneHotEinsum, SlotGather
from moe.conformance.harness import (
    ATOL,
    RTOL,
    B,
    Bench,
    D,
    T,
    V,
    Verdict,
    decided,
    differences,
    draw,
    router_matmuls,
    run_layer,
    tokens,
)
from moe.data.batch import Batch
from moe.model import functional, sharding
from moe.model.transformer import Transformer
from moe.training import train_step
from moe.training.objective import MaskedToken, NextToken
from routing import Causality, Router, Sizes, choices_GE


def check(make: Callable[[Sizes], Router], num_experts: int = 4) -> Iterator[Verdict]:
    """The verdicts, one after the other: some seconds each the first time a program compiles.

    Raises:
        ValueError: the router can't be built with so many experts.
    """
    bench = Bench(make, num_experts)
    for one in (
        causality,
        length,
        determinism,
        neighbours,
        padding,
        gradients,
        precision,
        dispatchers,
        rematerialisation,
        micro_batches,
        mesh,
        load,
    ):
        yield from one(bench)


def run_mode(bench: Bench, train: bool):
    """(x, tokens) -> y and the router's output, in training or at evaluation."""
    if not train:
        return bench.evaluate
    ones_BTD = jnp.ones((B, T, D))
    return lambda x_BTD, tokens: bench.plain(bench.params, x_BTD, tokens, ones_BTD)[2:]


def causality(bench: Bench) -> Iterator[Verdict]:
    """Everything from a random cut on is changed; did anything before it move?"""
    declared = bench.router.causality
    cut_B1 = np.random.default_rng(5).integers(1, T, (B, 1))
    later_BT = np.arange(T)[None] >= cut_B1
    for train, mode in ((True, "training"), (False, "evaluation")):
        run, first, other = run_mode(bench, train), tokens(train), tokens(train, seed=1)
        mixed_BT = jnp.where(later_BT, other.token_BT, first.token_BT)
        x_BTD = draw(0, B, T, D)
        mixed_BTD = np.where(later_BT[..., None], draw(1, B, T, D), x_BTD)
        one = run(x_BTD, first)
        two = run(mixed_BTD, dataclasses.replace(first, token_BT=mixed_BT))
        moved_BT = (np.asarray(one[0]) != np.asarray(two[0])).any(-1)
        moved_BT |= (decided(one[1]) != decided(two[1])).any(-1)
        moved = int((moved_BT & ~later_BT).any(1).sum())
        causal = declared is Causality.CAUSAL
        causal |= declared is Causality.CAUSAL_AT_EVALUATION and not train
        seen = f"declared {declared.value}; a changed future moved {moved} of {B} prefixes"
        if moved and causal:
            seen = f"leaks the future: {seen}"
        elif not moved and not causal:
            seen = f"declares a leak that is not there: {seen}"
        yield Verdict(f"causality in {mode}", bool(moved) != causal, seen)


def length(bench: Bench) -> Iterator[Verdict]:
    """At evaluation, texts that end somewhere beside the same ones that go on."""
    cut_B1 = np.random.default_rng(6).integers(1, T, (B, 1))
    before_BT = np.arange(T)[None] < cut_B1
    x_BTD = draw(0, B, T, D)
    whole, part = (bench.evaluate(x_BTD, tokens(False, valid_BT=v)) for v in (None, before_BT))
    same_BT = np.isclose(whole[0], part[0], RTOL, ATOL).all(-1)
    same_BT &= np.isclose(decided(whole[1]), decided(part[1]), RTOL, ATOL).all(-1)
    moved = int((~same_BT & before_BT).any(1).sum())
    causal = bench.router.causality is not Causality.NEVER
    seen = f"a text that goes on moved {moved} of {B} beginnings"
    if moved and causal:
        seen = f"leaks the future's length: {seen}"
    yield Verdict("causality by length", not moved or not causal, seen)


def determinism(bench: Bench) -> Iterator[Verdict]:
    batch, x_BTD = tokens(False), draw(2, B, T, D)
    one = bench.evaluate(x_BTD, batch)
    two = bench.evaluate(x_BTD, dataclasses.replace(batch, key=jax.random.key(9)))
    same = all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )
    seen = "two keys, the same result" if same else "still random: another key, another result"
    yield Verdict("deterministic evaluation", same, seen)


def neighbours(bench: Bench) -> Iterator[Verdict]:
    """A sequence at another place among others."""
    one = bench.evaluate(draw(2, B, T, D), tokens(False))
    others = tokens(False, seed=8)
    others = dataclasses.replace(
        others, token_BT=others.token_BT.at[7].set(tokens(False).token_BT[0])
    )
    strange_BTD = 3 * draw(4, B, T, D)
    strange_BTD[7] = draw(2, B, T, D)[0]
    moved = bench.evaluate(strange_BTD, others)
    same = np.allclose(moved[0][7], one[0][0], RTOL, ATOL)
    seen = "alone and among others the same" if same else "the other sequences change it"
    yield Verdict("independence of the batch", same, seen)


def padding(bench: Bench) -> Iterator[Verdict]:
    """Two sequences and three positions of padding, full of NaN, on top."""
    grow = ((0, 2), (0, 3), (0, 0))
    shape = (B + 2, T + 3)
    valid_BT = np.pad(np.ones((B, T), bool), grow[:2])
    x_BTD, weight_BTD = draw(0, B, T, D), draw(1, B, T, D)
    full_BTD = np.pad(x_BTD, grow, constant_values=np.nan)
    for train, mode in ((True, "training"), (False, "evaluation")):
        padded = tokens(train, 6, valid_BT, shape=shape)
        token_BT = padded.token_BT.at[:B, :T].set(tokens(train).token_BT)
        padded = dataclasses.replace(padded, token_BT=token_BT)
        if train:
            run = functools.partial(bench.plain, bench.params)
            one = run(x_BTD, tokens(train), weight_BTD)
            two = run(full_BTD, padded, np.pad(weight_BTD, grow))
            one, two = (one[0], *one[2:]), (two[0], two[2][:B, :T], two[3])
        else:
            one = bench.evaluate(x_BTD, tokens(train))
            y_BTD, output = bench.evaluate(full_BTD, padded)
            two = (y_BTD[:B, :T], output)
        wrong = differences((*one[:-1], told(one[-1])), (*two[:-1], told(two[-1])))
        seen = "padding changes nothing" if not wrong else f"counts padding: {wrong}"
        yield Verdict(f"padding in {mode}", not wrong, seen)


def told(output) -> dict:
    return {"losses": output.losses, "statistics": output.stats}


def gradients(bench: Bench) -> Iterator[Verdict]:
    """Of a random function of the output, and of the router's own losses, to its parameters."""
    args = bench.params, draw(0, B, T, D), tokens(True), draw(1, B, T, D)
    grads = bench.plain(*args)[0]
    mine = {n.removeprefix("router."): g for n, g in grads.items() if n.startswith("router.")}
    if not mine:
        yield Verdict("gradient", None, "learns nothing: it has no parameters")
        return
    if bench.router.policy_losses:
        yield Verdict("gradient", None, "learns by the objective's reward, which is not run here")
        return
    broken = [name for name, grad in mine.items() if not np.isfinite(grad).all()]
    starved = [name for name, grad in mine.items() if not np.abs(grad).max() > 1e-7]
    seen = f"reaches {', '.join(mine)}"
    if broken or starved:
        seen = f"starves {', '.join(starved)}" if starved else f"not finite: {', '.join(broken)}"
    yield Verdict("gradient", not broken and not starved, seen)


def precision(bench: Bench) -> Iterator[Verdict]:
    """The layer in bfloat16, the router still in float32."""
    graph = bench.graph(SlotGather())
    x_BTD: jax.ShapeDtypeStruct = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)

    def run(x_BTD):
        return run_layer(graph.merge(bench.params, bench.state), x_BTD, tokens(True))[1]

    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(run, x_BTD))}
    wrong = sorted(kinds - {"float32", "int32", "bool"})
    seen = "float32 and integers" if not wrong else f"has {', '.join(wrong)}"
    yield Verdict("precision in a bfloat16 layer", not wrong, seen)
    args = draw(0, B, T, D), tokens(True)
    found = router_matmuls(graph, bench.params, bench.state, *args)
    highest = jax.lax.Precision.HIGHEST
    low = sum(eqn.params["precision"] != (highest, highest) for eqn in found)
    seen = f"all {len(found)} in float32 on every machine"
    if low:
        seen = f"{low} of {len(found)} are bfloat16 on a TPU: a precision was asked for"
    yield Verdict("precision of matmuls", not low, seen if found else "there are none")


def dispatchers(bench: Bench) -> Iterator[Verdict]:
    args = bench.params, draw(0, B, T, D), tokens(True), draw(1, B, T, D)
    wrong = differences(bench.train(OneHotEinsum())(*args), bench.plain(*args))
    seen = "gathers and one-hot einsums agree" if not wrong else f"the dispatchers differ: {wrong}"
    yield Verdict("movement", not wrong, seen)


def rematerialisation(bench: Bench) -> Iterator[Verdict]:
    args = bench.params, draw(0, B, T, D), tokens(True), draw(1, B, T, D)
    wrong = differences(bench.train(remat="full")(*args), bench.plain(*args))
    seen = "routes once" if not wrong else f"routes anew in the backward pass: {wrong}"
    yield Verdict("rematerialisation", not wrong, seen)


def model_step(bench: Bench, accumulate: int = 1, shape=sharding.MeshShape(data=1)):
    """Raw gradients, losses and router state after one step of a tiny model."""
    causal = bench.router.causality is not Causality.NEVER
    objective = NextToken() if causal else MaskedToken(0.3)

    def make():
        return Transformer(
            V + objective.extra_tokens,
            causal,
            bench.text,
            d_model=D,
            num_layers=2,
            num_heads=2,
            moe=functools.partial(bench.make_layer, dispatcher=OneHotEinsum()),
        )

    graph, *abstract = functional.abstract(make)
    devices = np.prod([size for size in dataclasses.astuple(shape)])
    program = train_step.TrainingFunctions(
        graph,
        (abstract[0], abstract[1]),
        objective=objective,
        optimizer=optax.sgd(0.1),
        num_bytes_2V=np.ones((2, V + objective.extra_tokens), np.int32),
        mesh=shape.build(jax.devices()[: int(devices)]),
        seed=1,
        accumulate=accumulate,
        global_batch_losses=accumulate > 1 and bench.router.needs_global_batch,
    ).program()
    state = program.init(0)
    batch = jax.device_put(batch_of(), program.batch_sharding)
    grads, metrics = program.gradients(state, batch)
    after = program.step(state, batch)[0].router_state
    assert metrics.routers is not None
    return jax.device_get({"gradients": grads, "losses": metrics.routers.losses, "state": after})


def batch_of() -> Batch:
    """Ragged, skewed text: what is right on a part of it is not right on the whole."""
    random = np.random.default_rng(3)
    token_BT = random.integers(0, V, (B, T + 1)).astype(np.int32)
    token_BT[: B // 2, ::2] = 0
    valid_BT = np.arange(T)[None] < random.integers(2, T + 1, (B, 1))
    return Batch(
        token_BT=token_BT[:, :-1],
        target_BT=token_BT[:, 1:],
        segment_BT=valid_BT.astype(np.int32),
        position_BT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        scored_BT=valid_BT,
        index_B=np.arange(B, dtype=np.int32),
    )


def micro_batches(bench: Bench) -> Iterator[Verdict]:
    wrong = differences(model_step(bench, accumulate=4), model_step(bench))
    seen = "four are one" if not wrong else f"four micro-batches are not one batch: {wrong}"
    yield Verdict("micro-batches", not wrong, seen)


def mesh(bench: Bench) -> Iterator[Verdict]:
    if len(jax.devices()) < 8:
        yield Verdict("mesh", None, f"needs 8 devices, here are {len(jax.devices())}")
        return
    num_experts = bench.layer.num_experts
    expert = next(n for n in (4, 2, 1) if num_experts % n == 0)
    shape = sharding.MeshShape(data=8 // expert, expert=expert)
    wrong = differences(model_step(bench, shape=shape), model_step(bench))
    seen = f"data {8 // expert} x expert {expert} is one device"
    yield Verdict("mesh", not wrong, seen if not wrong else f"changes with the mesh: {wrong}")


def load(bench: Bench) -> Iterator[Verdict]:
    """What it does with its first weights: nothing to hold, but worth a look."""
    x_BTD = draw(0, B, T, D)
    output = run_mode(bench, True)(x_BTD, tokens(True))[1]
    stats = output.stats
    count_E = np.asarray(stats.count_E)
    skew = count_E.max() / max(count_E.mean(), 1e-9)
    dropped = 1 - np.asarray(stats.kept_E).sum() / max(count_E.sum(), 1)
    seen = f"max/mean load {skew:.2f}, {dropped:.0%} dropped at capacity 1.25, untrained"
    if bench.router.balanced:
        count_GE = np.asarray(choices_GE(output.decision))
        apart = int((count_GE.max(1) - count_GE.min(1)).max())
        seen = f"in no group are two experts more than {apart} apart; {seen}"
        yield Verdict("balance by construction", apart <= 1, seen)
    else:
        yield Verdict("load", None, seen)
