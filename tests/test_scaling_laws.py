"""Scaling laws against worked numbers and against themselves.

Broken on purpose, once each: natural logs in the routed law; the joint law's Ê without saturation;
Chinchilla's exponents a and b exchanged; 1 - S as S; the leverage law's G in base 10; granularity
on the data term.
"""

from types import SimpleNamespace

from goldens import golden
from laws import PUBLISHED, at_theta, value
import numpy as np
import pytest

from moe.scaling.fit import Points, Problem
from moe.scaling.laws import LAWS
from moe.scaling.laws.joint import terms
from moe.scaling.laws.law import log_sum_exp, saturated
from moe.scaling.laws.routed import effective_parameters

TIGHT = {"rtol": 1e-9}


@pytest.mark.parametrize("router", ["S-BASE", "RL-R", "HASH"])
def test_the_routed_law_and_its_effective_parameters(router):
    law = golden("08_sinkhorn_rl_routed_scaling")[1]["scaling_law"][router]
    c = SimpleNamespace(**law["coef"])
    x = SimpleNamespace(**{k: np.array([row[k] for row in law["rows"]]) for k in ("N", "E")})

    def expected(key):
        return [row[key] for row in law["rows"]]

    theta_P = LAWS["routed"].pack(law["coef"])
    np.testing.assert_allclose(saturated(x.E, c.E_start, c.E_max), expected("E_hat"), **TIGHT)
    np.testing.assert_allclose(
        at_theta(LAWS["routed"], theta_P, vars(x)), expected("loss"), **TIGHT
    )
    np.testing.assert_allclose(effective_parameters(c, x), expected("EPC"), **TIGHT)
    cutoff = LAWS["routed"].derived(c)["N_cutoff"]
    np.testing.assert_allclose(cutoff, law["N_cutoff_from_rounded_coefs"], **TIGHT)


@pytest.mark.parametrize(
    "which", ["hoffmann_tex_unrounded", "hoffmann_rounded", "epoch_2404.10102"]
)
def test_chinchilla(which):
    given, told = golden("18_chinchilla_fit")
    *logs, alpha, beta = given["coef_sets_logA_logB_logE_alpha_beta"][which]
    A, B, E = np.exp(logs)
    law = LAWS["chinchilla"]
    theta_P = law.pack({"A": A, "B": B, "E": E, "alpha": alpha, "beta": beta})
    N, D = np.transpose(given["points_N_D"])
    np.testing.assert_allclose(
        at_theta(law, theta_P, {"N": N, "D": D}), told["loss"][which], **TIGHT
    )
    toy = {k: np.array(v, float) for k, v in given["toy"].items()}
    problem = Problem(law, Points({"N": toy["N"], "D": toy["D"]}, toy["L"]))
    np.testing.assert_allclose(problem.objective(theta_P), told["toy_huber_sum"][which], rtol=1e-7)
    best, found = told["optimum"][which], law.derived(SimpleNamespace(**law.numbers(theta_P)))
    np.testing.assert_allclose([found[k] for k in "abG"], [best[k] for k in "abG"], **TIGHT)
    flops = given["C_for_optimum"] / 6
    np.testing.assert_allclose(found["G"] * flops ** found["a"], best["N_opt"], rtol=1e-7)
    np.testing.assert_allclose(flops ** found["b"] / found["G"], best["D_opt"], rtol=1e-7)


def test_the_joint_law():
    given, told = golden("19_moe_scaling_laws")
    N, D, E = np.transpose(given["joint_points"])
    c = SimpleNamespace(**PUBLISHED["joint"])
    experts = saturated(E, c.E_start, c.E_max)
    log_m, mu, log_n, nu = terms(c, experts)
    found = dict(E_hat=experts, m=np.exp(log_m), mu=mu, n=np.exp(log_n), nu=nu)
    found["loss"] = value("joint", N=N, D=D, E=E)
    for key, values in found.items():
        np.testing.assert_allclose(values, [row[key] for row in told["joint"]], **TIGHT)


def test_granularity_and_sparsity():
    given, told = golden("19_moe_scaling_laws")
    N, D, G = np.transpose(given["krajewski_points"])
    np.testing.assert_allclose(value("granularity", N=N, D=D, G=G), told["krajewski_moe"], **TIGHT)
    law = LAWS["granularity"]
    dense = dict(a=16.3, alpha=0.126, b=26.7, beta=0.127, c=0.47, g=1e-300, gamma=1.0)
    found = at_theta(law, law.pack(dense), {"N": 1e9, "D": 2e10, "G": 1})
    np.testing.assert_allclose(found, told["krajewski_dense_1e9_2e10"], **TIGHT)
    N, D, S = np.transpose(given["abnar_points"])
    np.testing.assert_allclose(value("sparsity", N=N, D=D, S=S), told["abnar"], **TIGHT)


def test_leverage_is_seven_where_its_paper_says_so():
    """7.2 at A = 3.1 %, G = 12, C = 1e22 from rounded coefficients; the best G is 11.3."""
    np.testing.assert_allclose(value("leverage", A=0.031, G=12, C=1e22), 7.2, atol=0.1)
    c = SimpleNamespace(**PUBLISHED["leverage"])
    np.testing.assert_allclose(LAWS["leverage"].derived(c)["G_best"], 11.3, atol=0.1)


@pytest.mark.parametrize("name", LAWS)
def test_coefficients_survive_packing(name):
    law = LAWS[name]
    numbers = law.numbers(law.pack(PUBLISHED[name]))
    np.testing.assert_allclose([numbers[k] for k in law.names], list(PUBLISHED[name].values()))
    assert np.isfinite(law.grid({})).all()


def test_saturation_begins_and_ends_where_it_should():
    np.testing.assert_allclose(saturated(np.array([1.0, 1e12]), 2.0, 300.0), [2, 300], rtol=1e-6)


def test_the_log_of_a_sum_of_very_different_terms():
    found = log_sum_exp(np.array([-1000.0, 0.0]), np.array([-1000.0, 800.0]))
    np.testing.assert_allclose(found, [-1000 + np.log(2), 800])
