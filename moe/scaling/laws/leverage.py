"""The law of efficiency leverage: how many FLOPs a mixture saves (Tian et al. 2025, 2507.17702).

Read in notes, not in the paper: base 10 for C and base 2 for G reproduce its stated 7x at
A = 3.1 %, G = 12, C = 1e22, and a best G between 8 and 12; other bases don't.
"""

import numpy as np

from moe.scaling.laws.law import G, Input, Law, Numbers, Values, above, free, positive


def log_leverage(c: Values, x: Values) -> Numbers:
    """log EL = (alpha + gamma (log2 G)^2 + beta log2 G) log Â with alpha = a + d log10 C."""
    # The saturated count of laws/law.py, which starts at one expert; A starts at zero.
    active = 1 / (1 / (x.A + 1 / (1 / c.A_start - 1 / c.A_max)) + 1 / c.A_max)
    log_g = np.log2(x.G)
    return (c.a + c.d * np.log10(x.C) + c.gamma * log_g**2 + c.beta * log_g) * np.log(active)


def best_granularity(c: Values) -> dict[str, float]:
    """The granularity of the largest leverage, where the exponent is least; nan if none is."""
    return {"G_best": 2 ** (-c.beta / (2 * c.gamma)) if c.gamma > 0 else np.nan}


LEVERAGE = Law(
    name="leverage",
    inputs={
        "A": Input("active share of experts A", low=1e-6, high=1),
        "G": G,
        "C": Input("training FLOPs C", low=1),
    },
    coefficients={
        "a": free(0.5, 1.2, 2),
        "d": free(0, -0.05, -0.1),
        "gamma": free(0, 0.02, 0.05),
        "beta": free(0, -0.1, -0.3),
        "A_start": positive(0.005, 0.02, 0.1),
        "A_max": above("A_start", 1, 100),
    },
    log_prediction=log_leverage,
    equation="EL = Â^(a + d log10 C + gamma (log2 G)^2 + beta log2 G), "
    "1/Â = 1/(A + (1/A_start - 1/A_max)^-1) + 1/A_max",
    target="EL",
    meaning="efficiency leverage EL (dense FLOPs / its FLOPs)",
    better=1,
    derived=best_granularity,
)
