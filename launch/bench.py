"""Speed: whole requests, each model beside PyTorch, and training steps, as one Markdown report.

    python launch/bench.py --out speed.md                       the built-in sizes, every part
    python launch/bench.py --size full --only lm flow           true sizes (several GB of memory)
    python launch/bench.py --size tiny --rounds 1               does the script work? (its numbers mean nothing)

    python launch/bench.py --size full --only step                  true-size training steps, on a large GPU
    python launch/bench.py --size full --only loader --seconds 60   threads, then processes

Parts: say (`deepasmr say` with a cold and a warm compilation cache, then a loaded Synthesizer), programs (each program
of a request: compiled, then read from the cache), lm, hifigan, vocoder, speech_tokenizer, flow (JAX and PyTorch in
turn, A B A B), products (few rows times the matrices of a layer of the language model, by side and layout of the
weights, JAX only), train (updates of each stage, JAX only), step (updates of the language model and of the flow, JAX
and PyTorch in turn, with the share of the device's peak), loader (batches of each stage, and whether memory grows);
see docs/speed.md.
Beside the rows with PyTorch stands the least time that the machine's ceilings allow. Each timing waits for its result;
the first two rounds are dropped. JAX_PLATFORMS picks the device, PyTorch follows. The report is written line by line,
so that what a part has measured is kept when a later one fails.
Needs: pip install torch einops s3tokenizer, and for flow the line in tests/golden/make_flow.py.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/golden")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and `say` use the same GPU

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402

from deepasmr_jax import (  # noqa: E402
    config,
    decoding,
    files,
    flow,
    lm,
    metrics,
    nn,
    programs,
    sharding,
    vocoder,
    vocoder_istft,
)
from deepasmr_jax import speech_tokenizer as s3  # noqa: E402

PARTS = ("say", "programs", "lm", "hifigan", "vocoder", "speech_tokenizer", "flow")
PARTS += ("products", "train", "step", "loader")
DROPPED = 2  # rounds that compile and warm up
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STAGES = ("clip_s", "lm_s", "flow_s", "vocoder_s")
NUM_TEXT, NUM_PROMPT, NUM_NEW = 50, 98, 50  # with the two markers 150 positions before the first new token
PREFILL, FLOW_FRAMES, VOCODER_S, TOKENIZER_S = 2 + NUM_TEXT + NUM_PROMPT, 500, 5, 10
LM_WORK = ((1, 0), (1, NUM_NEW), (8, NUM_NEW))  # (batch, new tokens) of the language model's rows
# names of the rows beside PyTorch that also stand beside the machine's ceilings
ROWS = {
    "lm": [f"LM prefill {PREFILL}" + (f" + {new} tokens, batch {n}" if new else "") for n, new in LM_WORK],
    "hifigan": [f"HiFi-GAN, {VOCODER_S} s"],
    "speech_tokenizer": [f"S3 tokenizer, {TOKENIZER_S} s"],
    "flow": [f"flow, guided step, {FLOW_FRAMES} frames"],
}
# rows of a training step of true size: PyTorch keeps all activations, about 5 and 3 GB a row by their sizes
STEP_ROWS = {"lm": 8, "flow": 16}
PRODUCTS, PRODUCT_ROWS = 8, (1, 2, 8, 32, PREFILL)  # eight matrices do not stay in a cache
LOADER_STAGES = ("lm", "flow", "vocoder", "speech_tokenizer", "speaker")


def model_config(part: str, size: str):
    """Config of a part beside PyTorch at the size tiny, mini or full."""
    full = dict(hifigan=vocoder.v1(), vocoder=vocoder_istft.vocos_24khz(), speech_tokenizer=s3.s3_v2())
    full |= dict(lm=lm.cosyvoice2(text_vocab=1024), flow=flow.deepasmr())  # a text table is only looked up
    if size == "full" or part == "hifigan":
        return full[part]
    size = "mini" if part == "speech_tokenizer" else size  # the PyTorch package is bound to heads of 64
    return config.load(f"{ROOT}/configs/{size}.py:{part}").model


def chosen_stages(part: str, args: argparse.Namespace) -> list[str]:
    """Stages that `step` or `loader` has at this size, without those that --stages leaves out."""
    known = STEP_ROWS if part == "step" else LOADER_STAGES[: 3 if args.size == "full" else None]
    return [stage for stage in known if not args.stages or stage in args.stages]


class Bench:
    """The command line's choices, the report so far, and PyTorch if it can use JAX's device."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lines, self.torch, self.device = args, [], None, "cpu"

    def add(self, *lines: str) -> None:
        """Adds lines to the report, prints them and writes the report so far."""
        self.lines += lines
        print("\n".join(lines), flush=True)
        if self.args.out:
            files.write_text(self.args.out, "\n".join(self.lines) + "\n")

    def table(self, title: str, columns: str, rows: list[tuple]) -> None:
        """Adds a heading and a table; numbers get three digits."""
        self.add("", f"## {title}", "", f"| {columns} |", "|" + "---|" * (columns.count("|") + 1))
        self.add(
            *(f"| {' | '.join(x if isinstance(x, str) else f'{x:.3g}' for x in row)} |" for row in rows), ""
        )

    def find_torch(self) -> None:
        """Sets `torch` and `device`, or says that PyTorch is not measured."""
        try:
            import torch
        except ImportError:
            return self.add("- JAX alone is measured: PyTorch is not installed (pip install torch)")
        if jax.default_backend() == "gpu" and torch.cuda.is_available():
            self.device = "cuda"
            torch.set_float32_matmul_precision("high")  # TF32, as XLA's default there
            torch.backends.cudnn.benchmark = True
        elif jax.default_backend() != "cpu":
            return self.add("- JAX alone is measured: this PyTorch cannot use its device")
        self.torch = torch

    def time(self, variants: dict) -> dict[str, list[float]]:
        """Seconds of each function, all in turn, round after round, without the first rounds."""
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(DROPPED + self.args.rounds):
            for name in list(seconds):
                began = time.perf_counter()
                try:
                    variants[name]()
                    if self.device == "cuda":
                        self.torch.cuda.synchronize()
                except Exception as e:  # what PyTorch's side cannot do must not end the run
                    if not name.startswith("torch"):
                        raise
                    self.add(f"- {name}: left out, {type(e).__name__}: {' '.join(str(e).split())[:160]}")
                    del seconds[name]
                else:
                    seconds[name] += [time.perf_counter() - began] if number >= DROPPED else []
        return seconds

    def side_by_side(self, cfg, ours: dict, make, mode: str | None = None) -> list[tuple]:
        """Times JAX in the types of `--dtypes` and every variant of PyTorch in turn; returns rows of the table.

        `ours`: row -> function of a config that starts the work and returns its arrays. `make`: function of (torch
        dtype, wrapper that may compile) that yields a function (or None) per row. `mode`: of torch.compile on a GPU.
        """
        compiled = functools.partial(self.torch.compile, mode=mode) if self.torch else None
        kinds = [(kind, lambda f: f) for kind in self.args.dtypes]
        if "bf16" in self.args.dtypes and (self.args.compile or self.device == "cuda"):
            kinds += [("bf16", compiled)]
        variants: dict[str, dict] = {row: {} for row in ours}
        for kind, wrap in kinds if self.torch else ():
            try:
                for row, function in zip(ours, make(getattr(self.torch, DTYPES[kind]), wrap), strict=True):
                    if function is not None:
                        name = f"torch {kind}{', compiled' if wrap is compiled else ''}"
                        variants[row][name] = self.torch.inference_mode()(function)
            except ImportError as e:
                self.add(f"- {', '.join(ours)}: PyTorch's side is left out, {e.name or e} is not installed")
                break
        table = []
        for row, run in ours.items():
            print(f"{row} ...", file=sys.stderr, flush=True)
            for kind in self.args.dtypes:
                c = dataclasses.replace(cfg, dtype=DTYPES[kind])
                variants[row][f"JAX {kind}"] = lambda run=run, c=c: jax.block_until_ready(run(c))
            table += [(row, *rest) for rest in beside_best(self.time(variants[row]))]
        return table


