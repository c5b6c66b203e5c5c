"""Bias and variance of gradients through a random unit, for each estimator of routing/solvers.

    python benchmarks/gradient_variance.py --json=benchmarks/results/gradient_variance.json

The unit has logit a and loss L(h) = (h - 0.3)^2. The true gradient is the derivative of E[L(h)] for
the estimator's own distribution of h. `unbiased` is REINFORCE, (h - p) L, without a baseline and
with the best constant one.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from routing.solvers import estimators

LOGITS = (-2.0, -0.5, 0.0, 1.0, 3.0)
DRAWS = 200_000


def loss(h):
    return jnp.square(h - 0.3)


def expected_bernoulli(a):
    p = jax.nn.sigmoid(a)
    return p * loss(1.0) + (1 - p) * loss(0.0)


def expected_smooth(a):
    root = jnp.sqrt(jax.nn.sigmoid(a))
    return root * loss(root) + (1 - root) * loss(0.0)


def expected_rectified(a):
    u = (jnp.arange(200_000) + 0.5) / 200_000
    return loss(estimators.noisy_rectifier(a, u)).mean()


PATHWISE = {
    "straight_through": (estimators.straight_through, expected_bernoulli),
    "straight_through_slope": (estimators.straight_through_slope, expected_bernoulli),
    "stochastic_times_smooth": (estimators.stochastic_times_smooth, expected_smooth),
    "noisy_rectifier": (estimators.noisy_rectifier, expected_rectified),
}


def rewarded(a, u, baseline):
    """Reinforce: the gradient of the log-probability times the loss above a baseline."""
    fires, log_prob = estimators.bernoulli(a, u)
    return jax.lax.stop_gradient(loss(fires) - baseline) * log_prob


def measured() -> list[dict]:
    """A row of results for each estimator and logit."""
    u_N = jnp.asarray(np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, DRAWS), jnp.float32)
    rows = []
    for a in map(jnp.float32, LOGITS):
        p = jax.nn.sigmoid(a)
        best = p * loss(0.0) + (1 - p) * loss(1.0)
        found = {
            name: (jax.vmap(jax.grad(lambda a, u, h=h: loss(h(a, u))), (None, 0))(a, u_N), truth)
            for name, (h, truth) in PATHWISE.items()
        }
        for name, baseline in (("unbiased", 0.0), ("unbiased, best baseline", best)):
            grad = jax.vmap(jax.grad(rewarded), (None, 0, None))(a, u_N, baseline)
            found[name] = (grad, expected_bernoulli)
        for name, (grad_N, truth) in found.items():
            true = float(jax.grad(truth)(a))
            rows.append(
                {
                    "estimator": name,
                    "logit": float(a),
                    "true_gradient": true,
                    "bias": float(grad_N.mean()) - true,
                    "variance": float(grad_N.var()),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """Root mean square bias and mean variance over the logits."""
    lines = ["| estimator | bias (rms) | variance (mean) |", "|---|---|---|"]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        own = [row for row in rows if row["estimator"] == name]
        bias = np.sqrt(np.mean([row["bias"] ** 2 for row in own]))
        variance = np.mean([row["variance"] for row in own])
        lines.append(f"| {name} | {bias:.4f} | {variance:.4f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    path = Path(parser.parse_args().json)
    rows = measured()
    path.write_text(json.dumps(rows, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
