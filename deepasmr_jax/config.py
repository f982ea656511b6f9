"""Config files and the command line: load, override, check, write.

A config is a frozen dataclass made of frozen dataclasses. A config file holds values only and has one
function `get_config()`; a file with several stages takes the stage's name, as in
`--config=configs/mini.py:lm`. `override` walks the fields by name (`data.batch_size=8`), parses the text with
the field's type and answers a wrong name with the nearest right one. `to_dict` and `from_dict` are the JSON
form, `differences` names what differs.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

from deepasmr_jax import files


def load(path: str):
    """The config returned by the `get_config` of a Python file.

    Args:
        path: `configs/tiny.py`, or `configs/mini.py:lm` to hand "lm" to `get_config`.

    Raises:
        ValueError: if the file or its `get_config` does not exist, or the stage is refused.
    """
    file, _, stage = path.partition(":")
    if not os.path.isfile(file):
        raise ValueError(
            f"no config file {file!r}; give one such as configs/NAME.py or configs/NAME.py:STAGE"
        )
    name = f"deepasmr_config_{Path(file).stem}"
    module_spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses of the file find their annotations through it
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file} has no function get_config()")
    return module.get_config(stage) if stage else module.get_config()


def override(cfg, *assignments: str):
    """A copy of `cfg` with fields changed, checked as a whole: fields that depend on each other may come in any order.

    Args:
        cfg: a dataclass instance.
        assignments: each such as `optim.lr=1e-4`, of one field the last one counts; tuples are written
            `styles=normal,asmr`.

    Raises:
        ValueError: on a missing `=`, a field that does not exist, a text that is not of the field's type, or a
            value that the config refuses.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} has no '='; write for example --set optim.lr=1e-4")
        *groups, name = path.strip().split(".")
        owner, inner = cfg, changes
        for group in groups:
            owner = getattr(owner, _field(owner, group, path).name)
            inner = inner.setdefault(group, {})
        inner[name] = _value(owner, name, text.strip(), path.strip())
    return _replace(cfg, changes)


def _field(cfg, name: str, path: str) -> dataclasses.Field:
    """The field of that name."""
    if not dataclasses.is_dataclass(cfg):
        raise ValueError(
            f"--set {path}: nothing is inside a {type(cfg).__name__}; shorten the name by .{name}"
        )
    fields = {f.name: f for f in dataclasses.fields(cfg)}
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
        raise ValueError(f"--set {path}: {type(cfg).__name__} has no field {name!r}; {hint}")
    return fields[name]


def _value(cfg, name: str, text: str, path: str):
    """The text as a value of that field."""
    value = getattr(cfg, _field(cfg, name, path).name)
    if dataclasses.is_dataclass(value):
        inner = ", ".join(f.name for f in dataclasses.fields(value))
        raise ValueError(f"--set {path}: is a group of settings; set one of them: {inner}")
    hint = typing.get_type_hints(type(cfg))[name]
    if hint is Any:
        hint = type(value) if value is not None else Any
    return _parse(text, hint, path)


def _replace(cfg, changes: dict[str, Any]):
    """`dataclasses.replace` through nested groups."""
    new = {}
    for name, value in changes.items():
        old = getattr(cfg, name)
        new[name] = _replace(old, value) if dataclasses.is_dataclass(old) else value
    return dataclasses.replace(cfg, **new)


