"""Hostile configs, run folders, checkpoints and tokenizers: cases for `hostile.py`."""

import json
import os
from pathlib import Path
import shutil

from hostile import Place, case, fifo, sparse

from moe.runs.storage import manifest

CONFIG = "a config"
RUN, CHECKPOINT, TOKENIZER = "a run's folder", "a checkpoint", "a tokenizer"


def config(place: Place, text: str, command: str = "describe") -> list[str]:
    """A received run's config with this text."""
    place.write("run/config.gin", f"include 'quickstart.gin'\n{text}\n")
    return [command, f"--workdir={place.path / 'run'}"]


@case(CONFIG, "config.gin:2")
def imports_a_module(place):
    return config(place, "import evil_module", "eval")


@case(CONFIG, "config.gin:2")
def imports_from_a_module(place):
    return config(place, "from evil_module import x", "generate")


@case(CONFIG, "config.gin:2")
def imports_as_another(place):
    return config(place, "import evil_module as layers")


@case(CONFIG, "config.gin:3")
def registers_dynamically(place):
    text = "from __gin__ import dynamic_registration\nimport evil_module\nevil_module.f.x = 1"
    return config(place, text)


@case(CONFIG, "config.gin:2")
def calls_a_function_of_python(place):
    return config(place, "train.prompts = @os.system()")


@case(CONFIG, "config.gin:2")
def includes_what_lies_elsewhere(place):
    return config(place, "include '../precious'")


@case(CONFIG, "config.gin:2")
def includes_the_password_file(place):
    return config(place, "include '/etc/passwd'")


@case(CONFIG, "config.gin:2")
def includes_a_link(place):
    place.write("run/other", "")
    (place.path / "run" / "link.gin").symlink_to(place.path / "precious")
    return config(place, "include 'link.gin'")


@case(CONFIG, "config.gin:2")
def includes_a_pipe(place):
    place.write("run/other", "")
    fifo(place.path / "run" / "pipe.gin")
    return config(place, "include 'pipe.gin'")


@case(CONFIG)
def includes_fan_out(place):
    for n in range(22):
        place.write(f"run/{n}.gin", f"include '{n + 1}.gin'\n" * 2)
    place.write("run/22.gin", "")
    return config(place, "include '0.gin'")


@case(CONFIG, "circle")
def includes_itself(place):
    return config(place, "include 'config.gin'")


@case(CONFIG, "config.gin:2")
def is_nested_deeply(place):
    return config(place, "train.prompts = " + "(" * 100_000)


@case(CONFIG, "config.gin:2")
def holds_a_number_without_end(place):
    return config(place, f"train.steps = {'9' * 100_000}")


@case(CONFIG, "config.gin:2")
def holds_escape_sequences(place):
    return config(place, "train.steps = '\x1b]0;owned\x07'")


@case(CONFIG)
def holds_nothing_that_is_text(place):
    place.write("run/config.gin", b"\xff\xfe\x00\x00" * 1000)
    return ["describe", f"--workdir={place.path / 'run'}"]


@case(CONFIG)
def refers_to_itself(place):
    return config(place, "a = %b\nb = %a\ntrain.steps = %a")


@case(CONFIG)
def is_a_terabyte(place):
    place.write("run/other", "")
    sparse(place.path / "run" / "config.gin")
    return ["describe", f"--workdir={place.path / 'run'}"]


@case(CONFIG)
def is_a_pipe(place):
    place.write("run/other", "")
    fifo(place.path / "run" / "config.gin")
    return ["describe", f"--workdir={place.path / 'run'}"]


@case(CONFIG)
def is_a_device(place):
    place.write("run/other", "")
    (place.path / "run" / "config.gin").symlink_to("/dev/zero")
    return ["describe", f"--workdir={place.path / 'run'}"]


@case(CONFIG)
def asks_for_sizes_of_zero(place):
    return config(place, "Transformer.d_model = 0")


def damaged_run(place: Place, name: str, content: bytes | str, command: str = "verify"):
    """The command on a run with one file of this content."""
    place.run()
    place.write(f"run/{name}", content)
    return [command, str(place.path / "run")]


