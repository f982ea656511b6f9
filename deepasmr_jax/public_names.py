"""Which tensor of a public weight file becomes which parameter of ours: one table a model, and the conversion by it.

A table is {parameter of ours: Source}. It is read in both directions: `to_ours` converts a file for us, `to_theirs`
writes ours under the public names. Every tensor of a file must be used or named as ignored, every parameter of ours
must be given. Some files are first brought into a plain form: norms of weights folded, tied copies left out.
Tables know nothing of files (`weight_files.py`) or of modules: they take a model's Config and give names.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array of the file is turned into ours and back; views, nothing is copied."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


LAYOUTS = {  # what PyTorch stores -> what ours is
    "same": Layout(lambda x: x, lambda x: x),
    "linear": Layout(lambda x: x.T, lambda x: x.T),  # (out, in) -> (in, out)
    # (o, i, k) -> (k, i, o)
    "conv1d": Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)),
    "conv2d": Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # -> (h, w, i, o)
    # (in, out, k) -> (k, in, out), reversed along k: ours is run as a convolution of the input with zeros between
    "conv_transpose1d": Layout(lambda x: x.transpose(2, 0, 1)[::-1], lambda x: x[::-1].transpose(1, 2, 0)),
    "depthwise": Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # (channels, 1, k) -> (k, channels)
    "conv1x1": Layout(lambda x: x[..., 0].T, lambda x: x.T[..., None]),  # (out, in, 1) -> (in, out)
    # (out, in, k, 1) -> (k, in, out): a two-dimensional convolution along one axis
    "column": Layout(lambda x: x[..., 0].transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)[..., None]),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        names: one tensor; or several of one shape, which are stacked as the first axis of the parameter.
        layout: key of `LAYOUTS`.
    """

    names: str | tuple[str, ...]
    layout: str = "same"


Table = dict[str, Source]


def affine(table: Table, ours: str, theirs: str, layout: str = "conv1d", weight: str = "kernel") -> None:
    """Enter `theirs`.weight as `ours`.`weight`, in this layout, and `theirs`.bias as `ours`.bias."""
    table[f"{ours}.{weight}"] = Source(f"{theirs}.weight", layout)
    table[f"{ours}.bias"] = Source(f"{theirs}.bias")


