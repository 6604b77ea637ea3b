"""Two processes, which talk over the loopback: the answer of one, and one decision."""

import json
import random
import socket
import time

import numpy as np
import pytest

import processes
import scripts
from inside import progress_bar


class Run:
    """Two processes of one scenario, which end with it."""

    def __init__(self, scenario, folder):
        self.scenario, self.folder = scenario, folder
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self.port = str(probe.getsockname()[1])

    def __enter__(self):
        self.logs = [self.folder / f"log-{number}" for number in range(2)]
        self.processes = []
        for number, path in enumerate(self.logs):
            args = [self.scenario, str(number), self.port, str(self.folder)]
            process = scripts.started(processes.__file__, *args, log=path)
            self.processes.append(process)
        return self

    def __exit__(self, *exc):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def found(self):
        """Waits for both, and returns what they wrote."""
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(300)
            assert process.exitcode == 0, log.read_text()[-3000:]
        names = [f"{self.scenario}-{number}.json" for number in range(2)]
        return [json.loads((self.folder / name).read_text()) for name in names]


def found(scenario, folder):
    with Run(scenario, folder) as run:
        return run.found()


def test_two_processes_have_the_answer_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_bar, "is_interactive", progress_bar.is_interactive)
    alone = tmp_path / "alone"
    alone.mkdir()
    with Run("answers", tmp_path) as run:
        expected = processes.answers(alone)
        answers = run.found()
    bars = ["30/30" in log.read_text() for log in run.logs]
    assert bars == [True, False]
    for answer in answers:
        assert answer.keys() == expected.keys()
        for name, own in answer.items():
            one = expected[name]
            assert (own["steps"], own["told"]) == (one["steps"], one["told"]), name
            close = {"rtol": 1e-6 if "solve" in name else 1e-9, "atol": 1e-10}
            np.testing.assert_allclose(own["loss"], one["loss"], **close)
            np.testing.assert_allclose(own["params"], one["params"], **close)


@pytest.mark.seams
def test_what_one_decides_all_do(tmp_path):
    for number, cases in enumerate(found("decisions", tmp_path)):
        told = {name: case["told"] for name, case in cases.items()}
        steps = {name: case["steps"] for name, case in cases.items()}
        assert told["callback"] == "The callback ended the fit."
        assert told["interrupt"] == "The fit was interrupted from the keyboard."
        assert "told to end (SIGTERM)" in told["terminate"]
        assert steps["callback"] == steps["interrupt"] == steps["error"] == 10
        assert steps["terminate"] == 10
        own = "ZeroDivisionError: the dog ate it"
        assert told["error"] == (
            own if number else f"PeerError: Process 1 met an error: {own}"
        )
        assert told["dry"].startswith("StreamExhaustedError")
        assert steps["dry"] == 10
        assert "OSError: the disk is gone" in told["loader"]
        assert "equally large shares" in told["shares"]
        for name, what in {
            "steps": "`steps` is 30 and 31 on processes 0 and 1",
            "data": "`data` differs at '1'",
            "start": "`trainer` differs at 'params.slope'",
            "code": "`program` differs",
            "record": "`record` is slope and offset",
        }.items():
            assert told[name].startswith(
                "ValueError: The processes of this `fit` disagree"
            )
            assert what in told[name]
        assert "holds something else than checkpoints" in told["directory"]
        assert "Pass a `mesh` with the devices of all" in told["alone"]
        assert "`callback` returned another trainer on one process" in told["moved"]
        assert "UnknownPathError" in told["unknown"]
        assert told["quits"].endswith("SystemExit: 3")
        assert "`steps` is -1" in told["negative"]
        assert "`checkpoint` differs" in told["elsewhere"]


PLACES = {
    "step: data": "`batch` differs at '1'",
    "step: start": "`trainer` differs at 'params.slope'",
    "step: code": "`program` differs",
    "step: the second": "`batch` differs at '1'",
    "step: another": "`trainer` differs at '",
    "solve: data": "`batch` differs at '1'",
    "solve: start": "`trainer` differs at 'params.slope'",
    "solve: code": "`program` differs",
    "solve: solver": "`solver` differs",
    "solve: steps": "`max_steps` is 100 and 101",
    "many: data": "`batch` differs at '1'",
    "many: start": "`trainer` differs at 'params.slope'",
    "many: code": "`program` differs",
}
CALLED = {"step": "step", "solve": "solve", "many": "fit_many", "fit": "fit"}


def test_processes_meet_before_they_compute_together(tmp_path):
    both = found("meetings", tmp_path)
    for number, cases in enumerate(both):
        for name, place in PLACES.items():
            called = CALLED[name.split(":")[0]]
            start = f"ValueError: The processes of this `{called}` disagree"
            assert cases[name].startswith(start), (name, cases[name])
            assert place in cases[name], (name, cases[name])
        for name in ("step: broken", "solve: broken", "many: broken"):
            kind = cases[name].split(":")[0]
            assert kind == ("PeerError", "TypeError")[number], cases[name]
        for name in ("fit, step", "solve, step", "fit, many"):
            one, other = (CALLED[each] for each in name.split(", "))
            assert cases[name].startswith("PeerError: Process")
            assert f"the start of `{one}`" in cases[name]
            assert f"the start of `{other}`" in cases[name]
    absent = "Process 1 of this `fit` has not answered within 1 seconds"
    assert absent in both[0]["absent"]


def test_two_processes_that_are_killed_lose_nothing(tmp_path):
    with Run("long", tmp_path) as run:
        log, reached = run.logs[0], 0
        # After some steps, and then at any moment.
        while reached < 20:
            assert run.processes[0].is_alive(), log.read_text()[-3000:]
            time.sleep(0.02)
            lines = log.read_text().split("\n")[:-1]
            reached = max([reached, *map(int, filter(str.isdecimal, lines))])
        time.sleep(random.uniform(0, 0.1))
    ours, theirs = found("long", tmp_path)
    assert ours == theirs
    assert ours["killed"] == ours["whole"]
