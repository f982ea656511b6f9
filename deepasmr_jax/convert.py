"""Public weights to a model folder, and back: every part with its source, checksum and licence.

Everything is checked before the first array is written (`public_files.py`), and arrays go through memory one at a
time. A new folder appears only when it is whole; in a folder that is there a component is replaced only when the new
one is whole.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from deepasmr_jax import (
    __version__,
    audio,
    checkpoint,
    config,
    flow,
    public_cosyvoice2,
    public_files,
    public_models,
    public_names,
    request,
    weight_files,
)
from deepasmr_jax import text as text_lib

TOKENIZER_FILES = (  # those that are there, of the two forms in which a tokenizer is saved
    "vocab.json", "merges.txt", "tokenizer_config.json", "config.json", "tokenizer.json", "added_tokens.json",
    "special_tokens_map.json",
)  # fmt: skip
TEXT_FOLDER = "text_tokenizer"
E2_PROFILES = ("cv2", "hifigan", "f5")  # mel profiles of flows that start from E2 TTS


def convert_cosyvoice2(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    dtype: str = "float32",
    parts: Mapping[str, str | os.PathLike] | None = None,
    progress: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """A CosyVoice2-0.5B folder as a model folder that speaks at once.

    The pool of the built-in model (synthetic voices, both styles and languages) is heard and encoded again by the
    converted tokenizer and speaker encoder, since the first request needs task prompts.

    Args:
        folder: with `public_files.COSYVOICE2` and `CosyVoice-BlankEN/`.
        out: the model folder; must not exist.
        dtype: of the weight files, one of `checkpoint.DTYPES`.
        parts: component -> another file in place of the folder's, e.g. a WeSpeaker `avg_model.pt` as "speaker".
        progress: called with a short sentence per step.

    Returns:
        `out`. It appears when it is whole; nothing is left behind on an error.

    Raises:
        ValueError: if a file is missing, damaged or another model's; with the file and the reason.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder CosyVoice2-0.5B")
    if dtype not in checkpoint.DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(checkpoint.DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} exists already; give a new folder, or remove it first")
    sources = {}
    for name in public_files.COSYVOICE2:
        kind = next(k for k in public_files.KINDS if any(r[0] == name for r in k.released))
        sources[kind.component] = Path((parts or {}).get(kind.component, folder / name))
    missing = [str(p) for p in sources.values() if not p.is_file()]
    if not (folder / "CosyVoice-BlankEN").is_dir():
        missing.append(str(folder / "CosyVoice-BlankEN"))
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing: {folder} is not the whole CosyVoice2-0.5B; `deepasmr doctor {folder}` "
            "lists what is there"
        )
    text_lib.QwenTokenizer(folder / "CosyVoice-BlankEN")  # refuses the stock Qwen folder
    found = {}
    for component, path in sources.items():  # all checks before the first byte is written
        progress(f"checking {path.name}")
        found[component] = public_files.recognise(path)
        if found[component].kind.component != component:
            raise ValueError(f"{path} is a {found[component].kind.name}, no {component}; give the right file")
        found[component].check_whole()
    profiles = {f.mel_profile for f in found.values() if f.mel_profile}
    if len(profiles) > 1:
        raise ValueError(
            f"flow and vocoder have different mel profiles ({', '.join(sorted(profiles))}); "
            "give a vocoder of the flow's profile"
        )
    with _writing(out, sum(f.num_bytes(dtype) for f in found.values())), _beside(out) as place:
        new = Path(place) / out.name
        for f in found.values():
            progress(f"converting {f.path.name}")
            write(f, new, dtype)
        (new / TEXT_FOLDER).mkdir()
        for name in TOKENIZER_FILES:
            if (folder / "CosyVoice-BlankEN" / name).is_file():
                shutil.copyfile(folder / "CosyVoice-BlankEN" / name, new / TEXT_FOLDER / name)
        _settle(new)
        progress("hearing the built-in pool with the converted model")
        _adopt_pool(new)
        os.replace(new, out)
    return out


def convert_file(
    path: str | os.PathLike, out: str | os.PathLike, dtype: str = "float32", mel_profile: str | None = None
) -> str:
    """Converts one weight file into a model folder, in place of that component if the folder has it.

    Args:
        path, out, dtype: the file, the folder, and the type of the weights in it.
        mel_profile: of a flow that starts from E2TTS_Base: "f5" (all but the tokens is copied), "cv2" or "hifigan"
            (the Transformer is).

    Returns:
        A sentence on what was written.

    Raises:
        ValueError: if the file is unknown or damaged, or its mel profile is not the folder's.
    """
    found, out = public_files.recognise(path), Path(out)
    found.check_whole()
    if mel_profile is not None:
        if found.kind.name != public_files.E2_TTS:
            raise ValueError(f"{path} is a {found.kind.name}: its mel is given; leave the mel profile out")
        if mel_profile not in E2_PROFILES:
            raise ValueError(f"mel profile {mel_profile!r} is unknown; use one of {', '.join(E2_PROFILES)}")
        found = dataclasses.replace(found, kind=dataclasses.replace(found.kind, mel_profile=mel_profile))
    if (out / "config.json").is_file():
        own = checkpoint.read_config(out)
        profile = own.get("mel_profile")
        others = set(own["components"]) - {found.kind.component}
        if found.mel_profile not in (None, profile) and others & {"flow", "vocoder", "discriminators"}:
            raise ValueError(
                f"{path} is for the mel profile {found.mel_profile!r}, the model in {out} has {profile!r}; "
                "give a new folder"
            )
    with _writing(out, found.num_bytes(dtype)):
        write(found, out, dtype)
    again = found.kind.component in ("speech_tokenizer", "speaker") and (out / request.POOL_FILE).exists()
    return f"{found.kind.name} as {found.kind.component}" + ("; build the pool again" if again else "")


