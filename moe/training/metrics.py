"""A step's metrics: at most 40 numbers, and a word for the routing. L sparse layers, E experts."""

import dataclasses
import math

import numpy as np

from moe.model.flops import Costs

MOST_SCALARS = 40
# The kinds of decisions, by which `health` judges.
CHOICES, NEURONS, SOFT, MERGED, DENSE = "choices", "neurons", "soft", "merged", "dense"
LEAST = 20  # mean assignments per expert; with fewer, an expert may be empty by chance


@dataclasses.dataclass(frozen=True)
class Routing:
    """One step's routing on the host, as arrays over layers (L) and experts (E)."""

    count_LE: np.ndarray
    kept_LE: np.ndarray
    score_LE: np.ndarray
    entropy_L: np.ndarray
    logit_size_L: np.ndarray
    losses_L: dict[str, np.ndarray]
    tokens: int

    @classmethod
    def of(cls, routers) -> "Routing":
        """From a RouterOutput whose arrays are on the host."""
        stats = routers.stats
        token_L = np.maximum(np.asarray(stats.token_count), 1)
        tokens = int(token_L.max())
        return cls(
            count_LE=np.asarray(stats.count_E),
            kept_LE=np.asarray(stats.kept_E),
            score_LE=np.asarray(stats.score_sum_E) / token_L[:, None],
            entropy_L=np.asarray(stats.entropy_sum) / token_L,
            logit_size_L=np.sqrt(np.asarray(stats.logit_square_sum) / token_L),
            losses_L={name: np.asarray(value) for name, value in routers.losses.items()},
            tokens=tokens,
        )

    @property
    def load_L(self) -> np.ndarray:
        """The largest load over the mean, before drops: 1 is even, E is collapse, 0 no choices."""
        return self.count_LE.max(1) / np.maximum(self.count_LE.mean(1), 1e-9)

    @property
    def dropped_L(self) -> np.ndarray:
        """The share of assignments that were dropped; 0 in a layer without choices."""
        chosen_L = self.count_LE.sum(1)
        return (chosen_L - self.kept_LE.sum(1)) / np.maximum(chosen_L, 1)

    @property
    def dead(self) -> int:
        """The number of experts, over all layers, with less than 1 % of the mean load.

        Only layers with at least `LEAST` assignments per expert on average count.
        """
        mean_L1 = self.count_LE.mean(1, keepdims=True)
        return int(((self.count_LE < 0.01 * mean_L1) & (mean_L1 >= LEAST)).sum())

    @property
    def skewed(self) -> bool:
        """Whether an expert has over twice its layer's mean load, by more than chance.

        That is, by more than four standard deviations of a count with that mean.
        """
        mean_L = self.count_LE.mean(1)
        return bool((self.count_LE.max(1) > 2 * mean_L + 4 * np.sqrt(mean_L)).any())

    def kept_per_token(self, experts: int | None = None) -> float:
        """The mean number of kept assignments per token and layer, to the first `experts`."""
        return float(self.kept_LE[:, :experts].sum() / (self.tokens * len(self.kept_LE)))

    def arrays(self, step: int) -> dict:
        """The step's arrays (L, E) and (L,) as lists, for reports and notebooks."""
        return {
            "step": step,
            "tokens": self.tokens,
            "count": self.count_LE.tolist(),
            "kept": self.kept_LE.tolist(),
            "score": np.round(self.score_LE, 6).tolist(),
            "entropy": np.round(self.entropy_L, 6).tolist(),
        }


def health(routing: Routing | None, kind: str = CHOICES) -> str:
    """One word for the routing, that of the worst layer (docs/metrics.md).

    For CHOICES of experts, by tokens or by experts: idle (no token reached an expert), dead (an
    expert has less than 1 % of the mean load), dropping (over 10 % of the assignments were
    dropped), skewed (an expert has over twice the mean load), or balanced; dead and skewed only
    beyond chance. NEURONS, SOFT slots and MERGED experts, without loads to judge, get their kind.
    """
    if routing is None:
        return DENSE
    if kind != CHOICES:
        return kind
    if (routing.count_LE.sum(1) == 0).any():
        return "idle"
    if routing.dead:
        return "dead"
    if routing.dropped_L.max() > 0.1:
        return "dropping"
    return "skewed" if routing.skewed else "balanced"


def load_scalars(routing: Routing) -> dict[str, float]:
    """Load and drops, mean and worst over the layers with choices; empty where there are none."""
    chose_L = routing.count_LE.sum(1) > 0
    if not chose_L.any():
        return {}
    load_L, dropped_L = routing.load_L[chose_L], routing.dropped_L[chose_L]
    return {
        "max_over_mean": float(load_L.mean()),
        "max_over_mean_worst": float(load_L.max()),
        "dropped": float(dropped_L.mean()),
        "dropped_worst": float(dropped_L.max()),
    }


def routing_scalars(
    routing: Routing, coefficients: dict[str, float], kind: str = CHOICES
) -> dict[str, float]:
    """The routing's metrics by name, as the mean and the worst over layers.

    Args:
        routing: of a step.
        coefficients: of the router losses, by name.
        kind: as in `health`; dead experts are counted for CHOICES alone.
    """
    out = {
        **{f"load/{name}": value for name, value in load_scalars(routing).items()},
        **({"load/dead_experts": routing.dead} if kind == CHOICES else {}),
        "router/entropy": routing.entropy_L.mean(),
        "router/entropy_worst": routing.entropy_L.min(),
        "router/logit_size": routing.logit_size_L.mean(),
        "router/logit_size_worst": routing.logit_size_L.max(),
    }
    for name, value_L in routing.losses_L.items():
        out[f"router_loss/{name}"] = value_L.mean()
        out[f"router_loss/{name}_worst"] = value_L.max()
        out[f"router_loss_scaled/{name}"] = coefficients[name] * value_L.sum()
    return {name: float(value) for name, value in out.items()}


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of text, from the summed nats of its tokens: comparable across tokenizers."""
    return nats / math.log(2) / num_bytes


def speed_scalars(
    tokens: int, seconds: float, costs: Costs, kept_per_token: float | None, peak: float
) -> dict[str, float]:
    """Tokens per second, seconds per step, and utilisation of the peak FLOPs.

    Effective utilisation counts only assignments that were kept. peak: FLOPs per second.
    """
    rate = tokens / seconds
    kept = costs.experts_per_token if kept_per_token is None else kept_per_token
    return {
        "speed/tokens_per_second": rate,
        "speed/step_seconds": seconds,
        "speed/utilisation": rate * costs.flops_per_token / peak,
        "speed/effective_utilisation": rate * costs.flops_with(kept) / peak,
    }


def bounded(scalars: dict[str, float]) -> dict[str, float]:
    """At most `MOST_SCALARS` of a step's numbers.

    Of router losses beyond them, the last losses' scaled values go first, then the values of their
    worst layers, then their means.
    """
    losses = [name for name in reversed(scalars) if name.startswith("router_loss")]
    scaled = [name for name in losses if name.startswith("router_loss_scaled/")]
    worst = [name for name in losses if name.endswith("_worst")]
    means = [name for name in losses if name not in scaled and name not in worst]
    gone = [*scaled, *worst, *means][: max(len(scalars) - MOST_SCALARS, 0)]
    return {name: value for name, value in scalars.items() if name not in gone}
