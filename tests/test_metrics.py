"""The metric file and the step timer."""

import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from deepasmr_jax import lm, metrics, page, sharding


def test_metrics_of_lost_steps_are_dropped_on_resume(tmp_path):
    writer = metrics.Writer(tmp_path)
    for step in range(1, 5):
        writer.write(step, {"train/loss": step, "train/odd": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tr')
    metrics.Writer(tmp_path, 2)
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines] == [1, 2] and lines[0]["train/odd"] == "nan"


def test_step_time_leaves_out_the_first_two_steps_and_pauses():
    now = iter([0.0, 10.0, 15.0, 16.0, 100.0, 102.0])
    timer = metrics.StepTimer(clock=lambda: next(now))
    for _ in range(3):
        timer.tick()
    timer.pause()
    timer.tick()
    assert timer.compile_s == 10.0 and timer.take() == pytest.approx(1.5) and timer.take() is None


def events(folder):
    """The events of a TensorBoard folder: records of length, its sum, data, its sum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    [path] = folder.iterdir()
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(proto.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_tensorboard_gets_the_numbers_the_pictures_and_the_sounds(tmp_path):
    pytest.importorskip("tensorboardX")
    wav = np.sin(np.arange(8000) / 5).astype(np.float32)
    writer = metrics.Writer(tmp_path, 4, tensorboard=True)
    writer.write(5, {"train/loss": 2.5})
    writer.show(5, "0/made", page.picture(wav, 16000), page.wav_bytes(wav, 16000), 16000, 0.5)
    writer.close()
    values = {v.tag: (e.step, v) for e in events(tmp_path / "tensorboard") for v in e.summary.value}
    assert sorted(values) == ["picture/0/made", "sound/0/made", "train/loss"]
    assert {step for step, _ in values.values()} == {5}
    assert values["train/loss"][1].simple_value == 2.5
    image, audio = values["picture/0/made"][1].image, values["sound/0/made"][1].audio
    assert image.encoded_image_string == page.picture(wav, 16000) and image.width > 60 and image.height > 60
    assert (audio.sample_rate, audio.length_frames) == (16000, 8000)
    assert audio.encoded_audio_string[:4] == b"RIFF"
    assert [x["step"] for x in metrics.read(tmp_path / "metrics.jsonl")] == [5]


def test_without_tensorboardx_a_note_has_the_way_out(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    assert not metrics.has_tensorboard()
    assert "tensorboard=true needs tensorboardX; pip install tensorboardX" in capsys.readouterr().out


def test_flops_count_products_in_loops_branches_and_recomputed_layers_and_convolutions():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    layer = jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None))
    deep = lambda x: jax.lax.scan(layer, x, None, length=5)[0]
    assert metrics.flops(deep, x) == 5 * 2 * 2 * 3 * 3
    branch = lambda x: jax.lax.cond(x.sum() > 0, deep, lambda x: x, x)
    assert metrics.flops(jax.jit(branch), jax.eval_shape(lambda: x)) == 180
    conv = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )
    assert metrics.flops(conv, jnp.ones((1, 10, 4)), jnp.ones((3, 2, 6))) == 2 * 5 * 6 * 3 * 2


def test_flops_of_a_split_function_and_of_a_kernel_are_those_of_all_its_parts():
    sharding.make_mesh(1, 2, 2)  # rows are split in two, and both halves of `model` do the same
    x, w = jnp.ones((4, 3)), jnp.ones((3, 5))
    rows = sharding.spec("batch", None)
    split = jax.shard_map(lambda x, w: x @ w, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert metrics.flops(split, sharding.split_rows(x), w) == 2 * 4 * 3 * 5

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    block = pl.BlockSpec((8, 8), lambda i, j: (i, j))
    shape = jax.ShapeDtypeStruct((24, 16), jnp.float32)
    call = pl.pallas_call(kernel, shape, grid=(3, 2), in_specs=[block], out_specs=block, interpret=True)
    assert metrics.flops(call, shape) == 6 * 2 * 8**3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_flops_of_the_language_model_are_two_for_each_weight_and_position_and_attention(remat):
    cfg = lm.mini(
        313, num_layers=2, width=64, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=96, remat=remat
    )
    shapes = jax.eval_shape(lambda: lm.init(cfg, jax.random.key(0)))
    rows, length = 2, 256
    batch = {
        k: jnp.zeros((rows, length), jnp.int32)
        for k in ("tokens", "kinds", "segment_ids", "positions", "targets")
    }
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # queries and output, key and value, the three of the MLP
    products = rows * length * (2 * layer + 64 * cfg.num_speech_rows)
    found = metrics.flops(lambda model, batch: lm.loss(model, cfg, batch)[0], shapes, batch)
    # scores and their sum over values, of the causal half in chunks or of all
    attention = 2 * rows * 2 * 32 * length * length * 2
    assert 2 * products + attention <= found <= 2 * products + 2 * attention
    # the formula counts the allowed pairs alone: a half, and the diagonal
    assert lm.forward_flops(cfg, rows, length) == 2 * products + attention * (length + 1) / length


def test_the_peak_of_a_device_goes_by_the_longest_name_that_fits():
    kind = lambda name: metrics.peak_flops(types.SimpleNamespace(device_kind=name))
    assert kind("TPU v5 lite") == 197e12 and kind("TPU v5p") == 459e12 and kind("NVIDIA H200") == 989e12
    assert kind("NVIDIA L4") == 121e12 and kind("NVIDIA A100-SXM4-40GB") == 312e12
    assert kind("cpu") is kind("NVIDIA L40") is kind("NVIDIA L40S") is kind("TPU v4 lite") is None
    memory = lambda name: metrics.chip(name).memory_gb
    assert memory("NVIDIA A100-SXM4-40GB") == 40 and memory("NVIDIA A100-SXM4-80GB") == 80
