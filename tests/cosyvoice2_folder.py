"""Writes a CosyVoice2-0.5B folder of random values: true names, true file formats, any size. Nothing of it can speak.

python tests/cosyvoice2_folder.py FOLDER      at true size (3.2 GB), to measure `deepasmr convert` and `say` with
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "golden"),
    str(Path(__file__).parents[1]),
]

import public_weights  # noqa: E402
import test_public_names  # noqa: E402
import test_text  # noqa: E402
import weight_writers  # noqa: E402

from deepasmr_jax import (  # noqa: E402
    audio,
    checkpoint,
    flow_cosyvoice2,
    lm,
    public_cosyvoice2,
    public_names,
    speaker_campplus,
    speech_tokenizer,
    vocoder_hift,
)

FULL = {
    "llm.pt": lm.cosyvoice2(),
    "flow.pt": flow_cosyvoice2.cosyvoice2(),
    "hift.pt": vocoder_hift.cosyvoice2(),
    "speech_tokenizer_v2.onnx": speech_tokenizer.s3_v2(),
    "campplus.onnx": speaker_campplus.cosyvoice(),
}
SMALL = {
    "llm.pt": lm.cosyvoice2(width=64, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=96),
    "flow.pt": flow_cosyvoice2.cosyvoice2(
        width=64, num_heads=2, mlp_width=64, num_layers=2, num_up_layers=1, channels=32, time_width=64,
        speaker_size=16, num_mid_levels=2, blocks_per_level=1, block_heads=1, block_mlp_width=64,
    ),
    "hift.pt": vocoder_hift.Config(initial_channels=32, f0_width=16),
    "speech_tokenizer_v2.onnx": speech_tokenizer.Config(width=64, num_heads=1, num_blocks=2, mlp_width=96),
    "campplus.onnx": speaker_campplus.Config(
        head_channels=4, initial_channels=8, growth=4, bottleneck=6, repeats=(2, 4, 2), embedding_size=16
    ),
}  # fmt: skip
TABLES = {
    "llm.pt": (lm, public_cosyvoice2.lm_cosyvoice2),
    "flow.pt": (flow_cosyvoice2, public_cosyvoice2.flow_cosyvoice2),
    "hift.pt": (vocoder_hift, public_cosyvoice2.hift),
    "speech_tokenizer_v2.onnx": (speech_tokenizer, public_cosyvoice2.s3_v2),
    "campplus.onnx": (speaker_campplus, public_cosyvoice2.campplus),
}
BESIDE = {  # of the download: no part of the model
    "cosyvoice2.yaml": b"sample_rate: 24000\n",
    "configuration.json": b'{"framework": "Pytorch"}',
    "README.md": b"---\nlicense: apache-2.0\n",
    "LICENSE": b"                                 Apache License\n                           Version 2.0\n",
    ".gitattributes": b"*.pt filter=lfs diff=lfs merge=lfs -text\n",
    ".msc": b"\x80\x04]\x94.",
    ".mv": b"master,CreatedAt:1734500000\n",
    "index": b"\x80\x04]\x94}\x94(\x8c\x04Path\x94u.",  # a pickle as download tools leave it
}
PROGRAMS = ("flow.encoder.fp16.zip", "flow.encoder.fp32.zip")  # TorchScript
ESTIMATOR = "flow.decoder.estimator.fp32.onnx"
PLAIN = ("source_downs", "m_source", "f0_predictor.classifier")  # of HiFT: without weight norm


def state(name: str, cfg) -> dict[str, np.ndarray]:
    """Random tensors of a file under its public names, before weight norm, ties and ONNX."""
    module, table = TABLES[name]
    like = checkpoint.abstract(lambda key: module.init(cfg, key), jax.random.key(0))
    hollow = {k: np.broadcast_to(np.int8(0), x.shape) for k, x in checkpoint.named_arrays(like).items()}
    shapes = {k: x.shape for k, x in their_shapes(table(cfg), hollow).items()}
    return public_weights.state(shapes, 5)


def their_shapes(table, hollow) -> dict[str, np.ndarray]:
    out = {}
    for parameter, source in table.items():
        x = hollow[parameter]
        many = not isinstance(source.names, str)
        for i, name in enumerate(source.names if many else (source.names,)):
            out[name] = public_names.LAYOUTS[source.layout].to_theirs(x[i] if many else x)
    return out


def write(folder: str | Path, sizes: dict = SMALL) -> Path:
    """Writes the whole folder; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, cfg in sizes.items():
        tensors = state(name, cfg)
        if name == "llm.pt":  # the tied head is a second name of one storage
            tensors["llm.model.lm_head.weight"] = tensors["llm.model.model.embed_tokens.weight"]
        if name == "hift.pt":
            tensors = _weight_normed(tensors)
        if name == "speech_tokenizer_v2.onnx":
            graph = test_public_names.onnx_graph(tensors, cfg.num_blocks)
            nodes = [(n.op_type, n.name, n.inputs, n.outputs) for n in graph.nodes]
            weight_writers.write_onnx(folder / name, graph.initializers, nodes)
        elif name == "campplus.onnx":
            weight_writers.write_onnx(folder / name, *campplus_graph(tensors, cfg))
        else:
            weight_writers.write_torch_zip(folder / name, tensors)
        del tensors
    test_text.qwen_folder(folder / "CosyVoice-BlankEN", test_text.BASE)
    for name, text in BESIDE.items():
        (folder / name).write_bytes(text)
    for name in PROGRAMS:
        weight_writers.write_zip(
            folder / name, [("data.pkl", b"\x80\x02}."), ("constants.pkl", b"\x80\x02).")]
        )
    plan = {"w": np.ones((2, 2), np.float32)}
    weight_writers.write_onnx(folder / ESTIMATOR, plan, [("MatMul", "/m/MatMul", ["x", "w"], ["y"])])
    voice = {"voice": {"embedding": np.ones((1, 192), np.float32)}}
    weight_writers.write_torch_zip(folder / "spk2info.pt", voice)
    return folder


