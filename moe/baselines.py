"""What bits per byte cost without learning a language model: the marks that a run must beat.

A compressor's figure is conditional, as a trained model's is: 8 (C(train + val) - C(train)) /
|val|, where C counts the bytes of the compressed text.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import hashlib
import json
import lzma
from pathlib import Path
import zlib

import numpy as np

from moe.errors import UserError
from moe.text_data import PreparedData
from moe.token_cache import write_atomically

MAX_DICTIONARY = 1 << 26  # xz needs 11 times as much memory, twice
VERSION = 1  # raise when a figure's definition changes


def baselines(data: PreparedData, say: Callable[[str], None] = lambda line: None):
    """Bits per byte of the validation split: `unigram` (over the run's tokens), `gzip`, `xz`."""
    say("compressing the corpus for comparison")
    text = [
        "".join(part.texts()).encode("utf-8") for part in (data.train_part, data.validation_part)
    ]
    unigram = unigram_baseline(
        data.train.token_N,
        data.validation.token_N,
        vocab_size=data.tokenizer.vocab_size,
        document_id=data.tokenizer.document_id,
        validation_bytes=data.info.validation_bytes,
    )
    return {"unigram": unigram} | compressor_baselines(*text, cache_dir=data.cache_dir)


def unigram_baseline(
    train_N: np.ndarray,
    validation_N: np.ndarray,
    *,
    vocab_size: int,
    document_id: int,
    validation_bytes: int,
) -> float:
    """Bits per byte of the add-one smoothed token frequencies of the training split.

    Document tokens are left out: no model is asked to predict them at evaluation.
    """
    train_V = np.bincount(train_N, minlength=vocab_size)
    validation_V = np.bincount(validation_N, minlength=vocab_size)
    train_V, validation_V = (np.delete(count_V, document_id) for count_V in (train_V, validation_V))
    bits_V = -np.log2((train_V + 1) / (train_V + 1).sum())
    return float(validation_V @ bits_V / validation_bytes)


def compressor_baselines(
    train_bytes: bytes, validation_bytes: bytes, cache_dir: Path | None = None
) -> dict[str, float]:
    """Conditional bits per byte of `gzip` (level 9) and `xz` (preset 9, dictionary over all).

    About 6 s for 11 MB on two cores; kept in the cache folder, where one is given.
    """
    if not validation_bytes:
        raise UserError("the validation text is empty: there is nothing to compress")
    path = None
    if cache_dir is not None:
        digests = [hashlib.sha256(text).hexdigest() for text in (train_bytes, validation_bytes)]
        name = hashlib.sha256(json.dumps([VERSION, *digests]).encode()).hexdigest()[:32]
        path = cache_dir / "baselines" / f"{name}.json"
        if (known := _read(path)) is not None:
            return known
    both = train_bytes + validation_bytes
    with ThreadPoolExecutor(3) as pool:  # the compressors release the interpreter's lock
        gzip = pool.submit(_gzip_extra, train_bytes, validation_bytes)
        xz_both = pool.submit(_xz_size, both, len(both))
        xz_train = pool.submit(_xz_size, train_bytes, len(both))
    extra = {"gzip": gzip.result(), "xz": xz_both.result() - xz_train.result()}
    result = {name: 8 * size / len(validation_bytes) for name, size in extra.items()}
    if path is not None:
        write_atomically(path, json.dumps(result).encode())
    return result


def _gzip_extra(train: bytes, validation: bytes) -> int:
    """Bytes that the validation text adds. The copy spares a second pass over the training text."""
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


def _read(path: Path) -> dict[str, float] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
