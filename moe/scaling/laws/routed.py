"""The unified law of routed language models (Clark et al. 2022, 2202.01169)."""

import numpy as np

from moe.scaling.laws.law import Costs, E, Law, N, Numbers, Values, above, free, positive, saturated


def log_loss(c: Values, x: Values) -> Numbers:
    """log L = a log N + b log Ê + c log N log Ê + d in base 10, as natural log."""
    size, experts = np.log10(x.N), np.log10(saturated(x.E, c.E_start, c.E_max))
    return np.log(10) * (c.a * size + c.b * experts + c.c * size * experts + c.d)


def effective_parameters(c: Values, x: Values) -> Numbers:
    """The size of the dense model with the same loss, N̄(N, E); N itself for one expert."""
    experts = saturated(x.E, c.E_start, c.E_max)
    alpha = c.a + c.c * np.log10(experts)
    alpha_dense = c.a + c.c * np.log10(c.E_start)
    return x.N ** (alpha / alpha_dense) * (experts / c.E_start) ** (c.b / alpha_dense)


def cutoff(c: Values) -> dict[str, float]:
    """The size at which more experts stop helping: the loss no longer depends on Ê."""
    return {"N_cutoff": float(10 ** np.clip(-c.b / c.c, -300, 300)) if c.c else np.inf}


def costs(x: Values) -> Costs:
    """Every second feed-forward is routed to one expert: a third of a dense model's parameters."""
    return Costs(6 * x.N, 2 * x.N, x.N * (1 + (x.E - 1) / 3))


ROUTED = Law(
    name="routed",
    inputs={"N": N, "E": E},
    coefficients={
        "a": free(-0.05, -0.1),
        "b": free(-0.05, -0.15),
        "c": free(0.0, 0.01),
        "d": free(0.8, 1.1, 1.4),
        "E_start": positive(1.0, 2.0, 5.0),
        "E_max": above("E_start", 50, 300, 2000),
    },
    log_prediction=log_loss,
    equation="log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d, "
    "1/Ê = 1/(E - 1 + (1/E_start - 1/E_max)^-1) + 1/E_max",
    delta=np.inf,
    derived=cutoff,
    costs=costs,
    assumes="N counts active parameters; every second feed-forward is routed (k = 1), so that each "
    "further expert adds N / 3",
)
