"""Mutated configs: each is refused at a place and in words, or changes the configuration.

    python benchmarks/faults.py [CONFIGS]

prints JSON: how many were refused, changed the resolved configuration, or changed only the writing
(spaces, comments, quotes); the slowest; and the faults, of which there should be none.
"""

import json
from pathlib import Path
import random
import sys
import tempfile
import time

from moe import settings
from moe.cli import configurables
from moe.errors import Problems
from moe.settings import read

assert configurables  # imported to be registered

SLOW_SECONDS = 5
MARKS = ("=", "@", "%", ".", "/", "(", "[", "{", "'", '"', "\\", "\n", "\0", "#", "\x1b", "é")
WORDS = ("include", "import", "train", "None", "1e999", "nan", "9" * 5000, "@TopK()", "%x", "-")


def mutated(text: str, draw: random.Random) -> str:
    """The text with another digit, or with one to three changes of characters and words."""
    digits = [at for at, letter in enumerate(text) if letter.isdecimal()]
    if digits and draw.random() < 0.3:
        at = draw.choice(digits)
        return text[:at] + draw.choice("123456789") + text[at + 1 :]
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.choice((0, 1, 1, 5, 40)))
        new = draw.choice((draw.choice(MARKS), draw.choice(WORDS), "", text[at:end] * 2))
        text = text[:at] + new + text[end:]
    return text


def resolved(path: Path) -> str:
    """The configuration that a file makes, as text."""
    settings.load([str(path)], say=lambda line: None)
    return settings.operative()


def settings_of(path: Path) -> list[tuple[str, str]]:
    """What a file says, whatever its spaces and comments."""
    return [(one.key, repr(one.value)) for one in read.read([str(path)], ()).settings]


def statements(path: Path) -> str:
    """A shipped config without the lines that are comments, whose mutations change nothing."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def campaign(configs: int, folder: Path, seed: int = 0) -> dict:
    """Load mutations of shipped configs, and count what became of them."""
    draw = random.Random(seed)
    sources = [read.shipped() / n for n in read.shipped_names() if n.startswith(("runs", "rout"))]
    before = {source: resolved(source) for source in sources}
    counts = dict.fromkeys(("configs", "refused", "changed", "same"), 0)
    slowest, faults = 0.0, []
    for _ in range(configs):
        source, path = draw.choice(sources), folder / "own.gin"
        path.write_text(mutated(statements(source), draw), encoding="utf-8")
        started = time.monotonic()
        try:
            kind = "same" if resolved(path) == before[source] else "changed"
            if kind == "same" and settings_of(path) != settings_of(source):
                faults.append(f"without effect: {path.read_text(encoding='utf-8')!r}")
        except Problems as error:
            kind = "refused"
            faults += [line for line in error.lines if ".gin:" not in line]
        except Exception as error:  # the fault that is looked for
            kind = "refused"
            faults.append(f"{type(error).__name__}: {error}: {path.read_text(encoding='utf-8')!r}")
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        if seconds > SLOW_SECONDS:
            faults.append(f"{seconds:.1f} s: {path.read_text(encoding='utf-8')!r}")
        counts["configs"] += 1
        counts[kind] += 1
    return {**counts, "slowest_seconds": round(slowest, 3), "faults": faults}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = campaign(int(sys.argv[1]) if sys.argv[1:] else 1000, Path(scratch))
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["faults"]))
