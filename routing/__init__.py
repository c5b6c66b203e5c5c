"""Routing algorithms: they decide which tokens go to which experts, and never move data."""

from routing.algorithms.base import BASE
from routing.algorithms.controls import AllExperts, Balanced, FrozenTopK, UniformRandom, Zipf
from routing.algorithms.dselect_k import DSelectK
from routing.algorithms.expert_choice import ExpertChoiceRouter
from routing.algorithms.gshard import GShard
from routing.algorithms.hash import Hash
from routing.algorithms.hierarchical import Hierarchical, HierarchicalLoadLoss
from routing.algorithms.merging import SMEAR, Lory
from routing.algorithms.mixture_of_depths import MixtureOfDepths
from routing.algorithms.multi_hash import MultiHash
from routing.algorithms.noisy_top_k import NoisyTopK
from routing.algorithms.product_keys import ProductKeys
from routing.algorithms.remoe import ReMoE
from routing.algorithms.sampled import Sampled
from routing.algorithms.sinkhorn import Sinkhorn
from routing.algorithms.soft_choice import SoftChoice
from routing.algorithms.soft_moe import SoftMoE
from routing.algorithms.strictly_balanced import StrictlyBalanced
from routing.algorithms.switch import Switch
from routing.algorithms.top_k import TopK
from routing.algorithms.v_moe import VMoE
from routing.balance_losses import BalanceLoss, ImportanceLoss, LoadLoss
from routing.balancers import Balancer, BiasBalancer, QuantileBalancer, StepState
from routing.capacity import Capacity, slots_per_expert
from routing.inputs import Context, RouterInputs, Tokens, named_key
from routing.losses import EntropyLoss, RouterLoss, TermLoss, ZLoss
from routing.parameters import RouterState, initialize, parameter, router_state
from routing.records import (
    Causality,
    Decision,
    ExpertChoice,
    ExpertMerge,
    GlobalBatch,
    Policy,
    RouterOutput,
    RouterStats,
    Routing,
    Sizes,
    SoftSlots,
    TokenChoice,
    choices_GE,
    gates_GTE,
)
from routing.router import DepthRouter, Router
from routing.training_text import TrainingText

__all__ = [
    "BASE",
    "SMEAR",
    "AllExperts",
    "BalanceLoss",
    "Balanced",
    "Balancer",
    "BiasBalancer",
    "Capacity",
    "Causality",
    "Context",
    "DSelectK",
    "Decision",
    "DepthRouter",
    "EntropyLoss",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "ExpertMerge",
    "FrozenTopK",
    "GShard",
    "GlobalBatch",
    "Hash",
    "Hierarchical",
    "HierarchicalLoadLoss",
    "ImportanceLoss",
    "LoadLoss",
    "Lory",
    "MixtureOfDepths",
    "MultiHash",
    "NoisyTopK",
    "Policy",
    "ProductKeys",
    "QuantileBalancer",
    "ReMoE",
    "Router",
    "RouterInputs",
    "RouterLoss",
    "RouterOutput",
    "RouterState",
    "RouterStats",
    "Routing",
    "Sampled",
    "Sinkhorn",
    "Sizes",
    "SoftChoice",
    "SoftMoE",
    "SoftSlots",
    "StepState",
    "StrictlyBalanced",
    "Switch",
    "TermLoss",
    "TokenChoice",
    "Tokens",
    "TopK",
    "TrainingText",
    "UniformRandom",
    "VMoE",
    "ZLoss",
    "Zipf",
    "choices_GE",
    "gates_GTE",
    "initialize",
    "named_key",
    "parameter",
    "router_state",
    "slots_per_expert",
]
