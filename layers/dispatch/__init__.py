"""Dispatchers move tokens to experts and back, as a decision says; they decide nothing."""

from layers.dispatch.base import Dispatcher, Overflow, as_soft_slots, fitted
from layers.dispatch.one_hot import OneHotEinsum
from layers.dispatch.slot_gather import SlotGather
from layers.dispatch.sorted import Sorted

__all__ = [
    "Dispatcher",
    "OneHotEinsum",
    "Overflow",
    "SlotGather",
    "Sorted",
    "as_soft_slots",
    "fitted",
]
