"""deploy/ray for real: two replicas behind Ray Serve's gRPC proxy answer as a worker does; the queue adds a third.

Ray is large, so it is nobody's requirement: the test makes an environment with it, or uses the one whose `bin` is named
by TOKENWIRE_TEST_RAY_BIN, which must have tokenwire's wheel too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from deploy.helpers_processes import DEPLOY, ROOT, free_port
from e2e.helpers import only_when_asked, say
from e2e.helpers_server import running_worker
from tokenwire import models
from tokenwire.client import Client, Started, TokenwireRpcError

RAY = "ray[serve-grpc]==2.60.*"
START_TIMEOUT_S = 240.0
PROMPTS = [f"Question {number}: name a river and say where it flows." for number in range(16)]
POLICY = """
from types import SimpleNamespace as Context
from tokenwire_ray import replicas_for_queue
def ask(now, queued, used):
    return replicas_for_queue(Context(aggregated_metrics={"queued": dict(enumerate(queued)), "pool_utilization":
        dict(enumerate(used))}, target_num_replicas=now, capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4))[0]
assert ask(2, (0, 0), (0.5, 0.1)) == 2
assert ask(2, (8, 0), (0.9, 0.1)) == 2
assert ask(2, (8, 1), (0.9, 0.9)) == 3
assert ask(2, (90, 90), (0.9, 0.9)) == 4
assert ask(3, (0, 0, 0), (0.1, 0.0, 0.1)) == 2
assert ask(1, (0,), (0.0,)) == 1
assert replicas_for_queue(Context(aggregated_metrics=None, target_num_replicas=2, capacity_adjusted_min_replicas=1,
    capacity_adjusted_max_replicas=4))[0] == 2
"""

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def ray_bin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    only_when_asked(request)
    if "TOKENWIRE_TEST_RAY_BIN" in os.environ:
        return Path(os.environ["TOKENWIRE_TEST_RAY_BIN"])
    place = tmp_path_factory.mktemp("ray")
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(place), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=900)
    (wheel,) = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", place / "environment"], check=True, timeout=300)
    pip = place / "environment" / "bin" / "pip"
    subprocess.run([pip, "install", "--quiet", RAY, wheel], check=True, timeout=900)
    return pip.parent


@pytest.fixture(scope="module")
def served(ray_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """The proxy's address, and the process that everything descends from."""
    place = tmp_path_factory.mktemp("serve")
    port = free_port()
    text = (DEPLOY / "ray" / "config.yaml").read_text(encoding="utf-8")
    assert text.count("port: 9000") == text.count("port: 8000") == 1
    config = place / "config.yaml"
    config.write_text(text.replace("port: 9000", f"port: {port}").replace("port: 8000", f"port: {free_port()}"))
    environment = {
        **os.environ,
        "PATH": f"{ray_bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(DEPLOY / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",  # of a machine that does other things too
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_AUTH_MODE": "disabled",  # else it writes a token into the home directory
        "TOKENWIRE_MODEL": str(models.resolve("smollm2", fetch=True)),
        "TOKENWIRE_NUM_THREADS": "1",
        "TOKENWIRE_KV_CACHE_SIZE_MB": "256",
        "TOKENWIRE_MAX_RUNNING_JOBS": "4",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 4}',
    }
    with (place / "serve.log").open("wb") as log:
        command = [ray_bin / "serve", "run", str(config)]
        server = subprocess.Popen(command, cwd=DEPLOY / "ray", env=environment, stdout=log, stderr=log)
    try:
        wait_until_healthy(server, f"127.0.0.1:{port}", place / "serve.log")
        yield f"127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.send_signal(signal.SIGINT)
        try:
            server.wait(90)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        for process in family:
            if process.is_running():
                process.kill()


def wait_until_healthy(server: subprocess.Popen[bytes], target: str, log: Path) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    with Client(target) as client:
        while time.monotonic() < give_up_at:
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            with contextlib.suppress(TokenwireRpcError):
                client.health(timeout_s=5)
                return
            time.sleep(0.5)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def workers(root: psutil.Process) -> list[psutil.Process]:
    """The running `tokenwire serve` processes."""
    found = []
    for process in root.children(recursive=True):
        try:
            if process.cmdline()[1:4] == ["-m", "tokenwire", "serve"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_two_replicas_serve_the_bytes_of_a_worker(served: tuple[str, psutil.Process]) -> None:
    target, root = served

    def ask(where: Client) -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda prompt: where.generate(prompt, max_tokens=24, temperature=0.7, seed=7), PROMPTS)
            return [answer.end.digest for answer in answers]

    pair = workers(root)
    assert len(pair) == 2
    before = [cpu_seconds(process) for process in pair]
    with Client(target) as client:
        through_ray = ask(client)
    used = [cpu_seconds(process) - start for process, start in zip(pair, before, strict=True)]
    with running_worker(models.resolve("smollm2"), "--num-threads", "1") as alone, Client(alone) as client:
        assert through_ray == ask(client)
    say(f"{len(PROMPTS)} answers through Ray, equal to a worker's; processor seconds of the replicas {used}")
    assert min(used) > 0.1, "one replica did nothing"


def test_a_refusal_keeps_its_status_and_its_sentence(served: tuple[str, psutil.Process]) -> None:
    """Ray's proxy drops the details beside them."""
    with Client(served[0]) as client, pytest.raises(TokenwireRpcError) as caught:
        client.generate("x", max_tokens=0, temperature=9.0)
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_tokens, temperature" in caught.value.message


def test_a_cancel_finds_its_job_on_any_replica(served: tuple[str, psutil.Process]) -> None:
    with Client(served[0]) as client:
        for number in range(6):
            with client.execute("Once upon a time", max_tokens=2000, logit_bias={0: -100.0, 2: -100.0}) as stream:
                assert isinstance(next(stream), Started)
                assert client.cancel(stream.job_id).outcome == "cancelled", number
                with pytest.raises(TokenwireRpcError) as caught:
                    for _ in stream:
                        pass
                assert caught.value.code == "CANCELLED"


def test_the_policy_counts_what_waits(ray_bin: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(DEPLOY / "ray")}
    subprocess.run([ray_bin / "python", "-c", POLICY], check=True, timeout=120, env=environment)


def test_a_long_queue_adds_a_replica(served: tuple[str, psutil.Process]) -> None:
    target, root = served
    assert len(workers(root)) == 2
    stopping = threading.Event()

    def keep_asking(number: int) -> None:
        with Client(target) as client:
            while not stopping.is_set():
                try:
                    client.generate(f"Story {number}:", max_tokens=256, logit_bias={0: -100.0, 2: -100.0})
                except TokenwireRpcError:
                    stopping.wait(0.5)

    with ThreadPoolExecutor(32) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(32)]
        try:
            give_up_at = time.monotonic() + 180
            while len(workers(root)) < 3:
                assert time.monotonic() < give_up_at, "no third replica came"
                time.sleep(1)
        finally:
            stopping.set()
        for future in asking:
            future.result()
