"""How devices are arranged."""

from types import SimpleNamespace

import numpy as np
import pytest

from sft_jax.errors import UserError
from sft_jax.planning.network import hosts_of
from sft_jax.sharding import _arrange_devices, make_mesh


def slices(num: int, each: int, platform: str = "cpu") -> list:
    """Devices of several slices, out of order."""
    devices = [
        SimpleNamespace(id=i, slice_index=i // each, process_index=i // each, platform=platform, device_kind="any")
        for i in range(num * each)
    ]
    return devices[::2] + devices[1::2]


@pytest.mark.smoke
def test_slices_meet_along_data_only():
    grid = _arrange_devices(slices(2, 8), (4, 2, 1, 2))
    assert grid.shape == (4, 2, 1, 2)
    of = np.vectorize(lambda device: device.slice_index)(grid)
    assert np.array_equal(of[:2], np.zeros((2, 2, 1, 2)))
    assert np.array_equal(of[2:], np.ones((2, 2, 1, 2)))
    assert sorted(device.id for device in grid.flat) == list(range(16))
    with pytest.raises(UserError, match=r"mesh.data: 1 is not a multiple of the 2 slices.*use mesh.data=2"):
        _arrange_devices(slices(2, 8), (1, 16, 1, 1))


@pytest.mark.smoke
def test_gpus_of_several_hosts_are_one_network():
    """Any axis may cross hosts, and the outer ones do; for plan, TPUs of a slice are on one."""
    gpus = _arrange_devices(slices(2, 4, "gpu"), (1, 4, 1, 2))
    assert [device.id for device in gpus.flat] == list(range(8))
    mesh = SimpleNamespace(devices=gpus)
    assert hosts_of(mesh) == [0] * 4 + [1] * 4
    mesh.devices = np.asarray(slices(2, 4, "tpu"))
    assert hosts_of(mesh) == [0] * 8


@pytest.mark.smoke
def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"data 3 × fsdp 1 × sequence 1 × tensor 1 needs 3 devices, but there are 8"):
        make_mesh(3, 1)
    assert make_mesh(2, -1, 2, 1).shape == {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}
