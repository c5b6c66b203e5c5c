"""`moe bench routers` at tiny size: a row for every router, and mistakes in a line."""

import json

from moe import bench, cli


def test_every_router_has_a_row(tmp_path, capsys):
    path = tmp_path / "routers.json"
    flags = ["--tokens=64", "--width=16", "--experts=16", f"--json={path}"]
    assert cli.main(["bench", "routers", *flags]) == 0
    rows = json.loads(path.read_text())
    assert [row["router"] for row in rows[2:]] == list(bench.ROUTERS)
    assert all(row["milliseconds"] > 0 for row in rows)
    assert rows[0]["fraction_of_layer"] == 1
    keys = {"router", "milliseconds", "fraction_of_layer", "tokens", "width", "experts"}
    assert all(set(row) == keys and row["tokens"] == 64 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1


def test_an_unknown_suite_is_told(capsys):
    assert cli.main(["bench", "router"]) == 2
    assert "moe bench has no suite 'router'; did you mean 'routers'?" in capsys.readouterr().err
