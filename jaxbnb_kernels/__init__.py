"""The numeric core of jaxbnb: arrays in, arrays out; needs jax and numpy only."""
