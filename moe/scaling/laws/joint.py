"""The joint law of mixture-of-experts models (Ludziejewski et al. 2025, 2502.05172)."""

import numpy as np

from moe.scaling.laws.law import (
    Costs,
    D,
    E,
    Law,
    N,
    Numbers,
    Values,
    above,
    free,
    log_sum_exp,
    positive,
    saturated,
)


def terms(c: Values, experts: Numbers) -> tuple[Numbers, ...]:
    """log m, mu, log n, nu of L = m N^mu + n D^nu + c for an expert count Ê (table 3)."""
    log = np.log(experts)
    return (
        np.log(c.a) + c.delta * log,
        c.alpha + c.gamma * log,
        np.log(c.b) + c.omega * log,
        c.beta + c.zeta * log,
    )


def log_loss(c: Values, x: Values) -> Numbers:
    """All logs are natural."""
    log_m, mu, log_n, nu = terms(c, saturated(x.E, c.E_start, c.E_max))
    return log_sum_exp(log_m + mu * np.log(x.N), log_n + nu * np.log(x.D), np.log(c.c))


def costs(x: Values) -> Costs:
    """Blocks of 13 d^2 active and (4 + 9 E) d^2 total parameters, embeddings not counted."""
    return Costs(6 * x.N, 2 * x.N, x.N * (4 + 9 * x.E) / 13)


JOINT = Law(
    name="joint",
    inputs={"N": N, "D": D, "E": E},
    coefficients={
        "a": positive(10, 40, 200),
        "alpha": free(-0.1, -0.2, -0.35),
        "delta": free(0, -0.2),
        "gamma": free(0, 0.01),
        "b": positive(10, 40, 200),
        "beta": free(-0.1, -0.2, -0.35),
        "omega": free(0, 0.5),
        "zeta": free(0, -0.02),
        "c": positive(0.7, 1.4),
        "E_start": positive(2.0),
        "E_max": above("E_start", 300),
    },
    log_prediction=log_loss,
    equation="L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, "
    "1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max",
    delta=0.01,
    costs=costs,
    assumes="N counts active parameters; blocks of 13 d^2 active and (4 + 9 E) d^2 total",
)