def to_ours(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    ignored: Iterable[str] = (),
    absent: Iterable[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Converts the tensors of a file, one parameter at a time, after all names and shapes were checked.

    Args:
        table: the model's table.
        tensors: the file by name; arrays may be memory-mapped.
        shapes: shape of every parameter of ours, see `checkpoint.named_arrays`.
        source: where the tensors come from, for the message.
        ignored: regular expressions of whole names that the file may have and that we do not use.
        absent: parameters of ours that this kind of file never has; the caller keeps their initial values.

    Returns:
        An iterator of (parameter, array), in the order of `shapes`, without those that are absent.

    Raises:
        ValueError: one error that lists all missing, unexpected and reshaped tensors.
    """
    absent = set(absent)
    if absent - set(shapes) or absent & set(table):
        raise KeyError(f"{sorted(absent - set(shapes) | absent & set(table))} cannot be absent")
    shapes = {name: shape for name, shape in shapes.items() if name not in absent}
    problems = differences(table, tensors, shapes, ignored)
    if problems:
        raise ValueError(f"{source} does not fit: {problems}; the file belongs to another model or version")
    return _converted(table, tensors, shapes)


def differences(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    most: int | None = None,
) -> str:
    """Missing, unexpected and reshaped tensors in one sentence; empty if the file fits.

    Args:
        table, tensors, shapes, ignored: as for `to_ours`.
        most: so many of each kind are named, and the others counted; None: all are named.

    Raises:
        KeyError: if table and module do not name the same parameters, which is our own mistake.
    """
    if set(table) != set(shapes):
        raise KeyError(f"the table and the module differ in {sorted(set(table) ^ set(shapes))[:8]}")
    used = {name for s in table.values() for name in source_names(s)}
    missing = sorted(used - set(tensors))
    unexpected = sorted(
        name for name in set(tensors) - used if not any(re.fullmatch(p, name) for p in ignored)
    )
    reshaped = []
    for parameter, s in table.items():
        names = source_names(s)
        wanted = tuple(shapes[parameter])
        wanted = wanted if isinstance(s.names, str) else wanted[1:]
        if not isinstance(s.names, str) and len(names) != shapes[parameter][0]:
            raise KeyError(f"{parameter} has {shapes[parameter][0]} layers, its table {len(names)}")
        theirs = tuple(LAYOUTS[s.layout].to_theirs(np.broadcast_to(np.int8(0), wanted)).shape)
        for name in names:
            if name in tensors and tuple(tensors[name].shape) != theirs:
                reshaped.append(f"{name} {tuple(tensors[name].shape)} instead of {theirs}")
    parts = [("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)]

    def named(found: list[str]) -> str:
        left = len(found[most:]) if most is not None else 0
        return ", ".join(found[:most]) + (f" and {left} more" if left else "")

    return ", ".join(f"{len(found)} {what} ({named(found)})" for what, found in parts if found)


def to_theirs(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters under their public names and layouts: the inverse of `to_ours`."""
    out = {}
    for parameter, s in table.items():
        each = [arrays[parameter]] if isinstance(s.names, str) else arrays[parameter]
        for name, x in zip(source_names(s), each, strict=True):
            out[name] = np.ascontiguousarray(LAYOUTS[s.layout].to_theirs(np.asarray(x)))
    return out


def fold_weight_norm(
    tensors: Mapping[str, np.ndarray], kept_axis: Callable[[str], int] = lambda name: 0
) -> dict[str, np.ndarray]:
    """Gain and direction of a weight norm as one `weight`; other tensors stay as they are.

    Args:
        tensors: with `NAME.weight_g` and `.weight_v`, or `NAME.parametrizations.weight.original0` and `1`.
        kept_axis: for a NAME, the axis that the gain goes along; the norm is over all others.
    """
    out = {}
    for name, x in tensors.items():
        for gain, direction in (
            ("weight_g", "weight_v"),
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        ):
            if name.endswith("." + direction):
                stem = name.removesuffix("." + direction)
                if f"{stem}.{gain}" in tensors:
                    v, g = np.asarray(x, np.float32), np.asarray(tensors[f"{stem}.{gain}"], np.float32)
                    axes = tuple(a for a in range(v.ndim) if a != kept_axis(stem))
                    norm = np.sqrt(np.sum(np.square(v, dtype=np.float64), axis=axes, keepdims=True))
                    out[f"{stem}.weight"] = (v * (g.reshape(norm.shape) / norm)).astype(np.float32)
                    break
            if name.endswith("." + gain) and f"{name.removesuffix(gain)}{direction}" in tensors:
                break
        else:
            out[name] = x
    return out


def fold_spectral_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a spectral norm as evaluation uses them; other tensors stay as they are.

    `NAME.weight_orig` becomes `NAME.weight = W / (u . (W v))`, W flattened to (out, rest), with the stored
    vectors `weight_u` and `weight_v` and no further power iteration.
    """
    out = {}
    for name, x in tensors.items():
        stem, _, last = name.rpartition(".")
        if f"{stem}.weight_orig" not in tensors or last not in ("weight_orig", "weight_u", "weight_v"):
            out[name] = x
        elif last == "weight_orig":
            u, v = (np.asarray(tensors[f"{stem}.weight_{k}"], np.float64).reshape(-1) for k in "uv")
            w = np.asarray(x, np.float64)
            out[f"{stem}.weight"] = (w / (u @ (w.reshape(len(u), -1) @ v))).astype(np.float32)
    return out


def without_copy(tensors: Mapping[str, np.ndarray], copy: str, original: str) -> dict[str, np.ndarray]:
    """The tensors without `copy`, which must be absent or equal to `original` (a tied output matrix).

    Raises:
        ValueError: if the two differ: then the copy holds weights of its own, which we would lose.
    """
    if copy in tensors and original in tensors:
        x, y = tensors[copy], tensors[original]
        if x is not y and not (x.shape == y.shape and np.array_equal(x, y)):
            raise ValueError(
                f"{copy} differs from {original}; it should be a tied copy, so the file belongs to another model"
            )
    return {name: x for name, x in tensors.items() if name != copy}


def source_names(source: Source) -> tuple[str, ...]:
    return (source.names,) if isinstance(source.names, str) else source.names


def _converted(table: Table, tensors, shapes) -> Iterator[tuple[str, np.ndarray]]:
    for parameter in shapes:
        s = table[parameter]
        turn = LAYOUTS[s.layout].to_ours
        if isinstance(s.names, str):
            yield parameter, turn(np.asarray(tensors[s.names]))
        else:
            yield parameter, np.stack([turn(np.asarray(tensors[name])) for name in s.names])


NO_COUNTS = (r".*\.num_batches_tracked",)  # to be ignored in files of models with batch norm
