"""Imports every gin-configurable of the house, so that a config is checked against all of them.

A new module with a configurable gets its line here; tests/test_packaging.py looks for it.
"""

from layers import attention, block, dispatch, feed_forward, moe_layer, norms, positions
from moe import (
    corpus,
    eval_command,
    model,
    objective,
    optimizer,
    schedules,
    sharding,
    text_data,
    tokenizer,
    train,
)
from routing import (
    balancers,
    capacity,
    controls,
    expert_choice,
    hash,
    losses,
    soft_moe,
    switch,
    top_k,
)
