"""The law of sparsity at given total parameters (Abnar et al. 2025, 2501.12370)."""

import numpy as np

from moe.scaling.laws.law import Costs, D, Law, N, Numbers, S, Values, free, log_sum_exp, positive


def log_loss(c: Values, x: Values) -> Numbers:
    """L = a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e; N is the total."""
    size, active = np.log(x.N), np.log(1 - x.S)
    return log_sum_exp(
        np.log(c.a) - c.alpha * size,
        np.log(c.b) - c.beta * np.log(x.D),
        np.log(c.c) - getattr(c, "lambda") * active,
        np.log(c.d) - c.delta * active - c.gamma * size,
        np.log(c.e),
    )


def costs(x: Values) -> Costs:
    """The share of the parameters that is active is 1 - S: what is not an expert is neglected."""
    active = x.N * (1 - x.S)
    return Costs(6 * active, 2 * active, x.N)


SPARSITY = Law(
    name="sparsity",
    inputs={"N": N, "D": D, "S": S},
    coefficients={
        "a": positive(1e2, 1e4, 1e6),
        "alpha": free(0.3, 0.6),
        "b": positive(1e2, 5e3),
        "beta": free(0.3, 0.5),
        "c": positive(0.1, 0.5),
        "lambda": free(-0.2, -0.5),
        "d": positive(2, 20, 200),
        "delta": free(0.1, 0.3),
        "gamma": free(0.1, 0.2),
        "e": positive(0.5, 1, 1.5),
    },
    log_prediction=log_loss,
    equation="L = a / N^alpha + b / D^beta + c / (1-S)^lambda + d / ((1-S)^delta N^gamma) + e",
    costs=costs,
    assumes="N counts all parameters, of which 1 - S are active",
)
