"""The processes of a run watch each other: none of them outlives another, or waits for ever.

Each publishes its state every second in the key-value store of JAX's coordinator, which lives in
the first process; that one judges them, and all end by its verdict, with one line each.
"""

from collections.abc import Callable
import dataclasses
import json
import threading
import time
from typing import Any

from moe.machine import aborts, exits, verdict
from moe.machine.verdict import State, Verdict

BEAT_SECONDS = 1.0
PATIENCE = 30.0  # until a run's `train.heartbeat_seconds` is known
OWN_ERROR_SECONDS = 12  # for a verdict, before an error is told as this process's own
STATES, VERDICT = "moe/peers/states/", "moe/peers/verdict"


class Peers:
    """This process's part of the watch.

    Args:
        client: of JAX's coordinator.
        process, count: the index of this process, and how many there are.

    Attributes:
        patience: seconds of silence after which a process is taken for dead.
        at: returns what the main thread works at.
        saved: returns in words what the run can go on from.
    """

    def __init__(self, client: Any, process: int, count: int):
        self._client, self._process, self._count = client, process, count
        self.patience, self.state = PATIENCE, State()
        self.at: Callable[[], tuple[str, int] | None] = lambda: None
        self.saved: Callable[[], str] = lambda: "the same command goes on from what is saved"
        self._over, self._ending, self._beats = threading.Event(), threading.Lock(), 0
        self._answered = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._clock = 0.0  # seconds for which this process ran

    def start(self) -> None:
        """Begin to publish and to watch; from now on this process may end at any moment."""
        exits.last_words.append(self._says_its_end)
        aborts.ask_first(self.failed)
        for work in (self._publishes, self._watches):
            threading.Thread(target=work, daemon=True).start()

    def done(self) -> None:
        """Wait until the run is over for every process."""
        self._change(done=True)
        self._over.wait()

    def failed(self) -> None:
        """After an error: return where it is this process's own, and end where another is lost."""
        self._change(failed=True)
        self._over.wait(OWN_ERROR_SECONDS)

    def hung(self, line: str) -> None:
        """The watchdog has barked: end, after the others were told of it."""
        self._change(hung=line)
        self._over.wait(6 * BEAT_SECONDS)
        self._end(Verdict(f"{line}, in process {self._process} of {self._count}", exits.HUNG))

    def first_is_gone(self) -> None:
        """The connection to the first process broke."""
        if self.state.done:
            self._over.set()
        if not self._over.is_set():
            line = f"process 0 of {self._count} was killed or has ended: its connection broke"
            self._end(Verdict(line, exits.PEER_LOST))

    def _change(self, **changed: Any) -> None:
        self.state = dataclasses.replace(self.state, **changed)
        exits.briefly(self._publish)

    def _says_its_end(self, code: int) -> None:
        self._change(code=code)
        if self._process == 0 and not self._ending.locked():
            told = Verdict(f"process 0 of {self._count} has ended with status {code}", code)
            self._tell(told if code > 128 else dataclasses.replace(told, code=exits.PEER_LOST))

    def _publish(self) -> None:
        self._beats += 1
        state = dataclasses.asdict(dataclasses.replace(self.state, at=self.at()))
        text = json.dumps({"beat": self._beats, "state": state})
        self._client.key_value_set(f"{STATES}{self._process}", text, allow_overwrite=True)

    def _publishes(self) -> None:
        """Publish, and take or make the verdict, each second; a stuck coordinator blocks it."""
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._publish()
                found = self._judge() if self._process == 0 else self._told()
                self._answered.set()
            except Exception:  # an RPC failed: `_watches` sees it if it goes on
                continue
            if found is not None:
                self._follow(found)

    def _watches(self) -> None:
        """Count the time for which this process ran, and for which the coordinator was silent."""
        before, silent = time.monotonic(), 0.0
        while not self._over.wait(BEAT_SECONDS / 2):
            now = time.monotonic()
            ran, before = min(now - before, 2 * BEAT_SECONDS), now
            self._clock += ran
            silent = 0.0 if self._answered.is_set() else silent + ran
            self._answered.clear()
            if silent > self.patience + 2 * BEAT_SECONDS:
                line = f"process 0 of {self._count} has not answered for {silent:.0f} s"
                self._end(Verdict(f"{line}: it was stopped, or is cut off", exits.PEER_LOST))

    def _told(self) -> Verdict | None:
        # A missing key would be an error.
        found = dict(self._client.key_value_dir_get(VERDICT))
        return Verdict(**json.loads(found[f"{VERDICT}/it"])) if found else None

    def _judge(self) -> Verdict | None:
        states, silent, ended = {}, {}, {}
        found = dict(self._client.key_value_dir_get(STATES))
        for i in range(self._count):
            text = found.get(f"{STATES}{i}", "")
            if i not in self._heard or self._heard[i][0] != text:
                self._heard[i] = text, self._clock
            since = self._clock - self._heard[i][1]
            if text:
                states[i] = _state(json.loads(text)["state"])
            if text and states[i].code is not None:
                ended[i] = since
            silent[i] = 0.0 if i == 0 else since
        return verdict.judge(states, silent, ended, self._count, self.patience)

    def _tell(self, found: Verdict) -> None:
        """Publish a verdict, and give the others the time to read it."""
        text = json.dumps(dataclasses.asdict(found))
        self._client.key_value_set(f"{VERDICT}/it", text, allow_overwrite=True)
        time.sleep(2.5 * BEAT_SECONDS)

    def _follow(self, found: Verdict) -> None:
        if self._process == 0:
            self._tell(found)
        if found.line:
            self._end(found)
        self._over.set()

    def _end(self, found: Verdict) -> None:
        with self._ending:
            exits.end(f"moe: {found.line}; {exits.briefly(self.saved)}", found.code)


def _state(fields: dict[str, Any]) -> State:
    at = fields.pop("at")
    return State(at=None if at is None else tuple(at), **fields)
