"""Weight files: every format against hand-made files and, where installed, against its own library; hostile files."""

import argparse
import collections
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import weakref
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import weight_writers as writers
from safetensors import numpy as safetensors_numpy
from weight_writers import Call, Raw

from deepasmr_jax import weight_files, weight_tensors

TREES = {"torch zip": writers.write_torch_zip, "torch legacy": writers.write_torch_legacy}
DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
REFUSALS = (ValueError, weight_files.NotWeights)  # and no other error, such as a UnicodeDecodeError


def example() -> dict[str, np.ndarray]:
    """Tensors of every type and of awkward shapes and strides; `head` and `part` share the storage of `table`."""
    table = np.linspace(-2, 2, 60, dtype=np.float32).reshape(12, 5)
    tensors = {f"type.{name}": np.array([[0, 1, 3], [5, 7, 120]]).astype(name) for name in DTYPES}
    tensors |= {"table": table, "head": table[:], "part": table.T[1:4, ::3], "scalar": np.array(7, np.int64)}
    return tensors | {"empty": np.zeros((0, 4), np.float32), "ones": np.ones((1, 1, 3), np.float16)}


def assert_same(found, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, x in wanted.items():
        assert found[name].shape == x.shape and found[name].dtype == x.dtype, name
        np.testing.assert_array_equal(found[name], x, err_msg=name)
        assert type(found[name]) is np.ndarray and found[name].flags.aligned, name
        assert not found[name].flags.writeable, name


def failure(call, *args, **options) -> str:
    """The message of the refusal of a call: one line, beginning with the file."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert type(caught.value) in REFUSALS and message.startswith(str(args[0])) and "\n" not in message
    return message


# ---------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("name", TREES)
def test_every_type_shape_and_stride_of_a_pytorch_file(name, tmp_path):
    TREES[name](tmp_path / "g_00000000", example() | {"epoch": 3, "note": "x", "args": [1, (2.5, None)]})
    assert weight_files.kind(tmp_path / "g_00000000") == name
    assert_same(weight_files.read(tmp_path / "g_00000000"), example())


@pytest.mark.parametrize("name", TREES)
def test_names_of_one_storage_share_memory_that_is_let_go(name, tmp_path):
    TREES[name](tmp_path / "x.pt", example())
    found = weight_files.read(tmp_path / "x.pt")
    table, head, part = found["table"], found["head"], found["part"]
    assert np.shares_memory(table, head) and np.shares_memory(table, part) and part.strides == (4, 60)
    assert np.shares_memory(found["table"], table)
    alive, maps = weakref.ref(table), Path("/proc/self/maps")
    assert not maps.exists() or (str(tmp_path) in maps.read_text()) == (name == "torch zip")
    del table, head, part
    assert alive() is None and (not maps.exists() or str(tmp_path) not in maps.read_text())


@pytest.mark.parametrize("name", TREES)
def test_nested_dictionaries_are_chosen_by_key_or_returned_nested(name, tmp_path):
    path, x = tmp_path / "do_00000000", np.arange(4, dtype=np.float32)
    optimizer = {
        "state": {0: {"step": np.array(3.0, np.float32), "exp_avg": x}},
        "param_groups": [{"lr": 2e-4}],
    }
    TREES[name](path, {"generator": {"conv.weight": x}, "optim": optimizer, "steps": 7, "pair": [x, (x, 1)]})
    assert_same(weight_files.read(path, key=("generator",)), {"conv.weight": x})
    tree = weight_files.read_tree(path)
    assert tree["steps"] == 7 and tree["optim"]["param_groups"][0]["lr"] == 2e-4
    np.testing.assert_array_equal(tree["optim"]["state"][0]["exp_avg"], x)
    np.testing.assert_array_equal(tree["pair"][1][0], x)
    assert "(generator, optim); choose one with `key`" in failure(weight_files.read, path)
    assert "has no model; it has generator, optim, steps, pair" in failure(
        weight_files.read, path, key=("model",)
    )
    assert "has no generator.x" in failure(weight_files.read, path, key=("generator", "x"))
    assert "holds int at steps" in failure(weight_files.read, path, key=("steps",))
    assert "holds list at optim.param_groups" in failure(
        weight_files.read, path, key=("optim", "param_groups")
    )


def test_plain_python_values_that_training_checkpoints_hold(tmp_path):
    options = Call("argparse Namespace", (), {"rate": 22050})
    dtype = Call("numpy dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    rate = Call(
        "numpy.core.multiarray scalar", (dtype, Call("_codecs encode", ("\0\0\0\0\0\0\xe0?", "latin1")))
    )
    tree = {
        "options": options,
        "rate": rate,
        "size": Call("torch Size", ((2, 3),)),
        "device": Call("torch device", ("cuda:0",)),
        "dtype": Raw(b"ctorch\nbfloat16\n"),
        "names": Call("__builtin__ set", (["a", "b"],)),
        "states": Call("collections defaultdict", (Raw(b"c__builtin__\ndict\n"),)),
        "parameter": Call("torch._utils _rebuild_parameter", (np.ones(2, np.float32), True, None)),
        "ordered": Call("collections OrderedDict", (), {"_metadata": {"": {"version": 1}}}),
    }
    writers.write_torch_zip(tmp_path / "x.pt", tree)
    found = weight_files.read_tree(tmp_path / "x.pt")
    assert dict(found["options"]) == {"rate": 22050} and found["rate"] == 0.5
    assert found["size"] == [2, 3] and found["device"] == "cuda:0" and found["dtype"] == ml_dtypes.bfloat16
    assert found["names"] == ["a", "b"] and len(found["states"]) == len(found["ordered"]) == 0
    np.testing.assert_array_equal(found["parameter"], [1, 1])


class Attack:
    """Makes a file when a usual pickle reader opens it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_is_refused_by_name_and_not_run(name, protocol, tmp_path):
    TREES[name](tmp_path / "x.pt", pickle.dumps({"a": Attack(tmp_path / "was_run")}, protocol=protocol))
    assert "asks for 'posix.system'" in failure(weight_files.read, tmp_path / "x.pt")
    TREES[name](tmp_path / "x.pt", f"(S'touch {tmp_path / 'was_run'}'\nios\nsystem\n.".encode())  # INST
    assert "asks for 'os.system'" in failure(weight_files.read, tmp_path / "x.pt")
    assert not (tmp_path / "was_run").exists()


def test_the_memory_is_that_of_the_container(tmp_path, monkeypatch):
    whole = weight_tensors.memory_bytes()
    for text, expected in (("max\n", whole), ("1048576\n", 2**20), (f"{2**63}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(weight_tensors, "_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
        assert weight_tensors.memory_bytes() == expected


@pytest.mark.parametrize(
    "thing",
    [
        "builtins eval", "builtins getattr", "torch.storage _load_from_bytes", "torch load",
        "torch._utils _rebuild_qtensor",
        "torch.nn.modules.conv Conv1d", "omegaconf.dictconfig DictConfig", "numpy.core.multiarray _reconstruct",
        "copyreg _reconstructor", "collections OrderedDict.__init__", "torch FooStorage",
    ],
)  # fmt: skip
def test_only_the_listed_globals_are_known(thing, tmp_path):
    writers.write_torch_zip(tmp_path / "x.pt", {"a": Raw(f"c{thing}".replace(" ", "\n").encode() + b"\n")})
    assert f"asks for {thing.replace(' ', '.')!r}" in failure(weight_files.read, tmp_path / "x.pt")


FLOATS = Raw(b"ctorch\nFloatStorage\n")


def tensor(offset=0, shape=(2, 2), strides=(2, 1), num=4, storage=FLOATS, key="0"):
    """A tensor of a storage of 4 float32, bent in one way."""
    identity = writers.Persistent(("storage", storage, key, "cpu", num))
    return Call("torch._utils _rebuild_tensor_v2", (identity, offset, shape, strides, False, {}))


BENT = {
    "offset behind the storage": tensor(offset=1),
    "negative offset": tensor(offset=-1),
    "stride behind the storage": tensor(strides=(3, 1)),
    "negative stride": tensor(offset=3, strides=(-2, -1)),
    "negative size": tensor(shape=(-2, 2)),
    "absurd shape": tensor(shape=(2**40, 2**40), strides=(0, 0)),
    "absurd empty shape": tensor(shape=(0, 2**62), strides=(0, 0)),
    "repeated without end": tensor(shape=(2**39,), strides=(0,)),
    "fewer strides": tensor(strides=(1,)),
    "fractions": tensor(shape=(2.0, 2)),
    "truth values": tensor(shape=(True, 2)),
    "list": tensor(shape=[2, 2]),
    "many axes": tensor(shape=(1,) * 40, strides=(1,) * 40),
    "storage of other size": tensor(num=5),
    "storage of negative size": tensor(num=-4),
    "storage of other type": tensor(storage=Raw(b"ctorch\nHalfStorage\n")),
    "storage of no type": tensor(storage="float32"),
    "absent storage": tensor(key="1"),
    "other member": tensor(key="../data.pkl"),
    "two types": [tensor(), tensor(storage=Raw(b"ctorch\nIntStorage\n"))],
    "object type": Call(
        "torch._utils _rebuild_tensor_v3",
        (tensor().arguments[0], 0, (2,), (1,), False, {}, "O"),
    ),
    "bare storage": tensor().arguments[0],
    "function": Raw(b"ctorch._utils\n_rebuild_tensor_v2\n"),
    "called number": Raw(b"K\x01)R"),
    "called with a list": Raw(b"ccollections\nOrderedDict\n]R"),
    "stack below the ground": Raw(b"000000000"),
    "absent memo": Raw(b"h\x07"),
    "name of tuples": Raw(b"})K\x01s"),
    "name twice": Raw(b"}(K\x01K\x02K\x01K\x03u"),
    "odd pairs": Raw(b"}(K\x01u"),
    "object dtype": Call("numpy dtype", ("O8", False, True)),
    "big-endian dtype": Call("numpy dtype", ("f8", False, True), (3, ">", None)),
    "extension": Raw(b"\x82\x01"),
    "module": writers.Persistent(("module", FLOATS, "a.py", "import os")),
    "view of a storage": Call(
        "torch._utils _rebuild_tensor",
        (writers.Persistent(("storage", FLOATS, "0", "cpu", 4, ("1", 0, 2))), 0, (2,), (1,)),
    ),
    "long bytes": Call("_codecs encode", ("x" * 300, "latin1")),
    "name of 70 bits": {2**70: 1},
    "number of 4000 bits": Raw(b"\x8b\xf4\x01\0\0" + b"\1" * 500),
}


@pytest.mark.parametrize("bent", BENT)
def test_bent_pickles_are_refused(bent, tmp_path):
    writers.write_torch_zip(tmp_path / "x.pt", {"a": BENT[bent]}, extra=(("data/0", bytes(16)),))
    failure(weight_files.read_tree, tmp_path / "x.pt")


def test_the_base_of_the_bent_tensors_is_right(tmp_path):
    writers.write_torch_zip(tmp_path / "x.pt", {"a": tensor()}, extra=(("data/0", bytes(16)),))
    assert_same(weight_files.read(tmp_path / "x.pt"), {"a": np.zeros((2, 2), np.float32)})
    writers.write_torch_zip(
        tmp_path / "y.pt", {"a": tensor(shape=(3, 2), strides=(0, 1))}, extra=(("data/0", bytes(16)),)
    )
    assert weight_files.read(tmp_path / "y.pt")["a"].strides == (0, 4)


# a list of two numbers, and 39 lists after it that hold the one before twice: 2**40 numbers at memo index 0x28
LAUGHS = b"](K\x01K\x02eq\x01" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 40))
GREEDY = {  # each is below 1 MB
    "memo index of 2**32": b"\x80\x02}r\xff\xff\xff\xff0.",
    "text of 2**31": b"\x80\x02X\xff\xff\xff\x7f.",
    "bytes of 2**62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
    "tuples in tuples as a name": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a list in itself": b"\x80\x02}K\x00]q\x00h\x00as.",
    "laughs": b"\x80\x02" + LAUGHS + b"h\x28.",
    "a laughing global": b"\x80\x04" + LAUGHS + b"h\x28h\x28\x93.",
    "a laughing type": b"\x80\x02" + LAUGHS + b"cnumpy\ndtype\nh\x28\x85R.",
    "a laughing name": b"\x80\x02" + LAUGHS.replace(b"]", b"").replace(b"eq", b"tq") + b"}h\x28Ns.",
    "dictionaries of a list": b"\x80\x02](" + b"](K\x01K\x02e" * 10**4 + b"eq\x00ccollections\nOrderedDict\nq\x01"
    + b"(" + b"h\x01h\x00\x85R" * 10**4 + b"t.",
    "options of one dictionary": b"\x80\x02}q\x00(" + b"".join(b"M%cKN" % i for i in range(256)) + b"u"
    + b"0cargparse\nNamespace\nq\x01](" + b"h\x01)\x81h\x00b" * 9999 + b"e.",
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("greedy", GREEDY)
def test_small_pickles_cannot_take_the_memory_or_end_the_process(greedy, tmp_path):
    writers.write_torch_zip(tmp_path / "x.pt", GREEDY[greedy])
    tracemalloc.start()
    try:
        failure(weight_files.read_tree, tmp_path / "x.pt")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_archives_that_are_no_plain_weight_file(tmp_path):
    path, tree = tmp_path / "x.pt", {"a": np.ones(3, np.float32)}
    writers.write_torch_zip(path, tree, byteorder="big")
    assert "big-endian" in failure(weight_files.read, path)
    writers.write_torch_legacy(path, tree, little_endian=False)
    assert "big-endian" in failure(weight_files.read, path)
    writers.write_torch_zip(path, tree, extra=(("../../evil", b""),))
    assert "outside its folder" in failure(weight_files.read, path)
    writers.write_torch_zip(path, tree, extra=(("constants.pkl", b""),))
    assert "TorchScript" in failure(weight_files.kind, path)
    with pytest.warns(UserWarning, match="Duplicate"):
        writers.write_torch_zip(path, tree, extra=(("data/0", bytes(12)),))
    assert "twice" in failure(weight_files.read, path)
    writers.write_zip(path, [("data.pkl", bytes(10**6))], compression=zipfile.ZIP_DEFLATED)
    assert "without compression" in failure(weight_files.kind, path)
    np.savez(path.with_suffix(".npz"), a=np.ones(3))
    assert "without one data.pkl (a.npy)" in failure(weight_files.kind, path.with_suffix(".npz"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    assert "without one data.pkl" in failure(weight_files.kind, path)
    writers.write_torch_zip(path, b"\x80\x02" + bytes(2**24))
    assert "this reader takes" in failure(weight_files.read, path)


def test_members_cannot_overlap(tmp_path):
    x, name = np.ones(3, np.float32), b"archive/data/1"
    inner = b"PK\x03\x04" + bytes(22) + len(name).to_bytes(4, "little") + name + x.tobytes()
    writers.write_torch_zip(tmp_path / "x.pt", {"a": np.frombuffer(inner, np.uint8).copy(), "b": x})
    assert_same(
        weight_files.read(tmp_path / "x.pt", check=False), {"a": np.frombuffer(inner, np.uint8), "b": x}
    )
    data = bytearray((tmp_path / "x.pt").read_bytes())
    second = data.rindex(name)
    data[second - 4 : second] = data.index(inner).to_bytes(4, "little")
    (tmp_path / "x.pt").write_bytes(data)
    assert "the place of archive/data/1" in failure(weight_files.read, tmp_path / "x.pt")


def test_a_wrong_checksum_is_found_unless_it_was_not_written(tmp_path):
    path, x = tmp_path / "x.pt", np.full(100, 1.5, np.float32)
    writers.write_torch_zip(path, {"a": x})
    data = bytearray(path.read_bytes())
    data[data.index(x.tobytes()) + 50] ^= 1
    path.write_bytes(data)
    assert "checksum of data/0" in failure(weight_files.read, path)
    assert np.sum(weight_files.read(path, check=False)["a"] != x) == 1
    central = data.rindex(b"archive/data/0") - 46
    data[central + 16 : central + 20] = bytes(4)
    path.write_bytes(data)
    assert np.sum(weight_files.read(path)["a"] != x) == 1


# ---------------------------------------------------------------- safetensors


def test_every_type_of_a_safetensors_file(tmp_path):
    tensors = {name: np.ascontiguousarray(x) for name, x in sorted(example().items())}
    tensors = {name: x for name, x in tensors.items() if name != "scalar"} | {"scalar": np.array(7, np.int64)}
    safetensors_numpy.save_file(tensors, tmp_path / "weights.bin", metadata={"format": "pt"})
    assert weight_files.kind(tmp_path / "weights.bin") == "safetensors"
    found = weight_files.read(tmp_path / "weights.bin")
    assert_same({name: found[name] for name in tensors}, tensors)
    assert len(found) == len(tensors) and "__metadata__" not in found
    np.testing.assert_array_equal(weight_files.read_tree(tmp_path / "weights.bin")["table"], tensors["table"])


def safetensors_file(path, header, data: bytes = bytes(16)) -> None:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_bent_safetensors_headers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    safetensors_file(path, {"a": good})
    assert_same(weight_files.read(path), {"a": np.zeros(4, np.float32)})
    for bent in (
        {"shape": [5]}, {"shape": [-4]}, {"shape": [2.0, 2]}, {"shape": [2**62, 0]}, {"shape": [1] * 50 + [4]},
        {"shape": "4"}, {"data_offsets": [0, 12]}, {"data_offsets": [4, 16]}, {"data_offsets": [-16, 0]},
        {"data_offsets": [0, 16, 32]}, {"data_offsets": [0.0, 16.0]}, {"dtype": "F4"}, {"dtype": []},
    ):  # fmt: skip
        safetensors_file(path, {"a": good | bent})
        failure(weight_files.read, path)
    safetensors_file(path, {"a": good, "b": good})
    assert "overlap" in failure(weight_files.read, path)
    item = json.dumps(good)
    for header in (
        f'{{"a": {item}, "a": {item}}}',
        '{"a": ' + '{"x": ' * 5000,
        '{"a": {}}',
        "{",
        '{"a": 1' + "0" * 9999 + "}",
    ):
        safetensors_file(path, header.encode())
        failure(weight_files.read, path)
    safetensors_file(path, {"a": good}, bytes(17))
    assert "bytes instead of" in failure(weight_files.read, path)
    path.write_bytes((10**7).to_bytes(8, "little") + b'{"a":')
    assert "its header needs 10000000" in failure(weight_files.kind, path)


def test_a_header_length_that_looks_like_another_format_is_no_matter(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    for length in (0x0280, 0x8B1F, 0x0808, 0x2020):  # pickle, gzip, ONNX, text
        safetensors_file(tmp_path / "x", header + b" " * (length - len(header)))
        assert weight_files.kind(tmp_path / "x") == "safetensors"
        assert_same(weight_files.read(tmp_path / "x"), {"a": np.zeros(4, np.float32)})


# ---------------------------------------------------------------- ONNX

NODES = [
    ("MatMul", "/blocks.0/attn/query/MatMul", ("x", "onnx::MatMul_2536"), ("y",)),
    ("Add", "/blocks.0/attn/query/Add", ("blocks.0.attn.query.bias", "y"), ("z",)),
]


def onnx_example() -> dict[str, np.ndarray]:
    tensors = {f"type.{name}": np.array([[0, 1], [1, 0]]).astype(name) for name in writers.ONNX_TYPES}
    tensors |= {"onnx::MatMul_2536": np.linspace(-3, 3, 35, dtype=np.float32).reshape(7, 5)}
    tensors |= {f"half.{n}": np.array([-1.5, 3, np.inf]).astype(n) for n in ("float16", "bfloat16")}
    numbers = {"int64": -(2**63), "int32": -5, "int8": -128, "uint64": 2**64 - 1, "uint32": 2**32 - 1}
    tensors |= {f"edge.{name}": np.array([value, 1, 127], name) for name, value in numbers.items()}
    return tensors | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.int64)}


@pytest.mark.parametrize("style", ["raw", "packed", "single"])
def test_every_type_of_an_onnx_file_in_every_way_of_writing(style, tmp_path):
    writers.write_onnx(tmp_path / "x", onnx_example(), NODES, style=style)
    assert weight_files.kind(tmp_path / "x") == "onnx"
    graph = weight_files.read_onnx(tmp_path / "x")
    assert_same(graph.initializers, onnx_example())
    assert graph.nodes == [weight_files.Node(*node) for node in NODES]
    assert "use read_onnx" in failure(weight_files.read, tmp_path / "x")
    writers.write_torch_zip(tmp_path / "y", {})
    assert "is a torch zip file and no ONNX graph" in failure(weight_files.read_onnx, tmp_path / "y")


def test_data_beside_an_onnx_file(tmp_path):
    path, data = tmp_path / "x.onnx", tmp_path / "x.onnx_data"
    writers.write_onnx(path, onnx_example(), NODES, external="x.onnx_data")
    assert_same(weight_files.read_onnx(path).initializers, onnx_example())
    data.write_bytes(data.read_bytes()[:5000])
    assert f"of {data}" in failure(weight_files.read_onnx, path)
    data.unlink()
    assert f"{data}, which is missing" in failure(weight_files.read_onnx, path)


@pytest.mark.parametrize(
    "place",
    [
        {"location": "../y"}, {"location": "/etc/hostname"}, {"location": "a/../../y"}, {"location": "a\\..\\..\\y"},
        {"location": "C:y"}, {"location": ""}, {"location": "y\0"}, {}, {"location": "."},
        {"location": "y", "offset": "-4"},
        {"location": "y", "offset": "4"}, {"location": "y", "length": "4"}, {"location": "y", "length": "9" * 5000},
    ],
)  # fmt: skip
def test_bent_places_of_data_are_refused(place, tmp_path):
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "y", tmp_path / "model" / "y"):
        file.write_bytes(bytes(8))
    for given in (place, {"location": "y"}):  # the second is right
        graph = writers.field(5, writers.onnx_tensor("a", np.zeros(2, np.float32), "external", given))
        writers.write_model(tmp_path / "model" / "x.onnx", graph)
        if given is place:
            failure(weight_files.read_onnx, tmp_path / "model" / "x.onnx")
    assert len(weight_files.read_onnx(tmp_path / "model" / "x.onnx").initializers["a"]) == 2


