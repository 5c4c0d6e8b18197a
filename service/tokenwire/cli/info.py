"""`tokenwire info`: this build, this machine, the settings and limits in force, and what is in a model file."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from tokenwire import __version__, bounds
from tokenwire.cli import options
from tokenwire.cli.native import load_native
from tokenwire.cli.output import CliError, print_facts
from tokenwire.cli.settings import ConfigFile, load_or_exit, setting_origins
from tokenwire.config import Settings
from tokenwire.models import ModelSourceError, resolve

if TYPE_CHECKING:
    from tokenwire._native import CudaDevice, GgufFile

Facts = dict[str, str | int]


def info(
    model: Annotated[
        str | None, typer.Option(help="Describe this model file too: a path, or a name that was pulled.")
    ] = None,
    config: ConfigFile = None,
    as_json: options.Json = False,
) -> None:
    """Show the build, the machine, every setting with its origin, the limits of a request, and a model file's facts."""
    build = build_facts()
    settings = load_or_exit(config, {})
    origins = setting_origins(config, settings, os.environ)
    values = {name: {"value": getattr(settings, name), "origin": origin} for name, origin in origins.items()}
    model_facts = _model_facts(model) if model is not None else None
    limits = request_limits(settings)
    if as_json:
        report = {"build": build, "settings": values, "limits": limits, "model": model_facts}
        print(json.dumps(report, ensure_ascii=False))
        return
    print_facts([(name, _shown(value)) for name, value in build.items()], "Build")
    print()
    print_facts([(name, _shown(entry["value"]), entry["origin"]) for name, entry in values.items()], "Settings")
    print()
    print_facts(list(limits.items()), "Limits of a request")
    if model_facts is not None:
        print()
        print_facts([(name, _shown(value)) for name, value in model_facts.items()], "Model")


app = options.command_app(info)


def build_facts() -> Facts:
    """Version, compiler and capabilities of the engine that is installed.

    Raises:
        CliError: the compiled engine is missing or cannot be loaded.
    """
    native = load_native()
    built = native.build_info()
    probe = native.cuda_probe()
    devices = {f"cuda:{device.index}": _device_line(device) for device in probe.devices}
    return {
        "version": __version__,
        "commit": built["commit"],
        "compiler": built["compiler"],
        "build type": built["build_type"],
        "sanitizer": built["sanitizer"] or "none",
        "CPU kernels": built["isas"],
        "CPU kernels used here": native.cpu_isa(),
        "CUDA": probe.error or f"available (runtime {probe.runtime_version}, driver {probe.driver_version})",
        **devices,
    }


def request_limits(settings: Settings) -> dict[str, str]:
    """Every field of a request with its bounds, as they are under these settings."""
    limits = {
        field: f"{least} to {most}; unset: {default}" for field, least, most, default in bounds.number_bounds(settings)
    }
    limits.update(bounds.other_bounds(settings))
    return {field.replace("`", ""): bound.replace("`", "") for field, bound in limits.items()}


def build_line() -> str:
    """The build in a few words, also where the engine cannot be loaded."""
    try:
        native = load_native()
    except CliError as error:
        return error.cause
    built = native.build_info()
    return (
        f"commit {built['commit']}, {built['compiler']}, {built['build_type']}, {native.cpu_isa()}, "
        f"CUDA: {native.cuda_status()}"
    )


def _device_line(device: CudaDevice) -> str:
    return f"{device.name}, compute capability {device.sm // 10}.{device.sm % 10}, {device.total_bytes / 2**30:.1f} GiB"


def _shown(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _model_facts(model: str) -> Facts:
    file = _open(model)
    architecture = str(file.get("general.architecture") or "unknown")

    def number(key: str) -> int:
        value = file.get(f"{architecture}.{key}")
        return value if isinstance(value, int) else 0

    tensors = file.tensors()
    bytes_by_type: Counter[str] = Counter()
    num_weights = 0
    for tensor in tensors:
        bytes_by_type[tensor.type] += tensor.num_bytes
        count = 1
        for extent in tensor.shape:
            count *= extent
        num_weights += count
    formats = ", ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in bytes_by_type.most_common())
    vocabulary = file.get("tokenizer.ggml.tokens")
    return {
        "file": file.path,
        "size": f"{file.num_bytes / 2**20:,.1f} MiB",
        "name": str(file.get("general.name") or ""),
        "architecture": architecture,
        "licence": str(file.get("general.license") or ""),
        "parameters": f"{num_weights / 1e6:,.1f} M in {len(tensors)} tensors",
        "formats": formats,
        "layers": number("block_count"),
        "embedding": number("embedding_length"),
        "heads": f"{number('attention.head_count')} ({number('attention.head_count_kv')} KV)",
        "context": f"{number('context_length'):,} tokens",
        "tokenizer": str(file.get("tokenizer.ggml.model") or "none"),
        "vocabulary": len(vocabulary) if isinstance(vocabulary, list) else 0,
        "chat template": "yes" if file.get("tokenizer.chat_template") else "no",
    }


def _open(model: str) -> GgufFile:
    native = load_native()
    try:
        file: GgufFile = native.GgufFile(str(resolve(model)))
    except (ModelSourceError, native.EngineError) as error:
        raise CliError(str(error)) from error
    return file
