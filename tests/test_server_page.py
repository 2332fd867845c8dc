"""The page of the server in a browser, beside a run that goes on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from served_runs import Crowd, long_run

from collie_core.api import Trainer

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "plugins" / "collie_server" / "tests" / "support"
sys.path.append(str(SUPPORT))

import chromium  # noqa: E402

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium is installed, and COLLIE_CHROMIUM names none; "
    f"`python {SUPPORT.relative_to(ROOT)}/chromium.py FOLDER` fetches one",
)


def use_the_page(url: str) -> dict[str, Any]:
    """What a person sees who chats, stops an answer, compares and watches the loss."""
    from playwright.sync_api import expect

    seen: dict[str, Any] = {"hosts": set()}
    with chromium.opened(1000, 800) as (page, seen["complaints"]):
        page.on("request", lambda request: seen["hosts"].add(request.url.split("/")[2]))
        page.goto(url)
        expect(page.locator("#progress")).to_contain_text("of 100000")

        page.keyboard.type("Count to 3: ")  # the message has the focus from the beginning
        page.keyboard.press("Enter")
        answer = page.locator(".turn.assistant p").first
        expect(answer).not_to_be_empty(timeout=20_000)
        length = len(answer.inner_text())
        page.wait_for_function(
            "length => document.querySelector('.assistant p').textContent.length > length", arg=length
        )
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#state")).to_have_text("Stopped.")
        seen["asked"] = page.locator(".turn.user p").text_content()

        page.get_by_role("button", name="Options").click()
        page.get_by_label("Longest answer").fill("12")
        page.get_by_role("button", name="Then and now").click()
        page.get_by_label("Your message").fill("Count to 5: ")
        page.keyboard.press("Enter")
        expect(page.locator(".pair .assistant p")).to_have_count(2)
        for text in page.locator(".pair .assistant p").all():
            expect(text).not_to_be_empty(timeout=20_000)
        expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=20_000)
        seen["names"] = page.locator(".pair .assistant h2").all_inner_texts()

        line = "document.querySelector('#curve-loss polyline')"
        before = page.evaluate(f"{line}.getAttribute('points')")
        page.wait_for_function(f"before => {line}.getAttribute('points') !== before", arg=before, timeout=10_000)
        seen["curves"] = [one.get_attribute("aria-label") for one in page.locator("#curves svg").all()]

        page.get_by_role("button", name="Options").click()
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            seen[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            if folder := os.environ.get("COLLIE_SCREENSHOTS"):
                page.screenshot(path=f"{folder}/server-{scheme}.png")
        page.set_viewport_size({"width": 360, "height": 640})
        seen["width"] = page.evaluate("document.documentElement.scrollWidth")
    return seen


def test_chat_stop_compare_and_watch(tiny_llama: Path, instructions: Path, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    crowd = Crowd(use_the_page)
    config = long_run(tiny_llama, instructions, tmp_path, lr=0.01, train_share=0.1)
    Trainer(config, callbacks=[crowd], observers=()).train()
    seen = crowd.result.result()
    assert seen["complaints"] == []
    assert len(seen["hosts"]) == 1, "the page asks elsewhere"
    assert seen["asked"].startswith("Count to 3:")
    then, now = seen["names"]
    assert then == f"Then · {tiny_llama}"
    assert now.startswith("Now · step")
    assert [label.partition(":")[0] for label in seen["curves"]] == ["Loss", "Tokens/s", "Peak memory (GiB)"]
    assert seen["dark"] != seen["light"]
    assert seen["width"] <= 360
