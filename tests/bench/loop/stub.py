"""A variant's process that loads nothing: what it does is in its variant's name."""

import os
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace

BUSY = 0.02


def task(variant: str) -> SimpleNamespace:
    """What the rounds need to know of a task."""
    return SimpleNamespace(model=SimpleNamespace(name="stub"), variant=variant, timed=1, device="cpu", threads=1,
                           limit="")  # fmt: skip


def serve(connection: Connection, task: SimpleNamespace) -> None:
    """As loop_child.serve: "dies", "hangs" and "refuses" do so at once, "dies-later" in its second loop."""
    kind, loops = task.variant, 0
    if kind == "refuses":
        connection.send(("cannot", "no such thing here"))
        return
    if kind == "dies":
        os._exit(9)
    if kind == "hangs":
        time.sleep(60)
    variables = {k: v for k, v in os.environ.items() if k.startswith(("TORCHINDUCTOR", "MODIFF_LOOP"))}
    connection.send(("ready", {"peak_mib": 100.0, "device_mib": 0.0, "variables": variables}))
    while connection.recv() == "run":
        loops += 1
        if kind == "dies-later" and loops == 2:
            os._exit(7)
        start = time.monotonic()
        time.sleep(BUSY)
        span = (start, time.monotonic())
        connection.send(("ran", {"seconds": BUSY * loops, "images": kind, "span": span}))
