"""A worker of a sweep whose plan is in a folder: `python -m moe.cli.sweep_worker FOLDER`.

Start as many as there are machines, with the folder on a disk that they share.
"""

from pathlib import Path
import signal
import sys
import threading

from moe.errors import UserError
from moe.sweeps.plan import Plan
from moe.sweeps.record import SweepFolder
from moe.sweeps.run import Progress
from moe.sweeps.worker import Place, Worker


def main(path: str) -> int:
    """Take trials until none is left; returns the exit status."""
    folder = SweepFolder(Path(path))
    try:
        found = folder.read_plan()
        if found is None:
            raise UserError(f"{path} holds no sweep")
        plan = Plan.of_json(found)
        progress = Progress(plan, folder, lambda line: print(line, flush=True), workers=1)
        stop = threading.Event()  # by SLURM before its time is over: the trial saves and ends
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
        Worker(folder, plan, Place(), progress.ended, stop).run()
    except UserError as error:
        print(f"moe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
