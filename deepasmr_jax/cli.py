"""The `deepasmr` command: parses, checks, calls one function, prints.

Bad input is one sentence on stderr that names the value and the way out, exit code 2, and no file is left
behind. What can be checked without a model is checked before anything heavy is imported.
"""

import argparse
import contextlib
import errno
import gc
import json
import os
import sys
from pathlib import Path

from deepasmr_jax import files, request
from deepasmr_jax import text as text_lib

_EXAMPLES = """examples:
  deepasmr say "Close your eyes, and listen to the rain." --voice clip.wav --style asmr --out out.wav --plot
  deepasmr say "把眼睛闭上。" --voice clip.wav --style asmr --out out_zh.wav
  deepasmr demo --out demo
"""
NOTICE = (
    "This is a small demonstration: the built-in model was trained with this project's code on synthetic speech only, "
    "in runs that were stopped and started by hand. It sounds like the synthesisers it learned from, and misreads "
    "more in Mandarin than in English. It does not show the quality of a model of full size trained on people."
)
ROAD = (
    "The same code holds the networks of full size as presets, and recipes for them in configs/ (lm_asmr.py, "
    "flow_asmr.py and others); nobody has trained them here. `deepasmr convert cosyvoice2 CosyVoice2-0.5B --out "
    "models/cv2` makes a full-size model of the public weights, not tuned to ASMR; tested on files of random values "
    "with their names and shapes. More in README.md of deepasmr_jax, 'The road to full size'."
)


