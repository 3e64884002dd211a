"""Button clicks that arrive while a cell runs.

A click travels as a ``comm_msg`` on the kernel's shell channel, where it is queued behind the running
cell: always with ipykernel 5, 6 and 7.4, and with 7.0-7.3 unless the front end sends comms over
subshells. So, while there are listeners, the raw messages are inspected on arrival and passed on unchanged:

    ipykernel >= 7   in the thread that receives shell messages; it is alive while a cell runs
    ipykernel 5, 6   in ``Delivery.poll()``, which the training loop calls: it takes waiting messages off
                     the socket and puts them into the kernel's own queue, in order. While the main thread
                     is inside a step, another thread calls ``Delivery.peek()``, which does the first half
    anything else    not at all: ``deliver_clicks`` returns None, and interrupting the kernel still works

The kernel itself delivers every message a second time when the cell has ended: a listener must
not handle a click twice. All of this is private API of ipykernel, so its presence is checked before use.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from nbpeft._util.interrupts import in_main_thread

Listener = Callable[[], None]

_INSTALL_TIMEOUT = 2.0
_FIFO_PRIORITY = 10
"""Priority of ordinary shell messages in ipykernel 5's queue."""


class Delivery:
    """Clicks of some widgets reach their listeners until ``close``.

    Args:
        tap: Inspects the messages.
        listeners: Comm id of a button -> function to call for a click, in any thread.
    """

    def __init__(self, tap: _Tap, listeners: Mapping[str, Listener]) -> None:
        self._tap: _Tap | None = tap
        self._comm_ids = tuple(listeners)
        tap.listeners.update(listeners)

    def add(self, listeners: Mapping[str, Listener]) -> None:
        """Adds listeners for the clicks of further widgets."""
        if self._tap is not None:
            self._comm_ids += tuple(listeners)
            self._tap.listeners.update(listeners)

    def poll(self) -> None:
        """Inspects waiting messages; the training loop calls it often. Cheap."""
        if self._tap is not None:
            self._tap.poll()

    @property
    def needs_peeking(self) -> bool:
        """Whether another thread has to call ``peek`` often for clicks to be noticed during a step."""
        return self._tap is not None and self._tap.needs_peeking

    def peek(self) -> None:
        """Inspects waiting messages while the main thread is inside a step. Cheap; for another thread."""
        if self._tap is not None:
            self._tap.peek()

    def close(self) -> None:
        """Removes the listeners. May be called twice."""
        tap, self._tap = self._tap, None
        if tap is None:
            return
        for comm_id in self._comm_ids:
            tap.listeners.pop(comm_id, None)
        if not tap.listeners:
            _release(tap)


def deliver_clicks(listeners: Mapping[str, Listener]) -> Delivery | None:
    """Calls listeners for clicks while a cell runs.

    Args:
        listeners: Comm id of a button -> function to call for a click. The function must only record
            the click: it may run in the kernel's message thread.

    Returns:
        The delivery, or None if this kind of kernel is not supported.
    """
    kernel = running_kernel()
    if kernel is None:
        return None
    try:
        tap = _tap_of(kernel)
    except Exception:  # a kernel that only looks like one we know: interrupting it still works
        return None
    if tap is None:
        return None
    tap.cell_runs()
    return Delivery(tap, listeners)


def running_kernel() -> Any:
    """The ipykernel this code runs in, or None."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return getattr(get_ipython(), "kernel", None)


class _Tap:
    """Inspects the shell messages of one kernel."""

    needs_peeking = False

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.listeners: dict[str, Listener] = {}

    def cell_runs(self) -> None:
        """Called in the cell that creates a delivery."""

    def peek(self) -> None:
        """Inspects waiting messages; called in another thread than the main one."""

    def poll(self) -> None:
        """Inspects waiting messages if no thread of the kernel does."""

    def remove(self) -> None:
        """Restores the kernel's own message handling."""

    def look(self, frames: list[Any]) -> None:
        """Calls the listener if these frames are a click. Never raises, and does not change the frames."""
        try:
            session = self.kernel.session
            _, parts = session.feed_identities(frames, copy=False)
            # With content, deserialize records the signature, and the kernel would reject the message as a replay.
            message = session.deserialize(parts, content=False, copy=False)
            if message["header"]["msg_type"] != "comm_msg":
                return
            content = session.unpack(message["content"])
            listener = self.listeners.get(content.get("comm_id"))
            if listener is not None and _is_click(content.get("data")):
                listener()
        except Exception:
            return


