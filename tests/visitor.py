"""A person in front of the page: what they do and see in a real Chromium, and what the page must never do meanwhile."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

expect.set_options(timeout=10_000)


class Visitor:
    """A browser window on the page, and everything the page must not do while a test looks at it."""

    def __init__(self, browser: Browser, server: Any, width: int = 1280, height: int = 800, scheme: str = "light"):
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.page: Page = self.context.new_page()
        self.server = server
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "request",
            lambda request: None if request.url.startswith(server.url) else self.strangers.append(request.url),
        )
        self.page.goto(server.url)

    def _heard(self, message) -> None:
        # A refusal is part of what is tested, and the browser notes each of them by itself.
        if message.type in ("error", "warning") and not message.text.startswith(
            "Failed to load resource: the server responded"
        ):
            self.complaints.append(message.text)

    def leave(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert self.strangers == []

    # ---- what a person does ------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> Locator:
        """Sends a message and waits until its answer is complete."""
        self.say(text)
        expect(self.answer.locator(".tools button").first).to_be_visible()
        expect(self.button("Stop the answer")).to_be_hidden()
        return self.answer

    def think(self, mode: str) -> None:
        self.page.get_by_role("radio", name=mode).check()

    def drop(self, name: str, content: str, type: str = "text/plain") -> None:
        dropped = self.page.evaluate_handle(
            """([name, content, type]) => {
                const carried = new DataTransfer();
                carried.items.add(new File([content], name, { type }));
                return carried;
            }""",
            [name, content, type],
        )
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("#log", event, {"dataTransfer": dropped})

    # ---- what a person sees ------------------------------------------------------------------------------------------

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def answer(self) -> Locator:
        return self.page.locator(".answer").last

    @property
    def question(self) -> Locator:
        return self.page.locator(".turn.user").last

    @property
    def gauges(self) -> Locator:
        return self.page.get_by_role("complementary", name="Gauges")
