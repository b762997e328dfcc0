"""A load of HTTP requests, light enough to leave the machine to the server.

Run as `python -m benchmarks.serving_load PORT CLIENTS SECONDS FILE`; FILE holds the request as it
goes over the wire. Each client keeps one connection and sends the next request when the answer is
there. Prints one object: requests, seconds, p50_ms, p99_ms, wrong (answers other than 200).
"""

import asyncio
import json
import sys
import time
from pathlib import Path

_WARM_S = 2.0


class Client(asyncio.Protocol):
    """One connection that asks without a pause.

    Args:
        request: The bytes to send.
        times: Receives the seconds of each request.
    """

    def __init__(self, request: bytes, times: list[float]) -> None:
        self._request = request
        self._times = times
        self._got = b""
        self._sent_at = 0.0
        self.wrong = 0
        self.example = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Send the next request when the answer is whole."""
        self._got += data
        end = self._got.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._got[:end].lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(self._got) < end + 4 + length:
            return
        self._times.append(time.perf_counter() - self._sent_at)
        if not head.startswith(b"http/1.1 200"):
            self.wrong += 1
            self.example = self._got[:500]
        self._got = b""
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)


async def load(port: int, clients: int, seconds: float, request: bytes) -> dict[str, float]:
    """Warm up, then measure."""
    times: list[float] = []
    loop = asyncio.get_running_loop()
    pairs = [
        await loop.create_connection(lambda: Client(request, times), "127.0.0.1", port)
        for _ in range(clients)
    ]
    await asyncio.sleep(min(_WARM_S, seconds))
    begin, skipped = time.perf_counter(), len(times)
    await asyncio.sleep(seconds)
    took = sorted(times[skipped:])
    elapsed = time.perf_counter() - begin
    wrong = sum(client.wrong for _, client in pairs)
    for transport, client in pairs:
        transport.abort()
        if client.example:
            print(client.example, file=sys.stderr)
    return {
        "requests": len(took),
        "seconds": elapsed,
        "p50_ms": 1000 * took[len(took) // 2] if took else float("inf"),
        "p99_ms": 1000 * took[len(took) * 99 // 100] if took else float("inf"),
        "wrong": wrong,
    }


if __name__ == "__main__":
    port, clients, seconds, file = sys.argv[1:]
    print(
        json.dumps(
            asyncio.run(load(int(port), int(clients), float(seconds), Path(file).read_bytes()))
        )
    )
