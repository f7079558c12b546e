"""The table of faults: what is done to running trainings, and whether they end as if nothing had happened.

A tiny network learns made-up pictures through the real command line, on the CPU, in processes of their own. At a
moment drawn by lot something happens to one of them; then ``--resume`` takes the run to its end, and the bytes of its
checkpoints and the tensors of its state are compared with those of a run that was left alone.
"""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fasternet.environment import create_record
from fasternet.records import Record, load_records
from fasternet.timing import Track, silent
from fasternet.train.state import load_state

SUITE = "faults"
WIDTH = 8
NUM_IMAGES = 40  # of each of two classes
RECIPE = (
    *("epochs=4", "batch_size=8", "input_size=32", "precision=fp32", "lr=0.002", "warmup_epochs=1"),
    *("mixup=0.2", "drop_path_rate=0.2", "ema_decay=0.9"),
)
NUM_OTHERS = 3  # of each fault that is not a kill
MAX_TRIES = 8  # for each injection: a fault may come too late, or find nothing
MAX_RESUMES = 3
TIMEOUT_S = 300.0
MAX_FILE_BYTES = 16 * 1024  # room for the log, not for a checkpoint
POLL_S = 0.005

Hit = Callable[[subprocess.Popen[bytes], random.Random], bool]
Damage = Callable[[Path, random.Random], bool]


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that happens to a run.

    Attributes:
        name: Subject of its record.
        hit: Does it to the running command; returns False where there was nothing left to hit.
        damage: Done to the run folder afterwards; returns False where there was nothing to damage.
        num_processes: 1, or how many ``torchrun`` starts.
        num_workers: Processes that load pictures.
        restarts: How often ``torchrun`` starts again by itself; then nobody resumes.
    """

    name: str
    hit: Hit
    damage: Damage = lambda output, lot: True
    num_processes: int = 1
    num_workers: int = 0
    restarts: int = 0


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one injection ended.

    Attributes:
        recovered: The run came to its end.
        equal: It ended bitwise as the one that was left alone.
        remark: The last line of what the command said when it happened, and of what was said on the way on.
    """

    recovered: bool
    equal: bool
    remark: str


def measure_faults(
    *, num_kills: int = 20, quick: bool = False, seed: int = 0, track: Track = silent, faults: Sequence[str] = ()
) -> Iterator[Record]:
    """Inject every fault, and count what was recovered.

    Args:
        num_kills: Kills at random moments: three fifths of a process alone, a fifth each of one and of all of two.
        quick: Each fault that is no kill once instead of ``NUM_OTHERS`` times.
        seed: Of the moments and of what is hit.
        track: Shows progress.
        faults: Names of those wanted; none: all.

    Yields:
        A record for each fault: injected, recovered, bitwise_equal, remark. Injections that came too late are not
        counted.

    Raises:
        ValueError: ``num_kills`` is too small, or there is no such fault.
        OSError: This system is not Linux, or the run that is left alone fails.
    """
    if num_kills < 3:
        raise ValueError(f"num_kills={num_kills} must be at least 3: one of each kind")
    if unknown := set(faults) - {fault.name for fault in FAULTS}:
        raise ValueError(f"unknown faults {sorted(unknown)}: there are {', '.join(fault.name for fault in FAULTS)}")
    if not Path("/proc/self/task").is_dir():
        raise OSError("faults are injected through /proc, which Linux has alone")
    chosen = [fault for fault in FAULTS if not faults or fault.name in faults]
    counts = _share_out(num_kills, 1 if quick else NUM_OTHERS)
    with tempfile.TemporaryDirectory(prefix="fasternet-faults-") as folder:
        laboratory = Laboratory(Path(folder))
        for fault in chosen:
            lot = random.Random(f"{seed} {fault.name}")
            trials = []
            for number in track(range(counts[fault.name]), counts[fault.name], fault.name):
                trials += laboratory.inject(fault, lot, number)
            yield _create_record(fault, trials)


