"""What async handlers return is waited for here, on one event loop for the life of the rank.

asyncio is imported by the first handler that needs it: the others need not pay for it at each start.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, Awaitable

    from minserve.rank.streaming import Chunks

_loop: AbstractEventLoop | None = None  # of the main thread, where handlers expect to find the same one at each call


def event_loop() -> AbstractEventLoop:
    """The rank's event loop, made at the first call."""
    global _loop
    if _loop is None:
        import asyncio

        _loop = asyncio.new_event_loop()
        asyncio.set_event_loop(_loop)  # also for what a handler asks for outside a coroutine
    return _loop


def complete(result: object) -> object:
    """What a call of the handler's came to: a coroutine is run to its end, anything else is the result already."""
    return event_loop().run_until_complete(_wait_for(result)) if inspect.isawaitable(result) else result


def complete_stream(chunks: AsyncGenerator[object, Any], stream: Chunks) -> object:
    """Sends what an async generator yields, a step each; returns its last chunk, which is empty."""
    return event_loop().run_until_complete(_wait_for(yield_all(chunks, stream)))


async def yield_all(chunks: AsyncGenerator[object, Any], stream: Chunks) -> object:
    """The same inside a coroutine."""
    try:
        async for chunk in chunks:
            await stream.send_from_coroutine(chunk)
    finally:
        await chunks.aclose()  # after a cancel: its own clean-up runs now, not when it is collected
    return [b""] * stream.count


def close() -> None:
    """Ends what the handler has left running on the loop, and the loop."""
    global _loop
    if _loop is None:
        return
    import asyncio

    loop, _loop = _loop, None
    loop.run_until_complete(_end_tasks())
    loop.run_until_complete(loop.shutdown_asyncgens())
    asyncio.set_event_loop(None)
    loop.close()


async def _end_tasks() -> None:
    import asyncio

    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _wait_for(result: Awaitable[object]) -> object:
    import asyncio

    try:
        return await result
    except asyncio.CancelledError as error:
        # Nobody has cancelled it but the handler itself: an error like any other, and no reason to end the rank.
        raise RuntimeError("the handler's coroutine was cancelled") from error
