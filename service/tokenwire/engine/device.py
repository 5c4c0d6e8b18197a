"""Which device serves, and why: a CUDA device that was asked for or nothing; with `auto`, CUDA where it can be used."""

from __future__ import annotations

from dataclasses import dataclass

from tokenwire import _native
from tokenwire.config import Settings
from tokenwire.errors import NoDeviceError


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What to try.

    Attributes:
        device: `cpu` or `cuda:N`.
        reason: why, for the log.
        may_fall_back: whether the CPU may serve if the device turns out to be unusable; never after CUDA was asked for.
    """

    device: str
    reason: str
    may_fall_back: bool = False


def choose_device(settings: Settings) -> DeviceChoice:
    """Decides from what the driver says; no device is touched.

    Raises:
        NoDeviceError: a CUDA device was asked for and is not there.
    """
    if settings.device == "cpu":
        return DeviceChoice("cpu", "asked for")
    probe = _native.cuda_probe()
    wanted = settings.cuda_device
    if wanted is None:
        return _choose_automatically(probe)
    if probe.error:
        raise NoDeviceError(f"device {wanted} is not usable: {probe.error}; `--device cpu` serves without CUDA")
    found = {f"cuda:{device.index}": device for device in probe.devices}
    if wanted not in found:
        raise NoDeviceError(f"device {wanted} is not there; this machine has {', '.join(found)}")
    return DeviceChoice(wanted, f"asked for; {describe(found[wanted])}")


def _choose_automatically(probe: _native.CudaProbe) -> DeviceChoice:
    if probe.error:
        return DeviceChoice("cpu", f"CUDA is not usable: {probe.error}")
    supported = [device for device in probe.devices if device.sm >= _native.LEAST_SM]
    if not supported:
        found = ", ".join(describe(device) for device in probe.devices)
        return DeviceChoice("cpu", f"no CUDA device has compute capability 8.0 or newer: {found}")
    return DeviceChoice(f"cuda:{supported[0].index}", f"CUDA is usable; {describe(supported[0])}", may_fall_back=True)


def describe(device: _native.CudaDevice) -> str:
    """A device in a few words."""
    memory = f"{device.total_bytes / 2**30:.1f} GiB"
    return f"{device.name}, compute capability {device.sm // 10}.{device.sm % 10}, {memory}"
