import jax

# Both precisions are tested from one process: float32 arrays are asked for by dtype.
jax.config.update("jax_enable_x64", True)
