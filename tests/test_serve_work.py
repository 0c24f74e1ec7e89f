"""The queue of requests, the device's worker, open pictures, options: without HTTP."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from lgnet_fast import LGNetError, WeightsError, limits
from lgnet_fast.pipeline import Inpainter
from lgnet_fast.serve.bodies import picture_file
from lgnet_fast.serve.command import _address, run
from lgnet_fast.serve.display import Display
from lgnet_fast.serve.errors import (
    BusyError,
    CancelledError,
    DrainingError,
    TimeLimitError,
    TooLargeError,
    UnknownPictureError,
)
from lgnet_fast.serve.options import ServeOptions
from lgnet_fast.serve.session import Session
from lgnet_fast.serve.state import State
from lgnet_fast.serve.store import Store
from lgnet_fast.serve.work import DeviceWorker, SharedInpainter, WorkQueue

from .pipeline_support import BlurFill
from .serve_support import file_of, hole, photo

pytestmark = pytest.mark.once  # what runs the network is tested elsewhere


class Held:
    """Work for a queue that runs until it is let go; `begun` and `go` are threading.Event."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, job: object) -> bool:
        self.begun.set()
        return self.go.wait(60)

    async def runs(self) -> None:
        """Return when a thread has begun it: `drain` refuses what no thread has taken yet."""
        assert await asyncio.to_thread(self.begun.wait, 60)


def shared(model: BlurFill, batch: int = 4, **options: object) -> SharedInpainter:
    made = SharedInpainter(model, device="cpu", **options)
    made.share(DeviceWorker(batch))
    return made


