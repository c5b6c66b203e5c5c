"""Configs are checked whole before they take effect, and a run's record rebuilds it."""

import math
from pathlib import Path

import gin
import pytest

from moe import settings
from moe.errors import UserError
from moe.settings import read


@gin.configurable(module="gin_tests")
def kettle(
    size: int = 1,
    name: str | None = None,
    hot: bool = False,
    load: "float" = 1.0,
    lid=None,
    *,
    tags: tuple[str, ...] = (),
):
    return size, name, hot, load, lid, tags


@gin.configurable(module="gin_tests", denylist=["secret"])
class Lid:
    def __init__(self, width: int = 2, secret: int = 0):
        self.width = width


@gin.configurable(module="gin_tests")
class HeavyLid(Lid):
    pass


@gin.configurable(module="gin_tests")
def stove(kettle=None, **settings):
    return kettle, settings


@pytest.fixture(autouse=True)
def clean_folder_and_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gin.clear_config()
    yield
    gin.clear_config()


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(*texts: str, bindings=()) -> list[str]:
    files = [write(f"{'abc'[i]}.gin", text) for i, text in enumerate(texts)]
    with pytest.raises(UserError) as error:
        settings.load(files, bindings)
    return str(error.value).splitlines()


BAD = {
    "parameter": ("kettle.siz = 3", "kettle.siz: kettle has no parameter 'siz'; did you mean"),
    "far parameter": ("Lid.qqqq = 3", "Lid.qqqq: Lid has no parameter 'qqqq'; it has width"),
    "denied": ("Lid.secret = 1", "Lid.secret: Lid has no parameter 'secret'"),
    "configurable": ("kettel.size = 3", "there is no configurable kettel; did you mean 'kettle'"),
    "scoped": ("tea/kettel.size = 3", "tea/kettel.size: there is no configurable kettel"),
    "reference": ("kettle.lid = @Lidd", "there is no configurable @Lidd; did you mean '@Lid'"),
    "nested reference": ("kettle.lid = [1, {'a': @b/Lidd()}]", "there is no configurable @Lidd"),
    "macro": ("width = 3\nLid.width = %widht", "there is no macro %widht; did you mean '%width'"),
    "unused macro": ("widht = 3", "widht: no setting reads a macro %widht"),
    "circular macro": ("w = %v\nv = %w\nLid.width = %v", "the macro %w is defined by itself"),
    "required": ("Lid.width = %gin.REQUIRED", 'give it a value: --gin_bindings="Lid.width = ..."'),
    "str for int": ("kettle.size = 'big'", "expected a whole number, got 'big' (str)"),
    "float for int": ("kettle.size = 1.5", "expected a whole number, got 1.5 (float)"),
    "bool for int": ("kettle.size = True", "expected a whole number, got True (bool)"),
    "int for str": ("kettle.name = 3", "expected text or None, got 3 (int)"),
    "str for float": ("kettle.load = '1'", "expected a number, got '1' (str)"),
    "through a macro": ("w = 'x'\nLid.width = %w", "expected a whole number, got 'x' (str)"),
    "twice": ("kettle.size = 1\n\ngin_tests.kettle.size = 2", "it is already set on line 2"),
    "twice in a block": ("Lid:\n  width = 1\nLid.width = 2", "it is already set on line 3"),
    "syntax": ("kettle.size = = 3", "can't read 'kettle.size = = 3': Unable to parse value"),
    "no quotes": ("kettle.name = green", "green is no value (text needs quotes: 'green')"),
    "open bracket": ("kettle.lid = [1,", "can't read 'kettle.lid = [1,'"),
    "deep": ("kettle.lid = " + "[" * 5000 + "]" * 5000, "can't read"),
    "no file": ("include 'b/c.gin'", "include b/c.gin: no such file"),
    "import": ("import no_such_thing", "import no_such_thing: No module named 'no_such_thing'"),
    "dynamic": ("from __gin__ import dynamic_registration", "import the module that defines"),
}


