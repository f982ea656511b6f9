"""Makes a pool with a model that is loaded: of recordings, of its own speech as in the paper, or of another's pool.

What a pool is, and how an entry is chosen of it: `pool.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, checkpoint, config, files, pool, weight_files
from deepasmr_jax.clip import MAX_DURATION_S
from deepasmr_jax.request import MAX_SEED, POOL_FILE, Request
from deepasmr_jax.results import Failure
from deepasmr_jax.synthesis import Clip, Synthesizer


def hear(synthesizer: Synthesizer, recording: pool.Recording) -> pool.Entry:
    """The pool entry of a recording: what the model's tokenizer, mel profile and speaker encoder make of it.

    Raises:
        ValueError: if the recording cannot be read or is longer than `clip.MAX_DURATION_S`.
    """
    try:
        clip = synthesizer.read_clip(
            recording.audio,
            voice_text=recording.transcript,
            voice_language=recording.language,
            voice_style=recording.style,
        )
    except ValueError as e:
        raise ValueError(f"recording {recording.name}: {e}") from None
    if not clip.transcript:
        raise ValueError(
            f"recording {recording.name} is longer than {MAX_DURATION_S:g} s; cut it with its "
            "transcript to 2 to 8 s"
        )
    provenance = {
        "kind": recording.kind,
        "source": recording.audio.name,
        "sha256": weight_files.sha256(recording.audio),
    }
    return _to_entry(recording, clip, provenance, recording.licence)


def build(
    synthesizer: Synthesizer,
    recordings: Sequence[pool.Recording],
    *,
    synthesize_asmr: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> pool.Pool:
    """A pool from recordings; its ASMR half can be synthesised as in the paper.

    Args:
        synthesizer: the model that hears them, and speaks the ASMR half.
        recordings: normal ones and ASMR ones, of any number; the paper has 50 normal ones.
        synthesize_asmr: True: the one ASMR recording of each language is the task prompt, each normal recording the
            voice, and the model speaks the normal recording's sentence: one ASMR entry for each normal one. The
            prompt itself is no entry. False: every recording becomes an entry.
        seed: of the synthesis; entry i uses seed + i, going on with 0 after 2^32 - 1.
        progress: called with a short sentence per stage.

    Raises:
        ValueError: if a recording cannot be used, or an ASMR sample is wanted and missing, or there are two of one
            language.

    Source: DeepASMR, section 3.3.
    """
    say = progress or (lambda sentence: None)
    say(f"reading {len(recordings)} recordings")
    if not synthesize_asmr:
        return _empty_pool(synthesizer).add(*(hear(synthesizer, r) for r in recordings))
    normal = [r for r in recordings if r.style == "normal"]
    samples: dict[str, pool.Recording] = {}
    for r in recordings:
        if r.style == "asmr" and (first := samples.setdefault(r.language, r)) is not r:
            raise ValueError(
                f"the ASMR half is synthesised from one ASMR recording of a language; {first.name!r} and "
                f"{r.name!r} are both of {r.language!r}: leave one of them out"
            )
    if not samples or not normal:
        raise ValueError(
            "the ASMR half is synthesised from one ASMR recording and the normal ones; "
            f"found {len(normal)} normal and {len(samples)} ASMR recordings: add what is missing"
        )
    entries = [hear(synthesizer, r) for r in normal]
    samples_heard = {language: hear(synthesizer, r) for language, r in samples.items()}
    prompts = [samples_heard.get(e.language) or next(iter(samples_heard.values())) for e in entries]
    voices = [Clip(e.speech_tokens, e.mel.astype(np.float32), e.speaker_embedding, "normal") for e in entries]
    requests = [
        Request(
            text=e.transcript,
            voice=np.zeros(0),  # heard already
            voice_rate=synthesizer.sample_rate,
            language=e.language,
            seed=(seed + i) % (MAX_SEED + 1),
        )
        for i, e in enumerate(entries)
    ]
    say(f"speaking {len(entries)} ASMR entries")
    spoken = synthesizer.speak_prompted(requests, voices, prompts)
    result = _empty_pool(synthesizer).add(*entries)
    for e, prompt, made in zip(entries, prompts, spoken, strict=True):
        if isinstance(made, Failure):
            raise ValueError(f"pool entry {e.name}: {made.error}")
        clip = synthesizer.read_clip(made.audio, made.sample_rate, voice_style="asmr")
        name = f"{e.name}_asmr"
        source = pool.Recording(name, Path(name), e.transcript, "asmr", e.language, dict(e.attributes))
        provenance = {
            "kind": "synthesis",
            "model": synthesizer.name,
            "task_prompt": prompt.name,
            "task_prompt_from": prompt.provenance,
            "voice": e.name,
            "seed": made.seed,
        }
        both = (e.licence, prompt.licence)
        licence = checkpoint.strictest(both) if all(both) else ""
        result = result.add(_to_entry(source, clip, provenance, licence))
    return result


def adopt(synthesizer: Synthesizer, other: Synthesizer) -> pool.Pool:
    """The pool of another model for this one: its sounds, copied by its vocoder, are heard by this model.

    A pool holds what its own tokenizer, mel profile and speaker encoder made of a recording; another model
    cannot use that. The copy has the bandwidth of the other model, and the licence of the original.

    Args:
        synthesizer: the model that the pool is for.
        other: the model whose pool it is.

    Raises:
        ValueError: if one of the sounds cannot be used, such as one that is too short for this model.
    """
    entries = []
    for e in other.pool:
        wav = audio.resample(other.sound(e.mel), other.sample_rate, synthesizer.sample_rate)
        clip = synthesizer.read_clip(
            wav,
            synthesizer.sample_rate,
            voice_text=e.transcript,
            voice_language=e.language,
            voice_style=e.style,
        )
        source = pool.Recording(e.name, Path(e.name), e.transcript, e.style, e.language, dict(e.attributes))
        heard = {"heard_from_pool_of": other.pool.speaker_model}
        entries.append(_to_entry(source, clip, e.provenance | heard, e.licence))
    return _empty_pool(synthesizer).add(*entries)


def keep(folder: Path, made: pool.Pool) -> None:
    """Writes a pool as a model folder's own, and into its config.json that it is there and under which licence.

    Raises:
        OSError: if `pool.safetensors` or `config.json` cannot be written; config.json is then as it was.
    """
    stated = [e.licence for e in made if e.licence]
    facts = {"entries": len(made), "recordings": sum(e.is_real for e in made)}
    if len(stated) < len(made):
        facts["licence_not_stated"] = len(made) - len(stated)
    facts |= _licence(checkpoint.strictest(stated) if stated else "")
    values = checkpoint.read_config(folder)
    values["provenance"] = values.get("provenance", {}) | {"pool": facts}
    checkpoint.set_licence(values)
    with files.atomic_path(folder / "config.json") as new:  # takes its name after the pool has
        config.write_json(new, values)
        made.save(folder / POOL_FILE)


def _empty_pool(synthesizer: Synthesizer) -> pool.Pool:
    """A pool of this model without entries."""
    return pool.Pool((), synthesizer.mel_config.name, synthesizer.name)


def _to_entry(recording: pool.Recording, clip: Clip, provenance: dict, licence: str) -> pool.Entry:
    return pool.Entry(
        name=recording.name,
        style=recording.style,
        language=recording.language,
        transcript=recording.transcript,
        speech_tokens=clip.tokens,
        mel=clip.mel.astype(np.float16),
        speaker_embedding=clip.embedding,
        attributes=recording.attributes,
        provenance=provenance | _licence(licence),
    )


def _licence(licence: str) -> dict[str, str]:
    """The entry of a provenance; none if it was not stated."""
    return {"licence": licence} if licence else {}
