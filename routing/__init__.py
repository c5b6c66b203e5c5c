"""Who goes where: routing algorithms. They decide and never move data."""

from routing.balance_losses import BalanceLoss, ImportanceLoss, LoadLoss
from routing.balancers import Balancer, BiasBalancer, Memory, QuantileBalancer
from routing.base import BASE
from routing.capacity import Capacity, slots_per_expert
from routing.controls import AllExperts, Balanced, FrozenTopK, UniformRandom, Zipf
from routing.depths import MixtureOfDepths
from routing.dselect_k import DSelectK
from routing.expert_choice import ExpertChoiceRouter
from routing.gshard import GShard
from routing.hash import Hash
from routing.hierarchical import Hierarchical, HierarchicalLoadLoss
from routing.losses import EntropyLoss, RouterLoss, TermLoss, ZLoss
from routing.merging import SMEAR, Lory
from routing.multi_hash import MultiHash
from routing.noisy_top_k import NoisyTopK
from routing.parameters import RouterState, initialize, parameter, router_state
from routing.product_keys import ProductKeys
from routing.records import (
    Causality,
    Decision,
    ExpertChoice,
    ExpertMerge,
    Policy,
    RouterInputs,
    RouterOutput,
    RouterStats,
    Routing,
    Sizes,
    SoftSlots,
    TokenChoice,
    TrainingText,
    WholeStep,
    choices_GE,
    gates_GTE,
)
from routing.remoe import ReMoE
from routing.router import Router
from routing.sampled import Sampled
from routing.sinkhorn import Sinkhorn
from routing.soft_choice import SoftChoice
from routing.soft_moe import SoftMoE
from routing.strictly_balanced import StrictlyBalanced
from routing.switch import Switch
from routing.top_k import TopK
from routing.v_moe import VMoE

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
    "DSelectK",
    "Decision",
    "EntropyLoss",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "ExpertMerge",
    "FrozenTopK",
    "GShard",
    "Hash",
    "Hierarchical",
    "HierarchicalLoadLoss",
    "ImportanceLoss",
    "LoadLoss",
    "Lory",
    "Memory",
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
    "StrictlyBalanced",
    "Switch",
    "TermLoss",
    "TokenChoice",
    "TopK",
    "TrainingText",
    "UniformRandom",
    "VMoE",
    "WholeStep",
    "ZLoss",
    "Zipf",
    "choices_GE",
    "gates_GTE",
    "initialize",
    "parameter",
    "router_state",
    "slots_per_expert",
]
