"""From a text and a clip of a voice to speech in that voice, normal or whispered: `load` and `Synthesizer`.

The one file where all stages meet. A request takes six hops, all visible in `Synthesizer.batch`: read and
check the clip; tokens, mel and speaker embedding of the clip, and the task prompt for the language model;
padding to a short list of lengths; speech tokens; mel and waveform; cut, check, return. The language model
copies style and rhythm of the task prompt, the flow copies the voice of the clip: for N2A the task prompt is
the whispered pool entry whose voice is nearest (DeepASMR, sections 3.2 and 3.3).
Letters: B rows, N tokens, T frames, M mel bins, W samples.
"""

import dataclasses
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from deepasmr_jax import audio, checkpoint, decoding, pool, programs, sharding
from deepasmr_jax import clip as clip_lib
from deepasmr_jax import config as config_lib
from deepasmr_jax import text as text_lib
from deepasmr_jax.request import MAX_PASSES, POOL_FILE, STYLES, Request, check_model, from_row
from deepasmr_jax.results import Failure, Result, join_chunks

COMPONENTS = ("speech_tokenizer", "speaker", "lm", "flow", "vocoder")
MIN_CHUNK_TOKENS = 5  # 0.2 s: less than that is no speech
LARGE_PARAMS = 100_000_000  # parameters from which a part's types follow the processor
TYPES = ("dtype", "attention_dtype", "activation_dtype")  # fields of a Config: float32 or bfloat16
PAUSE_S = {"normal": 0.25, "asmr": 0.4}  # between the chunks of a long text
# shortest padded lengths; the others are these times 2^k, of the flow also times 1.5 * 2^k
TEXT_BASE, TOKEN_BASE, NEW_BASE = 32, 64, 128


@dataclass(frozen=True)
class Clip:
    """A voice clip as the models see it.

    Attributes:
        tokens: [N] int32.
        mel: [T, M] float32, T the frames of N tokens.
        embedding: [E] float32.
        style: "normal" or "asmr", given or detected.
        transcript: what is said, "" if unknown or if the clip was cut.
        language: of the transcript, "" if unknown.
        gain: the clip's samples were multiplied by this before the mel was taken (1: left as they are).
    """

    tokens: np.ndarray
    mel: np.ndarray
    embedding: np.ndarray
    style: str
    transcript: str = ""
    language: str = ""
    gain: float = 1.0


def _tokens(prompt: Clip | pool.Entry | None) -> np.ndarray:
    """Speech tokens [N] of a task prompt, none without one."""
    if prompt is None:
        return np.zeros(0, np.int32)
    return prompt.tokens if isinstance(prompt, Clip) else prompt.speech_tokens


@dataclass
class _Job:
    """One request on its way; the fields below the line are filled hop by hop."""

    place: int
    request: Request
    language: str
    clip: Clip
    clip_style: str  # of the user's clip; `clip` changes in later passes
    prompt_name: str
    prompt_ids: np.ndarray
    prompt_tokens: np.ndarray
    similarity: float
    chunks: list[np.ndarray]  # text ids of each chunk
    notes: list[str]
    timings: dict[str, float] = field(default_factory=dict)
    # ---
    tokens: list[np.ndarray] = field(default_factory=list)
    mels: list[np.ndarray] = field(default_factory=list)
    wav: np.ndarray | None = None
    error: str = ""


def load(
    model: str | os.PathLike | None = None,
    pool_file: str | os.PathLike | None = None,
    *,
    with_pool: bool = True,
) -> "Synthesizer":
    """A synthesizer from a model folder.

    Args:
        model: folder with config.json and the five components; None or "mini": the built-in model.
        pool_file: pool to use instead of the folder's own.
        with_pool: False leaves the folder's own pool unread, to build a new one.

    Raises:
        ValueError: if the folder or one of its files is missing or damaged; the message names it.
    """
    folder = check_model(model)
    programs.use_cache()
    sharding.ensure_mesh()
    try:
        return Synthesizer(folder, pool_file, with_pool=with_pool)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError) as e:
        raise ValueError(f"the model in {folder} is damaged ({type(e).__name__}: {e}); fetch it again") from e


