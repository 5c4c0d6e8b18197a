"""Scraped metrics as numbers that can be compared."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

# A sample's name and its labels in order, such as `tokenwire_request_total{code="OK",method="Execute"}`.
Samples = Mapping[str, float]


def parse(page: str) -> dict[str, float]:
    samples = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
        return parse(page.read().decode())


def changes(before: Samples, after: Samples) -> dict[str, float]:
    """What differs, by how much."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}
