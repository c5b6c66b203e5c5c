"""The time of a training step with each router, over that with round robin.

    python benchmarks/overhead.py --json=benchmarks/results/overhead.json

It is the quickstart's step at half its batch, with the router and with `Balanced` in its place; the
experts per token, capacity, dispatcher and experts are those of the router's file. Both take turns,
and the ratio is the median over the turns. Routers whose tokens don't choose experts (soft slots,
product keys, merged experts) are compared with the `balanced` row, so that their ratio is one of
whole layers. Rows in the results file are not repeated.
"""

import argparse
import json
from pathlib import Path
import statistics
from typing import Any

import jax
from runs import QUICKSTART
from steps import CompiledStep

from moe.machine import hardware
from moe.machine.allocator import keep_freed_memory

ROUNDS, STEPS, BATCH = 6, 1, 16
ROUTERS = (
    *("top_k", "balanced", "uniform_random", "frozen", "all_experts", "mixtral", "loss_free"),
    *("quantile", "simbal", "switch", "noisy_top_k", "hierarchical", "gshard", "st_moe", "v_moe"),
    *("remoe", "dselect_k", "moe_plus_plus", "default_moe", "hash_random", "hash_balanced"),
    *("hash_previous", "hash_bigram", "hash_position", "hash_predicted", "hash_clustered"),
    *("hash_dispersed", "hash_future", "multi_hash", "base", "sinkhorn", "expert_choice"),
    *("expert_choice_capped", "strictly_balanced", "soft_moe_causal", "soft_choice", "lory"),
    *("sampled_reinforce", "sampled_gumbel", "mode_staged", "mode_integrated", "peer"),
)
# Their experts, or means in place of unchosen experts, are nothing that round robin can use.
OTHER_EXPERTS = ("peer", "lory", "soft_moe_causal", "soft_choice", "multi_hash", "default_moe")
CHOICES = {  # experts per token in the router's file, where they are not 2
    **dict.fromkeys(("switch", "mode_staged", "mode_integrated", "base", "sinkhorn"), 1),
    **dict.fromkeys(("sampled_reinforce", "sampled_gumbel"), 1),
    **dict.fromkeys((name for name in ROUTERS if name.startswith("hash_")), 1),
    **dict.fromkeys(("noisy_top_k", "hierarchical", "strictly_balanced"), 4),
    **dict.fromkeys(("dselect_k", "remoe", "all_experts"), 8),  # of any number, up to all
}


def settings_of(router: str, embeddings: Path) -> tuple[list[str], list[str]]:
    """Config files and bindings of a run with a router.

    embeddings: those of the baseline, which clustered hashing needs.
    """
    bindings = [*QUICKSTART, f"train.batch_size = {BATCH}"]
    if router in ("hash_clustered", "hash_dispersed"):
        table = f"{router.split('_')[1].title()}Table"
        bindings += [f"{table}.embeddings = '{embeddings.absolute()}'"]
    if router == "hash_future":
        bindings += ["Transformer.allow_leaks = True"]
    return ["quickstart.gin", f"routers/{router}.gin"], bindings


def pair(router: str, embeddings: Path) -> dict[str, float]:
    """Seconds of a step with the router and with round robin, and their ratio."""
    files, bindings = settings_of(router, embeddings)
    k = CHOICES.get(router, 2)
    twin_files, twin_bindings = files, bindings
    if router in OTHER_EXPERTS:
        twin_files, twin_bindings = settings_of("balanced", embeddings)
    twin_bindings = [*twin_bindings, "MoELayer.router = @Balanced", f"Balanced.k = {k}"]
    own, twin = CompiledStep(files, bindings), CompiledStep(twin_files, twin_bindings)
    for _ in range(ROUNDS):
        own.run(STEPS)
        twin.run(STEPS)
    ratios = [a / b for a, b in zip(own.seconds, twin.seconds, strict=True)]
    return {
        "milliseconds": round(1e3 * statistics.median(own.seconds), 2),
        "milliseconds_balanced": round(1e3 * statistics.median(twin.seconds), 2),
        "over_balanced": round(statistics.median(ratios), 4),
        "choices_of_balanced": k,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--routers", nargs="*", default=ROUTERS)
    parser.add_argument("--embeddings", type=Path, default="embeddings.npy", help="of the baseline")
    given = parser.parse_args()
    keep_freed_memory()
    head: dict[str, Any] = {"device": hardware.describe_device(), "jax": jax.__version__}
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else {}
    for router in given.routers:
        if router in rows:
            continue
        rows[router] = pair(router, given.embeddings)
        print(f"{router:<24} {rows[router]}", flush=True)
        text = json.dumps(head | {"rows": rows}, indent=2) + "\n"
        given.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
