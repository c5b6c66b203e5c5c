"""The table of commands and their flags, for the command line and for `moe COMMAND --help`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        kind: str, int, float, bool or list (repeatable text).
        value: the word after `=` in the help.
        help: what the flag does.
        low, high: inclusive bounds of a number.
    """

    name: str
    kind: type
    value: str
    help: str
    default: object = None
    required: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def expected(self) -> str:
        """The kind and bounds in words, such as "a whole number of at least 1"."""
        nouns = {int: "a whole number", float: "a number", bool: "true or false"}
        noun = nouns.get(self.kind, "text")
        if self.high is not None:
            return f"{noun} from {self.low:g} to {self.high:g}"
        return noun if self.low is None else f"{noun} of at least {self.low:g}"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: holds `run(flags) -> int`; it is imported only when the command runs.
        positional: name of the one argument without a flag; None if the command takes none.
        optional: whether that argument may be left out.
        many: whether there may be several; it is a list then.
        form: that argument in the help.
    """

    name: str
    summary: str
    module: str
    example: str
    flags: tuple[Flag, ...]
    positional: str | None = None
    optional: bool = False
    many: bool = False
    form: str = ""


GIN_FILE = Flag(
    "gin_file", list, "NAME", "a config, from this folder or a shipped one (repeatable)"
)
GIN_BINDINGS = Flag(
    "gin_bindings", list, "SETTING", 'one setting, as "train.steps = 50" (repeatable)'
)
JSON = Flag("json", str, "PATH", "also write the results to this file")
RUN = Flag("workdir", str, "FOLDER", "the folder of a run", required=True)
IMPORT = Flag(
    "import", list, "MODULE", "with --workdir: a module of yours that the run needs (repeatable)"
)

PROCESSES = (
    Flag("processes", str, "N", "train in N processes together; auto on TPU pods, Slurm, ..."),
    Flag("coordinator", str, "HOST:PORT", "with --processes=N: where the first process listens"),
    Flag("process", int, "I", "with --processes=N: index of this process, from 0", low=0),
)

TRAIN = Command(
    name="train",
    summary="Train a model, or continue the run that the folder holds.",
    module="moe.cli.train",
    example="moe train --gin_file=quickstart.gin --workdir=runs/quickstart",
    flags=(
        Flag("workdir", str, "FOLDER", "where the run is written", required=True),
        GIN_FILE,
        GIN_BINDINGS,
        JSON,
        *PROCESSES,
    ),
)

LAUNCH = Command(
    name="launch",
    summary="Train in several processes of this machine, started again when one of them dies.",
    module="moe.cli.launch",
    example="moe launch --processes=4 -- train --gin_file=quickstart.gin --workdir=runs/quick",
    flags=(
        Flag("processes", int, "N", "how many processes train together", required=True, low=1),
        Flag("restarts", int, "N", "at most, without a save between (default: 3)", 3, low=0),
    ),
    positional="command",
    many=True,
    form="-- train ...",
)

WEIGHTS = Flag(
    "weights", str, "FORMAT[:BLOCK]", "round weights to int8, int4, int2, nf4 or fp8, as int4:32"
)
WEIGHTS_OF = Flag(
    "weights_of", str, "ROLE,...", "with --weights: of which parameters, as expert,head"
)
ROUNDING = Flag(
    "rounding",
    str,
    "HOW",
    "with --weights: gptq, by the inputs of training text (default: nearest)",
    "nearest",
)
CALIBRATION = Flag(
    "calibration_bytes",
    int,
    "N",
    "with --rounding=gptq: how much of it (default: 200000)",
    low=1,
)

EVAL = Command(
    name="eval",
    summary="Measure a trained model on a corpus.",
    module="moe.cli.eval",
    example="moe eval --workdir=runs/quickstart --json=eval.json",
    flags=(
        RUN,
        GIN_BINDINGS,
        IMPORT,
        Flag("step", int, "N", "the checkpoint to measure (default: the last one)", low=0),
        WEIGHTS,
        WEIGHTS_OF,
        ROUNDING,
        CALIBRATION,
        JSON,
    ),
)

GENERATE = Command(
    name="generate",
    summary="Continue a text with a trained model.",
    module="moe.cli.generate",
    example='moe generate --workdir=runs/quickstart --prompt="Once upon" --tokens=64',
    flags=(
        RUN,
        IMPORT,
        Flag("prompt", str, "TEXT", "the text to continue (default: none)", ""),
        Flag(
            "tokens", int, "N", "tokens to add (default: 128, or what a draft has room for)", low=1
        ),
        Flag("temperature", float, "X", "0 takes the likeliest token (default: 1)", 1.0, low=0),
        Flag("top_k", int, "N", "draw from the N likeliest tokens (default: all)", low=1),
        Flag("top_p", float, "X", "draw from this share of probability", low=0, high=1),
        Flag("min_p", float, "X", "draw from tokens this likely beside the first", low=0, high=1),
        Flag(
            "repetition_penalty",
            float,
            "X",
            "above 1: tokens that the text holds become less likely (default: 1)",
            1.0,
            low=0.1,
        ),
        Flag(
            "logit_bias",
            list,
            "TOKEN:X",
            "add X to a token's logit, by its id or text; -inf bans it (repeatable)",
        ),
        Flag("context", int, "N", "tokens that the model sees (default: as trained)", low=1),
        Flag("draft", str, "FOLDER", "a smaller run that guesses ahead; lookup, jacobi, lookahead"),
        Flag("beams", int, "N", "the N likeliest texts as a whole, by beam search", low=1),
        Flag("ahead", int, "N", "with --draft: tokens that it guesses (default: 4)", 4, low=1),
        Flag("order", str, "ORDER", "of <mask>s: surest first (the default), or left", "surest"),
        Flag("seed", int, "N", "same seed, same texts (default: 0)", 0, low=0, high=2**32 - 1),
        Flag("count", int, "N", "how many texts (default: 1)", 1, low=1),
        WEIGHTS,
        WEIGHTS_OF,
        ROUNDING,
        CALIBRATION,
        Flag("best_of", int, "N", "draw N texts and keep the likeliest (--count of them)", low=1),
        JSON,
    ),
)

PRUNE = Command(
    name="prune",
    summary="Take experts out of a trained run, or merge them; or measure what that would cost.",
    module="moe.cli.prune",
    example="moe prune --workdir=runs/quickstart --experts=4 --to=runs/pruned",
    flags=(
        RUN,
        GIN_BINDINGS,
        IMPORT,
        Flag("step", int, "N", "the checkpoint to prune (default: the last one)", low=0),
        Flag("experts", str, "N,...", "how many each layer keeps; several for --curve", None, True),
        Flag("to", str, "FOLDER", "where the new run is written; train.start_from trains it on"),
        Flag("curve", str, "PATH.json", "instead: held-out loss by experts kept, and a PNG"),
        Flag("method", str, "METHOD", "prune, or merge into the nearest (default: prune)", "prune"),
        Flag("by", str, "SCORE", "the lowest go: saliency, load or random", "saliency"),
        Flag(
            "calibration_bytes",
            int,
            "N",
            "of training text, to score experts on (default: 200000)",
            200_000,
            low=1,
        ),
        Flag("seed", int, "N", "of the calibration text and of --by=random (default: 0)", 0, low=0),
        JSON,
    ),
)

CHECK = Command(
    name="check",
    summary="Check a router: does it leak, starve its gradient, count padding, know the mesh?",
    module="moe.cli.check",
    example="moe check my_router.py:MyRouter",
    flags=(
        Flag("experts", int, "N", "experts of the layer it is checked in (default: 4)", 4, low=1),
        GIN_BINDINGS,
        JSON,
    ),
    positional="router",
    form="MODULE:ROUTER",
)

BENCH = Command(
    name="bench",
    summary="Measure what routers, layers beside a dense one, or a run's decoding cost.",
    module="moe.cli.bench",
    example="moe bench layer --json=layer.json",
    flags=(
        Flag("tokens", int, "N", "routers: tokens in the batch (default: 8192)", 8192, low=1),
        Flag("width", int, "N", "routers: width of the model (default: 512)", 512, low=1),
        Flag("experts", int, "N", "routers: experts (default: 64)", 64, low=8),
        Flag("case", list, "T,D,F,E,K", "layer: sizes to measure (repeatable; default: four)"),
        Flag("dtype", str, "TYPE", "layer: float32 or bfloat16 (default: float32)", "float32"),
        Flag("workdir", str, "FOLDER", "decode: the folder of a run"),
        IMPORT,
        Flag("twins", bool, "BOOL", "decode: also dense models of equal size", False),
        Flag("plot", str, "PATH", "decode: draw tokens/s over texts, measured and predicted"),
        JSON,
    ),
    positional="suite",
    form="routers|layer|decode",
)

PLAN = Command(
    name="plan",
    summary="Compile a config for TPUs or GPUs: what it needs, and whether it fits.",
    module="moe.cli.plan",
    example="moe plan --gin_file=quickstart.gin --topology=v5e:2x2",
    flags=(
        Flag("topology", str, "KIND:AxB", "such as v5p:4x4x8, v5e-8, h100:64", required=True),
        GIN_FILE,
        GIN_BINDINGS,
        Flag("vocab_size", int, "N", "token ids (default: 50304)", 50_304, low=2),
        Flag("tries", int, "N", "changes to compile if it doesn't fit (default: 3)", 3, low=0),
        JSON,
    ),
)

COST = Command(
    name="cost",
    summary="Count what a model costs to serve: FLOPs, weights, caches, time of a step on a chip.",
    module="moe.cli.cost",
    example="moe cost --gin_file=pod_mixtral_8x7b.gin --chip=h100 --chips=8 --context=4096",
    flags=(
        GIN_FILE,
        GIN_BINDINGS,
        Flag("workdir", str, "FOLDER", "the folder of a run, in place of --gin_file"),
        IMPORT,
        Flag("chip", str, "KIND", "such as h100 or v5e (default: h100)", "h100"),
        Flag("chips", int, "N", "how many share the work evenly (default: 1)", 1, low=1),
        Flag("context", int, "N", "tokens that a text holds (default: as trained)", low=1),
        Flag("dtype", str, "TYPE", "of weights and caches (default: bfloat16)", "bfloat16"),
        Flag("vocab_size", int, "N", "token ids (default: the tokenizer's)", low=2),
        JSON,
    ),
)

FIT = Command(
    name="fit",
    summary="Fit a scaling law to a table of runs: coefficients, predictions, the best sizes.",
    module="moe.cli.fit",
    example='moe fit --law=routed --data=runs.csv --columns="N=parameters,E=experts,L=loss"',
    flags=(
        Flag(
            "law",
            str,
            "LAW",
            "chinchilla, routed, joint, sparsity, ..., my_law.py:MyLaw",
            required=True,
        ),
        Flag("data", str, "PATH", "the table: CSV or JSON lines (.gz too), Parquet", required=True),
        Flag("columns", str, "TEXT", 'its columns, as "N=parameters,L=loss" (default: N, L)', ""),
        Flag("where", str, "TEXT", "rows to take, as \"router == 'Switch' and k in (1, 2)\"", ""),
        Flag("drop_highest", int, "N", "leave out the N highest losses (default: 0)", 0, low=0),
        Flag("fix", str, "TEXT", 'coefficients that are given, as "E_start=2"', ""),
        Flag("bootstrap", int, "N", "resamples for 95 % intervals (default: 200)", 200, low=0),
        Flag("seed", int, "N", "of resamples and folds (default: 0)", 0, low=0),
        Flag("predict", list, "TEXT", 'a place, as "N=1e9,E=64" (repeatable)'),
        Flag("compare", str, "LAWS", "other laws, by their error on held-out points", ""),
        Flag("budget", float, "FLOPS", "find the best sizes for so much training", low=1),
        Flag("tokens", float, "N", "with --budget: training tokens, for laws without D", low=1),
        Flag("max_memory", float, "BYTES", "with --budget: for all weights at most", low=1),
        Flag("bytes_per_parameter", float, "X", "for --max_memory (default: 2)", low=0.1),
        Flag("max_inference", float, "FLOPS", "with --budget: a token's forward pass", low=1),
        Flag("plot", str, "PATH", "also draw fit and residuals (.png, .pdf, .svg)"),
        JSON,
    ),
)

SWEEP = Command(
    name="sweep",
    summary="Compare arms at matched budgets, tuned alike, with seeds; plans unless told to run.",
    module="moe.cli.sweep",
    example="moe sweep --gin_file=sweeps/routers.gin --run",
    flags=(
        Flag("folder", str, "FOLDER", "where the sweep is (default: runs/NAME, of NAME.gin)"),
        GIN_FILE,
        GIN_BINDINGS,
        Flag("run", bool, "BOOL", "run what is left of it (default: only print the plan)", False),
        Flag("workers", int, "N", "trials at a time (default: a core or device each)", 0, low=0),
        Flag("list", bool, "BOOL", "list the trials that have ended", False),
        Flag("retry_failed", bool, "BOOL", "with --run: failed trials run again", False),
        Flag("ray", str, "ADDRESS", "run on a Ray cluster; auto: the one this machine is in"),
        Flag("slurm", str, "PATH", "write a SLURM array script of --workers=N instead"),
        JSON,
    ),
)

REPORT = Command(
    name="report",
    summary="Judge sweeps: a page with figures and a table, under the finding in a sentence.",
    module="moe.cli.report",
    example="moe report runs/routers",
    flags=(Flag("out", str, "FOLDER", "where report.html and report.md go (default: the first)"),),
    positional="folders",
    many=True,
    form="FOLDER [FOLDER ...]",
)

VERIFY = Command(
    name="verify",
    summary="Verify a run's checkpoints and files, without a device; 1 where one is damaged.",
    module="moe.cli.verify",
    example="moe verify runs/quickstart",
    flags=(JSON,),
    positional="folder",
    form="FOLDER",
)

LIST = Command(
    name="list",
    summary="List what can be configured: routers, losses, optimizers, corpora, configs, ...",
    module="moe.cli.explain",
    example="moe list routers",
    flags=(),
    positional="kind",
    optional=True,
    form="[KIND]",
)

DESCRIBE = Command(
    name="describe",
    summary="Say what a config is: parameters, FLOPs, routing, settings; nothing is trained.",
    module="moe.cli.describe",
    example="moe describe --gin_file=quickstart.gin --gin_file=routers/switch.gin",
    flags=(
        Flag("workdir", str, "FOLDER", "describe this run instead of files"),
        GIN_FILE,
        GIN_BINDINGS,
        IMPORT,
        Flag("vocab_size", int, "N", "token ids (default: what the tokenizer asks for)", low=2),
        JSON,
    ),
)

COMMANDS = (
    *(TRAIN, LAUNCH, EVAL, GENERATE, PRUNE, CHECK, BENCH, PLAN, COST, SWEEP, REPORT, FIT),
    *(VERIFY, LIST, DESCRIBE),
)