def median_seconds(function, *arrays, times: int = 7) -> float:
    """Median seconds of `times` calls of a function under jit, after `DROPPED` calls that do not count."""
    run, seconds = jax.jit(function), []
    for _ in range(DROPPED + times):
        began = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[DROPPED:]))


def ceilings() -> tuple[dict[str, float], float]:
    """(FLOP/s of a large product in fp32 and bf16, with float32 sums; bytes/s of reading 256 MiB): medians of 7."""
    x, y = (jax.random.normal(jax.random.key(0), shape) for shape in ((1024, 1024), (1024, 4096)))
    product = lambda a, b: jax.numpy.matmul(a, b, preferred_element_type="float32")
    peak = {
        k: 2 * x.size * y.shape[1] / median_seconds(product, x.astype(d), y.astype(d))
        for k, d in DTYPES.items()
    }
    values = jax.numpy.ones(2**26)
    return peak, values.nbytes / median_seconds(lambda v: v.sum(), values)


def phases(part: str, cfg) -> dict[str, list[tuple[float, float, int]]]:
    """Per row of the table beside PyTorch: (FLOPs, values read, times) of its phases, matrix products and weights only.

    Phases are what follows on each other: a prefill, then each token, which reads all weights again.
    """
    if part == "lm":
        heads = cfg.num_heads + 2 * cfg.num_kv_heads
        layer = cfg.width * (heads * cfg.head_dim + cfg.num_heads * cfg.head_dim + 3 * cfg.mlp_width)
        layers, head = cfg.num_layers * layer, cfg.width * cfg.num_speech_rows
        attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim
        first = (2 * layers * PREFILL + attention * PREFILL**2 / 2 + 2 * head, layers + head)
        step = (2 * (layers + head) + attention * PREFILL, layers + head)
        # the first token comes from the prefill, so that there is a step less than new tokens
        work = [[(n * first[0], first[1], 1), (n * step[0], step[1], max(new - 1, 0))] for n, new in LM_WORK]
        return dict(zip(ROWS[part], work, strict=True))
    if part == "flow":
        inner, length = cfg.num_heads * cfg.head_dim, FLOW_FRAMES // cfg.patch_frames + 1
        # half of the layers have a skip, of 2 * width**2
        layer = 4 * cfg.width * inner + 2 * cfg.mlp_ratio * cfg.width**2 + cfg.width**2
        values = cfg.num_layers * layer + 2 * cfg.conv_kernel * cfg.width**2 // cfg.conv_groups
        flops = 2 * (2 * values * length + 4 * cfg.num_layers * inner * length**2)  # two rows
        return dict(zip(ROWS[part], [[(flops, values, 1)]], strict=True))
    if part == "speech_tokenizer":
        length = TOKENIZER_S * 25
        stem = 2 * length * 3 * cfg.num_mels * cfg.width + length * 3 * cfg.width**2
        layer = 4 * cfg.width**2 + 2 * cfg.width * cfg.mlp_width
        flops = 2 * (stem + cfg.num_blocks * layer * length) + 4 * cfg.num_blocks * cfg.width * length**2
        return dict(zip(ROWS[part], [[(flops, cfg.num_blocks * layer, 1)]], strict=True))
    if part == "hifigan":
        frames, width = VOCODER_S * cfg.mel.sample_rate // cfg.mel.hop_samples, cfg.initial_channels
        macs = frames * 7 * cfg.mel.num_mels * width
        for rate, kernel in zip(cfg.upsample_rates, cfg.upsample_kernels, strict=True):
            macs += frames * kernel * width * width // 2
            frames, width = frames * rate, width // 2
            blocks = zip(cfg.residual_kernels, cfg.residual_dilations, strict=True)
            macs += frames * 2 * sum(k * len(d) for k, d in blocks) * width**2
        return dict(zip(ROWS[part], [[(2 * macs, 0, 1)]], strict=True))
    return {}  # no row of this part stands beside the ceilings