def test_passes_of_one_size_that_wait_run_as_one_batch():
    model = BlurFill()
    pipe = shared(model)
    begun, go = threading.Event(), threading.Event()

    def block(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
        begun.set()
        assert go.wait(60)
        return [images]

    blocker = threading.Thread(target=pipe.worker.run, args=(("other",), block, np.zeros((1, 1)), np.zeros((1, 1))))
    blocker.start()
    assert begun.wait(60)
    pictures = [photo(200, 220, seed) for seed in range(5)]
    results: dict[int, np.ndarray] = {}

    def fill(number: int) -> None:
        results[number] = pipe(pictures[number], hole(200, 220))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(pipe.worker._waiting) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    go.set()
    for thread in (blocker, *threads):
        thread.join(60)
    assert [batch for batch, _, _ in model.seen] == [4, 1]
    alone = Inpainter(BlurFill(), device="cpu")
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(results[number], alone(picture, hole(200, 220)))
    pipe.worker.close()
    with pytest.raises(DrainingError):
        pipe(pictures[0], hole(200, 220))


def test_what_fails_together_runs_alone():
    worker = DeviceWorker(4)
    begun, go = threading.Event(), threading.Event()
    outcomes: dict[int, object] = {}

    def run(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
        begun.set()
        assert go.wait(60)
        if len(images) > 1 or images[0, 0] == 2:
            raise MemoryError("too much")
        return [images * 10]

    def ask(number: int) -> None:
        try:
            outcomes[number] = worker.run(("k",), run, np.full((1, 1), number), np.zeros((1, 1)))[0][0, 0]
        except MemoryError as error:
            outcomes[number] = str(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while len(worker._waiting) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    go.set()
    for thread in threads:
        thread.join(60)
    assert outcomes == {0: 0, 1: 10, 2: "too much"}
    worker.close()


def test_a_full_queue_refuses_and_says_when_to_come_again():
    async def main() -> None:
        queue = WorkQueue(threads=1, limit=2, timeout=30)
        go = threading.Event()
        tasks = [asyncio.create_task(queue.run(lambda job: go.wait(60))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert queue.depth == 2
        with pytest.raises(BusyError, match="queue: all 2 places are taken") as caught:
            await queue.run(lambda job: None)
        assert caught.value.status == 429
        assert caught.value.retry_after >= 1
        go.set()
        assert [result for result, _ in await asyncio.gather(*tasks)] == [True, True]
        await asyncio.sleep(0)
        assert (await queue.run(lambda job: 7))[0] == 7
        queue.close()

    asyncio.run(main())


def test_work_over_its_time_is_refused_and_told_to_stop():
    async def main() -> None:
        queue = WorkQueue(threads=1, limit=2, timeout=0.2)
        stopped = threading.Event()

        def work(job: object) -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    job.check()
                except TimeLimitError:
                    stopped.set()
                    raise
                time.sleep(0.005)

        with pytest.raises(TimeLimitError, match="timeout: the request took more than 0.2 seconds"):
            await queue.run(work)
        assert await asyncio.to_thread(stopped.wait, 10)
        queue.close()

    asyncio.run(main())


def test_work_whose_client_left_before_it_began_does_not_run():
    async def main() -> None:
        queue = WorkQueue(threads=1, limit=4, timeout=30)
        go, ran = threading.Event(), []
        first = asyncio.create_task(queue.run(lambda job: go.wait(60)))
        await asyncio.sleep(0.05)

        async def gone() -> bool:
            return True

        with pytest.raises(CancelledError):
            await queue.run(lambda job: ran.append(1), gone)
        go.set()
        await first
        queue.close()
        assert ran == []

    asyncio.run(main())


def test_draining_answers_what_runs_and_refuses_the_rest():
    async def main() -> None:
        queue = WorkQueue(threads=1, limit=4, timeout=30)
        work = Held()
        running = asyncio.create_task(queue.run(work))
        await work.runs()
        waiting = asyncio.create_task(queue.run(lambda job: 1))
        await asyncio.sleep(0)
        queue.drain()
        with pytest.raises(DrainingError):
            await waiting
        with pytest.raises(DrainingError) as caught:
            await queue.run(lambda job: 1)
        assert caught.value.retry_after
        work.go.set()
        assert (await running)[0] is True
        queue.close()

    asyncio.run(main())


def test_waiting_for_a_turn_takes_a_place_but_no_thread():
    async def main() -> None:
        queue, turn = WorkQueue(threads=2, limit=3, timeout=60), asyncio.Lock()
        go, order = threading.Event(), []
        first = asyncio.create_task(queue.run(lambda job: (go.wait(60), order.append(1)), turn=turn))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(queue.run(lambda job: order.append(2), turn=turn))
        await asyncio.sleep(0.05)
        assert (await queue.run(lambda job: 7))[0] == 7
        await asyncio.sleep(0)
        assert queue.depth == 2
        third = asyncio.create_task(queue.run(lambda job: order.append(3), turn=turn))
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="queue: all 3 places are taken"):
            await queue.run(lambda job: order.append(4), turn=turn)
        assert order == []
        go.set()
        await asyncio.gather(first, second, third)
        assert order == [1, 2, 3]
        assert await asyncio.to_thread(queue.close)

    asyncio.run(main())


def test_the_time_limit_counts_while_a_turn_is_waited_for():
    async def main() -> None:
        queue, turn = WorkQueue(threads=1, limit=2, timeout=0.2), asyncio.Lock()
        await turn.acquire()
        with pytest.raises(TimeLimitError) as caught:
            await queue.run(lambda job: 1, turn=turn)
        assert (caught.value.status, caught.value.retry_after) == (504, None)
        assert queue.depth == 0
        turn.release()
        queue._timeout, work = 60, Held()
        assert (await queue.run(lambda job: 1, turn=turn))[0] == 1

        running = asyncio.create_task(queue.run(work, turn=turn))
        await work.runs()
        queue._timeout = 0.2
        with pytest.raises(TimeLimitError):
            await running
        assert turn.locked()  # the work still runs
        work.go.set()
        deadline = time.monotonic() + 60
        while turn.locked():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert queue.depth == 0
        queue.close()

    asyncio.run(main())


def test_what_waits_for_a_turn_or_runs_is_told_that_the_server_ends():
    async def main() -> None:
        queue, turn, work = WorkQueue(threads=1, limit=4, timeout=60), asyncio.Lock(), Held()
        running = asyncio.create_task(queue.run(work, turn=turn))
        await work.runs()
        waiting = asyncio.create_task(queue.run(lambda job: 1, turn=turn))
        await asyncio.sleep(0)
        queue.drain()
        with pytest.raises(DrainingError):
            await waiting
        assert not running.done()
        queue.give_up()
        with pytest.raises(DrainingError) as caught:
            await asyncio.wait_for(running, 30)
        assert (caught.value.status, caught.value.retry_after) == (503, 5)
        assert queue.close(0.01) is False
        work.go.set()
        assert await asyncio.to_thread(queue.close) is True

    asyncio.run(main())


def test_passes_that_nobody_waits_for_do_not_run():
    async def main() -> None:
        queue, worker = WorkQueue(threads=2, limit=4, timeout=60), DeviceWorker(4)
        begun, go, ran = threading.Event(), threading.Event(), []

        def block(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
            begun.set()
            assert go.wait(60)
            return [images]

        def note(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
            ran.append(len(images))
            return [images]

        def ask(run: object, key: str) -> object:
            return lambda job: worker.run((key,), run, np.zeros((1, 1)), np.zeros((1, 1)))

        first = asyncio.create_task(queue.run(ask(block, "a")))
        assert await asyncio.to_thread(begun.wait, 30)

        async def gone() -> bool:
            return bool(worker._waiting)

        with pytest.raises(CancelledError):
            await queue.run(ask(note, "b"), gone)
        go.set()
        await first
        assert (await queue.run(ask(note, "c")))[0] == [np.zeros((1, 1))]
        assert ran == [1]
        queue.close()
        worker.close()

    asyncio.run(main())


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Without garbage collections: what stays in memory then is kept, or in a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def assert_freed(ref: Callable[[], object]) -> None:
    """Threads end a moment after their answer, and what they leave to the event loop needs it to go on."""
    deadline = time.monotonic() + 30
    while ref() is not None:
        assert time.monotonic() < deadline, "it stays in memory"
        await asyncio.sleep(0.01)


class Uploaded(bytearray):
    """The bytes of a request, which a weak reference can be made to."""


@pytest.mark.parametrize("end", ["answered", "refused", "over the time", "left"])
@pytest.mark.parametrize("turn", [True, False])
def test_the_bytes_of_a_request_go_with_it(no_collection, end, turn):
    refs = []

    async def handle(queue: WorkQueue) -> None:
        body = Uploaded(8)
        refs.append(weakref.ref(body))

        def work(job: object) -> int:
            if end == "refused":
                raise TooLargeError("picture: too large")
            while end != "answered":
                time.sleep(0.005)
                job.check()
            return len(body)

        async def gone() -> bool:
            return end == "left"

        await queue.run(work, gone, asyncio.Lock() if turn else None)

    async def main() -> None:
        queue = WorkQueue(threads=1, limit=2, timeout=0.2 if end == "over the time" else 60)
        with suppress(TooLargeError, TimeLimitError, CancelledError):
            await handle(queue)
        while queue.depth:
            await asyncio.sleep(0.005)
        await assert_freed(refs[0])
        queue.close()

    asyncio.run(main())


class Windows(np.ndarray):
    """Windows of a pass, which a weak reference can be made to."""


@pytest.mark.parametrize("fails", [False, True])
def test_the_arrays_of_a_pass_go_with_it(no_collection, fails):
    worker = DeviceWorker(4)

    def run(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
        if fails:
            raise MemoryError("too much")
        return [images.copy()]

    def ask() -> weakref.ref:
        images = np.zeros((1, 3, 8, 8)).view(Windows)
        with suppress(MemoryError):
            worker.run(("k",), run, images, np.zeros((1, 1, 8, 8)))
        return weakref.ref(images)

    asyncio.run(assert_freed(ask()))
    worker.close()


def test_a_worker_that_is_closed_refuses_the_passes_that_wait():
    worker = DeviceWorker(1)
    begun, go, told = threading.Event(), threading.Event(), []

    def block(images: np.ndarray, holes: np.ndarray) -> list[np.ndarray]:
        begun.set()
        assert go.wait(60)
        return [images]

    def ask() -> None:
        try:
            told.append(worker.run(("k",), block, np.zeros((1, 1)), np.zeros((1, 1)))[0].tolist())
        except DrainingError as error:
            told.append(str(error))

    first, second = threading.Thread(target=ask), threading.Thread(target=ask)
    first.start()
    assert begun.wait(60)
    second.start()
    deadline = time.monotonic() + 60
    while not worker._waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert worker.close(0.01) is False
    second.join(60)
    assert told == ["the server is shutting down"]
    go.set()
    assert worker.close() is True
    first.join(60)
    assert told[1:] == [[[0.0]]]


def test_the_servers_limit_of_pixels_takes_the_place_of_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = file_of(photo())  # 11520 pixels
    with pytest.raises(TooLargeError, match=r"image: expected at most 400 pixels \(--max-pixels\)") as caught:
        picture_file(data, "image", 400)
    assert caught.value.status == 413
    monkeypatch.setattr(SharedInpainter, "over", lambda worker, model: shared(BlurFill()))
    state = State(ServeOptions(max_pixels=11520), {"blur": None})
    assert Session(picture_file(data, "image", 11520), state.model(None)).size == (96, 120)
    assert Image.MAX_IMAGE_PIXELS == 11520
    assert state.close() is True


def test_a_model_that_cannot_be_loaded_leaves_no_thread(tmp_path):
    before = threading.active_count()
    for models, error in (({}, "model: expected at least one"), ({"none": str(tmp_path)}, "weights: expected")):
        with pytest.raises(WeightsError, match=error):
            State(ServeOptions(), models)
    assert threading.active_count() == before


@pytest.mark.parametrize(("room", "count"), [(1600, 2), (10**6, 3), (None, 3)])
def test_open_pictures_take_half_of_the_memory_at_most(monkeypatch, room, count):
    monkeypatch.setattr(limits, "memory", lambda: room)
    monkeypatch.setattr(SharedInpainter, "over", lambda worker, model: shared(BlurFill()))
    state = State(ServeOptions(session_bytes=1000), {"blur": None})
    for _ in range(5):
        _opened(state.store)  # 300 bytes each
    assert state.store.usage()[0] == count
    state.close()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080/?token=t"),
        ("localhost", "http://localhost:8080/?token=t"),
        ("::1", "http://[::1]:8080/?token=t"),
        ("192.0.2.7", "http://192.0.2.7:8080/?token=t"),
        ("2001:db8::7", "http://[2001:db8::7]:8080/?token=t"),
        ("box.example", "http://box.example:8080/?token=t"),
        ("0.0.0.0", "http://127.0.0.1:8080/?token=t"),
        ("::", "http://[::1]:8080/?token=t"),
    ],
)
def test_the_printed_address_is_one_that_answers(host, address):
    assert _address(ServeOptions(host=host, token="t"), 8080) == address


def _opened(store: Store, pixels: int = 10):
    session = Session(photo(pixels, 10), Inpainter(BlurFill(), device="cpu"))
    return store.add(session, Display(255.0, None, None), "png")


def test_open_pictures_are_bounded_in_number_bytes_and_time():
    store = Store(count=3, nbytes=10**9, idle=60)
    opened = [_opened(store) for _ in range(3)]
    store.get(opened[0].id)
    fourth = _opened(store)
    assert store.usage()[0] == 3
    with pytest.raises(UnknownPictureError, match="send it again"):
        store.get(opened[1].id)
    assert store.get(opened[0].id) is opened[0]
    opened[0].used = opened[2].used = time.monotonic() - 61
    assert store.get(fourth.id) is fourth
    assert store.usage() == (1, 300)
    assert store.close(fourth.id)
    assert not store.close(fourth.id)
    small = Store(count=99, nbytes=700, idle=60)
    ids = [_opened(small).id for _ in range(5)]
    assert small.usage() == (2, 600)
    assert small.get(ids[-1])
    assert len(set(ids)) == 5
    assert min(map(len, ids)) >= 24
    small.get(ids[-1]).encoded["PNG"] = b"x" * 200, "image/png"  # it has grown beyond the limit with the other one
    assert small.get(ids[-1])
    assert small.usage() == (1, 500)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", ""),
        ("port", 70000),
        ("port", True),
        ("token", "two words"),
        ("cors", ("example.org",)),
        ("cors", "https://example.org"),
        ("cors", ("https://*",)),
        ("cors", ("https://*.example.org",)),
        ("cors", ("https://user@example.org",)),
        ("cors", ("https://example.org:",)),
        ("cors", ("https://bücher.example",)),
        ("allowed_hosts", ("example.org:8443",)),
        ("allowed_hosts", ("https://example.org",)),
        ("max_bytes", 0),
        ("max_pixels", 1.5),
        ("queue", 0),
        ("threads", -1),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("grace", 0),
        ("shutdown", float("inf")),
    ],
)
def test_options_check_themselves_and_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: expected"):
        ServeOptions(**{field: value})


def test_options():
    assert "secret" not in repr(ServeOptions(token="secret"))
    origins = "HTTPS://Example.org", "https://a.org:443", "http://a.org:80", "http://a.org:443", "https://[::1]:8443"
    sent = "https://example.org", "https://a.org", "http://a.org", "http://a.org:443", "https://[::1]:8443"
    assert ServeOptions(cors=origins).cors == sent
    for host, loopback in (("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)):
        assert ServeOptions(host=host).loopback is loopback


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "lgnet_fast.serve.process", raising=False)  # which has imported it
    with pytest.raises(LGNetError, match=r"serve: uvicorn is missing: pip install 'lgnet-fast\[serve\]'"):
        run(ServeOptions(), {"bundled": None})
