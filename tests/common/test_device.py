"""Where the networks run."""

import pytest
import torch

from pe_app.common.device import best_device
from pe_app.common.errors import InputError


def test_the_environment_names_the_device(monkeypatch):
    monkeypatch.setenv("PE_DEVICE", "cpu")
    assert best_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["toaster", "cuda:9"])
def test_a_device_that_torch_cannot_use_is_bad_input(monkeypatch, name):
    monkeypatch.setenv("PE_DEVICE", name)
    with pytest.raises(InputError, match=f"device {name}: .*choose cpu"):
        best_device()
