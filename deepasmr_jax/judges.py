"""Judges that need no network, and the errors they count: who was heard, saying what.

`MatrixJudge` (pocketsphinx, closed-set English), `MandarinJudge` (our own recogniser, not independent of the
corpus), `SpeakerJudge` (resemblyzer), `SimilarityJudge` (the public WavLM, converted by the user). The first two have
`transcribe` and `errors`. All are checked on synthetic speech, the last one on random weights only. Extras: `judge` for
pocketsphinx, `eval` for resemblyzer, `zh`.
Letters: W samples, Q clips, E embedding size.
"""

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepasmr_jax import audio, request, text

MATRIX_FILE = request.BUILT_IN / "matrix_en.json"  # word lists of the corpus' matrix sentences


# ----------------------------------------------------------------------------- word errors


@dataclasses.dataclass(frozen=True)
class Errors:
    """Edits that turn the reference of one utterance into the hypothesis."""

    substitutions: int
    deletions: int
    insertions: int
    reference: int  # words (characters, phones) of the reference

    @property
    def edits(self) -> int:
        """Substitutions + deletions + insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per reference word; above 1 is possible. An empty reference counts as one word."""
        return self.edits / max(self.reference, 1)


def edit_errors(reference: Sequence, hypothesis: Sequence) -> Errors:
    """Errors between two sequences: fewest edits, and among those the alignment with most substitutions.

    Source: Levenshtein, 1966; all three edits cost 1.
    """
    # cell: (edits, insertions + deletions, substitutions, deletions, insertions), compared in this order
    row = [(j, j, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, r in enumerate(reference, 1):
        above, row = row, [(i, i, 0, i, 0)]
        for j, h in enumerate(hypothesis, 1):
            e, g, s, d, n = above[j - 1]
            change = (e, g, s, d, n) if r == h else (e + 1, g, s + 1, d, n)
            e, g, s, d, n = above[j]
            delete = (e + 1, g + 1, s, d + 1, n)
            e, g, s, d, n = row[j - 1]
            row.append(min(change, delete, (e + 1, g + 1, s, d, n + 1)))
    _, _, s, d, n = row[-1]
    return Errors(s, d, n, len(reference))


def words_for_errors(sentence: str, language: str) -> list[str]:
    """Words (en) or characters (zh) as the error rate counts them: lower case, only the apostrophe kept.

    Source: Seed-TTS evaluation protocol.
    """
    sentence = unicodedata.normalize("NFKC", sentence).replace("’", "'").lower()
    sentence = re.sub(r"[^\w']|_", " ", sentence)
    if language == "zh":
        return re.findall(r"[a-z0-9']+|[^\W\da-z]", sentence)
    return sentence.split()


def word_errors(reference: str, hypothesis: str, language: str = "en") -> Errors:
    """Word errors (en) or character errors (zh) of a transcript; both sides pass `words_for_errors`."""
    return edit_errors(words_for_errors(reference, language), words_for_errors(hypothesis, language))


# ----------------------------------------------------------------------------- judges


def matrix_words(path: str | Path = MATRIX_FILE) -> list[list[str]]:
    """The word lists of the matrix sentences, one list per place in the sentence.

    Args:
        path: JSON file with a list of lists of words.

    Raises:
        ValueError: if the file is not a JSON list of lists of words.
    """
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); install the package again") from None
    if not words or not isinstance(words, list) or any(not isinstance(w, str) for s in words for w in s):
        raise ValueError(f'{path} must hold a list of lists of words, such as [["lucy"], ["sees"]]')
    return words


FACTORS = (0.8, 0.9, 1.0, 1.12, 1.25)  # speeds that `MatrixJudge.enrol` tries


class MatrixJudge:
    """Closed-set English recogniser: knows the word lists of the matrix sentences and nothing else.

    It measures closed-set intelligibility only (10 words in each of 5 places: guessing has 90 % errors). On
    other sentences its error is meaningless.

    Args:
        words: one list of words per place; default the built-in matrix.

    Raises:
        ValueError: if pocketsphinx is missing, or a word is neither in its dictionary nor in our lexicon.

    Source: matrix sentence tests (Hagerman, 1982); recogniser PocketSphinx with a JSGF grammar.
    """

    def __init__(self, words: Sequence[Sequence[str]] | None = None) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise ValueError(
                'the English judge needs pocketsphinx: pip install -e ".[judge]" in the checkout of deepasmr_jax'
            ) from error
        self.words = [list(slot) for slot in (words or matrix_words())]
        # wider beams changed nothing on synthetic voices, normal or whispered
        options = dict(
            beam=1e-60,
            pbeam=1e-60,
            wbeam=1e-40,
            maxhmmpf=-1,
            maxwpf=-1,
            cmn="batch",
            samprate=audio.SAMPLE_RATE,
        )
        self._decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", **options)
        for word in {w for slot in self.words for w in slot}:
            if self._decoder.lookup_word(word) is None:
                phones = text.pronounce(word)
                if phones is None:
                    raise ValueError(
                        f"the judge cannot pronounce {word!r}; choose a word of the CMU dictionary"
                    )
                self._decoder.add_word(word, " ".join(p.rstrip("012") for p in phones), True)
        rules = "".join(f"<p{i}> = {' | '.join(slot)};\n" for i, slot in enumerate(self.words))
        places = " ".join(f"<p{i}>" for i in range(len(self.words)))
        self._decoder.add_jsgf_string(
            "matrix", f"#JSGF V1.0;\ngrammar matrix;\npublic <sentence> = {places};\n{rules}"
        )
        self._decoder.activate_search("matrix")

    def knows(self, sentence: str) -> bool:
        """Whether this is a sentence of the grammar."""
        words = words_for_errors(sentence, "en")
        return len(words) == len(self.words) and all(w in s for w, s in zip(words, self.words, strict=True))

    def transcribe(self, wav: np.ndarray, sample_rate: int, factor: float = 1.0) -> str:
        """The sentence of the grammar that was heard; "" if none fits or the clip is silent: all words deleted.

        Args:
            wav: [W] float in [-1, 1]; its level does not matter.
            sample_rate: Hz.
            factor: the clip is heard at this speed, formants and all; see `enrol`.
        """
        wav, sample_rate = np.asarray(wav, np.float32), round(sample_rate * factor)
        if audio.is_silent(wav):  # the decoder would make words of the noise added below
            return ""
        wav = audio.resample(wav, sample_rate, audio.SAMPLE_RATE)
        wav = wav * (0.9 / max(float(np.abs(wav).max(initial=0.0)), 1e-6))
        edge = np.zeros(4000, np.float32)  # the grammar starts and ends in silence
        wav = np.concatenate([edge, wav, edge])
        wav = wav + 1e-4 * np.random.default_rng(0).standard_normal(len(wav))  # no digital zero
        self._decoder.start_utt()
        self._decoder.process_raw((np.clip(wav, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        heard = self._decoder.hyp()
        return heard.hypstr if heard else ""

    def errors(self, wav: np.ndarray, sample_rate: int, sentence: str, factor: float = 1.0) -> Errors:
        """Word errors of one clip.

        Args:
            wav: [W] float in [-1, 1]; its level does not matter.
            sample_rate: Hz.
            sentence: what it should say, one of the grammar.
            factor: the clip is heard at this speed; see `enrol`.

        Raises:
            ValueError: if the sentence is not one of the grammar.
        """
        if not self.knows(sentence):
            raise ValueError(f"{sentence!r} is no matrix sentence; this judge hears nothing else")
        return word_errors(sentence, self.transcribe(wav, sample_rate, factor))

    def enrol(self, clips: Sequence[tuple[np.ndarray, str]], sample_rate: int) -> float:
        """The speed at which this judge understands a speaker's true recordings best.

        Its acoustic model knows adult voices. A voice with shorter or longer formants is brought near them by
        playing it slower or faster, the oldest form of vocal tract length normalisation. Enrol with recordings
        that are in no row, and hear every row at that speed.

        Args:
            clips: recordings of one speaker in one style, with their matrix sentences.
            sample_rate: Hz.

        Returns:
            One of `FACTORS`: least word errors; among equals the nearest to 1.
        """
        rates = {f: sum(self.errors(w, sample_rate, t, f).rate for w, t in clips) for f in FACTORS}
        return min(FACTORS, key=lambda f: (rates[f], abs(math.log(f))))


class MandarinJudge:
    """Our own recogniser of initials and finals without tones. It is not independent of the corpus.

    Show its error on the ground truth beside every number. A syllable has two symbols or one, so the rate is
    neither a character nor a syllable error rate: call it symbol error rate.

    Args:
        folder: a model folder with the component "recognizer" (trained by the same program as the other
            models).
        model: a `recognizer.Recognizer` in memory, in place of a folder.
        cfg: its `recognizer.Config`; only with `model`.

    Raises:
        ValueError: if neither is given, or the folder has no such component.
    """

    _STEP = 32000  # clips are padded to multiples of 2 s, so that few lengths are compiled

    def __init__(self, folder: str | Path | None = None, model=None, cfg=None) -> None:
        if model is None:
            from deepasmr_jax import checkpoint

            if folder is None:
                raise ValueError("the Mandarin judge needs a folder with the component 'recognizer'")
            model, cfg = checkpoint.load_component(folder, "recognizer")
        self._model, self._cfg = model, cfg

    def transcribe(self, wavs: Sequence[np.ndarray], sample_rate: int) -> list[list[str]]:
        """Labels of text.PHONES heard in each clip, such as ["zh_n", "zh_i", "zh_h", "zh_ao"]; none in a silent one.

        Args:
            wavs: clips [W], float in [-1, 1].
            sample_rate: Hz.
        """
        from deepasmr_jax import recognizer

        heard = []
        for wav in wavs:
            wav = np.asarray(wav, np.float32)
            if audio.is_silent(wav):
                heard.append([])
                continue
            wav = audio.resample(wav, sample_rate, audio.SAMPLE_RATE)
            row = np.zeros((1, max(1, -(-len(wav) // self._STEP)) * self._STEP), np.float32)
            row[0, : len(wav)] = wav
            heard += recognizer.decode(self._model, self._cfg, row, np.array([len(wav)], np.int32))
        return heard

    def errors(self, wav: np.ndarray, sample_rate: int, sentence: str) -> Errors:
        """Symbol errors of one clip against the pinyin of its sentence (Chinese characters only).

        Args:
            wav: [W] float in [-1, 1].
            sample_rate: Hz.
            sentence: what it should say; numbers and marks are written out first.

        Raises:
            ValueError: if pypinyin is missing.
        """
        spoken = text.normalize(sentence, "zh")
        return edit_errors(text.mandarin_phones(spoken), self.transcribe([wav], sample_rate)[0])


class SpeakerJudge:
    """Speaker embeddings of resemblyzer (GE2E), independent of our own speaker encoder.

    Its voice activity detection is not used: it would cut whispers away.

    Raises:
        ValueError: if resemblyzer or torch is missing.

    Source: Wan et al., 2018; weights in the resemblyzer wheel.
    """

    size = 256

    def __init__(self) -> None:
        import sys
        import types

        # it may be absent, or without setuptools; only a step of resemblyzer that we leave out needs it
        try:
            import webrtcvad  # noqa: F401
        except ImportError:
            sys.modules["webrtcvad"] = types.ModuleType("webrtcvad")
        try:
            from resemblyzer import VoiceEncoder
        except ImportError as error:
            raise ValueError(
                'the speaker judge needs resemblyzer: pip install -e ".[eval]" in the checkout of deepasmr_jax'
            ) from error
        self._encoder = VoiceEncoder("cpu", verbose=False)

    def embed(self, wav: np.ndarray, sample_rate: int) -> np.ndarray:
        """[E] float32 of length 1.

        Args:
            wav: [W] float in [-1, 1]; brought to -30 dB relative to full scale as in the encoder's training.
            sample_rate: Hz.
        """
        wav = np.asarray(wav, np.float32)
        wav = audio.resample(wav, sample_rate, audio.SAMPLE_RATE)
        wav = wav * (10 ** (-30 / 20) / max(float(np.sqrt(np.mean(wav**2))), 1e-6))
        return np.asarray(self._encoder.embed_utterance(wav), np.float32)


class SimilarityJudge:
    """Embeddings of WavLM-large fine-tuned for speaker verification; their cosine is the SIM of Seed-TTS and others.

    Args:
        folder: what `deepasmr convert file wavlm_large_finetune.pth --out FOLDER` wrote.

    Raises:
        ValueError: if the folder holds no such judge, or its file is damaged.

    Source: see speaker_wavlm.py; protocol of Seed-TTS: whole clips at 16 kHz.
    """

    _COMPONENT = "speaker_judge"
    _SECONDS = (4, 8, 16, 32, 64)  # clips are padded to these, one program each; longer ones are cut
    _ROWS_TIMES_SECONDS = 32  # of a program: bounds its memory

    def __init__(self, folder: str | Path) -> None:
        import jax

        from deepasmr_jax import checkpoint, speaker_wavlm

        values = checkpoint.read_config(folder)
        if self._COMPONENT not in values["components"]:
            raise ValueError(
                f"{folder} holds no judge of speaker similarity, only {', '.join(sorted(values['components']))}; "
                "make one with `deepasmr convert file wavlm_large_finetune.pth --out FOLDER`"
            )
        self._model, self._cfg = checkpoint.load_component(folder, self._COMPONENT)
        self._apply = jax.jit(speaker_wavlm.embed, static_argnums=1)
        made_from = values.get("provenance", {}).get(self._COMPONENT, {})
        self._name = f"{made_from.get('source', folder)}, sha256 {made_from.get('sha256', 'unknown')[:12]}"

    def describe(self) -> str:
        """One line for tables."""
        return (
            f"SIM: cosine of the WavLM embeddings of output and voice clip ({self._name}), {audio.SAMPLE_RATE} Hz, "
            f"whole clips up to {self._SECONDS[-1]} s, {self._cfg.dtype}"
        )

    def embed(self, wavs: Sequence[np.ndarray], sample_rate: int) -> np.ndarray:
        """[Q, E] float32 of length 1; a clip's row does not depend on the other clips.

        Args:
            wavs: clips [W] float in [-1, 1]; their level does not matter.
            sample_rate: of all, Hz.
        """
        rate = audio.SAMPLE_RATE
        wavs = [audio.resample(np.asarray(w, np.float32), sample_rate, rate) for w in wavs]
        wavs = [w[: self._SECONDS[-1] * rate] for w in wavs]
        seconds = np.array([next(s for s in self._SECONDS if len(w) <= s * rate) for w in wavs], int)
        found = np.zeros((len(wavs), self._cfg.embedding_size), np.float32)
        for size in sorted(set(seconds)):
            own, num_rows = np.flatnonzero(seconds == size), max(1, self._ROWS_TIMES_SECONDS // size)
            for start in range(0, len(own), num_rows):
                rows = own[start : start + num_rows]
                batch, lengths = np.zeros((num_rows, size * rate), np.float32), np.full(num_rows, size * rate)
                for place, i in enumerate(rows):
                    batch[place, : len(wavs[i])] = wavs[i]
                    lengths[place] = max(len(wavs[i]), self._cfg.min_samples)
                made = self._apply(self._model, self._cfg, batch, lengths.astype(np.int32))
                found[rows] = np.asarray(made)[: len(rows)]
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-9)
