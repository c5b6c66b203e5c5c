"""The law of routed models, fitted to the released curves of its paper (Clark et al. 2022).

python benchmarks/routed_laws.py curves.csv.gz --json=benchmarks/results/routed_laws.json

The curves: data/curves.csv.gz of github.com/google-deepmind/scaling_laws_for_routing, CC-BY 4.0.
Each router's runs with one expert per token in every second block, and the dense ones.
"""

import argparse
import json
from pathlib import Path
import tempfile

from moe.cli import main as cli

ROWS = (  # the last row of each run; some have one without losses before
    "step >= 248000 and loss_validation > 0 and k == 1 and seed == 42 "
    "and routing_frequency == 0.5 and flop_increase == 1"
)
ROUTERS = ("S-Base", "RL-R", "Hash")


def fitted(data: str, law: str, columns: str, where: str, picture: str | None) -> dict:
    """What `moe fit --json` writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fit.json"
        arguments = [f"--law={law}", f"--data={data}", f"--columns={columns}", f"--where={where}"]
        arguments += [f"--plot={picture}"] if picture else []
        if cli.main(["fit", *arguments, f"--json={out}"]):
            raise SystemExit(1)
        return json.loads(out.read_text(encoding="utf-8")) | {"data": Path(data).name}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--json", required=True)
    parser.add_argument("--picture", help="where to draw the fit of S-Base")
    given = parser.parse_args()
    columns = "N=dense_parameter_count,L=loss_validation"
    results = {"Dense": fitted(given.data, "dense", columns, f"{ROWS} and num_experts == 1", None)}
    for router in ROUTERS:
        where = f"{ROWS} and router_type in ('Dense', '{router}')"
        picture = given.picture if router == "S-Base" else None
        results[router] = fitted(given.data, "routed", f"{columns},E=num_experts", where, picture)
    Path(given.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