class Synthesizer:
    """Holds the five models and the pool; call it with a text and a voice.

    Args:
        folder: model folder (see `checkpoint.export_component`).
        pool_file: pool file; None: `pool.safetensors` in the folder.
        max_batch: most rows in one program.
        with_pool: False leaves the folder's own pool unread.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        pool_file: str | os.PathLike | None = None,
        max_batch: int = 8,
        *,
        with_pool: bool = True,
    ):
        folder = Path(folder)
        config = checkpoint.read_config(folder)
        missing = [name for name in COMPONENTS if name not in config["components"]]
        if missing:
            raise ValueError(
                f"the model in {folder} has no component {missing[0]}; export it or fetch the model again"
            )
        self.folder, self.config, self.max_batch = folder, config, max_batch
        self.mel_config = audio.mel_profile(config["mel_profile"])
        self.sample_rate = self.mel_config.sample_rate
        lm_part = _Part(folder, "lm", config)  # the largest first: for a moment it is there twice
        self._decode_weights = decoding.unstack(lm_part.module, lm_part.config)
        lm_part.module = None  # decoding has its own copy of the weights, unstacked
        self._parts = {name: lm_part if name == "lm" else _Part(folder, name, config) for name in COMPONENTS}
        made_for = getattr(self._parts["vocoder"].config, "mel_profile", self.mel_config.name)
        if made_for != self.mel_config.name:
            raise ValueError(
                f"the vocoder in {folder} has mel profile {made_for!r}, config.json {self.mel_config.name!r}; "
                "export a flow and a vocoder of one profile"
            )
        if (rate := config.get("sample_rate", self.sample_rate)) != self.sample_rate:
            raise ValueError(
                f"config.json in {folder} has sample_rate {rate}, its mel profile {self.mel_config.name!r} "
                f"{self.sample_rate}; correct one of them"
            )
        self._flow_hears_speaker = "speaker" in inspect.signature(self._parts["flow"].file.sample).parameters
        settings = config.get("sampling", {})
        self.sampling = config_lib.from_dict(decoding.Sampling, settings.get("lm", {}))
        for name in ("ratios", "output_gain_db", "clip_level_db", "redraw"):
            if not _is_numbers(settings.get(name, {})):
                raise ValueError(
                    f"config.json in {folder} has sampling.{name} = {settings[name]!r}; correct it"
                )
        self.ratios = settings.get("ratios", {})  # style -> {"min_ratio", "max_ratio"} where they differ
        self.solver = {"num_steps": 16, "guidance": 1.0, "method": "euler", "schedule": "cosine"}
        of_flow = dict(settings.get("flow", {}))
        self.flow_noise = self._fixed_noise(of_flow.pop("noise", None))
        for name, value in of_flow.items():
            kinds = {"num_steps": int, "guidance": int | float, "method": str, "schedule": str | int | float}
            if not isinstance(value, kinds.get(name, ())):
                raise ValueError(f"config.json in {folder} has sampling.flow.{name} = {value!r}; correct it")
            self.solver[name] = value
        # style -> what guidance makes too loud, negative
        self.output_gain_db = settings.get("output_gain_db", {})
        self.chunks = settings.get("chunks", {})  # language -> arguments of text.split_sentences
        for language, arguments in self.chunks.items():
            text_lib.split_sentences("1", language, **arguments)  # refuses what it cannot use
        # a chunk that was misread is drawn again so often; more equal tokens in a row than that are a misreading
        self.redraw = {"attempts": 0, "longest_run": 0} | settings.get("redraw", {})
        self.clip_level_db = settings.get("clip_level_db", {})  # style -> level of the training data
        vocoder_config = self._parts["vocoder"].config
        self._vocoder_configs = {  # a vocoder with a voice source can be told to whisper
            style: _changed(vocoder_config, settings.get("vocoder", {}).get(style, {}), folder, style)
            for style in STYLES
        }
        self.tokenizer = _text_tokenizer(folder, config.get("text", {}))
        if (ids := self.tokenizer.vocab_size) != (rows := self._parts["lm"].config.text_vocab):
            raise ValueError(
                f"the language model in {folder} reads {rows} text ids, the text tokenizer of its config.json makes "
                f"{ids}: they are not of one model; give `text` there the model's own tokenizer (docs/model_format.md)"
            )
        own = folder / POOL_FILE
        if pool_file is not None:
            self.pool = pool.load(pool_file)
        elif with_pool and own.exists():
            self.pool = pool.load(own)
        else:  # a model without a pool still clones within a style, and can build its pool
            self.pool = pool.Pool((), self.mel_config.name, self.name)
        self.pool.check_fits(self.mel_config.name, self._parts["speaker"].config.embedding_size)
        self._vocode = functools.partial(_vocode, self._parts["vocoder"].file)

    @property
    def name(self) -> str:
        """The model's, by its config.json, or that of its folder."""
        return self.config.get("name", self.folder.name)

    def __call__(self, text: str, voice, style: str = "asmr", **options) -> Result:
        """Speaks a text in the voice of a clip.

        Args:
            text: English or Mandarin, any number of sentences.
            voice: path of a clip, or an array with `voice_rate`; half a second at least, 3 to 10 s are best.
            style: "asmr" (whispered) or "normal".
            **options: the other fields of `request.Request`: voice_rate, voice_text, voice_style, language,
                seed, refine, pool_strategy.

        Returns:
            The result; the same request gives the same audio, alone or in a batch, up to rounding.

        Raises:
            ValueError: one sentence with the value that is wrong and the way out.
        """
        result = self.batch([Request(text=text, voice=voice, style=style, **options)])[0]
        if isinstance(result, Failure):
            raise ValueError(result.error)
        return result

    def batch(
        self, requests: Iterable[Request | dict], progress: Callable[[str], None] | None = None
    ) -> list[Result | Failure]:
        """Speaks many requests; one that fails leaves a `Failure` in its place and does not stop the others.

        Args:
            requests: `Request`s, or dicts of its fields.
            progress: called with a short sentence before each stage.

        Returns:
            One result per request, in order.
        """
        sharding.ensure_mesh()
        say = progress or (lambda sentence: None)
        requests = list(requests)
        results: list[Result | Failure | None] = [None] * len(requests)
        say(f"listening to {len(requests)} clips" if len(requests) > 1 else "listening to the clip")
        jobs = []
        for place, r in enumerate(requests):
            try:
                jobs.append(self._prepare(place, r if isinstance(r, Request) else from_row(r)))
            except (ValueError, TypeError) as e:
                results[place] = Failure(r, str(e))
        say("choosing the words' sounds")
        self._speak(jobs)
        for number in range(max((j.request.refine for j in jobs), default=0)):
            say(f"giving them the voice, pass {number + 1}" if number else "giving them the voice")
            now = [j for j in jobs if number < j.request.refine and not j.error]
            if number:
                for j in now:  # the output becomes the voice; the task prompt and the tokens stay
                    try:
                        with programs.clock(j.timings, "clip_s"):
                            j.clip = self.read_clip(j.wav, self.sample_rate, voice_style=j.request.style)
                    except ValueError as e:
                        j.error = (
                            f"the output of pass {number} is no voice for the next ({e}); use fewer passes"
                        )
            self._sound([j for j in now if not j.error], number)
        for j in jobs:
            results[j.place] = self._result(j)
        return results

    def read_clip(
        self,
        voice,
        voice_rate: int | None = None,
        *,
        voice_text: str | None = None,
        voice_language: str | None = None,
        voice_style: str | None = None,
        notes: list[str] | None = None,
    ) -> Clip:
        """Reads a clip, trims it, and computes what the models need of it.

        Args:
            voice: path, or array with `voice_rate`.
            voice_rate: Hz of an array.
            voice_text: transcript; forgotten if the clip has to be cut, as it would no longer fit.
            voice_language: language of the transcript; None: detected.
            voice_style: "normal" or "asmr"; None: detected.
            notes: sentences about changes are appended.

        Raises:
            ValueError: if the clip cannot be used.
        """
        notes = [] if notes is None else notes
        excerpt = clip_lib.read(
            voice, voice_rate, self.sample_rate, style=voice_style, levels_db=self.clip_level_db, notes=notes
        )
        wav = excerpt.wav
        wav16 = audio.resample(wav, self.sample_rate, audio.SAMPLE_RATE)
        per_token, per_token16 = (rate // audio.TOKEN_RATE for rate in (self.sample_rate, audio.SAMPLE_RATE))
        num_tokens = min(len(wav16) // per_token16, len(wav) // per_token)
        levelled = wav[: num_tokens * per_token] * np.float32(excerpt.gain)
        size = _padded(num_tokens, TOKEN_BASE)
        rows = _rows_of_mesh()
        batch = {
            "wav16": _pad(wav16[: num_tokens * per_token16], size * per_token16)[None].repeat(rows, 0),
            "wav": _pad(levelled, size * per_token)[None].repeat(rows, 0),
            "num_tokens": np.full(rows, num_tokens, np.int32),
        }
        heard = [self._parts[name] for name in ("speech_tokenizer", "speaker")]
        models, settings = [x.module for x in heard], tuple((x.file, x.config) for x in heard)
        found = _analyse(models, sharding.put(batch), settings, self.mel_config)
        tokens, mel, embedding = jax.device_get(found)
        if not np.isfinite(embedding[0]).all():
            raise ValueError("the speaker encoder gave no finite embedding for this clip; record it again")
        transcript, language = "", ""
        if voice_text and excerpt.is_whole:
            transcript, language = voice_text.strip(), voice_language or text_lib.detect_language(voice_text)
        num_frames = self._num_frames(num_tokens)
        return Clip(
            tokens[0, :num_tokens],
            mel[0, :num_frames],
            embedding[0],
            excerpt.style,
            transcript,
            language,
            excerpt.gain,
        )

    def copy(self, wav: np.ndarray) -> np.ndarray:
        """Copy synthesis: the mel of a recording through the vocoder alone.

        Args:
            wav: [W] float32 in [-1, 1] at `sample_rate`.

        Returns:
            [W // hop * hop] float32.
        """
        hop = self.mel_config.hop_samples
        frames = len(wav) // hop
        row = np.zeros((1, _padded(frames, 2 * TOKEN_BASE) * hop), np.float32)
        row[0, : len(wav)] = wav[: row.shape[1]]
        put = sharding.replicate
        mel = audio.log_mel(put(row), put(np.array([frames * hop], np.int32)), self.mel_config)
        return self.sound(np.asarray(jax.device_get(mel))[0, :frames])

    def sound(self, mel: np.ndarray) -> np.ndarray:
        """The waveform [T * hop] float32 of a log-mel [T, M] in the model's profile."""
        vocoder, put = self._parts["vocoder"], sharding.replicate
        row = put(_pad(np.asarray(mel, np.float32), _padded(len(mel), 2 * TOKEN_BASE))[None])
        out = self._vocode(vocoder.module, vocoder.config, row, put(np.array([len(mel)], np.int32)))
        return np.asarray(jax.device_get(out))[0, : len(mel) * self.mel_config.hop_samples]

    def speak_tokens(
        self, requests: Sequence[Request], speech_tokens: Sequence[np.ndarray]
    ) -> list[Result | Failure]:
        """Flow and vocoder on given speech tokens, each in the voice of its request; texts are not read.

        Args:
            requests: voice, styles and seed.
            speech_tokens: one [N] int32 for each.

        Raises:
            ValueError: if a clip cannot be used.
        """
        jobs, no_ids = [], np.zeros(0, np.int32)
        for place, (r, tokens) in enumerate(zip(requests, speech_tokens, strict=True)):
            clip = self.read_clip(r.voice, r.voice_rate, voice_style=r.voice_style)
            language = r.language or text_lib.detect_language(r.text)
            job = _Job(
                place, r, language, clip, clip.style, "self", no_ids, clip.tokens, float("nan"), [no_ids], []
            )
            job.tokens = [tokens]
            jobs.append(job)
        self._sound(jobs, 0)
        return [self._result(j) for j in jobs]

    def speak_prompted(
        self, requests: Sequence[Request], voices: Sequence[Clip], prompts: Sequence[pool.Entry]
    ) -> list[Result | Failure]:
        """Speaks, in one pass, requests whose clips are analysed already and whose task prompts are given.

        Args:
            requests: text, style, seed and language; what they say of the voice, of passes and of the pool is not read.
            voices: one for each; `mel` in float32.
            prompts: one for each.

        Returns:
            One for each, in order; a `Failure` where the model gave no speech. The request of a `Result` does not say
            all of it: asked for alone it would give another sound.
        """
        jobs = []
        for place, (r, clip, prompt) in enumerate(zip(requests, voices, prompts, strict=True)):
            language = r.language or text_lib.detect_language(r.text)
            jobs.append(self._job(place, r, language, clip, prompt.name, prompt, float("nan"), []))
        self._speak(jobs)
        self._sound([j for j in jobs if not j.error], 0)
        return [self._result(j) for j in jobs]

    def reading(self, request: Request) -> list[str]:
        """The chunks of a request's text as normalised, each followed by its symbols for the model."""
        language = request.language or text_lib.detect_language(request.text)
        lines = []
        for chunk in self._chunks(request.text, language):
            lines.append(self.tokenizer.spoken(chunk, language))
            lines.append(
                "  " + " ".join(self.tokenizer.decode_symbols(self.tokenizer.encode(chunk, language)))
            )
        return lines

    def _chunks(self, text: str, language: str) -> list[str]:
        """The pieces of a text that are spoken one by one, as long as this model can."""
        return text_lib.split_sentences(text, language, **self.chunks.get(language, {}))

    # ------------------------------------------------------------------------------------------ the hops

    def _prepare(self, place: int, request: Request) -> _Job:
        """Hops 1 and 2: the clip, the task prompt, the text of each chunk."""
        notes: list[str] = []
        language = request.language or text_lib.detect_language(request.text)
        timings: dict[str, float] = {}
        with programs.clock(timings, "clip_s"):
            clip = self.read_clip(
                request.voice,
                request.voice_rate,
                voice_text=request.voice_text,
                voice_language=request.voice_language,
                voice_style=request.voice_style,
                notes=notes,
            )
        name, prompt, similarity = self._task_prompt(request, language, clip, notes)
        job = self._job(place, request, language, clip, name, prompt, similarity, notes)
        job.timings = timings
        return job

    def _task_prompt(
        self, request: Request, language: str, clip: Clip, notes: list[str]
    ) -> tuple[str, "Clip | pool.Entry | None", float]:
        """Who gives style and rhythm: (name, prompt, cosine).

        Within a style it is the clip itself if its transcript is known. Without a transcript the nearest pool
        entry of that style is better than no speech prompt at all ("none", CosyVoice2's mode for a clip without
        a text), because the language model takes the style from the prompt alone: with the text only, it
        chooses a style by chance (docs/evaluation.md).
        """
        strategy, style = request.pool_strategy, request.style
        if strategy == "none":
            notes.append(f"without a task prompt the language model chooses the style itself, {style} or not")
            return "none", None, float("nan")
        if strategy == "self" or (strategy == "nearest" and clip.style == style):
            problem = None
            if clip.style != style:
                problem = f"the clip is {clip.style} and {style} is wanted"
            elif not request.voice_text:
                problem = "its transcript is not known (give it with --voice-text or voice_text)"
            elif not clip.transcript:
                problem = f"it was cut to {len(clip.tokens) / audio.TOKEN_RATE:.0f} s and its transcript no longer fits"
            elif clip.language != language:
                problem = "its transcript is in another language than the text"
            if problem is None:
                return "self", clip, 1.0
            if strategy == "self":
                raise ValueError(f"the clip cannot be the task prompt: {problem}; use another pool strategy")
            notes.append(f"style and rhythm come from the pool instead of the clip: {problem}")
            strategy = "nearest"
        if strategy in pool.STRATEGIES and not self.pool.select(style, language) and self.pool.select(style):
            notes.append(f"the pool has no {style} entry in {language!r}; one in another language was used")
            language = None
        entry, similarity = self.pool.retrieve(clip.embedding, style, language, strategy)
        return entry.name, entry, similarity

    def _job(self, place, request, language, clip, name, prompt, similarity, notes) -> _Job:
        encode = self.tokenizer.encode
        if note := self.tokenizer.note(request.text, language):
            notes.append(note)
        return _Job(
            place=place,
            request=request,
            language=language,
            clip=clip,
            clip_style=clip.style,
            prompt_name=name,
            prompt_ids=encode(prompt.transcript, prompt.language) if prompt else np.zeros(0, np.int32),
            prompt_tokens=_tokens(prompt),
            similarity=similarity,
            chunks=[encode(c, language) for c in self._chunks(request.text, language)],
            notes=notes,
        )

    def _speak(self, jobs: list[_Job]) -> None:
        """Hops 3 and 4: speech tokens of every chunk of every job."""
        rows = []
        for j in jobs:
            j.tokens = [np.zeros(0, np.int32)] * len(j.chunks)
            sampling = dataclasses.replace(self.sampling, **self.ratios.get(j.request.style, {}))
            for c, ids in enumerate(j.chunks):
                least, most = sampling.limits(len(ids))
                least = max(least, MIN_CHUNK_TOKENS)
                rows.append(
                    (j, c, np.concatenate([j.prompt_ids, ids]), least, max(most, least + audio.TOKEN_RATE))
                )

        def sizes(row):
            j, _, ids, _, most = row
            return (
                _padded(len(ids), TEXT_BASE),
                _padded(len(j.prompt_tokens), TOKEN_BASE),
                _padded(most, NEW_BASE),
            )

        problems: dict[tuple, str] = {}
        for attempt in range(1 + self.redraw["attempts"]):
            for size, group in self._groups(rows, sizes):
                with programs.clock_all([r[0].timings for r in group], "lm_s"):
                    drawn = self._draw(size, group, attempt)
                for row, tokens in zip(group, drawn, strict=True):
                    j, c, _, _, most = row
                    problem = self._problem(tokens, most)
                    if not attempt or not problem or _misread(tokens) < _misread(j.tokens[c]):
                        j.tokens[c], problems[id(j), c] = tokens, problem
            rows = [row for row in rows if problems[id(row[0]), row[1]]]
        for j, c, *_ in rows:
            if len(j.tokens[c]) < MIN_CHUNK_TOKENS:
                j.error = f"the language model gave no speech for {j.request.text[:40]!r}; try another seed"
            else:
                j.notes.append(problems[id(j), c])

    def _draw(self, size: tuple[int, int, int], group: list[tuple], attempt: int) -> list[np.ndarray]:
        """Speech tokens of the rows of one group; every attempt draws others."""
        text_size, prompt_size, new_size = size
        batch = _stack(
            {
                "text_ids": _pad(ids, text_size),
                "text_lengths": np.int32(len(ids)),
                "prompt_tokens": _pad(j.prompt_tokens, prompt_size),
                "prompt_lengths": np.int32(len(j.prompt_tokens)),
                "min_lengths": np.int32(least),
                "max_lengths": np.int32(most),
                "seeds": np.uint32(j.request.seed),
                "chunks": np.uint32(c),
            }
            for j, c, ids, least, most in group
        )
        batch = sharding.put(batch)
        # passes of the flow have 1 to 3
        keys = _keys(batch.pop("seeds"), batch.pop("chunks"), attempt * (MAX_PASSES + 1))
        config = self._parts["lm"].config
        tokens, lengths = jax.device_get(
            decoding.generate(
                self._decode_weights, config, self.sampling, *batch.values(), keys=keys, max_new=new_size
            )
        )
        return [tokens[i, : lengths[i]] for i in range(len(group))]

    def _problem(self, tokens: np.ndarray, most: int) -> str:
        """What shows that a chunk was misread, "" if nothing does."""
        if len(tokens) < MIN_CHUNK_TOKENS:
            return "no speech"
        if len(tokens) >= most:
            return "the speech was stopped at its length limit; another seed may read it better"
        if (run := _longest_run(tokens)) > self.redraw["longest_run"] > 0:
            return (
                f"a sound is held for {run / audio.TOKEN_RATE:.1f} s, and the words after it may be lost; other words "
                "or another seed may be read better"
            )
        return ""

    def _sound(self, jobs: list[_Job], number: int) -> None:
        """Hop 5: mel and waveform of every chunk, in the voice of the job's clip."""
        flow = self._parts["flow"]
        rows = [(j, c) for j in jobs if not j.error for c in range(len(j.chunks))]
        for j in jobs:
            j.mels = [np.zeros((0, 0), np.float32)] * len(j.chunks)

        def tokens_of(row):
            return np.concatenate([row[0].clip.tokens, row[0].tokens[row[1]]])

        if self.flow_noise is not None:
            for j, c in rows:
                if (frames := self._num_frames(len(tokens_of((j, c))))) > (most := len(self.flow_noise)):
                    j.error = f"clip and speech have {frames} frames, the fixed noise of the flow {most}; shorten them"
            rows = [row for row in rows if not row[0].error]
        for size, group in self._groups(rows, lambda row: _padded_finely(len(tokens_of(row)), TOKEN_BASE)):
            with programs.clock_all([r[0].timings for r in group], "flow_s"):
                num_frames = self._num_frames(size)
                batch = _stack(
                    {
                        "speech_tokens": _pad(tokens_of((j, c)), size),
                        "num_tokens": np.int32(len(tokens_of((j, c)))),
                        "prompt_mel": _pad(j.clip.mel, num_frames),
                        "prompt_frames": np.int32(len(j.clip.mel)),
                        "seeds": np.uint32(j.request.seed),
                        "chunks": np.uint32(c),
                    }
                    | ({"speaker": j.clip.embedding} if self._flow_hears_speaker else {})
                    for j, c in group
                )
                batch = sharding.put(batch)
                keys = _keys(batch.pop("seeds"), batch.pop("chunks"), 1 + number)
                voice = {name: batch.pop(name) for name in ("speaker",) if name in batch}
                if self.flow_noise is not None:  # padding is masked: what stands there does not matter
                    voice["noise"] = _pad(self.flow_noise[:num_frames], num_frames)
                mel = jax.device_get(
                    flow.file.sample(
                        flow.module, flow.config, *batch.values(), keys=keys, **voice, **self.solver
                    )
                )
            for i, (j, c) in enumerate(group):
                first = self._num_frames(len(j.clip.tokens))
                j.mels[c] = mel[i, first : self._num_frames(len(tokens_of((j, c))))]
                if not np.isfinite(j.mels[c]).all():
                    j.error = "the flow decoder gave numbers that are not finite; try another seed"

        rows = [(j, c) for j, c in rows if not j.error]
        wavs: dict[int, list[np.ndarray]] = {id(j): [np.zeros(0)] * len(j.chunks) for j in jobs}
        hop, vocoder, configs = self.mel_config.hop_samples, self._parts["vocoder"], self._vocoder_configs

        def vocoder_sizes(row):
            j, c = row
            first = next(s for s, x in configs.items() if x == configs[j.request.style])
            return _padded(len(j.mels[c]), 2 * TOKEN_BASE), first  # styles of one config share a batch

        for (size, style), group in self._groups(rows, vocoder_sizes):
            with programs.clock_all([r[0].timings for r in group], "vocoder_s"):
                batch = _stack(
                    {"mel": _pad(j.mels[c], size), "lengths": np.int32(len(j.mels[c]))} for j, c in group
                )
                batch = sharding.put(batch)
                wav = jax.device_get(self._vocode(vocoder.module, configs[style], *batch.values()))
            for i, (j, c) in enumerate(group):
                wavs[id(j)][c] = wav[i, : len(j.mels[c]) * hop]
        for j in jobs:
            if not j.error:
                style = j.request.style
                gain = 10 ** (self.output_gain_db.get(style, 0.0) / 20) / j.clip.gain
                whole = join_chunks(wavs[id(j)], self.sample_rate, PAUSE_S[style]) * gain
                if not np.isfinite(whole).all():
                    j.error = "the vocoder gave samples that are not finite; try another seed"
                j.wav = np.clip(whole, -1.0, 1.0).astype(np.float32)

    def _result(self, job: _Job) -> Result | Failure:
        """Hop 6."""
        if job.error:
            return Failure(job.request, job.error)
        letters = {"normal": "N", "asmr": "A"}
        return Result(
            audio=job.wav,
            sample_rate=self.sample_rate,
            tokens=np.concatenate(job.tokens),
            mel=np.concatenate(job.mels),
            request=job.request,
            task=f"{letters[job.clip_style]}2{letters[job.request.style]}",
            language=job.language,
            prompt=job.prompt_name,
            prompt_similarity=job.similarity,
            notes=tuple(dict.fromkeys(job.notes)),
            timings=job.timings,
        )

    def _fixed_noise(self, setting) -> np.ndarray | None:
        """[T, M] noise that every utterance starts from, by `sampling.flow.noise`; None: drawn from the seed."""
        if setting is None:
            return None
        flow = self._parts["flow"]
        where = f"config.json in {self.folder} has sampling.flow.noise = {setting!r}"
        if not hasattr(flow.file, "read_noise"):
            raise ValueError(f"{where}, but only the flow of CosyVoice2 takes a fixed noise; take it out")
        if not isinstance(setting, str) or Path(setting).name != setting:
            raise ValueError(f'{where}; say "reference" or name a file in that folder')
        if setting == "reference":
            return flow.file.reference_noise(flow.file.REFERENCE_NOISE_FRAMES)
        return flow.file.read_noise(self.folder / setting, flow.config.mel_bins)

    def _num_frames(self, num_tokens: int) -> int:
        flow = self._parts["flow"]
        return int(flow.file.num_frames(flow.config, num_tokens))

    def _groups(self, rows: list, size: Callable) -> Iterator[tuple]:
        """(padded size, rows) of equal padded size, at most `max_batch` rows each, shortest first."""
        by_size: dict = {}
        for row in rows:
            by_size.setdefault(size(row), []).append(row)
        for key in sorted(by_size):
            group = by_size[key]
            for start in range(0, len(group), self.max_batch):
                yield key, group[start : start + self.max_batch]


def embed_speaker(file, model, cfg, wav: jax.Array, lengths: jax.Array) -> jax.Array:
    """Speaker embeddings of padded clips, through the front end that the encoder was trained with.

    Args:
        file: the Python module of the encoder; its `FBANK`, if it has one, are the arguments of `audio.fbank`.
        model: its weights.
        cfg: its Config; static under jit.
        wav: [B, W] float32 in [-1, 1], 16 kHz.
        lengths: [B] int32 valid samples.

    Returns:
        [B, E] float32.
    """
    fbank = audio.fbank(wav, lengths, **getattr(file, "FBANK", {}))
    return file.embed(model, cfg, fbank, audio.fbank_frames(lengths))


def _longest_run(tokens: np.ndarray) -> int:
    """Most equal tokens in a row."""
    changes = np.flatnonzero(np.diff(tokens)) + 1
    return int(np.diff(np.concatenate([[0], changes, [len(tokens)]])).max())


def _misread(tokens: np.ndarray) -> tuple[bool, int]:
    """How bad a draw with a problem is, greater is worse: silence, then a long held sound."""
    return len(tokens) < MIN_CHUNK_TOKENS, _longest_run(tokens)


def _is_numbers(x) -> bool:
    """Whether a setting is an object of numbers, or of such objects."""
    return isinstance(x, dict) and all(isinstance(v, int | float) or _is_numbers(v) for v in x.values())


def _changed(cfg, changes: dict, folder: Path, style: str):
    """The vocoder's Config as `sampling.vocoder` of a style changes it."""
    known = {f.name for f in dataclasses.fields(cfg)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(
            f"config.json in {folder} sets {', '.join(unknown)} in sampling.vocoder.{style}, which its vocoder does "
            f"not have; known are {', '.join(sorted(known))}"
        )
    return config_lib.from_dict(type(cfg), config_lib.to_dict(cfg) | changes)


class _Part:
    """A component: its file of code, its Config and its weights."""

    def __init__(self, folder: Path, name: str, config: dict):
        entry = config["components"][name]
        self.file = checkpoint.model_file(entry["module"])
        self.module, self.config = checkpoint.load_component(folder, name)
        if _is_faster_in_float32(name, entry["num_params"]):
            types = {f.name: "float32" for f in dataclasses.fields(self.config) if f.name in TYPES}
            self.config = dataclasses.replace(self.config, **types)
        if hasattr(self.file, "stacked"):
            self.module = self.file.stacked(self.module)


def _is_faster_in_float32(name: str, num_params: int) -> bool:
    """Whether a part is computed in float32 here, whatever its Config says.

    On a CPU without products of bfloat16 a large part is faster so, and takes more memory once it is loaded
    (docs/speed.md). A small language model is faster so on any CPU; other small parts are left in the types in which
    the built-in model was measured.
    """
    if jax.default_backend() != "cpu":
        return False
    return not programs.has_bfloat16_products() if num_params >= LARGE_PARAMS else name == "lm"


@programs.kept("settings", "mel_config")
def _analyse(
    models: list, batch: dict, settings: tuple, mel_config
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B, N], mel [B, T, M] and speaker embedding [B, E] of padded clips.

    models and settings: weights, and file and Config, of the speech tokenizer and of the speaker encoder.
    """
    (tokenizer, tokenizer_config), (speaker, speaker_config) = settings
    num = batch["num_tokens"]
    samples16 = num * audio.TOKEN_SAMPLES
    log_mel = audio.s3_log_mel(batch["wav16"], samples16)
    tokens, _ = tokenizer.encode(models[0], tokenizer_config, log_mel, num * audio.S3_FRAMES_PER_TOKEN)
    mel = audio.log_mel(batch["wav"], num * (mel_config.sample_rate // audio.TOKEN_RATE), mel_config)
    return tokens, mel, embed_speaker(speaker, models[1], speaker_config, batch["wav16"], samples16)


@programs.kept("file", "cfg")
def _vocode(file, module, cfg, mel: jax.Array, lengths: jax.Array) -> jax.Array:
    """The `apply` of a vocoder's file: mel [B, T, M] and frames [B] to [B, W]."""
    return file.apply(module, cfg, mel, lengths)


@programs.kept("stage")
def _keys(seeds: jax.Array, chunks: jax.Array, stage: int) -> jax.Array:
    """[B] keys from each request's seed, the number of the chunk, and the stage; never from the place."""

    def one(seed, chunk):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), chunk), stage)

    return jax.vmap(one)(seeds, chunks)


