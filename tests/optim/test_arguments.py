"""The errors of factories for arguments that they do not take."""

import pytest

import jaxbnb
from jaxbnb import optim

FACTORIES = {
    name: getattr(optim, name)
    for name in optim.__all__
    if name.endswith(("8bit", "4bit", "_fp8"))
}


def error(factory, *args, **kwargs):
    with pytest.raises(TypeError) as info:
        factory(*args, **kwargs)
    return str(info.value)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("value", [1, None])
def test_it_names_the_factory_and_what_that_takes(value, name):
    message = error(FACTORIES[name], 1e-3, unheard_of=value)
    assert message.startswith(f"{name} takes no argument 'unheard_of'; it takes ")
    assert message.endswith("state_bits, block_size, min_quantized_size")


ADAM = (
    "adam8bit",
    "adamw8bit",
    "paged_adamw8bit",
    "adamw4bit",
    "adamw_fp8",
    "lamb8bit",
)
OTHER_NAMES = [
    *((name, "betas", "give b1 and b2. It takes") for name in (*ADAM, "lion8bit")),
    ("scale_by_adam8bit", "betas", "give b1 and b2. It takes"),
    ("ademamix8bit", "betas", "give b1, b2 and b3. It takes"),
    *((name, "lr", "give learning_rate. It takes") for name in (*ADAM, "muon8bit")),
    ("scale_by_lion8bit", "lr", "chain it with optax.scale_by_learning_rate"),
    *((name, "momentum", "give b1. It takes") for name in ADAM),
    ("adamw8bit", "wd", "give weight_decay. It takes"),
    ("rmsprop8bit", "alpha", "give decay. It takes"),
    ("rmsprop8bit", "rho", "give decay. It takes"),
    ("adam8bit", "beta_2", "give b2. It takes"),
    ("adam8bit", "epsilon", "give eps. It takes"),
    ("sgd8bit", "weight_decay", "put optax.add_decayed_weights before or after it"),
    ("muon8bit", "weight_decay", 'give muon={"weight_decay": ...}. It takes'),
    ("muon8bit", "momentum", 'give muon={"beta": ...}. It takes'),
    *(
        (name, argument, "leave it out: under jax.jit, XLA fuses the step. It takes")
        for name in ("adamw8bit", "muon8bit")
        for argument in ("fused", "foreach", "capturable")
    ),
    ("adamw8bit", "differentiable", "leave it out: JAX differentiates"),
    ("lion8bit", "maximize", "negate the loss, or put optax.scale(-1) before it"),
    ("muon8bit", "mu_dtype", "state_bits decides how moments are stored"),
    ("adam8bit", "amsgrad", "jaxbnb.quantize_state(optax.amsgrad(...))"),
    ("adam8bit", "optim_bits", "give state_bits. It takes"),
    ("adam8bit", "min_8bit_size", "give min_quantized_size. It takes"),
    ("adam8bit", "percentile_clipping", "put jaxbnb.optim.percentile_clipping before"),
    ("adam8bit", "is_paged", "use the paged_ form of the optimizer"),
    ("adam8bit", "mu_dtype", "state_bits decides how moments are stored"),
    ("sgd8bit", "accumulator_dtype", "state_bits decides how moments are stored"),
    ("adamw8bit", "weigth_decay", "perhaps weight_decay. It takes"),
]


@pytest.mark.parametrize(("name", "argument", "instead"), OTHER_NAMES)
def test_names_of_other_frameworks(name, argument, instead):
    message = error(FACTORIES[name], **{argument: 0.9})
    assert message.startswith(f"{name} takes no argument {argument!r}: {instead}")


def test_within_others():
    message = error(optim.per_parameter, jaxbnb.adamw8bit, [], betas=(0.9, 0.99))
    assert "adamw8bit takes no argument 'betas', of the defaults: give b1" in message
    message = error(jaxbnb.quantize_state, jaxbnb.adam8bit(1e-3), optim_bits=8)
    assert "quantize_state takes no argument 'optim_bits': give state_bits" in message
    rules = [(["embedding"], {"optim_bits": 32})]
    message = error(jaxbnb.quantize_state, jaxbnb.adam8bit(1e-3), rules=rules)
    assert "rule 0 of quantize_state takes no argument 'optim_bits'" in message
    message = error(optim.muon8bit, 1e-2, muon={"betas": 0.9})
    assert message.startswith(
        "muon8bit's muon takes no argument 'betas': perhaps beta."
    )