_SEED = "a whole number; another seed gives another reading (default 0)"


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence and exit code 2, without the usage block."""

    def error(self, message: str):
        print(f"deepasmr: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0; 1 if `doctor` found damage, a request of `batch` failed, `data check` would leave a file out or a row of `plan`
    did not fit; 2 for bad input; 130 after Ctrl-C.
    """
    # XLA's remarks about the machine are not for this user
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # tracing makes many objects that stay: looking through them all again and again took 0.3 s of a start
    gc.set_threshold(200_000, 20, 20)
    args = _parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the lines, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError) as e:
        print(f"deepasmr: {_sentence(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # Ctrl-C has ended a program that reads the lines, too
            print("deepasmr: stopped", file=sys.stderr, flush=True)
            sys.stdout.flush()
        if argv is None:  # a program: a thread may still be compiling, which Python's end crashes into
            os._exit(130)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deepasmr",
        description="Speech in anyone's voice, normal or whispered, from a text and seconds of that voice.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    def add(group, name: str, run, text: str) -> argparse.ArgumentParser:
        p = group.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        return p

    def add_model(p, with_pool: bool = True):
        p.add_argument("--model", help="model folder; without it the built-in model")
        if with_pool:
            p.add_argument("--pool", help="pool file; without it the model's own")

    say = add(commands, "say", _say, "speak a text in the voice of a clip")
    say.add_argument("text", help="what to say, English or Mandarin; - reads it from standard input")
    say.add_argument("--voice", required=True, help="a clip of the voice, 3 to 10 s are best")
    say.add_argument("--out", required=True, help="the wav file to write")
    say.add_argument("--style", default="asmr", help="asmr (whispered, default) or normal")
    say.add_argument(
        "--voice-text", help="what is said in the clip; used if the clip already is in that style"
    )
    say.add_argument("--voice-style", help="style of the clip, asmr or normal; detected without it")
    say.add_argument("--language", help="en or zh; detected without it")
    say.add_argument("--seed", default="0", help=_SEED)
    say.add_argument(
        "--refine",
        default="1",
        help="passes, 1 to 3 (default 1): in the paper stronger ASMR and less likeness, with the built-in model "
        "less likeness only",
    )
    say.add_argument(
        "--pool-strategy",
        default="nearest",
        help="what gives style and rhythm: nearest (default), the pool entry whose voice is nearest (within a style "
        "the clip, if --voice-text is given); static, the first entry; real, the nearest that is a recording of a "
        "person (the built-in pool has none and refuses it); self, the clip; a pool entry's name; none, nothing but "
        "the text, so that the style is left to chance",
    )
    say.add_argument("--plot", action="store_true", help="also write a spectrogram, OUT with .png")
    say.add_argument("--show-text", action="store_true", help="print the text as it is read, and its symbols")
    say.add_argument("--json", action="store_true", help="print facts and timings as one line of JSON")
    add_model(say)

    demo = add(commands, "demo", _demo, "all four tasks in both languages, with a page to listen to")
    demo.add_argument("--out", required=True, help="folder for wavs, pictures and index.html")
    demo.add_argument("--seed", default="0", help=_SEED)
    demo.add_argument(
        "--no-judge", action="store_true", help="leave out the unvoiced ratio and the error rate"
    )
    add_model(demo)

    batch = add(
        commands, "batch", _batch, "speak a list of requests into a folder; exit code 1 if one failed"
    )
    batch.add_argument(
        "list",
        help="JSON lines with text and voice (a path from the folder where this is called), and any other option of "
        "`say` by its name",
    )
    batch.add_argument("--out", required=True, help="folder for the wavs and results.jsonl")
    add_model(batch)

    measure = add(commands, "evaluate", _evaluate, "measure a folder that `batch` wrote")
    measure.add_argument(
        "folder", help="the folder, with results.jsonl and wavs; evaluation.json is written there"
    )
    measure.add_argument(
        "--speaker",
        metavar="JUDGE",
        help="folder with a converted wavlm_large_finetune.pth: also the speaker similarity (SIM) to the voice clips",
    )
    measure.add_argument(
        "--mandarin",
        metavar="JUDGE",
        help="folder with the component recognizer (docs/evaluation.md): also symbol errors of Mandarin",
    )
    measure.add_argument("--workers", type=int, default=1, help="processes for the unvoiced ratio")

    group = commands.add_parser("pool", help="the speaker pool: build, list, add")
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    build = add(actions, "build", _pool_build, "make a pool from recordings with transcripts")
    build.add_argument(
        "source",
        nargs="?",
        help="folder of x.wav + x.txt, or JSON lines with audio, text, style, language",
    )
    build.add_argument(
        "--normal", help="the same, for ordinary speech beside --asmr: 50 recordings in the paper"
    )
    build.add_argument("--out", help="the pool file to write; without it the pool of MODEL")
    build.add_argument(
        "--asmr-sample",
        "--asmr",
        action="append",
        default=[],
        help="ASMR recording with its .txt beside it: the ASMR half is synthesised from it; one per language",
    )
    build.add_argument(
        "--asmr-text", action="append", default=[], help="what is said in it, in place of the .txt; one each"
    )
    build.add_argument("--seed", default="0", help=_SEED)
    adding = add(actions, "add", _pool_add, "add recordings to a pool file")
    adding.add_argument("source", help="as for build")
    adding.add_argument("--to", required=True, help="the pool file")
    for p in (build, adding):
        p.add_argument("--style", help="style of a folder's recordings: normal or asmr")
        p.add_argument("--language", help="language of a folder's recordings: en or zh; detected without it")
        p.add_argument(
            "--licence", default="", help="of the recordings and the ASMR sample, where a JSON line has none"
        )
        add_model(p, with_pool=False)
    listing = add(actions, "list", _pool_list, "list the entries of a pool")
    add_model(listing)
    listing.add_argument("--json", action="store_true", help="one JSON object per line")

    info = add(commands, "info", _info, "what a model folder holds, what it needs and what it was made from")
    info.add_argument("folder", nargs="?", help="model folder; without it the built-in model")
    add_model(info, with_pool=False)

    doctor = add(commands, "doctor", _doctor, "which weight files of a folder are whole, damaged or missing")
    doctor.add_argument("folder", help="folder of public weights, or a model folder")

    group = commands.add_parser("data", help="a corpus: check")
    actions = group.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    check = add(
        actions, "check", _data_check, "what is wrong with the files of a corpus; exit code 1 if one is unfit"
    )
    check.add_argument("folder", help="records, a folder with *.jsonl manifests, or audio with texts beside")
    check.add_argument("--out", help="the report, a JSON line per problem (default DIR/data_check.jsonl)")
    check.add_argument(
        "--rate", type=int, default=0, help="Hz that every file must have (default: any from 16000)"
    )
    check.add_argument("--max-seconds", type=float, help="longest file (default 30)")
    check.add_argument(
        "--keep", action="append", default=[], help="a kind of problem that makes no file unfit"
    )

    convert = add(commands, "convert", _convert, "public weights to a model folder")
    convert.add_argument(
        "kind", help="cosyvoice2: the folder CosyVoice2-0.5B; file: one weight file into MODEL"
    )
    convert.add_argument("source", help="the folder or the file")
    convert.add_argument("--out", required=True, help="the model folder; for `file` it may exist")
    convert.add_argument(
        "--dtype", default="float32", help="of the weight files: float32, float16 or bfloat16"
    )
    convert.add_argument(
        "--mel-profile", help="of a flow that starts from E2 TTS: f5 (its own), cv2 or hifigan"
    )
    for part in ("speaker", "vocoder"):
        convert.add_argument(f"--{part}", help=f"another {part} file in place of the folder's")

    plan = add(
        commands, "plan", _plan, "bounds of a training step or of sampling on TPU chips that are not there"
    )
    plan.add_argument("config", nargs="+", help="configs/NAME.py of a language model or flow decoder")
    plan.add_argument(
        "--on", default="local", help="targets, such as v5e-8,v5p-64,v6e-256 (chips), or local (default)"
    )
    plan.add_argument(
        "--rows", help="rows of the batch on each chip, such as 4,8; without it the config's batch"
    )
    plan.add_argument(
        "--sample", action="store_true", help="plan sampling with the config's model instead of training"
    )
    plan.add_argument(
        "--accumulation", type=int, default=1, metavar="N",
        help="parts of a batch; the config's is not looked at (default 1)",
    )  # fmt: skip
    plan.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change one field")
    plan.add_argument(
        "--out", help="folder for rows.jsonl, plan.md and plan.svg; a killed plan goes on there"
    )

    export = add(commands, "export", _export, "a model's language model under Hugging Face's names of Qwen2")
    add_model(export, with_pool=False)
    export.add_argument("--out", required=True, help="a new folder for model.safetensors and config.json")
    return parser


def _say(args) -> None:
    text = sys.stdin.read() if args.text == "-" else args.text
    asked = request.Request(
        text=text,
        voice=args.voice,
        style=args.style,
        voice_text=args.voice_text,
        voice_style=args.voice_style,
        language=args.language,
        seed=args.seed,
        refine=args.refine,
        pool_strategy=args.pool_strategy,
    )
    out = request.check_output(args.out)
    picture = request.check_output(out.with_suffix(".png"), (".png",)) if args.plot else None
    if out.resolve() == Path(args.voice).resolve():
        raise ValueError(f"the output {out} is the voice clip itself; choose another name")
    _check_model(args)
    from deepasmr_jax import results, synthesis

    synthesizer = synthesis.load(args.model, args.pool)
    if args.show_text:
        for line in synthesizer.reading(asked):
            print(line)
    result = synthesizer.batch([asked])[0]
    if isinstance(result, results.Failure):
        raise ValueError(result.error)
    result.save(out)
    if picture:
        with files.atomic_path(picture) as part:
            part.write_bytes(result.picture())
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(result.facts() | {"out": str(out)}, ensure_ascii=False))
    else:
        seconds = sum(result.timings.values())
        print(f"{out}: {result.duration_s:.1f} s of speech, {result.task}, made in {seconds:.1f} s")


