"""`moe help`, `moe list`, `moe describe` and the page of settings: read off the code, complete."""

import json
from pathlib import Path
import re
import subprocess
import sys
import types as types_
from typing import Any

import gin
import pytest
from tiny import environment

import moe
from moe.cli import describe, explain
from moe.cli import main as cli
from moe.data.tokens.tokenizer import Bytes, ByteTokenizer, TokenizerFile, TrainedBPE
from moe.settings import check, read, reference, types
from moe.training.run_spec import RunSpec

ROOT = Path(moe.__file__).resolve().parents[1]


def own():
    return [one for one in reference.entries() if one.kind != reference.OTHERS]


def test_the_page_of_settings_is_what_the_code_says():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    words = ["-m", "moe.cli.explain"]  # in a process that no other test has told of its classes
    now = subprocess.run([sys.executable, *words], env=environment(), capture_output=True)
    assert page == now.stdout.decode(), "python -m moe.cli.explain > docs/settings.md"


def test_everything_of_ours_has_a_kind_and_every_setting_a_meaning():
    strangers = [e.name for e in reference.entries() if e.kind == reference.OTHERS]
    ours = {name.name for name in own()}
    assert {"TopK", "AdamW", "train", "Capacity", "StandardLibrary"} <= ours
    for name in strangers:  # of other tests
        module = gin.config._REGISTRY.get_match(name).module
        assert module.partition(".")[0] not in types.OURS, f"{name} needs a row in KINDS"
    assert not [f"{e.name}.{s.name}" for e in own() for s in e.settings if not s.meaning]
    assert not [e.name for e in own() if not e.text]


