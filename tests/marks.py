"""Rows of tests that `make test` runs, beside others for `make test-thorough` alone."""

from collections.abc import Collection, Iterable

import pytest


def mainly(kept: Collection, values: Iterable) -> list:
    """The values as rows of a parametrised test; those that are not kept are thorough."""
    marks = {True: (), False: pytest.mark.thorough}
    return [pytest.param(value, marks=marks[value in kept]) for value in values]