def _demo(args) -> None:
    folder = request.check_output_folder(args.out)
    seed = request.check_seed(args.seed)
    _check_model(args)
    from deepasmr_jax import audio, demo, evaluate, page, synthesis

    synthesizer = synthesis.load(args.model, args.pool)
    if _is_built_in(synthesizer.folder):
        notice, intro, road = NOTICE, _VOICE_INTRO, ROAD
    else:
        notice, intro, road = _made_from(synthesizer.config), "", ""
    sounds = demo.make(synthesizer, seed, _progress)
    judge = None if args.no_judge else evaluate.judge_one
    if judge:
        _progress("measuring")
    sections, lines = {}, []
    for s in sounds:
        cells = _measures(s, judge, synthesizer.sample_rate)
        row = page.Row(s.label, s.caption, s.text, s.wav, synthesizer.sample_rate, cells, s.notes)
        sections.setdefault(s.voice, ([], []))[0 if s.is_clip else 1].append(row)
        audio.save(folder / f"{s.name}.wav", s.wav, synthesizer.sample_rate)
        with files.atomic_path(folder / f"{s.name}.png") as part:
            part.write_bytes(page.picture(s.wav, synthesizer.sample_rate))
        noted = {"note": "; ".join(s.notes)} if s.notes else {}
        lines.append({"file": f"{s.name}.wav", "sound": s.label, "text": s.text} | cells | noted)
    parts = [page.Section(voice, intro, clips, made) for voice, (clips, made) in sections.items()]
    settings = f"Unvoiced: {evaluate.PitchSettings().describe()}. {_SETTINGS}"
    document = page.demo("DeepASMR in JAX: a demonstration", notice, parts, settings, road)
    files.write_text(folder / "index.html", document)
    print(_table(lines))
    if judge:
        print(f"\n{_SETTINGS}")
    print("", " ".join([notice] + [_ROAD_IN_README] * bool(road)), sep="\n")
    print(f"\nListen: {(folder / 'index.html').resolve()}")


