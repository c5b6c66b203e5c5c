"""What a router must keep in training: micro-batches, rematerialisation, meshes, state, the loss.

One optimizer step of a tiny model, with all settings at once, against plain arithmetic: where both
agree no setting changes anything, and where they don't, one at a time tells which it is.
"""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.conformance.harness import B, Bench, D, T, Verdict, differences, draw, run_layer, tokens
from moe.conformance.whole_model import (
    Setting,
    batch_of,
    by_hand,
    padded_to,
    prepared,
    run_steps,
    start_of,
)
from moe.model import functional


def plain(bench: Bench) -> Setting:
    """Two sparse layers; with dense ones before each, where a state's update could end at one."""
    return Setting(layers=4, moe_every=2) if bench.state else Setting()


@functools.cache
def step(bench: Bench, setting: Setting) -> dict:
    """What a step on ragged text reports, its raw gradients, and the router state after it."""
    ((metrics, gradients, state),) = run_steps(bench, setting, steps=1, ragged=True)
    routers = metrics.routers
    told = {"losses": routers.losses, "statistics": routers.stats}
    return {"loss": metrics.loss, **told, "gradients": gradients, "router state": state}


@functools.cache
def arithmetic(bench: Bench, more: int) -> dict:
    """The same but for the state, without a step: on an array of so many more positions."""
    start, batch = start_of(bench, plain(bench)), prepared(bench, batch_of(0, ragged=True))
    run = by_hand(bench, plain(bench))
    gradients, (loss, losses, stats) = run(start.params, start.router_state, padded_to(batch, more))
    found = {"loss": loss, "losses": losses, "statistics": stats, "gradients": gradients}
    return jax.device_get(found)


def apart(bench: Bench, found: dict, expected: dict) -> str:
    """Where results differ; what the objective adds for a router that it rewards left out."""
    names = ["loss", "losses", "statistics"]
    names += [] if bench.router.policy_losses else ["gradients"]
    own = {name: found["losses"][name] for name in expected["losses"]}
    found = {**found, "losses": own}
    return differences({n: found[n] for n in names}, {n: expected[n] for n in names})


def everything(bench: Bench) -> Setting:
    """Four micro-batches, rematerialised, on a mesh."""
    return dataclasses.replace(plain(bench), accumulate=4, remat="full", mesh=mesh_of(bench))


