"""completions.jsonl: what a line holds, and that a resumed run has no answer twice."""

from __future__ import annotations

import json
from pathlib import Path

from kitout.align.completions_log import COMPLETIONS_FILE, completion_lines, write_completions
from kitout.align.rewards.reward import AnswerBatch, RewardValues
from kitout.align.rollout import Rollout
from kitout.train.metrics_log import MetricsLog, read_metrics

ROLLOUTS = [Rollout(0, (7, 8, 9, 2), 2, True, "vier · 4"), Rollout(0, (7, 8, 10), 2, False, "five")]
ANSWERS = AnswerBatch.of(ROLLOUTS, [[{"role": "user", "content": "Two and two?"}]], [{}])
VALUES = RewardValues(("a", "m:f"), ((1.0, None), (None, None)), (1.0, None))


def test_a_line_holds_the_answer_and_its_rewards(tmp_path: Path) -> None:
    lines = completion_lines(3, ROLLOUTS, ANSWERS, VALUES, [0.5, None])
    write_completions(MetricsLog(tmp_path / COMPLETIONS_FILE), lines)
    texts = (tmp_path / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(texts[0]) == {
        "step": 3, "prompt": [{"role": "user", "content": "Two and two?"}], "completion": "vier · 4",
        "rewards": {"a": 1.0, "m:f": None}, "total": 1.0, "advantage": 0.5, "tokens": 2, "ended": True,
    }  # fmt: skip
    assert json.loads(texts[1])["total"] is None
    assert completion_lines(3, ROLLOUTS, ANSWERS, VALUES)[0].advantage is None


def test_a_resumed_run_goes_back_to_its_step(tmp_path: Path) -> None:
    file = tmp_path / COMPLETIONS_FILE
    log = MetricsLog(file)
    log.resume_at(0)
    for step in (1, 2, 3):
        write_completions(log, completion_lines(step, ROLLOUTS, ANSWERS, VALUES))
    expected = file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b'{"step": 4, "prompt": [{"ro')  # killed while it wrote
    again = MetricsLog(file)
    again.resume_at(2)
    assert [line["step"] for line in read_metrics(file)] == [1, 1, 2, 2]
    write_completions(again, completion_lines(3, ROLLOUTS, ANSWERS, VALUES))
    assert file.read_bytes() == expected
