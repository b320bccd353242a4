"""The choice of the device."""

from __future__ import annotations

import pytest
import torch

from utils.dist.context import choose_device
from utils.errors import UserError


def test_choose_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: .*no GPU"):
        choose_device("cuda")
    with pytest.raises(UserError, match="--gpu 0: .*no GPU"):
        choose_device("auto", gpu=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("auto", gpu=1) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--gpu 2: .*0 to 1"):
        choose_device("cuda", gpu=2)
