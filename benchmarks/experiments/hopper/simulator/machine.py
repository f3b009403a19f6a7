"""A model of what is asynchronous on Hopper, for one program at a time.

Partitions are threads of which one runs at a time, chosen at random (seeded) after each operation on shared memory, and

- an mbarrier has a phase, a pending count and a byte count, as in PTX, and a wait looks at the parity only: one that is
  a whole phase late or early passes or hangs as it would on the GPU;
- a TMA copy fills its target with NaN when it is issued and with data at a random later time, then counts its bytes;
- a wgmma reads shared memory at a random time between its issue and the wait that ends it, often the latest possible;
  it reads NaN where a slot is used too early, and NaN or the next tile where it was given back too early;
- its accumulator is no tensor before a wait that covers it;
- no runnable partition and no copy under way is a deadlock.
"""

from __future__ import annotations

import random
import threading

import torch


class MachineError(Exception):
    """What would be a hang or a wrong result on the GPU."""


def must(condition, what):
    if not condition:
        raise MachineError(what)


class Barrier:
    """An mbarrier."""

    def __init__(self):
        self.count = None

    def init(self, count):
        must(self.count is None, "a barrier initialised twice")
        self.count = self.pending = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, count=1):
        must(self.count is not None, "an arrival at a barrier that was not initialised")
        self.pending -= count
        must(self.pending >= 0, "more arrivals than the phase takes")
        self.turn()

    def turn(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count

    def passed(self, parity):
        """As mbarrier.test_wait.parity: true where the phase of that parity is the one before the current."""
        return self.phase & 1 != parity


class Accumulator:
    """What a wgmma adds to, while it may not have ended: a (M, K) and b (K, N) have their tensors in ``x``."""

    def __init__(self, a, b, acc, use, layout):
        self.a, self.b, self.acc, self.use, self.layout = a, b, acc, use, layout
        self.result = None

    def finish(self):
        if self.result is None:
            before = self.acc.result if isinstance(self.acc, Accumulator) else self.acc.x
            product = self.a.x.float() @ self.b.x.float()
            self.result = before + product if self.use else product

    def __getattr__(self, name):
        raise MachineError(f"{name} of an accumulator asked for while its wgmma is in flight")


class Program:
    """One program: its partitions, copies under way, and wgmmas in flight by partition."""

    def __init__(self, seed, number, programs):
        self.random = random.Random(seed)
        self.number, self.programs = number, programs
        self.copies = []
        self.flying = {}
        self.turn = threading.Condition()
        self.waiting = {}  # thread's name -> condition to run again
        self.running = None
        self.error = None

    def land(self):
        """One copy arrives."""
        target, data, bar = self.copies.pop(self.random.randrange(len(self.copies)))
        target.copy_(data)
        bar.bytes -= target.numel() * target.element_size()
        bar.turn()

    def choose(self):
        """Who runs next."""
        while True:
            if self.copies and self.random.random() < 0.3:
                self.land()
                continue
            ready = [name for name, condition in self.waiting.items() if condition()]
            if ready:
                self.running = self.random.choice(ready)
                return
            if not self.copies:
                if self.waiting:
                    self.error = self.error or MachineError(f"deadlock of {', '.join(sorted(self.waiting))}")
                self.running = None
                return
            self.land()

    def switch(self, condition=lambda: True):
        """Let others run, and return no earlier than the condition holds."""
        with self.turn:
            self.waiting[threading.current_thread().name] = condition
            self.choose()
            self.turn.notify_all()
            self.begin()

    def begin(self):
        """Wait until it is this thread's turn."""
        me = threading.current_thread().name
        with self.turn:
            self.turn.wait_for(lambda: self.running == me or self.error is not None)
            if self.error:
                raise self.error
            del self.waiting[me]

    def end(self, error=None):
        with self.turn:
            self.error = self.error or error
            self.choose()
            self.turn.notify_all()

    def mine(self):
        """This partition's wgmmas in flight, in the order of their issue."""
        return self.flying.setdefault(threading.current_thread().name, [])

    def copy(self, source, row, column, target, bar):
        """Start the copy of a box; what is past the source's edge is zeros, and counts."""
        data = torch.zeros_like(target)
        piece = source[row : row + target.shape[0], column : column + target.shape[1]]
        data[: piece.shape[0], : piece.shape[1]] = piece
        target.fill_(float("nan"))
        self.copies.append((target, data, bar))
        self.switch()

    def multiply(self, a, b, acc, use, layout):
        """Start a wgmma."""
        result = Accumulator(a, b, acc, use, layout)
        self.mine().append(result)
        if self.random.random() < 0.3:  # some are quick; none before those issued earlier
            for one in self.mine():
                one.finish()
        self.switch()
        return result

    def wait_wgmmas(self, outstanding):
        """Return when at most ``outstanding`` are in flight."""
        while len(self.mine()) > outstanding:
            self.mine().pop(0).finish()
        self.switch()

    def run(self, functions):
        """The partitions [(function, arguments), ...], to their end."""

        def body(function, arguments):
            try:
                self.begin()
                function(*arguments)
                must(not self.mine(), "a wgmma was never waited for")
                self.end()
            except BaseException as error:  # handed on to the caller
                self.end(error)

        threads = [
            threading.Thread(target=body, args=pair, name=f"{i} {pair[0].__name__}", daemon=True)
            for i, pair in enumerate(functions)
        ]
        self.waiting = {thread.name: lambda: True for thread in threads}
        for thread in threads:
            thread.start()
        with self.turn:
            self.choose()
            self.turn.notify_all()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        must(not self.copies, "a copy outlived the program")
