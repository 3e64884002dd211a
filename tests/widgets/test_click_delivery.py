"""Looking at a kernel's raw messages: only at our clicks, in order, and never in its way.

Real kernels are in tests/browser/test_kernel_matrix.py; here are those that do not behave.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from nbpeft.widgets import click_delivery
from nbpeft.widgets.click_delivery import deliver_clicks


class Messages:
    """Stands for ``jupyter_client.session.Session``: a message is its own header and content."""

    def feed_identities(self, frames: Any, copy: bool) -> tuple[list[Any], Any]:
        assert not copy
        return [], frames

    def deserialize(self, parts: Any, content: bool, copy: bool) -> dict[str, Any]:
        assert not content and not copy  # with content the kernel would take its own delivery for a replay
        return {"header": {"msg_type": parts[0]}, "content": parts[1]}

    def unpack(self, content: Any) -> Any:
        return content


def click(comm_id: str) -> list[Any]:
    return ["comm_msg", {"comm_id": comm_id, "data": {"method": "custom", "content": {"event": "click"}}}]


class Socket:
    """A socket with messages that wait."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()

    def recv_multipart(self, flags: int, copy: bool) -> Any:
        assert flags == zmq.NOBLOCK and not copy
        if not self.waiting:
            raise zmq.Again
        return self.waiting.popleft()


class QueueKernel:
    """Like ipykernel 6."""

    def __init__(self) -> None:
        self.session = Messages()
        self.socket = Socket()
        self.shell_stream = SimpleNamespace(socket=self.socket)
        self.queue: list[Any] = []

    def dispatch_shell(self, frames: Any) -> None: ...

    def schedule_dispatch(self, dispatch: Any, *arguments: Any) -> None:
        assert dispatch == self.dispatch_shell
        self.queue.append(arguments[0])


class Loop:
    """Calls back in a thread of its own, or never."""

    def __init__(self, alive: bool) -> None:
        self.alive = alive

    def add_callback(self, callback: Callable[[], None]) -> None:
        if self.alive:
            threading.Thread(target=callback).start()


class ThreadKernel:
    """Like ipykernel 7."""

    def __init__(self, alive: bool = True) -> None:
        self.session = Messages()
        self.shell_channel_thread = SimpleNamespace(io_loop=Loop(alive))
        self.shell_stream = SimpleNamespace(on_recv=self._on_recv)
        self.receive: Any = self.shell_channel_thread_main
        self.received: list[Any] = []

    def _on_recv(self, receive: Any, copy: bool) -> None:
        assert not copy
        self.receive = receive

    async def shell_channel_thread_main(self, frames: Any) -> None:
        self.received.append(frames)

    def send(self, frames: Any) -> None:
        asyncio.run(self.receive(frames))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Lets a kernel be the running one."""
    yield lambda kernel: monkeypatch.setattr(click_delivery, "running_kernel", lambda: kernel)
    assert click_delivery._current is None


def test_a_queue_is_looked_through_in_order(use: Any) -> None:
    kernel, clicks = QueueKernel(), []
    use(kernel)
    delivery = deliver_clicks({"stop": lambda: clicks.append("stop")})
    assert delivery is not None
    sent = [["execute_request", {"code": "1"}], click("other"), click("stop"), ["comm_msg", None], click("stop")]
    kernel.socket.waiting.extend(sent)
    delivery.poll()
    assert clicks == ["stop", "stop"]
    assert kernel.queue == sent
    delivery.close()
    kernel.socket.waiting.append(click("stop"))
    delivery.poll()
    assert len(clicks) == 2
    assert len(kernel.socket.waiting) == 1


def test_a_queue_is_left_alone_by_other_threads(use: Any) -> None:
    kernel = QueueKernel()
    use(kernel)
    delivery = deliver_clicks({"stop": lambda: None})
    assert delivery is not None
    kernel.socket.waiting.append(click("stop"))
    thread = threading.Thread(target=delivery.poll)
    thread.start()
    thread.join()
    assert len(kernel.socket.waiting) == 1
    delivery.close()


def test_a_message_is_handed_on_even_if_a_listener_fails(use: Any) -> None:
    kernel = QueueKernel()
    use(kernel)
    failing: Any = lambda: 1 / 0  # noqa: E731
    delivery = deliver_clicks({"stop": failing})
    assert delivery is not None
    kernel.socket.waiting.append(click("stop"))
    delivery.poll()
    assert kernel.queue == [click("stop")]
    delivery.close()


def test_the_thread_of_messages_looks_and_hands_on(use: Any) -> None:
    kernel, clicks = ThreadKernel(), []
    use(kernel)
    delivery = deliver_clicks({"stop": lambda: clicks.append("stop")})
    assert delivery is not None
    kernel.send(click("stop"))
    kernel.send(["execute_request", {}])
    assert clicks == ["stop"]
    assert kernel.received == [click("stop"), ["execute_request", {}]]
    delivery.close()
    assert kernel.receive == kernel.shell_channel_thread_main
    delivery.close()


def test_two_runs_share_one_look(use: Any) -> None:
    kernel, clicks = ThreadKernel(), []
    use(kernel)
    first = deliver_clicks({"a": lambda: clicks.append("a")})
    second = deliver_clicks({"b": lambda: clicks.append("b")})
    assert first is not None and second is not None
    first.close()
    kernel.send(click("a"))
    kernel.send(click("b"))
    assert clicks == ["b"]
    second.close()
    assert kernel.receive == kernel.shell_channel_thread_main


@pytest.mark.parametrize(
    "kernel",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(shell_channel_thread=None, schedule_dispatch=print, shell_stream=None),
        SimpleNamespace(shell_channel_thread=SimpleNamespace(io_loop=Loop(True))),
        SimpleNamespace(schedule_dispatch=print, shell_streams=[]),
    ],
)
def test_unknown_kernels_are_left_alone(use: Any, kernel: Any) -> None:
    use(kernel)
    assert deliver_clicks({"stop": lambda: None}) is None


def test_a_thread_that_does_not_answer_is_given_up(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click_delivery, "_INSTALL_TIMEOUT", 0.05)
    use(ThreadKernel(alive=False))
    assert deliver_clicks({"stop": lambda: None}) is None


def test_without_a_kernel_there_is_none() -> None:
    assert click_delivery.running_kernel() is None
