"""The reference of all configurables and their settings, read off the code and its docstrings."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import inspect
import re
import sys
import typing

from gin import config as gin_config

from moe.settings import check, types
from moe.settings.read import Reference
from moe.settings.resolved import shown
from routing.losses import RouterLoss

# The kind of a configurable, by the module or room that defines it; the longest match counts.
KINDS = {
    "routing.algorithms": "routers",
    "routing.balance_losses": "losses",
    "routing.losses": "losses",
    "routing.balancers": "balancers",
    "routing.capacity": "capacity",
    "routing.solvers.hash_tables": "hash_tables",
    "layers": "layers",
    "layers.dispatch": "dispatchers",
    "layers.experts": "experts",
    "moe.model": "model",
    "moe.data": "data",
    "moe.data.corpora": "corpora",
    "moe.data.mixture": "corpora",
    "moe.data.tokens": "tokenizers",
    "moe.model.sharding": "mesh",
    "moe.training.bad_steps": "run",
    "moe.training.corruption": "run",
    "moe.training.distillation": "run",
    "moe.training.objective": "objectives",
    "moe.training.optimizer": "optimizers",
    "moe.training.precision": "run",
    "moe.training.quantisation": "run",
    "moe.training.run_spec": "run",
    "moe.training.schedules": "schedules",
    "moe.runs.tracking": "loggers",
    "moe.sweeps": "sweeps",
    "moe.cli": "run",
}
OTHERS = "others"  # the kind of configurables in a user's own modules
SIZED_BY_MODEL = {"routers", "balancers", "layers", "experts", "model"}  # required arguments, too
YEAR = re.compile(r"\b(19|20)\d\d\b")  # in a text that cites a paper
HEADINGS = ("Args:", "Attributes:")
ENDS = ("Returns:", "Raises:", "Yields:")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One parameter of a configurable.

    Attributes:
        expected: its type and range in words.
        default: as a config writes it; None where there is no default.
        meaning: from the docstring.
    """

    name: str
    expected: str
    default: str | None
    meaning: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configurable.

    Attributes:
        text: its docstring without the list of settings, with the paper it is from.
        causality: a router's; None for others.
    """

    name: str
    kind: str
    text: str
    settings: tuple[Setting, ...]
    causality: str | None

    @property
    def summary(self) -> str:
        """The first sentence of the text, or its first paragraph where that is shorter."""
        paragraph = " ".join(self.text.split("\n\n")[0].split())
        return re.split(r"(?<=[\w)\]]\.) (?=[A-Z])", paragraph)[0]


def entries() -> list[Entry]:
    """Every registered configurable, sorted by name."""
    names = [n for n in check.configurables().values() if not n.startswith("gin.")]
    return [entry(name) for name in sorted(names, key=str.lower)]


def entry(name: str) -> Entry:
    """The configurable that a config calls `name`.

    Raises:
        KeyError: there is none, or several.
    """
    selector = check.resolve(name)
    if not isinstance(selector, str):
        raise KeyError(name)
    wrapped = gin_config._REGISTRY[selector].wrapped
    text, words = _read(inspect.getdoc(wrapped) or "")
    for base in getattr(wrapped, "__mro__", ())[1:]:  # a base class may describe settings, too
        words = _read(inspect.cleandoc(base.__doc__ or ""))[1] | words
    kind = kind_of(wrapped)
    text = _with_its_source(text, wrapped, kind)
    parameters = check.parameters(selector) or {}
    hints = {key: check.annotation_of(selector, one) for key, one in parameters.items()}
    parameters = {
        key: one
        for key, one in parameters.items()
        if not (one.default is one.empty and _only_from_code(hints[key]))
    }
    if kind in SIZED_BY_MODEL:  # the code gives their required arguments, not a config
        parameters = {k: p for k, p in parameters.items() if p.default is not p.empty}
    settings = tuple(
        Setting(
            key,
            types.described(hints[key]) if hints[key] is not one.empty else "a value",
            _default(wrapped, one),
            words.get(key, ""),
        )
        for key, one in parameters.items()
    )
    causality = getattr(wrapped, "causality", None)
    word = str(getattr(causality, "value", causality)) if causality is not None else None
    return Entry(name, kind, text, settings, word)


def _default(wrapped: Callable, parameter: inspect.Parameter) -> str | None:
    """A parameter's default as a config writes it; None where it has to be given."""
    value = parameter.default
    if value in (parameter.empty, gin_config.REQUIRED):
        return None
    field = getattr(wrapped, "__dataclass_fields__", {}).get(parameter.name)
    if field is not None and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return shown(value)


