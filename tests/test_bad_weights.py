"""Bad weight files, model folders and outputs through the `deepasmr` command: one sentence, and nothing is left."""

import functools
import json
import os
import shutil
from pathlib import Path

import cosyvoice2_folder
import jax
import numpy as np
import pytest
import tiny_model
import weight_writers
from bad_files import fill_the_disk, good, resnet, run

from deepasmr_jax import convert, request, weight_tensors

CLIP = request.BUILT_IN / "demo" / "en_normal.wav"
CAMPPLUS = cosyvoice2_folder.SMALL["campplus.onnx"]
HUGE = 300 * 10**9  # bytes: more than the memory of `a_machine`, without a place on the disk (a sparse file)


@pytest.fixture(autouse=True)
def a_machine(monkeypatch):
    monkeypatch.setattr(weight_tensors, "memory_bytes", lambda: 64e9)


def files(folder: Path) -> dict[Path, int]:
    """Everything in a folder, with sizes."""
    return {p: p.stat().st_size for p in folder.rglob("*")}


def refused(code: int, capsys, words) -> None:
    """Exit code 2, and as the last line of stderr one sentence with these words."""
    out, err = capsys.readouterr()
    *steps, last = err.strip().splitlines()
    assert code == 2 and out == "", (code, out, err)
    assert last.startswith("deepasmr: ") and "Traceback" not in err and "KeyError" not in err, err
    assert all(line.endswith(" ...") for line in steps), err  # what was being done
    for word in words:
        assert word in last, last


# ---------------------------------------------------------------- files


def cut(path: Path) -> None:
    good(path.parent).rename(path)
    os.truncate(path, path.stat().st_size - 400)


