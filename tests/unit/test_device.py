"""Which device is chosen, and the words for it, whatever this machine has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tokenwire import _native
from tokenwire.config_sources import load_settings
from tokenwire.engine.device import DeviceChoice, choose_device
from tokenwire.errors import NoDeviceError

H200 = SimpleNamespace(index=0, name="NVIDIA H200", sm=90, total_bytes=150 * 2**30)
T4 = SimpleNamespace(index=1, name="Tesla T4", sm=75, total_bytes=16 * 2**30)
A10 = SimpleNamespace(index=2, name="NVIDIA A10", sm=86, total_bytes=24 * 2**30)


def choose(monkeypatch: pytest.MonkeyPatch, found: list[Any], error: str = "", **flags: Any) -> DeviceChoice:
    monkeypatch.setattr(_native, "cuda_probe", lambda: SimpleNamespace(error=error, devices=found))
    return choose_device(load_settings(flags, environ={}))


def test_auto_takes_cuda_where_it_is_usable_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, [H200, T4])
    assert (choice.device, choice.may_fall_back) == ("cuda:0", True)
    assert "NVIDIA H200, compute capability 9.0, 150.0 GiB" in choice.reason


def test_auto_passes_over_a_device_that_there_is_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, [T4, A10]).device == "cuda:2"
    choice = choose(monkeypatch, [T4])
    assert choice.device == "cpu"
    assert "8.0 or newer: Tesla T4, compute capability 7.5" in choice.reason


def test_auto_takes_the_cpu_where_cuda_is_not_usable_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, [], "no NVIDIA driver")
    assert (choice.device, choice.reason) == ("cpu", "CUDA is not usable: no NVIDIA driver")


def test_cpu_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_probe", lambda: pytest.fail("the driver was asked"))
    assert choose_device(load_settings({"device": "cpu"}, environ={})).device == "cpu"


@pytest.mark.parametrize(
    ("flags", "found", "error", "words"),
    [
        ({"device": "cuda"}, [], "no NVIDIA driver", ["cuda:0", "no NVIDIA driver", "--device cpu"]),
        ({"device": "cuda:3"}, [H200, T4], "", ["cuda:3 is not there", "cuda:0, cuda:1"]),
        ({"gpu_device": 1}, [H200], "", ["cuda:1 is not there", "cuda:0"]),
    ],
    ids=["driver", "absent", "gpu-device"],
)
def test_cuda_that_was_asked_for_is_never_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], found: list[Any], error: str, words: list[str]
) -> None:
    with pytest.raises(NoDeviceError) as caught:
        choose(monkeypatch, found, error, **flags)
    for word in words:
        assert word in str(caught.value)


def test_a_device_that_was_asked_for_gets_no_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(monkeypatch, [H200, T4], device="cuda:1")
    assert (choice.device, choice.may_fall_back) == ("cuda:1", False)
