"""Shared test set-up: eight fake CPU devices, float32 products, absl flags parsed, fixed mesh."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the time of these small programs is compilation, which this halves
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.insert(0, str(Path(__file__).parent / "golden"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import absl.flags  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "float32")
if not absl.flags.FLAGS.is_parsed():
    absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl flags


# files that take longest, first: two workers take whole files, and one that comes last keeps the other waiting
SLOWEST = (
    "train vocoder_istft flow_cosyvoice2 notebooks two_processes flow speech_tokenizer nn vocoder synthesis lm kills "
    "speaker"
)


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
