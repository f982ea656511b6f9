"""Shared test set-up: eight fake CPU devices, float32 products, flags parsed, fixed mesh, one store of programs."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the time of these small programs is compilation: the first flag halves it, the second saves another third
FLAGS = "--xla_backend_optimization_level=0"
# a flag that a version does not know ends the process
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Both workers and every process that a test starts share what one of them has compiled: a run that is resumed, or the
# built-in model in a notebook, compiles nothing anew. Set JAX_COMPILATION_CACHE_DIR to keep it for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["DEEPASMR_TEST_CACHE"] = tempfile.mkdtemp(
        prefix="deepasmr-tests-"
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path.insert(0, str(Path(__file__).parent / "golden"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import absl.flags  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")
if not absl.flags.FLAGS.is_parsed():
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


# files that take longest, first: two workers take whole files, and one that comes last keeps the other waiting
SLOWEST = (
    "train notebooks flow_cosyvoice2 lm decoding flow two_processes kills speech_tokenizer synthesis convert nn "
    "recognizer vocoder_istft speaker vocoder samples plan precision"
)


def pytest_unconfigure(config):
    """Removes the compiled programs of this run; a worker leaves that to the main process."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.get("DEEPASMR_TEST_CACHE", ""), ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Slowest files first; pytest-xdist keeps this order with --no-loadscope-reorder."""
    order = {f"test_{name}.py": i for i, name in enumerate(SLOWEST.split())}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def mesh():
    """A 1x1x1 mesh, set before every test and after it.

    After it too: a module's fixtures are made before this one, under the mesh that the last test left.
    """
    from deepasmr_jax import sharding

    yield sharding.make_mesh()
    sharding.make_mesh()


@pytest.fixture
def fourier_by_products(monkeypatch):
    """Fourier transforms as matrix products: eight devices with transforms lock each other on two cores in jax 0.11."""

    def bases(size):
        angles = 2 * np.pi * (np.arange(size)[:, None] * np.arange(size // 2 + 1) % size) / size
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rfft(x, n=None, axis=-1):
        assert axis == -1
        size = x.shape[-1] if n is None else n
        cos, sin = (base[: x.shape[-1]] for base in bases(size))
        return jax.lax.complex(x @ cos, -(x @ sin))

    def irfft(x, n, axis=-1):
        assert axis == -1
        weights = np.full(n // 2 + 1, 2 / n, np.float32)
        weights[[0, -1]] = 1 / n
        cos, sin = (weights[:, None] * base.T for base in bases(n))
        return x.real @ cos - x.imag @ sin

    monkeypatch.setattr(jax.numpy.fft, "rfft", rfft)
    monkeypatch.setattr(jax.numpy.fft, "irfft", irfft)
