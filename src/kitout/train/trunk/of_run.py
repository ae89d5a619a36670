"""The frozen trunk of a prepared run, of images or of texts, and where its choice is written.

The first start tries it; the folder keeps what it chose, since on another day a timing may come out otherwise. It knows
the run and its folder.
"""

from __future__ import annotations

from collections.abc import Callable

from kitout.train.config.schema import RunConfig
from kitout.train.loop import distributed
from kitout.train.measure.predict import plan_forwards
from kitout.train.run_folder import RunFolder
from kitout.train.setup.prepare import PreparedRun
from kitout.train.trunk.choose import choose_trunk


def keep_trunk(
    run: PreparedRun, config: RunConfig, folder: RunFolder, signature: str, micro_batch_size: int,
    log: Callable[[str], None],
) -> dict[str, str]:  # fmt: skip
    """Keeps what train.trunk asks for and says so; by job the module whose input is kept."""
    if run.first_dataset.images is not None:
        from kitout.train.trunk.image_features import keep_features  # images need pillow

        cuts, warnings = keep_features(run.kit, run.jobs)
        run.warnings.extend(warnings)
        return cuts
    evaluated = []
    for job, dataset in zip(run.jobs, run.datasets, strict=True):
        splits = (list(job.validation), list(dataset.test)[: config.evaluate.max_test_examples])
        evaluated.append(
            [
                [items[i] for i in rows]
                for items in splits
                for rows in plan_forwards(job.objective, items, range(len(items)))
            ]
        )
    resolved = folder.read_resolved() if folder.resumes else {}
    choice = choose_trunk(
        run.kit, run.jobs, evaluated, folder=folder.path, signature=signature, micro_batch_size=micro_batch_size,
        chosen=resolved.get("trunk", ""),
    )  # fmt: skip
    if choice.text:
        log(f"frozen trunk: {choice.text}")
        if distributed.rank() == 0:
            folder.write_resolved(folder.read_resolved() | {"trunk": choice.text})
    return choice.cuts
