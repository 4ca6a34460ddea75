"""Headless Chromium, driven over its pipe: enough to use a page as a person does."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page of a browser of its own; the protocol is that of the developer tools."""

    def __init__(self, profile, width=1280, height=900):
        read, theirs = os.pipe()
        ours, self._write = os.pipe()
        # The browser reads 3 and writes 4: out of the way of these.
        ours, theirs = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours, theirs))
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        command = f"exec {CHROMIUM} {flags} --user-data-dir={profile} 3<&{ours} 4>&{theirs}"
        self._process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(ours, theirs), stderr=subprocess.DEVNULL
        )
        os.close(ours)
        os.close(theirs)
        self._read = os.fdopen(read, "rb")
        self._rest, self._number, self._session = b"", 0, None
        self.log = []  # what the page wrote to its console, and its errors
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.log.append(answer["params"])

    def _next(self):
        while b"\0" not in self._rest:
            part = self._read.read1(65536)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression):
        """Of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression, seconds=20):
        give_up = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < give_up, expression
            time.sleep(0.02)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, code=0, text=""):
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **extra,
            )

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self._process.terminate()
        self._process.wait(10)
        self._read.close()
        os.close(self._write)
