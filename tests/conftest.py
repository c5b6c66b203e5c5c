"""What every test runs under: 8 virtual CPU devices, strict JAX, a fresh gin, no skips in CI."""

import contextlib
import gc
import os
from pathlib import Path
import random
import shutil
import sys
import tempfile

import by_type  # noqa: F401  before the packages, whose functions it checks
import pytest

from moe.machine import xla_flags

pytest.register_assert_rewrite("rows", "tiny", "goldens", "models")

xla_flags.prepare(devices=8)
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("MPLBACKEND", "agg")

# Equal programs compile once in all workers and the processes that their tests start; in several
# runs of the tests, too, which are given a folder.
OWN = "MOE_TESTS_COMPILED" not in os.environ
if OWN:
    os.environ["MOE_TESTS_COMPILED"] = tempfile.mkdtemp(prefix="moe_tests_")
COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["MOE_TESTS_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "accelerator: needs a GPU or TPU, or its compiler; may be skipped in CI"
    )


# Files that take a minute or more come first, so that no process is left alone with one at the end.
LONG = ("test_conformance_model", "test_readme", "test_train", "test_conformance", "test_resume")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


def pytest_unconfigure(config):
    if OWN:  # in the process that started the workers
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_session(tmp_path_factory):
    """Downloads and token caches of the tests stay out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_CACHE", str(tmp_path_factory.mktemp("moe_cache")))
        yield


MAPS = Path("/proc/self/maps")


class Programs:
    """Compiled programs of this process. Each takes memory maps, a large one on eight devices a
    thousand, and beyond the kernel's limit (vm.max_map_count, 65,530) compiling another one is a
    segmentation fault."""

    def __init__(self):
        import jax

        self.new = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, *_, **__) -> None:
        self.new += event == "/jax/core/compile/backend_compile_duration"

    def drop_if_many(self) -> None:
        if self.new < 10 or num_maps() < 30_000:
            return
        import jax

        self.new = 0
        jax.clear_caches()
        gc.collect()
        assert num_maps() < 25_000, "compiled programs are kept"


def num_maps() -> int:
    """0 where nobody says."""
    return len(MAPS.read_bytes().splitlines()) if MAPS.exists() else 0


@pytest.fixture(autouse=True, scope="session")
def programs():
    return Programs()


@pytest.fixture(autouse=True)
def room_for_programs(programs):
    yield
    programs.drop_if_many()


@pytest.fixture(autouse=True)
def fresh_gin():
    """No test sees another's bindings."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.thorough), "float64"])
def dtype(request):
    """The type everything is computed in; examples are held to ten digits, then to five."""
    import jax

    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


def fail_if_skipped(report, allowed=False):
    """In CI a skipped test asserts nothing while looking green: it is a failure."""
    expected_failure = hasattr(report, "wasxfail")
    if report.skipped and os.environ.get("CI") and not expected_failure and not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    fail_if_skipped(report, allowed=item.get_closest_marker("accelerator") is not None)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    fail_if_skipped(report)
    return report


@pytest.fixture
def text_folder(tmp_path):
    """A folder of 40 documents of 0 to 392 characters; no window of 17 tokens comes twice."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        letters = random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=10 * i)
        text = "".join(letters) + "\u00e9" * (i % 3)
        (tmp_path / "texts" / f"{i:02}.txt").write_bytes(text.encode())
    return tmp_path


@pytest.fixture
def text_data(text_folder):
    """A function that makes a `TextData` of these documents, with settings changed by name."""
    from moe.data.corpora.corpus import TextFiles
    from moe.data.text import TextData
    from moe.data.tokens.tokenizer import Bytes

    def make(**changed):
        given = {
            "corpus": TextFiles(str(text_folder / "texts")),
            "tokenizer": Bytes(),
            "validation_fraction": 0.3,
            "cache_dir": text_folder / "cache",
        }
        return TextData(**(given | changed))

    return make
