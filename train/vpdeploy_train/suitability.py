"""Whether a data set suits what was asked for, known before an image is read."""

from __future__ import annotations

import logging

from vpdeploy.errors import SpecError
from vpdeploy_train.data import DataSource
from vpdeploy_train.recipes import recipe_remarks
from vpdeploy_train.settings import TrainSettings

logger = logging.getLogger("vpdeploy.train")


def check_data(settings: TrainSettings, data: DataSource) -> None:
    """Check that what was asked for can be done with the data, and warn where a recipe is for other data.

    Raises:
        SpecError: Something is to be chosen on validation images and there are none.
    """
    if settings.recipe is not None:
        for remark in recipe_remarks(settings.recipe, classes=len(data.labels), lr_is_given=settings.lr is not None):
            logger.warning("%s", remark)
    if data.val:
        return
    for asked, option in ((settings.prunes, "--no-prune"), (settings.early_stop > 0, "--early-stop 0")):
        if asked:
            raise SpecError(f"{data.spec}: no validation images to choose by; use {option}, or leave #final away")
    logger.info("%s: no validation images, the last epoch is the result", data.spec)
