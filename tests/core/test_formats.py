import numpy as np
import pytest

from jaxbnb.core import formats


def test_codebooks():
    sizes = {
        name: None if levels is None else len(levels)
        for name, levels in formats.CODEBOOKS.items()
    }
    assert sizes == {
        "nf4": 16,
        "fp4": 16,
        "int4": 16,
        "int8": None,
        "llm_int8": None,
        "dynamic8": 256,
        "dynamic8_unsigned": 256,
        "fp8_e4m3": 256,
        "fp8_e5m2": 256,
        "mxfp4": 16,
        "nvfp4": 16,
        "int4_scaled": 16,
        "int8_scaled": 256,
        "uint4": 16,
        "uint8": 256,
        "fp8_scaled": 256,
    }
    for name in sizes:
        assert formats.is_packed(name) == ("4" in name and name != "fp8_e4m3")


def test_an_unknown_format_lists_those_there_are():
    message = r"quant_type 'nf3' is not known; choose one of \['nf4', 'fp4', 'int4',"
    for function in (formats.codebook, formats.is_packed):
        with pytest.raises(ValueError, match=message):
            function("nf3")


@pytest.mark.parametrize("block_size", [2, 6, 64, 4096])
def test_block_sizes(block_size):
    formats.check_block_size(block_size)


@pytest.mark.parametrize("block_size", [0, -64, 1, 65, 64.0, True, "64", None])
def test_bad_block_sizes(block_size):
    message = "positive even int, commonly 64; got "
    with pytest.raises(ValueError, match=message) as caught:
        formats.check_block_size(block_size)
    assert str(caught.value).endswith(repr(block_size))


def test_llm_int8_has_no_blocks():
    assert formats.choose_block_size("int8", None) == 64
    assert formats.choose_block_size("llm_int8", None) is None
    with pytest.raises(ValueError, match="takes no block_size; got 64"):
        formats.choose_block_size("llm_int8", 64)
    with pytest.raises(ValueError, match="positive even int"):
        formats.choose_block_size("int8", 63)
    with pytest.raises(ValueError, match="llm_int8 has one absmax for a whole row"):
        formats.check_double_quant("llm_int8", True)


def test_formats_that_store_scales():
    for name, scaled in formats.SCALED.items():
        assert len(formats.CODEBOOKS[name]) == 2**scaled.bits
        assert formats.choose_block_size(name, None) == scaled.block_size
        with pytest.raises(ValueError, match=f"{name} stores scales"):
            formats.check_double_quant(name, True)
    assert formats.choose_block_size("uint4", 128) == 128
    assert formats.choose_block_size("nvfp4", 16) == 16
    with pytest.raises(ValueError, match=r"mxfp4 has blocks of 32 .* got 64"):
        formats.choose_block_size("mxfp4", 64)


def test_outlier_thresholds():
    choose = formats.choose_outlier_threshold
    assert choose("llm_int8", None) == 6.0
    assert [choose("llm_int8", given) for given in (0, 0.0, 5, np.inf)] == [
        0,
        0,
        5,
        np.inf,
    ]
    assert choose("int8", None) is None
    with pytest.raises(ValueError, match="is for llm_int8 alone; nf4"):
        choose("nf4", 6.0)
    for bad in (-1, np.nan, "6", True):
        with pytest.raises(ValueError, match=r"must be positive, commonly 6\.0, or 0"):
            choose("llm_int8", bad)


def test_codebooks_are_float32():
    for levels in formats.CODEBOOKS.values():
        assert levels is None or levels.dtype == np.float32
