import numpy as np
import pytest

from jaxbnb.core import _formats


def test_codebooks():
    sizes = {
        name: None if levels is None else len(levels)
        for name, levels in _formats.CODEBOOKS.items()
    }
    assert sizes == {
        "nf4": 16,
        "fp4": 16,
        "int8": None,
        "dynamic8": 256,
        "dynamic8_unsigned": 256,
    }
    for name in sizes:
        assert _formats.is_packed(name) == name.endswith("4")


def test_an_unknown_format_lists_those_there_are():
    message = r"quant_type 'nf3' is not known; choose one of \['nf4', 'fp4', 'int8',"
    for function in (_formats.codebook, _formats.is_packed):
        with pytest.raises(ValueError, match=message):
            function("nf3")


@pytest.mark.parametrize("block_size", [2, 6, 64, 4096])
def test_block_sizes(block_size):
    _formats.check_block_size(block_size)


@pytest.mark.parametrize("block_size", [0, -64, 1, 65, 64.0, True, "64", None])
def test_bad_block_sizes(block_size):
    message = "positive even int, commonly 64; got "
    with pytest.raises(ValueError, match=message) as caught:
        _formats.check_block_size(block_size)
    assert str(caught.value).endswith(repr(block_size))


def test_codebooks_are_float32():
    for levels in _formats.CODEBOOKS.values():
        assert levels is None or levels.dtype == np.float32
