"""Every shipped config builds, in small; a router is one line; a run's record is the run."""

from pathlib import Path

import gin
import numpy as np
import pytest
from tiny import Runs, quick

from moe import settings
from moe.cli import config
from moe.settings import read
from moe.training.abstract_model import Vocabulary
from moe.training.objective import MaskedToken
from moe.training.run_spec import RunSpec
from routing import Causality, Sizes

SHIPPED = sorted(path.relative_to(read.shipped()) for path in read.shipped().rglob("*.gin"))
BY_FOLDER = {
    folder: [str(path) for path in SHIPPED if path.parts[0] == folder]
    for folder in ("runs", "models", "routers")
}
# Settings of a run that only make it smaller. Heads keep their number, experts theirs.
SMALL = """
Transformer.d_model = 64
Transformer.num_layers = 2
train.batch_size = 4
train.sequence_length = 64
train.eval_stride = 64
Transformer.moe_layers = None
MeshShape.data = -1
MeshShape.fsdp = 1
MeshShape.expert = 1
"""
LEAKS = "Transformer.allow_leaks = True\n"
SMALLER_MODEL = """
Transformer.num_layers = 2
Transformer.d_model = 64
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("configs"))


def parts(gin_paths, bindings=()):
    """Model and program, with no data read and nothing trained."""
    config.bind([str(path) for path in gin_paths], bindings)
    with quick():
        spec = RunSpec(data=None)
        return spec.build(Vocabulary(257), spec.build_mesh(), np.arange(1000) % 257)


def small(folder: Path, *names: str, more: str = "") -> Path:
    path = folder / "small.gin"
    path.write_text("".join(f"include '{name}'\n" for name in names) + SMALL + more)
    return path


def test_there_are_configs_of_each_kind():
    assert all(BY_FOLDER.values()), BY_FOLDER


@pytest.mark.parametrize("path", list(map(str, SHIPPED)))
def test_a_config_opens_with_what_it_is(path):
    text = (read.shipped() / path).read_text()
    assert text.startswith("# ") and text.endswith("\n")
    if path.startswith("runs"):
        assert "#   moe train --gin_file=" in text


@pytest.mark.parametrize("path", BY_FOLDER["runs"])
def test_a_run_builds(path, tmp_path):
    model, program = parts([small(tmp_path, path)])
    assert program.abstract_state.step.shape == ()
    assert model.costs.flops_per_token > 0


@pytest.mark.parametrize("path", BY_FOLDER["models"])
def test_a_model_builds_in_a_run(path, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.config.parent)  # a file may include those of the current folder
    model, _ = parts([small(tmp_path, str(runs.config), path)])
    assert model.costs.parameters_total > 0


@pytest.mark.parametrize("path", BY_FOLDER["routers"])
def test_a_router_is_swapped_by_one_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("embeddings.npy", np.random.default_rng(0).standard_normal((257, 4)))
    names = ("runs/quickstart.gin", path)
    written = read.bindings_of((read.shipped() / path).read_text())
    try:
        model, _ = parts([small(tmp_path, *names)])
    except ValueError as error:  # one that can't be causal says so
        assert "train.objective = @MaskedToken()" in str(error)
        model, _ = parts([small(tmp_path, *names, more="train.objective = @MaskedToken()\n")])
        assert isinstance(model.objective, MaskedToken)
        assert model.moe_layer.router.causality is Causality.NEVER
    name = written["MoELayer.router"].removeprefix("@").split(".")[-1]
    assert type(model.moe_layer.router).__name__.startswith(name)


DROPLESS = """
default_moe deepseek_moe deepseek_v3 hash_balanced hash_bigram hash_clustered
hash_dispersed hash_future hash_position hash_predicted hash_previous hash_random
hierarchical loss_free mixtral noisy_top_k olmoe quantile simbal
""".split()


@pytest.mark.parametrize("name", DROPLESS)
def test_a_router_whose_paper_drops_nothing_drops_nothing(name, tmp_path, monkeypatch):
    """Whatever capacity the run before it had: the quickstart's is 1.0."""
    monkeypatch.chdir(tmp_path)
    np.save("embeddings.npy", np.random.default_rng(0).standard_normal((257, 4)))
    model, _ = parts([small(tmp_path, "runs/quickstart.gin", f"routers/{name}.gin", more=LEAKS)])
    assert model.moe_layer.capacity.keeps_all(train=True)


def test_the_files_of_papers_with_losses_of_their_own_say_which():
    """OLMoE averages over layers; DeepSeek-V3 counts by sequence and raw; V-MoE by group."""

    def losses(name):
        with gin.unlock_config():
            gin.clear_config()
        config.bind([f"routers/{name}.gin"])
        layer = gin.get_bindings("MoELayer")
        return {loss.name: loss for loss in layer["router"](Sizes(8, 16, 7)).losses}

    assert {loss.over_layers for loss in losses("olmoe").values()} == {"mean"}
    balance = losses("deepseek_v3")["balance"]
    assert (balance.scope, balance.counts, balance.over_layers) == ("sequence", "raw", "sum")
    assert {loss.scope for loss in losses("v_moe").values()} == {"group"}
    assert {loss.scope for loss in losses("noisy_top_k").values()} == {"global"}


def test_a_router_is_swapped_by_one_flag(runs, tmp_path):
    path = small(tmp_path, "runs/quickstart.gin")
    for router in ("Switch", "Hash", "UniformRandom"):
        model, _ = parts([path], [f"MoELayer.router = @{router}"])
        assert type(model.moe_layer.router).__name__ == router


def test_the_record_of_a_run_loads_to_the_same_record(runs):
    assert runs("recorded", "train.steps = 2", "train.stop_at = 1") == 0
    record = runs.folder / "recorded" / "config.gin"
    config.bind([str(record)])
    again = read.bindings_of(settings.operative())
    assert again == read.bindings_of(record.read_text())