def _batch(args) -> int:
    source = Path(args.list)
    if not source.is_file():
        raise ValueError(f"there is no list {source}; give a file of JSON lines")
    rows = [row for _, row in request.read_json_lines(source)]
    folder = request.check_output_folder(args.out)
    _check_model(args)
    from deepasmr_jax import batch, evaluate, synthesis

    made, failed, before = batch.to_folder(synthesis.load(args.model, args.pool), rows, folder, _progress)
    print(
        f"{folder}: {made} made"
        + (f", {failed} failed: see {folder / evaluate.FAILURES}" if failed else "")
        + (f", {before} were finished before" if before else "")
    )
    if failed:
        _, first = request.read_json_lines(folder / evaluate.FAILURES)[0]
        print(f"the first failure, of row {first['row']} counted from 0: {first['error']}", file=sys.stderr)
    return 1 if failed else 0


def _evaluate(args) -> None:
    if not Path(args.folder).is_dir():
        raise ValueError(
            f"there is no folder {args.folder}, and so no results.jsonl; give one that the batch command wrote"
        )
    from deepasmr_jax import evaluate, judges

    similarity = judges.SimilarityJudge(args.speaker) if args.speaker else None
    mandarin = judges.MandarinJudge(args.mandarin) if args.mandarin else None
    try:
        matrix = judges.MatrixJudge()
    except ValueError as e:
        print(f"note: no English error rate: {_sentence(e)}", file=sys.stderr)
        matrix = None
    report = evaluate.evaluate_folder(
        args.folder, matrix=matrix, mandarin=mandarin, similarity=similarity, workers=args.workers
    )
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if matrix is not None and not any("matrix_wer" in group for group in report["groups"].values()):
        print(
            "note: no English error rate, as no text is a matrix sentence (docs/evaluation.md)",
            file=sys.stderr,
        )
    if report["failed"]:
        one = report["failed"] == 1
        were = "request of the folder failed and is" if one else "requests of the folder failed and are"
        print(
            f"note: {report['failed']} {were} not counted: see {evaluate.FAILURES}",
            file=sys.stderr,
        )


