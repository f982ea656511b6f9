"""The mesh and the table of axis names: what is refused, and how names become splits."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deepasmr_jax import sharding


def test_axis_names_become_mesh_axes():
    assert sharding.spec("batch", "frames", None) == PartitionSpec(("slice", "data"), None, None)
    assert sharding.spec("embed", "mlp") == PartitionSpec("data", "model")


@pytest.mark.parametrize(
    "names, words",
    [
        (("batch", "time"), "unknown axis name 'time'; known: batch"),
        (("batch", "embed"), "a mesh axis twice"),
    ],
)
def test_wrong_axis_names_are_refused(names, words):
    with pytest.raises(ValueError, match=words):
        sharding.spec(*names)


def tpus(slices):
    """Stand-ins for slices of 2 x 2 TPU chips with one core each."""
    chips = [(i, x, y) for i in range(slices) for y in range(2) for x in range(2)]
    names = dict(platform="tpu", device_kind="TPU v6 lite", core_on_chip=0)
    return [
        types.SimpleNamespace(slice_index=i, coords=(x, y, 0), id=n, process_index=i, **names)
        for n, (i, x, y) in enumerate(chips)
    ]


def test_only_the_first_axis_of_the_mesh_runs_between_tpu_slices():
    for shape in ((2, 4, 1), (2, 2, 2), (4, 2, 1)):
        grid = sharding._grid(shape, tpus(2))
        assert grid.shape == shape and len({d.id for d in grid.flat}) == 8
        assert [len({d.slice_index for d in row.flat}) for row in grid] == [1] * shape[0]
    assert sharding._grid((1, 4, 1), tpus(1)).shape == (1, 4, 1)
    with pytest.raises(ValueError, match="of 2 TPU slices, mesh.slice is 1; set mesh.slice=2"):
        sharding._grid((1, 8, 1), tpus(2))


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match=f"mesh 2x8x1 needs 16 devices, found {jax.device_count()}; lower"):
        sharding.make_mesh(2, 8, 1)


def test_a_size_that_the_mesh_does_not_divide_is_refused():
    sharding.make_mesh(1, 2, 4)
    sharding.check_fits(("width", 6, "data"), ("heads", 4, "model"))
    with pytest.raises(ValueError, match=r"model of size 4 does not divide 6 \(heads\); use a divisor of 6"):
        sharding.check_fits(("width", 6, "data"), ("heads", 6, "model"))


def test_rows_of_a_host_are_split_over_slice_and_data_and_copies_are_whole():
    sharding.make_mesh(2, 2, 2)
    x = np.arange(8.0).reshape(4, 2)
    split, whole = sharding.put({"x": x})["x"], sharding.replicate(x)
    assert {s.data.shape for s in split.addressable_shards} == {(1, 2)}
    assert {s.data.shape for s in whole.addressable_shards} == {(4, 2)}
    np.testing.assert_array_equal(split, x)
