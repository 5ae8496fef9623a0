"""The parts of the fuzz: each draws an input, which JSON can hold, and checks one, also one that was drawn long ago."""

from __future__ import annotations

import ast
import random
import weakref
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, Protocol

from tests.fuzz import commands, configs, folders, kills, machine

Input = dict[str, Any]


class Part(Protocol):
    """What inputs are drawn and checked by; made anew after each finding."""

    def draw(self, dice: random.Random) -> Input:
        """An input."""
        ...

    def check(self, given: Input) -> bool:
        """Whether the library accepted it.

        Raises:
            Finding: it shows a fault of the library.
        """
        ...


class Folders:
    """Adapter folders and files."""

    def __init__(self, place: Path) -> None:
        self.known, self.target = folders.seeds(place), folders.Target(place)

    def draw(self, dice: random.Random) -> Input:
        files = folders.draw(dice, self.known).files()
        return {"files": {name: b64encode(data).decode() for name, data in files.items()}, "more": dice.random() < 0.2}

    def check(self, given: Input) -> bool:
        files = {name: b64decode(data) for name, data in given["files"].items()}
        accepted = self.target.check(files)
        if given.get("more", True):
            self.target.check_more(files)
        return accepted


class Configs:
    """Fields of configs."""

    def __init__(self, place: Path) -> None:
        self.target = configs.Target()

    def draw(self, dice: random.Random) -> Input:
        method, fields = configs.draw(dice)
        return {"method": method, "fields": fields}

    def check(self, given: Input) -> bool:
        fields = given["fields"]
        return self.target.check(given["method"], ast.literal_eval(fields) if isinstance(fields, str) else fields)


class Commands:
    """Command lines."""

    def __init__(self, place: Path) -> None:
        self.place = place
        commands.world(place)

    def draw(self, dice: random.Random) -> Input:
        return {"words": commands.draw(dice)}

    def check(self, given: Input) -> bool:
        return commands.check(given["words"], self.place)


class Machine:
    """Calls in any order, with faults."""

    def __init__(self, place: Path) -> None:
        self.steps = 20

    def draw(self, dice: random.Random) -> Input:
        return {"seed": dice.randrange(1 << 60)}

    def check(self, given: Input) -> bool:
        with machine.World(random.Random(given["seed"])) as world:
            for _ in range(self.steps):
                world.step()
        return True


class Kills:
    """Processes killed while they write."""

    def __init__(self, place: Path) -> None:
        self.writer = kills.Writer(place)
        weakref.finalize(self, self.writer.close)

    def draw(self, dice: random.Random) -> Input:
        return {"work": dice.choice([*kills.WORKS]), "seed": dice.randrange(1 << 60)}

    def check(self, given: Input) -> bool:
        self.writer.kill_and_look(given["work"], random.Random(given["seed"]))
        return True


PARTS = {"folders": Folders, "configs": Configs, "commands": Commands, "machine": Machine, "kills": Kills}
