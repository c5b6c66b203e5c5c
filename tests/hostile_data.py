"""Hostile texts, token shards, tables and sweeps: cases for `hostile.py`."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile

from hostile import Place, case, fifo, sparse
from hostile_runs import trained
import numpy as np

TEXT, SHARD, TABLE, SWEEP = "a text", "token shards", "a table", "a sweep"
BOMB = 2**29  # bytes that unpack


def lines(place: Place, content: bytes | str, name: str = "a.jsonl") -> list[str]:
    """Train on JSON lines."""
    path = place.write(f"texts/{name}", content)
    return on_lines(place, str(path))


def on_lines(place: Place, path: str) -> list[str]:
    return trained(place, "TextData.corpus = @JsonLines()", f"JsonLines.paths = {path!r}")


def text(place: Place, content: bytes | str, name: str = "a.txt") -> list[str]:
    """Train on a text file."""
    path = place.write(f"texts/{name}", content)
    return trained(place, "TextData.corpus = @TextFiles()", f"TextFiles.paths = {str(path)!r}")


@case(TEXT, "a.jsonl:1")
def a_line_that_is_nested(place):
    return lines(place, "[" * 200_000 + "\n")


@case(TEXT, "a.jsonl:2")
def a_line_of_a_number_without_end(place):
    return lines(place, '{"text": "x"}\n{"text": ' + "9" * 100_000 + "}\n")


@case(TEXT, "a.jsonl:1")
def a_line_with_half_a_letter(place):
    return lines(place, '{"text": "\\ud800"}\n')


@case(TEXT, "a.jsonl:1")
def a_line_with_escape_sequences(place):
    return lines(place, '{"\\u001b]0;owned\\u0007": 1}\n')


@case(TEXT, "a.jsonl:1")
def a_line_of_a_terabyte(place):
    place.write("texts/other", "")
    return on_lines(place, str(sparse(place.path / "texts" / "a.jsonl")))


@case(TEXT, "a.txt")
def a_text_of_a_terabyte(place):
    place.write("texts/other", "")
    path = sparse(place.path / "texts" / "a.txt")
    return trained(place, "TextData.corpus = @TextFiles()", f"TextFiles.paths = {str(path)!r}")


@case(TEXT)
def texts_that_are_pipes(place):
    place.write("texts/other", "")
    fifo(place.path / "texts" / "a.jsonl")
    return on_lines(place, str(place.path / "texts" / "a.jsonl"))


@case(TEXT, "unpack")
def a_bomb_of_gzip(place):
    return text(place, gzip.compress(bytes(BOMB), 1), "a.gz")


@case(TEXT, "a.jsonl.bz2")
def a_bomb_of_bzip2(place):
    return lines(place, bz2.compress(bytes(2**20)) * (BOMB // 2**20), "a.jsonl.bz2")


@case(TEXT, "a.jsonl.xz")
def a_bomb_of_xz(place):
    packed = lzma.compress(bytes(2**24), preset=0)
    return lines(place, packed * (BOMB // 2**24), "a.jsonl.xz")


@case(TEXT, "unpack")
def a_bomb_of_zstandard(place):
    import zstandard

    packed = zstandard.ZstdCompressor().compress(bytes(2**26))
    return text(place, packed * (BOMB // 2**26), "a.zst")


@case(TEXT, "a.zst")
def a_window_of_two_gigabytes(place):
    return text(place, b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x02\x00\x00\x61" * 100, "a.zst")


def parquet(place: Place, content: bytes) -> list[str]:
    path = place.write("texts/a.parquet", content)
    return trained(place, "TextData.corpus = @Parquet()", f"Parquet.paths = {str(path)!r}")


def written(columns: dict) -> bytes:
    """A Parquet file."""
    import pyarrow
    from pyarrow import parquet as files

    out = io.BytesIO()
    files.write_table(pyarrow.table(columns), out, compression="zstd")
    return out.getvalue()


@case(TEXT, "a.parquet")
def a_parquet_of_nothing(place):
    return parquet(place, b"PAR1" + b"\xff" * 100 + b"PAR1")


@case(TEXT, "a.parquet")
def a_parquet_of_numbers(place):
    return parquet(place, written({"text": [1, 2, 3]}))


@case(TEXT, "a.parquet")
def a_parquet_of_lists(place):
    return parquet(place, written({"text": [["a"], [None]]}))


@case(TEXT, "unpack")
def a_bomb_of_parquet(place):
    """A thousand rows of one text, which is held once."""
    return parquet(place, written({"text": ["a" * 2**20] * 1000}))


def shards(place: Place, content: bytes, name: str = "a.npy") -> list[str]:
    """Train on a token file."""
    path = place.write(f"shards/{name}", content)
    tokens = {"paths": str(path), "validation_paths": str(path)}
    place.write("tokenizer.json", '{"type": "bytes"}')
    tokens["tokenizer"] = str(place.path / "tokenizer.json")
    tokens["cache_dir"] = str(place.out / "cache")
    given = [f"TokenShards.{name} = {value!r}" for name, value in tokens.items()]
    base = ["train.model = @Transformer", "train.steps = 1", "train.optimizer = @AdamW()"]
    path = place.write("shards.gin", "\n".join([*base, "train.data = @TokenShards()", *given, ""]))
    return ["train", f"--gin_file={path}", f"--workdir={place.out / 'w'}"]


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


class Touches:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@case(SHARD, "a.npy")
def a_shard_of_objects(place):
    array = np.array([Touches(str(place.path / "pickled.ran"))], object)
    return shards(place, saved(array))


@case(SHARD, "a.npy")
def a_shard_that_is_a_pickle(place):
    return shards(place, pickle.dumps(Touches(str(place.path / "pickled.ran"))))


@case(SHARD, "a.npy")
def a_shard_that_is_an_archive(place):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.npy", saved(np.arange(3)))
    return shards(place, out.getvalue())


@case(SHARD, "a.npy")
def a_shard_of_negative_tokens(place):
    return shards(place, saved(np.array([1, -5, 3], np.int32)))


@case(SHARD, "a.npy")
def a_shard_of_tokens_beyond_all(place):
    return shards(place, saved(np.array([1, 2**64 - 1], np.uint64)))


@case(SHARD, "a.npy")
def a_shard_of_more_than_it_holds(place):
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000,), }"
    return shards(place, npy(header))


@case(SHARD, "a.npy")
def a_shard_of_a_negative_size(place):
    return shards(place, npy(b"{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }"))


@case(SHARD, "a.npy")
def a_shard_with_a_nested_header(place):
    return shards(place, npy(b"(" * 9000))


@case(SHARD, "a.npy")
def a_shard_with_a_long_header(place):
    return shards(place, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100)


def npy(header: bytes) -> bytes:
    header = header.ljust(118 if len(header) < 118 else len(header))
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


@case(SHARD, "a.bin")
def a_shard_of_half_a_token(place):
    return shards(place, b"abc", "a.bin")


def table(place: Place, content: bytes | str, name: str = "runs.csv") -> list[str]:
    """Fit a law to a table."""
    path = place.write(name, content)
    return ["fit", "--law=chinchilla", f"--data={path}"]


@case(TABLE, "runs.csv")
def a_table_with_a_cell_without_end(place):
    return table(place, "N,D,L\n1,2," + "3" * 200_000 + "\n")


@case(TABLE, "L")
def a_table_of_escape_sequences(place):
    return table(place, "N,D,L\n" + "1,2,\x1b]0;owned\x07\n" * 20)


@case(TABLE, "runs.csv")
def a_table_of_zeros(place):
    return table(place, b"\x00" * 1000)


@case(TABLE, "runs.csv")
def a_table_of_a_terabyte(place):
    return ["fit", "--law=chinchilla", f"--data={sparse(place.path / 'runs.csv')}"]


@case(TABLE, "runs.csv.gz")
def a_table_that_is_a_bomb(place):
    return table(place, gzip.compress(bytes(BOMB), 1), "runs.csv.gz")


@case(TABLE, "runs.csv.gz")
def a_table_that_is_cut(place):
    return table(place, gzip.compress(b"N,D,L\n" * 1000)[:40], "runs.csv.gz")


@case(TABLE, "runs.jsonl")
def a_table_that_is_nested(place):
    return table(place, '{"a":' * 100_000, "runs.jsonl")


@case(TABLE, "runs.jsonl")
def a_table_with_other_columns_in_each_row(place):
    rows = "".join(json.dumps({f"c{n}": 1}) + "\n" for n in range(20_000))
    return table(place, rows, "runs.jsonl")


@case(TABLE, "row 1")
def a_table_of_numbers_beyond_all(place):
    return table(place, f'{{"N": 1, "D": 1, "L": {"9" * 400}}}\n' * 30, "runs.jsonl")


@case(TABLE, "runs.parquet")
def a_table_of_damaged_parquet(place):
    return table(place, written({"N": [1.0]})[:-20] + bytes(20), "runs.parquet")


@case(TABLE)
def a_table_that_is_a_pipe(place):
    fifo(place.path / "runs.csv")
    return ["fit", "--law=chinchilla", f"--data={place.path / 'runs.csv'}"]


def sweep(place: Place, name: str, change, command: str = "report") -> list[str]:
    """A report of a sweep in which every object of one file is changed."""
    path = place.sweep() / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
    return reported(place, command)


def reported(place: Place, command: str = "report") -> list[str]:
    if command == "report":
        return ["report", str(place.path / "sweep"), f"--out={place.out}"]
    return ["sweep", f"--folder={place.path / 'sweep'}", "--list"]


@case(SWEEP, "trials.jsonl")
def trials_outside_of_the_sweep(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"trial": "../../../etc"})


@case(SWEEP, "trials.jsonl")
def trials_with_losses_of_text(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"bits_per_byte": "1\x1b[2J"})


@case(SWEEP, "trials.jsonl")
def trials_with_documents_of_text(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"document_bits": ["x"] * 40})


@case(SWEEP, "trials.jsonl")
def trials_tuned_by_others(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"tuned": {row["trial"]: 1.0}})


@case(SWEEP, "trials.jsonl")
def trials_beyond_all_numbers(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"bits_per_byte": 10**400})


@case(SWEEP, "trials.jsonl")
def trials_of_other_kinds_listed(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"tuned": [1]}, "list")


@case(SWEEP, harmless=True)
def trials_with_escape_sequences_listed(place):
    return sweep(place, "trials.jsonl", lambda row: row | {"reason": "\x1b[2J\x1b]0;x\x07"}, "list")


@case(SWEEP, "sweep.json")
def a_plan_without_cells(place):
    return sweep(place, "sweep.json", lambda plan: plan | {"cells": [{}]})


@case(SWEEP, "sweep.json")
def a_plan_of_equal_cells(place):
    return sweep(place, "sweep.json", lambda plan: plan | {"cells": plan["cells"][:1] * 2})


@case(SWEEP, "sweep.json")
def a_plan_with_a_hundred_thousand_ranges(place):
    ranges = {f"r{n}": [0, 1, "log"] for n in range(100_000)}
    return sweep(
        place, "sweep.json", lambda plan: plan | {"tuning": {"trials": 1, "ranges": ranges}}
    )


@case(SWEEP, "sweep.json")
def a_plan_without_a_baseline(place):
    cells = {"baseline": "another"}
    return sweep(
        place, "sweep.json", lambda p: p | {"cells": [cell | cells for cell in p["cells"]]}
    )


@case(SWEEP, "curves.jsonl")
def curves_below_zero(place):
    return sweep(place, "curves.jsonl", lambda row: row | {"flops": -1.0})


@case(SWEEP, "curves.jsonl")
def curves_of_text(place):
    return sweep(place, "curves.jsonl", lambda row: row | {"load/dropped": "x"})


@case(SWEEP, "curves.jsonl")
def curves_of_a_terabyte(place):
    place.sweep()
    sparse(place.path / "sweep" / "curves.jsonl")
    return reported(place)


@case(SWEEP, "trials.jsonl")
def trials_that_are_a_pipe(place):
    place.sweep()
    fifo(place.path / "sweep" / "trials.jsonl")
    return reported(place)


@case(SWEEP, "routing.jsonl")
def layers_that_change(place):
    place.sweep()
    for path in place.path.rglob("routing.jsonl"):
        path.write_text('{"count": [[1]], "kept": [[1]]}\n{"count": [[1, 2]], "kept": [[1, 2]]}\n')
    return reported(place)


@case(SWEEP, "routing.jsonl")
def layers_without_numbers(place):
    place.sweep()
    for path in place.path.rglob("routing.jsonl"):
        path.write_text('{"count": [["1", 2]], "kept": [[null, 2]]}\n')
    return reported(place)


@case(SWEEP, "routing.jsonl")
def layers_beyond_all_numbers(place):
    place.sweep()
    for path in place.path.rglob("routing.jsonl"):
        path.write_text('{"count": [[1e999, 2]], "kept": [[NaN, 2]]}\n')
    return reported(place)


@case(SWEEP, "routing.jsonl")
def a_million_layers(place):
    place.sweep()
    row = json.dumps({"count": [[1]] * 10**6, "kept": [[1]] * 10**6}) + "\n"
    for path in place.path.rglob("routing.jsonl"):
        path.write_text(row)
    return reported(place)


@case(SWEEP, harmless=True)
def names_that_are_code(place):
    wild = '<script src="http://example.com/x.js">alert(1)</script>\u202e$\\frac{'

    def change(row):
        return json.loads(json.dumps(row).replace('"good', json.dumps(wild)[:-1]))

    sweep(place, "sweep.json", change)
    path = place.path / "sweep" / "trials.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reported(place)
