"""A sweep's files when something is wrong with them, and its last words; no trial is trained."""

import dataclasses
import json
import threading

import pytest
from test_sweep_plan import plan_of, results_of

from moe.cli import main as cli
from moe.cli import sweep
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.runs.storage.json_files import write_json
from moe.sweeps import report, run, trial, worker
from moe.sweeps.record import SweepFolder
from moe.training.run_spec import RunSpec


def written(path, score) -> SweepFolder:
    """The folder of a sweep whose tuning has ended."""
    folder, plan = SweepFolder(path), plan_of(controls=())
    path.mkdir()
    write_json(folder.plan, plan.as_json())
    results = results_of(plan.trials_now({}), score)
    missing = dict.fromkeys(("bits_per_byte", "document_bits", "document_bytes", "reason"))
    for name, row in results.items():
        folder.trial(name).path.mkdir(parents=True)
        write_json(folder.trial(name).result, row | missing)
    folder.write_tables(folder.results(), results)
    return folder


@pytest.mark.parametrize("damage", ["{", '{"trial": "x"}\n', "\x00\xff"])
def test_a_sweep_goes_on_by_the_trials_own_results_where_the_table_is_damaged(tmp_path, damage):
    folder = written(tmp_path / "s", lambda t: 1.0)
    assert "12 of 18 trials" in report.listed(folder)
    rows = folder.trials.read_text()
    folder.trials.write_text(damage)
    with pytest.raises(UserError, match=r"trials\.jsonl"):
        report.listed(folder)
    told, plan = [], plan_of(controls=())
    assert len(folder.table(told.append)) == 12
    assert folder.trials.read_text() == damage, "looking changes nothing"
    assert len(run.begin(plan, folder, told.append)) == 12
    assert len(told) == 2 and "of which --run makes the table anew" in told[0]
    run.finish(plan, folder)
    assert sorted(folder.trials.read_text().splitlines()) == sorted(rows.splitlines())


def test_a_cell_without_a_finished_tuning_trial_is_named(tmp_path):
    folder = written(tmp_path / "s", lambda t: None if t.cell.name == "b" else 1.0)
    said = report.listed(folder)
    assert "no tuning trial of 'b' has finished: it is not reported" in said
    assert said.endswith("12 of 16 trials")


def test_a_sweep_in_which_nothing_can_be_reported_fails(tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "s", lambda t: None)
    monkeypatch.setattr(sweep, "read_plan", lambda *given: plan_of(controls=(), name="s"))
    monkeypatch.setattr(sweep, "planned", lambda *given: "")
    monkeypatch.setattr(sweep, "drive", lambda *given: True)
    assert cli.main(["sweep", "--gin_file=s.gin", f"--folder={folder.path}", "--run"]) == 2
    said = capsys.readouterr()
    assert "12 of 12 trials" in said.out and "draws and judges" not in said.out
    assert "nothing can be reported" in said.err


def test_a_folder_without_a_sweep_is_refused(tmp_path, capsys):
    written(tmp_path / "ours", lambda t: 1.0)
    assert cli.main(["sweep", f"--folder={tmp_path / 'our'}", "--list"]) == 2
    assert "our holds no sweep; did you mean 'ours'?" in capsys.readouterr().err
    assert not (tmp_path / "our").exists()


def test_too_few_documents_are_told_before_any_step(text_data):
    """Of a real text; `train` asks for the config once the text is prepared."""
    given = {"data": text_data(), "model": Transformer, "batch_size": 1, "sequence_length": 8}
    spec = RunSpec(**given, eval_stride=8)
    trial.checked_config(spec, print)
    few = dataclasses.replace(spec, final_eval_bytes=20)
    with pytest.raises(UserError, match=r"^\d held-out documents are too few"):
        trial.checked_config(few, print)


@pytest.mark.parametrize(("error", "times"), [(UserError("no"), 1), (RuntimeError("no"), 2)])
def test_what_is_wrong_with_a_config_is_not_tried_twice(tmp_path, monkeypatch, error, times):
    plan = plan_of()
    first = plan.trials_now({})[0]
    folder = SweepFolder(tmp_path).trial(first.name)
    tried = []

    def process(self, one, where):
        tried.append(one.name)
        trial.write_outcome(where, error)
        return 1

    monkeypatch.setattr(worker.Worker, "process", process)
    monkeypatch.setattr(worker, "costs_of", lambda one: {})
    place, stop = worker.Place(), threading.Event()
    one = worker.Worker(SweepFolder(tmp_path), plan, place, lambda *given: None, stop)
    assert one.take(first) and len(tried) == times
    row = json.loads(folder.result.read_text())
    assert row["status"] == "crashed" and "again" not in row
