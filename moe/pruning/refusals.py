"""Which models can lose experts: a line for a user whose model can't, with the reason."""

from layers.experts.base import ChosenCompanion
from layers.moe_layer import MoELayer
from moe.errors import UserError
from moe.training.abstract_model import AbstractModel


def check_model(model: AbstractModel) -> None:
    """Raise UserError where experts can't be taken out of a model one by one.

    They can where a token's choice compares scores of which each is one expert's own
    (`Router.needs_all_experts` is None), and where experts show their outputs slot by slot, so that
    these can be measured.
    """
    layers = model.module.moe_layers_of_units()
    if not layers:
        raise UserError("the run is dense: there are no experts to take away")
    if model.module.depth_router is not None:
        who = type(model.module.depth_router).__name__
        raise UserError(f"{who}: experts behind a router of depths can't be taken away")
    for layer in layers:
        if (reason := reason_of(layer)) is not None:
            raise UserError(f"{reason[0]} can't do without some of its experts: {reason[1]}")


def reason_of(layer: MoELayer) -> tuple[str, str] | None:
    """What of a layer needs all of its experts, and why; None where nothing does."""
    if layer.router.needs_all_experts is not None:
        return type(layer.router).__name__, layer.router.needs_all_experts
    for companion in layer.companions:
        if isinstance(companion, ChosenCompanion):
            why = "the router chooses among its members, too, which are numbered after the experts"
            return type(companion).__name__, why
        if companion.needs_slots:
            return type(companion).__name__, "it stands in for the experts that were not chosen"
    if not layer.experts.shows_slots:
        return type(layer.experts).__name__, "they don't show what each expert adds to a token"
    return None


def experts_of(model: AbstractModel) -> int:
    """How many experts each layer has; UserError where layers have different numbers."""
    there = sorted({layer.num_experts for layer in model.module.moe_layers_of_units()})
    if len(there) != 1:
        raise UserError(f"its layers have different numbers of experts: {there}")
    return there[0]


def check_sizes(model: AbstractModel, sizes: list[int]) -> None:
    """Raise UserError for numbers of experts that can't be kept of a model's."""
    there = experts_of(model)
    for size in sizes:
        if not 1 <= size <= there:
            raise UserError(
                f"--experts={size}: each layer has {there} experts; choose 1 to {there}"
            )


def check_smaller(model: AbstractModel, size: int) -> None:
    """Raise UserError where a model that was built for `size` experts has another number."""
    if any(layer.num_experts != size for layer in model.module.moe_layers_of_units()):
        raise UserError(
            "the run's config sets MoELayer.num_experts in a scope; without the scope "
            "`moe prune` could change it"
        )
