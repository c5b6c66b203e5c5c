"""Greedy, beams, draws and people: how likely their texts are to a model, and how they repeat.

    python benchmarks/ways_of_decoding.py --workdir=runs/quickstart --json=OUT.json

Continuations of the beginnings of held-out documents, of a trained run. The most likely texts are
not those that people write (Holtzman et al. 2020): greedy texts and beams fall into repetition.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from moe.cli import config
from moe.inference.beams import BeamSearch
from moe.inference.decoder import Decoder
from moe.inference.generate import Generator
from moe.inference.sampling import Sampling
from moe.runs.restore import Restored, restore_run

TEXTS, PROMPT, TOKENS = 32, 24, 64
Text = tuple[list[int], list[int]]  # the tokens of a prompt, and those that follow it
DRAWS = {
    "greedy": Sampling(temperature=0),
    "top_p 0.5": Sampling(top_p=0.5),
    "top_p 0.9": Sampling(top_p=0.9),
    "temperature 1": Sampling(),
}


def documents(run: Restored) -> list[Text]:
    """The first tokens of held-out documents that are long enough, of each as many."""
    data, wanted = run.spec.prepare_data(), PROMPT + TOKENS
    token_N = np.asarray(data.validation.token_N)
    starts = np.flatnonzero(token_N == run.tokenizer.document_id) + 1
    long = [s for s, e in zip(starts, [*starts[1:], len(token_N)], strict=True) if e - s > wanted]
    cut = [token_N[s : s + wanted].tolist() for s in long[:TEXTS]]
    return [(text[:PROMPT], text[PROMPT:]) for text in cut]


def likelihoods(run: Restored, texts: list[Text]) -> list[float]:
    """The mean log-probability of each text's new tokens, in nats."""
    longest, found = run.model.sequence_length, []

    @jax.jit
    def log_probs_TV(token_1T):
        module = run.model.graph.merge(run.params, run.router_state)
        return jax.nn.log_softmax(module.logits(module(token_1T).hidden_BTD)[0])

    for prompt, new in texts:
        whole = [run.tokenizer.document_id, *prompt, *new][:longest]
        token_1T = np.asarray([whole + [0] * (longest - len(whole))], np.int32)
        own_TV = np.asarray(log_probs_TV(token_1T))
        found.append(float(np.mean([own_TV[len(prompt) + i, t] for i, t in enumerate(new)])))
    return found


def repeated(text: list[int], size: int = 4) -> float:
    """The share of the runs of `size` tokens that stand earlier in the text, too."""
    runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: list[list[int]], size: int = 2) -> float:
    """The share of different ones among the pairs of tokens of all texts."""
    pairs = [tuple(t[i : i + size]) for t in texts for i in range(len(t) - size + 1)]
    return len(set(pairs)) / len(pairs)


def row(run: Restored, name: str, texts: list[Text]) -> dict:
    texts = [(prompt, new) for prompt, new in texts if new]
    new = [new for _, new in texts]
    return {
        "texts": name,
        "nats_per_token": -float(np.mean(likelihoods(run, texts))),
        "repeated_4_grams": float(np.mean([repeated(text) for text in new])),
        "distinct_pairs": distinct(new),
        "tokens": float(np.mean([len(text) for text in new])),
    }


def measured(run: Restored):
    """A row for people's texts, and for each way of decoding."""
    people = documents(run)
    yield row(run, "people", people)
    texts = [run.tokenizer.decode(prompt) for prompt, _ in people]
    prompts = run.tokenizer.encode_batch(texts)
    generator = Generator(run.model, run.params, run.router_state, run.tokenizer)
    for name, sampling in DRAWS.items():
        found = generator.continuations(texts, tokens=TOKENS, sampling=sampling)
        yield row(run, name, [(p, list(f.tokens)) for p, f in zip(prompts, found, strict=True)])
    decoder = Decoder(run.model.graph, run.params, run.router_state)
    end, context = run.tokenizer.document_id, run.model.sequence_length
    search, best = BeamSearch(8, alpha=0.0), []
    for prompt in prompts:
        found = search(decoder, [end, *prompt], end, tokens=TOKENS, context=context)
        best.append((prompt, list(found[0].tokens)))
    yield row(run, "8 beams", best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--json", type=Path, required=True)
    given, rows = parser.parse_args(), []
    run = restore_run(given.workdir, config.of_folder(given.workdir))
    for found in measured(run):
        rows.append(found)
        print(found, flush=True)
    given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
