"""A block acts in its own thread and in what this starts; `activate` acts everywhere else."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch
from tests.core.conftest import set_parameters
from torch import Tensor, nn

import adapterkit as ak


class Model:
    """Two linear layers with the adapters `a`, `b` and `c`, and their outputs by name."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.adapters = ak.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        self.x = torch.randn(3, 4)
        self.outputs = {"": self.output()}
        for seed, name in enumerate("abc"):
            self.adapters.add(name, ak.config("lora", r=2, target_modules=["0", "1"]))
            set_parameters(self.adapters, name, seed=seed)
            self.outputs[name] = self.output()
        self.adapters.activate()

    @torch.no_grad()
    def output(self) -> Tensor:
        found: Tensor = self.adapters.model(self.x)
        return found

    def acting(self) -> str:
        """Which adapter acts here."""
        found = self.output()
        return next(name for name, output in self.outputs.items() if torch.allclose(found, output))

    def block(self, name: str) -> AbstractContextManager[None]:
        return self.adapters.activated(name) if name else self.adapters.disabled()


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def meeting(*functions: Callable[[Callable[[], object]], Any]) -> list[Any]:
    """What these functions return, each in a thread of its own, which they are given a way to wait for each other."""
    barrier = threading.Barrier(len(functions), timeout=60)
    with ThreadPoolExecutor(len(functions)) as pool:
        return [task.result() for task in [pool.submit(function, barrier.wait) for function in functions]]


def test_each_thread_is_in_its_own_block() -> None:
    model = Model()
    model.adapters.activate("c")

    def work(name: str, wait: Callable[[], object]) -> list[str]:
        found = []
        for _ in range(3):
            with model.block(name):
                wait()
                found.append(model.acting())
                wait()
            wait()
            found.append(model.acting())
            wait()
        return found

    found = meeting(*[lambda wait, name=name: work(name, wait) for name in ("a", "b", "")])
    assert found == [["a", "c"] * 3, ["b", "c"] * 3, ["", "c"] * 3]


def test_each_thread_has_its_own_rows() -> None:
    model = Model()

    def work(names: list[str | None], wait: Callable[[], object]) -> None:
        for _ in range(3):
            with model.adapters.per_sample(names):
                wait()
                found = model.output()
                wait()
            for row, name in enumerate(names):
                torch.testing.assert_close(found[row], model.outputs[name or ""][row])

    meeting(lambda wait: work(["a", "b", None], wait), lambda wait: work(["c", None, "a"], wait))


def test_activate_acts_in_all_threads_but_in_their_blocks() -> None:
    model = Model()

    def blocked(wait: Callable[[], object]) -> list[str]:
        with model.block("a"):
            wait()
            wait()
            inside = model.acting()
        return [inside, model.acting()]

    def activating(wait: Callable[[], object]) -> list[str]:
        wait()
        model.adapters.activate("b")
        wait()
        return [model.acting()]

    def looking(wait: Callable[[], object]) -> list[str]:
        before = model.acting()
        wait()
        wait()
        return [before, model.acting()]

    assert meeting(blocked, activating, looking) == [["a", "b"], ["b"], ["", "b"]]


def test_activate_in_a_block_holds_to_its_end() -> None:
    model = Model()
    with model.block("a"):
        model.adapters.activate("b")
        assert model.acting() == "b"
        with model.block("c"):
            assert model.acting() == "c"
        assert model.acting() == "b"
    assert model.acting() == ""


def test_two_threads_train_two_adapters() -> None:
    model = Model()

    def gradient(name: str) -> list[Tensor]:
        parameters = list(model.adapters.parameters(name))
        with model.block(name):
            loss = model.adapters.model(model.x).square().sum()
        return list(torch.autograd.grad(loss, parameters))

    expected = {name: gradient(name) for name in "ab"}
    found = meeting(*[lambda _, n=n: [gradient(n) for _ in range(20)] for n in "ab"])
    for name, several in zip("ab", found, strict=True):
        for grads in several:
            torch.testing.assert_close(grads, expected[name])


# Threads that are started in a block