def _weight_normed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """HiFT as stored: gain and direction of every kernel but a few."""
    out = {}
    for name, x in tensors.items():
        stem = name.removesuffix(".weight")
        if stem == name or stem.startswith(PLAIN):
            out[name] = x
        else:
            gain = np.sqrt(np.sum(x**2, axis=(1, 2), keepdims=True))
            out[f"{stem}.parametrizations.weight.original0"] = gain
            out[f"{stem}.parametrizations.weight.original1"] = 2 * x
    return out


def campplus_graph(tensors: dict[str, np.ndarray], cfg) -> tuple[dict, list]:
    """An ONNX graph of CAM++ as far as parameters go; a norm after a convolution is folded into it, as exporters do."""
    initializers, nodes, norms = {}, [], dict(public_cosyvoice2._campplus_norms(cfg))
    free = [norm for conv, norm in public_cosyvoice2._campplus_norms(cfg) if not conv]

    def values(norm: str) -> list[np.ndarray]:
        size = tensors[f"{norm}.running_mean"].shape
        defaults = {"weight": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)}
        names = ("weight", "bias", "running_mean", "running_var")
        return [tensors.get(f"{norm}.{name}", defaults.get(name)) for name in names]

    for i, (conv, _) in enumerate(public_cosyvoice2._campplus_convs(cfg)):
        weight, bias = tensors[f"{conv}.weight"], tensors.get(f"{conv}.bias")
        if conv in norms:
            scale, shift, mean, var = values(norms[conv])
            gain = scale / np.sqrt(var + 1e-5)
            weight = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
            bias = shift - mean * gain
        inputs = [f"x{i}", f"onnx::Conv_{2 * i}"]
        initializers[inputs[1]] = weight.astype(np.float32)
        if bias is not None:
            inputs.append(f"onnx::Conv_{2 * i + 1}")
            initializers[inputs[2]] = bias.astype(np.float32)
        nodes.append(("Conv", f"/conv{i}/Conv", inputs, [f"x{i + 1}"]))
    for i, norm in enumerate(free):
        names = [f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")]
        initializers |= dict(zip(names, values(norm), strict=True))
        nodes.append(("BatchNormalization", f"/bn{i}/BatchNormalization", [f"y{i}", *names], [f"z{i}"]))
    return initializers, nodes


if __name__ == "__main__":
    print(json.dumps({"folder": str(write(sys.argv[1], FULL)), "codes": audio.NUM_CODES}))