class _ThreadTap(_Tap):
    """ipykernel >= 7: inspects messages in the thread of the shell channel.

    Up to 7.3 that thread may miss a message until another event wakes it (ipykernel#1529): peeking wakes it.
    """

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self.needs_peeking = _version() < (7, 4)
        self._thread = kernel.shell_channel_thread
        self._forward = kernel.shell_channel_thread_main
        self._receive_with(self._look_and_forward)

    def peek(self) -> None:
        if self.needs_peeking:
            self._thread.io_loop.add_callback(self.kernel.shell_stream.flush)

    async def _look_and_forward(self, frames: list[Any]) -> None:
        self.look(frames)
        await self._forward(frames)

    def remove(self) -> None:
        self._receive_with(self._forward)

    def _receive_with(self, receive: Callable[..., Any]) -> None:
        """Sets the receiver of shell messages, in the thread that receives them."""
        done = threading.Event()

        def change() -> None:
            self.kernel.shell_stream.on_recv(receive, copy=False)
            done.set()

        self._thread.io_loop.add_callback(change)
        if not done.wait(_INSTALL_TIMEOUT):
            raise TimeoutError("the kernel's shell thread does not answer")


class _QueueTap(_Tap):
    """ipykernel 5 and 6: moves waiting messages from the socket into the kernel's queue.

    A zmq socket is not thread-safe. This one belongs to the main thread, which does not use it while it runs a cell: so
    between ``cell_runs`` and the end of the cell another thread may take messages off it, under the lock. That
    thread only stores them; the main thread puts them into the kernel's queue.
    """

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self._stream = getattr(kernel, "shell_stream", None) or kernel.shell_streams[0]
        # 5.x: schedule_dispatch(priority, dispatch, stream, frames); 6.x: (dispatch, frames)
        self._with_priority = "priority" in inspect.signature(kernel.schedule_dispatch).parameters
        self._lock = threading.Lock()
        self._kept: deque[list[Any]] = deque()

    def cell_runs(self) -> None:
        from IPython import get_ipython

        shell = get_ipython()
        if shell is None or self.needs_peeking or not in_main_thread():
            return

        def cell_ended() -> None:
            shell.events.unregister("post_execute", cell_ended)
            self.remove()

        with self._lock:
            self.needs_peeking = True
        shell.events.register("post_execute", cell_ended)

    def peek(self) -> None:
        with self._lock:
            if self.needs_peeking:
                self._receive()

    def poll(self) -> None:
        if not in_main_thread():
            return
        with self._lock:
            self._receive()
        self._hand_on()

    def remove(self) -> None:
        with self._lock:
            self.needs_peeking = False
        if in_main_thread():
            self._hand_on()
        elif self._kept:
            self.kernel.io_loop.add_callback(self._hand_on)

    def _receive(self) -> None:
        import zmq

        while True:
            try:
                self._kept.append(self._stream.socket.recv_multipart(zmq.NOBLOCK, copy=False))
            except zmq.Again:
                return
            self.look(self._kept[-1])

    def _hand_on(self) -> None:
        while self._kept:
            self._queue(self._kept[0])
            self._kept.popleft()

    def _queue(self, frames: list[Any]) -> None:
        kernel = self.kernel
        if self._with_priority:
            kernel.schedule_dispatch(_FIFO_PRIORITY, kernel.dispatch_shell, self._stream, frames)
        else:
            kernel.schedule_dispatch(kernel.dispatch_shell, frames)


_lock = threading.Lock()
_current: _Tap | None = None
"""The installed tap; several runs share it."""


def _tap_of(kernel: Any) -> _Tap | None:
    global _current
    with _lock:
        if _current is None or _current.kernel is not kernel:
            _current = _make_tap(kernel)
        return _current


def _make_tap(kernel: Any) -> _Tap | None:
    thread = getattr(kernel, "shell_channel_thread", None)
    if thread is not None:
        supported = hasattr(thread, "io_loop") and hasattr(kernel, "shell_channel_thread_main")
        return _ThreadTap(kernel) if supported and threading.current_thread() is not thread else None
    if hasattr(kernel, "shell_channel_thread"):
        return None  # ipykernel 7 without its thread: the main loop receives, and it is busy
    return _QueueTap(kernel) if hasattr(kernel, "schedule_dispatch") else None


def _release(tap: _Tap) -> None:
    global _current
    with _lock:
        if tap.listeners:
            return
        if _current is tap:
            _current = None
        try:
            tap.remove()
        except Exception:  # it passes messages on unchanged, so it may stay
            return


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("ipykernel").split(".")[:2])


def _is_click(data: Any) -> bool:
    if not isinstance(data, dict) or data.get("method") != "custom":
        return False
    content = data.get("content")
    return isinstance(content, dict) and content.get("event") == "click"