def mesh_of(bench: Bench) -> tuple[int, ...]:
    """Sizes of the axes data, fsdp and expert on eight devices; one device where there are less."""
    if len(jax.devices()) < 8:
        return (1,)
    expert = next(n for n in (4, 2, 1) if bench.num_experts % n == 0)
    return (8 // expert, 1, expert)


@functools.cache
def wrong_at_once(bench: Bench) -> str:
    """What all settings at once change; the array is longer, too."""
    found = step(bench, everything(bench))
    if bench.router.policy_losses:  # whose gradient no plain arithmetic has
        return differences(found, step(bench, plain(bench)))
    return apart(bench, found, arithmetic(bench, 5))


def changed_by(bench: Bench, **setting) -> str:
    """What a setting changes in a step; empty where it changes nothing."""
    if not wrong_at_once(bench):
        return ""
    alone = step(bench, dataclasses.replace(plain(bench), **setting))
    return differences(alone, step(bench, plain(bench)))


def rematerialisation(bench: Bench) -> Iterator[Verdict]:
    """Activations are computed again in the backward pass, decisions never."""
    wrong = changed_by(bench, remat="full")
    seen = "routes once" if not wrong else f"routes anew in the backward pass: {wrong}"
    yield Verdict("rematerialisation", not wrong, seen)


def micro_batches(bench: Bench) -> Iterator[Verdict]:
    """Four micro-batches and one batch."""
    wrong = changed_by(bench, accumulate=4)
    seen = "four are one" if not wrong else f"four micro-batches are not one batch: {wrong}"
    yield Verdict("micro-batches", not wrong, seen)


def mesh(bench: Bench) -> Iterator[Verdict]:
    """Eight devices and one."""
    sizes = mesh_of(bench)
    if sizes == (1,):
        yield Verdict("mesh", None, f"needs 8 devices, here are {len(jax.devices())}")
        return
    wrong = changed_by(bench, mesh=sizes)
    seen = f"data {sizes[0]} x expert {sizes[2]} is one device"
    yield Verdict("mesh", not wrong, seen if not wrong else f"changes with the mesh: {wrong}")


def at_once(bench: Bench) -> Iterator[Verdict]:
    """The three before together, on a longer array, against plain arithmetic."""
    wrong = wrong_at_once(bench)
    seen = "a step equals plain arithmetic" if not wrong else f"a step is wrong: {wrong}"
    yield Verdict("all of it at once", not wrong, seen)


def reported_loss(bench: Bench) -> Iterator[Verdict]:
    """The step's loss is the task's alone; its gradients are those of the task and of each router
    loss times its coefficient; padding to another length changes neither."""
    longer = wrong = ""
    if wrong_at_once(bench) or bench.router.policy_losses:
        longer = apart(bench, arithmetic(bench, 5), arithmetic(bench, 0))
        wrong = apart(bench, step(bench, plain(bench)), arithmetic(bench, 0))
    seen = "five more positions change neither loss nor balance"
    yield Verdict("padding to a length", not longer, f"counts: {longer}" if longer else seen)
    seen = "the task's alone; gradients are of it and of the scaled router losses"
    yield Verdict("reported loss", not wrong, f"is not the task's: {wrong}" if wrong else seen)


def router_state(bench: Bench) -> Iterator[Verdict]:
    """Changed once by a step, from the whole step's counts; never by a forward pass.

    In rematerialised micro-batches, and in sparse layers with dense ones between them: each layer's
    state is that of its own update, called once.
    """
    if not bench.state:
        yield Verdict("router state", None, "it keeps none")
        return
    for mode in ("training", "evaluation"):
        if forward_changes_state(bench, mode):
            yield Verdict("router state", False, f"a forward pass changes it in {mode}")
            return
    found = step(bench, everything(bench))
    stats, after = found["statistics"], found["router state"]
    valid = int((batch_of(0, ragged=True).segment_BT > 0).sum())
    if (stats.token_count != valid).any():
        counted = int(stats.token_count.max())
        yield Verdict("router state", False, f"counts {counted} tokens of {valid}")
        return
    before = start_of(bench, plain(bench)).router_state
    wrong = differences(after, updated_once(bench, before, stats))
    moved = any(not np.array_equal(after[name], before[name]) for name in after)
    seen = "changed once by a step" if moved else "a step leaves it as it is"
    yield Verdict("router state", not wrong, f"not changed once: {wrong}" if wrong else seen)


def forward_changes_state(bench: Bench, mode: str) -> bool:
    """Whether the layer's state after a forward pass is anything but what it was."""
    graph, batch = bench.graph(), tokens(train=mode == "training")

    def after(state):
        layer = graph.merge(bench.params, state)
        run_layer(layer, jnp.asarray(draw(0, B, T, D)), batch)
        return functional.split(layer)[2]

    traced = jax.make_jaxpr(after)(bench.state).jaxpr
    return any(a is not b for a, b in zip(traced.invars, traced.outvars, strict=True))


def updated_once(bench: Bench, before: dict, stats) -> dict:
    """Every sparse layer's state after its own update from the step's statistics of that layer."""
    graph, layers = bench.graph(), len(stats.token_count)
    names = {full: next(n for n in bench.state if full.endswith(n)) for full in before}
    rows = []
    for row in range(layers):
        state = {name: jnp.asarray(before[full][row]) for full, name in names.items()}
        layer = graph.merge(bench.params, state)
        for step_state in layer.step_states():
            step_state.update(jax.tree.map(lambda a, row=row: jnp.asarray(a[row]), stats))
        rows.append(functional.split(layer)[2])
    return {full: np.stack([row[name] for row in rows]) for full, name in names.items()}
