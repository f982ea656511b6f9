"""Golden numbers of the S3 tokenizer V2 from the public `s3tokenizer` package (PyTorch), at reduced width.

Our module is filled with `fill.fill`, its numbers are copied into the package's own classes, and its
stem, block and code outputs on a padded batch are stored. Needs torch, einops and s3tokenizer; run from
this folder:

    python make_speech_tokenizer.py

s3tokenizer 0.3.0 has eps 1e-5 in both norms of a block; its earlier releases and the released graph have 1e-6
in the first one, which is set here.
"""

import sys
import types
from pathlib import Path

import jax
import numpy as np
import torch

for name in ("onnx", "torchaudio"):  # imported by the package, used only to read files
    try:
        __import__(name)
    except ImportError:
        sys.modules[name] = types.ModuleType(name)
sys.path.insert(0, str(Path(__file__).parents[2]))

from fill import fill  # noqa: E402
from s3tokenizer.model_v2 import ModelConfig, S3TokenizerV2  # noqa: E402

from deepasmr_jax import sharding, speech_tokenizer  # noqa: E402

CONFIG = speech_tokenizer.Config(width=128, num_heads=2, num_blocks=2, mlp_width=512)
SEED = 5


def reference(model: speech_tokenizer.Tokenizer) -> S3TokenizerV2:
    """The package's model with our numbers."""
    cfg = CONFIG
    theirs = S3TokenizerV2(
        "speech_tokenizer_v2_25hz", ModelConfig(128, 1500, cfg.width, cfg.num_heads, cfg.num_blocks)
    )
    state = {}

    def put(name, array):
        state[name] = torch.from_numpy(np.array(array, np.float32))

    encoder = model.encoder
    for name in ("conv1", "conv2"):
        put(f"encoder.{name}.weight", np.transpose(getattr(encoder, name).kernel[...], (2, 1, 0)))
        put(f"encoder.{name}.bias", getattr(encoder, name).bias[...])
    pairs = [("attn.query", "attn.query"), ("attn.key", "attn.key"), ("attn.value", "attn.value")]
    pairs += [("attn.out", "attn.out"), ("mlp_in", "mlp.0"), ("mlp_out", "mlp.2")]
    for i in range(cfg.num_blocks):
        block = jax.tree.map(lambda x, i=i: x[i], encoder.blocks)
        for our, their in pairs:
            layer = block
            for part in our.split("."):
                layer = getattr(layer, part)
            put(f"encoder.blocks.{i}.{their}.weight", np.transpose(layer.kernel[...]))
            if layer.use_bias:
                put(f"encoder.blocks.{i}.{their}.bias", layer.bias[...])
        for name in ("attn_ln", "mlp_ln"):
            put(f"encoder.blocks.{i}.{name}.weight", getattr(block, name).scale[...])
            put(f"encoder.blocks.{i}.{name}.bias", getattr(block, name).bias[...])
        put(f"encoder.blocks.{i}.attn.fsmn_block.weight", np.transpose(block.attn.fsmn[...])[:, None, :])
    put("quantizer._codebook.project_down.weight", np.transpose(model.quantizer.project_down.kernel[...]))
    put("quantizer._codebook.project_down.bias", model.quantizer.project_down.bias[...])
    theirs.load_state_dict(state, strict=True)
    for block in theirs.encoder.blocks:
        block.attn_ln.eps = 1e-6
    return theirs.eval()


@torch.inference_mode()
def main():
    sharding.make_mesh()
    model = fill(speech_tokenizer.init(CONFIG, jax.random.key(0)), SEED)
    theirs = reference(model)
    rng = np.random.default_rng(3)
    lengths = np.asarray([97, 64, 10], np.int32)
    log_mel = np.cumsum(rng.standard_normal((3, 97, 128)) * 0.3, axis=1)  # slow in time, as speech is
    log_mel = np.tanh(log_mel).astype(np.float16)
    for row, length in zip(log_mel, lengths, strict=True):
        row[length:] = 1.0  # padding that must not matter
    out = {"log_mel": log_mel, "lengths": lengths}

    kept = {}
    blocks = theirs.encoder.blocks
    blocks[0].register_forward_pre_hook(lambda module, args: kept.__setitem__("stem", args[0]))
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, y, i=i: kept.__setitem__(f"block{i}", y))
    mel = torch.from_numpy(log_mel.astype(np.float32)).transpose(1, 2)
    codes, counts = theirs.quantize(mel, torch.from_numpy(lengths))
    mask = (torch.arange(codes.shape[1])[None] < counts[:, None]).numpy()
    out.update({name: np.where(mask[:, :, None], x.numpy(), 0) for name, x in kept.items()})
    out.update(codes=np.where(mask, codes.numpy(), 0), counts=counts.numpy())
    projection = theirs.quantizer._codebook.project_down(kept[f"block{len(blocks) - 1}"]).tanh().numpy()
    out["projection"] = np.where(mask[:, :, None], projection * 0.9990000128746033, 0)
    print("distinct codes", len(np.unique(codes.numpy()[mask])), "of", mask.sum())
    print("nearest rounding limit", np.abs(np.abs(out["projection"][mask]) - 0.5).min())

    small = (2e-3 * rng.standard_normal((1, 12, 128))).astype(
        np.float32
    )  # variance 4e-6: the norms' eps decide
    freqs = theirs.encoder.freqs_cis[:12]
    ones = torch.ones(1, 12, 1)
    y = blocks[0](torch.from_numpy(small), torch.zeros(1, 1, 1, 12), ones, freqs)
    out.update(small=small, small_block=y.numpy())
    np.savez_compressed(Path(__file__).with_name("speech_tokenizer.npz"), **out)


if __name__ == "__main__":
    main()
