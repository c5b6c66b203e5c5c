"""Rematerialisation: which arrays a layer keeps for its backward pass, by their names.

A module names an array with `jax.ad_checkpoint.checkpoint_name`. Nothing without a name is kept,
so that attention's scores never are, whatever computes them.
"""

from collections.abc import Callable
from typing import Literal

import jax

Remat = Literal["none", "full", "dots", "dots_with_batch"]
# What each name stands for, as a run's first lines say it.
NAMES = {
    "routing": "routing",
    "router_logits": "routers' logits",
    "projections": "matmuls of all tokens",
    "attention": "attention's output",
    "expert_matmuls": "experts' matmuls",
    "exchanged": "rows from other devices",
}
SAVED: dict[str, tuple[str, ...]] = {
    "full": ("routing",),
    "dots": ("routing", "router_logits", "projections"),
    "dots_with_batch": tuple(NAMES),
}
REMAT = ("none", *SAVED)
# cuDNN's attention, whose rule for gradients can't name what it keeps: its output, and the
# logarithm of each query's sum.
CUDNN_ATTENTION = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")


def rematerialised(body: Callable, remat: str, in_scan: bool = True) -> Callable:
    """The body with activations recomputed in the backward pass; routing is always saved.

    remat: a name of `REMAT`. in_scan: whether a scan calls the body; elsewhere the compiler would
    find that the backward pass repeats the forward one, and keep what it should compute again.
    """
    if remat == "none":
        return body
    policies, names = jax.checkpoint_policies, SAVED[remat]
    policy = policies.save_only_these_names(*names)
    if "attention" in names:
        policy = policies.save_from_both_policies(policy, _is_cudnn_attention)
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_scan)


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    return primitive.name in CUDNN_ATTENTION


def described(remat: str) -> str:
    """What the backward pass finds saved and what it computes again, in a few words."""
    if remat == "none":
        return "all that it reads; nothing is computed again"
    return f"{', '.join(NAMES[name] for name in SAVED[remat])}; the rest is computed again"
