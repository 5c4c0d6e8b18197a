"""The page in real Chromium: stream, stop, error, reconnect, keyboard, phone, dark (W-53)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright, expect

from tokenwire.engine.fake import FakeEngine, FakeOutcome

# Quiet on a machine without a network, and allowed to run as root in a container.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKENS = ["The ", "sea ", "is ", "salt", "y."]


class Proxy:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Future[None]] = set()
        self.port = 0

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        self._writers |= {writer, up_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


@pytest.fixture
async def worker(start_worker: Any) -> Any:
    return await start_worker(fake=FakeEngine(TOKENS))


@pytest.fixture
async def open_page(gateway: Any) -> AsyncIterator[Any]:
    """Opens the page in a fresh browser; whatever the page says on its console, beside refusals, fails the test."""
    said: list[str] = []
    async with async_playwright() as playwright:
        executable = shutil.which("chromium") or "/usr/bin/chromium"
        browser = await playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)

        async def start(port: int = gateway.port, **options: Any) -> Page:
            context = await browser.new_context(**options)
            page = await context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url) if f":{port}/" not in request.url else None)
            await page.goto(f"http://127.0.0.1:{port}/")
            return page

        yield start
        await browser.close()
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


async def generate(page: Page, worker: Any, prompt: str = "Why?") -> Any:
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    await page.get_by_role("button", name="Generate").click()
    return await worker.submitted()


async def test_tokens_appear_as_they_come(worker: Any, open_page: Any) -> None:
    page = await open_page()
    await expect(page.locator("#health")).to_contain_text("test-model on the CPU")
    job = await generate(page, worker)
    answer = page.get_by_role("region", name="Answer")
    for place in range(len(TOKENS)):
        job.step()
        await expect(answer).to_have_text("".join(TOKENS[: place + 1]).strip())
    await expect(page.locator("#n-tokens")).to_have_text("5")
    await expect(page.locator("#n-prompt")).to_have_text("4")
    await expect(page.locator("#n-ttft")).to_have_text(re.compile(r"\d+(\.\d)? ms|\d+\.\d\d s"))
    await expect(page.locator("#n-queue")).to_have_text("0.5 ms")
    await expect(page.locator("#note")).to_contain_text(f"complete · seed {job.spec['seed']}")
    await expect(page.get_by_role("status")).to_have_text("Done: 5 tokens, complete")
    await expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    ticks = await page.locator("#ticks").get_attribute("d")
    assert ticks is not None
    assert ticks.count("M") == 5


async def test_stop_ends_the_job_and_keeps_the_text(worker: Any, open_page: Any) -> None:
    page = await open_page()
    job = await generate(page, worker)
    job.step()
    await expect(page.locator("#answer")).to_have_text("The")
    await page.get_by_role("button", name="Stop", exact=True).click()
    assert await asyncio.to_thread(job.cancelled.wait, 20)
    await expect(page.get_by_role("status")).to_have_text("Stopped after 1 tokens")
    await expect(page.locator("#answer")).to_have_text("The")
    await expect(page.locator("#alert")).to_be_hidden()
    assert (await generate(page, worker)).live, "another can be generated"


async def test_the_keyboard_is_enough(worker: Any, open_page: Any) -> None:
    page = await open_page()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.get_by_label("Prompt", exact=True).focus()
    await page.keyboard.type("Hi")
    await page.keyboard.press("Control+Enter")
    job = await worker.submitted()
    await page.keyboard.press("Escape")
    assert await asyncio.to_thread(job.cancelled.wait, 20)
    tab = page.get_by_role("tab", name="curl", exact=True)
    await tab.focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("tab", name="grpcurl")).to_be_focused()
    await expect(page.get_by_role("tabpanel")).to_contain_text("tokenwire.v1.Inference/Execute")


async def test_a_refusal_marks_its_fields(worker: Any, open_page: Any) -> None:
    page = await open_page()
    await page.get_by_label("Prompt", exact=True).fill("Why?")
    await page.get_by_label("Temperature").fill("9")
    await page.get_by_label("Top k").fill("many")
    await page.get_by_role("button", name="Generate").click()
    await expect(page.get_by_role("alert")).to_contain_text("INVALID_REQUEST")
    await expect(page.locator("#temperature-error")).to_have_text("must be at least 0 and at most 2, not 9")
    await expect(page.locator("#top_k-error")).to_have_text("must be an integer")
    await expect(page.get_by_label("Top k")).to_be_focused()
    await page.get_by_label("Temperature").fill("")
    await page.get_by_label("Top k").fill("")
    job = await generate(page, worker)
    await expect(page.get_by_role("alert")).to_be_hidden()
    await expect(page.locator("#temperature-error")).to_be_hidden()
    job.step()
    job.finish(FakeOutcome(error_code="VRAM_OOM", error_message="the device ran out of memory in a step"))
    alert = page.get_by_role("alert")
    await expect(alert).to_contain_text("The device ran out of memory in a step")
    await expect(alert).to_contain_text(f"with seed {job.spec['seed']} gives the same text again")
    await expect(page.locator("#answer")).to_have_text("The")


async def test_a_broken_connection_is_taken_up_again(worker: Any, gateway: Any, open_page: Any) -> None:
    proxy = Proxy(gateway.port)
    async with await proxy.start():
        page = await open_page(proxy.port)
        job = await generate(page, worker)
        for place in range(len(TOKENS)):
            job.step()
            await expect(page.locator("#answer")).to_have_text("".join(TOKENS[: place + 1]).strip(), timeout=20_000)
            if place in (1, 3):
                proxy.cut()
                await expect(page.locator("#note")).to_have_text("reconnecting")
        await expect(page.locator("#note")).to_contain_text("complete")
        await expect(page.locator("#n-tokens")).to_have_text("5")
        await page.close()
        proxy.cut()


async def test_a_page_that_closes_leaves_no_job(worker: Any, open_page: Any) -> None:
    page = await open_page()
    job = await generate(page, worker)
    await page.close(run_before_unload=True)
    assert await asyncio.to_thread(job.cancelled.wait, 20)


async def test_parameters_and_code_agree_with_what_is_sent(worker: Any, open_page: Any) -> None:
    page = await open_page()
    await page.get_by_text("Plain text").click()
    await page.get_by_label("Seed").fill(str(2**64 - 1))
    await page.get_by_label("Stop at").fill("END\nSTOP")
    await page.get_by_label("Temperature").fill("0.5")
    job = await generate(page, worker, "It's")
    spec = job.spec
    assert (spec["seed"], spec["stop"], spec["temperature"]) == (2**64 - 1, [b"END", b"STOP"], 0.5)
    assert spec["prompt_ids"] == [ord(char) for char in "It's"]
    code = page.get_by_role("tabpanel")
    await expect(code).to_contain_text(f'"seed": {2**64 - 1}')
    await expect(code).to_contain_text('"prompt": "It\'\\\'\'s"')
    await page.get_by_role("tab", name="Python").click()
    await expect(code).to_contain_text('stop=["END","STOP"]')


@pytest.mark.parametrize(
    "options",
    [
        {"viewport": {"width": 1280, "height": 860}},
        {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
        {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
        {"viewport": {"width": 320, "height": 640}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"},
    ],
    ids=["desktop", "dark", "phone", "small"],
)
async def test_it_fits_and_can_be_read(worker: Any, open_page: Any, tmp_path: Any, options: dict[str, Any]) -> None:
    page = await open_page(bypass_csp=True, **options)
    job = await generate(page, worker, "word " * 40 + "w" * 200)
    while job.live:
        job.step()
    await expect(page.locator("#note")).to_contain_text("complete")
    closed = page.locator("details:not([open]) summary")
    while await closed.count():
        await closed.first.click()
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await page.evaluate(CONTRAST) >= 4.5
    picture = await page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert len(picture) > 10_000


# The least contrast of any text with the first opaque background behind it (WCAG 2).
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      const alpha = channels(color)[3];
      if (alpha === undefined || alpha > 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  let least = 21;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const unseen = !element.getClientRects().length || element.closest('.hidden, .skip, noscript, :disabled');
    if (!walker.currentNode.data.trim() || unseen) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""


async def test_the_page_is_served_with_care(gateway: Any) -> None:
    page = await gateway.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    again = await gateway.http.get("/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path in ("/page.css", "/page.js", "/icon.svg"):
        assert (await gateway.http.get(path)).status_code == 200
    assert (await gateway.http.head("/")).status_code == 200