def test_bent_onnx_tensors_are_refused(tmp_path):
    field, path = writers.field, tmp_path / "x.onnx"
    head = field(8, "a") + field(2, 1)
    good = field(5, head + field(1, 2) + field(9, bytes(8)))
    writers.write_model(path, good)
    assert_same(weight_files.read_onnx(path).initializers, {"a": np.zeros(2, np.float32)})
    for name, graph in {
        "shape": field(5, head + field(1, 3) + field(9, bytes(8))),
        "negative size": field(5, head + field(1, -2) + field(1, -1) + field(9, bytes(8))),
        "absurd size": field(5, head + field(1, 2**62) + field(1, 2**62) + field(9, bytes(8))),
        "no data": field(5, head + field(1, 2)),
        "text": field(5, field(8, "a") + field(2, 8) + field(6, b"x")),
        "unknown type": field(5, field(8, "a") + field(2, 99) + field(9, b"")),
        "no type": field(5, field(8, "a") + field(9, b"")),
        "too big for the type": field(5, field(8, "a") + field(2, 3) + field(5, 128) + field(1, 1)),
        "half of too many bits": field(5, field(8, "a") + field(2, 10) + field(5, 2**16) + field(1, 1)),
        "name twice": good + good,
        "name that is no text": field(
            5, field(8, b"\xff\xfe") + field(2, 1) + field(1, 2) + field(9, bytes(8))
        ),
        "number in place of bytes": field(5, 3),
        "group": b"\x0b",
        "field 0": b"\x00\x00",
        "length behind the end": b"\x2a\xff\x7f",
        "number without end": b"\x08" + b"\xff" * 11,
        "sparse": field(15, b""),
        "packed number of 12 bytes": field(
            5, field(8, "a") + field(2, 7) + field(7, b"\xff" * 11 + b"\1") + field(1, 1)
        ),
        "packed number without end": field(
            5, field(8, "a") + field(2, 7) + field(7, b"\xff\xff") + field(1, 1)
        ),
    }.items():
        writers.write_model(path, graph)
        assert failure(weight_files.read_onnx, path), name
    path.write_bytes(field(1, 8) + field(7, good) + field(7, good) + field(8, b""))
    assert "2 graphs" in failure(weight_files.kind, path)


