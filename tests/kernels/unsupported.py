"""Tests of every implementation skip the calls that one does not support."""

import functools

import pytest


def or_skip(run):
    """Skips the test if the implementation does not serve the call."""

    @functools.wraps(run)
    def wrapper(*args, **kwargs):
        try:
            return run(*args, **kwargs)
        except NotImplementedError as error:
            pytest.skip(str(error))

    return wrapper
