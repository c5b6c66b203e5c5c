"""What it costs to decode with a model, over batch sizes.

B sequences, T tokens of a sequence, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe.inference.decoder import Caches, Decoder
from moe.inference.sampling import Sampling

BATCHES = (1, 4, 16, 64)
PREFILLS = 3


def decode(
    decoder: Decoder,
    document_id: int,
    length: int,
    bandwidth: float,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """A row for each batch size of texts that the model itself draws, token by token.

    Args:
        decoder: of the model.
        document_id: the token that begins a text.
        length: T, of prompts in halves and of texts in whole.
        bandwidth: bytes per second of a copy, for the roofline.
        say: is told what is being measured.
    """
    for batch in BATCHES:
        say(f"batch of {batch}: drawing {length} tokens of each text")
        token_BT, seconds, distinct, caches = drawn(decoder, document_id, batch, length)
        say(f"batch of {batch}: prefill")
        prefill = prefill_seconds(decoder, token_BT[:, : max(1, length // 2)], length)
        weights, keys = weight_bytes(decoder, distinct), cache_bytes(caches)
        least = (weights + keys) / bandwidth
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
            "bandwidth_roofline_fraction": least / seconds,
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
