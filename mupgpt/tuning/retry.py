"""A trial that was begun and not finished goes back into the queue."""

import logging

import optuna
from optuna.trial import FrozenTrial

__all__ = ["queue_again", "retry_after_death"]

MAX_RETRY = 2  # times that a trial is queued again after its worker died

log = logging.getLogger("mupgpt.worker")


def queue_again(study: optuna.Study, trial: FrozenTrial, deaths: int) -> None:
    """Queue what was begun and given up, with its values as far as they were chosen."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(params, user_attrs={"queued": True, "deaths": deaths})


def retry_after_death(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the trial of a dead worker again, unless too many have died on it."""
    deaths = 1 + trial.user_attrs.get("deaths", 0)
    if deaths <= MAX_RETRY:
        queue_again(study, trial, deaths)
    else:
        log.warning("%s trial %d: %d workers died on it; it is given up",
                    study.study_name, trial.number, deaths)  # fmt: skip