def _text_tokenizer(folder: Path, settings: dict):
    kind = settings.get("tokenizer", "mini")
    if kind == "mini":
        return text_lib.MiniTokenizer(settings.get("marks"))
    if kind == "qwen":
        return text_lib.QwenTokenizer(folder / settings.get("folder", "."), settings.get("normalizer", "own"))
    raise ValueError(
        f"the model in {folder} wants the text tokenizer {kind!r}; this version has mini and qwen"
    )


def _padded(size: int, base: int) -> int:
    """The least base * 2^k that is at least `size`."""
    while base < size:
        base *= 2
    return base


def _padded_finely(size: int, base: int) -> int:
    """The least base * 2^k or base * 1.5 * 2^k that is at least `size`: for the flow, most of a request's time."""
    octave = _padded(size, base)
    return octave if octave == base or size > octave * 3 // 4 else octave * 3 // 4


def _pad(x: np.ndarray, size: int, value: float = 0) -> np.ndarray:
    """`x` with its first axis filled up to `size`."""
    widths = [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1)
    return np.pad(x, widths, constant_values=value)


def _rows_of_mesh() -> int:
    """Rows of a batch are a multiple of this."""
    shape = sharding.ensure_mesh().shape
    return shape["slice"] * shape["data"]


def _stack(rows: Iterable[dict]) -> dict[str, np.ndarray]:
    """Rows to a batch of a power of two of rows, as the mesh divides them; the last row is repeated."""
    rows = list(rows)
    count = _padded(len(rows), _rows_of_mesh())
    rows += rows[-1:] * (count - len(rows))
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}