# ---------------------------------------------------------------- any file


@pytest.mark.parametrize(
    "data, words",
    [
        (b"\x80\x02", "only 2 bytes"),
        (b"", "only 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found", "web page"),
        (b'{"error": "Entry not found"}', 'is text that begins with \'{"error": '),
        ("zu groß für diese Datei".encode(), "is text"),
        (b"\x1f\x8b\x08" + bytes(30), "gzip archive"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "tar archive"),
        (b"\x93NUMPY\x01\x00" + bytes(30), "NumPy"),
        (pickle.dumps({"a": list(range(10))}), "Python pickle"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
        (b"PK\x03\x04" + bytes(60), "damaged"),
        (bytes(range(128, 160)), "begins with 80 81 82"),
        (b"\x08\x08\x12\x05tests:\x02\x0a", "damaged"),
    ],
)
def test_the_usual_wrong_files_are_named(data, words, tmp_path):
    (tmp_path / "llm.pt").write_bytes(data)
    for call in (weight_files.kind, weight_files.read, weight_files.read_tree, weight_files.read_onnx):
        assert words in failure(call, tmp_path / "llm.pt")


def test_folders_pipes_and_absent_files(tmp_path):
    assert "is a folder" in failure(weight_files.read, tmp_path)
    assert "is missing" in failure(weight_files.read, tmp_path / "a.pt")
    assert "cannot be opened" in failure(weight_files.sha256, tmp_path / "a.pt")
    os.mkfifo(tmp_path / "pipe")
    assert "no file" in failure(weight_files.kind, tmp_path / "pipe")


def test_a_file_that_goes_away_after_it_was_opened(tmp_path):
    writers.write_torch_zip(tmp_path / "x.pt", example())
    found = weight_files.read(tmp_path / "x.pt")
    (tmp_path / "x.pt").unlink()
    assert "cannot be opened" in failure(lambda path: found["table"], tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"short")
    assert "damaged" in failure(lambda path: found["table"], tmp_path / "x.pt")


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert weight_files.sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


def small_files(folder: Path) -> dict[str, tuple[bytes, object, dict]]:
    """A small file of each format: bytes, its reader, its tensors."""
    x = {
        "layer.weight": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
        "layer.bias": np.ones(3, np.float16),
    }
    x |= {"view": x["layer.weight"].T}
    for write in (writers.write_torch_zip, writers.write_torch_legacy):
        write(folder / write.__name__, x | {"epoch": 2})
    plain = {name: np.ascontiguousarray(v) for name, v in x.items()}
    safetensors_numpy.save_file(plain, folder / "safetensors")
    writers.write_onnx(folder / "onnx", plain, NODES)
    onnx = lambda path: weight_files.read_onnx(path).initializers
    return {
        "torch zip": ((folder / "write_torch_zip").read_bytes(), weight_files.read, x),
        "torch legacy": ((folder / "write_torch_legacy").read_bytes(), weight_files.read, x),
        "safetensors": ((folder / "safetensors").read_bytes(), weight_files.read, plain),
        "onnx": ((folder / "onnx").read_bytes(), onnx, plain),
    }


FORMATS = ["torch zip", "torch legacy", "safetensors", "onnx"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_cut_off_anywhere_is_an_error(name, tmp_path):
    data, read, tensors = small_files(tmp_path)[name]
    path = tmp_path / "cut"
    path.write_bytes(data)
    assert dict(read(path)).keys() == tensors.keys()
    step = max(1, len(data) // 300)
    for length in sorted({*range(0, len(data), step), *range(max(0, len(data) - 60), len(data))}):
        path.write_bytes(data[:length])
        failure(read, path)


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes_give_an_error_or_the_right_arrays(name, tmp_path):
    data, read, tensors = small_files(tmp_path)[name]
    path, rng = tmp_path / "flipped", np.random.default_rng(5)
    num_read = 0
    for i in range(400):
        bent = bytearray(data)
        for place in rng.integers(len(data), size=1 + i % 3):
            bent[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bent)
        try:
            found = {k: np.array(v) for k, v in read(path).items()}
        except ValueError as error:
            assert type(error) in REFUSALS and str(error).startswith(str(path))
            continue
        num_read += 1
        assert all(isinstance(k, str) and v.nbytes < 10**6 for k, v in found.items())
        if name == "torch zip":  # its checksums cover names and data
            assert list(found) == list(tensors)
            assert all(np.array_equal(found[k], tensors[k]) for k in tensors)
    assert 0 < num_read < 390


def test_memory_stays_at_the_largest_tensor(tmp_path):
    with open(tmp_path / "data", "wb") as file:
        file.truncate(2**28)
    zeros = np.memmap(tmp_path / "data", np.float32, "r", shape=(8, 2**23)).view(np.ndarray)
    writers.write_torch_zip(tmp_path / "x.pt", {f"layer{i}": np.array(zeros[i]) for i in range(8)})
    code = (
        "import resource, sys\n"
        "from deepasmr_jax import weight_files\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "total = sum(float(x.sum()) for x in weight_files.read(sys.argv[1]).values())\n"
        "print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")], capture_output=True, text=True, check=True
    )
    total, growth_mib = out.stdout.split()
    assert float(total) == 0 and int(growth_mib) < 64  # one tensor is 32 MiB, the file 256


# ---------------------------------------------------------------- against the libraries themselves, where installed


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_that_pytorch_writes(is_zip, protocol, tmp_path):
    torch = pytest.importorskip("torch")
    table = torch.linspace(-2, 2, 60).reshape(12, 5)
    state = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3)).state_dict()
    tensors = dict(state) | {"table": table, "head": table, "part": table.T[1:4, ::3]}
    tensors |= {f"type.{n}": torch.tensor([[0, 1, 3], [5, 7, 120]]).to(getattr(torch, n)) for n in DTYPES}
    tensors |= {
        "parameter": torch.nn.Parameter(table[2:]),
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(3.5),
    }
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    tree = {"model": tensors, "optim": optimizer.state_dict(), "net": model.state_dict(), "epoch": 3}
    tree |= {"rate": np.float64(0.5), "names": {"a"}, "bytes": b"ab", "none": b"", "seed": 2**70}
    tree |= {
        "options": argparse.Namespace(rate=22050),
        "states": collections.defaultdict(dict),
        "size": table.shape,
    }
    options = {"_use_new_zipfile_serialization": is_zip, "pickle_protocol": protocol}
    torch.save(tree, tmp_path / "x", **options)
    assert weight_files.kind(tmp_path / "x") == ("torch zip" if is_zip else "torch legacy")
    found = weight_files.read(tmp_path / "x", key=("model",))
    assert list(found) == list(tensors)
    for name, x in tensors.items():
        wanted = x.detach().float().numpy()
        assert found[name].dtype.name == str(x.dtype).removeprefix("torch."), name
        assert found[name].shape == wanted.shape, name
        np.testing.assert_array_equal(found[name].astype(np.float32), wanted, err_msg=name)
    assert np.shares_memory(found["table"], found["head"])
    rest = weight_files.read_tree(tmp_path / "x")
    assert rest["optim"]["param_groups"][0]["lr"] == 1e-3 and dict(rest["options"]) == {"rate": 22050}
    wanted = {"rate": 0.5, "names": ["a"], "bytes": b"ab", "none": b"", "seed": 2**70, "size": [12, 5]}
    assert {name: rest[name] for name in wanted} == wanted and dict(rest["states"]) == {}
    torch.save(state, tmp_path / "flat", **options)
    assert list(weight_files.read(tmp_path / "flat")) == list(state)
    torch.save(model, tmp_path / "module", **options)
    assert "torch.nn.modules.linear.Linear" in failure(weight_files.read, tmp_path / "module")


