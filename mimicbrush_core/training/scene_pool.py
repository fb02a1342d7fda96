"""Scenes that are rendered once and used several times: rendering would cost more than learning from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Scene = TypeVar("Scene")


class ScenePool(Generic[Scene]):
    """The scenes of samples, by the samples' global indices.

    render({scene number: index of the first sample that uses it}) -> the scenes, in that order. held: how many are held
    at a time; echo: how often each is used before new ones are rendered. A sample's scene is a function of the
    sample's index alone, whatever was asked before: runs are killed and resumed.
    """

    def __init__(self, render: Callable[[dict[int, int]], Sequence[Scene]], held: int, echo: int):
        self._render, self._held, self._echo = render, held, echo
        self._scenes: dict[int, Scene] = {}
        self._chunk = -1

    def of(self, indices: Sequence[int]) -> list[Scene]:
        """The scenes of these samples; those that are not held are rendered, all at once."""
        numbers = [self.number(index) for index in indices]
        chunk = indices[0] // (self._held * self._echo)
        if chunk != self._chunk:
            self._scenes, self._chunk = {}, chunk
        missing = {number: self._first(number) for number in numbers if number not in self._scenes}
        if missing:
            self._scenes.update(zip(missing, self._render(missing), strict=True))
        return [self._scenes[number] for number in numbers]

    def number(self, index: int) -> int:
        """The scene that the sample with this index uses."""
        chunk, position = divmod(index, self._held * self._echo)
        return chunk * self._held + position % self._held

    def _first(self, number: int) -> int:
        chunk, position = divmod(number, self._held)
        return chunk * self._held * self._echo + position
