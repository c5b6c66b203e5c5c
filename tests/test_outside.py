"""A router, a loss and a kind of experts in files of a user's own, as the guide writes them."""

import json
from pathlib import Path
import re
import sys

from tiny import Runs, arrays, measured

GUIDE = Path(__file__).parents[1] / "docs" / "writing_a_router.md"


def test_a_router_a_loss_and_experts_outside_the_packages(tmp_path, monkeypatch):
    """The guide's three files and its config, on a tiny model, trained and saved."""
    # Under other names: gin knows the guide's router already where test_check.py ran before.
    guide = GUIDE.read_text().replace("my_", "own_").replace("CosineTopK", "OwnTopK")
    blocks = re.findall(r"Save it as `(own_\w+)\.py`:\n\n```python\n(.*?)```", guide, re.DOTALL)
    assert [name for name, _ in blocks] == ["own_router", "own_loss", "own_experts"]
    runs = Runs(tmp_path)
    for name, code in blocks:
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (shown,) = re.findall(r"printf '%s\\n' (.*?) > own.gin", guide, re.DOTALL)
    config = "\n".join(re.findall(r"'([^']*)'", shown))
    Path("own.gin").write_text(config.replace("quickstart.gin", str(runs.config)))
    run = runs.done("run", "train.steps = 2", "train.save_every = 2", config=tmp_path / "own.gin")
    last = measured(run)[-1]
    assert last["router_loss/variance"] < 0 < last["router_loss/balance"], last
    saved = arrays(run, 2)
    trained = {name: value for name, value in saved.items() if name.startswith("params.")}
    scales = [value for name, value in trained.items() if name.endswith("experts.scale_ED")]
    assert scales and all(abs(value - 1).max() > 0 for value in scales)
    assert any(name.endswith("shared.up_DF") for name in trained)
    said = json.loads((run / "run.json").read_text())
    assert said["parameters_total"] == sum(value.size for value in trained.values())
