"""Config files, --set, JSON form and comparison."""

import dataclasses
import os
from typing import Literal

import pytest

from deepasmr_jax import config


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    count: int = 3
    names: tuple[str, ...] = ("a",)
    pair: tuple[float, float] = (0.9, 0.99)
    kind: Literal["noam", "cosine"] = "noam"
    limit: float | None = None
    is_on: bool = False


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    title: str = "x"
    shape: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    "assignment, expected",
    [
        ("inner.rate=1e-4", Inner(rate=1e-4)),
        ("inner.count=1e3", Inner(count=1000)),
        ("inner.names=b,c", Inner(names=("b", "c"))),
        ("inner.pair=0.8,0.95", Inner(pair=(0.8, 0.95))),
        ("inner.pair=(0.8, 0.95)", Inner(pair=(0.8, 0.95))),
        ("inner.kind=cosine", Inner(kind="cosine")),
        ("inner.limit=2", Inner(limit=2.0)),
        ("inner.limit=none", Inner()),
        ("inner.is_on=true", Inner(is_on=True)),
    ],
)
def test_set_parses_the_text_with_the_type_of_the_field(assignment, expected):
    changed = config.override(Outer(), assignment)
    assert changed.inner == expected
    assert type(changed.inner.count) is int and type(changed.inner.rate) is float


@pytest.mark.parametrize(
    "assignment, words",
    [
        ("iner.rate=1", "did you mean 'inner'"),
        ("inner.rat=1", "did you mean 'rate'"),
        ("inner.count=1.5", "whole number"),
        ("inner.kind=cosin", "did you mean 'cosine'"),
        ("inner.is_on=maybe", "true or false"),
        ("inner.pair=1,2,3", "2 values expected"),
        ("inner=3", "one of them: rate"),
        ("title", "no '='"),
        ("title.x=1", "nothing is inside a str"),
    ],
)
def test_a_wrong_assignment_is_answered_with_the_way_out(assignment, words):
    with pytest.raises(ValueError, match=words):
        config.override(Outer(), assignment)


def test_the_json_form_gives_the_same_config_back():
    cfg = Outer(Inner(limit=1.5, names=("p", "q")), "y", (Inner(count=7),))
    assert config.from_dict(Outer, config.to_dict(cfg)) == cfg


def test_unknown_and_missing_fields_are_named_together():
    @dataclasses.dataclass(frozen=True)
    class Needs:
        width: int
        depth: int = 1

    with pytest.raises(ValueError, match=r"unknown fields \['wdth'\], missing fields \['width'\]"):
        config.from_dict(Needs, {"wdth": 3})


def test_values_of_another_type_are_named_together():
    @dataclasses.dataclass(frozen=True)
    class Kinds:
        width: int = 1
        rate: float = 1.0
        name: str | None = None
        sizes: tuple[int, ...] = ()

    fine = {"width": 3, "rate": 2, "name": None, "sizes": [1, 2]}
    assert config.from_dict(Kinds, fine) == Kinds(3, 2.0, None, (1, 2))
    with pytest.raises(
        ValueError, match=r"Kinds: width is True, sizes is \(1, 'x'\); .* width is of type int"
    ):
        config.from_dict(Kinds, fine | {"width": True, "sizes": [1, "x"]})


def test_differences_name_the_field_and_both_values():
    old = config.to_dict(Outer())
    new = config.to_dict(config.override(Outer(), "inner.count=5"))
    assert config.differences(old, new) == ["inner.count: 3 -> 5"]


def test_a_config_file_gets_its_stage(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("def get_config(stage='none'):\n    return stage\n")
    assert config.load(f"{path}:lm") == "lm"
    assert config.load(str(path)) == "none"


def test_an_absent_config_file_is_reported_with_its_name():
    with pytest.raises(ValueError, match="configs/absent.py"):
        config.load("configs/absent.py")


def test_a_failed_write_leaves_the_old_json_file(tmp_path, monkeypatch):
    config.write_json(tmp_path / "c.json", {"a": 1})

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        config.write_json(tmp_path / "c.json", {"a": 2})
    assert (tmp_path / "c.json").read_text() == '{\n  "a": 1\n}\n'