@case(RUN, "run.json")
def a_description_that_is_nested(place):
    return damaged_run(place, "run.json", "[" * 200_000)


@case(RUN, "run.json")
def a_description_of_other_kinds(place):
    return damaged_run(place, "run.json", '{"data": [], "tokenizer": {"a": NaN}}')


@case(RUN, "run.json")
def a_description_of_32_megabytes(place):
    return damaged_run(place, "run.json", b" " * 2**25)


@case(RUN, "run.json")
def a_description_that_is_a_pipe(place):
    fifo(place.run() / "run.json")
    return ["eval", f"--workdir={place.path / 'run'}"]


@case(RUN, "run.json")
def a_description_that_is_a_device(place):
    path = place.run() / "run.json"
    path.unlink()
    path.symlink_to("/dev/zero")
    return ["eval", f"--workdir={place.path / 'run'}"]


@case(RUN, "summary.json")
def a_summary_with_a_step_of_text(place):
    return damaged_run(place, "summary.json", '{"step": "\x1b[2J"}')


@case(RUN, "metrics.jsonl")
def a_log_with_a_line_without_end(place):
    return damaged_run(place, "metrics.jsonl", b"[" * 2**25 + b"\n{}\n")


@case(RUN, ".lock")
def a_lock_that_is_a_pipe(place):
    fifo(place.run() / ".lock")
    return goes_on(place)


@case(RUN, "metrics.jsonl")
def a_log_that_is_a_pipe(place):
    fifo(place.run() / "metrics.jsonl")
    return goes_on(place)


@case(RUN, "samples.txt")
def a_result_that_is_a_link(place):
    path = place.run() / "samples.txt"
    path.unlink(missing_ok=True)
    path.symlink_to(place.path / "precious")
    return goes_on(place)


@case(RUN, "manifest.json", harmless=True)
def folders_in_a_circle(place):
    (place.run() / "checkpoints" / "2" / "again").symlink_to(place.path / "run")
    return ["verify", str(place.path / "run")]


def goes_on(place: Place) -> list[str]:
    """Training goes on in the copied run."""
    return ["train", f"--gin_file={place.path}/run/config.gin", f"--workdir={place.path}/run"]


def checkpoint(place: Place) -> Path:
    """The newest checkpoint of a copied run, which has no other."""
    folder = place.run() / "checkpoints"
    steps = sorted(folder.iterdir(), key=lambda path: int(path.name))
    for path in steps[:-1]:
        shutil.rmtree(path)
    return steps[-1]


def sealed(folder: Path, content: object) -> None:
    """A manifest with a true checksum of false content."""
    (folder / manifest.NAME).write_bytes(manifest._text(content))  # type: ignore[arg-type]


def verified(place: Place) -> list[str]:
    return ["verify", str(place.path / "run")]


def evaluated(folder: Path) -> list[str]:
    """Evaluate a checkpoint whose manifest is made anew, as its author could."""
    (folder / manifest.NAME).unlink()
    manifest.write(folder, int(folder.name))
    return ["eval", f"--workdir={folder.parents[1]}"]


@case(CHECKPOINT, "manifest.json")
def a_manifest_that_is_nested(place):
    (checkpoint(place) / manifest.NAME).write_text('{"step":' * 100_000)
    return verified(place)


@case(CHECKPOINT, "manifest.json")
def a_manifest_of_other_kinds(place):
    sealed(checkpoint(place), {"step": "2", "files": {"a": None}})
    return verified(place)


@case(CHECKPOINT, "manifest.json")
def a_manifest_of_a_list(place):
    sealed(checkpoint(place), {"step": 2, "files": [1, 2]})
    return verified(place)


@case(CHECKPOINT, "etc/passwd is missing")
def a_manifest_of_files_elsewhere(place):
    sealed(checkpoint(place), {"step": 2, "files": {"../../../etc/passwd": [1, 2]}})
    return verified(place)


@case(CHECKPOINT, "manifest.json")
def a_manifest_that_is_a_pipe(place):
    fifo(checkpoint(place) / manifest.NAME)
    return verified(place)


