"""Every kernel once, each call within a limit: those that hang, fault or give NaN are named, and the rest goes on."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence

from isolated import DIED, HUNG, Isolated, Outcome

LIMIT = 15.0  # seconds a call; Triton's compiler takes most of them

# What is not worth the time of the tests where a call has hung or has taken its process down: (how its name begins,
# what the names of those tests hold).
TESTS = (
    ("native distill", ("test_distill", "test_cuda_kernels.py", "test_cuda.py", "test_linear", "test_one_class")),
    ("native adjusted", ("test_adjust",)),
    ("native latent", ("test_latent", "latents", "ascend", "noise")),
    ("native topk", ("test_topk", "test_linear_topk")),
    ("native tokens", ("test_tokens.py",)),
    ("triton distill", ("gpu_the_loss", "gpu_a_reduction", "gpu_a_gradient", "gpu_rows", "to_the_31_logits[")),
    ("triton adjusted", ("gpu_adjusted",)),
    ("triton latent", ("test_on_a_gpu_latents", "gpu_more_than_two_to_the_31_latents")),
    ("triton soft", ("soft_embedding",)),
)
# A way to lay rows, or a divergence: where it hangs, its own tests are left out.
OWN = (
    (re.compile(r"native distill: (?!gradients in backward)(.+), in place"), ("test_in_place_gradients", "-{}]")),
    (re.compile(r"native distill: (?!gradients in backward)(.+)"), ("test_cuda", "-{}]")),
    (re.compile(r"triton distill: (\w+), \d+.*"), ("test_triton", "test_on_a_gpu", "[{}-")),
)
FEW = 4  # of those; more of them do what any call of the op does


def smoke(
    names: Sequence[str], worker: Callable[[], Isolated], end: float, tell: Callable[[str, Outcome], None],
    limit: float | None = None, processes: int = 12,
) -> dict[str, Outcome]:  # fmt: skip
    """The outcomes; a name without one was not reached before ``end`` (of time.monotonic)."""
    limit = LIMIT if limit is None else limit
    waiting: queue.Queue[str] = queue.Queue()
    for name in names:
        waiting.put(name)
    found: dict[str, Outcome] = {}

    def work() -> None:
        process = worker()
        try:
            while time.monotonic() < end:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                left = max(1.0, end - time.monotonic())
                outcome = process.run({"task": "call", "name": name}, min(limit, left))
                if outcome.status == HUNG and left < limit:  # not its fault
                    return
                found[name] = outcome
                tell(name, outcome)
        finally:
            process.close()

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def left_out(outcomes: dict[str, str]) -> list[list[str]]:
    """Of which tests nothing is to be expected: lists of words that their names hold, all of them.

    ``outcomes``: the status of each call. One that merely fails takes out none, for its tests say more.
    """
    bad = [name for name, status in outcomes.items() if status in (HUNG, DIED)]
    found: list[list[str]] = []
    for beginning, words in TESTS:
        mine = [name for name in bad if name.startswith(beginning)]
        own = [_own(name) for name in mine]
        if len(set(map(str, own))) <= FEW and None not in own:
            found += [each for each in own if each is not None]
        elif mine:
            found += [[word] for word in words]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def _own(name: str) -> list[str] | None:
    for pattern, words in OWN:
        match = pattern.fullmatch(name)
        if match is not None:
            return [word.format(match[1]) for word in words]
    return None
