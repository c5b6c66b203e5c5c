"""Imports every gin-configurable of the house, so that a config is checked against all of them.

A new module with a configurable gets its line here; tests/test_packaging.py looks for it.
"""

from layers import (
    attention,
    block,
    cheap_experts,
    dispatch,
    feed_forward,
    moe_layer,
    neuron_experts,
    norms,
    positions,
    segmented_experts,
)
from moe import (
    corpus,
    eval_command,
    loggers,
    mixture,
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
    balance_losses,
    balancers,
    base,
    capacity,
    controls,
    depths,
    dselect_k,
    expert_choice,
    gshard,
    hash,
    hash_tables,
    hierarchical,
    losses,
    merging,
    multi_hash,
    noisy_top_k,
    product_keys,
    remoe,
    sampled,
    sinkhorn,
    soft_choice,
    soft_moe,
    strictly_balanced,
    switch,
    top_k,
    v_moe,
)
