"""`moe prune`: a trained run with fewer experts, or its loss over the experts that stay."""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path

from moe import settings
from moe.cli import config
from moe.cli.eval import evaluate_run
from moe.errors import UserError, printable
from moe.pruning.choose import Choice, How, choose
from moe.pruning.curve import picture
from moe.pruning.measure import Measured, measured_on_text
from moe.pruning.refusals import check_model, check_sizes, check_smaller, experts_of
from moe.pruning.shrink import shrunk
from moe.pruning.write import refuse_existing, write_run
from moe.runs.restore import Restored, restore_run, stored
from moe.runs.storage.folder import RunFolder
from moe.runs.storage.json_files import write_json
from moe.training.abstract_model import AbstractModel, Vocabulary
from moe.training.run_spec import RunSpec

Load = Callable[[list[str]], RunSpec]  # the run's spec, with further settings


def run(flags) -> int:
    """Write the folder `--to`, or measure the `--curve`; `--json` has what was found."""
    sizes, how = sizes_of(flags.experts), How(flags.method, flags.by, flags.seed)
    check_targets(flags, sizes)
    imports = vars(flags)["import"]

    def load(more: list[str]) -> RunSpec:
        return config.of_folder(flags.workdir, [*flags.gin_bindings, *more], imports)

    restored = with_float_weights(flags.workdir, load([]), flags.step)
    check_model(restored.model)
    check_sizes(restored.model, sizes)
    models = {size: smaller_model(load, restored, size) for size in sizes}
    found = calibrated(restored, flags.calibration_bytes, flags.seed)
    about = {
        "run": flags.workdir,
        "step": restored.step,
        "experts": experts_of(restored.model),
        "calibration_bytes": flags.calibration_bytes,
        "calibration_tokens": found.tokens,
        "seed": flags.seed,
    }
    if flags.to:
        result = written(flags, *models[sizes[0]], restored, found, how, about)
    else:
        rows = curve(restored, models, found, variants(how))
        whole = row_of(restored, "whole", "whole")
        print(line_of(whole))
        result = {**about, "whole": whole, "rows": rows}
        path = Path(flags.curve)
        write_json(path, result)
        picture(path.with_suffix(".png"), rows, whole, Path(flags.workdir).name)
    if flags.json:
        write_json(Path(flags.json), result)
    return 0


def sizes_of(text: str) -> list[int]:
    """The numbers of experts in "6,4,2"; UserError where there are others than whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--experts={text}: whole numbers are expected, such as 4 or 6,4,2")
    sizes = list(dict.fromkeys(map(int, parts)))
    if 0 in sizes:
        raise UserError(f"--experts={text}: a layer needs at least 1 expert")
    return sizes


def check_targets(flags, sizes: list[int]) -> None:
    """Raise UserError unless there is one thing to be written, and room for it."""
    if bool(flags.to) == bool(flags.curve):
        raise UserError("moe prune needs --to=FOLDER, for a new run, or --curve=PATH.json")
    if flags.to:
        refuse_existing(Path(flags.to))
        if len(sizes) > 1:
            raise UserError(f"--experts={flags.experts}: a new run has one number; or use --curve")
        return
    path = Path(flags.curve)
    if path.suffix != ".json" or not path.absolute().parent.is_dir():
        raise UserError(f"--curve={path}: expected NAME.json in a folder that is there")


def with_float_weights(workdir: str, spec: RunSpec, step: int | None) -> Restored:
    """The run, whose model rounds the weights itself where its spec says so (`train.weights`)."""
    run = restore_run(workdir, dataclasses.replace(spec, weights=None), step)
    graph = dataclasses.replace(run.model.graph, rounding=spec.weights)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, graph=graph), spec=spec)


def smaller_model(load: Load, run: Restored, size: int) -> tuple[RunSpec, AbstractModel]:
    """The spec and model of the run with so many experts in each layer.

    Raises:
        UserError: the router needs more, as for its K.
    """
    more = [f"MoELayer.num_experts = {size}"]
    if run.spec.start_from is not None:  # of the run that was pruned: it has all experts
        more += ["train.start_from = None", "train.start_from_optimizer = False"]
    spec = load(more)
    try:
        model = spec.build_model(Vocabulary.of(run.tokenizer))
    except UserError as error:
        raise UserError(f"--experts={size}: {error}") from error
    check_smaller(model, size)
    return spec, stored(spec, model)


def calibrated(run: Restored, num_bytes: int, seed: int) -> Measured:
    """What each expert does for about so much of the run's training text."""
    data = run.text(": calibration needs it")
    return measured_on_text(run.model, run, run.mesh, data, num_bytes, seed)


