"""`moe generate`: text from a run's checkpoint."""

import json
import math
from pathlib import Path
import sys
from typing import Any

from moe.cli import config
from moe.cli.weights import restored_with_weights
from moe.errors import UserError, printable
from moe.inference.beams import BeamSearch
from moe.inference.decoder import Decoder, reason_to_recompute
from moe.inference.drafts import Draft, Jacobi, Lookahead, Lookup, ModelDraft
from moe.inference.generate import Generator, check
from moe.inference.infill import MASK, ORDERS, Infiller
from moe.inference.sampling import Sampling
from moe.inference.speculative import Speculator
from moe.runs.restore import Restored, restore_run

TOKENS = 128  # that are added where nothing is said
LARGEST = 3.4e38  # of float32
DRAFTS = {"lookup": Lookup, "jacobi": Jacobi, "lookahead": Lookahead}


def run(flags) -> int:
    """Print the prompt with each of `--count` continuations; `--json` also writes them.

    The first one is printed as it is found.
    """
    if flags.beams and (flags.draft or flags.count > 1 or flags.best_of or flags.logit_bias):
        raise UserError(
            "--beams=N prints N texts; leave out --draft, --count, --best_of and --logit_bias"
        )
    if flags.draft == "":
        raise UserError(f"--draft= names nothing: a run's folder or {', '.join(DRAFTS)}")
    if flags.order not in ORDERS:
        raise UserError(f"--order={flags.order}: one of {', '.join(ORDERS)}")
    if flags.best_of and flags.draft:
        raise UserError("--best_of needs each text's likelihood; leave out --draft")
    if flags.best_of and flags.best_of < flags.count:
        raise UserError(f"--best_of={flags.best_of} are too few for --count={flags.count}")
    spec = config.of_folder(flags.workdir, imports=vars(flags)["import"])
    restored, weights = restored_with_weights(flags, spec)
    sampling = Sampling(
        *(flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty),
        logit_bias=tuple(_bias(given, restored) for given in flags.logit_bias),
    )
    prompts = [flags.prompt] * (flags.best_of or flags.count)
    flags.tokens = flags.tokens or _tokens(restored, flags)
    how = _beams if flags.beams else _drafted if flags.draft else _plain
    if MASK in flags.prompt and not restored.model.objective.causal:
        how = _infilled
    elif MASK in flags.prompt:
        print(f"moe generate: a model that continues texts reads {MASK} as text", file=sys.stderr)
    found = how(restored, prompts, sampling, flags)
    others = found["texts"][1:]
    print(printable("".join("\n" + "-" * 80 + "\n" + text for text in others)))
    if "held" in found:
        _report(found, flags.ahead)
    if flags.json:
        content = {"step": restored.step, "prompt": flags.prompt} | weights | found
        Path(flags.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _length(restored: Restored, flags) -> int:
    """Tokens of the prompt, with the one that begins every text."""
    (ids,) = restored.tokenizer.encode_batch([flags.prompt])
    return 1 + len(ids)


def _tokens(restored: Restored, flags) -> int:
    """How many tokens are added where nothing is said: drafts and beams stay within the context."""
    if not (flags.draft or flags.beams):
        return TOKENS
    context = flags.context or restored.model.sequence_length
    return max(1, min(TOKENS, context - _length(restored, flags)))


def _plain(restored: Restored, prompts: list[str], sampling: Sampling, flags):
    values = restored.params, restored.router_state
    generator = Generator(restored.model, *values, restored.tokenizer, flags.context)
    if generator.recomputes:
        why = f"each token takes a pass over the whole text: {generator.recomputes}"
        print(f"moe generate: {why}", file=sys.stderr)
    elif _length(restored, flags) + flags.tokens > generator.context + 1:
        why = f"beyond {generator.context} tokens each takes a pass over the last so many"
        print(f"moe generate: {why}", file=sys.stderr)
    given = {"tokens": flags.tokens, "sampling": sampling, "seed": flags.seed}
    if flags.best_of:  # which one is the first isn't known before all have ended
        found = generator.continuations(prompts, **given)
        found = sorted(found, key=lambda text: -text.mean_log_prob)[: flags.count]
        _say(found[0].text)
    else:
        found = generator.continuations(prompts, **given, say=_say)
    return {
        "texts": [text.text for text in found],
        "log_probs": [list(text.log_probs) for text in found],
    }


def _beams(restored: Restored, prompts: list[str], sampling: Sampling, flags):
    """The likeliest texts; how tokens would be drawn says nothing here."""
    context = _context(restored, flags)
    if why := reason_to_recompute(restored.model.module):
        raise UserError(f"beams need a cache, which this model has not: {why}")
    decoder = _decoder(restored)
    tokenizer = restored.tokenizer
    (ids,) = tokenizer.encode_batch(prompts)
    end = tokenizer.document_id
    given = {"tokens": flags.tokens, "context": context}
    found = BeamSearch(flags.beams)(decoder, [end, *ids], end, **given)
    texts = [tokenizer.decode([*ids, *hypothesis.tokens]) for hypothesis in found]
    _say(texts[0])
    return {
        "texts": texts,
        "log_probs": [hypothesis.log_prob for hypothesis in found],
        "scores": [hypothesis.score for hypothesis in found],
    }


def _drafted(restored: Restored, prompts: list[str], sampling: Sampling, flags):
    context = _context(restored, flags)
    speculator = Speculator(
        _decoder(restored),
        restored.tokenizer,
        context,
        _draft(restored, sampling, context, flags),
        ahead=flags.ahead,
        sampling=sampling,
    )
    found = speculator.continuations(prompts, tokens=flags.tokens, seed=flags.seed, say=_say)
    return {
        "texts": found.texts,
        "steps": found.steps,
        "held": found.held,
        "experts": found.experts,
    }


def _infilled(restored: Restored, prompts: list[str], sampling: Sampling, flags):
    """Each text with its masks filled in, by seeds from `--seed` on."""
    if flags.beams or flags.draft or flags.best_of:
        raise UserError(
            f"{MASK} is filled in token by token; leave out --beams, --draft, --best_of"
        )
    values = restored.params, restored.router_state
    infiller = Infiller(restored.model, *values, restored.tokenizer, flags.order, sampling)
    found = [infiller.fill(text, seed=flags.seed + i) for i, text in enumerate(prompts)]
    _say(found[0].text)
    return {
        "texts": [filled.text for filled in found],
        "log_probs": [list(filled.log_probs) for filled in found],
        "orders": [list(filled.order) for filled in found],
    }


def _bias(given: str, restored: Restored) -> tuple[int, float]:
    """(token id, number) of `TOKEN:X`, where TOKEN is an id or the text of one token."""
    token, colon, number = given.rpartition(":")
    try:
        bias = float(number)
    except ValueError:
        bias = math.nan
    if not (colon and token) or math.isnan(bias) or bias > LARGEST:
        raise UserError(f"--logit_bias={given!r}: expected TOKEN:X, such as 17:-inf or ' def:2.5'")
    size = restored.tokenizer.vocab_size
    if token.isdecimal():
        if int(token) >= size:
            raise UserError(f"--logit_bias={given!r}: token ids are below {size}")
        return int(token), bias
    (ids,) = restored.tokenizer.encode_batch([token])
    if len(ids) != 1:
        raise UserError(f"--logit_bias={given!r}: {token!r} is {len(ids)} tokens: {ids}; name one")
    return ids[0], bias


def _draft(restored: Restored, sampling: Sampling, context: int, flags) -> Draft:
    """What `--draft` names."""
    if flags.draft in DRAFTS:
        return DRAFTS[flags.draft]()
    if not Path(flags.draft).is_dir():
        raise UserError(f"--draft={flags.draft}: a run's folder or {', '.join(DRAFTS)}")
    spec = config.of_folder(flags.draft, imports=vars(flags)["import"])
    small = restore_run(flags.draft, spec, say=lambda line: print(line, file=sys.stderr))
    ours, theirs = restored.tokenizer.fingerprint, small.tokenizer.fingerprint
    if ours != theirs:
        raise UserError(f"--draft={flags.draft} has another tokenizer than {flags.workdir}")
    check(small.model, context)
    return ModelDraft(_decoder(small), sampling)


def _context(restored: Restored, flags) -> int:
    """The most tokens of a text; UserError where the model can't continue one, or not so long."""
    context = flags.context or restored.model.sequence_length
    check(restored.model, context)
    return context


def _decoder(restored: Restored) -> Decoder:
    return Decoder(restored.model.graph, restored.params, restored.router_state)


def _report(found: dict[str, Any], ahead: int) -> None:
    """Say what speculation has brought, on stderr."""
    line = f"{found['steps']} steps, in which {found['held']:.2f} of {ahead} guesses held"
    if found["experts"]:
        read = sum(found["experts"]) / len(found["experts"])
        line += f"; a step read {read:.1f} experts in each layer"
    print(f"moe generate: {line}", file=sys.stderr)


def _say(piece: str) -> None:
    print(printable(piece), end="", flush=True)
