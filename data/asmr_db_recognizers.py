"""Recognisers for the corpus tool: a piece of sound in, phrases with times out.

A recogniser is a callable `(wav [W] float32 at 16 kHz, language "en", "zh" or "") -> list[Phrase]` with a `name` that
says what it is. Two are here: `FastTranscription`, a client of the Microsoft REST service that the paper used, with
its key from the environment; and `Whisper`, a local model folder through `transformers`. `make` builds one by name.
"""

import hashlib
import http.client
import io
import json
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from asmr_db_segments import Phrase, Word

from deepasmr_jax import audio

KEY, REGION, ENDPOINT = "SPEECH_KEY", "SPEECH_REGION", "SPEECH_ENDPOINT"  # environment variables
API_VERSION = "2024-11-15"
LOCALES = {"en": "en-US", "zh": "zh-CN"}
RETRY_STATUS = (429, 500, 502, 503, 504)
MAX_TRIES = 5
MAX_WAIT_S = 60.0


class Unusable(ValueError):
    """The recogniser itself cannot work (no key, a refused key, no model): a run stops, it is no fault of a piece."""


def make(name: str, model: str | None = None) -> Callable[[np.ndarray, str], list[Phrase]]:
    """A recogniser by name.

    Args:
        name: "fast" or "whisper".
        model: folder of a Whisper model; only for "whisper".

    Raises:
        Unusable: on an unknown name, a missing model, package or environment variable.
    """
    if name == "fast":
        if model:
            raise Unusable(
                f"--model {model} was given with the recogniser fast, which has none; leave it out"
            )
        return FastTranscription.from_environment()
    if name == "whisper":
        if not model:
            raise Unusable("the recogniser whisper needs a model folder; give it with --model")
        return Whisper(model)
    raise Unusable(f"unknown recogniser {name!r}; use fast or whisper")


