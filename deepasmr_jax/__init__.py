"""DeepASMR in JAX and Flax: zero-shot ASMR speech in anyone's voice, from text and a few seconds of ordinary speech.

`Synthesizer` and `load` are resolved on first use, so that importing one module of the package stays light.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("Synthesizer", "load"):
        from deepasmr_jax import synthesis

        return getattr(synthesis, name)
    raise AttributeError(f"module 'deepasmr_jax' has no attribute {name!r}")
