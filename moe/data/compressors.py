"""Baselines for a language model: bits per byte of compressors and of token frequencies.

A compressor's figure is conditional on the training text, as a model's is: 8 (C(train + val) -
C(train)) / |val|, where C is the size of the compressed text in bytes. Of larger corpora (over
14 MiB of training text, 2 MiB held out) a sample of the documents is compressed.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
import dataclasses
import functools
import hashlib
import json
import lzma
import time
from typing import TYPE_CHECKING
import zlib

import numpy as np

from moe.data.corpora.split import Split
from moe.data.shards import ShardSplit
from moe.data.text import PreparedData
from moe.data.tokens.sealed import read_sealed, write_sealed
from moe.errors import UserError

if TYPE_CHECKING:
    from routing.training_text import TokenSequence

MAX_DICTIONARY = 1 << 24  # bytes, in all that is compressed
VERSION = 3  # raise when a figure's definition changes
# A sample of larger corpora bounds the time and memory: xz takes a second for each 2 MB, and 11
# bytes of memory per byte of text.
MOST_TRAINING, MOST_VALIDATION = 14 << 20, 2 << 20
Say = Callable[[str], None]


def baselines(data: PreparedData, say: Say = lambda line: None) -> dict[str, float]:
    """Bits per byte of the validation split by `unigram` (of the run's tokens), `gzip` and `xz`.

    The compressors' figures are cached by the hashes of the two splits.
    """
    unigram = unigram_baseline(
        data.train.token_N,
        data.validation.token_N,
        vocab_size=data.tokenizer.vocab_size,
        document_id=data.tokenizer.document_id,
        validation_bytes=data.info.validation_bytes,
    )
    key = [VERSION, data.train_split.sha256, data.validation_split.sha256]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = data.cache_dir / "baselines" / f"{name}.json.sealed"
    if cached := read_sealed(path, say):
        known = json.loads(cached)
    else:
        split = data.train_split
        make = split.sample if isinstance(split, ShardSplit) else functools.partial(sample, split)
        train = make(MOST_TRAINING)
        validation = sample(data.validation_split, MOST_VALIDATION)
        say(f"compressing {(len(train) + len(validation)) / 1e6:,.1f} MB for comparison")
        known = compressor_baselines(train, validation, say)
        write_sealed(path, json.dumps(known).encode())
    return {"unigram": unigram} | known


def sample(split: Split, most: int) -> bytes:
    """The concatenated texts of a split; where they exceed `most` bytes, of a sample of that size.

    Documents are chosen in a fixed random order: the first ones may be of a single folder, or of a
    single corpus of a mixture.
    """
    chosen_M = np.flatnonzero(split.chosen)
    size_M = np.array([split.entries[int(m)].num_bytes for m in chosen_M], np.int64)
    order_M = np.random.default_rng(0).permutation(len(chosen_M))
    enough = np.searchsorted(np.cumsum(size_M[order_M]), most) + 1
    sampled = np.zeros(len(split.chosen), bool)
    sampled[chosen_M[order_M[:enough]]] = True
    texts = dataclasses.replace(split, chosen=sampled.tolist()).texts()
    return b"".join(text.encode("utf-8") for text in texts)[:most]


def unigram_baseline(
    train_N: "TokenSequence",
    validation_N: "TokenSequence",
    *,
    vocab_size: int,
    document_id: int,
    validation_bytes: int,
) -> float:
    """Bits per byte of the add-one smoothed token frequencies of the training split.

    Document tokens are left out: no model is asked to predict them at evaluation.
    """
    train_V, validation_V = (counts(token_N, vocab_size) for token_N in (train_N, validation_N))
    train_V, validation_V = (np.delete(count_V, document_id) for count_V in (train_V, validation_V))
    bits_V = -np.log2((train_V + 1) / (train_V + 1).sum())
    return float(validation_V @ bits_V / validation_bytes)


def counts(token_N: "TokenSequence", vocab_size: int) -> np.ndarray:
    """The number of occurrences of each token, int64 (V,); the stream is read in pieces."""
    count_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(token_N), 1 << 22):
        count_V += np.bincount(token_N[start : start + (1 << 22)], minlength=vocab_size)
    return count_V


def compressor_baselines(
    train_bytes: bytes, validation_bytes: bytes, say: Say = lambda line: None
) -> dict[str, float]:
    """Conditional bits per byte by `gzip` (level 9) and `xz` (preset 9, dictionary over all text).

    About 6 s for 11 MB on two cores.
    """
    if not validation_bytes:
        raise UserError("the validation text is empty: there is nothing to compress")
    both = train_bytes + validation_bytes
    with ThreadPoolExecutor(3) as pool:  # the compressors release the interpreter's lock
        jobs = {
            "gzip": pool.submit(_gzip_extra, train_bytes, validation_bytes),
            "xz of all": pool.submit(_xz_size, both, len(both)),
            "xz of the training text": pool.submit(_xz_size, train_bytes, len(both)),
        }
        names = {job: name for name, job in jobs.items()}
        started = time.monotonic()
        for number, job in enumerate(as_completed(names), start=1):
            if (seconds := time.monotonic() - started) > 5:
                say(f"compressed {number} of {len(jobs)}: {names[job]}, {seconds:.0f} s")
    xz = jobs["xz of all"].result() - jobs["xz of the training text"].result()
    extra = {"gzip": jobs["gzip"].result(), "xz": xz}
    return {name: 8 * size / len(validation_bytes) for name, size in extra.items()}


def _gzip_extra(train: bytes, validation: bytes) -> int:
    """Compressed bytes that the validation text adds to the training text's.

    Copying the compressor spares a second pass over the training text.
    """
    compressor = zlib.compressobj(9)
    compressor.compress(train)
    alone = compressor.copy()
    more = compressor.compress(validation)
    return len(more) + len(compressor.flush()) - len(alone.flush())


def _xz_size(text: bytes, span: int) -> int:
    """Bytes of the raw LZMA2 stream (no container), with a dictionary that holds `span` bytes."""
    size = min(max(4096, 1 << (span - 1).bit_length()), MAX_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters))
