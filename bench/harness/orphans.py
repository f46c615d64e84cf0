"""A process that ends with the one that started it, however that one ends."""

import os
import signal
import threading
import time


def end_with(parent: int) -> None:
    """Kill this process's group, of which it must be the leader, soon after the process `parent`,
    which started it, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