def test_a_thread_started_in_a_block_is_in_it_to_its_end() -> None:
    model, over, found = Model(), threading.Event(), []

    def generate() -> None:
        found.append(model.acting())
        over.wait(60)
        found.append(model.acting())
        with model.block("b"):
            found.append(model.acting())
        found.append(in_thread(model.acting))

    with model.block("a"):
        thread = threading.Thread(target=generate)
        thread.start()
    over.set()
    thread.join()
    assert found == ["a", "a", "b", "a"]
    assert in_thread(model.acting) == ""


def test_a_timer_that_is_started_in_a_block_is_in_it_though_it_runs_later() -> None:
    model, over, found = Model(), threading.Event(), []

    def late() -> None:
        over.wait(60)
        found.append(model.acting())

    with model.block("a"):
        timer = threading.Timer(0, late)
        timer.start()
    over.set()
    timer.join()
    assert found == ["a"]


def test_a_task_runs_in_the_block_that_it_was_given_in() -> None:
    model, found = Model(), []
    with ThreadPoolExecutor(1) as pool:
        for name in ("a", "b", "c", ""):
            with model.block(name):
                task = pool.submit(model.acting)
            found += [task.result(), pool.submit(model.acting).result()]
        with model.block("a"):
            found += pool.map(lambda _: model.acting(), range(2))
    assert found == ["a", "", "b", "", "c", "", "", "", "a", "a"]


def test_a_thread_that_works_for_others_says_when_its_block_has_ended() -> None:
    model = Model()
    with model.block("a"):
        pool = ThreadPool(1)
        assert pool.apply(model.acting) == "a"
    with pytest.raises(ak.StateError, match="started in a block"):
        pool.apply(model.acting)

    def explicit() -> str:
        with model.block("b"):
            return model.acting()

    assert pool.apply(explicit) == "b"
    pool.close()
    pool.join()


# Blocks that do not nest


def test_blocks_may_end_in_any_order() -> None:
    model = Model()

    def stream(name: str) -> Iterator[str]:
        with model.block(name):
            yield model.acting()

    first, second = stream("a"), stream("b")
    assert [next(first), next(second)] == ["a", "b"]
    first.close()
    assert model.acting() == "b"
    second.close()
    assert model.acting() == ""


def test_a_block_may_end_in_another_thread() -> None:
    model = Model()
    block = model.block("a")
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    assert model.acting() == ""


@pytest.mark.parametrize("trainable", [False, True])
def test_a_copy_made_in_a_block_is_in_it_by_itself(trainable: bool) -> None:
    model = Model()
    with model.adapters.activated("a", trainable=trainable):
        twin = copy.deepcopy(model.adapters.model)
        twin_adapters = ak.attach(twin)
    torch.testing.assert_close(twin(model.x), model.outputs["a"])
    twin_adapters.activate("b")
    twin(model.x).square().sum().backward()
    assert all(p.grad is not None for p in twin_adapters.parameters("b"))
    assert all(p.grad is None for n in "abc" for p in model.adapters.parameters(n))
    assert model.acting() == ""


def test_detaching_in_a_block_ends_it() -> None:
    model = Model()
    with model.block("a"):
        bare = model.adapters.detach()
    torch.testing.assert_close(bare(model.x), model.outputs[""])
    assert ak.attach(bare).names == ()


def test_tasks_of_one_loop_do_not_use_each_others_adapters() -> None:
    model = Model()

    async def use(name: str) -> str:
        with model.block(name):
            await asyncio.sleep(0)
            return model.acting()

    async def both() -> list[str | BaseException]:
        return await asyncio.gather(use("a"), use("b"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first == "a"
    assert isinstance(second, ak.StateError)
    assert "Another asyncio task of this thread is in a block" in str(second)
    assert model.acting() == ""


def test_a_task_may_have_blocks_inside_blocks_and_each_task_its_own_in_a_thread() -> None:
    model = Model()

    def use(name: str) -> str:
        with model.block(name):
            return model.acting()

    async def both() -> list[str]:
        with model.block("c"), model.block("b"):
            await asyncio.sleep(0)
            assert model.acting() == "b"
        return await asyncio.gather(asyncio.to_thread(use, "a"), asyncio.to_thread(use, "b"))

    assert asyncio.run(both()) == ["a", "b"]