def _with_its_source(text: str, wrapped: Callable, kind: str) -> str:
    """The text, completed from the docstring of the configurable's module.

    For the only router of a file, the file's first paragraph is put before it. Where the text cites
    no paper, the module's paragraph that does is appended.
    """
    module = inspect.cleandoc(sys.modules[wrapped.__module__].__doc__ or "").split("\n\n")
    if kind == "routers" and _alone(wrapped):
        text = f"{_without_name(module[0], wrapped.__name__)}\n\n{text}"
    if not YEAR.search(text):
        text = "\n\n".join(
            [text, *[paragraph for paragraph in module if YEAR.search(paragraph)][:1]]
        )
    return text


def _alone(wrapped: Callable) -> bool:
    """Whether a configurable is the only one of its kind in its module."""
    everything = [one.wrapped for _, one in gin_config._REGISTRY.items()]
    near = [one for one in everything if one.__module__ == wrapped.__module__]
    return sum(kind_of(one) == kind_of(wrapped) for one in near) == 1


def _without_name(line: str, name: str) -> str:
    """The line without a leading name: "Switch: one expert ..." becomes "One expert ..."."""
    first, colon, rest = line.partition(": ")
    if colon and re.sub(r"\W", "", first).lower() == name.removesuffix("Router").lower():
        return rest[0].upper() + rest[1:]
    return line


def _only_from_code(hint: typing.Any) -> bool:
    """Whether no configurable makes such an object, such as the restored run of `eval`."""
    return inspect.isclass(hint) and types.described(hint) == f"a {hint.__name__}"


def kind_of(wrapped: Callable) -> str:
    """The kind, by the defining module; but losses may stand beside the router they are for."""
    if inspect.isclass(wrapped) and issubclass(wrapped, RouterLoss):
        return "losses"
    fits = [name for name in KINDS if f"{wrapped.__module__}.".startswith(f"{name}.")]
    return KINDS[max(fits, key=len)] if fits else OTHERS


def _read(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring's text without Args and Attributes, and the meaning of each of these by name."""
    text, words, names, inside = [], {}, [], False
    for line in doc.splitlines():
        if line.strip() in (*HEADINGS, *ENDS):
            inside = line.strip() in HEADINGS
            names = []
            if line.strip() in ENDS:
                break
        elif not inside:
            text.append(line)
        elif match := re.match(r"    ([a-z]\w*(?:, [a-z]\w*)*): (.*)", line):
            names = match[1].split(", ")
            words |= dict.fromkeys(names, match[2])
        elif line.strip():
            words |= {name: f"{words[name]} {line.strip()}" for name in names}
    for meaning in list(words.values()):  # "a: this; b: that"
        for other in re.finditer(r"[;.] ([a-z]\w*): (.*)", meaning):
            words.setdefault(other[1], other[2])
    return "\n".join(text).strip(), words


def places(name: str) -> list[str]:
    """The settings that accept a configurable, as a config writes them: MoELayer.router = @Switch.

    Settings that accept any module are left out.
    """
    found, any_module = [], Reference("MoELayer", False)
    for other in check.configurables().values():
        if other.startswith("gin."):
            continue
        selector = str(check.resolve(other))
        for key, one in (check.parameters(selector) or {}).items():
            hint = check.annotation_of(selector, one)
            if hint in (one.empty, typing.Any):
                continue
            for form in (Reference(name, False), Reference(name, True)):
                if form != any_module and types.fits(any_module, hint):
                    continue
                if types.fits(form, hint):
                    found.append(f"{other}.{key} = {form!r}")
                elif (items := types.items_of(hint)) is not None and types.fits(form, items):
                    found.append(f"{other}.{key} = [{form!r}]")
    return found


def rows(settings: Sequence[Setting]) -> Iterator[tuple[str, str]]:
    """For each setting, its name with the default, and its type with the meaning."""
    for one in settings:
        default = "" if one.default is None else f" = {one.default}"
        meaning = f"; {one.meaning}" if one.meaning else ""
        yield f"{one.name}{default}", f"{one.expected}{meaning}"
