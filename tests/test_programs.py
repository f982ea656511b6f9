"""Compiled programs kept on disk: read back without tracing, one for each thing that decides them, none of others."""

import contextlib
import dataclasses
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from deepasmr_jax import programs, sharding

traced: list[int] = []


@dataclasses.dataclass(frozen=True)
class Config:
    factor: float = 2.0


@programs.kept("cfg", "power")
def scaled(weights: dict, x, cfg: Config, power: int = 1):
    traced.append(power)
    y = cfg.factor * x @ weights["kernel"] ** power
    return {"product": y, "pair": (y.sum(), jax.random.bits(weights["key"]))}


@programs.kept()
def as_list(x):
    traced.append(0)
    return [x + 1]


@pytest.fixture
def folder(tmp_path):
    traced.clear()
    programs.keep_in(tmp_path / "programs")
    yield tmp_path / "programs"
    programs.keep_in(None)


def values(scale: float = 1.0):
    rng = np.random.default_rng(0)
    x = sharding.put({"x": np.float32(rng.standard_normal((8, 4)))})["x"]
    kernel = sharding.replicate(np.float32(scale * rng.standard_normal((4, 3))))
    return {"kernel": kernel, "key": jax.random.key(7)}, x


def files(folder) -> list:
    return sorted(path for path in folder.glob("*/*"))


def equal(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_program_is_read_back_without_tracing_and_gives_the_same(folder, shape):
    sharding.make_mesh(*shape)
    weights, x = values()
    first = scaled(weights, x, Config())
    assert equal(first, jax.jit(scaled.__wrapped__, static_argnums=2)(weights, x, Config()))
    del traced[1:]
    assert len(files(folder)) == 1
    programs.forget()  # as a new process
    again = scaled(weights, x, cfg=Config())
    other = scaled(values(3.0)[0], x, Config())  # other values, same program
    assert traced == [1] and equal(first, again) and not equal(first, other)
    assert again["product"].sharding == first["product"].sharding
    sharding.make_mesh(*((1, 1, 1) if shape == (2, 2, 2) else (1, 2, 4)))  # another mesh, another program
    weights, x = values()
    assert np.allclose(scaled(weights, x, Config())["product"], first["product"], atol=1e-5)
    assert len(files(folder)) == 2


def test_each_thing_that_decides_a_program_has_a_file_of_its_own(folder, monkeypatch):
    weights, x = values()
    calls = [
        lambda: scaled(weights, x, Config()),
        lambda: scaled(weights, x, Config(3.0)),
        lambda: scaled(weights, x, Config(), 2),
        lambda: scaled(weights, x[:4], Config()),
        lambda: scaled(weights, x.astype(jnp.bfloat16), Config()),
        lambda: scaled(weights | {"more": x}, x, Config()),
    ]
    results = []
    for number, call in enumerate(calls, 1):
        results.append(call())
        assert len(files(folder)) == len(traced) == number
    for number in (1, 2):
        assert not equal(results[0], results[number])
    programs.forget()
    for call, result in zip(calls, results, strict=True):
        assert equal(call(), result)
    assert len(traced) == len(calls)
    for number in range(5):  # another code or machine: another folder, and old ones go
        monkeypatch.setattr(programs, "_surroundings", lambda number=number: f"code {number}")
        programs.forget()
        calls[0]()
    assert len(traced) == len(calls) + 5
    assert len(list(folder.iterdir())) == 1 + programs.KEPT_VERSIONS
    with jax.default_matmul_precision("bfloat16"):  # a setting in place for a while decides it too
        calls[0]()
    assert len(traced) == len(calls) + 6


def test_a_program_that_jax_has_in_its_own_cache_is_kept_too(folder, tmp_path, monkeypatch):
    cache = {"compilation_cache_dir": str(tmp_path / "jax"), "persistent_cache_min_compile_time_secs": 0.0}
    cache = {f"jax_{name}": x for name, x in (cache | {"persistent_cache_min_entry_size_bytes": -1}).items()}
    before = {name: getattr(jax.config, name) for name in cache}
    weights, x = values()
    try:
        for name, value in cache.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        with monkeypatch.context() as patch:
            patch.setattr(programs, "_without_the_cache_of_jax", contextlib.nullcontext)
            first = scaled(weights, x, Config())
        assert any(path.name.startswith("jit_scaled") for path in (tmp_path / "jax").iterdir())
        monkeypatch.setattr(programs, "_surroundings", lambda: "another code, the same program")
        for is_traced in ([1], []):
            jax.clear_caches()
            programs.forget()
            traced.clear()
            assert equal(scaled(weights, x, Config()), first) and traced == is_traced
        jax.jit(lambda x: x @ x.T)(np.ones((3, 4)))  # what is not kept goes there as before
        assert any(path.name.startswith("jit__lambda") for path in (tmp_path / "jax").iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_folder_that_can_only_be_read_is_read(folder, monkeypatch):
    weights, x = values()
    first = scaled(weights, x, Config())

    def refuse(*_, **__):
        raise PermissionError("read-only")

    for name in ("utime", "mkdir", "replace"):
        monkeypatch.setattr(os, name, refuse)
    programs.forget()
    assert equal(scaled(weights, x, Config()), first) and traced == [1]


def test_a_damaged_file_is_made_anew(folder):
    weights, x = values()
    first = scaled(weights, x, Config())
    [path] = files(folder)
    whole = path.read_bytes()
    useless = whole[65:].split(b"\n")[0] + b"\nno program"
    signed = hashlib.sha256(useless).hexdigest().encode() + b"\n" + useless
    for damaged in (whole[:-100], whole[:40], b"", whole.replace(b"product", b"quotient", 1), signed):
        path.write_bytes(damaged)
        for is_traced in ([1], []):  # made and written, then read
            programs.forget()
            traced.clear()
            assert equal(scaled(weights, x, Config()), first)
            assert traced == is_traced


def test_inside_another_program_and_without_a_folder_it_is_jit(folder):
    weights, x = values()
    outer = jax.jit(lambda weights, x: scaled(weights, x, Config())["product"])
    inside = outer(weights, x)
    assert jax.jit(
        lambda: scaled({"kernel": np.ones((4, 3)), "key": jax.random.key(0)}, np.ones((2, 4)), Config())
    )()
    assert not files(folder)
    kept = scaled(weights, x, Config())["product"]
    programs.keep_in(None)
    assert np.array_equal(inside, kept) and np.array_equal(scaled(weights, x, Config())["product"], kept)
    assert len(files(folder)) == 1


def test_a_result_that_is_no_tuple_or_dict_is_not_kept(folder):
    [two] = as_list(np.ones(2, np.float32))
    assert np.array_equal(two, [2, 2]) and not files(folder)


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    weights, x = values()
    for mode, count in ((0o777, 0), (0o770, 0), (0o755, 1)):
        place = tmp_path / oct(mode)
        place.mkdir()
        os.chmod(place, mode)
        programs.keep_in(place)
        scaled(weights, x, Config())
        assert len(files(place)) == count
    path = files(place)[0]
    os.chmod(path, 0o666)  # nor is a file of that kind, which is written anew
    programs.forget()
    traced.clear()
    scaled(weights, x, Config())
    assert traced == [1] and path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    programs.keep_in(tmp_path / "file" / "programs")  # cannot be made
    assert scaled(weights, x, Config())["product"].shape == (8, 3)
    programs.keep_in(None)
