"""The mailbox: order, bounds, and generations that are not heard any more."""

import threading

from cluster.channel import Message
from cluster.mailbox import Mailbox


def said(number: int, generation: int = 1) -> Message:
    return Message(generation, 0, "said", number)


def bodies(mailbox: Mailbox, most: int = 64, most_bytes: int = 1000) -> list[int]:
    return [message.body for message in mailbox.take(0, most, most_bytes)]


def filled(sizes: list[int], most_bytes: int = 10_000) -> Mailbox:
    mailbox = Mailbox(most_bytes)
    for number, size in enumerate(sizes):
        mailbox.put(said(number), size)
    return mailbox


def test_messages_come_in_order_and_once() -> None:
    mailbox = filled([1, 1, 1])
    assert bodies(mailbox, most=2) == [0, 1]
    assert bodies(mailbox) == [2]
    assert bodies(mailbox) == []


def test_bytes_bound_what_is_taken_but_for_the_first() -> None:
    mailbox = filled([400, 600, 1, 2000])
    assert bodies(mailbox) == [0, 1]
    assert bodies(mailbox) == [2]
    assert bodies(mailbox) == [3]


def test_whoever_says_too_much_waits_until_there_is_room() -> None:
    mailbox = filled([60], most_bytes=100)
    put = threading.Thread(target=mailbox.put, args=(said(1), 60))
    put.start()
    put.join(0.05)
    assert put.is_alive()
    mailbox.put(said(2), 0)  # an end is told nevertheless
    assert bodies(mailbox) == [0, 2]
    put.join(5)
    assert not put.is_alive()
    assert bodies(mailbox) == [1]


def test_a_fence_drops_what_is_older_and_frees_whoever_waits() -> None:
    mailbox = filled([60], most_bytes=100)
    put = threading.Thread(target=mailbox.put, args=(said(1), 60))
    put.start()
    mailbox.fence(2)
    put.join(5)
    assert not put.is_alive()
    mailbox.put(said(2), 60)
    mailbox.put(said(3, generation=2), 100)
    mailbox.fence(1)  # no way back
    mailbox.put(said(4), 0)
    assert bodies(mailbox) == [3]


def test_a_wake_ends_one_wait() -> None:
    mailbox = Mailbox(10)
    mailbox.wake()
    assert mailbox.take(60, 1, 1) == []
    assert mailbox.take(0.01, 1, 1) == []


def test_the_newest_pulse_goes_along_and_wakes_nobody() -> None:
    mailbox = Mailbox(100)
    for number in range(3):
        mailbox.put(Message(1, 0, "pulse", number), 0)
    woken = threading.Thread(target=mailbox.take, args=(30, 64, 100))
    woken.start()
    woken.join(0.05)
    assert woken.is_alive()
    mailbox.put(said(7), 1)
    woken.join(10)
    assert not woken.is_alive()
    mailbox.put(said(8), 1)
    mailbox.put(Message(1, 0, "pulse", 3), 0)
    mailbox.put(Message(1, 0, "pulse", 4), 0)
    assert bodies(mailbox) == [8, 4]
    mailbox.put(Message(1, 0, "pulse", 5), 0)
    mailbox.fence(2)
    assert bodies(mailbox) == []
