"""Makes lm.npz: every layer and the logits of a tiny speech LM, computed by the Qwen2 code of transformers.

Needs torch and transformers: python tests/golden/make_lm.py
Our module is filled by `fill.fill`, its numbers are copied into `transformers.Qwen2Model`, and that model
runs on two rows without padding. Text, marker and speech vectors are looked up here in NumPy.
"""

import sys
from pathlib import Path

import numpy as np

SIZES = dict(
    text_vocab=40,
    num_codes=27,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=96,
)
SEED = 7


def main():
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parents[1])]
    import jax
    import public_reference
    import torch
    from fill import fill

    from deepasmr_jax import lm, sharding

    jax.config.update("jax_platforms", "cpu")
    sharding.make_mesh()
    cfg = lm.Config(**SIZES)
    ours = fill(lm.init(cfg, jax.random.key(0)), SEED)
    theirs = public_reference.qwen2(cfg).eval()

    def put(target: torch.nn.Parameter, param, index: int | None = None, transpose: bool = False):
        value = np.asarray(param[...])
        value = value if index is None else value[index]
        value = value.T if transpose else value
        assert tuple(target.shape) == value.shape
        target.data = torch.from_numpy(value.copy())

    block = ours.layers
    for i, layer in enumerate(theirs.layers):
        put(layer.input_layernorm.weight, block.attn_norm.scale, i)
        put(layer.post_attention_layernorm.weight, block.mlp_norm.scale, i)
        for name in "qkvo":
            linear = getattr(layer.self_attn, f"{name}_proj")
            put(linear.weight, getattr(block.attn, name).kernel, i, transpose=True)
            if name != "o":
                put(linear.bias, getattr(block.attn, name).bias, i)
        for name in ("gate", "up", "down"):
            put(getattr(layer.mlp, f"{name}_proj").weight, getattr(block.mlp, name).kernel, i, transpose=True)
    put(theirs.norm.weight, ours.norm.scale)

    rng = np.random.default_rng(0)
    num_text, num_speech = 9, 12
    text = rng.integers(0, cfg.text_vocab, (2, num_text)).astype(np.int32)
    speech = rng.integers(0, cfg.num_codes, (2, num_speech)).astype(np.int32)
    marker = np.asarray(ours.marker_table[...])
    parts = [np.tile(marker[0], (2, 1, 1)), np.asarray(ours.text_table[...])[text]]
    parts += [np.tile(marker[1], (2, 1, 1)), np.asarray(ours.speech_table[...])[speech]]
    embedded = np.concatenate(parts, axis=1)

    after: list[np.ndarray] = []
    for layer in theirs.layers:
        layer.register_forward_hook(
            lambda _, __, out: after.append((out[0] if isinstance(out, tuple) else out).numpy())
        )
    with torch.no_grad():
        final = theirs(inputs_embeds=torch.from_numpy(embedded.copy())).last_hidden_state.numpy()
    logits = final @ np.asarray(ours.head.kernel[...]) + np.asarray(ours.head.bias[...])
    np.savez_compressed(
        here / "lm.npz",
        text=text,
        speech=speech,
        embedded=embedded,
        layers=np.stack(after),
        final=final,
        logits=logits,
    )


if __name__ == "__main__":
    main()
