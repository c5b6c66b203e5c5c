"""Laws of dense models: Chinchilla's parametric form, and the power law of the size alone."""

import numpy as np

from moe.scaling.laws.law import (
    D,
    Law,
    N,
    Numbers,
    Values,
    dense_costs,
    free,
    log_sum_exp,
    positive,
)


def chinchilla_log_loss(c: Values, x: Values) -> Numbers:
    """Approach 3 of 2203.15556: the log of a sum as LSE(a - alpha log N, b - beta log D, e)."""
    return log_sum_exp(
        np.log(c.A) - c.alpha * np.log(x.N), np.log(c.B) - c.beta * np.log(x.D), np.log(c.E)
    )


def exponents(c: Values) -> dict[str, float]:
    """N = G (C / 6)^a and D = (C / 6)^b / G are optimal for C FLOPs (2203.15556, eq. 4)."""
    total = c.alpha + c.beta
    return {
        "a": c.beta / total,
        "b": c.alpha / total,
        "G": (c.alpha * c.A / (c.beta * c.B)) ** (1 / total),
    }


CHINCHILLA = Law(
    name="chinchilla",
    inputs={"N": N, "D": D},
    coefficients={
        "A": positive(*np.exp(np.arange(0, 30, 5.0))),
        "B": positive(*np.exp(np.arange(0, 30, 5.0))),
        "E": positive(*np.exp(np.arange(-1, 1.5, 0.5))),
        "alpha": free(0, 0.5, 1, 1.5, 2),
        "beta": free(0, 0.5, 1, 1.5, 2),
    },
    log_prediction=chinchilla_log_loss,
    equation="L = E + A / N^alpha + B / D^beta",
    derived=exponents,
    costs=dense_costs,
    assumes="training takes 6 N FLOPs a token, a forward pass 2 N",
)

DENSE = Law(
    name="dense",
    inputs={"N": N},
    coefficients={"N_c": positive(1e6, 1e10, 1e14), "alpha_N": free(0.03, 0.08, 0.3)},
    log_prediction=lambda c, x: c.alpha_N * (np.log(c.N_c) - np.log(x.N)),
    equation="L = (N_c / N)^alpha_N",
    delta=np.inf,
    costs=dense_costs,
    assumes="training takes 6 N FLOPs a token, a forward pass 2 N",
)