def _share_out(num_kills: int, num_others: int) -> dict[str, int]:
    pair = max(1, num_kills // 5)
    kills = {KILL_ALONE: num_kills - 2 * pair, KILL_ONE: pair, KILL_ALL: pair}
    return {fault.name: kills.get(fault.name, num_others) for fault in FAULTS}


def _create_record(fault: Fault, trials: Sequence[Trial]) -> Record:
    values = {
        "injected": len(trials),
        "recovered": sum(trial.recovered for trial in trials),
        "bitwise_equal": sum(trial.equal for trial in trials),
        "remark": next((trial.remark for trial in trials if not trial.equal), trials[0].remark if trials else ""),
    }
    condition = {"data": "made-up pictures", "device": "cpu", "threads": 1, "processes": fault.num_processes}
    return create_record(SUITE, "fault", fault.name, condition=condition, values=values)


class Laboratory:
    """Runs the command line on made-up pictures, and knows what a run left alone ends in.

    Args:
        folder: Where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = create_pictures(folder / "pictures")
        self._calm: dict[int, tuple[Path, float]] = {}

    def inject(self, fault: Fault, lot: random.Random, number: int) -> list[Trial]:
        """Inject a fault once; several tries where it comes too late. Empty where it never hit."""
        calm, seconds = self.run_calmly(fault.num_processes)
        for attempt in range(MAX_TRIES):
            output = self.folder / f"{fault.name.replace(' ', '-')}-{number}-{attempt}"
            process = self.start(output, fault)
            try:
                hit = self._hit(process, fault, output, lot, seconds)
                status = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return [Trial(recovered=False, equal=False, remark=f"no end {TIMEOUT_S:.0f} s after the fault")]
            finally:
                stop_tree(process)
            said = self.read_said(output)
            reached = status != 0 or (fault.restarts > 0 and "exitcode" in said)
            if hit and reached and fault.damage(output, lot):
                return [self._recover(fault, output, calm, status, said)]
        return []

    def run_calmly(self, num_processes: int) -> tuple[Path, float]:
        """Return the folder of a run that was left alone, and its seconds from when it could be resumed to its end."""
        if num_processes not in self._calm:
            output = self.folder / f"calm-{num_processes}"
            process = self.start(output, Fault("calm", lambda process, lot: True, num_processes=num_processes))
            try:
                _wait_until_resumable(process, output)
                started = time.perf_counter()
                status = process.wait(TIMEOUT_S)
            finally:
                stop_tree(process)
            if status:
                raise OSError(f"the run that was left alone failed: {self._shorten(self.read_said(output))}")
            self._calm[num_processes] = output, time.perf_counter() - started
        return self._calm[num_processes]

    def start(self, output: Path, fault: Fault, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """Start the command; what it says is appended to a file beside the run folder."""
        command = [sys.executable, "-m"]
        if fault.num_processes > 1:
            group = ["--standalone", "--nproc-per-node", str(fault.num_processes)]
            command += ["torch.distributed.run", *group, "--max-restarts", str(fault.restarts), "-m"]
        command += ["fasternet", "train", "fasternet_t0", "--data", str(self.data), "--output", str(output)]
        command += ["--recipe", "small", "--width", str(WIDTH), "--device", "cpu", "--save-minutes", "0"]
        for change in (*RECIPE, f"num_workers={fault.num_workers}"):
            command += ["--set", change]
        command += ["--resume"] if resume else []
        with _said(output).open("ab") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)

    def read_said(self, output: Path) -> str:
        """Return all that the commands of a run have said."""
        return _said(output).read_text(encoding="utf-8", errors="replace")

    def _hit(
        self, process: subprocess.Popen[bytes], fault: Fault, output: Path, lot: random.Random, seconds: float
    ) -> bool:
        if not _wait_until_resumable(process, output) and process.wait():
            raise OSError(f"a run failed before its fault: {self._shorten(self.read_said(output))}")
        time.sleep(lot.uniform(0, seconds))
        return process.poll() is None and fault.hit(process, lot)

    def _recover(self, fault: Fault, output: Path, calm: Path, status: int, said: str) -> Trial:
        remarks = [self._shorten(said)] if status > 0 else []
        for _ in range(MAX_RESUMES):
            if status == 0:
                break
            before = len(self.read_said(output))
            process = self.start(output, fault, resume=True)
            try:
                status = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                remarks.append(f"resumed, it did not end within {TIMEOUT_S:.0f} s")
                break
            finally:
                stop_tree(process)
            news = self.read_said(output)[before:]
            remarks += [self._shorten(line) for line in news.splitlines() if "damaged" in line or "error: " in line]
        difference = find_difference(output, calm) if status == 0 else None
        remarks += [difference] if difference else []
        return Trial(status == 0, status == 0 and difference is None, "; ".join(dict.fromkeys(remarks)))

    def _shorten(self, said: str) -> str:
        """Return the sentence of an error, or the last line, without folders."""
        lines = [line for line in said.splitlines() if line.strip(" =-")]
        errors = [line for line in lines if line.startswith("error: ")]
        # Where another process is gone, the processes that are left say so; torchrun's own report is long.
        line = (errors or lines or [""])[-1].removeprefix("error: ").partition("; go on")[0]
        words = [Path(word).name if str(self.folder) in word else word for word in line.split()]
        return " ".join(words)[:160]


def create_pictures(folder: Path) -> Path:
    """Write noisy pictures of two classes, dark and bright."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 100), ("bright", 150)):
        (folder / name).mkdir(parents=True)
        for number in range(NUM_IMAGES):
            pixels = generator.normal(level, 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def find_difference(output: Path, calm: Path) -> str | None:
    """Compare two runs that have ended: the bytes of their model folders, the tensors of their state, their losses.

    Returns:
        None where they are equal, else the first thing that differs.
    """
    for name in ("best/model.safetensors", "last/model.safetensors"):
        if (output / name).read_bytes() != (calm / name).read_bytes():
            return f"{name} differs"
    if not _are_equal(*(load_state(folder / "last" / "state.pt") for folder in (output, calm))):
        return "last/state.pt differs"
    losses = [
        [record.values["train_loss"] for record in load_records(folder / "log.jsonl") if record.kind == "epoch"]
        for folder in (output, calm)
    ]
    return None if losses[0] == losses[1] else "log.jsonl differs"


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return bool(one == other)


def _said(output: Path) -> Path:
    return output.with_name(output.name + ".txt")


def _wait_until_resumable(process: subprocess.Popen[bytes], output: Path) -> bool:
    """Wait for the file that a run folder is complete with; return whether the command still runs."""
    begin = time.perf_counter()
    while not (output / "recipe.yaml").is_file() and process.poll() is None:
        if time.perf_counter() - begin > TIMEOUT_S:
            raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)
        time.sleep(POLL_S)
    return process.poll() is None


def list_children(pid: int) -> list[int]:
    """Return the processes that a process has started, in their order; none where it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def list_tree(pid: int) -> list[int]:
    """Return a process and all that it and its own have started."""
    return [pid, *(found for child in list_children(pid) for found in list_tree(child))]


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a command with all its processes, where it still runs."""
    if process.poll() is None:
        kill_all(process, random.Random())
        process.wait()


def _kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_all(process: subprocess.Popen[bytes], lot: random.Random) -> bool:
    """Kill the command and whatever it has started."""
    killed = [_kill(pid) for pid in list_tree(process.pid)]
    return all(killed)


def kill_child(process: subprocess.Popen[bytes], lot: random.Random) -> bool:
    """Kill one process that the command has started: of ``torchrun`` one that trains, else one that loads pictures."""
    children = list_children(process.pid)
    return bool(children) and _kill(lot.choice(children))


def terminate_all(process: subprocess.Popen[bytes], lot: random.Random) -> bool:
    """Send SIGTERM to whatever the command has started, then to the command: ``torchrun`` hands it on once more."""
    for pid in list_tree(process.pid)[1:]:
        _kill(pid, signal.SIGTERM)
    time.sleep(lot.uniform(0.01, 0.03))  # else the two are one to Python
    process.terminate()
    return True


def _fill_disk(process: subprocess.Popen[bytes], lot: random.Random) -> bool:
    """Let no file of the process grow any more: for the program this is a full disk, and needs no rights."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    return True


def truncate_state(output: Path, lot: random.Random) -> bool:
    """Cut the last state off somewhere; False where there is no state before it."""
    path = output / "last" / "state.pt"
    if not _has_two_states(path):
        return False
    os.truncate(path, lot.randrange(path.stat().st_size))
    return True


def flip_bit(output: Path, lot: random.Random) -> bool:
    """Turn a bit of the last state round; False where there is no state before it."""
    path = output / "last" / "state.pt"
    if not _has_two_states(path):
        return False
    content = bytearray(path.read_bytes())
    content[lot.randrange(len(content))] ^= 1 << lot.randrange(8)
    path.write_bytes(content)
    return True


def tear_log(output: Path, lot: random.Random) -> bool:
    """Leave the log with the beginning of a line, as a write that was cut off does."""
    with (output / "log.jsonl").open("ab") as log:
        log.write(b'{"schema": 1, "suite": "train", "kind": "ep')
    return True


def _has_two_states(path: Path) -> bool:
    return path.is_file() and path.with_name("state-before.pt").is_file()


KILL_ALONE = "SIGKILL"
KILL_ONE = "SIGKILL of one of two processes"
KILL_ALL = "SIGKILL of both of two processes"
FAULTS = (
    Fault(KILL_ALONE, kill_all),
    Fault(KILL_ONE, kill_child, num_processes=2),
    Fault(KILL_ALL, kill_all, num_processes=2),
    Fault("SIGTERM", terminate_all),
    Fault("SIGTERM of all processes under torchrun", terminate_all, num_processes=2),
    Fault("last state truncated", kill_all, truncate_state),
    Fault("last state with one bit flipped", kill_all, flip_bit),
    Fault("disk full", _fill_disk),
    Fault("loader process killed", kill_child, num_workers=2),
    Fault("torn line in the log", kill_all, tear_log),
    Fault("process killed under --max-restarts", kill_child, num_processes=2, restarts=2),
)
