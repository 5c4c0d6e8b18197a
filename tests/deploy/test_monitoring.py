"""Alerts, their tests and their runbook, and the dashboard: they name what is there, and each alert fires (A-6)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.helpers_processes import DEPLOY, ROOT
from tokenwire.errors import ERRORS
from tokenwire.observe.metrics import DECLARATIONS

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERT_TESTS = DEPLOY / "prometheus" / "alerts_test.yml"
DASHBOARD = DEPLOY / "grafana" / "tokenwire.json"
DECLARED = {item.name: item for item in DECLARATIONS}

# What Prometheus and its client library add: the scrape's own series, rule states, the process's numbers.
FOREIGN = {"up", "ALERTS", "process_resident_memory_bytes"}
FOREIGN_LABELS = {"job", "instance", "le", "alertname", "alertstate"}
WORDS = {"sum", "by", "rate", "increase", "resets", "max", "count", "and", "on", "unless", "histogram_quantile"}
WORDS |= {"min_over_time"}


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[tuple[str, str]]:
    """Panel title and expression of every query, with Grafana's variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    queries = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries.append(("annotations", dashboard["annotations"]["list"][0]["expr"]))
    return [(title, filled(expression)) for title, expression in queries]


def filled(expression: str) -> str:
    for variable, value in {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*"}.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def series_of(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every series that an expression names, with its matchers: label → pattern."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    assert bare.count("{") == bare.count("}")
    for match in re.finditer(r"\b([a-zA-Z_:][a-zA-Z0-9_:]*)\b(?:\{([^}]*)\})?", expression):
        name, matchers = match[1], match[2]
        inside = expression.count('"', 0, match.start()) % 2 or is_grouping(expression, match.start())
        if not inside and name not in WORDS and not re.fullmatch(r"[smhd]", name):
            found = re.findall(r'([a-z_]+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers or "")
            yield name, dict(found)


def is_grouping(expression: str, place: int) -> bool:
    """Whether a name stands in braces, or in the label list of `by`/`on`."""
    if expression.rfind("{", 0, place) > expression.rfind("}", 0, place):
        return True
    before = expression[:place]
    opened = before.rfind("(")
    return opened > before.rfind(")") and re.search(r"\b(by|on)\s*$", before[:opened]) is not None


def check_series(expression: str) -> None:
    found = list(series_of(expression))
    assert found, expression
    for name, matchers in found:
        if name in FOREIGN:
            continue
        item = DECLARED.get(name) or DECLARED.get(re.sub(r"_(bucket|count|sum)$", "", name))
        assert item is not None, f"{name} is not declared"
        assert (item.kind == "histogram") == (item.name != name), f"{name} of a {item.kind}"
        for label, pattern in matchers.items():
            if label in FOREIGN_LABELS:
                continue
            assert label in item.labels, f"{name} has no label {label}"
            for value in pattern.split("|"):
                assert value in item.labels[label], f"{name} never has {label}={value}"


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_an_alert_is_made_of_declared_metrics_and_points_to_its_entry(rule: dict[str, Any]) -> None:
    check_series(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


@pytest.mark.parametrize(("title", "expression"), dashboard_queries())
def test_a_panel_is_made_of_declared_metrics(title: str, expression: str) -> None:
    check_series(expression)


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, expression in dashboard_queries() for name, _ in series_of(expression)}
    shown |= {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown}
    # The second fills the variables; the others are of HTTP: one on the page of a gateway apart, which is no worker.
    http = {"tokenwire_gateway_workers", "tokenwire_gateway_unknown_fields_total"}
    quiet = {"tokenwire_worker_load_ratio", "tokenwire_worker_info"} | http
    assert {name for name in DECLARED if name.startswith("tokenwire_")} - shown == quiet
    assert "label_values(tokenwire_worker_info" in DASHBOARD.read_text(encoding="utf-8")


def test_every_alert_has_an_entry_in_the_runbook_with_its_severity() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^## (\w+)\n\*\*(\w+)\*\*", text, re.MULTILINE))
    assert entries == {rule["alert"]: rule["labels"]["severity"] for rule in alert_rules()}


def test_every_alert_is_seen_to_fire() -> None:
    fired = set()
    for test in yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8"))["tests"]:
        for case in test.get("alert_rule_test", []):
            fired |= {case["alertname"]} if case["exp_alerts"] else set()
        for case in test.get("promql_expr_test", []):
            fired |= {re.search(r'alertname="(\w+)"', sample["labels"])[1] for sample in case["exp_samples"]}  # type: ignore[index]
    assert fired == {rule["alert"] for rule in alert_rules()}


def test_the_error_alert_counts_the_codes_that_are_the_servers_fault() -> None:
    (rule,) = (rule for rule in alert_rules() if rule["alert"] == "TokenwireErrorRateHigh")
    counted = {frozenset(match.split("|")) for match in re.findall(r'code=~"([^"]+)"', rule["expr"])}
    at_start_or_refusal = {"UNAVAILABLE", "UNSUPPORTED_MODEL"}
    own = {code for code, row in ERRORS.items() if (row.http_status or 0) >= 500}
    assert counted == {frozenset(own - at_start_or_refusal)}


def promtool(*arguments: str) -> str:
    program = shutil.which("promtool")
    assert program is not None, "promtool is not installed (Debian: apt-get install prometheus)"
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.deploy
def test_prometheus_takes_the_rules_and_each_alert_fires() -> None:
    promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    assert f"{len(alert_rules())} rules found" in promtool("check", "rules", str(ALERTS))
    assert "SUCCESS" in promtool("test", "rules", str(ALERT_TESTS))


@pytest.mark.deploy
def test_prometheus_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{place}", "expr": query} for place, (_, query) in enumerate(dashboard_queries())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))
