"""The law of fine-grained experts (Krajewski et al. 2024, 2402.07871)."""

import numpy as np

from moe.scaling.laws.law import Costs, D, G, Law, N, Numbers, Values, free, log_sum_exp, positive

EXPERTS = 64  # expansion rate of the paper's models
ROUTING_FLOPS = 14  # of training, for a logit of the router
ASPECT = 64  # width over blocks


def log_loss(c: Values, x: Values) -> Numbers:
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta; N counts all parameters."""
    scale = log_sum_exp(np.log(c.g) - c.gamma * np.log(x.G), np.log(c.a))
    return log_sum_exp(
        np.log(c.c), scale - c.alpha * np.log(x.N), np.log(c.b) - c.beta * np.log(x.D)
    )


def costs(x: Values) -> Costs:
    """Blocks of (4 + 8 E) d^2 parameters, 12 d^2 of them active, and a router of E G logits."""
    block = 4 + 8 * EXPERTS
    width = (x.N * ASPECT / block) ** (1 / 3)  # N = block width^2 blocks, width = ASPECT blocks
    active = 12 / block * x.N
    router = width * EXPERTS * x.G * width / ASPECT
    return Costs(6 * active + ROUTING_FLOPS * router, 2 * active + 2 * router, x.N)


GRANULARITY = Law(
    name="granularity",
    inputs={"N": N, "D": D, "G": G},
    coefficients={
        "a": positive(5, 20, 100),
        "alpha": free(0.05, 0.12, 0.3),
        "b": positive(10, 30, 200),
        "beta": free(0.05, 0.15, 0.3),
        "g": positive(0.5, 2, 10),
        "gamma": free(0.3, 0.6, 1),
        "c": positive(0.2, 0.5, 1.5),
    },
    log_prediction=log_loss,
    equation="L = c + (g / G^gamma + a) / N^alpha + b / D^beta",
    delta=0.1,
    costs=costs,
    assumes="N counts all parameters; 64 experts' worth of (4 + 8 E) d^2 a block, 12 d^2 active, "
    "width = 64 blocks; each of the router's 64 G logits costs 14 d FLOPs",
)