def test_a_setting_is_told_with_its_range_default_and_meaning(capsys):
    assert cli.main(["help", "Switch.jitter"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(
        "Switch.jitter = 0.01\n    a number of at least 0 and below 1; in training"
    )


def test_a_configurable_is_told_with_its_place(capsys):
    assert cli.main(["help", "@Switch"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Switch (routers, causal)") and "Fedus" not in told.splitlines()[0]
    assert "goes into  MoELayer.router = @Switch\n" in told
    assert "sizes" not in told  # which the model gives
    assert cli.main(["help", "BalanceLoss"]) == 0
    assert "more" in capsys.readouterr().out  # not every router


def test_every_router_names_its_paper_or_learns_nothing():
    without = {e.name for e in own() if e.kind == "routers" and not reference.YEAR.search(e.text)}
    assert without == {"AllExperts", "Balanced", "FrozenTopK", "UniformRandom", "Zipf"}


def test_a_router_alone_in_its_file_is_told_by_the_file_before_its_formulas():
    found = reference.entry("Switch")
    assert found.summary == "One expert per token, weighted by its probability (Fedus et al. 2021)."
    assert "softmax(x W)" in found.text
    assert reference.entry("RandomTable").summary == "An expert for every id, drawn uniformly."
    assert "Roller et al. 2021" in reference.entry("RandomTable").text  # its module's alone


def test_a_thing_goes_where_it_is_meant_to():
    assert reference.places("Capacity") == ["MoELayer.capacity = @Capacity()"]  # it has a `fit`
    assert "TextData.tokenizer = @Bytes()" in reference.places("Bytes")


def test_what_only_code_can_give_is_no_setting():
    assert "run" not in [s.name for s in reference.entry("eval").settings]
    assert reference.entry("train").settings[0].name == "data"  # which a config must give


@pytest.mark.parametrize("name", ["Switch", "train", "eval", "TextFiles", "TermLoss"])
def test_the_flag_that_help_shows_is_one_that_a_config_takes(name, capsys):
    assert cli.main(["help", name]) == 0
    binding = re.search(r'such as --gin_bindings="(.*?)" \(', capsys.readouterr().out)
    assert binding is not None and binding[1].startswith(f"{name}.")
    if not binding[1].endswith("..."):
        assert not check.problems(read.read([], [binding[1]]).settings)


def test_choices_are_told_where_text_could_be_anything_else():
    for name in ("Sampled.estimator", "eval.rule"):
        assert " or '" in explain.help_of(name)


def test_a_command_that_is_configured_tells_both(capsys):
    assert cli.main(["help", "train"]) == 0
    told = capsys.readouterr().out
    assert "--workdir=FOLDER" in told and "a run that goes on" not in told
    assert "sequence_length = 256" in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["help", "Swich"], "named 'Swich'; did you mean 'Switch'?"),
        (["help", "trian"], "did you mean 'train'?"),
        (["help", "TopK.kk"], "TopK has no setting 'kk'; did you mean 'k'?"),
        (["help", "wandb"], "named 'wandb'; did you mean 'WandB'?"),
        (["help", "routers"], "`moe list routers` shows them"),
        (["help", "TopK", "AdamW"], "moe help explains one name, not TopK, AdamW"),
        (["help", "zzzzzz"], "`moe list` shows what there is"),
        (["list", "router"], "there is no kind 'router'; did you mean 'routers'"),
        (["list", "routers", "losses"], "moe list needs one [KIND]"),
    ],
)
def test_a_wrong_name_is_one_line(given, expected, capsys):
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_kinds_are_listed(capsys):
    assert cli.main(["list"]) == 0
    told = capsys.readouterr().out
    assert "optimizers   Adafactor, AdamW, Lion, Muon" in told and "configs" in told
    assert cli.main(["list", "routers"]) == 0
    told = capsys.readouterr().out
    assert "ExpertChoice" in told and "[causal at evaluation only]" in told


def test_every_shipped_file_is_listed_with_what_it_is(capsys):
    assert cli.main(["list", "configs"]) == 0
    rows = dict(explain.shipped())
    assert len(rows) == len(list(read.shipped().rglob("*.gin"))) and all(rows.values())
    assert all(read.find(name).is_file() for name in rows)
    assert "routers/switch.gin" in capsys.readouterr().out


def test_a_config_is_described_without_training(tmp_path, capsys):
    given = ["--gin_file=quickstart.gin", "--gin_file=routers/switch.gin"]
    out = tmp_path / "described.json"
    assert cli.main(["describe", *given, "--vocab_size=4096", f"--json={out}"]) == 0
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["parameters_total"] == 4_461_696 and "4,461,696" in told
    assert found["router"] == "Switch" and found["causality"] == "causal"
    assert found["flops_in_all"] == found["flops_per_token"] * 4096 * 400
    assert found["ignored_settings"] == ["TopK.gates", "TopK.k"]
    assert found["settings"]["Capacity"]["factor"] == "1.25"


def test_layers_are_described_each_by_its_router(capsys):
    given = ["--gin_file=quickstart.gin", "--gin_file=models/mixture_of_depths.gin"]
    assert cli.main(["describe", *given]) == 0
    told = capsys.readouterr().out
    assert "0, 2: TopK; 1, 3: MixtureOfDepths and TopK" in told
    assert "data=the devices left, fsdp=1" in told
    assert describe.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_the_vocabulary_is_that_of_the_tokenizer_before_anything_is_tokenised(tmp_path):
    saved = tmp_path / "saved"
    ByteTokenizer().save(saved)
    made = {"bytes": Bytes(), "file": TokenizerFile(str(saved)), "of shards": str(saved)}
    for tokenizer in made.values():
        data: Any = types_.SimpleNamespace(tokenizer=tokenizer)
        assert RunSpec(data=data).vocab_size == 257, tokenizer
    data = types_.SimpleNamespace(tokenizer=TrainedBPE(vocab_size=300))
    assert RunSpec(data=data).vocab_size == 300


def test_a_dense_config_is_described(capsys):
    assert cli.main(["describe", "--gin_file=quickstart_dense.gin"]) == 0
    assert "none (dense)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["routers/switch.gin", "switch", "quickstart.gin", "quickstart"])
def test_a_shipped_file_is_shown(name, capsys):
    assert cli.main(["help", name]) == 0
    told = capsys.readouterr().out
    assert "MoELayer.router = @Switch" in told or "include 'models/tiny.gin'" in told
    assert told.splitlines()[0].endswith(".gin")


def test_a_checkpoints_folder_is_told_how_to_be_named(tmp_path, capsys):
    inside = tmp_path / "run" / "checkpoints" / "20"
    inside.mkdir(parents=True)
    assert cli.main(["describe", f"--workdir={inside}"]) == 2
    assert f"use --workdir={tmp_path / 'run'} --step=20" in capsys.readouterr().err