class FastTranscription:
    """Client of the Fast Transcription service (Azure AI Speech, REST).

    One POST a piece, as multipart form: `definition`, a JSON object, and `audio`, here FLAC at 16 kHz. Busy answers
    (429, 5xx) and lost connections are tried again, up to `MAX_TRIES` times in all, after 1, 2, 4, ... s or what
    the answer's Retry-After says. The service takes at most 2 hours and 300 MB; a piece of 10 minutes has about 10.

    Args:
        key: of the speech resource.
        endpoint: e.g. "https://eastus.api.cognitive.microsoft.com".
        timeout_s: of one attempt.
        sleep: called with seconds between attempts.

    Raises:
        Unusable: if the endpoint is no http address.

    Source: Microsoft's reference of "Transcriptions - Transcribe", version 2024-11-15. Words masked as profanity would
    not match the sound, so the filter is off.
    """

    def __init__(
        self, key: str, endpoint: str, timeout_s: float = 300.0, sleep: Callable[[float], None] = time.sleep
    ):
        if not endpoint.startswith(("http://", "https://")):
            raise Unusable(f"{ENDPOINT} is {endpoint!r}; it must start with https://")
        self.name = f"fast transcription {API_VERSION}"
        self._key, self._timeout_s, self._sleep = key, timeout_s, sleep
        self._url = f"{endpoint.rstrip('/')}/speechtotext/transcriptions:transcribe?api-version={API_VERSION}"

    @classmethod
    def from_environment(cls) -> "FastTranscription":
        """A client with key and place from the environment; `Unusable` names the variable that is missing."""
        key, endpoint, region = (os.environ.get(name, "").strip() for name in (KEY, ENDPOINT, REGION))
        if not key:
            raise Unusable(
                f"the environment variable {KEY} is not set; put the key of your speech resource into it"
            )
        if not endpoint and not region:
            raise Unusable(
                f"neither {REGION} nor {ENDPOINT} is set; put the region of your speech resource, such as eastus, "
                f"into {REGION}"
            )
        return cls(key, endpoint or f"https://{region}.api.cognitive.microsoft.com")

    def __call__(self, wav: np.ndarray, language: str) -> list[Phrase]:
        """Transcribes a piece.

        Args:
            wav: [W] float32 at 16 kHz.
            language: "en" or "zh"; "" lets the service choose between the two.

        Raises:
            Unusable: if the key is refused (401, 403). ValueError: on any other answer that holds no transcript.
        """
        import soundfile

        sound = io.BytesIO()
        soundfile.write(sound, wav, audio.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        definition = {
            "locales": [LOCALES[language]] if language else list(LOCALES.values()),
            "profanityFilterMode": "None",
        }
        body, content_type = _form(json.dumps(definition), sound.getvalue())
        answer = self._post(body, content_type)
        try:
            return [_phrase(p) for p in json.loads(answer)["phrases"]]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            start = answer[:80].decode("utf-8", "replace")
            raise ValueError(
                f"the speech service answered what is no transcript ({e!r}): {start!r}"
            ) from None

    def _post(self, body: bytes, content_type: str) -> bytes:
        headers = {"Ocp-Apim-Subscription-Key": self._key, "Content-Type": content_type}
        reason = ""
        for attempt in range(1, MAX_TRIES + 1):
            asked = urllib.request.Request(self._url, body, headers, method="POST")
            wait_s = 2.0 ** (attempt - 1)
            try:
                with urllib.request.urlopen(asked, timeout=self._timeout_s) as answer:
                    return answer.read()
            except urllib.error.HTTPError as e:
                reason = f"{e.code} {_reason(e)}"
                if e.code in (401, 403):
                    raise Unusable(
                        f"the speech service refused the key ({reason}); check {KEY} and that it belongs to {REGION} "
                        f"or {ENDPOINT}"
                    ) from None
                if e.code not in RETRY_STATUS:
                    raise ValueError(f"the speech service refused the piece ({reason})") from None
                wait_s = _retry_after(e.headers.get("Retry-After"), wait_s)
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as e:
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            if attempt < MAX_TRIES:
                self._sleep(min(wait_s, MAX_WAIT_S))
        raise ValueError(
            f"the speech service gave no transcript in {MAX_TRIES} attempts (last: {reason}); try again later"
        )


def _form(definition: str, sound: bytes) -> tuple[bytes, str]:
    """(body, content type) of the multipart form."""
    mark = secrets.token_hex(16)
    parts = (
        ('name="definition"', "application/json", definition.encode()),
        ('name="audio"; filename="piece.flac"', "audio/flac", sound),
    )
    body = b"".join(
        f"--{mark}\r\nContent-Disposition: form-data; {name}\r\nContent-Type: {kind}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, kind, content in parts
    )
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def _phrase(p: dict) -> Phrase:
    def times(d: dict) -> tuple[float, float]:
        start = d["offsetMilliseconds"] / 1000
        return start, start + d["durationMilliseconds"] / 1000

    words = tuple(Word(w["text"], *times(w)) for w in p.get("words") or ())
    return Phrase(p["text"], *times(p), words, p.get("locale", "")[:2].lower())


def _reason(error: urllib.error.HTTPError) -> str:
    """What the service says, in one line: the message of its JSON, or the status text."""
    text = error.read(10_000).decode("utf-8", "replace")
    try:
        said = json.loads(text)
        said = said.get("error", said)
        text = (said.get("innerError") or {}).get("message") or said["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        text = text.strip() or str(error.reason)
    return " ".join(text.split())[:200]


def _retry_after(value: str | None, default_s: float) -> float:
    """Seconds of a Retry-After header; a date, or none, gives the default."""
    try:
        return max(float(value), 0.0)
    except (TypeError, ValueError):
        return default_s


def _digest(folder: Path) -> str:
    """Of the weights of a model folder, so that another model of the same name is told from it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


class Whisper:
    """A Whisper model in a local folder, read by `transformers`; needs PyTorch (extra `whisper`).

    Pieces longer than 30 s are heard in the model's own windows. It gives times of phrases, none of words.

    Args:
        folder: with config.json, generation_config.json, model.safetensors and the tokenizer and feature
            extractor files, as the Hugging Face hub has them. Nothing is fetched, and no pickled weights are read.

    Raises:
        Unusable: if PyTorch is missing or the folder holds no such model.
    """

    def __init__(self, folder: str | os.PathLike):
        if not (Path(folder) / "config.json").is_file():
            raise Unusable(
                f"{folder} holds no Whisper model (no config.json); fetch one, such as openai/whisper-large-v3, "
                "into a folder and name it with --model"
            )
        try:
            import torch
            import transformers
        except ImportError as e:
            raise Unusable(f"the recogniser whisper needs {e.name}; pip install -e '.[whisper]'") from None
        try:
            self._processor = transformers.WhisperProcessor.from_pretrained(folder, local_files_only=True)
            self._model = transformers.WhisperForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Unusable(
                f"the Whisper model in {folder} cannot be read ({' '.join(str(e).split())})"
            ) from None
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model.to(self._device).eval()
        self.name = f"whisper {Path(folder).name} {_digest(Path(folder))}"

    def __call__(self, wav: np.ndarray, language: str) -> list[Phrase]:
        """Transcribes a piece: [W] float32 at 16 kHz; language "en", "zh" or "" (the model detects it)."""
        window = self._processor.feature_extractor.n_samples
        is_long = len(wav) > window
        inputs = self._processor(
            wav,
            sampling_rate=audio.SAMPLE_RATE,
            return_tensors="pt",
            truncation=not is_long,
            padding="longest" if is_long else "max_length",
            return_attention_mask=True,
        ).to(self._device)
        with self._torch.no_grad():
            out = self._model.generate(
                inputs.input_features,
                attention_mask=inputs.attention_mask,
                language=language or None,
                task="transcribe",
                return_timestamps=True,
                return_segments=True,
            )
        end_s = len(wav) / audio.SAMPLE_RATE
        phrases = []
        for s in out["segments"][0]:
            text = self._processor.tokenizer.decode(s["tokens"], skip_special_tokens=True).strip()
            start, end = (min(float(t), end_s) for t in (s["start"], s["end"]))
            phrases.append(Phrase(text, start, end, (), language))
        return phrases
