"""What the assistant can ask of the board that it runs on: sensors, the clock, GPIO pins.

Every tool is a function whose result the model is told as JSON. What is not there (a sensor, gpiozero, a pin) is
{"error": ...} in one line, so that the model can say so.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

from edgeq.machine.system import firmware_bits

__all__ = ["Board", "Pins", "Tool"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` are JSON schemas by name; all of them are required."""

    run: Callable[..., dict[str, Any]]
    about: str
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """In OpenAI's form, as `Model.chat(tools=)` takes it."""
        parameters = {"type": "object", "properties": dict(self.parameters), "required": list(self.parameters)}
        function = {"name": self.run.__name__, "description": self.about, "parameters": parameters}
        return {"type": "function", "function": function}


class Board:
    """The sensors of a Linux board, its clock, and its pins.

    pins: None where there are none. switchable: the pins (BCM numbers) that the model may switch; it can read them all.
    root: where /proc and /sys are, and disk the folder whose disk is measured: for tests.
    """

    def __init__(
        self, pins: Pins | None = None, switchable: Sequence[int] = (), *, root: Path = Path("/"), disk: Path = Path()
    ) -> None:
        self._pins, self._switchable, self._root, self._disk = pins, tuple(switchable), root, disk
        tools = [
            Tool(self.read_board, "Temperature, load, memory and disk of this board."),
            Tool(self.get_time, "The local time in a city.", {"city": {"type": "string"}}),
        ]
        number = {"type": "integer", "description": "BCM number of the pin"}
        if pins:
            tools.append(Tool(self.read_pin, "Whether a GPIO pin of this board is on.", {"pin": number}))
        if pins and switchable:
            pin = {"type": "integer", "enum": list(switchable)}
            tools.append(Tool(self.set_pin, "Switch a GPIO pin on or off.", {"pin": pin, "on": {"type": "boolean"}}))
        self._tools = {tool.run.__name__: tool for tool in tools}

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools, described for the model."""
        return [tool.description for tool in self._tools.values()]

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What a tool says, as JSON; whatever goes wrong is said as well."""
        tool = self._tools.get(name)
        if tool is None:
            return json.dumps({"error": f"there is no tool {name} on this board"})
        try:
            return json.dumps(tool.run(**arguments), ensure_ascii=False)
        except Exception as error:  # the model chose the arguments, and a library may raise anything
            return json.dumps(
                {"error": " ".join((str(error) or type(error).__name__).split())[:300]}, ensure_ascii=False
            )

    def read_board(self) -> dict[str, Any]:
        """Every sensor that is there."""
        sensors = {
            "cpu_temperature_celsius": self._temperature(),
            "throttled": self._throttled(),
            "load_percent": self._load(),
            "memory_free_percent": self._memory(),
            "disk_free_gb": round(shutil.disk_usage(self._disk).free / 1e9, 1),
        }
        return {name: value for name, value in sensors.items() if value is not None}

    def _temperature(self) -> float | None:
        """Degrees of the hottest zone that is the processor's, or of the hottest one."""
        zones = dict[str, float]()
        for zone in sorted(self._root.glob("sys/class/thermal/thermal_zone*")):
            try:
                kind, degrees = (zone / "type").read_text().strip(), int((zone / "temp").read_text()) / 1000
            except (OSError, ValueError):  # a zone that is switched off cannot be read
                continue
            zones[kind] = max(degrees, zones.get(kind, degrees))
        cpu = [degrees for kind, degrees in zones.items() if "cpu" in kind or "soc" in kind]
        return round(max(cpu or zones.values()), 1) if zones else None

    def _throttled(self) -> bool | None:
        """Whether a Raspberry Pi runs slower than it could now, from heat or a weak power supply."""
        bits = firmware_bits(self._root)
        return None if bits is None else bool(bits & 0b1111)

    def _load(self) -> int | None:
        """Per cent of the cores that had work in the last minute."""
        try:
            load = float((self._root / "proc/loadavg").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None
        return round(100 * load / (os.cpu_count() or 1))

    def _memory(self) -> int | None:
        """Per cent of the memory that is to be had."""
        try:
            lines = (line.split() for line in (self._root / "proc/meminfo").read_text().splitlines())
            known = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
            return round(100 * known["MemAvailable"] / known["MemTotal"])
        except (OSError, ValueError, KeyError, ZeroDivisionError):
            return None

    def get_time(self, city: str) -> dict[str, Any]:
        """The time in a city that the system's time zones are named for; else the board's own, and that it is that."""
        from zoneinfo import ZoneInfo

        wanted = str(city).strip().replace(" ", "_").casefold()
        for name in sorted(available_timezones()):
            if name.rpartition("/")[2].casefold() == wanted:
                return {"time": f"{datetime.now(ZoneInfo(name)):%H:%M}"}
        return {"time": f"{datetime.now():%H:%M}", "note": f"the time of this board; no time zone is named {city}"}

    def read_pin(self, pin: int) -> dict[str, Any]:
        """Whether a pin is on."""
        assert self._pins
        return {"pin": pin, "on": self._pins.read(pin)}

    def set_pin(self, pin: int, on: bool) -> dict[str, Any]:
        """Switch a pin that may be switched."""
        assert self._pins
        if pin not in self._switchable:
            return {"error": f"pin {pin} may not be switched; --switch allows {', '.join(map(str, self._switchable))}"}
        self._pins.switch(pin, on)
        return {"pin": pin, "on": on}


class Pins:
    """GPIO pins through gpiozero. Without any, or with `mock`, they are gpiozero's mock pins.

    Raises ImportError where gpiozero is not installed.
    """

    def __init__(self, *, mock: bool = False) -> None:
        import gpiozero
        from gpiozero.pins.mock import MockFactory

        self.mock, self._gpiozero = mock, gpiozero
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each library that has no pins here
            try:
                if not mock:
                    gpiozero.Device.ensure_pin_factory()
            except Exception:  # gpiozero's own, or what its libraries raise without a chip
                self.mock = True
        if self.mock:
            gpiozero.Device.pin_factory = MockFactory()
        self._devices = dict[int, Any]()

    def __contains__(self, pin: int) -> bool:
        """Whether the board has a pin of that BCM number."""
        return any(True for _ in self._gpiozero.Device.pin_factory.board_info.find_pin(pin))

    def read(self, pin: int) -> bool:
        """Whether a pin is on: as it was switched, or as it is from outside, where nothing connected is off."""
        if pin not in self._devices:
            self._devices[pin] = self._gpiozero.InputDevice(pin, pull_up=False)
        return bool(self._devices[pin].value)

    def switch(self, pin: int, on: bool) -> None:
        """Switch a pin, which is an output from then on."""
        device = self._devices.get(pin)
        if not isinstance(device, self._gpiozero.OutputDevice):
            if device is not None:
                device.close()
            device = self._devices[pin] = self._gpiozero.OutputDevice(pin)
        device.value = bool(on)