def beside_ceilings(bench: "Bench", parts: list[str], rows: list[tuple]) -> None:
    """Adds a table: the least time that the machine's ceilings allow each JAX row, and the share of it reached.

    Raises:
        ValueError: if a row of these parts is not among those measured.
    """
    peak, bandwidth = ceilings()
    found = []
    for part in parts:
        for name, work in phases(part, model_config(part, bench.args.size)).items():
            for kind in bench.args.dtypes:
                size = np.dtype(DTYPES[kind]).itemsize
                least = sum(
                    n * max(flops / peak[kind], size * values / bandwidth) for flops, values, n in work
                )
                owns = [row[2] for row in rows if row[:2] == (name, f"JAX {kind}")]
                if not owns:
                    raise ValueError(f"no row {name!r} of JAX {kind} was measured for the part {part}")
                found += [(name, f"JAX {kind}", least, own, f"{100 * least / own:.0f} %") for own in owns]
    if found:
        speeds = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in peak.items())
        bench.table("Beside the machine's ceilings", "work | side | least s | median s | reached", found)
        bench.add(f"- ceilings: matrix products {speeds}; reading {bandwidth / 1e9:.0f} GB/s")


def summary(values: list[float]) -> tuple[float, str]:
    """(median, "least to greatest")."""
    return float(np.median(values)), f"{min(values):.3g} to {max(values):.3g}"


def beside_best(seconds: dict[str, list[float]]) -> list[tuple]:
    """(side, median seconds, range, PyTorch's best / this for a side of JAX, range) of each side."""
    best = min((v for k, v in seconds.items() if k.startswith("torch")), key=np.median, default=None)
    rows = []
    for name, own in seconds.items():
        ratio = [a / b for a, b in zip(best, own, strict=True)] if best and name.startswith("JAX") else []
        rows.append((name, *summary(own), *(summary(ratio) if ratio else ("", ""))))
    return rows


def qwen2(cfg: lm.Config):
    """PyTorch's side of the language model: the settings of transformers for its backbone, speech table and head."""
    import public_reference

    changes = dict(vocab_size=cfg.num_speech_rows, attn_implementation="sdpa", tie_word_embeddings=False)
    return public_reference.qwen2_config(cfg, **changes)


