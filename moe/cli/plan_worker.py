"""The process that compiles for `moe plan`: the compiler may end it, but not its caller."""

import json
from pathlib import Path
import sys

from moe.cli import config
from moe.errors import UserError
from moe.planning.chips import Topology
from moe.planning.report import counted_report


def say(line: str) -> None:
    print(line, flush=True)


def main(path: str, topology: str, vocab_size: str, tries: str, *words: str) -> int:
    """Write the findings on a config to a JSON file, each time with all findings so far.

    The counted findings are also printed; the caller prints those of the compiler.
    words: config files, "--", settings.
    """
    from moe.planning.plan import plan

    cut = words.index("--")
    try:
        config.bind(list(words[:cut]), list(words[cut + 1 :]))
        findings = plan(Topology.read(topology), int(vocab_size), int(tries), say)
        for number, found in enumerate(findings):
            if number == 0:
                say(counted_report(found))
            found = {"gin_files": list(words[:cut]), "settings": list(words[cut + 1 :])} | found
            Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except UserError as error:
        Path(path).write_text(json.dumps({"error": str(error)}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