def cut_in_the_data(path: Path) -> None:
    """The list of members is whole, a member is not."""
    good(path.parent).rename(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def safetensors(path: Path, header: dict | bytes, size: int) -> None:
    """A file with this header whose data are zeros that take no disk."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


def entries(changes: dict[str, tuple]) -> tuple[dict, int]:
    """Header and bytes of data of the small ResNet with some tensors in other shapes."""
    shapes = {k: x.shape for k, x in resnet().items()} | changes
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header, position


def claims_more(path: Path) -> None:
    header, size = entries({})
    safetensors(path, header, size - 1000)


def huge_tensor(path: Path) -> None:
    safetensors(path, *entries({"seg_1.weight": (HUGE // 4 // 1000, 1000)}))


def absurd_header(path: Path) -> None:
    path.write_bytes((2**50).to_bytes(8, "little") + b'{"a": 1}')


def campplus(path: Path, external: str | None) -> None:
    tensors = cosyvoice2_folder.state("campplus.onnx", CAMPPLUS)
    weight_writers.write_onnx(path, *cosyvoice2_folder.campplus_graph(tensors, CAMPPLUS), external=external)


def no_layer(path: Path) -> None:
    tensors = cosyvoice2_folder.state("campplus.onnx", CAMPPLUS)
    initializers, nodes = cosyvoice2_folder.campplus_graph(tensors, CAMPPLUS)
    weight_writers.write_onnx(path, initializers, nodes[:-1])


def no_external(path: Path) -> None:
    campplus(path, "campplus.data")
    (path.parent / "campplus.data").unlink()


def huge_external(path: Path, offset: int = 0) -> None:
    """A graph with one tensor of 300 GB in a file beside it."""
    place = {"location": "weights", "offset": offset, "length": HUGE}
    tensor = weight_writers.onnx_tensor("w", np.zeros((2, 2), np.float32), "external", place)
    rows = weight_writers.varint(HUGE // 4 // 1000) + weight_writers.varint(1000)
    tensor = tensor.replace(weight_writers.field(1, b"\x02\x02"), weight_writers.field(1, rows), 1)
    weight_writers.write_model(path, weight_writers.field(5, tensor))
    (path.parent / "weights").touch()
    os.truncate(path.parent / "weights", HUGE + offset)


def huge_zip(path: Path) -> None:
    """A whole archive, and zeros without end before it: the list of members is at the end of a file."""
    good(path.parent).rename(path)
    os.truncate(path, HUGE)


def far_layer(path: Path) -> None:
    weight_writers.write_torch_zip(
        path, resnet() | {"layer4.99999999999999999.conv1.weight": np.zeros(1, np.float32)}
    )


def no_axes(path: Path) -> None:
    weight_writers.write_torch_zip(path, resnet() | {"conv1.weight": np.zeros((), np.float32)})


def no_channels(path: Path) -> None:
    weight_writers.write_torch_zip(path, resnet() | {"conv1.weight": np.zeros((0, 1, 3, 3), np.float32)})


def untied(path: Path) -> None:
    """A language model whose text head is no copy of its table."""
    names = {"llm_embedding.weight", "llm_decoder.weight", "speech_embedding.weight"}
    names |= {"llm.model.lm_head.weight", "llm.model.model.embed_tokens.weight"}
    weight_writers.write_torch_zip(path, {n: np.full((2, 2), i, np.float32) for i, n in enumerate(names)})


def no_markers(path: Path) -> None:
    """Of CosyVoice2, but without its markers: as if it were of CosyVoice3, which has them elsewhere."""
    names = (
        "llm_decoder.weight",
        "llm_decoder.bias",
        "speech_embedding.weight",
        "llm.model.model.norm.weight",
    )
    weight_writers.write_torch_zip(path, {n: np.zeros((6564, 1), np.float32) for n in names})


def torch_zip(tree, **options):
    return lambda path: weight_writers.write_torch_zip(path, tree, **options)


CODE = b"cposix\nsystem\n(Vtouch ran\ntR."
# jax 0.10 makes no network without channels; 0.11 does, and the shapes are compared
EMPTY = "no network has the shapes" if jax.__version_info__ < (0, 11) else "reshaped (seg_1.weight"
FILES = {  # name of the case -> (file, how it is made, words of the sentence, what doctor finds)
    "cut off": ("llm.pt", cut, ["damaged", "again"], "damaged"),
    "a flipped bit": ("llm.pt", cut_in_the_data, ["checksum", "again"], "damaged"),
    "big-endian": ("x.pt", torch_zip({"a": np.ones(3, np.float32)}, byteorder="big"), ["big-endian", "save it again"],
                   "damaged"),
    "big-endian, old": (
        "x.pth", lambda p: weight_writers.write_torch_legacy(p, {"a": np.ones(3, np.float32)}, little_endian=False),
        ["big-endian", "save it again"], "damaged"),
    "code": ("x.pt", torch_zip(CODE), ["'posix.system'", "not run", "state dict"], "damaged"),
    "code, old": ("x.pth", lambda p: weight_writers.write_torch_legacy(p, CODE), ["'posix.system'"], "damaged"),
    "no data beside ONNX": ("campplus.onnx", no_external, ["campplus.data", "missing", "beside it"], "damaged"),
    "two bytes": ("hift.pt", lambda p: p.write_bytes(b"PK"), ["only 2 bytes", "download"], "damaged"),
    "empty": ("hift.pt", lambda p: p.write_bytes(b""), ["only 0 bytes", "download"], "damaged"),
    "a folder": ("hift.pt", lambda p: p.mkdir(), ["is a folder", "name the weight file"], None),
    "more claimed than there": ("x.safetensors", claims_more, ["bytes instead of", "again"], "damaged"),
    "a header of 2**50": ("x.safetensors", absurd_header, ["1,125,899,906,842,624 bytes", "download"], "damaged"),
    "a tensor of 300 GB": ("x.safetensors", huge_tensor, ["279 GiB", "memory"], "damaged"),
    "300 GB beside ONNX": ("x.onnx", huge_external, ["w of 279 GiB", "memory"], "damaged"),
    "300 GB beside ONNX, unaligned": (
        "x.onnx", functools.partial(huge_external, offset=2), ["279 GiB", "memory"], "damaged"),
    "a graph without a layer": ("campplus.onnx", no_layer, ["looks like a CAM++", "fetch it again"], "damaged"),
    "a zip of 300 GB": ("x.pt", huge_zip, ["damaged", "again"], "damaged"),
    "a program": (
        "x.zip", lambda p: weight_writers.write_torch_zip(p, {}, extra=(("constants.pkl", b""),)),
        ["TorchScript", "state dict"], "unknown"),
    "a text": ("x.pt", lambda p: p.write_text("Not found, sorry."), ["is text", "give the weight file"], "unknown"),
    "a text of a released name": (
        "flow.pt", lambda p: p.write_text("Not found, sorry."), ["is text", "give the weight file"], "damaged"),
    "a list": ("x.pt", torch_zip([np.ones(3, np.float32)]), ["no tensors by name", "state dict"], "unknown"),
    "one tensor": ("x.pt", torch_zip(np.ones(3, np.float32)), ["no tensors by name"], "unknown"),
    "numbers for names": ("x.pt", torch_zip({1: np.ones(3, np.float32)}), ["no model that is known"], "unknown"),
    "another model": ("x.pt", torch_zip({"a": np.ones(3, np.float32)}), ["no model that is known"], "unknown"),
    "another graph": ("x.onnx", lambda p: weight_writers.write_onnx(p, {"w": np.ones((2, 2), np.float32)}, []),
                      ["no graph that is known", "another file"], "unknown"),
    "a layer far away": ("x.pt", far_layer, ["layer4.99999999999999999.conv1.weight", "fetch it again"], "damaged"),
    "a scalar for a matrix": ("x.pt", no_axes, ["WeSpeaker", "fetch it again"], "damaged"),
    "no channels": ("x.pt", no_channels, [EMPTY, "fetch it again"], "damaged"),
    "no markers": ("llm.pt", no_markers, ["llm_decoder.bias", "CosyVoice2", "fetch it again"], "damaged"),
    "a head of its own": ("llm.pt", untied, ["llm.pt", "tied"], "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_by_convert_and_found_by_doctor(case, tmp_path, capsys):
    name, make, words, state = FILES[case]
    folder = tmp_path / "public"
    folder.mkdir()
    make(folder / name)
    before = files(tmp_path)
    code = run("convert", "file", folder / name, "--out", tmp_path / "new" / "model")
    refused(code, capsys, [str(folder), *words])
    code = run("convert", "cosyvoice2", folder, "--out", tmp_path / "new" / "model")
    refused(code, capsys, ["missing", "deepasmr doctor"])  # it is not the whole folder anyway
    if state:
        assert run("doctor", folder) == (0 if state == "unknown" else 1)
        out, err = capsys.readouterr()
        row = next(line for line in out.splitlines() if line.startswith(name))
        assert state in row and err == ""
        assert words[0] in row, row
    assert files(tmp_path) == before and not Path("ran").exists()


# ---------------------------------------------------------------- model folders


def edit(changes):
    """config.json with some entries changed or, where None, taken out."""

    def harm(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | changes
        values = {k: v for k, v in values.items() if v is not None}
        (model / "config.json").write_text(json.dumps(values))

    return harm


def replaced(name: str, make):
    def harm(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return harm


FOLDERS = {  # name of the case -> (harm, words, whether info sees it too, exit code of doctor)
    "of public weights": (lambda m: [p.unlink() for p in m.glob("*.json")], ["config.json", "model folder"], True, 0),
    "of Hugging Face": (
        lambda m: (m / "config.json").write_text('{"model_type": "qwen2"}'), ["format None", "deepasmr convert"],
        True, 0),
    "no JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json is damaged", "again"], True, 1),
    "a list for JSON": (lambda m: (m / "config.json").write_text("[]"), ["config.json is damaged"], True, 1),
    "no components": (edit({"components": None}), ["does not list components", "again"], True, 2),
    "odd components": (edit({"components": {"lm": {"file": "lm.safetensors"}}}), ["does not list components"], True, 2),
    "a text as sampling": (edit({"sampling": "fast"}), ["no object as sampling", "again"], True, 2),
    "a fixed noise for our flow": (
        edit({"sampling": {"flow": {"noise": "reference"}}}), ["sampling.flow.noise", "only the flow of CosyVoice2"],
        False, 0),
    "another format": (edit({"format": 9}), ["format 9", "format 1"], True, 2),
    "a tensor of 300 GB": (replaced("lm.safetensors", huge_tensor), ["lm.safetensors", "279 GiB"], False, 1),
    "code": (replaced("lm.safetensors", torch_zip(CODE)), ["lm.safetensors is damaged", "again"], False, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_model_folder_is_refused_by_say_and_info(case, tmp_path, capsys):
    harm, words, is_seen, found = FOLDERS[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_model.shared(), model)
    harm(model)
    before = files(tmp_path)
    said = ("Hi.", "--voice", CLIP, "--model", model, "--out", tmp_path / "new" / "out.wav")
    refused(run("say", *said), capsys, [str(model), *words])
    code = run("info", model)
    if is_seen:
        refused(code, capsys, [str(model), *words])
    assert run("doctor", model) == found
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    weight_writers.write_torch_zip(tmp_path / "avg_model.pt", resnet())
    if is_seen and (model / "config.json").exists():  # nor does a new part go into such a folder
        refused(
            run("convert", "file", tmp_path / "avg_model.pt", "--out", model), capsys, [str(model), *words]
        )
    (tmp_path / "avg_model.pt").unlink()
    assert files(tmp_path) == before


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("kind", ["cosyvoice2", "file"])
@pytest.mark.parametrize("out", ["file", "file/model", "/proc/model"])
def test_an_output_that_is_a_file_or_cannot_be_written_is_refused_first(kind, out, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / out  # an absolute path stays as it is
    if not Path("/proc").is_dir():
        pytest.skip("no /proc")
    before = files(tmp_path)
    code = run("convert", kind, tmp_path / "nothing", "--out", out)
    refused(code, capsys, ["cannot write in the folder", str(out), "choose another"])
    assert files(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("where", ["speaker.safetensors", "config.json"])
@pytest.mark.parametrize("room", [0, 5000])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_what_was_there(where, room, is_new, tmp_path, capsys, monkeypatch):
    file, model = good(tmp_path), tmp_path / "a" / "model"
    if not is_new:
        shutil.copytree(tiny_model.shared(), model)
    old = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before = files(tmp_path)
    if where == "config.json":
        room = min(room, 50)
    fill_the_disk(monkeypatch, where, room)
    refused(run("convert", "file", file, "--out", model), capsys, [str(model), "No space left", "make room"])
    assert files(tmp_path) == before and all(p.read_bytes() == data for p, data in old.items())
    monkeypatch.undo()
    assert run("convert", "file", file, "--out", model) == 0
    assert run("doctor", model) == 0


def test_a_disk_that_is_too_small_is_seen_before_anything_is_read_or_written(tmp_path, capsys, monkeypatch):
    file, before = good(tmp_path), files(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(convert.weight_files, "sha256", None)
    code = run("convert", "file", file, "--out", tmp_path / "a" / "model")
    refused(code, capsys, ["a/model", "needs", "left", "choose another disk"])
    assert files(tmp_path) == before


def test_a_memory_that_is_too_small_is_one_sentence(tmp_path, capsys, monkeypatch):
    def read(path):
        raise MemoryError("Unable to allocate 9. GiB for an array with shape (9,)")

    file = good(tmp_path)
    monkeypatch.setattr(convert.weight_files, "read_tree", read)
    code = run("convert", "file", file, "--out", tmp_path / "model")
    refused(code, capsys, ["memory", "9. GiB", "larger"])
