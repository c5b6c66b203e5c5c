"""Imports every gin-configurable of the three packages, so that configs are checked against all.

A new module with a configurable gets its line here; tests/test_packaging.py checks that it has.
"""

from layers import attention, block, moe_layer, norms, positions
from layers.dispatch import one_hot, slot_gather, sorted
from layers.experts import (
    default_vectors,
    feed_forward,
    feed_forward_experts,
    latent,
    neurons,
    segmented,
    shared,
    zero_computation,
)
from moe.cli import eval
from moe.data import mixture, shards, text
from moe.data.corpora import corpus, hugging_face
from moe.data.tokens import tokenizer
from moe.model import sharding, transformer
from moe.runs.tracking import loggers
from moe.sweeps import spec
from moe.training import (
    bad_steps,
    corruption,
    distillation,
    objective,
    optimizer,
    precision,
    quantisation,
    run_spec,
    schedules,
)
from routing import balance_losses, balancers, capacity, losses
from routing.algorithms import (
    base,
    controls,
    dselect_k,
    expert_choice,
    gshard,
    hash,
    hierarchical,
    merging,
    mixture_of_depths,
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
from routing.solvers import hash_tables
