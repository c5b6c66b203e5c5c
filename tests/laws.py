"""What the tests of scaling laws share: published coefficients, designs, and noisy points."""

from types import SimpleNamespace

import numpy as np

from moe.scaling.fit import Points
from moe.scaling.laws import LAWS

PUBLISHED = {
    "chinchilla": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    "dense": {"N_c": 3.69e13, "alpha_N": 0.0785},
    "routed": {
        "a": -0.083,
        "b": -0.118,
        "c": 0.0099,
        "d": 1.1136,
        "E_start": 2.07,
        "E_max": 238.7,
    },
    "joint": {
        "a": 35.91,
        "alpha": -0.1889,
        "delta": -0.2285,
        "gamma": 0.0098,
        "b": 35.98,
        "beta": -0.1775,
        "omega": 0.5529,
        "zeta": -0.0259,
        "c": 1.3637,
        "E_start": 2.0732,
        "E_max": 290.4521,
    },
    "granularity": {
        "a": 18.1,
        "alpha": 0.115,
        "b": 30.8,
        "beta": 0.147,
        "g": 2.1,
        "gamma": 0.58,
        "c": 0.47,
    },
    "sparsity": {
        "a": 16612.50,
        "alpha": 0.5962,
        "b": 5455.67,
        "beta": 0.3954,
        "c": 0.4598,
        "lambda": -0.1666,
        "d": 17.26,
        "delta": 0.1603,
        "gamma": 0.1595,
        "e": 0.94,
    },
    "leverage": {
        "a": 1.23,
        "d": -0.0761,
        "gamma": 0.0167,
        "beta": -0.117,
        "A_start": 0.0163,
        "A_max": 5.28e16,
    },
}


def value(name, **at):
    """What a law predicts with its published coefficients."""
    return at_theta(LAWS[name], LAWS[name].pack(PUBLISHED[name]), at)


def at_theta(law, theta_P, at):
    """What a law predicts; inputs by letter, numbers or arrays."""
    x = SimpleNamespace(**{letter: np.atleast_1d(one) for letter, one in at.items()})
    return np.exp(law.log_prediction(law.unpack(theta_P), x))


def design(law, count, rng):
    """Inputs of runs such as people make: sizes over three decades, experts in powers of two."""

    def sizes(low, high):
        return 10 ** rng.uniform(low, high, count)

    made = {
        "N": lambda: sizes(7, 10),
        "D": lambda: sizes(9, 12),
        "E": lambda: 2.0 ** rng.integers(0, 10, count),
        "G": lambda: 2.0 ** rng.integers(0, 5, count),
        "S": lambda: rng.choice([0, 0.5, 0.75, 0.9, 0.95, 0.98], count),
        "A": lambda: 2.0 ** -rng.integers(0, 8, count),
        "C": lambda: sizes(18, 22),
    }
    return {letter: made[letter]() for letter in law.inputs}


def noisy(name, count=100, noise=0.002, seed=0):
    """Points of a law with its published coefficients and noise in the log."""
    rng = np.random.default_rng(seed)
    inputs = design(LAWS[name], count, rng)
    return Points(inputs, value(name, **inputs) * np.exp(rng.normal(0, noise, count)))