@pytest.mark.parametrize("text, expected", BAD.values(), ids=BAD.keys())
def test_a_bad_config_is_refused_with_its_line_and_reason(text, expected):
    """The problem stands on the text's last line, unless it is of a macro or unreadable."""
    lines = problems("# a comment\n" + text)
    assert any(expected in line for line in lines), lines
    assert all(line.startswith("a.gin:") for line in lines)
    last = [n for n, line in enumerate(text.splitlines(), start=2) if line][-1]
    if "macro" not in expected and "can't read" not in expected:
        assert lines[0].startswith(f"a.gin:{last}: ")


def test_all_problems_of_all_texts_come_at_once():
    lines = problems(
        "kettle.siz = 1\nLid.wid = 2",
        "include 'nowhere.gin'\nkettle.size = 'big'",
        "kettle.size = (",
        bindings=["Lid.widht = 4", "Lid.width = = 4"],
    )
    heads = [line.split(": ")[0] for line in lines]
    assert heads == [
        *("b.gin:1", "c.gin:1", '--gin_bindings="Lid.width = = 4"'),  # what can't be read
        *("a.gin:1", "a.gin:2", "b.gin:2", '--gin_bindings="Lid.widht = 4"'),
    ]


def test_a_setting_without_its_configurable_is_told_the_whole_name():
    lines = problems("kettle.size = 1", bindings=["size = 3"])
    assert lines == [
        '--gin_bindings="size = 3": size: no setting reads a macro %size; '
        "did you mean 'kettle.size'?"
    ]


def test_a_refused_config_changes_nothing():
    settings.load([write("good.gin", "kettle.size = 3")])
    problems("kettle.size = 4\nkettle.siz = 4")
    assert kettle()[0] == 3


def test_a_new_load_forgets_the_last_one():
    settings.load([], ["kettle.size = 3"])
    settings.load([], ["kettle.hot = True"])
    assert kettle()[:3] == (1, None, True)


def test_later_files_and_bindings_win():
    first = write("a.gin", "kettle.size = 1\nkettle.name = 'a'\nkettle.load = 5")
    second = write("b.gin", "include 'a.gin'\nkettle.size = 2\nkettle.name = 'b'")
    settings.load([first, second], ["kettle.size = 3", "kettle.size = 4"])
    assert kettle() == (4, "b", False, 5, None, ())


RICH = """
width = 7
inner/deep = (%width, -1.5e-3)
kettle:
    lid = [@Lid(), @small/Lid, %inner/deep, {'a': (1,), 2: None}]
    name = 'it\\'s "tea"\\n' 'more'
small/Lid.width = %width
tea/green/kettle.size = 9
tea/kettle.hot = True
HeavyLid.width = 5
stove.anything = 1e999
"""


def test_load_binds_what_gin_itself_would():
    gin.parse_config(RICH)
    expected = gin.config_str()
    settings.load([write("rich.gin", RICH)])
    assert gin.config_str() == expected and "tea/green/kettle" in expected


def test_every_cut_and_every_lost_character_is_loaded_or_refused_in_words():
    texts = [RICH[:n] for n in range(len(RICH))]
    texts += [RICH[:n] + c + RICH[n + 1 :] for n in range(len(RICH)) for c in ("", "$", "(", "\t")]
    refused = 0
    for text in texts:
        reading = read.read([], [text])  # raises nothing
        refused += bool(reading.problems)
    assert refused > len(texts) // 4


