"""What a compiled program does, counted from its text: products, memory traffic and collectives, loops included.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; the stacked layers of a model are
such a loop. This reader walks the computations from the entry and multiplies by the trip counts that the compiler
wrote beside its loops. It knows the text of XLA's CPU and TPU backends; of the GPU's only products (cuBLAS, cuDNN,
Triton), by the form in XLA's tests, without the gradients of convolutions, and untried on a GPU.

What is counted: FLOPs of matrix products and convolutions (2 per multiply-add, positions outside the input left
out), as element-wise work runs on another unit; bytes between HBM and the chip, where an instruction reads its
operands and writes its result once, a slice costs the slice, an update in place the update, and buffers that the
compiler placed in on-chip memory nothing; bytes that a chip receives in each kind of collective.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16}
_ITEM_BITS |= {
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
}
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}
_FREE |= {"opt-barrier", "optimization-barrier", "domain", "add-dependency", "get-dimension-size"}
_SLICES = ("dynamic-slice", "slice", "gather")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? ?\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)\s*$")


@dataclasses.dataclass
class Cost:
    """Work of one chip in one run of a program.

    flops: of products. hbm_bytes: read and written. received: bytes by kind of collective. unknown_loops: loops
    without a stated trip count.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    received: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This cost and `times` times another one."""
        kinds = dict.fromkeys([*self.received, *other.received])
        return Cost(
            self.flops + times * other.flops,
            self.hbm_bytes + times * other.hbm_bytes,
            {k: self.received.get(k, 0.0) + times * other.received.get(k, 0.0) for k in kinds},
            self.unknown_loops + other.unknown_loops,
        )


@dataclasses.dataclass
class _Instruction:
    name: str
    kind: str
    shapes: list[tuple[str, tuple[int, ...], bool]]  # of the result: type, sizes, whether it lies in HBM
    operands: list[str]
    rest: str  # the attributes
    is_root: bool


def count(text: str, unknown_trips: int = 1) -> Cost:
    """Cost of a compiled program.

    Args:
        text: its HLO, as `jax.stages.Compiled.as_text()` gives it.
        unknown_trips: how often a loop runs whose end depends on what it computes.

    Raises:
        ValueError: if there is no entry computation in the text.
    """
    reader = _Reader(text, unknown_trips)
    if reader.entry is None:
        raise ValueError(f"no entry computation in {len(text)} characters of text; give the HLO of a program")
    return reader.cost(reader.entry)


def _split(text: str) -> tuple[str, str]:
    """(the text up to the end of its first parenthesis, the rest)."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _parse(line: str) -> _Instruction | None:
    found = _LINE.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    kind_of_result, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    kind, _, rest = rest.strip().partition("(")
    inside, rest = _split("(" + rest)
    shapes = []
    for item, sizes, layout in _SHAPE.findall(kind_of_result):
        place = re.search(r"S\((\d+)\)", layout or "")
        numbers = tuple(int(n) for n in sizes.split(",") if n)
        shapes.append((item, numbers, place is None or place.group(1) == "0"))
    operands, depth, start = [], 0, 1
    for i in range(1, len(inside)):  # at the commas outside brackets; an operand may carry its shape
        depth += (inside[i] in "([{") - (inside[i] in ")]}")
        if (inside[i] == "," and depth == 0) or i == len(inside) - 1:
            operand = _NAME.search(inside[start:i])
            operands += [operand.group(1)] if operand else []
            start = i + 1
    return _Instruction(name, kind, shapes, operands, inside + rest, bool(root))


def _bytes(shapes, only_hbm: bool = True) -> float:
    return sum(
        _ITEM_BITS.get(item, 8) / 8 * math.prod(sizes)
        for item, sizes, is_hbm in shapes
        if is_hbm or not only_hbm
    )


