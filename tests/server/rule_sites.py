"""Hospitals that answer by rule, so that the engine is tested without training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from server.sites import SiteInfo
from tat_core.config import RunConfig
from tat_core.packet import Packet, echo

SITES = {"a-ct": ("CT",), "b-ct": ("CT",), "c-mri": ("MRI",), "d-pet": ("PET",)}


class RuleSites:
    """Each site's update is a fixed function of its name, the round and the model; ``tamper`` may spoil a reply.

    Parameters
    ----------
    tamper : callable
        Gets the site's name, the round and the good reply; returns the reply to send, or None to stay silent.
    order : callable
        The order in which the sites answer.
    tamper_scores : callable
        Like `tamper`, for what they say of their validation images.
    """

    def __init__(
        self,
        tamper: Callable[[str, int, Packet], Packet | None] = lambda _name, _round, reply: reply,
        order: Callable[[Collection[str]], list[str]] = sorted,
        tamper_scores: Callable[[str, int, Packet], Packet | None] = lambda _name, _round, reply: reply,
    ) -> None:
        self.tamper, self.order, self.tamper_scores = tamper, order, tamper_scores
        self.asked: list[tuple[str, int, str]] = []

    def members(self, config: RunConfig) -> dict[str, SiteInfo]:
        return {name: SiteInfo(tasks, "1-10") for name, tasks in SITES.items()}

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        for name in self.order(instructions):
            instruction = instructions[name]
            number = int(instruction.config["round"])
            self.asked.append((kind, number, name))
            training = kind == "train"
            reply = good_reply(name, instruction) if training else good_scores(name, instruction)
            answer = (self.tamper if training else self.tamper_scores)(name, number, reply)
            yield (name, answer) if answer is not None else None


class CutOff(RuleSites):
    """Nobody is reached the first times that round 2 is asked for."""

    def __init__(
        self, silent_times: int, tamper: Callable[[str, int, Packet], Packet | None] = lambda _name, _round, reply: reply
    ) -> None:
        super().__init__(tamper)
        self.silent_times = silent_times

    def ask(self, kind: str, instructions: Mapping[str, Packet], timeout_s: float) -> Iterator[tuple[str, Packet] | None]:
        number = next(iter(instructions.values())).config["round"]
        if (kind, number) == ("train", 2) and self.silent_times:
            self.silent_times -= 1
            return
        yield from super().ask(kind, instructions, timeout_s)


def good_reply(name: str, instruction: Packet) -> Packet:
    number = int(instruction.config["round"])
    rng = np.random.default_rng([sum(name.encode()), number])
    arrays = {key: 1e-3 * (rng.standard_normal(v.shape).astype(np.float32) - v) for key, v in instruction.arrays.items()}
    count, loss = 4, 0.01 * (1 + len(name)) / number
    metrics: dict[str, int | float] = {}
    for task in SITES[name]:
        metrics |= {
            f"{task}.count": count,
            f"{task}.input_sum": 0.1 * count,
            f"{task}.change_sum": 0.05 * count,
            f"{task}.loss_sum": loss * count,
            f"{task}.gradient_sum": 1.0 * count,
            f"{task}.loss_square_sum": loss * loss * count,
        }
    return Packet(arrays, metrics, {"site": name, **echo(instruction)})


def good_scores(name: str, instruction: Packet) -> Packet:
    number = int(instruction.config["round"])
    metrics: dict[str, int | float] = {}
    for task in SITES[name]:
        for arm, psnr in (("input", 25.0), ("restored", 25.0 + number)):
            metrics |= {f"{task}.{arm}.count": 1, f"{task}.{arm}.psnr_sum": psnr}
            metrics |= {f"{task}.{arm}.ssim_sum": 0.8, f"{task}.{arm}.rmse_sum": 10.0}
    return Packet({}, metrics, {"site": name, **echo(instruction)})
