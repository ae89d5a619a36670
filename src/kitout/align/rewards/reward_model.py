"""A reward adapter as a source of rewards: its scalar head at each answer's last token, on the policy's own base.

The adapter sees prompt and answer as the policy wrote them, the end token included where there is one. It knows no
other source and no weights, and nothing of how the adapter was trained.
Source: scalar head at the last token, as in https://arxiv.org/abs/2203.02155.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kitout.align.rewards.reward import AnswerBatch
from kitout.align.roles import roles
from kitout.align.scalar_head import head_width
from kitout.data.encode.item import EncodedExample
from kitout.errors import KitoutError, RewardError
from kitout.evaluate.ask.batches import map_batches
from kitout.evaluate.ask.text_limit import check_prompts
from kitout.kit import Kit
from kitout.train.objectives.answer_rows import collate_rows


@dataclass(frozen=True)
class ModelReward:
    """A reward adapter of the kit."""

    name: str
    """In messages, logs and files."""
    kit: Kit
    """Holds the adapter; its other adapters and its active route play no part."""
    adapter: str
    """The adapter's name in the kit; it has a scalar head."""
    chunk_size: int = 32
    """Rows of one forward at most, halved while memory runs out."""

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        """One value per answer, without dropout; ConfigError for an answer that is longer than the model reads."""
        texts = [row.input_ids for row in answers.encoded]

        def ask(rows: list[tuple[int, ...]]) -> list[float]:
            batch = collate_rows([EncodedExample(ids) for ids in rows], self.kit.device)
            return roles(self.kit, batch, {self.adapter: "last"})[self.adapter].tolist()

        with self.kit.use(self.adapter):
            check_prompts(self.kit, texts)
        return map_batches(texts, self.chunk_size, ask, None)


def load_reward_model(kit: Kit, folder: str | Path, adapter: str, name: str) -> ModelReward:
    """Loads the adapter of a folder into the kit under a name of its own, frozen.

    folder: an adapter's folder. adapter: its name in the kit. name: the source's name in messages and files.
    RewardError for a folder that does not load on this base, and for an adapter without a scalar head; the kit is then
    unchanged.
    """
    try:
        loaded = kit.load(folder, name=adapter)
    except KitoutError as error:
        raise RewardError(f"reward {name}: {error}") from error
    if head_width(kit, adapter) != 1:
        kit.remove(adapter)
        raise RewardError(
            f"reward {name}: the adapter in {folder} has no scalar head, so it judges nothing: name one that "
            "`kitout align reward` trained"
        )
    loaded.requires_grad_(False)
    return ModelReward(name, kit, adapter)
