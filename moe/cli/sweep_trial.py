"""The process of one trial of `moe sweep`."""

import os
from pathlib import Path
import sys


def main(path: str, cores: str) -> int:
    """Run the trial of a folder on some cores, as "0,1"; returns the exit status."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    from moe.machine import accelerator, compile_cache
    from moe.machine.allocator import keep_freed_memory
    from moe.sweeps.record import TrialFolder

    keep_freed_memory()
    accelerator.prepare()
    compile_cache.prepare()
    folder = TrialFolder(Path(path))
    from moe.cli import config
    from moe.cli.eval import evaluate_run
    from moe.sweeps import trial

    try:
        spec = config.load([str(folder.config)])

        def score(run):
            return evaluate_run(
                run,
                stride=spec.eval_stride,
                max_bytes=spec.final_eval_bytes,
                rule="training",
            )

        return trial.run(folder, spec, score)
    except Exception as error:
        trial.write_outcome(folder, error)
        raise


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
