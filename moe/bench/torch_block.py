"""transformers' Mixtral block in torch on the CPU, to be timed beside our layer.

It runs in a process of its own: in ours it would share the allocator's settings and the heap.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
import contextlib
import functools
import multiprocessing
from typing import Any
import warnings

import numpy as np

from moe.bench.layer import Calls, Case
from moe.machine.allocator import keep_freed_memory

# The implementation of its experts, and whether its process keeps freed memory as ours does; torch
# leaves the C library's settings alone.
VARIANTS = {
    "transformers eager": ("eager", False),
    "transformers grouped_mm": ("grouped_mm", False),
    "transformers grouped_mm, memory kept": ("grouped_mm", True),
}

# In the block's process: the block and its input.
block: Any
x: Any


@contextlib.contextmanager
def mixtral(case: Case, x_TD: np.ndarray, variant: str) -> Iterator[Calls]:
    """The block's calls, which work during the `with` block; each returns when it is done.

    The backward pass is with respect to the weights and x (T, D). variant: one of VARIANTS.
    """
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, start, _build, (case, x_TD, *VARIANTS[variant])) as process:
        run = functools.partial(_call, process)
        yield Calls(functools.partial(run, _forward), functools.partial(run, _forward_backward))


def _call(process: ProcessPoolExecutor, function: Callable) -> None:
    process.submit(function).result()


def _build(case: Case, x_TD: np.ndarray, experts: str, keep: bool) -> None:
    global block, x
    if keep:
        keep_freed_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch
        import torch
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    config = MixtralConfig(
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=case.k,
    )
    config._experts_implementation = experts
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for value in block.parameters():
            value.normal_(std=case.width**-0.5)
    x = torch.from_numpy(x_TD)[None].requires_grad_()


def _forward() -> None:
    import torch

    with torch.no_grad():
        (block(x) * x).sum().item()


def _forward_backward() -> None:
    block.zero_grad(set_to_none=True)
    x.grad = None
    (block(x) * x).sum().backward()
