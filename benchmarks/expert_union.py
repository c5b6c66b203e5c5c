"""Distinct experts that several tokens wake in a layer, by router: what verifying guesses reads.

    python benchmarks/expert_union.py --json=OUT.json --plot=OUT.png

Mixtures of 32 experts (`runs/micro.gin`, one seed) are trained for each router; then passages of
held-out documents are decoded by the router's evaluation rule, and the experts of the tokens are
counted: of consecutive tokens of a text (a step that verifies guesses), and of one token of each of
several texts (a batch). Ten minutes on two cores.

A tokens, E experts.
"""

import argparse
import json
from pathlib import Path
import tempfile

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from moe.cli import config
from moe.inference.decoder import Decoder
from moe.machine import hardware
from moe.runs.restore import Restored, restore_run
from moe.runs.train import train

STEPS, RATE, EXPERTS = 400, 0.05, 32
TEXTS, PROMPT, COUNTS = 64, 16, (1, 2, 4, 8, 16)
ROUTERS = ("top_k", "switch", "sinkhorn", "hash_random", "expert_choice", "remoe")


def trained(router: str, workdir: str) -> Restored:
    bindings = [f"train.steps = {STEPS}", f"AdamW.learning_rate = {RATE}"]
    bindings += [f"MoELayer.num_experts = {EXPERTS}", "train.artifacts = False"]
    train(config.load(["runs/micro.gin", f"routers/{router}.gin"], bindings), workdir)
    return restore_run(workdir, config.of_folder(workdir))


def used_by(run: Restored) -> np.ndarray:
    """(L, TEXTS, A, E): which experts each of the A tokens after a prompt used in each layer."""
    data, wanted = run.spec.prepare_data(), PROMPT + max(COUNTS)
    token_N = np.asarray(data.validation.token_N)
    every = np.lib.stride_tricks.sliding_window_view(token_N, wanted)[::wanted]
    inside = every[(every != run.tokenizer.document_id).all(1)]  # no document ends in it
    token_BT = inside[:: len(inside) // TEXTS][:TEXTS].astype(np.int32)
    decoder = Decoder(run.model.graph, run.params, run.router_state)
    length_B = np.full(len(token_BT), PROMPT)
    _, caches = decoder.prefill(token_BT[:, :PROMPT], length_B, wanted)
    found = []
    for at in range(PROMPT, wanted):
        place_B = np.full(len(token_BT), at, np.int32)
        _, caches, used = decoder.step(caches, token_BT[:, at], place_B)
        found.append(np.stack([np.asarray(used_BE) for used_BE in used]))
    return np.stack(found, axis=2)


def unions(used_LBAE: np.ndarray) -> dict[str, list[float]]:
    """Distinct experts in a layer, on average, for each of COUNTS tokens.

    `by_load` is what independent tokens would wake that use each expert as often as these do;
    `even` what they would if all experts were used alike.
    """
    share_LE = used_LBAE.mean((1, 2))
    per_token, experts = used_LBAE.sum(-1).mean(), used_LBAE.shape[-1]
    found: dict[str, list[float]] = {"one_text": [], "several_texts": [], "by_load": [], "even": []}
    for count in COUNTS:
        found["one_text"].append(used_LBAE[:, :, :count].any(2).sum(-1).mean())
        layers, texts, tokens, _ = used_LBAE.shape
        groups = used_LBAE.reshape(layers, texts // count, count, tokens, experts)
        found["several_texts"].append(groups.any(2).sum(-1).mean())
        found["by_load"].append((1 - (1 - share_LE) ** count).sum(-1).mean())
        found["even"].append(experts * (1 - (1 - per_token / experts) ** count))
    return {name: [round(float(x), 3) for x in values] for name, values in found.items()}


def draw(rows: list[dict], path: Path) -> None:
    """Experts over tokens: of one text and of several, a line for each router."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, kind, title in (
        (axes[0], "one_text", "consecutive tokens of one text"),
        (axes[1], "several_texts", "one token of each of several texts"),
    ):
        for i, row in enumerate(rows):
            marker = "os^vXD"[i % 6]
            axis.plot(COUNTS, row[kind], marker=marker, color=f"C{i}", label=row["router"])
            axis.plot(COUNTS, row["by_load"], color=f"C{i}", linewidth=0.7, linestyle=":")
        axis.set(title=title, xlabel="tokens in a step", xscale="log")
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.minorticks_off()
    axes[0].set_ylabel(f"distinct experts of {EXPERTS} that a layer reads")
    axes[0].plot([], [], color="grey", linestyle=":", label="independent, by load")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for router in ROUTERS:
            used_LBAE = used_by(trained(router, str(Path(folder, router))))
            per_token = round(float(used_LBAE.sum(-1).mean()), 3)
            rows.append({"router": router, "per_token": per_token, **unions(used_LBAE)})
            print(rows[-1], flush=True)
    found = {"device": hardware.describe_device(), "steps": STEPS, "experts": EXPERTS}
    found |= {"texts": TEXTS, "tokens": COUNTS, "rows": rows}
    given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