def _parse(text: str, hint, path: str):
    """Text to a value of the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in args and text.lower() in ("none", ""):
            return None
        errors = []
        for arg in args:
            if arg is not type(None):
                try:
                    return _parse(text, arg, path)
                except ValueError as error:
                    errors.append(str(error))
        raise ValueError("; ".join(errors))
    if origin is typing.Literal:
        if text not in map(str, args):
            near = difflib.get_close_matches(text, map(str, args), 1)
            hint_text = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, args))}"
            raise ValueError(f"--set {path}={text!r}: {hint_text}")
        return next(a for a in args if str(a) == text)
    if hint is tuple or origin is tuple:
        if text[:1] in "([":
            return _freeze(_literal(text, path))
        parts = [p.strip() for p in text.split(",") if p.strip()]
        kinds = args if args and args[-1] is not Ellipsis else [args[0] if args else str] * len(parts)
        if len(kinds) != len(parts):
            raise ValueError(f"--set {path}={text!r}: {len(kinds)} values expected, found {len(parts)}")
        return tuple(_parse(p, k, path) for p, k in zip(parts, kinds, strict=True))
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"--set {path}={text!r}: write true or false")
        return text.lower() in ("true", "1")
    if hint is str:
        return text
    if hint in (int, float):
        try:
            number = float(text) if hint is float else int(text)
        except ValueError:
            try:
                number = hint(float(text))
            except (ValueError, OverflowError):
                number = None
            if number is None or number != float(text):
                kind = "whole number" if hint is int else "number"
                raise ValueError(f"--set {path}={text!r}: a {kind} is expected") from None
        return number
    try:
        return _freeze(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def _literal(text: str, path: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"--set {path}={text!r}: not a Python tuple of numbers or quoted strings") from None


def _freeze(value):
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def to_dict(cfg) -> Any:
    """The JSON form of a config: dataclasses to dicts, tuples to lists, dtypes to their names.

    Raises:
        ValueError: on a value that has no JSON form, such as a function.
    """
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return {f.name: to_dict(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    if isinstance(cfg, dict):
        return {str(k): to_dict(v) for k, v in cfg.items()}
    if isinstance(cfg, list | tuple):
        return [to_dict(v) for v in cfg]
    if cfg is None or isinstance(cfg, bool | int | float | str):
        return cfg
    try:
        return np.dtype(cfg).name
    except TypeError:
        raise ValueError(f"a config cannot hold a {type(cfg).__name__}: {cfg!r}") from None


def from_dict(cls: type, values: dict):
    """A config of class `cls` from its JSON form; fields that are absent keep their default.

    Raises:
        ValueError: naming every unknown field, every field without default that is missing, and every value of
            another type than its field.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    name_of_class = f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and name not in values
    )
    if unknown or missing:
        raise ValueError(
            f"{name_of_class}: unknown fields {unknown}, "
            f"missing fields {missing}; the file was written for another version of this config"
        )
    found = {name: _thaw(value, hints[name]) for name, value in values.items()}
    if wrong := [f"{k} is {v!r}" for k, v in found.items() if not _fits(v, hints[k])]:
        name = wrong[0].split()[0]
        kind = getattr(hints[name], "__name__", hints[name])
        raise ValueError(f"{name_of_class}: {', '.join(wrong)}; correct the file, {name} is of type {kind}")
    return cls(**found)


def _fits(value, hint) -> bool:
    """Whether a value is of the type that a field's hint names; unusual hints are taken on trust."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint in (bool, int, float, str, types.NoneType):
        return isinstance(value, hint)
    if hint is tuple or origin is tuple:
        if not isinstance(value, tuple) or not args:
            return isinstance(value, tuple)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    return True


def _thaw(value, hint):
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value)
    args = typing.get_args(hint)
    if isinstance(value, dict):
        inner = [a for a in args if dataclasses.is_dataclass(a)]
        return from_dict(inner[0], value) if inner else value
    if isinstance(value, list):
        item = args[0] if args and typing.get_origin(hint) is tuple else Any
        return tuple(_thaw(v, item) for v in value)
    if hint is float and isinstance(value, int):
        return float(value)
    return value


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `model.width: 256 -> 512`, one per field that differs between two JSON forms.

    Args:
        old, new: from `to_dict`; a field that one of them lacks counts as "(absent)".
        path: put before the names of the fields.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(set(old) | set(new)):
            inner = f"{path}.{name}" if path else name
            lines += differences(old.get(name, "(absent)"), new.get(name, "(absent)"), inner)
        return lines
    return [] if old == new else [f"{path}: {old} -> {new}"]


def write_json(path: str | os.PathLike, value: dict) -> None:
    """Writes a dict as JSON, whole or not at all; missing folders are made."""
    files.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
