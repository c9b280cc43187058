"""What is released to the tasks that fetch, and when: the bound on what is ahead of a worker."""

from __future__ import annotations

import asyncio

import numpy as np

from stego_core.distributed.stream_reads import Asked, ViewImages

# Three images of two views each.
IMAGES = ViewImages(
    image_ids=np.repeat([30, 10, 20], 2),
    crops=np.tile([0, 1], 3),
    uris={10: "b", 20: "c", 30: "a"},
)


async def released(asked: Asked, numbers: range) -> list[int]:
    """Return the numbers whose call ends without anything else happening."""
    calls = [asyncio.ensure_future(asked.views(number)) for number in numbers]
    for _ in range(10):  # turns of the event loop
        await asyncio.sleep(0)
    done = [number for number, call in zip(numbers, calls, strict=True) if call.done()]
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return done


def reads(*sizes: int) -> list[np.ndarray]:
    return [np.arange(size) for size in sizes]


def test_reads_are_released_in_order_as_far_as_views_fit() -> None:
    async def scenario() -> None:
        asked = Asked(IMAGES, views_ahead=5)
        assert await released(asked, range(1)) == []
        await asked.expect(0, reads(2, 2, 2, 2))
        assert await released(asked, range(6)) == [0, 1]
        await asked.taken(0)
        assert await released(asked, range(1, 6)) == [1, 2]
        await asked.taken(1)
        assert await released(asked, range(2, 6)) == [2, 3]

    asyncio.run(scenario())


def test_a_read_larger_than_the_bound_is_released_alone() -> None:
    async def scenario() -> None:
        asked = Asked(IMAGES, views_ahead=3)
        await asked.expect(0, reads(6, 1))
        assert await released(asked, range(2)) == [0]
        await asked.taken(0)
        assert await released(asked, range(1, 2)) == [1]

    asyncio.run(scenario())


def test_a_read_is_its_distinct_views_grouped_by_image() -> None:
    async def scenario() -> None:
        asked = Asked(IMAGES, views_ahead=9)
        await asked.expect(7, [np.array([4, 1, 0, 4])])
        views, images = await asked.views(7)
        assert views.tolist() == [0, 1, 4]
        assert images == [("a", 30, [0, 1]), ("c", 20, [0])]

    asyncio.run(scenario())


def test_nobody_waits_for_what_was_taken_or_is_not_expected_any_more() -> None:
    async def scenario() -> None:
        asked = Asked(IMAGES, views_ahead=2)
        await asked.expect(0, reads(2, 2))
        await asked.taken(0)
        await asked.expect(2, reads(1))
        assert await released(asked, range(4)) == [0, 1, 2]
        assert [len((await asked.views(number))[0]) for number in range(3)] == [0, 0, 1]
        await asked.close()
        assert [(await asked.views(number))[1] for number in (2, 3)] == [[], []]
        await asked.open()
        assert await released(asked, range(2, 4)) == [2]

    asyncio.run(scenario())
