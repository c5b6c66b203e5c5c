"""Writes the token embeddings of a run to a .npy file (V, D), for the tables of hash routing.

python scripts/export_embeddings.py runs/quickstart embeddings.npy
"""

import sys

import numpy as np

from moe.cli import config
from moe.runs.restore import restore_run


def main(workdir: str, path: str) -> None:
    run = restore_run(workdir, config.of_folder(workdir))
    embedding_VD = np.asarray(run.params["embedding_VD"])
    np.save(path, embedding_VD)
    print(f"{path}: {embedding_VD.shape[0]} tokens of width {embedding_VD.shape[1]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
