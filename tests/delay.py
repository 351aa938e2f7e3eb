"""A forwarder that makes a wire long: what comes in is sent on so many milliseconds later, each way, at full rate.

python -m tests.delay HOST:PORT MILLISECONDS BIND     prints the host:port at which it listens
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import time

CHUNK_BYTES = 1 << 18


def main() -> None:
    """Serves until it is killed."""
    host, port, delay_s, bind = *sys.argv[1].rsplit(":", 1), float(sys.argv[2]) / 1e3, sys.argv[3]
    door = socket.create_server((bind, 0))
    print(f"{bind}:{door.getsockname()[1]}", flush=True)
    while True:
        near, _ = door.accept()
        far = socket.create_connection((host, int(port)))
        for source, sink in ((near, far), (far, near)):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
            threading.Thread(target=_read, args=(source, waiting, delay_s), daemon=True).start()
            threading.Thread(target=_write, args=(sink, waiting), daemon=True).start()


def _read(source: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]], delay_s: float) -> None:
    data = b"?"
    while data:
        try:
            data = source.recv(CHUNK_BYTES)
        except OSError:
            data = b""
        waiting.put((time.monotonic() + delay_s, data))


def _write(sink: socket.socket, waiting: queue.SimpleQueue[tuple[float, bytes]]) -> None:
    while True:
        due_s, data = waiting.get()
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)
        except OSError:
            return


if __name__ == "__main__":
    main()