def with_fewer(run: Restored, model: AbstractModel, choice: Choice) -> Restored:
    """The run with the experts of a choice."""
    values = run.params, run.router_state
    params, router_state = shrunk(run.model, model, values, choice)
    return dataclasses.replace(run, model=model, params=params, router_state=router_state)


def written(
    flags,
    spec: RunSpec,
    model: AbstractModel,
    run: Restored,
    found: Measured,
    how: How,
    about: dict,
) -> dict:
    """Write the run with fewer experts, and say which were kept; returns what was found.

    spec, model: of the new run, whose settings gin still holds.
    """
    size = experts_of(model)
    choice = choose(found, how, size)
    result = {
        **about,
        "method": how.method,
        "by": how.by,
        "kept": choice.kept_LN.tolist(),
        "scores": how.score_LE(found).tolist(),
    }
    if how.method == "merge":
        homes = zip(choice.kept_LN, choice.home_LE, strict=True)
        result["merged_into"] = [kept_N[home_E].tolist() for kept_N, home_E in homes]
    new = dataclasses.replace(with_fewer(run, model, choice), spec=spec)
    text = settings.operative()
    write_run(Path(flags.to), new, text, RunFolder(flags.workdir), result)
    for layer, kept in enumerate(result["kept"]):
        print(f"layer {layer}: experts {', '.join(map(str, kept))}")
    costs = new.model.costs
    print(
        printable(
            f"{flags.to}: {size} of {about['experts']} experts in each layer, "
            f"{costs.parameters_total:,} parameters; measure it by moe eval --workdir={flags.to}, "
            f"train it on by train.start_from = {flags.to!r}"
        )
    )
    return result


def variants(how: How) -> list[How]:
    """The lines of a curve: pruning and merging by the score, and pruning by chance."""
    by = [dataclasses.replace(how, method=method) for method in ("prune", "merge")]
    control = dataclasses.replace(how, method="prune", by="random")
    return list(dict.fromkeys([*by, control]))


def curve(
    run: Restored,
    models: dict[int, tuple[RunSpec, AbstractModel]],
    found: Measured,
    ways: list[How],
) -> list[dict]:
    """The held-out bits per byte for every number of experts and every way."""
    rows = []
    for size, (_, model) in models.items():
        for how in ways:
            fewer = functools.partial(with_fewer, run, model)
            rows.append(row_of(fewer(choose(found, how, size)), how.method, how.by))
            print(line_of(rows[-1]), flush=True)
    return rows


def row_of(run: Restored, method: str, by: str) -> dict:
    """What a model reaches on the held-out text."""
    score = evaluate_run(run)
    return {
        "experts": experts_of(run.model),
        "method": method,
        "by": by,
        "bits_per_byte": score.bits_per_byte,
        "parameters_total": run.model.costs.parameters_total,
    }


def line_of(row: dict) -> str:
    """A row for the screen."""
    way = "the whole model" if row["method"] == "whole" else f"{row['method']}, by {row['by']}"
    return f"{row['experts']:>5} experts  {way:<20}  {row['bits_per_byte']:.4f} bits per byte"
