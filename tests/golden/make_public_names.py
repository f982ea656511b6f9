"""Makes public_names.npz: names of the public files at true size, and outputs of their networks at toy size.

    python tests/golden/make_public_names.py

Needs the packages that docs/parity.md installs.
`names` is JSON of {file: {tensor: shape}}, read off the state dicts of networks built without memory; `toy_names` the
same of the toy networks, whose weights are `public_weights.state` and whose inputs are in `INPUTS`.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import public_weights  # noqa: E402

SEED = 11
INPUTS = {  # name -> shape, numbers from public_weights.values
    "mel": (2, 80, 5),
    "wav": (2, 1025),
    "fbank": (1, 40, 80),
    "log_mel": (1, 128, 90),
    "x": (2, 12, 8),
    "condition": (2, 12, 8),
}


def inputs() -> dict[str, np.ndarray]:
    """Inputs of unit scale, and the ids that are no weights."""
    out = {name: public_weights.values(f"input.{name}.alpha", shape, SEED) for name, shape in INPUTS.items()}
    out = {name: x / np.std(x) for name, x in out.items()}
    out["log_mel"] = np.tanh(np.cumsum(0.3 * out["log_mel"], axis=2))  # slow in time, as speech is
    rng = np.random.default_rng(SEED)
    return out | {
        "text": rng.integers(0, 30, 7),
        "speech": rng.integers(0, 27, 9),
        "characters": rng.integers(0, 20, (2, 7)),
        "t": np.asarray([0.13, 0.8], np.float32),
    }


def configs() -> dict:
    """Toy and full sizes by model."""
    from test_vocoder import PAIRED, SINGLE

    from deepasmr_jax import flow, lm, speaker, speech_tokenizer, vocoder

    sizes = dict(width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)
    small = dict(mel_bins=8, num_codes=20, token_width=6, width=32, num_layers=6, num_heads=4, head_dim=8)
    toy = {
        "lm2": lm.Config(text_vocab=30, num_codes=27, **sizes),
        "lm3": lm.Config(text_vocab=30, num_codes=27, num_special=200, end_offset=1, **sizes),
        "s3": speech_tokenizer.Config(width=128, num_heads=2, num_blocks=2, mlp_width=512),
        "e2": flow.e2tts_base(dtype="float32", **small),
        "hifigan_paired": PAIRED,
        "hifigan_single": SINGLE,
        "discriminators": PAIRED,
        "resnet_basic": speaker.Config(base_channels=4, repeats=(1, 3, 1, 2), embedding_size=16),
        "resnet_bottleneck": speaker.Config(
            base_channels=4, repeats=(2, 1, 2, 1), bottleneck=True, embedding_size=16
        ),
    }
    full = {
        "lm2": lm.cosyvoice2(),
        "lm3": lm.cosyvoice3(),
        "s3": speech_tokenizer.s3_v2(),
        "e2": flow.e2tts_base(),
        "hifigan_v1": vocoder.v1(),
        "hifigan_v2": vocoder.v2(),
        "hifigan_v3": vocoder.v3(),
        "discriminators": vocoder.v1(),
        "resnet34": speaker.resnet34(),
        "resnet221": speaker.resnet221(),
        "resnet293": speaker.resnet293(),
    }
    return {"toy": toy, "full": full}


def main() -> None:
    import public_reference as reference
    import torch

    def module(name: str, cfg):
        makers = {
            "s3": reference.s3_v2,
            "e2": reference.e2,
            "hifigan": reference.Generator,
            "discriminators": reference.Discriminators,
            "resnet": reference.wespeaker,
        }
        return next(make for start, make in makers.items() if name.startswith(start))(cfg)

    def names(name: str, cfg) -> dict[str, tuple[int, ...]]:
        if name.startswith("lm"):
            return reference.speech_lm_shapes(cfg, int(name[-1]))
        with torch.device("meta"):
            return reference.shapes(module(name, cfg))

    groups = configs()
    listed = {
        which: {name: names(name, cfg) for name, cfg in group.items()} for which, group in groups.items()
    }
    data = {k: torch.as_tensor(x) for k, x in inputs().items()}
    out = {}
    for name, cfg in groups["toy"].items():
        state = public_weights.state(listed["toy"][name], SEED)
        if name.startswith("lm"):
            out[name] = reference.SpeechLM(cfg, state, int(name[-1]))(data["text"], data["speech"])[1]
            continue
        net = module(name, cfg)
        if name == "e2":  # a table of positions, not random
            state["rotary_embed.inv_freq"] = net.state_dict()["rotary_embed.inv_freq"].numpy()
        net = reference.load(net, state)
        with torch.inference_mode():
            if name == "s3":
                hidden, _ = net.encoder(data["log_mel"], torch.tensor([data["log_mel"].shape[2]]))
                out[name] = net.quantizer._codebook.project_down(hidden).tanh() * 0.9990000128746033
            elif name == "e2":
                out[name] = net(x=data["x"], cond=data["condition"], text=data["characters"], time=data["t"])
            elif name.startswith("hifigan"):
                out[name] = net(data["mel"])
            elif name == "discriminators":
                out |= {f"{name}.{i}": x for i, x in enumerate(net(data["wav"]))}
            else:
                out[name] = net(data["fbank"])[-1]
    texts = {"names": listed["full"], "toy_names": listed["toy"]}
    packed = {k: np.frombuffer(json.dumps(v).encode(), np.uint8) for k, v in texts.items()}
    path = Path(__file__).with_name("public_names.npz")
    np.savez_compressed(path, **packed, **{k: np.asarray(x, np.float32) for k, x in out.items()})
    for k, x in out.items():
        print(k, tuple(x.shape), float(x.std()))
    print({k: len(v) for k, v in listed["full"].items()}, path.stat().st_size)


if __name__ == "__main__":
    main()
