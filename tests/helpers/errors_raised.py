"""Checks of errors that outputs carry instead of raising them."""

import pytest


def assert_matches(error: Exception, pattern: str) -> None:
    with pytest.raises(type(error), match=pattern):
        raise error
