"""Who goes where: routing algorithms. They decide and never move data."""

from routing.balancers import Balancer, BiasBalancer
from routing.capacity import Capacity, slots_per_expert
from routing.controls import Balanced, UniformRandom
from routing.expert_choice import ExpertChoiceRouter
from routing.hash import RandomHash
from routing.losses import BalanceLoss, EntropyLoss, RouterLoss, ZLoss
from routing.parameters import RouterState, initialize, parameter, router_state
from routing.records import (
    Causality,
    Decision,
    ExpertChoice,
    RouterInputs,
    RouterOutput,
    RouterStats,
    Routing,
    Sizes,
    SoftSlots,
    TokenChoice,
    WholeStep,
    choices_GE,
)
from routing.router import Router
from routing.soft_moe import SoftMoE
from routing.switch import Switch
from routing.top_k import TopK

__all__ = [
    "BalanceLoss",
    "Balanced",
    "Balancer",
    "BiasBalancer",
    "Capacity",
    "Causality",
    "Decision",
    "EntropyLoss",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "RandomHash",
    "Router",
    "RouterInputs",
    "RouterLoss",
    "RouterOutput",
    "RouterState",
    "RouterStats",
    "Routing",
    "Sizes",
    "SoftMoE",
    "SoftSlots",
    "Switch",
    "TokenChoice",
    "TopK",
    "UniformRandom",
    "WholeStep",
    "ZLoss",
    "choices_GE",
    "initialize",
    "parameter",
    "router_state",
    "slots_per_expert",
]
