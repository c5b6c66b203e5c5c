"""What it costs to decode with a model, over batch sizes.

B sequences, T tokens of a sequence, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from moe.inference.decoder import Caches, Decoder
from moe.inference.sampling import Sampling

BATCHES = (1, 4, 16, 64)
PREFILLS = 3


class Machine(NamedTuple):
    """What it does at most: bytes per second of a copy, FLOPs per second of a large matmul."""

    bandwidth: float
    peak: float


def decode(
    decoder: Decoder,
    document_id: int,
    length: int,
    flops: float,
    machine: Machine,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """A row for each batch size of texts that the model itself draws, token by token.

    Args:
        decoder: of the model.
        document_id: the token that begins a text.
        length: T, of prompts in halves and of texts in whole.
        flops: of a token.
        machine: for the roofline.
        say: is told what is being measured.
    """
    for batch in BATCHES:
        say(f"batch of {batch}: drawing {length} tokens of each text")
        token_BT, seconds, distinct, caches = drawn(decoder, document_id, batch, length)
        say(f"batch of {batch}: prefill")
        prefill = prefill_seconds(decoder, token_BT[:, : max(1, length // 2)], length)
        weights, keys = weight_bytes(decoder, distinct), cache_bytes(caches)
        reading, computing = (weights + keys) / machine.bandwidth, batch * flops / machine.peak
        yield {
            "batch": batch,
            "prompt_tokens": max(1, length // 2),
            "prefill_milliseconds": 1e3 * prefill,
            "prefill_tokens_per_second": batch * max(1, length // 2) / prefill,
            "milliseconds_per_step": 1e3 * seconds,
            "tokens_per_second": batch / seconds,
            "distinct_experts_per_layer": distinct,
            "weight_bytes_per_token": round(weights / batch),
            "cache_bytes_per_token": round(keys / (batch * length)),
            "milliseconds_predicted": 1e3 * max(reading, computing),
            "bandwidth_roofline_fraction": reading / seconds,
        }


def drawn(decoder: Decoder, document_id: int, batch: int, length: int):
    """Texts (B, T), the median seconds of a step, the experts that a step reads, and the cache.

    The experts are the mean over steps of those that some text uses, for each sparse layer.
    """
    draw, key = jax.jit(Sampling().draw), jax.random.key(0)
    token_B, length_B = np.full(batch, document_id, np.int32), np.ones(batch, np.int32)
    logits_BV, caches = decoder.prefill(token_B[:, None], length_B, length)
    texts, times, distinct = [token_B], [], []
    for place in range(1, length):
        texts.append(np.asarray(draw(logits_BV, jax.random.fold_in(key, place))))
        started = time.perf_counter()
        logits_BV, caches, used = decoder.step(caches, texts[-1], place * length_B)
        jax.block_until_ready(logits_BV)
        times.append(time.perf_counter() - started)
        distinct.append([int(used_BE.any(0).sum()) for used_BE in map(np.asarray, used)])
    usual = statistics.median(times[1:] or times)  # the first one compiles
    return np.stack(texts, axis=1), usual, np.mean(distinct, axis=0).tolist(), caches


def prefill_seconds(decoder: Decoder, token_BT: np.ndarray, slots: int) -> float:
    """The fastest of a few prefills, after one that compiles."""
    length_B, times = np.full(len(token_BT), token_BT.shape[1], np.int32), []
    for _ in range(PREFILLS + 1):
        started = time.perf_counter()
        jax.block_until_ready(decoder.prefill(jnp.asarray(token_BT), length_B, slots)[0])
        times.append(time.perf_counter() - started)
    return min(times[1:])


def weight_bytes(decoder: Decoder, distinct: list[float]) -> float:
    """The bytes of weights that a step reads, with so many experts in each sparse layer.

    All but those of other experts, and of an embedding that isn't the head too, of which a step
    reads a row for each text.
    """
    left = iter(distinct)
    total = sum(a.nbytes for name, a in decoder.values.rest.items() if not decoder.looked_up(name))
    for number, arrays in enumerate(decoder.values.layers):
        experts = decoder.expert_arrays(number)
        of_experts = sum(arrays[name].nbytes / len(arrays[name]) for name in experts)
        total += sum(a.nbytes for name, a in arrays.items() if name not in experts)
        total += of_experts * (next(left) if decoder.is_moe(number) else 0)
    return total


def cache_bytes(caches: Caches) -> int:
    """The bytes of all keys and values."""
    return sum(c.attention.key_BSNK.nbytes + c.attention.value_BSNK.nbytes for c in caches)


def draw(rows: list[dict], path: Path) -> None:
    """Draw tokens/s over the texts of a step, a line for each model; dotted, what peaks allow."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        own = [row for row in rows if row["model"] == name]
        texts = [row["batch"] for row in own]
        axis.plot(texts, [r["tokens_per_second"] for r in own], "o-", color=f"C{i}", label=name)
        least = [1e3 * row["batch"] / row["milliseconds_predicted"] for row in own]
        axis.plot(texts, least, ":", color=f"C{i}", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="texts in a step", ylabel="tokens per second")
    axis.set_title("Decoding (dotted: by the machine's copy and matmul rates)", fontsize=11)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
