"""Which kernels run: in tests of those for an absent GPU these, although unchecked."""

import pytest

import jaxbnb_kernels


@pytest.fixture(autouse=True)
def settings(request):
    config = jaxbnb_kernels.config
    before = config._mosaic_gpu.get_global(), config._cpu.get_global()
    if request.path.name.startswith(("test_mosaic_gpu", "test_partition")):
        config.mosaic_gpu = "always"
        # Numbers are compared with those of XLA.
        config.cpu = "never"
    if request.path.stem in (
        "test_cpu_transformations",
        "test_native",
        "test_selection",
    ):
        config.cpu = "always"
    yield
    config._mosaic_gpu.set_global(before[0])
    config._cpu.set_global(before[1])
