"""Kernels that no GPU has checked run in the tests that compile for an absent GPU."""

import pytest

import jaxbnb_kernels


@pytest.fixture(autouse=True)
def unverified_kernels(request):
    setting = jaxbnb_kernels.config._mosaic_gpu
    before = setting.get_global()
    if request.path.name.startswith(("test_mosaic_gpu", "test_partition")):
        jaxbnb_kernels.config.mosaic_gpu = "always"
    yield
    setting.set_global(before)
