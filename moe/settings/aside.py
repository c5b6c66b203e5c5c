"""Another configuration for a while, as that of a second run which this one reads."""

from collections.abc import Iterator
import contextlib

from gin import config as gin_config

from moe.settings import load


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """In the block another configuration may be loaded; after it, the one before is as it was.

    So is the record of which of its settings were used. References that the other configuration
    makes (`@TopK`) read the one in force when they are called: call them in the block.
    """
    kept = [gin_config._CONFIG, gin_config._OPERATIVE_CONFIG]
    tables = [{key: dict(values) for key, values in table.items()} for table in kept]
    imports, by_hand = set(gin_config._IMPORTS), set(load._by_hand)
    singletons, locked = dict(gin_config._SINGLETONS), gin_config._CONFIG_IS_LOCKED
    try:
        yield
    finally:
        gin_config._set_config_is_locked(locked)
        for table, before in zip(kept, tables, strict=True):
            table.clear()
            table.update(before)
        gin_config._SINGLETONS.clear()
        gin_config._SINGLETONS.update(singletons)
        for found, before in ((gin_config._IMPORTS, imports), (load._by_hand, by_hand)):
            found.clear()
            found.update(before)


def imported() -> list[str]:
    """The modules that the configuration in force imports."""
    return sorted(statement.module for statement in gin_config._IMPORTS)
