"""Every setting in force is told, of objects that no file names, too."""

import functools

from moe.cli import config
from moe.settings import resolved
from moe.training.abstract_model import Vocabulary
from moe.training.run_spec import RunSpec


def table_of(*bindings):
    spec = config.load(["quickstart.gin"], bindings)
    return resolved.rows(spec, *spec.in_force, spec.build_model(Vocabulary(257)).module)


def test_objects_that_no_file_names_tell_their_settings():
    table = table_of("train.objective = None", "train.mesh = None", "AdamW.b1 = 0.8")
    assert table["Rotary"]["base"] == 10_000 and table["Attention"]["rotary"] is not None
    assert table["MeshShape"]["data"] == -1 and "NextToken" in table
    assert table["AdamW"]["b1"] == 0.8 and table["AdamW"]["epsilon"] == 1e-8
    assert table["TopK"]["k"] == 2 and "sizes" not in table["TopK"]
    assert table["train"]["steps"] == 400 and table["train"]["stop_at"] is None


def test_another_router_tells_its_own():
    table = table_of("MoELayer.router = @Switch", "MoELayer.capacity = @Capacity()")
    assert "Switch" in table and "TopK" not in table


def test_without_gin_it_is_told_as_well():
    table = resolved.rows(RunSpec(None, functools.partial(print)), *RunSpec(None).in_force)
    assert {"train", "AdamW", "MeshShape"} <= table.keys()


def test_it_is_written_as_a_config_writes_it():
    table = {"A": {"x": 0.5, "y": None, "z": ()}, "Empty": {}, "Long": {"word": "a " * 80}}
    assert resolved.text({"A": table["A"]}) == "A: x=0.5, y=None, z=[]"
    assert resolved.text({"A": table["A"], "Empty": {}}, unset=False) == "A: x=0.5\nEmpty"
    assert all(len(line) <= 98 for line in resolved.text(table).splitlines())
    shown = resolved.shown([RunSpec, RunSpec(None), "a", True])
    assert shown == "[@RunSpec, @RunSpec(), 'a', True]"
