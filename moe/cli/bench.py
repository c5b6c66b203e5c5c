"""`moe bench`: times of routers, layers and decoding on this machine."""

from collections.abc import Callable, Iterator
import functools
import json
from pathlib import Path

from moe.cli.commands import BENCH
from moe.errors import UserError, nearest

SUITES = ("routers", "layer", "decode")
DTYPES = ("float32", "bfloat16")


def run(flags) -> int:
    """Print a line for each result as it is measured; `--json` also writes the list of them."""
    if flags.suite not in SUITES:
        hint = nearest(flags.suite, SUITES) or f"; there is {', '.join(SUITES)}"
        raise UserError(f"moe bench has no suite {flags.suite!r}{hint}")
    _refuse_others(flags)
    rows = list({"routers": routers, "layer": layer, "decode": decode}[flags.suite](flags))
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def _refuse_others(flags) -> None:
    """UserError for a flag of another suite, which this one would not read."""
    for flag in BENCH.flags:
        suite, given = flag.help.partition(": ")[0], getattr(flags, flag.name)
        if suite in SUITES and suite != flags.suite and given not in (flag.default, [], None):
            raise UserError(
                f"--{flag.name} is of `moe bench {suite}`; {flags.suite} has no use for it"
            )


def routers(flags) -> Iterator[dict]:
    """Print a line for each router, and yield it as a row."""
    from moe.bench import routers
    from moe.machine import hardware

    print(f"{hardware.describe_device()}; {flags.tokens:,} tokens, width {flags.width}, ", end="")
    print(f"{flags.experts} experts, float32; medians of {routers.REPEATS}")
    for row in routers.routers(flags.tokens, flags.width, flags.experts):
        share = f"{row['fraction_of_layer']:7.1%}"
        print(f"  {row['milliseconds']:10.2f} ms {share}  {row['router']}", flush=True)
        yield row


def layer(flags) -> Iterator[dict]:
    """Print a line for each case, routing and dispatcher, and yield it as a row; then the means."""
    from moe.bench import layer
    from moe.machine import hardware
    from moe.runs.tracking import progress

    if flags.dtype not in DTYPES:
        raise UserError(f"--dtype={flags.dtype}: one of {', '.join(DTYPES)}")
    try:
        cases = tuple(map(layer.Case.read, flags.case)) or layer.CASES
    except ValueError as error:
        raise UserError(str(error)) from error
    device = hardware.describe_device()
    print(f"{device}; {flags.dtype}; medians of {layer.ROUNDS} paired calls")
    print(
        "ms of forward and of forward + backward (over the dense layer's), share of the roofline,"
    )
    print("peak memory over the dense layer's with all experts' weights")
    rows = []
    for row in progress.with_status(lambda say: layer.layers(cases, flags.dtype, say)):
        where = f"{row['case']:34} {row['routing']:9} {row['dispatcher']:36}"
        rows.append(row)
        yield row
        if "error" in row:
            print(f"  {where} {row['error']}", flush=True)
            continue
        forward, both = (
            f"{row[f'milliseconds_{what}']:9.1f} ({row[f'ratio_to_dense_{what}']:.2f})"
            for what in ("forward", "step")
        )
        memory = f"{row['memory_ratio']:5.2f}" if "memory_ratio" in row else ""
        line = f"  {where} {forward} {both} {row['roofline_fraction']:5.2f} {memory}"
        print(line.rstrip(), flush=True)
    for name, mean in layer.summary(rows).items():
        print(f"  geometric mean, {name}: {mean:.2f}")


def decode(flags) -> Iterator[dict]:
    """Print a line for each model and batch size, and yield it as a row; `--plot` draws them."""
    from moe.bench import decode, layer, twins
    from moe.cli import config
    from moe.inference.decoder import Decoder, reason_to_recompute
    from moe.inference.generate import check
    from moe.machine import hardware
    from moe.planning.serving import Serving
    from moe.runs.restore import restore_run
    from moe.training.abstract_model import Vocabulary

    if flags.workdir is None:
        raise UserError("moe bench decode measures a run's model: give --workdir=FOLDER")
    spec = config.of_folder(flags.workdir, imports=vars(flags)["import"])
    run = restore_run(flags.workdir, spec)
    length = run.spec.sequence_length
    check(run.model, length)
    if why := reason_to_recompute(run.model.module):
        raise UserError(f"nothing to measure, since every token takes a whole pass: {why}")
    models = [("the run's", run.model, Decoder(run.model.graph, run.params, run.router_state))]
    if flags.twins:
        models += twins.dense_twins(run.spec, run.model, Vocabulary.of(run.tokenizer))
    print(f"{hardware.describe_device()}; texts of {length} tokens, drawn by the model; ", end="")
    print("medians, and the fastest of three prefills")
    print(
        "batch, ms of a prefill of half a text, ms of a step, tokens/s, experts read per layer,\n"
        "bytes per token of weights and of cache, share of the roofline by a copy's bandwidth"
    )
    bandwidth = max(layer.copy_bandwidth() for _ in range(3))
    machine = decode.Machine(bandwidth, hardware.matmul_peak(run.model.module.compute_dtype))
    rows = []
    for name, model, decoder in models:
        if flags.twins:
            print(f"{name}: {model.costs.parameters_total:,} parameters")
        flops = sum(Serving.of(model).flops(length).values())
        given = decoder, run.tokenizer.document_id, length, flops, machine
        for row in measured(functools.partial(decode.decode, *given)):
            rows.append({"model": name, **row})
            yield rows[-1]
    if flags.plot:
        decode.draw(rows, Path(flags.plot))


def measured(work: Callable[..., Iterator[dict]]) -> Iterator[dict]:
    """Print a line for each row of `bench.decode.decode`, and yield it."""
    from moe.runs.tracking import progress

    for row in progress.with_status(work):
        experts = " ".join(f"{count:.1f}" for count in row["distinct_experts_per_layer"])
        times = f"{row['prefill_milliseconds']:9.1f} {row['milliseconds_per_step']:8.2f}"
        size = f"{row['weight_bytes_per_token']:12,} {row['cache_bytes_per_token']:8,}"
        share = f"{row['bandwidth_roofline_fraction']:5.2f}"
        rate = f"{row['tokens_per_second']:9,.0f}"
        print(f"  {row['batch']:3} {times} {rate}  [{experts}] {size} {share}", flush=True)
        yield row
