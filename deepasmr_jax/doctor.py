"""What every weight file of a folder is, and whether it is whole: of public weights, or of a model folder of ours."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from deepasmr_jax import checkpoint, pool, public_files, request, weight_files
from deepasmr_jax import text as text_lib

SHOWN = 6  # names of each kind of fault in a row
_COPY = "copy the whole model folder"
_BESIDE = {  # endings of what lies beside weights
    ".md", ".txt", ".yaml", ".yml", ".json", ".html", ".py", ".ipynb", ".csv", ".pdf",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".wav", ".mp3", ".flac",
}  # fmt: skip


def examine(folder: str | os.PathLike) -> list[dict]:
    """What every weight file of a folder is, and whether it is whole; nothing is converted.

    Args:
        folder: of public weights, or a model folder of ours.

    Returns:
        One row a file: "file", "state" ("whole", "damaged", "missing", or "unknown": no part of a model that is known
        here), "is" and "detail"; and "all" where the detail does not name all tensors that are missing, unexpected or
        reshaped. Hidden files, texts and pictures have none.

    Raises:
        ValueError: if there is no such folder or it is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder with the weight files")
    rows = []
    if (folder / "config.json").is_file():
        values = public_files.json_object(folder / "config.json")
        if {"components", "format"} & set(values):  # the file of Hugging Face has neither
            return list(_examine_ours(folder))
        if not values:
            rows.append(
                {
                    "file": "config.json",
                    "state": "damaged",
                    "is": "",
                    "detail": "no JSON; copy the folder again",
                }
            )
    files = sorted(p for p in folder.iterdir() if p.is_file())
    known = {name: (size, sha, k) for k in public_files.KINDS for name, size, sha in k.released}
    for path in files:
        if path.name.startswith(".") or path.suffix.lower() in _BESIDE:
            continue
        rows.append(_examine_file(path, known.get(path.name)))
    parts = [r["is"] for r in rows if r["state"] == "whole"]
    if any("CosyVoice2" in x for x in parts) or any(p.name in public_files.COSYVOICE2 for p in files):
        for name in public_files.COSYVOICE2:
            if not (folder / name).is_file():
                kind = known[name][2].name
                rows.append(
                    {"file": name, "state": "missing", "is": kind, "detail": "fetch the whole folder"}
                )
        rows.append(_examine_text(folder, "CosyVoice-BlankEN", "fetch the whole folder"))
    if not any(row["file"] != "config.json" for row in rows):
        raise ValueError(f"{folder} holds no weight files; give the folder that was downloaded")
    return rows


def _examine_file(path: Path, released: tuple | None) -> dict:
    row = {"file": path.name, "state": "damaged", "is": released[2].name if released else "", "detail": ""}
    size = path.stat().st_size
    try:
        found = public_files.recognise(path)
        problems, every = found.problems(SHOWN), found.problems()
    except ValueError as e:
        short = (
            f"; {size:,} bytes, the released file has {released[0]:,}"
            if released and size != released[0]
            else ""
        )
        is_other = isinstance(e, public_files.UnknownModel | weight_files.NotWeights) and not released
        return row | {"state": "unknown" if is_other else "damaged", "detail": f"{e}{short}"}
    row["is"] = found.kind.name
    if released and found.kind is not released[2]:
        return row | {
            "detail": f"the name is that of a {released[2].name}, the content is not; fetch it again"
        }
    if problems:
        return row | {"detail": problems} | ({"all": every} if every != problems else {})
    values = sum(int(np.prod(x.shape)) for x in found.tensors.values())
    row |= {"state": "whole", "detail": f"{len(found.tensors)} tensors, {values:,} values"}
    if released and released[1] and size == released[0] and weight_files.sha256(path) != released[1]:
        return row | {"state": "damaged", "detail": "the size is right, the sha256 is not; fetch it again"}
    if released and size != released[0]:
        row["detail"] += f"; another size than the released file ({size:,} bytes, {released[0]:,})"
    return row


def _examine_text(folder: Path, name: str, fetch: str, sha256: Mapping[str, str] | None = None) -> dict:
    """A folder of the text tokenizer: its files where their checksums are known, and whether it can be read."""
    row = {"file": f"{name}/", "is": "text tokenizer", "state": "missing", "detail": fetch}
    if (folder / name).is_dir():
        files = [(n, _examine_own(folder / name / n, "", sha)) for n, sha in (sha256 or {}).items()]
        if bad := [(n, r) for n, r in files if r["state"] != "whole"]:
            return row | {"state": "damaged", "detail": "; ".join(f"{n}: {r['detail']}" for n, r in bad)}
        try:
            text_lib.QwenTokenizer(folder / name)
        except ValueError as e:
            return row | {"state": "damaged", "detail": str(e)}
        row |= {"state": "whole", "detail": f"{text_lib.QWEN_VOCABULARY:,} ids"}
    return row


def _examine_ours(folder: Path) -> Iterator[dict]:
    values = checkpoint.read_config(folder)
    for name, entry in values["components"].items():
        for file, sha in checkpoint.files_of(entry):
            yield _examine_own(folder / file, f"{name} ({entry['module']})", sha)
    settings = values.get("text", {})
    if settings.get("tokenizer") == "qwen":
        yield _examine_text(folder, settings.get("folder", "."), _COPY, settings.get("sha256"))
    if "pool" in values.get("provenance", {}) or (folder / request.POOL_FILE).exists():
        yield _examine_pool(folder, values)


def _examine_own(path: Path, what: str, sha256: str) -> dict:
    """A file of a model folder, by its checksum."""
    row = {"file": path.name, "is": what, "state": "missing", "detail": _COPY}
    if not path.is_file():
        return row
    try:
        weight_files.check_size(path)
        same = weight_files.sha256(path) == sha256
        why = "" if same else "its sha256 is not that of config.json; copy it again"
    except ValueError as e:
        why = str(e)
    return row | {"state": "damaged" if why else "whole", "detail": why}


def _examine_pool(folder: Path, values: dict) -> dict:
    """The pool of a model folder: whole by its own checksum, and made by such a model."""
    path = folder / request.POOL_FILE
    row = {"file": path.name, "is": "speaker pool", "state": "missing", "detail": _COPY}
    if not path.is_file():
        return row
    try:
        weight_files.check_size(path)
        found = pool.load(path)
        if "speaker" in values["components"]:
            size = checkpoint.component_config(folder, "speaker").embedding_size
            found.check_fits(values.get("mel_profile", found.mel_profile), size)
    except ValueError as e:
        return row | {"state": "damaged", "detail": str(e)}
    return row | {"state": "whole", "detail": f"{len(found)} entries"}
