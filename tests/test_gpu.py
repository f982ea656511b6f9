"""What only an NVIDIA GPU can show: the built-in model speaks there, and layers give the CPU's numbers.

Skipped elsewhere. conftest.py asks for the CPU unless told otherwise, so on a machine with a GPU:

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py

The same facts are checked on a CPU in test_synthesis.py, test_nn.py and test_flow.py.
"""

import json
import shutil

import fill
import jax
import numpy as np
import pytest

from deepasmr_jax import flow, nn, request, results, sharding, synthesis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
TOLERANCE = 2e-2  # values of size 1 to 3; a GPU sums in another order, and bfloat16 operands keep 8 bits


def on_both(run) -> tuple[np.ndarray, np.ndarray]:
    """Results of `run()` on the first device of JAX's default backend and on the CPU."""
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        sharding.make_mesh(devices=[device])
        with jax.default_device(device):
            found.append(np.asarray(jax.device_get(run())))
    sharding.make_mesh()
    return tuple(found)


def with_float32_lm(source, folder):
    """A copy of a model folder whose language model computes in float32.

    In bfloat16 a batch of another size rounds its sums differently, which may change a drawn token.
    """
    shutil.copytree(source, folder)
    path = folder / "config.json"
    values = json.loads(path.read_text("utf-8"))
    values["components"]["lm"]["config"]["dtype"] = "float32"
    path.write_text(json.dumps(values), "utf-8")
    return folder


def check_speech(folder) -> None:
    """One sentence is finite and audible, and in a batch of two it has the same tokens."""
    made = synthesis.load(folder)
    voice = json.loads((folder / "demo" / "demo.json").read_text("utf-8"))["voices"][0]
    clip = str(folder / "demo" / voice["clips"]["normal"]["file"])
    requests = [dict(text=t, voice=clip, seed=i) for i, t in enumerate(("Good night.", "The rain is soft."))]
    [alone] = made.batch(requests[:1])
    assert not isinstance(alone, results.Failure), alone
    assert len(alone.audio) and np.isfinite(alone.audio).all() and np.abs(alone.audio).max() > 1e-3
    together = made.batch(requests)
    np.testing.assert_array_equal(together[0].tokens, alone.tokens)


def test_the_built_in_model_speaks_and_a_neighbour_changes_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPASMR_CACHE", "off")
    check_speech(with_float32_lm(request.BUILT_IN, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_gives_the_numbers_of_the_cpu(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.uniform(-1, 1, (2, 48, n, 32)).astype(np.float32) for n in (4, 2, 2))
    mask = np.tril(np.ones((1, 48, 48), bool))

    def run(dtype=dtype):
        on_cpu = jax.sharding.get_mesh().devices.flat[0].platform == "cpu"
        q_k_v_mask = (sharding.replicate(x) for x in (q, k, v, mask))
        return jax.jit(lambda *x: nn.attention(*x, dtype="float32" if on_cpu else dtype))(*q_k_v_mask)

    np.testing.assert_allclose(*on_both(run), atol=TOLERANCE)


def test_the_flow_decoder_gives_the_numbers_of_the_cpu():
    cfg = flow.Config(
        mel_bins=6, mel_mean=-2.0, mel_std=1.5, num_codes=20, token_width=16, width=32, num_layers=4, num_heads=4,
        head_dim=8, conv_kernel=5, conv_groups=4, dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: flow.init(cfg, key), jax.random.key(0))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: fill.values(fill.path_name(path), x.shape, 0).astype(x.dtype), shapes
    )
    frames = flow.num_frames(cfg, 12)
    inputs = dict(
        speech_tokens=rng.integers(0, cfg.num_codes, (2, 12)).astype(np.int32),
        num_tokens=np.array([12, 9], np.int32),
        prompt_mel=rng.standard_normal((2, frames, cfg.mel_bins)).astype(np.float32),
        prompt_frames=np.array([4, 0], np.int32),
    )

    def run():
        keys = sharding.replicate(jax.random.split(jax.random.key(1), 2))
        return flow.sample(
            sharding.replicate(weights), cfg, **sharding.put(inputs), keys=keys, num_steps=4, guidance=1.0
        )

    gpu, cpu = on_both(run)
    np.testing.assert_allclose(gpu[0], cpu[0], atol=TOLERANCE)
    np.testing.assert_allclose(
        gpu[1, : flow.num_frames(cfg, 9)], cpu[1, : flow.num_frames(cfg, 9)], atol=TOLERANCE
    )