def test_a_file_of_pytorch_without_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(weight_files.read(tmp_path / "x.pt")["a"], [1, 1, 1])


@pytest.mark.parametrize("name", TREES)
def test_pytorch_opens_our_test_files(name, tmp_path):
    torch = pytest.importorskip("torch")
    TREES[name](tmp_path / "x.pt", {"inner": example(), "epoch": 3})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["epoch"] == 3 and found["inner"].keys() == example().keys()
    for key, x in example().items():
        assert str(found["inner"][key].dtype) == f"torch.{x.dtype.name}"
        np.testing.assert_array_equal(found["inner"][key].float().numpy(), x.astype(np.float32), err_msg=key)


def test_files_that_the_onnx_package_writes_and_reads(tmp_path):
    onnx = pytest.importorskip("onnx")
    tensors = {k: v for k, v in onnx_example().items() if v.dtype != ml_dtypes.bfloat16}
    made = [onnx.numpy_helper.from_array(v, k) for k, v in tensors.items()]
    made += [onnx.helper.make_tensor("bf", onnx.TensorProto.BFLOAT16, [3], [1.5, -2.0, 3.0])]
    made += [onnx.helper.make_tensor("list", onnx.TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])]
    tensors |= {
        "bf": np.array([1.5, -2, 3], ml_dtypes.bfloat16),
        "list": np.array([[1, 2], [3, 4]], np.float32),
    }
    nodes = [onnx.helper.make_node(op, i, o, name=n, axis=1) for op, n, i, o in NODES]
    graph = onnx.helper.make_graph(nodes, "main", [], [], made)
    model = onnx.helper.make_model(graph)
    onnx.save(model, tmp_path / "x.onnx")
    found = weight_files.read_onnx(tmp_path / "x.onnx")
    assert_same(found.initializers, tensors)
    assert found.nodes == [weight_files.Node(*node) for node in NODES]
    onnx.save(model, tmp_path / "y.onnx", save_as_external_data=True, location="y.data", size_threshold=0)
    assert_same(weight_files.read_onnx(tmp_path / "y.onnx").initializers, tensors)
    for style in ("raw", "packed", "single"):
        writers.write_onnx(tmp_path / "z.onnx", onnx_example(), NODES, style=style)
        theirs = onnx.load(tmp_path / "z.onnx").graph
        for x in theirs.initializer:
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(x), onnx_example()[x.name], err_msg=x.name
            )
        assert [n.name for n in theirs.node] == [n[1] for n in NODES]
