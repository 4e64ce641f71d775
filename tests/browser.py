"""A headless Chromium, driven over the DevTools protocol through two pipes."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Tab": 9, "Enter": 13}


class Browser:
    """One tab. `events` holds everything it reported: requests, console messages, errors."""

    def __init__(self, send, receive):
        self._send, self._receive, self._left, self._number, self._session = send, receive, b"", 0, None
        self.events = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._send, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode()
                 + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self, seconds=60):
        end = time.monotonic() + seconds
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._receive], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(self._receive, 1 << 20) if ready else b""
            assert chunk, "the browser does not answer"
            self._left += chunk
        message, self._left = self._left.split(b"\0", 1)
        return json.loads(message)

    def open(self, url, width=1280, height=900, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia",
             features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script):
        """Evaluates a JavaScript expression and returns its value."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)


@contextlib.contextmanager
def browser():
    """A browser with a temporary profile; it is closed at the end of the block."""
    pipes = [os.pipe(), os.pipe()]
    # The browser reads from 3 and writes to 4; descriptors from 50 on cannot collide with these.
    theirs = [fcntl.fcntl(pipes[0][0], fcntl.F_DUPFD, 50), fcntl.fcntl(pipes[1][1], fcntl.F_DUPFD, 50)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for handle in (pipes[0][0], pipes[1][1], *theirs):
                os.close(handle)
            yield Browser(pipes[0][1], pipes[1][0])
        finally:
            process.terminate()
            process.wait(30)
            os.close(pipes[0][1])
            os.close(pipes[1][0])
