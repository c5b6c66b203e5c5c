"""What the router learns by: gradients, its losses at their coefficients, float32, Muon.

B sequences (each a group), T tokens, D model width, E experts.
"""

from collections.abc import Iterator
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe.conformance.harness import (
    B,
    Bench,
    D,
    T,
    Verdict,
    differences,
    draw,
    inputs_of,
    ragged,
    router_matmuls,
    run_layer,
    tokens,
)
from moe.conformance.training import plain
from moe.conformance.whole_model import run_steps
from moe.model.functional import Declared
from moe.training.optimizer import STACKED, Muon


def gradients(bench: Bench) -> Iterator[Verdict]:
    """Of a random function of the output alone, and of the router's own losses for the rest.

    For a router that the objective rewards: of a whole model's loss.
    """
    names = [name.removeprefix("router.") for name in bench.router_params]
    if not names:
        yield Verdict("gradient", None, "learns nothing: it has no parameters")
        return
    if bench.router.policy_losses:
        grads = with_losses = of_a_step(bench)
        all_used = False
    else:
        args = bench.params, draw(0, B, T, D), tokens(), draw(1, B, T, D)
        grads, _, _, output = bench.train()(*args, penalty=0.0)
        with_losses = bench.train()(*args)[0]
        all_used = bool((np.asarray(output.stats.kept_E) > 0).all())
    broken, starved, by_loss = [], [], []
    for name in names:
        found = [reaches(grad[f"router.{name}"], all_used) for grad in (grads, with_losses)]
        broken += [] if np.isfinite(with_losses[f"router.{name}"]).all() else [name]
        starved += [] if any(found) else [name]
        by_loss += [name] if found == [False, True] else []
    seen = f"reaches {', '.join(names)}"
    seen += f"; {', '.join(by_loss)} by its losses alone" if by_loss else ""
    if broken or starved:
        seen = f"not finite: {', '.join(broken)}" if broken else f"starves {', '.join(starved)}"
    yield Verdict("gradient", not broken and not starved, seen)


def of_a_step(bench: Bench) -> dict[str, np.ndarray]:
    """The router's gradients in a whole model, the last layer's, by their names in the layer.

    In the second step: what starts at zero would let nothing through in the first.
    """
    of_all = run_steps(bench, plain(bench), steps=2)[1][1]
    named = {name: n for name in bench.router_params for n in of_all if n.endswith("." + name)}
    return {name: of_all[n][-1] for name, n in named.items()}


def reaches(grad: jax.Array | np.ndarray, all_used: bool) -> bool:
    """Whether it is there; where every expert was used, in every column (each expert's), too."""
    size = np.abs(np.asarray(grad))
    if all_used and size.ndim > 1:
        return bool((size.reshape(size.shape[0], -1).max(0) > 1e-5).all())
    return bool(size.max() > 1e-7)


def in_float64(bench: Bench):
    """(the router's parameters, a function of them: the router's output), both in float64."""
    graph, batch = bench.graph(), tokens(valid_BT=ragged())
    params = {name: np.float64(a) for name, a in bench.router_params.items()}

    def run(params):
        layer = graph.merge(bench.params | params, bench.state)
        inputs = inputs_of(layer, jnp.asarray(draw(0, B, T, D)), batch)
        x_GTD = inputs.x_GTD.astype(jnp.float64)
        return layer.router, dataclasses.replace(inputs, x_GTD=x_GTD)

    return params, run


def coefficients(bench: Bench) -> Iterator[Verdict]:
    """The gradient of the router's scaled losses against finite differences of each loss.

    These are multiplied with the loss's coefficient here. In float64, along the gradient and a
    random direction together, so that what the gradient misses counts, too.
    """
    title = "coefficients of its losses"
    if not (bench.router.losses and bench.router_params):
        yield Verdict(title, None, "it has no losses, or nothing that they could teach")
        return
    weights = {loss.name: bench.router.weight_of(loss) for loss in bench.router.losses}
    with jax.enable_x64(True):
        params, make = in_float64(bench)
        random = {name: np.float64(draw(i, *a.shape)) for i, (name, a) in enumerate(params.items())}

        def scaled(params):
            router, inputs = make(params)
            output = router(inputs)
            return output.auxiliary_loss, output.losses

        run = jax.jit(jax.value_and_grad(scaled, has_aux=True))
        (_, losses), grads = run(params)
        along = {name: unit(grads)[name] + unit(random)[name] for name in params}
        up, down = (
            run({name: a + sign * 1e-6 * along[name] for name, a in params.items()})[0][1]
            for sign in (1, -1)
        )
        slope = sum(w * float(up[n] - down[n]) for n, w in weights.items()) / 2e-6
        expected = sum(float((grads[name] * along[name]).sum()) for name in params)
    if any(loss.dtype != jnp.float64 for loss in losses.values()):
        yield Verdict(title, None, "not measured: it turns float64 into float32")
    elif max(abs(slope), abs(expected)) < 1e-9:
        yield Verdict(title, None, "they have no slope with its first values")
    else:
        seen = f"a slope of {expected:.4g}, and of {slope:.4g} by finite differences"
        yield Verdict(title, abs(slope - expected) <= 1e-3 * abs(slope), seen)


def unit(arrays: dict) -> dict:
    """Scaled to a length of 1 together; zero stays zero."""
    size = np.sqrt(sum(float(np.square(a).sum()) for a in arrays.values()))
    return {name: np.asarray(a) / max(size, 1e-30) for name, a in arrays.items()}