def measure_lm(bench: Bench, cfg: lm.Config) -> list[tuple]:
    """Prefill alone, and prefill with new tokens for one row and for eight."""
    rng, size = np.random.default_rng(0), PREFILL + NUM_NEW
    model = jax.jit(lm.init, static_argnums=0)(cfg, jax.random.key(0))
    weights = {v: decoding.unstack(model, dataclasses.replace(cfg, dtype=v)) for v in DTYPES.values()}
    del model
    prefill = jax.jit(decoding.prefill, static_argnums=1)
    put = lambda *arrays: sharding.put({i: np.int32(x) for i, x in enumerate(arrays)}).values()

    def generate(rows: int):
        full, keys = functools.partial(np.full, rows), jax.random.split(jax.random.key(1), rows)
        words, prompt = (rng.integers(0, 40, (rows, n)) for n in (NUM_TEXT, NUM_PROMPT))
        arrays = put(words, full(NUM_TEXT), prompt, full(NUM_PROMPT), full(NUM_NEW), full(NUM_NEW))
        return lambda c: decoding.generate(
            weights[c.dtype], c, decoding.Sampling(), *arrays, keys=keys, max_new=NUM_NEW
        )

    one = put(rng.integers(0, cfg.num_codes, (1, PREFILL)), np.full((1, PREFILL), lm.SPEECH), [PREFILL])
    first = lambda c: prefill(weights[c.dtype], c, *one)
    work = (generate(n) if num_new else first for n, num_new in LM_WORK)
    ours = dict(zip(ROWS["lm"], work, strict=True))

    def make(dtype, wrap):
        from transformers import Qwen2ForCausalLM, StaticCache

        settings = qwen2(cfg)
        theirs = Qwen2ForCausalLM(settings).to(bench.device, dtype).eval()
        step = wrap(theirs)  # only the step is compiled

        def speak(cache, ids, num_new: int):
            cache.reset()
            scores = theirs(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            for left in range(num_new, 0, -1):
                token = scores[:, -1].argmax(-1, keepdim=True)  # less work than our sampling
                if left > 1:
                    scores = step(input_ids=token, past_key_values=cache, use_cache=True).logits

        for rows, num_new in LM_WORK:
            ids = bench.torch.randint(0, cfg.num_codes, (rows, PREFILL), device=bench.device)
            cache = StaticCache(config=settings, max_cache_len=size)
            yield functools.partial(speak, cache, ids, num_new) if num_new or step is theirs else None

    return bench.side_by_side(cfg, ours, make, "reduce-overhead")


def measure_products(bench: Bench) -> None:
    """Few rows times the large matrices of a layer of the language model, by side and layout of the weights."""
    cfg, whole = model_config("lm", bench.args.size), PartitionSpec(None, None)
    columns = ("matrix", "type", "rows", "ms to read the weights", "weights right, [in, out]")
    columns += ("weights right, [out, in]", "weights left, [out, in]")
    table, (_, bandwidth) = [], ceilings()

    def ways(dtype: str):
        product = functools.partial(nn.product, dtype=dtype, out_sharding=whole)
        # without a barrier XLA turns the last one back: decoding._product
        left = lambda x, w: jax.lax.optimization_barrier(product("oi,ni->on", w, x)).T
        return lambda x, w: product("ni,io->no", x, w), lambda x, w: product("ni,oi->no", x, w), left

    def chain(way, x, weights):
        """Each product waits for the one before it."""
        found = 0.0
        for w in weights:
            # barriers: the product is whole, and its operand there before it; a sum of it took longer than itself
            operand = jax.lax.optimization_barrier(x + 1e-9 * found)
            found = jax.lax.optimization_barrier(way(operand, w))[0, 0]
        return found

    for size in ((cfg.width, 2 * cfg.mlp_width), (cfg.mlp_width, cfg.width)):
        print(f"products of {size} ...", file=sys.stderr, flush=True)
        for kind in bench.args.dtypes:
            keys = jax.random.split(jax.random.key(0), PRODUCTS)
            stored, turned = (
                [jax.random.normal(k, n, DTYPES[kind]) for k in keys] for n in (size, size[::-1])
            )
            least = 1e3 * sum(w.nbytes for w in stored) / bandwidth
            for rows in PRODUCT_ROWS:
                x, kinds = jax.random.normal(keys[0], (rows, size[0])), ways(DTYPES[kind])
                found = [
                    1e3 * median_seconds(functools.partial(chain, way), x, weights, times=40)
                    for way, weights in zip(kinds, (stored, turned, turned), strict=True)
                ]
                table.append((f"{size[0]} x {size[1]}", kind, str(rows), least, *found))
    bench.table(f"{PRODUCTS} products in a row, ms, medians of 40", " | ".join(columns), table)


def measure_flow(bench: Bench, cfg: flow.Config) -> list[tuple]:
    """One guided Euler step: the network on the conditional and the unconditional row."""
    rng, model = np.random.default_rng(0), jax.jit(flow.init, static_argnums=0)(cfg, jax.random.key(0))
    num_tokens = FLOW_FRAMES * cfg.frames_per_token[1] // cfg.frames_per_token[0]
    inputs = dict(speech_tokens=np.int32(rng.integers(0, cfg.num_codes, (1, num_tokens))))
    inputs |= dict(num_tokens=np.int32([num_tokens]), prompt_frames=np.int32([100]))
    inputs["prompt_mel"] = np.float32(rng.standard_normal((1, FLOW_FRAMES, cfg.mel_bins)))
    inputs = sharding.put(inputs) | {"keys": jax.random.split(jax.random.key(1), 1)}

    def make(dtype, wrap):
        import public_reference

        torch, network = bench.torch, wrap(public_reference.e2(cfg).to(bench.device, dtype).eval())
        shape, kind = (1, FLOW_FRAMES // cfg.patch_frames), dict(device=bench.device, dtype=dtype)
        condition, t = torch.randn(*shape, cfg.mel_bins * cfg.patch_frames, **kind), torch.zeros(1, **kind)
        tokens = torch.randint(0, cfg.num_codes, shape, device=bench.device)

        def step():
            x = torch.randn_like(condition)
            v, null = network(x=x, cond=condition, text=tokens, time=t, cfg_infer=True).chunk(2)
            return x + (v + 1.0 * (v - null))

        yield step

    run = lambda c: flow.sample(model, c, **inputs, num_steps=1, guidance=1.0)
    return bench.side_by_side(cfg, dict(zip(ROWS["flow"], [run], strict=True)), make)


def measure_vocoder(bench: Bench, cfg) -> list[tuple]:
    """Mel to waveform, by either vocoder.

    PyTorch has no pulse-and-noise vocoder, so beside it runs the same network with one inverse-STFT head, equal on
    both sides; the time of the vocoder as it is built in stands in rows of its own, without a ratio.
    """
    is_hifigan = isinstance(cfg, vocoder.Config)
    file = vocoder if is_hifigan else vocoder_istft
    num_frames = VOCODER_S * cfg.mel.sample_rate // cfg.mel.hop_samples
    mel = np.float32(np.random.default_rng(0).standard_normal((1, num_frames, cfg.mel.num_mels)))
    placed, run = sharding.put({"mel": mel}), jax.jit(file.apply, static_argnums=1)
    init = jax.jit(file.init_generator, static_argnums=0)

    def make(dtype, wrap):
        import public_reference

        make_torch = public_reference.hifigan_plain if is_hifigan else torch_istft
        network = wrap(make_torch(cfg).to(bench.device, dtype).eval())
        yield functools.partial(network, bench.torch.tensor(mel).to(bench.device, dtype))

    def alone(dtype, wrap):
        yield None  # no PyTorch side

    def rows(name: str, cfg, make) -> list[tuple]:
        model = init(cfg, jax.random.key(0))
        return bench.side_by_side(cfg, {name: lambda c: run(model, c, **placed)}, make)

    if is_hifigan or not cfg.source:
        return rows(ROWS["hifigan"][0] if is_hifigan else f"iSTFT, {VOCODER_S} s", cfg, make)
    built_in, cfg = cfg, dataclasses.replace(cfg, source=False, subframes=1, frame_size=0)  # `make` reads cfg
    beside = rows(f"iSTFT, one head, {VOCODER_S} s", cfg, make)
    return beside + rows(f"built-in, pulses and noise, {VOCODER_S} s", built_in, alone)


def torch_istft(cfg: vocoder_istft.Config):
    """The blocks of Vocos (Siuzdak, 2023) and the inverse-STFT head of transformers, [B, T, M] to [B, 1, W]."""
    from torch import nn
    from transformers.models.xcodec2.modeling_xcodec2 import Xcodec2ISTFTHead

    width, norm = cfg.width, functools.partial(nn.LayerNorm, eps=1e-6)

    class Conv(nn.Conv1d):
        def forward(self, x):  # channels last
            return super().forward(x.mT).mT

    class Block(nn.Sequential):
        def forward(self, x):  # the gain of a block is left out: it folds into its last product
            return x + super().forward(x)

    conv = functools.partial(Conv, out_channels=width, kernel_size=cfg.kernel, padding=cfg.kernel // 2)
    mlp = lambda: (nn.Linear(width, cfg.mlp_width), nn.GELU(), nn.Linear(cfg.mlp_width, width))
    blocks = [Block(conv(width, groups=width), norm(width), *mlp()) for _ in range(cfg.num_layers)]
    sizes = argparse.Namespace(hidden_size=width, n_fft=cfg.mel.n_fft, hop_length=cfg.mel.hop_samples)
    return nn.Sequential(conv(cfg.mel.num_mels), norm(width), *blocks, norm(width), Xcodec2ISTFTHead(sizes))


def measure_s3(bench: Bench, cfg: s3.Config) -> list[tuple]:
    """Log-mel to speech tokens; PyTorch's bf16 is by autocast, since its norms want float32 weights."""
    frames = TOKENIZER_S * 100
    mel = np.float32(np.random.default_rng(0).standard_normal((1, frames, cfg.num_mels)))
    inputs = sharding.put({"log_mel": mel, "lengths": np.int32([frames])})
    model = jax.jit(s3.init, static_argnums=0)(cfg, jax.random.key(0))
    encode = jax.jit(s3.encode, static_argnums=1)

    def make(dtype, wrap):
        import public_reference

        torch, device = bench.torch, bench.device
        quantize = wrap(public_reference.s3_v2(cfg, use_sdpa=True).to(device).eval().quantize)
        clip = torch.tensor(mel, device=device).mT.contiguous(), torch.tensor([frames], device=device)
        cast = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
        yield lambda: cast(quantize)(*clip)

    run = lambda c: encode(model, c, **inputs)
    return bench.side_by_side(cfg, dict(zip(ROWS["speech_tokenizer"], [run], strict=True)), make)


def built_in_clip() -> tuple[str, str]:
    """(file of a normal clip, a sentence) from the demo of the built-in model, whichever model is to speak."""
    from deepasmr_jax import request

    demo = request.BUILT_IN / "demo"
    voice = json.loads((demo / "demo.json").read_text("utf-8"))["voices"][0]
    return str(demo / voice["clips"]["normal"]["file"]), voice["sentences"][0]


def measure_say(bench: Bench) -> None:
    """Whispered speech from a normal clip: fresh processes, then a loaded Synthesizer on one sentence and on eight.

    Raises:
        RuntimeError: if the model does not speak.
    """
    from deepasmr_jax import request, results, synthesis

    folder, (clip, sentence) = bench.args.model or str(request.BUILT_IN), built_in_clip()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found: dict[str, list] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "deepasmr_jax.cli", "say", sentence, "--json", "--model", folder]
        command += ["--voice", clip, "--voice-style", "normal", "--out", f"{place}/out.wav"]
        for number in range(1 + min(bench.args.rounds, 3)):  # the first pair reads the programs from disk
            env = os.environ | {"DEEPASMR_CACHE": f"{place}/cache{number}", "PYTHONPATH": path}
            for made in found.values():
                began = time.perf_counter()
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                seconds = time.perf_counter() - began
                if done.returncode:
                    raise RuntimeError(f"`deepasmr say` failed: {done.stderr.strip()[-300:]}")
                made += [(seconds, json.loads(done.stdout.splitlines()[-1]))] if number else []
    rows = []
    for kind, made in found.items():
        stages = np.median([[f["timings"][k] for k in ("compile_s", *STAGES)] for _, f in made], axis=0)
        rows.append((f"{kind} cache", *summary([s for s, _ in made]), *stages, made[0][1]["duration_s"]))
    names = "median s | range | of it compilation | clip | LM | flow | vocoder | s of speech"
    bench.table("`deepasmr say` in a fresh process, N2A, one sentence", f"process | {names}", rows)
    synthesizer, rows = synthesis.load(folder), []
    for count in (1, 8):
        kept: list = []
        requests = [dict(text=sentence, voice=clip, voice_style="normal", seed=i) for i in range(count)]
        [seconds] = bench.time({"": lambda r=requests, kept=kept: kept.append(synthesizer.batch(r))}).values()
        if failed := [r.error for r in kept[0] if isinstance(r, results.Failure)]:
            raise RuntimeError(failed[0])
        sums = [[sum(r.timings[k] for r in made) for k in STAGES] for made in kept[DROPPED:]]
        stages, speech_s = np.median(sums, axis=0), sum(r.duration_s for r in kept[0])
        factor = summary([s / speech_s for s in seconds])
        rows.append((str(count), *factor, *summary(seconds), *stages, speech_s))
    names = "sentences at once | real-time factor | range | median s | range | clip | LM | flow | vocoder | s of speech"
    bench.table("Loaded `Synthesizer`, N2A", names, rows)


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """Lets a Synthesizer keep programs in a temporary folder; afterwards nothing is kept but in JAX's cache."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    names = [f"jax_{name}" for name in (*names, "persistent_cache_min_entry_size_bytes")]
    before, switch = {name: getattr(jax.config, name) for name in names}, os.environ["DEEPASMR_CACHE"]
    jax.config.update("jax_compilation_cache_dir", None)  # else the Synthesizer would keep to that one
    compilation_cache.reset_cache()  # the folder of the first use stays JAX's, whatever the setting says later
    try:
        with tempfile.TemporaryDirectory() as os.environ["DEEPASMR_CACHE"]:
            yield
    finally:
        programs.keep_in(None)
        os.environ["DEEPASMR_CACHE"] = switch
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def by_program(spans: list[tuple[float, float, bool, str]]) -> dict[str, list[float]]:
    """Program -> [seconds of tracing and lowering, seconds of compilation].

    Args:
        spans: (start, end, whether it is a compilation, name), in the order of their ends. What was traced and lowered
            since the last compilation belongs to the next one; of spans that lie in one another the time counts once.
    """
    seconds: dict[str, list[float]] = {}
    before: list[tuple[float, float]] = []
    for start, end, is_compiled, name in spans:
        if not is_compiled:
            before.append((start, end))
            continue
        traced = reached = 0.0
        for first, last in sorted(before):
            traced += max(last - max(first, reached), 0.0)
            reached = max(reached, last)
        row = seconds.setdefault(name, [0.0, 0.0])
        row[0], row[1], before = row[0] + traced, row[1] + end - start, []
    return seconds


def measure_programs(bench: Bench) -> None:
    """Seconds that each program of a short request takes to compile, then to be read from the cache on disk.

    One solver step: the number of steps is a length, not a size of the program.
    """
    from deepasmr_jax import synthesis

    (clip, _), spans, found = built_in_clip(), [], []

    def on_event(event: str, seconds: float, fun_name: str = "", **_) -> None:
        is_read, now = event == programs.READ_EVENT, time.perf_counter()
        if event.startswith("/jax/core/compile/") or is_read:
            name = fun_name.removeprefix("jit(").removesuffix(")")
            spans.append((now - seconds, now, is_read or event.endswith("backend_compile_duration"), name))

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        with own_cache():
            synthesizer = synthesis.load(bench.args.model)
            synthesizer.solver["num_steps"] = 1
            for _ in range(2):
                spans.clear()
                jax.clear_caches()
                programs.forget()
                synthesizer("Hi.", clip, voice_style="normal")
                found.append(by_program(spans))
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    rows = [(name, *row, *found[1].get(name, (0.0, 0.0))) for name, row in found[0].items()]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    names = "program | traced and lowered, s | compiled, s | traced and lowered again, s | read from disk, s"
    bench.table("Programs of one request", names, rows)


def updates(cfg, batch: dict[str, np.ndarray]):
    """A function without arguments that makes one update more of a run, always on this batch."""
    from deepasmr_jax import train

    update, placed = train.make_step(cfg), (sharding.put(batch),)
    states = [jax.jit(functools.partial(train.init, cfg))(jax.random.key(0))]
    return lambda: states.append(jax.block_until_ready(update(states.pop(), placed))[0])


def measure_train(bench: Bench) -> None:
    """Updates of each stage on one batch of the tests' noise dataset; batches have one shape whatever is in them."""
    import fixture_data
    from absl import flags

    from deepasmr_jax import input_pipeline

    flags.FLAGS.mark_as_parsed()  # Grain reads them
    rows, file = [], "tiny" if bench.args.size == "tiny" else "mini"
    stages = ("speech_tokenizer", "speaker", "lm", "flow", "vocoder", "recognizer")
    with tempfile.TemporaryDirectory() as place:
        folder = fixture_data.write(Path(place), {"train": 400})
        for stage in stages[: 5 if file == "tiny" else 6]:  # there is no tiny recogniser
            print(f"training {stage} ...", file=sys.stderr, flush=True)
            cfg = config.load(f"{ROOT}/configs/{file}.py:{stage}")
            data = dataclasses.replace(cfg.data, data_dirs=(folder,), languages=(), spell_probability=0.0)
            [batch] = input_pipeline.first_batches(data, 1)
            [seconds] = bench.time({stage: updates(cfg, batch)}).values()
            speed = f"{data.items_per_batch / np.median(seconds):,.0f} {data.item}"
            rows.append((stage, str(data.batch_size), *summary(seconds), speed))
    bench.table(
        f"Training, configs/{file}.py, noise", "stage | rows | median s a step | range | per second", rows
    )


def step_batch(cfg) -> dict[str, np.ndarray]:
    """Full rows of noise, keys as in input_pipeline.py: one segment of text and speech, or a prompt and its target."""
    rng, shape = np.random.default_rng(0), (cfg.data.batch_size, cfg.data.num_tokens)
    codes, place = rng.integers(0, cfg.model.num_codes, shape), np.broadcast_to(np.arange(shape[1]), shape)
    if cfg.component == "lm":
        task = shape[1] // 6  # before it text, after it speech
        kinds = np.select([place == 0, place < task, place == task], [lm.SOS, lm.TEXT, lm.TASK], lm.SPEECH)
        tokens = np.where(
            kinds == lm.SPEECH, codes, np.where(kinds == lm.TEXT, codes % cfg.model.text_vocab, 0)
        )
        targets = np.where(place < task, -1, np.roll(codes, -1, axis=1))
        found = dict(tokens=tokens, kinds=kinds, positions=place, targets=targets)
        found["segment_ids"] = np.ones(shape)
        return {name: np.int32(x) for name, x in found.items()}
    frames = flow.num_frames(cfg.model, shape[1])
    mel = cfg.model.mel_mean + cfg.model.mel_std * rng.standard_normal((shape[0], frames, cfg.model.mel_bins))
    counts = dict(num_tokens=np.full(shape[0], shape[1]), prompt_frames=np.full(shape[0], frames // 4))
    return {"mel": np.float16(mel)} | {k: np.int32(x) for k, x in dict(speech_tokens=codes, **counts).items()}


def torch_updates(bench: Bench, cfg, batch: dict[str, np.ndarray]) -> dict:
    """Functions that make one update in PyTorch: weights in float32, autocast to bfloat16, SDPA, fused Adam.

    The language model is causal over the whole row and its text and speech tables are as ours; the flow averages its
    weights as ours does. Loss and network are compiled together.

    Raises:
        ImportError: if a package of PyTorch's side is absent.
    """
    import public_reference

    torch, model = bench.torch, cfg.model
    x = {name: torch.tensor(value).to(bench.device) for name, value in batch.items()}
    if cfg.component == "lm":
        from transformers import Qwen2ForCausalLM

        net = Qwen2ForCausalLM(qwen2(model))
        net.text, net.marker = (torch.nn.Embedding(n, model.width) for n in (model.text_vocab, 2))
        tokens, kinds = x["tokens"].long(), x["kinds"]
        is_text, is_speech = kinds == lm.TEXT, kinds == lm.SPEECH

        def loss():
            text, speech = net.text(tokens * is_text), net.get_input_embeddings()(tokens * is_speech)
            rows = torch.where(is_text[..., None], text, net.marker((kinds == lm.TASK).int()))
            rows = torch.where(is_speech[..., None], speech, rows)
            scores = net(inputs_embeds=rows, use_cache=False).logits
            goals = x["targets"].flatten().long()
            return torch.nn.functional.cross_entropy(scores.flatten(0, 1).float(), goals, ignore_index=-1)
    else:
        net = public_reference.e2(model)
        index = torch.tensor(flow.token_index(model, cfg.data.num_tokens), device=bench.device)
        tokens = x["speech_tokens"].long()[:, index]
        data = ((x["mel"].float() - model.mel_mean) / model.mel_std).reshape(*tokens.shape, -1)
        wanted = (torch.arange(tokens.shape[1], device=bench.device) >= tokens.shape[1] // 4)[:, None]

        def loss():
            t = torch.rand(len(data), device=bench.device)
            noise, time = torch.randn_like(data), t[:, None, None]
            v = net(x=(1 - time) * noise + time * data, cond=data * ~wanted, text=tokens, time=t)
            return ((v.float() - (data - noise)).square() * wanted).sum() / (
                wanted.sum() * len(data) * data.shape[-1]
            )

    net.to(bench.device).train()
    weights = list(net.parameters())
    average = [w.detach().clone() for w in weights] if cfg.ema_decay else None
    adam = torch.optim.Adam(weights, lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps, fused=True)

    def update(loss):
        with torch.autocast(bench.device, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, cfg.optim.clip_norm)
        adam.step()
        adam.zero_grad()
        if average:
            torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - cfg.ema_decay)

    found = {"torch bf16": functools.partial(update, loss)}
    if bench.args.compile or bench.device == "cuda":
        found["torch bf16, compiled"] = functools.partial(update, torch.compile(loss))
    return found


def measure_step(bench: Bench) -> None:
    """Updates of the language model and of the flow by their configs, beside the same in PyTorch, on one device."""
    from deepasmr_jax import train

    device, table = jax.local_devices()[0], []
    peak = metrics.peak_flops(device)
    sharding.make_mesh(devices=[device])
    for stage in chosen_stages("step", bench.args):
        print(f"training {stage} ...", file=sys.stderr, flush=True)
        full = bench.args.size == "full"
        name = f"{stage}_pretrain.py" if full else f"{bench.args.size}.py:{stage}"
        cfg = config.override(config.load(f"{ROOT}/configs/{name}"), *bench.args.set)
        changes = dict(dtype="bfloat16", activation_dtype="bfloat16")
        changes |= {"alignment_weight": 0.0} if stage == "lm" else {}
        rows = bench.args.rows or (STEP_ROWS[stage] if full else cfg.data.batch_size)
        cfg = dataclasses.replace(
            cfg,
            model=dataclasses.replace(cfg.model, **changes),
            data=dataclasses.replace(cfg.data, batch_size=rows),
            accumulation=1,
            mesh=train.Mesh(),
        )
        batch, flops = step_batch(cfg), train.step_flops(cfg, None, ())
        variants = {}
        if bench.torch:
            try:
                variants = torch_updates(bench, cfg, batch)
            except ImportError as e:
                bench.add(f"- {stage}: PyTorch's side is left out, {e.name or e} is not installed")
        seconds = bench.time(variants | {"JAX bf16": updates(cfg, batch)})
        items = cfg.data.items_per_batch
        if stage == "flow":
            items = rows * flow.num_frames(cfg.model, cfg.data.num_tokens)
        work = f"{stage}, {rows} x {items // rows:,} {'frames' if stage == 'flow' else 'positions'}"
        for side, median, spread, *ratio in beside_best(seconds):
            share = f"{100 * flops / (median * peak):.1f} %" if peak else ""
            table.append((work, side, median, spread, f"{items / median:,.0f}", share, *ratio))
        if used := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            bench.add(f"- {stage}: memory of JAX at most {used / 1e9:.1f} GB, the stages before it included")
        if bench.device == "cuda":
            used = bench.torch.cuda.max_memory_allocated()
            bench.add(f"- {stage}: memory of PyTorch at most {used / 1e9:.1f} GB")
            del variants
            bench.torch.cuda.empty_cache()
            bench.torch.cuda.reset_peak_memory_stats()
    sharding.make_mesh()
    columns = "step | side | median s | range | items a second | MFU | best PyTorch / this | range"
    bench.table(f"Training steps of the {bench.args.size} configs beside PyTorch", columns, table)
    known = f"{peak / 1e12:.0f} TFLOP/s" if peak else "not known, so there is no MFU"
    bench.add(f"- bfloat16 peak of {device.device_kind}: {known}; FLOPs of a step: three forward passes")


def measure_loader(bench: Bench) -> None:
    """Batches a second of each stage with threads and with processes, without a model; memory while they are read.

    On the tests' noise dataset with records of 4 s or `--record-seconds`; its sentences are short.
    Records of `lm` and `flow` are what `data/add_features.py --for` keeps.
    """
    import fixture_data
    from absl import flags

    from deepasmr_jax import input_pipeline

    flags.FLAGS.mark_as_parsed()
    seconds = bench.args.record_seconds
    names = {"lm": "lm_pretrain.py", "flow": "flow_pretrain.py", "vocoder": "vocoder.py"}
    if bench.args.size != "full":
        names = {stage: f"{bench.args.size}.py:{stage}" for stage in LOADER_STAGES}
    rows, folders = [], {}
    with tempfile.TemporaryDirectory() as place:
        for stage in chosen_stages("loader", bench.args):
            kept = stage if stage in ("lm", "flow") else "all"
            if kept not in folders:
                # in a process of its own: what writing leaves in memory would be counted
                with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                    job = dict(folder=Path(place, kept), counts={"train": 400}, seconds=seconds, stage=kept)
                    folders[kept] = other.submit(fixture_data.write, **job).result()
            cfg = config.load(f"{ROOT}/configs/{names[stage]}").data
            cfg = dataclasses.replace(cfg, data_dirs=(folders[kept],), spell_probability=0.0)
            for workers in bench.args.workers or (0, os.cpu_count() or 1):
                print(f"loading {stage}, {workers} workers ...", file=sys.stderr, flush=True)
                data = iter(input_pipeline.make(dataclasses.replace(cfg, worker_count=workers)))
                num_ahead = cfg.num_prefetch * max(workers, 1)  # made ahead, so they are not measured
                for _ in range(num_ahead + DROPPED):
                    next(data)
                began, count, memory = time.perf_counter(), 0, []
                while (now := time.perf_counter() - began) < bench.args.seconds or count < 3:
                    if now >= len(memory) * bench.args.seconds / 8:
                        memory.append(resident_mib())
                    next(data)
                    count += 1
                memory.append(resident_mib())
                per_s = count / (time.perf_counter() - began)
                kind = f"{workers} processes" if workers else f"{cfg.num_threads} threads"
                speed = f"{per_s * cfg.items_per_batch:,.0f} {cfg.item}"
                growth = ", ".join(f"{memory[(len(memory) - 1) * i // 4]:.0f}" for i in range(1, 5))
                rows.append((stage, str(cfg.batch_size), kind, per_s, speed, growth))
                del data
    bench.table(
        f"Loader, {bench.args.size} configs, records of {seconds:g} s, {bench.args.seconds:g} s each, "
        f"{os.cpu_count()} host cores",
        "stage | rows | read by | batches a second | items a second | MiB after each quarter", rows,
    )  # fmt: skip


def resident_mib() -> float:
    """Memory of this process and its children, counted with what they share; 0 where there is no /proc."""
    tasks, total = [os.getpid()], 0
    while tasks:
        task = Path(f"/proc/{tasks.pop()}")
        try:
            for thread in task.glob("task/*/children"):
                tasks += map(int, thread.read_text().split())
            total += int((task / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # a child that has ended, or another system
            continue
    return total / 2**20


def machine() -> str:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = text.partition("model name")[2].partition("\n")[0].strip("\t :")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    names = ("jax", "flax", "torch", "transformers", "s3tokenizer", "f5-tts")
    versions = (f"{k} {installed.get(k)}" for k in names)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    chosen = (f"{k}={os.environ.get(k)}" for k in ("XLA_FLAGS", "OMP_NUM_THREADS"))
    return f"- device: {device}; host: {os.cpu_count()} x {cpu or 'CPU'}; {', '.join([*versions, *chosen])}"


def at_least(least: int, kind: type = int):
    """A type for argparse: a number that is not below this."""

    def parse(text: str):
        if (value := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when a word is no number
    return parse


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    load = os.getloadavg()[0]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, whole = parser.add_argument, at_least(1)
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    sizes = "of the parts beside PyTorch, `products`, `step` and `loader`; `train` is mini also with full"
    add("--size", choices=("tiny", "mini", "full"), default="mini", help=sizes)
    add(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="of the parts beside PyTorch, and `products`",
    )
    add("--rounds", type=whole, default=5, metavar="N", help="rounds that count")
    add("--model", help="model folder of `say` and `programs`; the built-in one if absent")
    add("--seconds", type=at_least(0, float), default=10, help="of reading, for each row of `loader`")
    add(
        "--record-seconds",
        type=at_least(0.4, float),
        default=4,
        help="of speech in a record of `loader`, the mean",
    )
    add("--stages", nargs="+", choices=LOADER_STAGES, help="of `loader` and `step`; all if absent")
    add("--rows", type=whole, metavar="N", help="of `step`: rows of a batch")
    add("--set", nargs="+", default=(), metavar="A.B=VALUE", help="of the configs of `step`")
    add("--workers", nargs="+", type=at_least(0), help="of `loader`: processes; 0 and the cores if absent")
    add("--compile", action="store_true", help="torch.compile on the CPU too")
    add("--out", help="also write the report here, part by part")
    args = parser.parse_args(argv)
    for part in ("step", "loader"):
        if part in args.only and not chosen_stages(part, args):
            parser.error(f"{part} at size {args.size} has no stage {', '.join(args.stages)}; see --only")
    os.environ["DEEPASMR_CACHE"] = "off"
    bench = Bench(args)
    sharding.ensure_mesh()
    busy = load > 0.25 * (os.cpu_count() or 1)
    title = f"# Speed, {time.strftime('%Y-%m-%d %H:%M')}, size {args.size}, {args.rounds} rounds"
    warning = " (**the machine was busy: do not quote these numbers**)" if busy else ""
    bench.add(title, "", machine(), f"- load average before: {load:.2f}{warning}")
    if "say" in args.only:
        measure_say(bench)
    if "programs" in args.only:
        measure_programs(bench)
    measures = dict(lm=measure_lm, hifigan=measure_vocoder, vocoder=measure_vocoder)
    # last: they put an empty torchaudio here
    measures |= dict(speech_tokenizer=measure_s3, flow=measure_flow)
    chosen = [p for p in measures if p in args.only]
    if chosen or "step" in args.only:
        bench.find_torch()
    if chosen:
        rows = [row for p in chosen for row in measures[p](bench, model_config(p, args.size))]
        bench.table("Beside PyTorch", "work | side | median s | range | best PyTorch / this | range", rows)
        beside_ceilings(bench, chosen, rows)
    if "products" in args.only:
        measure_products(bench)
    if "train" in args.only:
        measure_train(bench)
    if "step" in args.only:
        measure_step(bench)
    if "loader" in args.only:
        measure_loader(bench)
    bench.add(f"- load average after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