def _pool_build(args) -> None:
    if args.out is None:
        args.out = _check_model(args) / request.POOL_FILE
    out = _pool_output(args.out)
    seed = request.check_seed(args.seed)
    _check_model(args)
    if (args.source is None) == (args.normal is None):
        raise ValueError("give the recordings once: SOURCE, or --normal FOLDER beside --asmr SAMPLE")
    args.source = args.source or args.normal
    if args.asmr_text and len(args.asmr_text) != len(args.asmr_sample):
        raise ValueError(
            f"{len(args.asmr_text)} --asmr-text for {len(args.asmr_sample)} --asmr; give one for each, in order"
        )
    recordings = _recordings(args)
    from deepasmr_jax import pool, pool_building, synthesis

    for i, name in enumerate(args.asmr_sample):
        sample = request.check_clip_file(name)
        transcript = sample.with_suffix(".txt")
        if args.asmr_text:
            text = args.asmr_text[i]
        elif transcript.is_file():
            text = request.read_text(transcript).strip()
        else:
            raise ValueError(
                f"{sample} has no transcript; give it with --asmr-text, or write it into {transcript.name} beside it"
            )
        language = text_lib.detect_language(text)
        recordings.append(pool.Recording(sample.stem, sample, text, "asmr", language, licence=args.licence))
    synthesizer = synthesis.load(args.model, with_pool=False)
    made = pool_building.build(
        synthesizer,
        recordings,
        synthesize_asmr=bool(args.asmr_sample),
        seed=seed,
        progress=_progress,
    )
    if out.is_file():
        with contextlib.suppress(ValueError):  # a pool of another model, or none at all
            print(f"note: {out} is replaced; it had {len(pool.load(out))} entries", file=sys.stderr)
    for style in request.STYLES:
        if not made.select(style):
            print(
                f"note: the pool has no {style} entry: with it {style} speech needs a clip that is {style} itself",
                file=sys.stderr,
            )
    _save_pool(synthesizer, made, out)
    print(f"{out}: {len(made.select('normal'))} normal and {len(made.select('asmr'))} ASMR entries")


def _pool_add(args) -> None:
    target = _pool_output(args.to)
    recordings = _recordings(args)
    _check_model(args)
    from deepasmr_jax import pool_building, synthesis

    synthesizer = synthesis.load(args.model, target)  # refuses a pool that another model made
    new = synthesizer.pool.add(*(pool_building.hear(synthesizer, r) for r in recordings))
    _save_pool(synthesizer, new, target)
    print(f"{target}: {len(recordings)} added, {len(new)} entries in all")


def _pool_output(path) -> Path:
    """The pool file to write; ValueError if it cannot be written or is the built-in model's."""
    if _is_built_in(Path(path).parent):
        raise ValueError(
            f"{path}, the built-in model's pool, is part of the package; name another file (--out, or --to)"
        )
    return request.check_output(path, (".safetensors",))


def _save_pool(synthesizer, made, path: Path) -> None:
    """Writes a pool file; where it is the model's own, config.json learns of it."""
    from deepasmr_jax import pool_building

    if path.resolve() == (synthesizer.folder / request.POOL_FILE).resolve():
        pool_building.keep(synthesizer.folder, made)
    else:
        made.save(path)


