"""From a step's measurements to at most 40 numbers and one word. L sparse layers, E experts."""

import dataclasses
import math

import numpy as np

from moe.flops import Costs

MOST_SCALARS = 40
HEALTH = ("balanced", "skewed", "dropping", "dead", "dense")


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
        """From a RouterOutput that was fetched from the device."""
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
        """Max over mean of what the routers chose: 1 is perfect, E is collapse."""
        return self.count_LE.max(1) / np.maximum(self.count_LE.mean(1), 1e-9)

    @property
    def dropped_L(self) -> np.ndarray:
        """The share of assignments that found no room."""
        return 1 - self.kept_LE.sum(1) / np.maximum(self.count_LE.sum(1), 1)

    @property
    def dead(self) -> int:
        """Experts, over all layers, with less than a hundredth of the mean load."""
        return int((self.count_LE < 0.01 * self.count_LE.mean(1, keepdims=True)).sum())

    def kept_per_token(self, experts: int | None = None) -> float:
        """Mean number of computed experts per token and layer; of the first so many experts."""
        return float(self.kept_LE[:, :experts].sum() / (self.tokens * len(self.kept_LE)))

    def arrays(self, step: int) -> dict:
        """The whole layer-by-expert picture of a step, for reports and notebooks."""
        return {
            "step": step,
            "tokens": self.tokens,
            "count": self.count_LE.tolist(),
            "kept": self.kept_LE.tolist(),
            "score": np.round(self.score_LE, 6).tolist(),
        }


def health(routing: Routing | None) -> str:
    """The worst thing to say of the routing: dead, dropping, skewed, or balanced.

    dead: an expert gets less than 1 % of the mean load; dropping: a layer drops over 10 %;
    skewed: a layer's fullest expert has over twice the mean load.
    """
    if routing is None:
        return "dense"
    if routing.dead:
        return "dead"
    if routing.dropped_L.max() > 0.1:
        return "dropping"
    return "skewed" if routing.load_L.max() > 2.0 else "balanced"


def routing_scalars(routing: Routing, coefficients: dict[str, float]) -> dict[str, float]:
    """Mean and worst over layers, whatever the number of layers and experts."""
    out = {
        "load/max_over_mean": routing.load_L.mean(),
        "load/max_over_mean_worst": routing.load_L.max(),
        "load/dropped": routing.dropped_L.mean(),
        "load/dropped_worst": routing.dropped_L.max(),
        "load/dead_experts": routing.dead,
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


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss in nats per token as bits per byte of text, so that tokenizers compare."""
    return nats_per_token / math.log(2) / bytes_per_token


def speed_scalars(
    tokens: int, seconds: float, costs: Costs, kept_per_token: float | None, peak: float
) -> dict[str, float]:
    """Tokens per second, utilisation, and effective utilisation: the FLOPs of kept work alone."""
    rate = tokens / seconds
    kept = costs.experts_per_token if kept_per_token is None else kept_per_token
    return {
        "speed/tokens_per_second": rate,
        "speed/step_seconds": seconds,
        "speed/utilisation": rate * costs.flops_per_token / peak,
        "speed/effective_utilisation": rate * costs.flops_with(kept) / peak,
    }