def scale(bench: Bench) -> Iterator[Verdict]:
    """Scores stay shares when the logits sink to where a sigmoid is below 1e-20.

    Else a router could shrink them, and escape the balance loss, without changing a choice. The
    parameters move down the gradient of the mean logit; every token has a constant in common, so
    that all of its logits sink alike.
    """
    title = "scale of scores"
    graph, batch = bench.graph(), tokens()
    x_BTD = jnp.asarray(draw(0, B, T, D) + 4)

    def mean_logit(params):
        layer = graph.merge(bench.params | params, bench.state)
        routing = layer.router.route(inputs_of(layer, x_BTD, batch))
        logits_GTE, score_GTE = routing.logits_GTE, routing.score_GTE
        if logits_GTE is None or score_GTE is None:
            return jnp.float32(0), None
        return logits_GTE.mean(), (logits_GTE.max(-1).mean(), score_GTE)

    run = jax.jit(jax.value_and_grad(mean_logit, has_aux=True))
    (_, found), grads = run(bench.router_params)
    square = sum(float(np.square(grad).sum()) for grad in grads.values())
    if found is None or not square:
        yield Verdict(title, None, "it has no scores, or no logits that it could shrink")
        return
    low = {name: a - 60 / square * grads[name] for name, a in bench.router_params.items()}
    (_, (logit, score_GTE)), _ = run(low)
    sums = np.concatenate([np.asarray(score).sum(-1) for score in (found[1], score_GTE)])
    holds = bool((np.abs(sums - 1) < 1e-3).all())
    seen = f"they sum to 1 with logits of {float(logit):.0f}, too"
    if not holds:
        worst = float(sums.flat[np.argmax(np.abs(np.nan_to_num(sums) - 1))])
        seen = f"with logits of {float(logit):.0f} they sum to {worst:.2g}: the balance loss goes"
    yield Verdict(title, holds, seen)


def precision(bench: Bench) -> Iterator[Verdict]:
    """The layer in bfloat16, the router still in float32, and its counts in integers."""
    graph, batch = bench.graph(), tokens()

    def run(x_BTD):
        layer = graph.merge(bench.params, bench.state)
        y_BTD, output = run_layer(layer, x_BTD, batch)
        return y_BTD, output, layer.router.route(inputs_of(layer, x_BTD, batch))

    x_BTD: jax.ShapeDtypeStruct = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    y_BTD, output, routing = jax.eval_shape(run, x_BTD)
    stats = output.stats
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((output, routing, bench.router_params))}
    wrong = sorted(kinds - {"float32", "int32", "bool"})
    counts = {str(a.dtype) for a in (stats.token_count, stats.count_E, stats.kept_E)}
    seen = "float32 and integers" if not wrong else f"has {', '.join(wrong)}"
    if counts != {"int32"}:
        seen = f"counts in {', '.join(sorted(counts))}"
    if y_BTD.dtype != jnp.bfloat16:
        seen = f"the layer's output is {y_BTD.dtype}"
    yield Verdict("precision in a bfloat16 layer", seen == "float32 and integers", seen)

    found = router_matmuls(bench)
    highest = jax.lax.Precision.HIGHEST
    low = sum(eqn.params["precision"] != (highest, highest) for eqn in found)
    seen = f"all {len(found)} in float32 on every machine"
    if low:
        seen = f"{low} of {len(found)} are bfloat16 on a TPU: a precision was asked for"
    yield Verdict("precision of matmuls", not low, seen if found else "there are none")


def muon(bench: Bench) -> Iterator[Verdict]:
    """Muon takes experts for a batch of matrices: one's gradient changes no other's update.

    Where the expert axis were a side of one matrix, a gradient a thousand times larger for one
    expert would leave nothing of the others' updates.
    """
    declared = bench.graph().declared
    kinds = tuple((name, declared[name], a.shape) for name, a in bench.params.items())
    stacked = [kind for kind in kinds if set(kind[1].axes) & set(STACKED)]
    if not stacked:
        yield Verdict("Muon", None, "no parameter has an expert axis")
        return
    wrong = muon_mixes(tuple(stacked))
    seen = "every expert's matrix is updated by itself"
    if wrong:
        seen = f"one expert's gradient moves others: {wrong}"
    yield Verdict("Muon", not wrong, seen)


@functools.cache
def muon_mixes(kinds: tuple[tuple[str, Declared, tuple], ...]) -> str:
    """Where an update differs once index 0 of a stacked axis has a gradient 1000 times as large."""
    parameters = {name: of for name, of, _ in kinds}
    optimizer = Muon(weight_decay=0.0, clip_norm=None).build(parameters, 10)
    params = {name: jnp.asarray(draw(i, *shape)) for i, (name, _, shape) in enumerate(kinds)}
    grads = {name: draw(100 + i, *shape) for i, (name, _, shape) in enumerate(kinds)}

    @jax.jit
    def update(grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    expected = update(grads)
    for axis in STACKED:
        large = dict(grads)
        for name, of, _ in kinds:
            if axis in of.axes:
                large[name] = grads[name].copy()
                np.moveaxis(large[name], of.axes.index(axis), 0)[0] *= 1000
        wrong = differences(update(large), expected, rtol=1e-3)
        if wrong:
            return f"{axis}: {wrong}"
    return ""