class _Reader:
    """The computations of a program by name, each a dict of instructions by name, and their costs."""

    def __init__(self, text: str, unknown_trips: int):
        self.unknown_trips = unknown_trips
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = None
        current = None
        for line in text.splitlines():
            head = None if line.startswith(" ") else _HEAD.match(line)
            if head:
                current = self.computations.setdefault(head.group(2), {})
                self.entry = head.group(2) if head.group(1) else self.entry
            elif current is not None and (instruction := _parse(line)):
                current[instruction.name] = instruction
        self.cost = functools.cache(self._cost)
        self.read = functools.cache(self._read)
        self.inner = functools.cache(self._inner)

    def _cost(self, name: str) -> Cost:
        """Cost of a computation that is run as it stands: the entry, a loop's body, a branch."""
        total = Cost()
        for x in self.computations[name].values():
            total = total.plus(self._one(name, x))
        return total

    def _one(self, where: str, x: _Instruction) -> Cost:
        names = self.computations[where]
        operands = [names[o] for o in x.operands if o in names]
        if x.kind in _FREE or x.kind.endswith(("-done", "-update")) or '"AllocateBuffer"' in x.rest:
            return Cost()
        if x.kind == "while":
            trips, body = self._trips(where, x), self._called(x, "body")
            start = Cost(unknown_loops=int(trips is None))
            return start.plus(self.cost(body), self.unknown_trips if trips is None else trips)
        if x.kind == "conditional":
            branches = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", x.rest)
            listed = re.search(r"branch_computations=\{([^}]*)\}", x.rest)
            branches += [b.strip().lstrip("%") for b in listed.group(1).split(",")] if listed else []
            return max((self.cost(b) for b in branches), key=lambda c: (c.flops, c.hbm_bytes), default=Cost())
        called = _CALLED.search(x.rest)
        if x.kind in ("call", "async-start") and called:
            return self.cost(called.group(1))
        out = Cost(hbm_bytes=self._traffic(x, operands, called and called.group(1)))
        kind = x.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            return out.plus(Cost(received={kind: _received(kind, x, operands)}))
        if x.kind == "fusion":
            return out.plus(self.inner(called.group(1)))
        if x.kind in ("dot", "convolution"):
            return out.plus(Cost(flops=_product_flops(x, operands)))
        if x.kind == "custom-call":
            return out.plus(Cost(flops=_kernel_flops(x, operands)))
        return out

    @staticmethod
    def _called(x: _Instruction, role: str) -> str:
        return re.search(rf"{role}=%?([\w.\-]+)", x.rest).group(1)

    def _trips(self, where: str, x: _Instruction) -> int | None:
        """How often a loop runs: as stated (CPU), or a counter that grows to a constant (TPU); None if unknown."""
        if stated := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', x.rest):
            return int(stated.group(1))
        names = self.computations[self._called(x, "condition")]
        root = next((y for y in names.values() if y.is_root), None)
        if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
            return None
        counter, end = names.get(root.operands[0]), self._constant(names, root.operands[1])
        if counter is None or counter.kind != "get-tuple-element" or end is None:
            return None
        place = int(re.search(r"index=(\d+)", counter.rest).group(1))
        state = self.computations[where].get(x.operands[0])
        begin = (
            self._constant(self.computations[where], state.operands[place]) if state.kind == "tuple" else None
        )
        body = self.computations[self._called(x, "body")]
        root = next(y for y in body.values() if y.is_root)
        new = body.get(root.operands[place]) if root.kind == "tuple" else None
        steps = (
            [self._constant(body, o) for o in new.operands] if new is not None and new.kind == "add" else []
        )
        step = next((n for n in steps if n), 1)
        return max(0, -(-(end - (begin or 0)) // step))

    @staticmethod
    def _constant(names: dict[str, _Instruction], name: str) -> int | None:
        """The value of an integer constant, also through copies."""
        x = names.get(name)
        while x is not None and x.kind in ("copy", "bitcast", "copy-start", "copy-done") and x.operands:
            x = names.get(x.operands[0])
        found = re.match(r"\((-?\d+)\)", x.rest) if x is not None and x.kind == "constant" else None
        return int(found.group(1)) if found else None

    def _inner(self, name: str) -> Cost:
        """Products and collectives inside a fusion, whose memory traffic is that of its ends."""
        total, names = Cost(), self.computations[name]
        for x in names.values():
            operands = [names[o] for o in x.operands if o in names]
            kind = x.kind.removesuffix("-start")
            if x.kind in ("dot", "convolution"):
                total.flops += _product_flops(x, operands)
            elif kind in COLLECTIVES:
                users = [y for y in names.values() if x.name in y.operands]
                if kind == "all-reduce" and users and all(y.kind == "dynamic-slice" for y in users):
                    kind = "reduce-scatter"  # as the TPU backend writes it
                total = total.plus(Cost(received={kind: _received(kind, x, operands)}))
            elif x.kind in ("fusion", "call", "async-start") and (called := _CALLED.search(x.rest)):
                total = total.plus(self.inner(called.group(1)))
        return total

    def _traffic(self, x: _Instruction, operands: list[_Instruction], called: str | None) -> float:
        """HBM bytes read and written by one instruction."""
        if x.kind == "fusion":
            return sum(
                self.read(called, i) for i, o in enumerate(operands) if all(is_hbm for *_, is_hbm in o.shapes)
            ) + self._written(called, x)
        if x.kind in _SLICES:
            return 2 * _bytes(x.shapes)
        if x.kind == "dynamic-update-slice":
            return 2 * _bytes(operands[1].shapes)
        if x.kind == "scatter":
            return 3 * _bytes(operands[-1].shapes)
        if x.kind in ("slice-start", "dynamic-slice-start"):  # of (source, slice, context)
            return _bytes(x.shapes[1:2], only_hbm=False) + _bytes(x.shapes[1:2])
        if x.kind == "copy-start":  # of (copy, source, context)
            return _bytes(operands[0].shapes) + _bytes(x.shapes[:1])
        if x.kind.endswith("-start"):  # the result repeats the operands
            return sum(_bytes(o.shapes) for o in operands) + max((_bytes([s]) for s in x.shapes), default=0.0)
        return sum(_bytes(o.shapes) for o in operands) + _bytes(x.shapes)

    def _read(self, name: str, index: int) -> float:
        """Bytes that a fusion reads of one operand: of one that is only sliced, the slices."""
        names = self.computations[name]
        start = next(
            (x for x in names.values() if x.kind == "parameter" and x.rest.startswith(f"({index})")), None
        )
        if start is None:
            return 0.0
        whole, total, seen = _bytes(start.shapes, only_hbm=False), 0.0, [start.name]
        while seen:
            one = seen.pop()
            for x in names.values():
                if one not in x.operands:
                    continue
                at = x.operands.index(one)
                if x.kind == "bitcast":
                    seen.append(x.name)
                elif x.kind in _SLICES and at == 0:
                    total += _bytes(x.shapes, only_hbm=False)
                elif x.kind == "dynamic-update-slice" and at == 0:
                    pass
                elif x.kind == "fusion" and (called := _CALLED.search(x.rest)):
                    total += self.read(called.group(1), at)
                else:
                    return whole
        return min(total, whole)

    def _written(self, name: str, x: _Instruction) -> float:
        """Bytes that a fusion writes: of an update in place, the update."""
        names = self.computations[name]
        root = next((y for y in names.values() if y.is_root), None)
        ends = [names.get(o) for o in root.operands] if root and root.kind == "tuple" else [root]
        total = 0.0
        for shape, end in zip(
            x.shapes, ends if len(ends) == len(x.shapes) else [None] * len(x.shapes), strict=True
        ):
            while end is not None and end.kind == "bitcast":
                end = names.get(end.operands[0])
            if end is not None and end.kind == "fusion" and (called := _CALLED.search(end.rest)):
                total += self._written(called.group(1), dataclasses.replace(end, shapes=[shape]))
            elif end is not None and end.kind == "dynamic-update-slice" and shape[2]:
                total += _bytes(names[end.operands[1]].shapes, only_hbm=False)
            else:
                total += _bytes([shape])
        return total


def _received(kind: str, x: _Instruction, operands: list[_Instruction]) -> float:
    """Bytes that each chip receives at least, in a group of g chips."""
    size = sum(_bytes(o.shapes, only_hbm=False) for o in operands)
    if kind == "collective-permute":
        return size
    group = _group(x.rest)
    if group == 1:
        return 0.0
    share = (group - 1) / group
    return {"all-gather": size * (group - 1), "all-reduce": 2 * size * share}.get(kind, size * share)


def _group(attributes: str) -> int:
    """Chips of one group of a collective, in any of the three forms that XLA writes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed.group(1).split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted.group(1))
    if named := re.search(r"replica_groups=@?[\w.]*\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))  # an axis, or a part of one
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return 1


def _product_flops(x: _Instruction, operands: list[_Instruction]) -> float:
    """FLOPs of a dot or a convolution, or of a library's kernel for one."""
    (_, out, _), (_, left, _), (_, right, _) = x.shapes[0], operands[0].shapes[0], operands[1].shapes[0]
    if x.kind == "dot" or "__cublas$" in x.rest:
        axes = re.search(r'lhs_contracting_dim\w*"?[=:][{\[]([^}\]]*)', x.rest)
        summed = [left[int(i)] for i in re.findall(r"\d+", axes.group(1))] if axes else []
        return 2.0 * math.prod(out) * math.prod(summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", x.rest) or [0, ""])[1]))
    total = 2.0 * right[labels[1].index("i")] * out[labels[2].index("b")] * out[labels[2].index("f")]
    num_axes = len(labels[0]) - 2

    def values(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * num_axes

    for i in range(num_axes):
        label = str(i)
        low = int(values("pad", "0_0")[i].split("_")[0])
        stride, spread, apart = (int(values(n, "1")[i]) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        sizes = left[labels[0].index(label)], right[labels[1].index(label)], out[labels[2].index(label)]
        total *= _pairs(*sizes, low, stride, spread, apart)
    return total


def _kernel_flops(x: _Instruction, operands: list[_Instruction]) -> float:
    """FLOPs of a kernel: as it states itself, those of a library's product, or of JAX's splash attention.

    Splash attention works on whole blocks; a causal one, which is told the place of each query, skips those above the
    diagonal.
    """
    if stated := re.search(r'"flops"\s*:\s*"?(\d+)', x.rest):
        return float(stated.group(1))
    if "__cublas$" in x.rest or "__cudnn$convForward" in x.rest:
        return _product_flops(x, operands)
    found = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", x.name)
    if not found:
        return 0.0
    shapes = [o.shapes[0] for o in operands if o.shapes]
    queries, keys = [sizes for item, sizes, _ in shapes if item == "bf16" and len(sizes) > 2][:2]
    share = 1.0
    if any(item == "s32" and len(sizes) == 2 for item, sizes, _ in shapes):  # places [N, 128] or [8, N]
        blocks = next(min(sizes[-2:]) for item, sizes, _ in shapes if item == "s8" and len(sizes) == 3)
        share = (blocks + 1) / (2 * blocks)
    # a fused backward pass also gives parts of the gradient of the queries; every backward makes the scores anew
    is_fused = any(len(sizes) > len(queries) for _, sizes, _ in x.shapes)
    products = {"fwd": 2, "dq": 3, "dkv": 5 if is_fused else 4}[found.group(1)]
    return 2.0 * products * math.prod(queries) * keys[-2] * share


@functools.cache
def _pairs(left: int, taps: int, out: int, low: int, stride: int, spread: int, apart: int) -> int:
    """Pairs of an output position and a tap that meet an input value along one axis of a convolution."""
    last, pairs = (left - 1) * spread, 0
    for tap in range(taps):
        for place in range(out):
            at = place * stride + tap * apart - low
            pairs += 0 <= at <= last and at % spread == 0
    return pairs
