"""Films (mp4 and so on) or folders of pictures, an episode each, with actions beside them: NAME.npy or NAME.csv, rows of T actions.

NAME is that of the film without its suffix, or the whole name of the folder. Rewards may lie in NAME.reward.npy or NAME.reward.csv.
Numbers in names are put in order by their value. `--actions none`: no actions are known, A = 1 and zeros.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from tempfile import TemporaryFile
from typing import IO

import numpy as np

from aime_fast.data.foreign.episode import NONE, Episode, Names, build, readable
from aime_fast.data.foreign.pictures import gathered, opened
from aime_fast.errors import DataError

FILMS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
PICTURES = (".png", ".jpg", ".jpeg")
AGAIN = "copy it again, or leave it out"
# ffmpeg: say how serious each message is; end at the first frame that is damaged; add and leave out none to even out the rate.
LOUD = ("-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info")
STRICT = ("-xerror", "-err_detect", "explode")
EVERY = ("-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-")
SLACK = 1.5  # frames by which a whole film may be shorter than its container says
ROUNDED = 0.01  # seconds: how exactly ffmpeg says it
SLOW = 10.0  # frames a second, where a film does not say


def read(source: Path, names: Names) -> Iterator[Episode]:
    """The films of a folder, or the folders in it that hold pictures; or one of them. Raises DataError where one is damaged."""
    found = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    films = found if source.is_file() else [path for path in found if path.suffix.lower() in FILMS]
    folders = set() if source.is_file() else {path.parent for path in found if path.suffix.lower() in PICTURES}
    if not films and not folders:
        raise DataError(f"{source}: neither a film ({', '.join(FILMS)}) nor a folder of pictures ({', '.join(PICTURES)})")
    for path in [*sorted(films, key=_order), *sorted(folders, key=_order)]:
        with readable(str(path)):
            pixels = (_film if path.is_file() else _pictures)(path, names.image_size)
            arrays = {"pixels": pixels} | ({} if names.given.get("action") == NONE else {"action": _actions(path)})
            reward = _table(path, ".reward")
            if reward is not None:
                arrays["reward"] = reward
        yield build(str(path), arrays, leads=bool(names.leads))


def _order(path: Path) -> tuple[list[list[str | int]], str]:
    """Key that puts 2.png before 10.png, in every part of a path."""
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in path.parts], str(path)


class Film:
    """Frames of a film, uint8 [h, w, 3], decoded one at a time by ffmpeg, up to one that is damaged: `for frame in film`.

    With `seconds` they are those of a part from `begin`. What became of them is known after the last one.
    """

    def __init__(self, path: Path, begin: float = 0.0, seconds: float | None = None) -> None:
        self.path, self.frames = path, 0
        self._part = () if seconds is None else ("-ss", f"{begin:.6f}", "-t", f"{seconds:.6f}")
        self._status, self._log = 0, ""

    def __iter__(self) -> Iterator[np.ndarray]:
        from imageio_ffmpeg import get_ffmpeg_exe

        command = [get_ffmpeg_exe(), *LOUD, *STRICT, *self._part, "-i", f"file:{self.path}", *EVERY]
        with TemporaryFile() as log, Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=log, start_new_session=True) as process:
            try:
                while (frame := _ppm(process.stdout)) is not None:
                    self.frames += 1
                    yield frame
                self._status = process.wait()
            finally:
                process.kill()
            log.seek(0)
            self._log = log.read().decode(errors="replace")

    @property
    def fault(self) -> str | None:
        """Why ffmpeg could not read on, in its words: it gave up, or the container is broken. None: it read everything."""
        lines = re.findall(r"^((?:\[[^]]*\] )*?)\[(?:error|fatal|panic)\] (.*)", self._log, re.MULTILINE)
        container = re.search(r"Input #0, (\S+), from ", self._log)
        broken = [what for where, what in lines if container and f"{container[1]} @" in where]
        if self._status:
            return lines[0][1].strip() if lines else f"ffmpeg ended with status {self._status}"
        return broken[0].strip() if broken else None

    @property
    def rate(self) -> float | None:
        """Frames a second on average, as far as the container knows."""
        found = re.search(r" ([\d.]+) fps", self._video)
        return float(found[1]) if found and float(found[1]) else None

    @property
    def lasted(self) -> float:
        """Seconds that the frames take."""
        found = re.findall(r"frame=.* time=([\d:.]+)", self._log)
        return _seconds(found[-1]) if found else 0.0

    @property
    def lasts(self) -> float | None:
        """Seconds that the film takes by its container. None: it does not say so of the film alone, without its sound."""
        own = re.search(r"DURATION\S*\s*: ([\d:.]+)", self._video)
        whole = re.search(r"Duration: ([\d:.]+)(?:, start: ([\d.]+))?", self._log)
        if own is None and (whole is None or ": Audio: " in self._log):
            return None
        end, start = _seconds((own or whole)[1]), float(whole[2] or 0) if whole else 0.0
        return end if abs(end - self.lasted) < abs(end - start - self.lasted) else end - start  # by the container it is one or the other

    @property
    def _video(self) -> str:
        """What ffmpeg says of the stream that it read: the first line and the ones below it."""
        found = re.search(r"Stream #\S+ Video: .*?(?=Stream |\Z)", self._log, re.DOTALL)
        return found[0] if found else ""


def _ppm(pipe: IO[bytes]) -> np.ndarray | None:
    """The next picture, uint8 [h, w, 3]; None where there is none, or not all of it."""
    if pipe.readline() != b"P6\n":
        return None
    width, height = map(int, pipe.readline().split())
    pipe.readline()
    content = pipe.read(height * width * 3)
    return np.frombuffer(content, np.uint8).reshape(height, width, 3) if len(content) == height * width * 3 else None


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _film(path: Path, size: int | None) -> np.ndarray:
    """uint8 [T, h, w, 3], or squares of a size. Raises DataError where a film is damaged, or shorter than its container says."""
    film = Film(path)
    pixels = gathered(((f"{path}: picture {t}", frame) for t, frame in enumerate(film)), size)
    fault, expected = film.fault, ""
    if path.suffix.lower() == ".gif" and fault is None:
        pictures, whole = _gif(path)
        if not whole or film.frames != pictures:
            fault, expected = "the file is damaged or ends early", f" of {pictures}{'' if whole else ' or more'}"
    elif (lasts := film.lasts) is not None:
        rate = film.rate or SLOW
        expected = f" of about {round(lasts * rate)}, {film.lasted:.2f} of {lasts:.2f} seconds"
        if fault is None and lasts - film.lasted > SLACK / rate + ROUNDED:
            fault = "the rest is missing"
    if fault or not film.frames:
        raise DataError(f"{path}: {film.frames} frames can be read{expected} ({fault or 'there is none'}); {AGAIN}")
    return pixels


def _gif(path: Path) -> tuple[int, bool]:
    """How many pictures lie in a GIF, and whether it goes on to its end. A GIF does not say so itself; see its specification, GIF89a."""
    content, count = path.read_bytes(), 0
    try:
        at = 13 + _palette(content[10])
        while content[at] != ord(";"):
            if content[at] == ord(","):
                at, count = at + 11 + _palette(content[at + 9]), count + 1
            elif content[at] == ord("!"):
                at += 2
            else:
                return count, False
            while content[at]:  # blocks of up to 255 bytes
                at += content[at] + 1
            at += 1
    except IndexError:
        return count, False
    return count, True


def _palette(flags: int) -> int:
    """Bytes of the colours that follow."""
    return 3 << (flags % 8 + 1) if flags & 128 else 0


def _pictures(folder: Path, size: int | None) -> np.ndarray:
    """uint8 [T, h, w, 3], or squares of a size."""
    return opened(sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURES), key=_order), size)


def _actions(path: Path) -> np.ndarray:
    found = _table(path)
    if found is None:
        expected = " or ".join(file.name for file in _beside(path))
        raise DataError(f"{path}: no actions beside it, expected {expected}; without any pass --actions none")
    return found


def _beside(path: Path, what: str = "") -> list[Path]:
    """Where rows of numbers of a film or folder may lie. Not only a suffix may follow a dot in the name of a folder."""
    path = Path(os.path.abspath(path))  # `.` has no name
    name = path.name if path.is_dir() else path.stem
    return [path.with_name(f"{name}{what}{suffix}") for suffix in (".npy", ".csv")]


def _table(path: Path, what: str = "") -> np.ndarray | None:
    """Rows of numbers of `<name><what>.npy` or `.csv` beside a film or folder, or None."""
    for file in _beside(path, what):
        if file.exists():
            with readable(str(file)):
                return np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file, delimiter=",", ndmin=2)
    return None