@case(CHECKPOINT, "manifest.json")
def a_manifest_that_is_a_device(place):
    path = checkpoint(place) / manifest.NAME
    path.unlink()
    path.symlink_to("/dev/zero")
    return verified(place)


@case(CHECKPOINT, "bytes instead of")
def a_file_of_a_terabyte(place):
    sparse(next((checkpoint(place) / "state").glob("*METADATA")))
    return verified(place)


@case(CHECKPOINT, "no file")
def a_file_that_is_a_pipe(place):
    fifo(next((checkpoint(place) / "state").glob("*METADATA")))
    return verified(place)


@case(CHECKPOINT, harmless=True)
def steps_in_other_digits(place):
    folder = checkpoint(place)
    shutil.copytree(folder, folder.with_name("\u0663"))
    shutil.copytree(folder, folder.with_name("9" * 200))
    return verified(place)


@case(CHECKPOINT)
def arrays_described_by_nothing(place):
    folder = checkpoint(place)
    next((folder / "state").glob("_METADATA")).write_text("[" * 100_000)
    return evaluated(folder)


@case(CHECKPOINT, harmless=True)
def handlers_of_a_module(place):
    folder = checkpoint(place)
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["item_handlers"] = {"state": "evil_module.Handler", "extra": "evil_module.Handler"}
    path.write_text(json.dumps(content))
    return evaluated(folder)


@case(CHECKPOINT)
def arrays_of_nothing(place):
    folder = checkpoint(place)
    for path in (folder / "state").rglob("*"):
        if path.is_file() and "METADATA" not in path.name:
            path.write_bytes(os.urandom(path.stat().st_size))
    return evaluated(folder)


def empty(**parts: object) -> str:
    """A tokenizer.json of two tokens."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole = {"version": "1.0", "added_tokens": [], "model": model, **dict.fromkeys(names)}
    return json.dumps(whole | parts)


def tokenizer(place: Place, content: bytes | str) -> list[str]:
    """A received run's tokenizer."""
    return damaged_run(place, "tokenizer/tokenizer.json", content)


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_of_nothing(place):
    return tokenizer(place, b"\x00" * 100)


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_that_is_nested(place):
    return tokenizer(place, '{"a":' * 100_000)


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_of_a_terabyte(place):
    place.run()
    sparse(place.path / "run/tokenizer/tokenizer.json")
    return verified(place)


@case(TOKENIZER, "its largest token is")
def a_tokenizer_of_four_billion_tokens(place):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []}
    return tokenizer(place, empty(model=model))


@case(TOKENIZER, "times longer")
def a_tokenizer_that_unfolds(place):
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}
    return tokenizer(place, empty(normalizer={"type": "Sequence", "normalizers": [one] * 12}))


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_that_panics(place):
    return tokenizer(place, empty(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}))


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_that_panics_in_decoding(place):
    strip = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    return tokenizer(place, empty(decoder=strip))


@case(TOKENIZER, "tokenizer.json")
def a_tokenizer_with_a_bad_expression(place):
    split = {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}
    return tokenizer(place, empty(pre_tokenizer=split))


@case(TOKENIZER, "cannot encode")
def a_tokenizer_that_backtracks(place):
    expression = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": expression, "behavior": "Isolated", "invert": False}
    path = place.write("tokenizer.json", empty(pre_tokenizer=split))
    place.write("texts/a.txt", "a" * 50 + "c")
    place.write("texts/b.txt", "b")
    return trained(
        place,
        *(
            f"TextFiles.paths = {str(place.path / 'texts')!r}",
            f"TokenizerFile.path = {str(path)!r}",
        ),
        *("TextData.corpus = @TextFiles()", "TextData.tokenizer = @TokenizerFile()"),
    )


def trained(place: Place, *settings: str) -> list[str]:
    """Begin to train with these settings in place of the quickstart's."""
    cache = f"TextData.cache_dir = {str(place.out / 'cache')!r}"
    given = (*settings, *([cache] if "TextData" in "".join(settings) else []))
    bindings = [f"--gin_bindings={setting}" for setting in given]
    return ["train", "--gin_file=quickstart.gin", f"--workdir={place.out / 'w'}", *bindings]
