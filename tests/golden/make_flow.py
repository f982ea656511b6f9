"""Makes flow.npz: the E2 TTS network of the `f5-tts` package at toy size, run on weights made by `fill`.

    pip install torch einops librosa
    pip install --no-deps f5-tts x-transformers einx loguru torch-einops-utils frozendict
    python tests/golden/make_flow.py

Only the network file of that package is imported; the rest of it needs far more. Nothing of it is stored here
but its outputs: time embedding, input embedding with the convolutional position term, the stream
after half of the layers and after all of them, and the velocity, for rotary positions on one head and on all.
"""

import sys
from pathlib import Path

import fill
import jax
import numpy as np
import public_reference
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from deepasmr_jax import flow, sharding  # noqa: E402

SEED = 3
TEXT_LENGTH = 7


def config(rotary_heads: int | None) -> flow.Config:
    """The toy network of the golden file."""
    return flow.e2tts_base(
        mel_bins=8,
        num_codes=20,
        token_width=6,
        width=32,
        num_layers=4,
        num_heads=4,
        head_dim=8,
        rotary_heads=rotary_heads,
        dtype="float32",
    )


def inputs() -> dict[str, np.ndarray]:
    """x, condition [2, 12, 8], t [2], tokens [2, 12] with the filler -1 after the text."""
    rng = np.random.default_rng(0)
    x, condition = rng.standard_normal((2, 2, 12, 8)).astype(np.float32)
    condition[:, 5:] = 0
    tokens = np.full((2, 12), -1, np.int32)
    tokens[:, :TEXT_LENGTH] = rng.integers(0, 20, (2, TEXT_LENGTH))
    return {"x": x, "condition": condition, "tokens": tokens, "t": np.array([0.13, 0.8], np.float32)}


def state_dict(model: flow.Decoder, cfg: flow.Config) -> dict[str, torch.Tensor]:
    """Our weights under the reference's names and layouts."""
    state = {}

    def put(name, array):
        state[name] = torch.tensor(np.array(array))

    def linear(name, module, index=...):
        put(name + ".weight", np.asarray(module.kernel[...])[index].T)
        if module.use_bias:
            put(name + ".bias", np.asarray(module.bias[...])[index])

    linear("time_embed.time_mlp.0", model.time_in)
    linear("time_embed.time_mlp.2", model.time_out)
    put("text_embed.text_embed.weight", model.token_table[...])
    linear("input_embed.proj", model.input)
    for i, conv in ((0, model.conv_first), (2, model.conv_second)):
        put(f"input_embed.conv_pos_embed.conv1d.{i}.weight", np.asarray(conv.kernel[...]).transpose(2, 1, 0))
        put(f"input_embed.conv_pos_embed.conv1d.{i}.bias", conv.bias[...])
    half = cfg.num_layers // 2
    for i in range(cfg.num_layers):
        stack, at = (model.down, i) if i < half else (model.up, cfg.num_layers - 1 - i)
        if i >= half:
            linear(f"layers.{i}.0", stack.skip, at)
        put(f"layers.{i}.1.g", stack.attention_norm.scale[...][at])
        linear(f"layers.{i}.2.to_q", stack.attention.query, at)
        linear(f"layers.{i}.2.to_k", stack.attention.key, at)
        linear(f"layers.{i}.2.to_v", stack.attention.value, at)
        linear(f"layers.{i}.2.to_out.0", stack.attention.out, at)
        put(f"layers.{i}.3.g", stack.mlp_norm.scale[...][at])
        linear(f"layers.{i}.4.ff.0.0", stack.mlp_in, at)
        linear(f"layers.{i}.4.ff.2", stack.mlp_out, at)
    put("norm_out.g", model.norm.scale[...])
    linear("proj_out", model.output)
    return state


def main():
    sharding.make_mesh()
    data = inputs()
    out = {}
    for name, heads in (("one_head", 1), ("all_heads", None)):
        cfg = config(heads)
        model = fill.fill(flow.init(cfg, jax.random.key(0)), SEED)
        reference = public_reference.e2(cfg).eval()
        missing, unexpected = reference.load_state_dict(state_dict(model, cfg), strict=False)
        assert not unexpected and list(missing) == ["rotary_embed.inv_freq"], (missing, unexpected)

        def keep(key, name=name):
            def hook(module, args, output):
                out[f"{name}.{key}"] = output.detach().numpy()

            return hook

        def keep_input(key, name=name, width=cfg.width):
            def hook(module, args):
                out[f"{name}.{key}"] = args[0].detach().numpy()[..., :width]  # a skip comes second

            return hook

        reference.time_embed.register_forward_hook(keep("time"))
        reference.input_embed.register_forward_hook(keep("input"))
        reference.layers[cfg.num_layers // 2][0].register_forward_pre_hook(keep_input("half"))
        reference.norm_out.register_forward_pre_hook(keep_input("layers"))
        with torch.no_grad():
            velocity = reference(
                x=torch.tensor(data["x"]),
                cond=torch.tensor(data["condition"]),
                text=torch.tensor(data["tokens"][:, :TEXT_LENGTH].astype(np.int64)),
                time=torch.tensor(data["t"]),
            )
        out[f"{name}.velocity"] = velocity.numpy()
        # all weights but the positions are the same, and so are these two
        if heads is None:
            del out[f"{name}.time"], out[f"{name}.input"]
    np.savez_compressed(Path(__file__).with_name("flow.npz"), **data, **out)
    print({key: value.shape for key, value in out.items()})


if __name__ == "__main__":
    main()
