"""The mesh and the table of axis names: what is refused, and how names become splits."""

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
