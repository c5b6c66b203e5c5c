"""transformers' Mixtral block in torch on the CPU, to be timed beside our layer."""

from collections.abc import Callable
import warnings

import numpy as np

WAYS = ("eager", "grouped_mm")  # how it runs its experts


def mixtral(case, x_TD: np.ndarray, way: str) -> tuple[Callable, Callable]:
    """Forward pass and step (gradients to weights and x) of the block, without arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    config = MixtralConfig(
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=case.k,
    )
    config._experts_implementation = way
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for value in block.parameters():
            value.normal_(std=case.width**-0.5)
    x = torch.from_numpy(x_TD)[None].requires_grad_()

    def forward():
        with torch.no_grad():
            return (block(x) * x).sum().item()

    def step():
        block.zero_grad(set_to_none=True)
        x.grad = None
        (block(x) * x).sum().backward()

    return forward, step