def _pool_list(args) -> None:
    from deepasmr_jax import pool

    path = Path(args.pool) if args.pool else _check_model(args) / request.POOL_FILE
    rows = pool.describe(pool.load(path))
    print("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) if args.json else _table(rows))


def _doctor(args) -> int:
    from deepasmr_jax import doctor

    rows = doctor.examine(args.folder)
    print(_table([{k: x for k, x in row.items() if k != "all"} for row in rows]))
    for row in rows:
        if "all" in row:
            print(f"\n{row['file']}: {row['all']}")
    return 0 if all(row["state"] in ("whole", "unknown") for row in rows) else 1


def _data_check(args) -> int:
    folder = Path(args.folder)
    from deepasmr_jax import data_check

    out = Path(args.out) if args.out else (folder if folder.is_dir() else folder.parent) / data_check.REPORT
    max_seconds = data_check.MAX_SECONDS if args.max_seconds is None else args.max_seconds
    rules = data_check.Rules(args.rate, max_seconds, tuple(args.keep), needs_labels=False)
    items = data_check.find(folder)
    request.check_output(out, (".jsonl",))
    counts = data_check.check(items, out, rules, _progress)
    if rows := [
        {"problem": k, "files": counts[k], "it is": v} for k, v in data_check.KINDS.items() if k in counts
    ]:
        print(_table(rows))
    print(
        f"{counts['files']} files, {counts['left_out']} unfit, {counts['hours']:.2f} h in the others: see {out}"
    )
    return 1 if counts["left_out"] else 0


def _convert(args) -> None:
    from deepasmr_jax import convert

    request.check_choice(args.kind, ("cosyvoice2", "file"), "kind of conversion")
    request.check_output_folder(args.out)
    if args.kind == "file":
        made = convert.convert_file(args.source, args.out, args.dtype, args.mel_profile)
        print(f"{args.out}: {made}")
        return
    parts = {name: getattr(args, name) for name in ("speaker", "vocoder") if getattr(args, name)}
    folder = convert.convert_cosyvoice2(args.source, args.out, args.dtype, parts, _progress)
    print(f"{folder}: ready; try  deepasmr say TEXT --voice CLIP --model {folder} --out out.wav")


def _plan(args) -> int:
    rows = args.rows.split(",") if args.rows else [None]
    if not all(n is None or (n.isdigit() and int(n) > 0) for n in rows):
        raise ValueError(
            f"--rows {args.rows!r} is no list of whole numbers above 0; write for example --rows 4,8"
        )
    if args.out:
        request.check_output_folder(args.out)
    targets = args.on.split(",")
    if "local" not in targets:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU is not there
    from deepasmr_jax import plan

    rows = [None if n is None else int(n) for n in rows]
    made = plan.sweep(
        args.config, targets, rows, args.sample, args.set, args.out, accumulation=args.accumulation
    )
    print("Bounds from a compiler, not measurements.")
    return 1 if any("error" in row for row in made) else 0


def _export(args) -> None:
    folder = _check_model(args)
    out = request.check_output_folder(args.out)
    from deepasmr_jax import convert

    print(
        f"{convert.export_qwen2(folder, out)}: model.safetensors, speech.safetensors, config.json, provenance.json"
    )


def _info(args) -> None:
    if args.folder:
        if args.model:
            raise ValueError(f"two models are given, {args.folder} and {args.model}; leave one of them out")
        args.model = args.folder
    folder = _check_model(args)
    from deepasmr_jax import checkpoint

    config = checkpoint.read_config(folder)
    rows = [
        {
            "component": name,
            "module": c["module"],
            "parameters": f"{c['num_params']:,}",
            "dtype": c["dtype"],
            "MiB": _mebibytes([folder / file for file, _ in checkpoint.files_of(c)]),
        }
        for name, c in config["components"].items()
    ]
    sound = ""
    if {"flow", "vocoder"} & set(config["components"]):
        rate, profile = (config.get(key, "?") for key in ("sample_rate", "mel_profile"))
        sound = f": {rate} Hz, mel profile {profile}"
    print(f"{config.get('name', '?')} in {folder}{sound}")
    print(_table(rows))
    total = sum(c["num_params"] for c in config["components"].values())
    gib = 4 * total / 2**30
    print(f"memory: {gib:.2f} GiB for the weights in float32; a process takes about twice that and 0.5 GiB")
    if "lm" in config["components"]:
        print(f"languages: {', '.join(config.get('languages', text_lib.LANGUAGES))}")
    if "licence" in config:
        of = ", ".join(n for n, x in checkpoint.licences(config).items() if x == config["licence"])
        print(f"licence: {config['licence']} (the strictest of its parts{': ' + of if of else ''})")
    for name, value in config.get("provenance", {}).items():
        print(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def _mebibytes(paths: list[Path]) -> str:
    if not all(path.is_file() for path in paths):
        return "missing"
    return f"{sum(path.stat().st_size for path in paths) / 2**20:.1f}"


_ROAD_IN_README = "The road to full size: README.md, section of that name."
_VOICE_INTRO = (
    "Training had neither this form of the voice nor just these sentences, but some that are very like them: see "
    "docs/demo.md of deepasmr_jax."
)
_SETTINGS = (
    "Errors: word error rate of a recogniser that knows only the grammar of the English matrix sentences "
    "(pocketsphinx), where it is installed. Similarity: cosine to the clip by the model's own speaker encoder, "
    "which is not an independent one. The last columns are seconds of work for the clip, the tokens, the mel "
    "and the waveform, without compilation."
)


def _made_from(config: dict) -> str:
    """What the provenance of a model says about its training data."""
    provenance = config.get("provenance", {})
    notes = [provenance.get("data"), *(x.get("data") for x in provenance.values() if isinstance(x, dict))]
    told = "; ".join(dict.fromkeys(str(x) for x in notes if x)) or "not stated in its config.json"
    return f"The model {config.get('name', '?')}; its training data: {told}."


def _measures(sound, judge, sample_rate: int) -> dict[str, str]:
    """Printable measures of one sound of the demo."""
    cells = {"seconds of audio": f"{len(sound.wav) / sample_rate:.1f}"}
    if judge is not None:
        unvoiced, error = judge(sound.wav, sample_rate, sound.text, sound.language)
        cells["unvoiced %"] = f"{100 * unvoiced:.0f}"
        cells["errors %"] = "–" if error is None else f"{100 * error:.0f}"
    if sound.similarity is not None:
        cells["similarity"] = f"{sound.similarity:.2f}"
    for stage in ("clip_s", "lm_s", "flow_s", "vocoder_s"):
        if stage in sound.timings:
            cells[stage.replace("_s", " s")] = f"{sound.timings[stage]:.2f}"
    return cells


def _is_built_in(folder: Path) -> bool:
    return folder.resolve() == request.BUILT_IN.resolve()


def _recordings(args) -> list:
    for value, known, what in (
        (args.style, request.STYLES, "style"),
        (args.language, text_lib.LANGUAGES, "language"),
    ):
        if value is not None:
            request.check_choice(value, known, what)
    from deepasmr_jax import pool

    style = args.style or ("normal" if getattr(args, "asmr_sample", 0) else None)
    return pool.read_recordings(args.source, style, args.language, args.licence)


def _check_model(args) -> Path:
    """The model folder, found without importing anything heavy."""
    folder = request.check_model(args.model)
    if getattr(args, "pool", None) and not Path(args.pool).is_file():
        raise ValueError(f"there is no pool file {args.pool}; check the path or leave --pool out")
    return folder


def _progress(sentence: str) -> None:
    print(f"{sentence} ...", file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    """The message of an error on one line."""
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"the memory of this machine is too small{detail}; close other programs or use a larger one"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the output'}: {error.strerror}; make room or choose another disk"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or type(error).__name__}; check the path and your rights"
    return " ".join(str(error).split())


def _table(rows: list[dict]) -> str:
    """Rows of equal keys as aligned columns; a missing value is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(n, "–")) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


if __name__ == "__main__":
    sys.exit(main())
