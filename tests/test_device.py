"""Which device a run gets, and which devices are refused."""

import pytest
import torch
from source_files import library_files

from errors import UserError
from runtime.device import pick_device, refuse_gpus_without_kernels


def test_a_missing_gpu_is_no_crash():
    if not torch.cuda.is_available():
        assert pick_device("cuda").type == "cpu"


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "meta", "cpu:1", "cuda:99", "cuda:", "cuda:²", "cuda:-1", "", "cuda:" + "9" * 5000]
)
def test_a_device_that_is_not_supported_or_not_there_is_refused(name):
    with pytest.raises(UserError, match=r"^`device` .*use (`device`|cuda or) cpu") as told:
        pick_device(name)
    assert len(str(told.value)) < 150


def test_one_place_asks_whether_there_is_a_gpu():
    """All else goes by the device of the run, which may be the CPU of a machine that
    has one.
    """
    asking = {
        path.name: count for path in library_files() if (count := path.read_text().count("cuda.is_available"))
    }
    assert asking == {"device.py": 1}


def test_a_gpu_too_old_for_this_torch_is_named():
    refuse_gpus_without_kernels((9, 0), ["sm_75", "sm_80", "sm_90a", "compute_120"])
    refuse_gpus_without_kernels((7, 0), ["sm_50", "sm_70"])
    with pytest.raises(UserError, match=r"7\.0 .*cu126"):
        refuse_gpus_without_kernels((7, 0), ["sm_75", "sm_80"])
