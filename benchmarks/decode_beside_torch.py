"""Greedy decoding at batch 1 beside transformers' generate of the same weights, on this CPU.

    python benchmarks/decode_beside_torch.py --json=benchmarks/results/decode_beside_torch.json

Needs the extra `oracle` (torch and transformers). Two models with random weights in float32: the
quickstart's, as a Mixtral, and a small one of OLMoE's shape, as a Qwen3-MoE, whose attention norms
are per head, as ours. Both programs get the same weights and prompt, and take turns; each has its
own process. transformers uses its static cache, and is taken in every way that it computes experts.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
import json
import multiprocessing
from pathlib import Path
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch_generate

from moe.bench import decode, layer
from moe.cli import config
from moe.data.tokens.tokenizer import ByteTokenizer
from moe.inference.decoder import Decoder, texts_of
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.machine import allocator, hardware
from moe.model import functional
from moe.training.abstract_model import Vocabulary

VOCABULARY, PROMPT, NEW, ROUNDS = 4096, 64, 64, 7
# transformers' way of computing experts, and whether generate compiles the step.
WAYS = {
    "eager": ("eager", False),
    "batched_mm": ("batched_mm", False),
    "grouped_mm": ("grouped_mm", False),
    "batched_mm, compiled": ("batched_mm", True),
}
OLMOE = """
Transformer.d_model = 512
Transformer.num_layers = 8
Transformer.num_heads = 4
Transformer.compute_dtype = 'float32'
MoELayer.d_ff = 256
"""
MODELS = {
    "quickstart": (["quickstart.gin"], ["TopK.renormalise = True"], "Mixtral"),
    "olmoe, small": (
        ["quickstart.gin", "models/olmoe_1b_7b.gin", "routers/olmoe.gin"],
        OLMOE.strip().splitlines(),
        "Qwen3Moe",
    ),
}


def settings(spec, family: str) -> dict:
    """What transformers' config needs to be the same model."""
    module = spec.build_model(Vocabulary(VOCABULARY)).module
    block = module.stacks[0].unit.blocks[0]
    width, heads, head_width = block.attention.query_DHK.shape[-3:]
    experts, _, hidden = block.feed_forward.experts.up_EDF.shape[-3:]
    found = {
        "class": family,
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": module.stacks[0].repeats,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_width,
        "num_experts_per_tok": block.router.k,
        "max_position_embeddings": 2 * (PROMPT + NEW),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    if family == "Mixtral":
        return found | {"intermediate_size": hidden, "num_local_experts": experts}
    return found | {
        "intermediate_size": hidden,
        "moe_intermediate_size": hidden,
        "num_experts": experts,
        "norm_topk_prob": False,
    }


class Ours:
    """Our program, with the interface of torch_generate."""

    def __init__(self, model, values):
        self.model, self.values = model, values
        self.generator = Generator(model, *values, ByteTokenizer(), PROMPT + NEW)
        self.sampling = Sampling(0.0, logit_bias=((ByteTokenizer().document_id, -np.inf),))

    def generate(self, prompt: str, tokens: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        drawn = list(self.generator.draws([prompt], tokens=tokens, sampling=self.sampling))
        return time.perf_counter() - start, [int(step.token_B[0]) for step in drawn]

    def logits(self, token_T: list[int]) -> np.ndarray:
        def whole(values, token_BT):
            module = self.model.graph.merge(*values)
            tokens = texts_of(token_BT, jnp.asarray([len(token_T)]))
            return module.logits(module(tokens).hidden_BTD)[0]

        return np.asarray(jax.jit(whole)(self.values, np.asarray([token_T], np.int32)))


def measured(name: str) -> dict:
    """Milliseconds of a prompt with one token, and of each token after it, ours and theirs."""
    files, bindings, family = MODELS[name]
    spec = config.load(files, bindings)
    model = spec.build_model(Vocabulary(VOCABULARY))
    values = jax.jit(lambda: functional.initial_values(model.graph, *model.shapes, 0))()
    arrays = {n: np.asarray(a) for n, a in values[0].items()}
    ours = Ours(model, values)
    prompt = "".join(map(chr, np.random.default_rng(0).integers(97, 123, PROMPT - 1)))
    token_T = [ByteTokenizer().document_id, *prompt.encode()]
    expected, (_, text) = ours.logits(token_T), ours.generate(prompt, NEW)
    rows = {}
    for way, (experts, compiled) in WAYS.items():
        start = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, start) as process:

            def theirs(function, *args, process=process):
                return process.submit(function, *args).result()

            theirs(torch_generate.build, settings(spec, family), arrays, experts, compiled)
            error = np.abs(theirs(torch_generate.logits, token_T) - expected).max()
            assert error < 2e-4 * np.abs(expected).max(), f"{way}: logits differ by {error}"
            theirs(torch_generate.generate, token_T, NEW)  # compiles where it does
            rounds = []
            for _ in range(ROUNDS):
                times = []
                for count in (1, NEW):
                    times.append(ours.generate(prompt, count)[0])
                    seconds, other = theirs(torch_generate.generate, token_T, count)
                    times.append(seconds)
                rounds.append(times)
            same = sum(a == b for a, b in zip(text, other, strict=True))
            rows[way] = row(np.array(rounds)) | {"greedy_tokens_equal": f"{same} of {NEW}"}
            rows[way]["versions"] = theirs(torch_generate.versions)
        print(name, way, rows[way], flush=True)
    return {"beside": rows} | reading(model, values, rows)


def row(seconds: np.ndarray) -> dict:
    """Medians over rounds; seconds: (round, [ours with 1 token, theirs, ours with all, theirs])."""
    steps = (seconds[:, 2:] - seconds[:, :2]) / (NEW - 1)
    found = {}
    for kind, values in (("prompt", seconds[:, :2]), ("token", steps)):
        ours, theirs = np.median(values, axis=0)
        found |= {
            f"milliseconds_{kind}_ours": round(1e3 * float(ours), 3),
            f"milliseconds_{kind}_theirs": round(1e3 * float(theirs), 3),
            f"times_theirs_{kind}": round(float(np.median(values[:, 0] / values[:, 1])), 3),
        }
    return found


def reading(model, values, rows: dict) -> dict:
    """What a token's weights take to be read once at the bandwidth of a copy."""
    decoder = Decoder(model.graph, *values)
    chosen = [float(b.router.k) for s in model.module.stacks for b in s.unit.blocks]
    distinct = chosen * model.module.stacks[0].repeats
    size = decode.weight_bytes(decoder, distinct)
    bandwidth = max(layer.copy_bandwidth() for _ in range(5))
    token = statistics.median(r["milliseconds_token_ours"] for r in rows.values())
    return {
        "weight_bytes_per_token": round(size),
        "copy_bandwidth": round(bandwidth),
        "milliseconds_to_read": round(1e3 * size / bandwidth, 3),
        "times_reading": round(token * bandwidth / size / 1e3, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--model", action="append", choices=MODELS)
    flags = parser.parse_args()
    allocator.keep_freed_memory()
    result = {"device": hardware.describe_device(), "jax": jax.__version__}
    for name in flags.model or MODELS:
        result[name] = measured(name)
    Path(flags.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