def test_the_current_folder_comes_before_the_shipped_configs(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    for name in ("runs/quick.gin", "routers/switch.gin", "models/dense.gin", "routers/dense.gin"):
        write(str(shipped / name), "")
    monkeypatch.setattr(read, "shipped", lambda: shipped)
    assert read.find("quick.gin") == shipped / "runs/quick.gin"
    assert read.find("routers/switch.gin") == shipped / "routers/switch.gin"
    write("quick.gin", "")
    assert read.find("quick.gin") == tmp_path / "quick.gin"
    assert read.find(str(shipped / "runs/quick.gin")) == shipped / "runs/quick.gin"
    with pytest.raises(UserError, match=r"write models/dense.gin or routers/dense.gin"):
        read.find("dense.gin")
    with pytest.raises(UserError, match=r"swich.gin: no such file.*'routers/switch.gin'"):
        read.find("swich.gin")
    with pytest.raises(UserError, match="no such file"):
        read.find("shipped")  # a folder is not a config


def test_an_include_lies_beside_its_file_and_a_circle_is_refused():
    write("deep/a.gin", "include 'b.gin'\nkettle.size = %n")
    write("deep/b.gin", "n = 4")
    settings.load(["deep/a.gin"])
    assert kettle()[0] == 4
    write("deep/b.gin", "n = 4\ninclude 'a.gin'")
    with pytest.raises(UserError, match=r"b.gin:2: include in a circle: .*a.gin -> .*b.gin -> "):
        settings.load(["deep/a.gin"])


def test_a_config_brings_its_own_configurable():
    write("own/own_cup.py", "import gin\n@gin.configurable\ndef cup(volume: int = 1): ...\n")
    write("own/a.gin", "import own_cup\ncup.volume = 3")
    settings.load(["own/a.gin"])
    assert gin.query_parameter("cup.volume") == 3
    assert "import own_cup\n" in settings.operative()


def test_a_broken_module_is_reported_with_its_line():
    write("broken_cup.py", "x = 1\n1 / 0\n")
    assert problems("import broken_cup") == [
        "a.gin:1: import broken_cup: ZeroDivisionError: division by zero (broken_cup.py:2)"
    ]


def test_unreadable_files_are_problems():
    Path("bytes.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes.gin: not a text file in UTF-8"):
        settings.load(["bytes.gin"])


def snapshot() -> str:
    return repr(sorted((str(k), sorted(v.items())) for k, v in gin.config._CONFIG.items()))


def rebuilt(text: str) -> None:
    settings.load([write("config.gin", text)])


def test_the_record_rebuilds_every_setting_used_or_not():
    settings.load([write("rich.gin", RICH)])
    before = snapshot()
    rebuilt(settings.operative())
    assert snapshot() == before and "inner/deep" in before


VALUES = (math.inf, -math.inf, [math.inf, (1e-300,)], (), "%not @a 'macro'\n", 2**70, b"x", None)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_the_record_keeps_odd_values(value):
    gin.bind_parameter("kettle.lid", value)
    rebuilt(settings.operative())
    assert kettle()[4] == value and type(kettle()[4]) is type(value)


@pytest.mark.parametrize("value", (math.nan, object(), [print]), ids=("nan", "object", "function"))
def test_what_has_no_text_is_refused_not_left_out(value):
    gin.bind_parameter("kettle.lid", value)
    with pytest.raises(UserError, match=r"kettle.lid = .* has no gin text"):
        settings.operative()


def test_the_record_holds_the_defaults_in_force():
    """So that the run stays the same when the code's defaults change."""
    settings.load([], ["tea/kettle.size = 3"])
    with gin.config_scope("tea"):
        kettle(hot=True)
    text = settings.operative()
    assert "tea/kettle.size = 3\n" in text and "tea/kettle.load = 1.0\n" in text
    assert "hot" not in text  # the code's own choice: no config can change it
    rebuilt(text)
    assert gin.query_parameter("tea/kettle.tags") == ()


def test_a_childs_defaults_do_not_override_its_bases_settings():
    settings.load([], ["Lid.width = 8"])
    assert HeavyLid().width == 8
    rebuilt(settings.operative())
    assert HeavyLid().width == 8


def test_the_record_drops_a_macro_that_was_overridden_away():
    settings.load([write("a.gin", "n = 3\nm = %n\nkettle.size = %m")], ["kettle.size = 4"])
    text = settings.operative()
    assert "m = " not in text and "n = " not in text
    rebuilt(text)
    assert kettle()[0] == 4


def test_settings_that_nothing_takes_are_named():
    settings.load(
        [],
        [
            *("Lid.width = 3", "kettle.size = 1", "tea/kettle.size = 2", "kettle.hot = True"),
            *("cofee/kettle.size = 5", "stove.x = 1", "kettle.load = 2"),
        ],
    )
    assert len(settings.unused()) == 7
    with gin.config_scope("tea"):
        kettle(hot=False)  # the code overrides the setting, the scope the unscoped size
    expected = ["Lid.width", "cofee/kettle.size", "kettle.hot", "kettle.size"]
    assert settings.unused(later=["stove"]) == expected
    kettle()
    assert settings.unused() == ["Lid.width", "cofee/kettle.size", "stove.x"]
