"""A SLURM array whose tasks are workers of one sweep."""

from pathlib import Path
import shlex
import sys

from moe.sweeps.record import SweepFolder

SCRIPT = """\
#!/bin/bash
# Workers of the sweep in {folder}: each takes trials until none is left. Change the resources to
# what a trial needs, and submit with: sbatch {script}
# A task that is cut off loses nothing: submit again, and trials go on from their checkpoints.
#SBATCH --job-name={name}
#SBATCH --array=1-{workers}
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output={folder}/slurm-%A-%a.txt
set -euo pipefail
cd {here}
exec {python} -m moe.cli.sweep_worker {folder}
"""


def write(folder: SweepFolder, script: Path, workers: int) -> str:
    """Write the script; returns a line that says so."""
    names = {
        "folder": shlex.quote(str(folder.path.absolute())),
        "script": shlex.quote(str(script)),
        "here": shlex.quote(str(Path.cwd())),
        "python": shlex.quote(sys.executable),
        "name": shlex.quote(folder.path.name),
    }
    script.write_text(SCRIPT.format(workers=workers, **names), encoding="utf-8")
    return f"{script}: an array of {workers} workers; read it, then sbatch {script}"
