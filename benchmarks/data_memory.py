"""Memory and time of preparing a text: `python benchmarks/data_memory.py --json=PATH`.

For each size, a process of its own fits a BPE to a corpus of random words, tokenises both splits
and compresses them. Memory is the process's peak, less what its imports take.
"""

import argparse
import json
from pathlib import Path
import random
import resource
import subprocess
import sys
import tempfile
import time

MEGABYTES = (20, 50, 200)


def write(folder: Path, megabytes: int) -> None:
    """Write files of half a megabyte of random words, whose frequencies follow Zipf's law."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    paragraphs = [" ".join(draw.choices(words, weights, k=2_000)) for _ in range(200)]
    for i in range(2 * megabytes):
        text, size = [], 0
        while size < 500_000:
            text.append(draw.choice(paragraphs))
            size += len(text[-1])
        (folder / f"{i:05}.txt").write_text("\n".join(text))


def peak() -> int:
    """The process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: str) -> dict:
    """Size, peak memory and time of one corpus, prepared in this process."""
    import grain  # noqa: F401  what training imports in any case
    import tokenizers  # noqa: F401

    from moe.data.compressors import baselines
    from moe.data.corpora.corpus import TextFiles
    from moe.data.text import TextData

    before, started = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        data = TextData(TextFiles(folder), cache_dir=cache).prepare()
        prepared, seconds = peak(), time.perf_counter() - started
        baselines(data)
    return {
        "bytes": data.info.bytes,
        "peak_preparing": prepared - before,
        "peak_with_compressors": peak() - before,
        "seconds_preparing": round(seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--folder", help="measure this one corpus, in this process")
    given = parser.parse_args()
    if given.folder:
        Path(given.json).write_text(json.dumps(measure(given.folder)))
        return
    found = []
    for megabytes in MEGABYTES:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), megabytes)
            out = Path(folder, "result.json.part")
            words = [sys.executable, __file__, f"--folder={folder}", f"--json={out}"]
            subprocess.run(words, check=True)
            found.append(json.loads(out.read_text()))
        print(found[-1], flush=True)
        Path(given.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