@contextlib.contextmanager
def _writing(out: Path, needed: int) -> Iterator[None]:
    """Around the writing of so many bytes: ValueError if the disk is too small or fails; no empty folder stays."""
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"{out} needs {needed / 2**30:,.2f} GiB and its disk has {free / 2**30:,.2f} GiB left; choose another disk"
        )
    try:
        yield
    except OSError as e:
        raise ValueError(
            f"cannot write in the folder {out} ({e.strerror or e}); make room or choose another one"
        ) from e
    finally:
        for folder in (out.absolute(), *out.absolute().parents):
            if folder == there:
                break
            with contextlib.suppress(OSError):  # not empty: a model, or another's
                folder.rmdir()


def _beside(out: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder on the disk of `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")


def write(found: public_files.Found, folder: Path, dtype: str) -> None:
    """Writes a recognised file as a component of a model folder, with its provenance.

    Raises:
        ValueError: if the file does not fit, or a weight is not finite in `dtype`.
    """
    kind = found.kind
    provenance = {
        "source": found.path.name,
        "sha256": weight_files.sha256(found.path),
        "is": kind.name,
        "licence": kind.licence,
        "converter": f"deepasmr_jax {__version__}",
    }
    top: dict = {"provenance": {kind.component: provenance}}
    if found.mel_profile:
        top |= {
            "mel_profile": found.mel_profile,
            "sample_rate": audio.mel_profile(found.mel_profile).sample_rate,
        }
    if kind.sampling:
        top["sampling"] = {kind.component: dict(kind.sampling)}
    if kind.name == public_files.E2_TTS:
        cfg = public_files.decoder_around(found.config, found.mel_profile)
        module = flow.init(cfg, jax.random.key(0))
        shapes = {k: np.asarray(x) for k, x in checkpoint.named_arrays(jax.device_get(module)).items()}
        started, provenance["copied"] = public_models.warm_start_flow(
            cfg, found.tensors, shapes, found.mel_profile, str(found.path)
        )
        arrays = started.items()
    else:
        cfg, shapes, arrays = found.config, found.shapes, found.arrays()
    checkpoint.write_component(folder, kind.component, cfg, shapes, arrays, dtype, **top)


def _settle(folder: Path) -> None:
    """Text and languages of a converted CosyVoice2."""
    values = checkpoint.read_config(folder)
    values |= {
        "text": {
            "tokenizer": "qwen",
            "folder": TEXT_FOLDER,
            "normalizer": "wetext",
            "sha256": {p.name: weight_files.sha256(p) for p in sorted((folder / TEXT_FOLDER).iterdir())},
        },
        "provenance": values["provenance"]
        | {"text_tokenizer": {"source": "CosyVoice-BlankEN", "licence": "Apache-2.0"}},
        "languages": list(text_lib.LANGUAGES),
    }
    checkpoint.set_licence(values)
    config.write_json(folder / "config.json", values)


def _adopt_pool(folder: Path) -> None:
    from deepasmr_jax import pool_building, synthesis

    built_in, model = synthesis.load(), synthesis.load(folder)
    pool_building.keep(folder, pool_building.adopt(model, built_in))


def export_qwen2(model: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Writes a model's language model under the names of Hugging Face's Qwen2, with its config.json.

    Args:
        model: model folder.
        out: a new folder: `model.safetensors` (backbone, names of Qwen2), `config.json`, `speech.safetensors` with the
            speech tables and the head under the names of CosyVoice's `llm.pt`, and `provenance.json`: where the weights
            are from, their licence, and whether the names are those of CosyVoice2 or of CosyVoice3.

    Returns:
        `out`. It appears when it is whole; nothing is left behind on an error.

    Raises:
        ValueError: if the folder has no language model, its file is damaged, or `out` holds something already.
    """
    cfg, values, out = checkpoint.component_config(model, "lm"), checkpoint.read_config(model), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; give a new folder, or remove it first")
    arrays = checkpoint.component_arrays(model, values["components"]["lm"])
    backbone = public_names.to_theirs(public_cosyvoice2.qwen2(cfg), arrays)
    table = public_cosyvoice2.lm_cosyvoice2(cfg)
    speech = public_names.to_theirs(
        {k: s for k, s in table.items() if k not in public_cosyvoice2.qwen2(cfg)}, arrays
    )
    # a head that was trained on may have a bias, for which CosyVoice3 has no place
    is_third = (
        cfg.num_special == public_cosyvoice2.COSYVOICE3_SPECIAL and not speech["llm_decoder.bias"].any()
    )
    if is_third:
        speech = public_cosyvoice2.lm_cosyvoice3_theirs(speech)
    facts = {
        "model": values.get("name", Path(model).name),
        "licence": checkpoint.licences(values).get("lm"),
        "speech": f"names of CosyVoice{3 if is_third else 2}",
        "lm": values.get("provenance", {}).get("lm"),
        "converter": f"deepasmr_jax {__version__}",
    }
    settings = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": cfg.text_vocab,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "tie_word_embeddings": True,
        "torch_dtype": str(next(iter(backbone.values())).dtype),
    }
    size = sum(x.nbytes for x in (*backbone.values(), *speech.values()))
    with _writing(out, size), _beside(out) as place:
        new = Path(place) / out.name
        checkpoint.write_arrays(new / "model.safetensors", backbone, {"format": "pt"})
        checkpoint.write_arrays(new / "speech.safetensors", speech, {"format": "pt"})
        config.write_json(new / "provenance.json", facts)
        config.write_json(new / "config.json", settings)
        os.replace(new, out)
    return out
